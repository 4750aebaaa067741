// Row-wise ops of the frozen block in float32. Rows are `*_row` elements apart; elements of a row are contiguous.
#pragma once

#include <cstdint>

#include "../parallel.h"

namespace embedgrad {

struct Rows {
    float* data;
    int64_t row;  // distance of rows, in elements
};

// out = x·r ⊙ w, r = rsqrt(mean(x²) + ε); where `residual` has data, x += residual first.
void rms_norm(const Pool&, Rows x, Rows residual, const float* weight, float eps, Rows out, int64_t rows, int64_t d);

// dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))
void rms_norm_backward(
    const Pool&, Rows dy, Rows x, const float* weight, float eps, Rows dx, int64_t rows, int64_t d);

// Per-head RMS norm of the first `q_heads` heads of a row with weights q [2·half] and of the others with k; null: none.
struct HeadNorms {
    const float *q, *k;
    int64_t q_heads;
    float eps;
};

// Norms (where there are norms) and rotates `heads` heads of size 2·half that stand side by side in each row of x, in
// place; cos and sin [rows, half].
void rope(
    const Pool&, Rows x, const float* cos, const float* sin, HeadNorms norms, int64_t rows, int64_t heads, int64_t half);

// The transpose, in place on the gradient dx; raw: the heads before norm and rotation, read only with norms.
void rope_backward(
    const Pool&, Rows dx, Rows raw, const float* cos, const float* sin, HeadNorms norms, int64_t rows, int64_t heads,
    int64_t half);

// out = g σ(g) ⊙ u; gate_up = [g, u] [rows, 2·width]
void swiglu(const Pool&, Rows gate_up, Rows out, int64_t rows, int64_t width);

// out = [da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))), da ⊙ g σ(g)]; out may be gate_up.
void swiglu_backward(const Pool&, Rows da, Rows gate_up, Rows out, int64_t rows, int64_t width);

// The loss of each row of logits z [rows, vocabulary]: nll = log Σ exp(z) − z_target, 0 where target < 0; predicted: the
// first place of the largest logit. With `weights`, z becomes weight · d nll / dz = weight · (softmax(z) − onehot).
void softmax_loss(
    const Pool&, Rows z, const int64_t* targets, const float* weights, float* nll, int64_t* predicted, int64_t rows,
    int64_t vocabulary);

}  // namespace embedgrad
