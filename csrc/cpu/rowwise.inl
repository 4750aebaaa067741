// One row of each row-wise op; see rowwise.h. The tail of a row that fills no vector is done element by element.

static inline float dot(const float* a, const float* b, int64_t n) {
    Vec s0 = {}, s1 = {}, s2 = {}, s3 = {};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        s0 += load(a + i) * load(b + i);
        s1 += load(a + i + VL) * load(b + i + VL);
        s2 += load(a + i + 2 * VL) * load(b + i + 2 * VL);
        s3 += load(a + i + 3 * VL) * load(b + i + 3 * VL);
    }
    for (; i + VL <= n; i += VL) s0 += load(a + i) * load(b + i);
    float total = sum((s0 + s1) + (s2 + s3));
    for (; i < n; ++i) total += a[i] * b[i];
    return total;
}

static inline float inverse_rms(const float* x, float eps, int64_t d) {
    return 1.0f / std::sqrt(dot(x, x, d) / static_cast<float>(d) + eps);
}

static void rms_norm_row(float* x, const float* residual, const float* w, float eps, float* out, int64_t d) {
    if (residual)
        for (int64_t i = 0; i < d; ++i) x[i] += residual[i];
    const float r = inverse_rms(x, eps, d);
    for (int64_t i = 0; i < d; ++i) out[i] = x[i] * r * w[i];
}

static void rms_norm_backward_row(
    const float* dy, const float* x, const float* w, float eps, float* dx, int64_t d) {
    Vec s0 = {}, s1 = {};
    int64_t i = 0;
    for (; i + 2 * VL <= d; i += 2 * VL) {
        s0 += load(dy + i) * load(w + i) * load(x + i);
        s1 += load(dy + i + VL) * load(w + i + VL) * load(x + i + VL);
    }
    float along = sum(s0 + s1);
    for (; i < d; ++i) along += dy[i] * w[i] * x[i];
    const float r = inverse_rms(x, eps, d);
    const float back = along / static_cast<float>(d) * r * r * r;
    for (i = 0; i < d; ++i) dx[i] += dy[i] * w[i] * r - x[i] * back;
}

static void rotate(float* x, const float* cos, const float* sin, int64_t half, float sign) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[half + i], s = sign * sin[i];
        x[i] = first * cos[i] - second * s;
        x[half + i] = second * cos[i] + first * s;
    }
}

static void rope_row(float* x, const float* cos, const float* sin, const HeadNorms& norms, int64_t heads, int64_t half) {
    for (int64_t h = 0; h < heads; ++h, x += 2 * half) {
        const float* weight = h < norms.q_heads ? norms.q : norms.k;
        if (weight) rms_norm_row(x, nullptr, weight, norms.eps, x, 2 * half);
        rotate(x, cos, sin, half, 1.0f);
    }
}

static void rope_backward_row(
    float* dx, const float* raw, const float* cos, const float* sin, const HeadNorms& norms, int64_t heads, int64_t half) {
    for (int64_t h = 0; h < heads; ++h, dx += 2 * half) {
        rotate(dx, cos, sin, half, -1.0f);
        const float* weight = h < norms.q_heads ? norms.q : norms.k;
        if (!weight) continue;
        const float* x = raw + h * 2 * half;
        for (int64_t i = 0; i < 2 * half; ++i) dx[i] *= weight[i];
        const float along = dot(dx, x, 2 * half);
        const float r = inverse_rms(x, norms.eps, 2 * half);
        const float back = along / static_cast<float>(2 * half) * r * r * r;
        for (int64_t i = 0; i < 2 * half; ++i) dx[i] = dx[i] * r - x[i] * back;
    }
}

static inline Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

static void swiglu_row(const float* gate, const float* up, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const Vec g = load(gate + i);
        store(out + i, g * sigmoid(g) * load(up + i));
    }
    for (; i < n; ++i) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

static void swiglu_backward_row(
    const float* da, const float* gate, const float* up, float* d_gate, float* d_up, int64_t n) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const Vec g = load(gate + i), u = load(up + i), d = load(da + i);
        const Vec s = sigmoid(g), silu = g * s;
        store(d_gate + i, d * u * (s + silu * (1.0f - s)));
        store(d_up + i, d * silu);
    }
    for (; i < n; ++i) {
        const float g = gate[i], u = up[i], d = da[i], s = 1.0f / (1.0f + std::exp(-g));
        d_gate[i] = d * u * (s + g * s * (1.0f - s));
        d_up[i] = d * g * s;
    }
}

static void softmax_loss_row(
    float* z, int64_t n, int64_t target, const float* weight, float& nll, int64_t& predicted) {
    Vec most = all(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + VL <= n; i += VL) most = max(load(z + i), most);
    float top = highest(most);
    for (; i < n; ++i) top = z[i] > top ? z[i] : top;
    predicted = std::find(z, z + n, top) - z;
    if (predicted == n) predicted = 0;  // all are NaN, as the loss will be
    // In float32 over a few thousand terms, then in double: over a whole vocabulary float32 would lose three digits.
    double mass = 0;
    for (i = 0; i + VL <= n;) {
        Vec part = {};
        const int64_t end = std::min(n / VL * VL, i + 64 * VL);
        for (; i < end; i += VL) part += exp(load(z + i) - top);
        mass += sum(part);
    }
    for (; i < n; ++i) mass += std::exp(z[i] - top);
    nll = target < 0 ? 0.0f : static_cast<float>(std::log(mass) - (z[target] - top));
    if (!weight) return;
    const float scale = target < 0 ? 0.0f : static_cast<float>(*weight / mass);
    for (i = 0; i + VL <= n; i += VL) store(z + i, exp(load(z + i) - top) * scale);
    for (; i < n; ++i) z[i] = std::exp(z[i] - top) * scale;
    if (target >= 0) z[target] -= *weight;
}
