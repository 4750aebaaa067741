#include "sampler.h"

#include <algorithm>
#include <vector>

namespace embedgrad {
namespace {

// One row's keys and weights, computed once; every selection afterwards reads these. Reused from row to row.
struct Row {
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

    // Weights of what `cut` keeps, 0 elsewhere: behind a top_k, few exponentials are left to compute. Their sum.
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

    // Takes the weight of what `cut` leaves out, and of what weighs less than `least`. Returns the sum of the others.
    uint64_t keep(const Cut& cut, uint64_t least) {
        uint64_t total = 0;
        for (size_t i = 0; i < key.size(); ++i) {
            if (weight[i] < least || !cut.keeps(key[i], static_cast<int32_t>(i))) weight[i] = 0;
            total += weight[i];
        }
        return total;
    }
};

// The shortest beginning of the order whose measure (1 per candidate, or its weight) is at least `target`; the measure
// of all candidates must be.
template <class Measure>
Cut shortest_beginning(Row& row, uint64_t target, Measure measure) {
    Cut cut;
    uint64_t missing = target;
    for (int level = 0; level < kDigits; ++level) {
        const Digit d = digit(level);
        row.histogram.assign(kBins, 0);
        for (size_t i = 0; i < row.key.size(); ++i)
            if (d.shares_prefix(row.key[i], cut.key)) row.histogram[d.bin(row.key[i])] += measure(i);
        uint32_t bin = (1u << d.bits) - 1;
        while (row.histogram[bin] < missing) missing -= row.histogram[bin--];
        cut.key |= bin << d.shift;
    }
    uint64_t ties = 0;
    for (size_t i = 0; i < row.key.size(); ++i) {
        if (row.key[i] != cut.key) continue;
        if (ties == 0) ties = ties_needed(missing, measure(i));
        if (--ties == 0) {
            cut.last = static_cast<int32_t>(i);
            break;
        }
    }
    return cut;
}

// The first in the order, without keeping anything: all that greedy decoding needs. Its key goes to `highest`.
int32_t first_candidate(const Candidates& candidates, uint32_t& highest) {
    int32_t first = 0;
    highest = order_key(candidates.value(0));
    for (int32_t i = 1; i < candidates.size; ++i) {
        const uint32_t key = order_key(candidates.value(i));
        if (key > highest) highest = key, first = i;  // not ≥: of equal values the lowest id comes first
    }
    return first;
}

int32_t choose(Row& row, const SamplingParams& params, const SamplingBatch& batch, int32_t r) {
    Cut cut;
    if (params.top_k > 0 && static_cast<size_t>(params.top_k) < row.key.size())
        cut = shortest_beginning(row, params.top_k, [](size_t) { return uint64_t{1}; });
    uint64_t total = row.weigh(cut, params.temperature);
    if (params.top_p < 1)
        cut = shortest_beginning(row, needed_weight(params.top_p, total), [&](size_t i) { return row.weight[i]; });
    if (params.top_p < 1 || params.min_p > 0) total = row.keep(cut, least_weight(params.min_p));
    uint64_t missing = drawn_target(params, batch, r, total);
    size_t i = 0;
    while (row.weight[i] < missing) missing -= row.weight[i++];
    return static_cast<int32_t>(i);
}

}  // namespace

void sample_rows(const SamplingParams& params, const SamplingBatch& batch, int32_t begin, int32_t end) {
    thread_local Row row;
    for (int32_t r = begin; r < end; ++r) {
        if (batch.reasons && batch.reasons[r] != 0) continue;
        batch.tokens[r] = -1;
        batch.status[r] = kSampled;
        const Candidates candidates(params, batch, r);
        if (candidates.size == 0) {
            batch.status[r] = kNoCandidate;
            continue;
        }
        uint32_t highest;
        int32_t chosen = first_candidate(candidates, highest);
        batch.status[r] = row_status(highest);
        if (batch.status[r] != kSampled) continue;
        if (params.temperature != 0) {
            row.read(candidates, chosen);
            chosen = choose(row, params, batch, r);
        }
        batch.tokens[r] = candidates.token(chosen);
    }
}

}  // namespace embedgrad

using namespace embedgrad;

int32_t embedgrad_sample_cpu(const SamplingParams* params, const SamplingBatch* batch) {
    const SamplingError wrong = check_call(*params, *batch);
    if (wrong == kCallIsFine) sample_rows(*params, *batch, 0, batch->rows);
    return wrong;
}

void embedgrad_advance_cpu(const AdvanceBatch* batch) {
    for (int32_t row = 0; row < batch->rows; ++row)
        if (advance_row(*batch, row)) --*batch->running;
}

uint64_t embedgrad_random_bits(uint64_t seed, uint64_t stream, uint32_t step) {
    return random_bits(seed, stream, step);
}

void embedgrad_philox(uint32_t* counter, const uint32_t* key) {
    Philox block = {{counter[0], counter[1], counter[2], counter[3]}};
    block = philox4x32_10(block, key[0], key[1]);
    std::copy(block.word, block.word + 4, counter);
}

uint64_t embedgrad_weight(float d) { return weight(d); }
