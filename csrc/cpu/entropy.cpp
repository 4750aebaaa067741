#include "entropy.h"

#include <algorithm>
#include <numeric>
#include <vector>

using namespace embedgrad;

void embedgrad_token_entropy_cpu(
    const float* logits, int64_t stride, int32_t rows, int32_t vocabulary, const int32_t* tokens, float* entropy,
    float* log_probability) {
    for (int32_t row = 0; row < rows; ++row) {
        const float* x = logits + row * stride;
        OnlineEntropy online;
        for (int32_t i = 0; i < vocabulary; ++i) online.add(x[i]);
        const bool asked = tokens && tokens[row] >= 0;
        entropy[row] = static_cast<float>(normalised(online.entropy(), vocabulary));
        log_probability[row] = asked ? static_cast<float>(online.log_probability(x[tokens[row]])) : NAN;
    }
}

namespace {

// Equal n-grams get equal numbers below the number of n-grams.
std::vector<int32_t> number_grams(const int32_t* ids, int32_t grams, int32_t n) {
    std::vector<int32_t> order(grams), number(grams);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return std::lexicographical_compare(ids + a, ids + a + n, ids + b, ids + b + n);
    });
    for (int32_t i = 1; i < grams; ++i)
        number[order[i]] = number[order[i - 1]] + !same_gram(ids + order[i - 1], ids + order[i], n);
    return number;
}

double c_log_c(int32_t c) { return c * std::log(static_cast<double>(c)); }

// Σ c log c over `count`, changed by one n-gram at a time.
struct Counts {
    std::vector<int32_t> count;
    double sum = 0;

    void add(int32_t gram, int32_t change) {
        int32_t& c = count[gram];
        if (c > 0) sum -= c_log_c(c);
        c += change;
        if (c > 0) sum += c_log_c(c);
    }
};

}  // namespace

double embedgrad_trajectory_entropy_cpu(const int32_t* ids, int32_t length, int32_t n, int32_t window) {
    const int32_t all = length - n + 1;
    if (all < 2) return 1;
    const int32_t grams = window > 0 && window < length ? window - n + 1 : all;
    const std::vector<int32_t> number = number_grams(ids, all, n);
    Counts counts{std::vector<int32_t>(all)};
    double least = 1;
    for (int32_t i = 0; i < all; ++i) {
        counts.add(number[i], 1);
        if (i >= grams) counts.add(number[i - grams], -1);
        if (i >= grams - 1) least = std::min(least, gram_entropy(counts.sum, grams));
    }
    return least;
}

int32_t embedgrad_loop_period_cpu(const int32_t* ids, int32_t length, int32_t repeats) {
    for (int32_t period = 1; period <= length / repeats; ++period)
        if (repeats_with_period(ids, length, period, repeats)) return period;
    return 0;
}
