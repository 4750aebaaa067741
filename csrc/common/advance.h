// What happens to a sequence once its next token is chosen: stop, or append the token and go on.
#pragma once

#include "portable.h"

namespace embedgrad {

enum StopReason : int32_t {
    kRunning = 0,
    kStopToken = 1,    // "stop": a stop token (not appended), or a forced choice that is complete
    kLengthReached = 2,  // "length"
    kContextFull = 3,  // "context"
    kSamplingFailed = 4,  // the sampler's status says why
};

struct AdvanceBatch {
    int32_t rows, vocabulary, capacity;
    int32_t max_new_tokens;        // from 1 to capacity
    int32_t max_position;          // the model's context
    int32_t stop_size;
    const int32_t* stop_tokens;    // [stop_size]
    const int32_t* tokens;         // [rows] chosen by the sampler
    const int32_t* status;         // [rows] the sampler's
    const int32_t* children;       // tree of continuations, as in SamplingBatch; null without forced choice
    const int32_t* child_tokens;
    const int32_t* child_nodes;    // the node that each of them leads to
    int32_t* ids;                  // [rows, capacity] the answers
    int32_t* lengths;              // [rows] tokens of the answers
    int32_t* inputs;               // [rows] the token that the next decode step reads, unchanged once a row has ended
    int32_t* positions;            // [rows] its position: before the first call, that of the query's last token
    uint32_t* steps;               // [rows] numbers drawn
    int32_t* counts;               // [rows, vocabulary] for the penalties, or null
    int32_t* nodes;                // [rows] or null
    int32_t* reasons;              // [rows] StopReason
    int32_t* running;              // [1] rows that go on: what the host polls
};

// True where this step ended the row.
EMBEDGRAD_HD inline bool advance_row(const AdvanceBatch& b, int32_t row) {
    if (b.reasons[row] != kRunning) return false;
    if (b.status[row] != 0) {
        b.reasons[row] = kSamplingFailed;
        return true;
    }
    const int32_t token = b.tokens[row];
    b.steps[row] += 1;
    for (int32_t i = 0; i < b.stop_size; ++i)
        if (token == b.stop_tokens[i]) {
            b.reasons[row] = kStopToken;
            return true;
        }
    b.ids[int64_t{row} * b.capacity + b.lengths[row]] = token;
    b.lengths[row] += 1;
    b.inputs[row] = token;
    b.positions[row] += 1;
    if (b.counts) b.counts[int64_t{row} * b.vocabulary + token] += 1;
    bool complete = false;
    if (b.nodes && b.nodes[row] >= 0) {
        int32_t child = b.children[b.nodes[row]];
        while (b.child_tokens[child] != token) ++child;  // the sampler chose among these
        const int32_t node = b.child_nodes[child];
        b.nodes[row] = node;
        complete = b.children[node] == b.children[node + 1];
    }
    b.reasons[row] = complete                                  ? kStopToken
                     : b.lengths[row] >= b.max_new_tokens      ? kLengthReached
                     : b.positions[row] + 1 >= b.max_position ? kContextFull
                                                               : kRunning;
    return b.reasons[row] != kRunning;
}

}  // namespace embedgrad
