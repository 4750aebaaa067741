// One optimiser step of the prompt: AdamW, trust region, and each row's cosine and norm ratio, a row at a time.
//
// AdamW is float32 (the formula is that of embedgrad/optimizer.py); what decides whether a row is inside its region, and
// where it is put, is float64 (the regions are those of embedgrad/trust_region.py, margins included). With û = e0/‖e0‖,
// a = e·û and v the unit vector across û towards e, a row that is turned becomes x û + y v. The mean cosine couples the
// rows: all are stepped before any is turned.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "elements.h"

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
    double norm_min, norm_max;  // negative: no bound
    double radius;
    bool relative;
};

// e, m, v [k, d] in place; anchor, g [k, d]; similarity, norm_ratio [k]; projected [k]: the region moved the row.
void prompt_step(
    const Pool&, const AdamW&, const TrustRegion&, Rows<float> e, Rows<float> anchor, Rows<float> m, Rows<float> v,
    Rows<float> g, double* similarity, double* norm_ratio, bool* projected, int64_t k, int64_t d);

}  // namespace embedgrad
