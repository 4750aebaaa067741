// The CUDA runtime for nvcc, its emulation for a host compiler. Every kernel file includes this.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace embedgrad {

// An array in shared memory. The emulation's version checks every access.
template <class T, int N>
struct SharedArray {
    T data[N];
    __device__ T& operator[](int i) { return data[i]; }
};

// Why the kernel cannot run on the current device; null where it can.
template <class Kernel>
const char* problem_of(Kernel* kernel) {
    cudaFuncAttributes ignored;
    const cudaError_t error = cudaFuncGetAttributes(&ignored, kernel);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // clears the error, so that `launched` does not report it
    return cudaGetErrorString(error);
}

inline bool launched() { return cudaGetLastError() == cudaSuccess; }

}  // namespace embedgrad

#define EMBEDGRAD_LAUNCH(kernel, blocks, threads, stream, ...) \
    kernel<<<(blocks), (threads), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "emulation/emulation.h"
#endif
