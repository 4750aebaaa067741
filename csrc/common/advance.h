// Advances a sequence after its next token is chosen: the sequence ends, or the token is appended.
#pragma once

#include "host_device.h"

namespace embedgrad {

enum StopReason : int32_t {
    kRunning = 0,
    kStopToken = 1,       // "stop": a stop token (not appended), or a complete forced choice
    kLengthReached = 2,   // "length": max_new_tokens
    kContextFull = 3,     // "context": max_position
    kSamplingFailed = 4,  // see SamplingBatch::status
};

struct AdvanceBatch {
    int32_t sequences, vocabulary, capacity;
    int32_t max_position;           // the model's context length
    int32_t stop_size;
    const int32_t* stop_tokens;     // [stop_size]
    const int32_t* max_new_tokens;  // [sequences] from 1 to capacity
    const int32_t* tokens;          // [sequences] chosen by the sampler
    const int32_t* status;          // [sequences] SamplingStatus
    const int32_t* children;        // tree of continuations, as in SamplingBatch; null without forced choice
    const int32_t* child_tokens;
    const int32_t* child_nodes;     // the node that each child token leads to
    int32_t* ids;                   // [sequences, capacity] the answers
    int32_t* lengths;               // [sequences] tokens of the answers
    int32_t* inputs;                // [sequences] the token that the next decode step reads; stays when a sequence ends
    int32_t* positions;             // [sequences] its position; before the first call, that of the query's last token
    uint32_t* steps;                // [sequences] how many random numbers were drawn
    int32_t* counts;                // [sequences, vocabulary] for the penalties, or null
    int32_t* nodes;                 // [sequences] or null
    int32_t* reasons;               // [sequences] StopReason
    int32_t* running;               // [1] sequences that have not ended; the host polls it
};

// True where this step ended sequence s.
EMBEDGRAD_HD inline bool advance_sequence(const AdvanceBatch& b, int32_t s) {
    if (b.reasons[s] != kRunning) return false;
    if (b.status[s] != 0) {
        b.reasons[s] = kSamplingFailed;
        return true;
    }
    const int32_t token = b.tokens[s];
    b.steps[s] += 1;
    for (int32_t i = 0; i < b.stop_size; ++i)
        if (token == b.stop_tokens[i]) {
            b.reasons[s] = kStopToken;
            return true;
        }
    b.ids[int64_t{s} * b.capacity + b.lengths[s]] = token;
    b.lengths[s] += 1;
    b.inputs[s] = token;
    b.positions[s] += 1;
    if (b.counts) b.counts[int64_t{s} * b.vocabulary + token] += 1;
    bool complete = false;
    if (b.nodes && b.nodes[s] >= 0) {
        int32_t child = b.children[b.nodes[s]];
        while (b.child_tokens[child] != token) ++child;  // ends: the sampler chose one of the children
        const int32_t node = b.child_nodes[child];
        b.nodes[s] = node;
        complete = b.children[node] == b.children[node + 1];
    }
    b.reasons[s] = complete                                ? kStopToken
                   : b.lengths[s] >= b.max_new_tokens[s]     ? kLengthReached
                   : b.positions[s] + 1 >= b.max_position ? kContextFull
                                                           : kRunning;
    return b.reasons[s] != kRunning;
}

}  // namespace embedgrad
