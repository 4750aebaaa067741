#include "sampler.h"

#include <cstddef>
#include <vector>

namespace embedgrad {
namespace {

// Values, keys and weights of one sequence's candidates, computed once for all selections. The memory is reused from
// sequence to sequence.
struct Scored {
    std::vector<float> value;
    std::vector<uint32_t> key;
    std::vector<uint64_t> weight;
    std::vector<uint64_t> histogram;
    size_t highest = 0;  // the first in the order

    void read(const Candidates& candidates, int32_t first) {
        const size_t n = candidates.size;
        value.resize(n);
        key.resize(n);
        highest = first;
        for (size_t i = 0; i < n; ++i) {
            value[i] = candidates.value(static_cast<int32_t>(i));
            key[i] = order_key(value[i]);
        }
    }

    // Sets the weights of the candidates that `cut` keeps, and 0 for the others, whose exponential is not needed.
    // Returns the sum.
    uint64_t weigh(const Cut& cut, float temperature) {
        weight.resize(key.size());
        uint64_t total = 0;
        for (size_t i = 0; i < key.size(); ++i) {
            const bool kept = cut.keeps(key[i], static_cast<int32_t>(i));
            weight[i] = kept ? embedgrad::weight(distance(value[highest], value[i], temperature)) : 0;
            total += weight[i];
        }
        return total;
    }

    // Sets weights to 0 that are below `least` or of candidates that `cut` does not keep. Returns the sum of the
    // others.
    uint64_t keep(const Cut& cut, uint64_t least) {
        uint64_t total = 0;
        for (size_t i = 0; i < key.size(); ++i) {
            if (weight[i] < least || !cut.keeps(key[i], static_cast<int32_t>(i))) weight[i] = 0;
            total += weight[i];
        }
        return total;
    }
};

// The shortest beginning of the order whose measure (1 per candidate, or its weight) is at least `target`. The measure
// of all candidates must be at least `target`.
template <class Measure>
Cut shortest_beginning(Scored& scored, uint64_t target, Measure measure) {
    Cut cut;
    uint64_t missing = target;
    for (int level = 0; level < kDigits; ++level) {
        const Digit d = digit(level);
        scored.histogram.assign(kBins, 0);
        for (size_t i = 0; i < scored.key.size(); ++i)
            if (d.shares_digits(scored.key[i], cut.key)) scored.histogram[d.bin(scored.key[i])] += measure(i);
        uint32_t bin = (1u << d.bits) - 1;
        while (scored.histogram[bin] < missing) missing -= scored.histogram[bin--];
        cut.key |= bin << d.shift;
    }
    uint64_t ties = 0;
    for (size_t i = 0; i < scored.key.size(); ++i) {
        if (scored.key[i] != cut.key) continue;
        if (ties == 0) ties = ties_needed(missing, measure(i));
        if (--ties == 0) {
            cut.last = static_cast<int32_t>(i);
            break;
        }
    }
    return cut;
}

// The first candidate in the order; its key goes to `highest`. Greedy decoding needs nothing else.
int32_t first_candidate(const Candidates& candidates, uint32_t& highest) {
    int32_t first = 0;
    highest = order_key(candidates.value(0));
    for (int32_t i = 1; i < candidates.size; ++i) {
        const uint32_t key = order_key(candidates.value(i));
        if (key > highest) highest = key, first = i;  // >, not ≥: of equal values the lowest id is first
    }
    return first;
}

int32_t choose(Scored& scored, const SamplingBatch& batch, int32_t s) {
    const SamplingParams& params = batch.params[s];
    Cut cut;
    if (params.top_k > 0 && static_cast<size_t>(params.top_k) < scored.key.size())
        cut = shortest_beginning(scored, params.top_k, [](size_t) { return uint64_t{1}; });
    uint64_t total = scored.weigh(cut, params.temperature);
    if (params.top_p < 1)
        cut = shortest_beginning(scored, needed_weight(params.top_p, total), [&](size_t i) { return scored.weight[i]; });
    if (params.top_p < 1 || params.min_p > 0) total = scored.keep(cut, least_weight(params.min_p));
    uint64_t missing = drawn_target(batch, s, total);
    size_t i = 0;
    while (scored.weight[i] < missing) missing -= scored.weight[i++];
    return static_cast<int32_t>(i);
}

}  // namespace

void sample(const SamplingBatch& batch, int32_t begin, int32_t end) {
    thread_local Scored scored;
    for (int32_t s = begin; s < end; ++s) {
        if (batch.reasons && batch.reasons[s] != 0) continue;
        batch.tokens[s] = -1;
        batch.status[s] = kSampled;
        if (!usable(batch.params[s])) {
            batch.status[s] = kBadSettings;
            continue;
        }
        const Candidates candidates(batch, s);
        if (candidates.size == 0) {
            batch.status[s] = kNoCandidate;
            continue;
        }
        uint32_t highest;
        int32_t chosen = first_candidate(candidates, highest);
        batch.status[s] = status_of(highest);
        if (batch.status[s] != kSampled) continue;
        if (batch.params[s].temperature != 0) {
            scored.read(candidates, chosen);
            chosen = choose(scored, batch, s);
        }
        batch.tokens[s] = candidates.token(chosen);
    }
}

}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_sample_cpu(const SamplingBatch* batch) {
    const SamplingError wrong = check_call(*batch);
    if (wrong == kCallIsFine) sample(*batch, 0, batch->sequences);
    return wrong;
}
