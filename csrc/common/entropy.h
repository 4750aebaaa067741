// Entropy and log-probability of a next-token distribution; the definition is ours (embedgrad/generation/entropy.py).
#pragma once

#include <cmath>

#include "host_device.h"

namespace embedgrad {

// One pass over the logits: sum = Σ exp(x − max) and dot = Σ (x − max) exp(x − max) of the logits seen so far. A new
// maximum rescales both. Then log p_i = x_i − max − log sum, and the entropy is log sum − dot / sum.
struct OnlineEntropy {
    double max = -INFINITY;
    double sum = 0;
    double dot = 0;

    EMBEDGRAD_HD void add(float logit) {
        const double x = logit;
        if (x == -INFINITY) return;  // probability 0; (−inf) − (−inf) would be NaN
        if (x > max) {
            rescale(x);
            sum += 1;
        } else {
            const double e = expf(static_cast<float>(x - max));
            sum += e;
            dot += (x - max) * e;
        }
    }

    EMBEDGRAD_HD void merge(OnlineEntropy other) {
        if (other.sum == 0) return;
        if (other.max > max)
            rescale(other.max);
        else
            other.rescale(max);
        sum += other.sum;
        dot += other.dot;
    }

    // In [0, log V], natural logarithm. NaN where a logit was NaN or +inf, or where all were −inf.
    EMBEDGRAD_HD double entropy() const { return max == INFINITY ? NAN : log(sum) - dot / sum; }

    EMBEDGRAD_HD double log_probability(float logit) const {
        return sum == 0 || max == INFINITY ? NAN : logit - max - log(sum);
    }

private:
    EMBEDGRAD_HD void rescale(double higher) {
        if (sum != 0) {
            const double e = exp(max - higher);
            dot = e == 0 ? 0 : e * (dot + sum * (max - higher));
            sum *= e;
        }
        max = higher;
    }
};

// An entropy in nats divided by its largest value, log(outcomes).
EMBEDGRAD_HD inline double normalised(double entropy, int64_t outcomes) {
    if (outcomes < 2) return entropy;  // 0, or NaN
    const double share = entropy / log(static_cast<double>(outcomes));
    return share < 0 ? 0 : share > 1 ? 1 : share;  // clips rounding errors; NaN stays NaN
}

}  // namespace embedgrad
