// Which instruction set the kernels use, and the call of the version compiled for it.
//
// A kernel file X.inl is written in terms of simd.inl. X.cpp compiles it through per_isa.inl, in one namespace per
// instruction set. Nothing is compiled with -march=native, so one binary runs on every machine.
#pragma once

#include <atomic>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)  // GCC 12 warns of its own _mm512_undefined_ps wherever an intrinsic uses it
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "tensor_views.h"  // simd.inl loads and stores Bf16

namespace embedgrad {

enum class Isa { plain, avx2, avx512, avx512vnni };

// The best instruction set of this machine.
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

// Calls `function(...)` in the namespace of the instruction set in use.
#if defined(__x86_64__)
#define EMBEDGRAD_DISPATCH(function, ...)                                \
    switch (::embedgrad::isa()) {                                        \
        case ::embedgrad::Isa::avx512vnni:                               \
        case ::embedgrad::Isa::avx512: avx512::function(__VA_ARGS__); break; \
        case ::embedgrad::Isa::avx2: avx2::function(__VA_ARGS__); break;     \
        default: plain::function(__VA_ARGS__);                           \
    }
// The same for kernel files compiled with EMBEDGRAD_WITH_VNNI.
#define EMBEDGRAD_DISPATCH_VNNI(function, ...)                              \
    if (::embedgrad::isa() == ::embedgrad::Isa::avx512vnni)                 \
        avx512vnni::function(__VA_ARGS__);                                  \
    else                                                                    \
        EMBEDGRAD_DISPATCH(function, __VA_ARGS__)
#else
#define EMBEDGRAD_DISPATCH_VNNI(function, ...) plain::function(__VA_ARGS__);
#define EMBEDGRAD_DISPATCH(function, ...) plain::function(__VA_ARGS__);
#endif
