// Row-wise ops of the frozen block: RMS norm, RoPE and SwiGLU, forward and backward. Numbers are stored as float or
// Bf16 and computed in float32; weights of norms of Bf16 rows may be float. Equations: docs/design.md, section 4.
#pragma once

#include <cstdint>

#include "pool.h"
#include "tensor_views.h"

namespace embedgrad {

// out = x·r ⊙ w, r = rsqrt(mean(x²) + ε)
template <typename T, typename W>
void rms_norm(const Pool&, Rows<T> x, const W* weight, float eps, Rows<T> out, int64_t rows, int64_t d);

// dx += r (w ⊙ dy − x̂ · mean(x̂ ⊙ w ⊙ dy))
template <typename T, typename W>
void rms_norm_backward(
    const Pool&, Rows<T> dy, Rows<T> x, const W* weight, float eps, Rows<T> dx, int64_t rows, int64_t d);

// Per-head RMS norms: weight q [head_dim] for the first `q_heads` heads of a token, k [head_dim] for the others. A null
// weight means no norm.
template <typename W>
struct HeadNorms {
    const W *q, *k;
    int64_t q_heads;
    float eps;
};

// In place on the first `heads` heads of each row of x, head_dim = 2·half each: the norms, then the rotation.
// cos and sin [rows, half].
template <typename T, typename W>
void rope(
    const Pool&, Rows<T> x, const T* cos, const T* sin, HeadNorms<W> norms, int64_t rows, int64_t heads, int64_t half);

// In place on the gradient dx: the transpose of `rope`. raw: the heads before norm and rotation, read only with norms.
template <typename T, typename W>
void rope_backward(
    const Pool&, Rows<T> dx, Rows<T> raw, const T* cos, const T* sin, HeadNorms<W> norms, int64_t rows, int64_t heads,
    int64_t half);

// out = g σ(z) ⊙ u; gate_up = [g, u] [rows, 2·width]. z = g, or with gelu z = 2√(2/π)(g + 0.044715 g³).
template <typename T>
void swiglu(const Pool&, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width, bool gelu = false);

// out = [da ⊙ u ⊙ σ(z)(1 + g z′(1 − σ(z))), da ⊙ g σ(z)]; out may be gate_up.
template <typename T>
void swiglu_backward(
    const Pool&, Rows<T> da, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width, bool gelu = false);

}  // namespace embedgrad
