// Entropies and loops on the CPU; definitions in common/entropy.h.
#pragma once

#include "../common/entropy.h"

extern "C" {

// For each row of `logits` [rows, stride], in one pass: the entropy of its distribution divided by log(vocabulary)
// (0 for a vocabulary of one), and the log-probability of tokens[row] (null, or a negative token: not asked for, NaN).
// NaN where a logit is NaN or +inf, or where all are -inf.
EMBEDGRAD_API void embedgrad_token_entropy_cpu(
    const float* logits, int64_t stride, int32_t rows, int32_t vocabulary, const int32_t* tokens, float* entropy,
    float* log_probability);

// Entropy of the n-grams of ids [length]; with window > 0 the least one of any `window` tokens in a row.
EMBEDGRAD_API double embedgrad_trajectory_entropy_cpu(const int32_t* ids, int32_t length, int32_t n, int32_t window);

// The shortest period with which the last `repeats`·period ids repeat; 0: none.
EMBEDGRAD_API int32_t embedgrad_loop_period_cpu(const int32_t* ids, int32_t length, int32_t repeats);
}
