// Makes a header compile with the host compiler and with nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define EMBEDGRAD_HD __host__ __device__
#else
#define EMBEDGRAD_HD
#endif

// Exports a function of the C ABI. The libraries are compiled with hidden visibility.
#define EMBEDGRAD_API __attribute__((visibility("default")))

namespace embedgrad {

// The upper 64 bits of a·b. Not every compiler has 128-bit integers or an intrinsic for this.
EMBEDGRAD_HD inline uint64_t multiply_high(uint64_t a, uint64_t b) {
    const uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
    const uint64_t middle = a1 * b0 + ((a0 * b0) >> 32);
    const uint64_t other = a0 * b1 + (middle & 0xffffffffu);
    return a1 * b1 + (middle >> 32) + (other >> 32);
}

EMBEDGRAD_HD inline uint32_t float_bits(float x) {
    union {
        float number;
        uint32_t bits;
    } same = {x};
    return same.bits;
}

}  // namespace embedgrad
