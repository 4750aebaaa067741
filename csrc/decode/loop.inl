// Entropy and log-probability for one instruction set.

// The entropy of the distribution divided by log V, and the log-probability of `token` (NaN where token < 0). Defined
// as in common/entropy.h, but in two passes. Partial sums of 64 vectors are float32, their sum is double.
static void token_entropy(const float* x, int64_t n, int32_t token, float* entropy, float* log_probability) {
    Vec most = broadcast(-std::numeric_limits<float>::infinity()), odd = {};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const Vec v = load(x + i);
        most = max(v, most);
        odd += v == v ? Vec{} : v;
    }
    float top = highest(most), strange = sum(odd);
    for (; i < n; ++i) top = x[i] > top ? x[i] : top, strange += x[i] == x[i] ? 0.0f : x[i];
    if (strange != strange || !(top - top == 0)) {
        *entropy = *log_probability = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    double mass = 0, along = 0;
    for (i = 0; i + VL <= n;) {
        Vec weights = {}, products = {};
        const int64_t end = std::min(n / VL * VL, i + 64 * VL);
        for (; i < end; i += VL) {
            const Vec distance = load(x + i) - top, weight = exp(distance);
            weights += weight;
            products += weight == Vec{} ? Vec{} : weight * distance;  // 0 · (−inf) would be NaN
        }
        mass += sum(weights), along += sum(products);
    }
    for (; i < n; ++i) {
        const float distance = x[i] - top, weight = std::exp(distance);
        mass += weight, along += weight == 0 ? 0 : weight * distance;
    }
    *entropy = static_cast<float>(normalised(std::log(mass) - along / mass, n));
    *log_probability = token < 0 ? std::numeric_limits<float>::quiet_NaN()
                                 : static_cast<float>(x[token] - top - std::log(mass));
}
