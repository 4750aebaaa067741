// Entropies of a next-token distribution and of a trajectory, and loops: our own definitions (embedgrad/entropy.py).
#pragma once

#include <cmath>

#include "portable.h"

namespace embedgrad {

// Σ exp(x − max) and Σ (x − max) exp(x − max) of the logits seen so far, in one pass: when a higher maximum comes, what
// was summed is scaled. With s and a these sums: log-probability of token i = x_i − max − log s, entropy = log s − a/s.
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

// An entropy in nats as a share of its largest value, log(outcomes).
EMBEDGRAD_HD inline double normalised(double entropy, int64_t outcomes) {
    if (outcomes < 2) return entropy;  // 0, or NaN
    const double share = entropy / log(static_cast<double>(outcomes));
    return share < 0 ? 0 : share > 1 ? 1 : share;  // rounding only; NaN stays
}

EMBEDGRAD_HD inline bool same_gram(const int32_t* a, const int32_t* b, int32_t n) {
    for (int32_t i = 0; i < n; ++i)
        if (a[i] != b[i]) return false;
    return true;
}

// c log c of the n-gram at `place`, where c of the `grams` n-grams equal it; 0 at all but its first occurrence. Summed
// over the places this is Σ c log c over the different n-grams.
EMBEDGRAD_HD inline double gram_term(const int32_t* ids, int32_t grams, int32_t n, int32_t place) {
    int32_t count = 0;
    for (int32_t i = 0; i < grams; ++i) {
        if (!same_gram(ids + i, ids + place, n)) continue;
        if (i < place) return 0;
        ++count;
    }
    return count * log(static_cast<double>(count));
}

// H / log N with H = log N − (Σ c log c) / N, of N n-grams. Fewer than two n-grams repeat nothing: 1.
EMBEDGRAD_HD inline double gram_entropy(double sum_c_log_c, int32_t grams) {
    if (grams < 2) return 1;
    const double most = grams * log(static_cast<double>(grams));
    return normalised((most - sum_c_log_c) / grams, grams);
}

// Do the last `repeats`·`period` tokens repeat with this period?
EMBEDGRAD_HD inline bool repeats_with_period(const int32_t* ids, int32_t length, int32_t period, int32_t repeats) {
    for (int32_t i = length - 1; i >= length - period * (repeats - 1); --i)
        if (ids[i] != ids[i - period]) return false;
    return true;
}

}  // namespace embedgrad
