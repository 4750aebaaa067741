// Token entropy and log-probability in one pass over the logits; n-gram entropy and loops of trajectories. One block
// per row; the definitions are in common/entropy.h.
#include "api.h"
#include "block.cuh"

namespace embedgrad {
namespace {

__device__ OnlineEntropy warp_merge(OnlineEntropy mine) {
    for (int step = 16; step > 0; step /= 2) {
        OnlineEntropy other;
        other.max = __shfl_xor_sync(kAllLanes, mine.max, step);
        other.sum = __shfl_xor_sync(kAllLanes, mine.sum, step);
        other.dot = __shfl_xor_sync(kAllLanes, mine.dot, step);
        mine.merge(other);
    }
    return mine;
}

__global__ void __launch_bounds__(1024) token_entropy_kernel(
    const float* logits, int64_t stride, int32_t vocabulary, const int32_t* tokens, float* entropy,
    float* log_probability) {
    __shared__ PerWarp<double> max, sum, dot;
    const int32_t row = blockIdx.x;
    const float* x = logits + row * stride;
    OnlineEntropy online;
    for (int32_t i = threadIdx.x; i < vocabulary; i += blockDim.x) online.add(x[i]);
    online = warp_merge(online);
    if (lane() == 0) {
        max[warp()] = online.max;
        sum[warp()] = online.sum;
        dot[warp()] = online.dot;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < warps(); ++w) {
        OnlineEntropy other;
        other.max = max[w];
        other.sum = sum[w];
        other.dot = dot[w];
        online.merge(other);
    }
    const bool asked = tokens && tokens[row] >= 0;
    entropy[row] = static_cast<float>(normalised(online.entropy(), vocabulary));
    log_probability[row] = asked ? static_cast<float>(online.log_probability(x[tokens[row]])) : NAN;
}

// Each thread takes n-grams of the whole, then windows, then periods. All pairs of n-grams are compared, of the whole
// and of each window: a trajectory of some thousand tokens is too short to be worth sorting on a device.
__global__ void __launch_bounds__(256) trajectory_kernel(
    const int32_t* all_ids, int32_t capacity, const int32_t* lengths, int32_t n, int32_t window, int32_t repeats,
    float* entropy, float* windowed_entropy, int32_t* period) {
    __shared__ SharedArray<double, 256> c_log_c;
    __shared__ SharedArray<double, 256> least;
    __shared__ SharedArray<int32_t, 1> shortest;
    const int32_t row = blockIdx.x, thread = threadIdx.x, threads = blockDim.x;
    const int32_t* ids = all_ids + int64_t{row} * capacity;
    const int32_t length = lengths[row], grams = length - n + 1;
    if (thread == 0) shortest[0] = INT32_MAX;
    __syncthreads();

    double mine = 0;
    for (int32_t i = thread; i < grams; i += threads) mine += gram_term(ids, grams, n, i);
    c_log_c[thread] = mine;

    mine = 1;
    if (window > 0 && window < length)
        for (int32_t start = thread; start + window <= length; start += threads) {
            const int32_t inside = window - n + 1;
            double sum = 0;
            for (int32_t i = 0; i < inside; ++i) sum += gram_term(ids + start, inside, n, i);
            mine = fmin(mine, gram_entropy(sum, inside));
        }
    least[thread] = mine;

    for (int32_t p = 1 + thread; p <= length / repeats; p += threads)
        if (repeats_with_period(ids, length, p, repeats)) {
            atomicMin(&shortest[0], p);
            break;
        }
    __syncthreads();

    if (thread != 0) return;
    double sum = 0, lowest = 1;
    for (int32_t t = 0; t < threads; ++t) {
        sum += c_log_c[t];
        lowest = fmin(lowest, static_cast<double>(least[t]));
    }
    const double whole = gram_entropy(sum, grams);
    const int32_t p = shortest[0];
    entropy[row] = static_cast<float>(whole);
    windowed_entropy[row] = static_cast<float>(window > 0 && window < length ? lowest : whole);
    period[row] = p == INT32_MAX ? 0 : p;
}

}  // namespace
}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_token_entropy_cuda(
    const float* logits, int64_t stride, int32_t rows, int32_t vocabulary, const int32_t* tokens, float* entropy,
    float* log_probability, void* stream) {
    if (rows < 0 || vocabulary < 1 || stride < vocabulary) return kBadSize;
    if (rows == 0) return kCallIsFine;
    const int threads = vocabulary <= 4096 ? 128 : 1024;
    EMBEDGRAD_LAUNCH(
        token_entropy_kernel, rows, threads, stream, logits, stride, vocabulary, tokens, entropy, log_probability);
    return launched() ? kCallIsFine : kLaunchFailed;
}

int32_t embedgrad_trajectory_cuda(
    const int32_t* ids, int32_t capacity, const int32_t* lengths, int32_t rows, int32_t n, int32_t window,
    int32_t repeats, float* entropy, float* windowed_entropy, int32_t* period, void* stream) {
    if (rows < 0 || capacity < 0 || n < 1 || repeats < 2 || (window != 0 && window <= n)) return kBadSize;
    if (rows == 0) return kCallIsFine;
    EMBEDGRAD_LAUNCH(
        trajectory_kernel, rows, 256, stream, ids, capacity, lengths, n, window, repeats, entropy, windowed_entropy,
        period);
    return launched() ? kCallIsFine : kLaunchFailed;
}
