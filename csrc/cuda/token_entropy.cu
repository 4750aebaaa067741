// Token entropy and log-probability in one pass over the logits, one block per sequence; see common/entropy.h.
#include "api.h"
#include "block_collectives.cuh"

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
    const float* logits, int64_t logits_stride, int32_t vocabulary, const int32_t* tokens, float* entropy,
    float* log_probability) {
    __shared__ PerWarp<double> max, sum, dot;
    const int32_t s = blockIdx.x;
    const float* x = logits + s * logits_stride;
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
    const bool asked = tokens && tokens[s] >= 0;
    entropy[s] = static_cast<float>(normalised(online.entropy(), vocabulary));
    log_probability[s] = asked ? static_cast<float>(online.log_probability(x[tokens[s]])) : NAN;
}

}  // namespace
}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_token_entropy_cuda(
    const float* logits, int64_t logits_stride, int32_t sequences, int32_t vocabulary, const int32_t* tokens,
    float* entropy, float* log_probability, void* stream) {
    if (sequences < 0 || vocabulary < 1 || logits_stride < vocabulary) return kBadSize;
    if (sequences == 0) return kCallIsFine;
    const int threads = vocabulary <= 4096 ? 128 : 1024;
    EMBEDGRAD_LAUNCH(
        token_entropy_kernel, sequences, threads, stream, logits, logits_stride, vocabulary, tokens, entropy,
        log_probability);
    return launched() ? kCallIsFine : kLaunchFailed;
}
