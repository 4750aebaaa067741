// One optimiser step of the prompt, a prompt row at a time: AdamW, projection into the trust region, and the row's
// cosine and norm ratio. With a mean-cosine region all rows take their AdamW step before any is projected.
//
// AdamW is float32; its formula is in embedgrad/maths/optimizer.py. The projection is float64; its formulas and
// numbers, margins included, are in embedgrad/maths/trust_region.py. In the comments û = e0/‖e0‖, and v is the unit
// vector orthogonal to û in the plane of û and e. A projected row is turned in that plane: it becomes x û + y v.
#pragma once

#include <cstdint>

#include "pool.h"
#include "tensor_views.h"

namespace embedgrad {

struct AdamW {
    float rest1, beta2, rest2;  // 1 − β₁, β₂, 1 − β₂
    float decay, rate;          // 1 − lr·weight_decay, lr/(1 − β₁ᵗ)
    float correction, eps;      // √(1 − β₂ᵗ)
};

struct TrustRegion {
    enum Kind : int64_t { none, cosine, l2_ball, mean_cosine };
    Kind kind;
    double tau;
    double inside;                  // the least cosine that counts as inside a cone
    double edge_cosine, edge_sine;  // of the angle that a row outside is turned to
    double close;                   // a row towards û also counts as inside where e·v is at most this share of its length
    double norm_min, norm_max;      // negative: no bound
    double radius;
    bool relative;                  // to the anchor's length
    double tolerance;               // four times the share of a row's length by which float32 rounding moves it
};

struct PromptRows {  // [k, d]; the step changes e, m and v
    Rows<float> e, anchor, m, v, g;
    float* before;  // [3, k, d] contiguous: receives e, m and v as they were
    int64_t k, d;
};

struct StepReport {
    double *similarity, *norm_ratio;  // [k]
    bool* projected;                  // [k]: whether the region moved the row
    double* gradient_norm;            // of the whole gradient, before it was clipped
    bool* alive;  // in and out. Where it is false, or a number is not finite, nothing moves and it is false
};

// limit: the largest norm of the gradient; negative: none.
void prompt_step(const Pool&, const AdamW&, const TrustRegion&, double limit, const PromptRows&, const StepReport&);

}  // namespace embedgrad
