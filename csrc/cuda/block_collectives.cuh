// Sums, scans and maxima over the threads of a block. A block has a multiple of 32 threads, at most 1024.
#pragma once

#include "runtime.cuh"

namespace embedgrad {

using Mass = unsigned long long;  // the 64-bit type of CUDA's atomics; uint64_t is unsigned long on Linux

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline int warps() { return blockDim.x / 32; }

__device__ inline Mass warp_sum(Mass x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}

// The sum over this lane and those below it.
__device__ inline Mass warp_running_sum(Mass x) {
    for (int step = 1; step < 32; step *= 2) {
        const Mass below = __shfl_up_sync(kAllLanes, x, step);
        if (lane() >= step) x += below;
    }
    return x;
}

// One value per warp of a block, in shared memory.
template <class T>
using PerWarp = SharedArray<T, 32>;

__device__ inline Mass block_sum(Mass x, PerWarp<Mass>& shared) {
    x = warp_sum(x);
    if (lane() == 0) shared[warp()] = x;
    __syncthreads();
    Mass total = 0;
    for (int w = 0; w < warps(); ++w) total += shared[w];
    __syncthreads();  // every thread has read `shared` before it is written again
    return total;
}

// The sum over the threads before this one. The caller needs a barrier before it uses `shared` again.
__device__ inline Mass block_sum_before(Mass x, PerWarp<Mass>& shared) {
    const Mass running = warp_running_sum(x);
    if (lane() == 31) shared[warp()] = running;
    __syncthreads();
    Mass before = running - x;
    for (int w = 0; w < warp(); ++w) before += shared[w];
    return before;
}

__device__ inline Mass block_max(Mass x, PerWarp<Mass>& shared) {
    for (int step = 16; step > 0; step /= 2) {
        const Mass other = __shfl_xor_sync(kAllLanes, x, step);
        if (other > x) x = other;
    }
    if (lane() == 0) shared[warp()] = x;
    __syncthreads();
    Mass highest = 0;
    for (int w = 0; w < warps(); ++w) {
        const Mass other = shared[w];
        if (other > highest) highest = other;
    }
    __syncthreads();
    return highest;
}

}  // namespace embedgrad
