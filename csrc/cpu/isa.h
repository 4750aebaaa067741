// Which vector instructions the machine has, and how a kernel is compiled once for each.
//
// A kernel file X.inl is written in terms of simd.inl and compiled by X.cpp inside one namespace per instruction set
// (per_isa.inl); nothing is compiled with -march=native, so one binary runs everywhere.
#pragma once

#include <atomic>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "elements.h"

namespace embedgrad {

enum class Isa { plain, avx2, avx512, avx512vnni };

// The best set that this machine has.
inline Isa best_isa() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (avx2 && avx512) return __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::plain;
}

inline std::atomic<Isa>& isa_in_use() {
    static std::atomic<Isa> chosen{best_isa()};
    return chosen;
}

inline Isa isa() { return isa_in_use().load(std::memory_order_relaxed); }

}  // namespace embedgrad

#define EMBEDGRAD_PRAGMA(x) _Pragma(#x)
#if defined(__x86_64__) && defined(__clang__)
#define EMBEDGRAD_TARGET_BEGIN(features) \
    EMBEDGRAD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define EMBEDGRAD_TARGET_END _Pragma("clang attribute pop")
#elif defined(__x86_64__)
#define EMBEDGRAD_TARGET_BEGIN(features) _Pragma("GCC push_options") EMBEDGRAD_PRAGMA(GCC target(features))
#define EMBEDGRAD_TARGET_END _Pragma("GCC pop_options")
#endif
#define EMBEDGRAD_AVX2 "avx2,fma,f16c"
#define EMBEDGRAD_AVX512 "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq"
#define EMBEDGRAD_AVX512VNNI "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni"

// Calls `function(...)` of the namespace that fits the machine.
#if defined(__x86_64__)
#define EMBEDGRAD_DISPATCH(function, ...)                                \
    switch (::embedgrad::isa()) {                                        \
        case ::embedgrad::Isa::avx512vnni:                               \
        case ::embedgrad::Isa::avx512: avx512::function(__VA_ARGS__); break; \
        case ::embedgrad::Isa::avx2: avx2::function(__VA_ARGS__); break;     \
        default: plain::function(__VA_ARGS__);                           \
    }
// The same for kernel files that are also compiled for the dot products of bytes in AVX-512 (EMBEDGRAD_WITH_VNNI).
#define EMBEDGRAD_DISPATCH_VNNI(function, ...)                              \
    if (::embedgrad::isa() == ::embedgrad::Isa::avx512vnni)                 \
        avx512vnni::function(__VA_ARGS__);                                  \
    else                                                                    \
        EMBEDGRAD_DISPATCH(function, __VA_ARGS__)
#else
#define EMBEDGRAD_DISPATCH_VNNI(function, ...) plain::function(__VA_ARGS__);
#define EMBEDGRAD_DISPATCH(function, ...) plain::function(__VA_ARGS__);
#endif
