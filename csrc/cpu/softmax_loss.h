// Cross-entropy of rows of logits, with its gradient in place.
#pragma once

#include <cstdint>

#include "pool.h"
#include "tensor_views.h"

namespace embedgrad {

// For each row of logits z [rows, vocabulary]: nll = log Σ exp(z) − z_target, 0 where target < 0; predicted = the first
// place of the largest logit. With `weights`, z becomes weight · d nll / dz = weight · (softmax(z) − onehot).
// With a softcap c that is not 0, c · tanh(z / c) are the logits, and the gradient is that with respect to z.
// Logits are float32 whatever the model computes in: Bf16 has too few digits to tell the most likely tokens apart.
void softmax_loss(
    const Pool&, Rows<float> z, const int64_t* targets, const float* weights, float* nll, int64_t* predicted, int64_t rows,
    int64_t vocabulary, float softcap = 0);

}  // namespace embedgrad
