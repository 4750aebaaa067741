// Compiles the kernel file EMBEDGRAD_KERNELS once per instruction set, each time in the namespace of that set. Include
// this inside namespace embedgrad, after every header that the kernels need: a header must not land in these
// namespaces. The kernel file sees VL (floats per vector) and EMBEDGRAD_ISA: 0 (plain), 2 (AVX2) or 512 (AVX-512). With
// EMBEDGRAD_WITH_VNNI it is also compiled with VNNI, EMBEDGRAD_VNNI defined.

#define EMBEDGRAD_ISA 0
namespace plain {
constexpr int VL = 4;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace plain
#undef EMBEDGRAD_ISA

#if defined(__x86_64__)
#define EMBEDGRAD_ISA 2
EMBEDGRAD_TARGET_BEGIN(EMBEDGRAD_AVX2)
namespace avx2 {
constexpr int VL = 8;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace avx2
EMBEDGRAD_TARGET_END
#undef EMBEDGRAD_ISA

#define EMBEDGRAD_ISA 512
EMBEDGRAD_TARGET_BEGIN(EMBEDGRAD_AVX512)
namespace avx512 {
constexpr int VL = 16;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace avx512
EMBEDGRAD_TARGET_END

#if defined(EMBEDGRAD_WITH_VNNI)
#define EMBEDGRAD_VNNI 1
EMBEDGRAD_TARGET_BEGIN(EMBEDGRAD_AVX512VNNI)
namespace avx512vnni {
constexpr int VL = 16;
#include "simd.inl"
#include EMBEDGRAD_KERNELS
}  // namespace avx512vnni
EMBEDGRAD_TARGET_END
#undef EMBEDGRAD_VNNI
#endif
#undef EMBEDGRAD_ISA
#endif
