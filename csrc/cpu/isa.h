// Which vector instructions the machine has, and how a kernel is compiled once for each.
//
// A kernel file X.inl is written in terms of simd.inl and compiled by X.cpp inside one namespace per instruction set
// (per_isa.inl); nothing is compiled with -march=native, so one binary runs everywhere.
#pragma once

#include <atomic>

namespace embedgrad {

enum class Isa { plain, avx2, avx512 };

// The best set that this machine has.
inline Isa best_isa() {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
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
#define EMBEDGRAD_AVX2 "avx2,fma"
#define EMBEDGRAD_AVX512 "avx2,fma,avx512f,avx512vl,avx512bw,avx512dq"

// Calls `function(...)` of the namespace that fits the machine.
#if defined(__x86_64__)
#define EMBEDGRAD_DISPATCH(function, ...)                                \
    switch (::embedgrad::isa()) {                                        \
        case ::embedgrad::Isa::avx512: avx512::function(__VA_ARGS__); break; \
        case ::embedgrad::Isa::avx2: avx2::function(__VA_ARGS__); break;     \
        default: plain::function(__VA_ARGS__);                           \
    }
#else
#define EMBEDGRAD_DISPATCH(function, ...) plain::function(__VA_ARGS__);
#endif
