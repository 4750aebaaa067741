// Row-wise ops of the frozen block, on float or Bf16; what an op computes with is float32.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "elements.h"

namespace embedgrad {

// out = x·r ⊙ w, r = rsqrt(mean(x²) + ε); where `residual` has data, x += residual first.
template <typename T>
void rms_norm(const Pool&, Rows<T> x, Rows<T> residual, const T* weight, float eps, Rows<T> out, int64_t rows, int64_t d);

// dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))
template <typename T>
void rms_norm_backward(
    const Pool&, Rows<T> dy, Rows<T> x, const T* weight, float eps, Rows<T> dx, int64_t rows, int64_t d);

// Per-head RMS norm of the first `q_heads` heads of a row with weights q [2·half] and of the others with k; null: none.
template <typename T>
struct HeadNorms {
    const T *q, *k;
    int64_t q_heads;
    float eps;
};

// Norms (where there are norms) and rotates `heads` heads of size 2·half that stand side by side in each row of x, in
// place; cos and sin [rows, half].
template <typename T>
void rope(
    const Pool&, Rows<T> x, const T* cos, const T* sin, HeadNorms<T> norms, int64_t rows, int64_t heads, int64_t half);

// The transpose, in place on the gradient dx; raw: the heads before norm and rotation, read only with norms.
template <typename T>
void rope_backward(
    const Pool&, Rows<T> dx, Rows<T> raw, const T* cos, const T* sin, HeadNorms<T> norms, int64_t rows, int64_t heads,
    int64_t half);

// out = g σ(g) ⊙ u; gate_up = [g, u] [rows, 2·width]
template <typename T>
void swiglu(const Pool&, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width);

// out = [da ⊙ u ⊙ σ(g)(1 + g(1 − σ(g))), da ⊙ g σ(g)]; out may be gate_up.
template <typename T>
void swiglu_backward(const Pool&, Rows<T> da, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width);

// The loss of each row of logits z [rows, vocabulary]: nll = log Σ exp(z) − z_target, 0 where target < 0; predicted: the
// first place of the largest logit. With `weights`, z becomes weight · d nll / dz = weight · (softmax(z) − onehot).
// Logits are float32 whatever the model computes in: 8 bits would not tell the likeliest tokens apart.
void softmax_loss(
    const Pool&, Rows<float> z, const int64_t* targets, const float* weights, float* nll, int64_t* predicted, int64_t rows,
    int64_t vocabulary);

// Multiplies and adds `rounds` times in registers, on every thread; returns how many vectors of how many floats that were,
// as one product. For benchmarks: the rate to hold operations against.
int64_t multiply_adds(const Pool&, int64_t rounds);

}  // namespace embedgrad
