// The loss of one row of logits for one instruction set; see softmax_loss.h.

static inline float largest(const float* z, int64_t n) {
    const float least = -std::numeric_limits<float>::infinity();
    Vec most[4] = {broadcast(least), broadcast(least), broadcast(least), broadcast(least)};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) most[k] = max(load(z + i + k * VL), most[k]);
    for (; i < n; i += VL) most[0] = max(load(z + i, n - i, least), most[0]);
    return highest(max(max(most[0], most[1]), max(most[2], most[3])));
}

// The first place of `wanted`, n where there is none.
static inline int64_t first_of(const float* z, int64_t n, float wanted) {
    int64_t i = 0;
    for (; i + 16 * VL <= n; i += 16 * VL) {
        IVec found = {};
        for (int k = 0; k < 16; ++k) found |= load(z + i + k * VL) == wanted;
        int32_t any = 0;
        for (int k = 0; k < VL; ++k) any |= found[k];
        if (any) break;
    }
    return std::find(z + i, z + n, wanted) - z;
}

// Adds exp(z − top) of N vectors to `part`; the last vector holds `count` numbers. KEEP: z becomes exp(z − top).
template <int N, bool KEEP>
EMBEDGRAD_INLINE void mass_at(float* z, float top, Vec& part, int64_t count) {
    Vec x[N], e[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) x[k] = load(z + k * VL, count, -std::numeric_limits<float>::infinity()) - top;
    exp_below<N>(x, e);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        part += e[k];
        if (KEEP) store(z + k * VL, e[k], count);
    }
}

// Σ exp(z − top). Partial sums of a few hundred terms are float32, their sum is double: float32 over a whole vocabulary
// would lose three digits.
template <bool KEEP>
static double mass_of(float* z, int64_t n, float top) {
    double mass = 0;
    for (int64_t i = 0; i < n;) {
        Vec part = {};
        const int64_t end = std::min(n, i + 64 * VL);
        for (; i + 4 * VL <= end; i += 4 * VL) mass_at<4, KEEP>(z + i, top, part, VL);
        for (; i < end; i += VL) mass_at<1, KEEP>(z + i, top, part, end - i);
        mass += sum(part);
    }
    return mass;
}

// In place: capped logits z become scale · exp(z − top) times the slope of the cap.
static void capped_gradient(float* z, int64_t n, float top, float scale, float softcap) {
    for (int64_t i = 0; i < n; i += VL) {
        const Vec capped = load(z + i, n - i);
        store(z + i, exp(capped - top) * scale * cap_slope(capped, softcap), n - i);
    }
}

static void softmax_loss_row(
    float* z, int64_t n, int64_t target, const float* weight, float softcap, float& nll, int64_t& predicted) {
    if (softcap) soften(z, softcap, n);
    const float top = largest(z, n), wanted = target < 0 ? 0.0f : z[target];
    predicted = first_of(z, n, top);
    if (predicted == n) predicted = 0;  // every logit is NaN, and so is the loss
    const double mass = weight && !softcap ? mass_of<true>(z, n, top) : mass_of<false>(z, n, top);
    nll = target < 0 ? 0.0f : static_cast<float>(std::log(mass) - (wanted - top));
    if (!weight) return;
    const float scale = target < 0 ? 0.0f : static_cast<float>(*weight / mass);
    if (softcap) {
        capped_gradient(z, n, top, scale, softcap);
        if (target < 0) return;
        const Vec capped = broadcast(wanted), surplus = exp(capped - top) * scale - *weight;
        z[target] = (surplus * cap_slope(capped, softcap))[0];  // one product behind the difference, which may cancel
        return;
    }
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(z + i, load(z + i) * scale);
    if (i < n) store(z + i, load(z + i, n - i) * scale, n - i);
    if (target >= 0) z[target] -= *weight;
}
