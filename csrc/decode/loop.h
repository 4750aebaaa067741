// The generation loop: decode, sample, advance, until the caller is needed.
//
// Every array is [slots] or begins with that dimension. A slot holds one sequence; it is free while its `reasons` entry
// is not kRunning. New sequences enter between two calls: the caller fills a free slot's cache and logits, and sets
// `fresh`.
#pragma once

#include "../common/advance.h"
#include "../common/sampling.h"
#include "decoder.h"

namespace embedgrad {

enum LoopEnd : int32_t {
    kGoOn = -1,
    kAllDone = 0,
    kSlotsFree = 1,  // at least `refill` slots are free
    kCacheFull = 2,  // a slot's cache has no room for the sequence's next token
    kStopped = 3,    // on_step returned non-zero
};

struct Loop {
    Cache cache;
    SamplingBatch sampling;  // logits [slots, vocabulary]; the caller fills those of fresh slots
    AdvanceBatch advance;
    int32_t* fresh;          // [slots] not 0: the logits are there, and the token is still to be sampled
    float* entropy;          // [slots, advance.capacity] of each token's distribution, divided by log V
    float* log_probability;  // [slots, advance.capacity] of each token, by the logits without penalties and bias
    int32_t refill;          // return when so many slots are free; 0: never
    int32_t (*on_step)(void*);  // called after each step of all sequences, by the team's first thread; not 0: stop
    void* user;                 // the argument of on_step
};

// Every thread of the team calls it with the same arguments, and all return the same. The decoder has reserved all
// slots.
LoopEnd run_loop(const Team&, Decoder& decoder, Loop& loop, LoopEnd* shared);

}  // namespace embedgrad
