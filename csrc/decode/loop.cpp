#include "loop.h"

#include <cmath>
#include <limits>

#include "../common/entropy.h"
#include "../cpu/isa.h"
#include "../cpu/sampler.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "../decode/loop.inl"
#include "../cpu/per_isa.inl"

namespace {

// Choose the token of one slot, and note how sure the model was.
void choose(Loop& loop, int32_t slot) {
    sample_rows(loop.params, loop.sampling, slot, slot + 1);
    const int32_t token = loop.sampling.tokens[slot];
    const int64_t at = int64_t{slot} * loop.advance.capacity + loop.advance.lengths[slot];
    const float* logits = loop.sampling.logits + slot * loop.sampling.stride;
    EMBEDGRAD_DISPATCH(
        row_entropy, logits, int64_t{loop.sampling.vocabulary}, token, loop.entropy + at, loop.log_probability + at)
}

// What the first member decides after each token.
LoopEnd decide(Loop& loop) {
    AdvanceBatch& advance = loop.advance;
    for (int32_t slot = 0; slot < advance.rows; ++slot)
        if (advance_row(advance, slot)) --*advance.running;
    if (loop.on_step(loop.user)) return kStopped;
    if (*advance.running == 0) return kAllDone;
    if (loop.refill > 0 && advance.rows - *advance.running >= loop.refill) return kSlotsFree;
    for (int32_t slot = 0; slot < advance.rows; ++slot)
        if (advance.reasons[slot] == kRunning && advance.positions[slot] - loop.cache.trunk_length >= loop.cache.capacity)
            return kCacheFull;
    return kGoOn;
}

}  // namespace

LoopEnd run_loop(const Crew& crew, Decoder& decoder, Loop& loop, LoopEnd* shared) {
    std::vector<int32_t> active, stale, ids, positions, rows;  // every member makes its own, the same
    while (true) {
        for (auto* list : {&active, &stale, &ids, &positions, &rows}) list->clear();
        for (int32_t slot = 0; slot < loop.advance.rows; ++slot) {
            if (loop.advance.reasons[slot] != kRunning) continue;
            active.push_back(slot);
            if (loop.fresh[slot]) continue;
            rows.push_back(static_cast<int32_t>(stale.size()));
            stale.push_back(slot);
            ids.push_back(loop.advance.inputs[slot]);
            positions.push_back(loop.advance.positions[slot]);
        }
        crew.wait();  // all have read what the first member is about to change
        if (!stale.empty()) {
            const auto count = static_cast<int64_t>(stale.size());
            decoder.advance(
                crew, loop.cache, {count, stale.data(), positions.data(), ids.data(), nullptr},
                {count, rows.data(), stale.data(), const_cast<float*>(loop.sampling.logits)});
        }
        const auto [begin, end] = crew.share(static_cast<int64_t>(active.size()));
        for (int64_t i = begin; i < end; ++i) choose(loop, active[i]);
        crew.wait();
        if (crew.rank == 0) {
            for (const int32_t slot : active) loop.fresh[slot] = 0;
            *shared = decide(loop);
        }
        crew.wait();
        if (*shared != kGoOn) return *shared;
    }
}

}  // namespace embedgrad
