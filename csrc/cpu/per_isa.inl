// Compiles the kernel file named by EMBEDGRAD_KERNELS once per instruction set, each in a namespace of its own; included
// inside namespace embedgrad, after every header that the kernels need.

namespace plain {
constexpr int VL = 4;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace plain

#if defined(__x86_64__)
EMBEDGRAD_TARGET_BEGIN(EMBEDGRAD_AVX2)
namespace avx2 {
constexpr int VL = 8;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace avx2
EMBEDGRAD_TARGET_END

EMBEDGRAD_TARGET_BEGIN(EMBEDGRAD_AVX512)
namespace avx512 {
constexpr int VL = 16;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace avx512
EMBEDGRAD_TARGET_END
#endif
