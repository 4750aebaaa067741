// The sampler on a GPU, one block per sequence; common/sampling.h defines what is computed.
//
// The block reads its logits once for the highest value, and then once for each digit of a cut (three for top_k, three
// for top_p), each sum of weights and each search in a running sum. Keys and weights are computed again in each pass:
// 262k logits are 1 MB, which fits the L2 cache but not a block's shared memory.
#include "api.h"
#include "block_collectives.cuh"

namespace embedgrad {
namespace {

struct Shared {
    SharedArray<Mass, kBins> histogram;
    PerWarp<Mass> per_warp;
    SharedArray<uint32_t, 1> bin;
    SharedArray<Mass, 1> missing;
    SharedArray<int32_t, 1> place;
};

struct Sequence {
    Candidates candidates;
    float highest;
    float temperature;

    __device__ uint32_t key(int32_t i) const { return order_key(candidates.value(i)); }
    __device__ Mass weight(int32_t i) const {
        return embedgrad::weight(distance(highest, candidates.value(i), temperature));
    }
};

// Σ measure(i) over all candidates.
template <class Measure>
__device__ Mass sum(int32_t n, Measure measure, Shared& shared) {
    Mass mine = 0;
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x) mine += measure(i);
    return block_sum(mine, shared.per_warp);
}

// The first place at which the running sum of the measure reaches `target`; 1 ≤ target ≤ the whole sum. Each warp sums
// its share of the candidates. The warp whose share reaches the target then searches its share.
template <class Measure>
__device__ int32_t find(int32_t n, Mass target, Measure measure, Shared& shared) {
    const int32_t share = (n + blockDim.x - 1) / blockDim.x * 32;
    const int32_t begin = warp() * share, end = begin + share < n ? begin + share : n;
    Mass mine = 0;
    for (int32_t i = begin + lane(); i < end; i += 32) mine += measure(i);
    mine = warp_sum(mine);
    Mass before = block_sum_before(lane() == 0 ? mine : 0, shared.per_warp);
    before = __shfl_sync(kAllLanes, before, 0);
    if (before < target && target <= before + mine) {
        for (int32_t tile = begin;; tile += 32) {
            const int32_t i = tile + lane();
            const Mass running = before + warp_running_sum(i < end ? measure(i) : 0);
            const unsigned reached = __ballot_sync(kAllLanes, running >= target);
            if (reached) {
                if (lane() == __ffs(reached) - 1) shared.place[0] = i;
                break;
            }
            before = __shfl_sync(kAllLanes, running, 31);
        }
    }
    __syncthreads();
    return shared.place[0];  // the next block_sum_before has a barrier before `place` is written again
}

// The shortest beginning of the order whose measure (1 per candidate, or its weight) is at least `target`.
template <class Measure>
__device__ Cut shortest_beginning(const Sequence& sequence, Mass target, Measure measure, Shared& shared) {
    const int32_t n = sequence.candidates.size;
    Cut cut;
    Mass missing = target;
    for (int level = 0; level < kDigits; ++level) {
        const Digit d = digit(level);
        for (int b = threadIdx.x; b < kBins; b += blockDim.x) shared.histogram[b] = 0;
        __syncthreads();
        for (int32_t i = threadIdx.x; i < n; i += blockDim.x) {
            const uint32_t key = sequence.key(i);
            if (d.shares_digits(key, cut.key)) atomicAdd(&shared.histogram[d.bin(key)], measure(i));
        }
        __syncthreads();
        const int own = kBins / blockDim.x;  // bins per thread; thread 0 has the highest ones
        const int highest = kBins - 1 - own * threadIdx.x;
        Mass mine = 0;
        for (int b = highest; b > highest - own; --b) mine += shared.histogram[b];
        Mass before = block_sum_before(mine, shared.per_warp);
        if (before < missing && missing <= before + mine) {
            int b = highest;
            for (Mass count = shared.histogram[b]; before + count < missing; count = shared.histogram[--b])
                before += count;
            shared.bin[0] = b;
            shared.missing[0] = missing - before;
        }
        __syncthreads();
        cut.key |= shared.bin[0] << d.shift;
        missing = shared.missing[0];
    }
    // All candidates with the cut's key have the same measure.
    const auto tied = [&](int32_t i) { return Mass{sequence.key(i) == cut.key}; };
    const int32_t first = find(n, 1, tied, shared);
    cut.last = find(n, ties_needed(missing, measure(first)), tied, shared);
    return cut;
}

__device__ int32_t choose(
    const Sequence& sequence, const SamplingParams& params, const SamplingBatch& batch, int32_t s, Shared& shared) {
    const int32_t n = sequence.candidates.size;
    const auto weight = [&](int32_t i) { return sequence.weight(i); };
    Cut cut;
    const auto kept = [&](int32_t i, Mass least) {
        const Mass w = sequence.weight(i);
        return w >= least && cut.keeps(sequence.key(i), i) ? w : 0;
    };
    if (params.top_k > 0 && params.top_k < n)
        cut = shortest_beginning(sequence, params.top_k, [](int32_t) { return Mass{1}; }, shared);
    if (params.top_p < 1) {  // this cut lies within top_k's, because it needs no more weight than top_k kept
        const Mass total = sum(n, [&](int32_t i) { return kept(i, 0); }, shared);
        cut = shortest_beginning(sequence, needed_weight(params.top_p, total), weight, shared);
    }
    const Mass least = least_weight(params.min_p);
    const auto drawn = [&](int32_t i) { return kept(i, least); };
    return find(n, drawn_target(batch, s, sum(n, drawn, shared)), drawn, shared);
}

__global__ void __launch_bounds__(1024) sample_kernel(SamplingBatch batch) {
    __shared__ Shared shared;
    const int32_t s = blockIdx.x;
    if (batch.reasons && batch.reasons[s] != 0) return;  // the same for all threads of the block
    const SamplingParams params = batch.params[s];
    Sequence sequence{Candidates(batch, s), 0, params.temperature};
    int32_t token = -1, status = kSampled;
    if (!usable(params)) {
        status = kBadSettings;
    } else if (sequence.candidates.size == 0) {
        status = kNoCandidate;
    } else {
        Mass best = 0;  // the highest key, and of equal ones the lowest place
        for (int32_t i = threadIdx.x; i < sequence.candidates.size; i += blockDim.x) {
            const Mass candidate = Mass{sequence.key(i)} << 32 | (0xffffffffu - static_cast<uint32_t>(i));
            if (candidate > best) best = candidate;
        }
        best = block_max(best, shared.per_warp);
        status = status_of(static_cast<uint32_t>(best >> 32));
        if (status == kSampled) {
            const int32_t first = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(best));
            sequence.highest = sequence.candidates.value(first);
            const int32_t chosen = params.temperature == 0 ? first : choose(sequence, params, batch, s, shared);
            token = sequence.candidates.token(chosen);
        }
    }
    if (threadIdx.x == 0) {
        batch.tokens[s] = token;
        batch.status[s] = status;
    }
}

}  // namespace
}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_sample_cuda(const SamplingBatch* batch, void* stream) {
    const SamplingError wrong = check_call(*batch);
    if (wrong != kCallIsFine || batch->sequences == 0) return wrong;
    const int threads = batch->vocabulary <= 4096 ? 128 : 1024;  // few logits have no work for more threads
    EMBEDGRAD_LAUNCH(sample_kernel, batch->sequences, threads, stream, *batch);
    return launched() ? kCallIsFine : kLaunchFailed;
}
