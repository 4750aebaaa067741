#include "loop.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/entropy.h"
#include "../cpu/isa.h"
#include "../cpu/sampler.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "../decode/loop.inl"
#include "../cpu/per_isa.inl"

namespace {

// Samples the slot's token, and records its log-probability and the entropy.
void choose(Loop& loop, int32_t slot) {
    sample(loop.sampling, slot, slot + 1);
    const int32_t token = loop.sampling.tokens[slot];
    const int64_t at = int64_t{slot} * loop.advance.capacity + loop.advance.lengths[slot];
    const float* logits = loop.sampling.logits + slot * loop.sampling.logits_stride;
    EMBEDGRAD_DISPATCH(
        token_entropy, logits, int64_t{loop.sampling.vocabulary}, token, loop.entropy + at, loop.log_probability + at)
}

// Advances all sequences by their token, and decides whether the loop ends.
LoopEnd decide(Loop& loop) {
    AdvanceBatch& advance = loop.advance;
    for (int32_t slot = 0; slot < advance.sequences; ++slot)
        if (advance_sequence(advance, slot)) --*advance.running;
    if (loop.on_step(loop.user)) return kStopped;
    if (*advance.running == 0) return kAllDone;
    if (loop.refill > 0 && advance.sequences - *advance.running >= loop.refill) return kSlotsFree;
    for (int32_t slot = 0; slot < advance.sequences; ++slot)
        if (advance.reasons[slot] == kRunning && advance.positions[slot] - loop.cache.prefix_length >= loop.cache.capacity)
            return kCacheFull;
    return kGoOn;
}

}  // namespace

LoopEnd run_loop(const Team& team, Decoder& decoder, Loop& loop, LoopEnd* shared) {
    std::vector<int32_t> active, stale, ids, positions, tokens;  // every thread has its own copy of the same lists
    while (true) {
        for (auto* list : {&active, &stale, &ids, &positions, &tokens}) list->clear();
        for (int32_t slot = 0; slot < loop.advance.sequences; ++slot) {
            if (loop.advance.reasons[slot] != kRunning) continue;
            active.push_back(slot);
            if (loop.fresh[slot]) continue;
            tokens.push_back(static_cast<int32_t>(stale.size()));
            stale.push_back(slot);
            ids.push_back(loop.advance.inputs[slot]);
            positions.push_back(loop.advance.positions[slot]);
        }
        team.wait();  // every thread has read what the first thread changes below
        if (!stale.empty()) {
            const auto count = static_cast<int64_t>(stale.size());
            decoder.advance(
                team, loop.cache, {count, stale.data(), positions.data(), ids.data(), nullptr},
                {count, tokens.data(), stale.data(), const_cast<float*>(loop.sampling.logits)});
        }
        const auto [begin, end] = team.share(static_cast<int64_t>(active.size()));
        for (int64_t i = begin; i < end; ++i) choose(loop, active[i]);
        team.wait();
        if (team.rank == 0) {
            for (const int32_t slot : active) loop.fresh[slot] = 0;
            *shared = decide(loop);
        }
        team.wait();
        if (*shared != kGoOn) return *shared;
    }
}

}  // namespace embedgrad
