// The generation loop: decode, sample, advance, until something needs the caller.
//
// Every array has one row per slot. A slot holds one sequence; it is free while its `reasons` entry is not kRunning.
// New sequences enter between two calls: the caller fills a free slot's cache and its row of logits, and marks it fresh.
#pragma once

#include "../common/advance.h"
#include "../common/sampling.h"
#include "decoder.h"

namespace embedgrad {

enum LoopEnd : int32_t {
    kGoOn = -1,
    kAllDone = 0,
    kSlotsFree = 1,   // at least `refill` slots are free
    kCacheFull = 2,   // a sequence's cache has no place for its next token
    kStopped = 3,     // on_step wished so
};

struct Loop {
    Cache cache;
    SamplingParams params;
    SamplingBatch sampling;  // logits [slots, stride]: of fresh slots filled by the caller
    AdvanceBatch advance;
    int32_t* fresh;          // [slots] not 0: the row of logits is there, its token is still to be chosen
    float* entropy;          // [slots, capacity of advance] of each token's distribution, as a share of log V
    float* log_probability;  // [slots, capacity of advance] of each token, by the logits as the model gave them
    int32_t refill;          // return once so many slots are free; 0: never
    int32_t (*on_step)(void*);  // after each token of all, by the crew's first member; not 0: stop
    void* user;
};

// Entered by every member of a crew; all return the same. `decoder` must have room for all slots.
LoopEnd run_loop(const Crew&, Decoder& decoder, Loop& loop, LoopEnd* shared);

}  // namespace embedgrad
