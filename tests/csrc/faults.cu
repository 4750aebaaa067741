// Kernels with a planted fault each, and the same kernel without it: what the emulation must and must not report.
#include "cuda/block_collectives.cuh"

namespace embedgrad {
namespace {

constexpr int kThreads = 64;

// out[t] = the number that thread t + 1 (of all, cyclically) wrote
template <bool kPlanted>
__global__ void neighbour(int* out) {
    __shared__ SharedArray<int, kThreads> shared;
    const int t = threadIdx.x;
    shared[t] = 10 * t;
    if (!kPlanted) __syncthreads();
    out[t] = shared[(t + 1) % kThreads];
}

// The same within each warp
template <bool kPlanted>
__global__ void lane_neighbour(int* out) {
    __shared__ SharedArray<int, kThreads> shared;
    const int t = threadIdx.x;
    shared[t] = 10 * t;
    if (!kPlanted) __syncwarp();
    out[t] = shared[warp() * 32 + (lane() + 1) % 32];
}

// Written again while others may still read
template <bool kPlanted>
__global__ void reuse(int* out) {
    __shared__ SharedArray<int, 1> shared;
    const int t = threadIdx.x;
    for (int round = 0; round < 2; ++round) {
        if (t == 5) shared[0] = round;
        __syncthreads();
        out[t] = shared[0];
        if (!kPlanted) __syncthreads();
    }
}

// A barrier that half of the threads never reach
template <bool kPlanted>
__global__ void branch(int* out) {
    const int t = threadIdx.x;
    if (!kPlanted || t < 32) __syncthreads();
    out[t] = t;
}

// A collective without the odd lanes
template <bool kPlanted>
__global__ void collective(int* out) {
    const int t = threadIdx.x;
    int sum = 0;
    if (!kPlanted || t % 2 == 0) sum = __shfl_sync(kAllLanes, t, 0);
    out[t] = sum;
}

// Counts without starting from 0
template <bool kPlanted>
__global__ void count(int* out) {
    __shared__ SharedArray<int, 1> shared;
    if (!kPlanted && threadIdx.x == 0) shared[0] = 0;
    __syncthreads();
    atomicAdd(&shared[0], 1);
    __syncthreads();
    out[threadIdx.x] = shared[0];
}

// One element past the end
template <bool kPlanted>
__global__ void past_the_end(int* out) {
    __shared__ SharedArray<int, kThreads> shared;
    const int t = threadIdx.x + kPlanted;
    shared[t] = t;
    out[threadIdx.x] = shared[t];
}

}  // namespace
}  // namespace embedgrad

using namespace embedgrad;

#define KERNEL(name)                                                   \
    extern "C" void name##_fault(int planted, int* out) {              \
        if (planted)                                                   \
            EMBEDGRAD_LAUNCH(name<true>, 2, kThreads, nullptr, out);   \
        else                                                           \
            EMBEDGRAD_LAUNCH(name<false>, 2, kThreads, nullptr, out);  \
    }

KERNEL(neighbour)
KERNEL(lane_neighbour)
KERNEL(reuse)
KERNEL(branch)
KERNEL(collective)
KERNEL(count)
KERNEL(past_the_end)
