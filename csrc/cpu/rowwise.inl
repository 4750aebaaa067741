// Rows [begin, end) of each row-wise op for one instruction set; see rowwise.h.
//
// A function `…_at` computes one vector of a row, or N vectors; `count` is how many numbers of the row are left, of
// which the vector takes at most VL. Rows go in fours where one row's sum would wait for the latency of its additions.

static inline float inverse_rms(float squares, float eps, int64_t d) {
    return 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
}

// Stores the first `count` numbers of x. With NON_TEMPORAL x is a whole vector of float; Bf16 rows are bound by
// arithmetic, and are stored normally.
template <bool NON_TEMPORAL, typename T>
EMBEDGRAD_INLINE void put(T* p, Vec x, int64_t count) {
    if constexpr (NON_TEMPORAL && sizeof(T) == sizeof(float))
        stream(p, x);
    else
        store(p, x, count);
}

template <int R, bool NON_TEMPORAL, typename T, typename W>
EMBEDGRAD_INLINE void scaled_at(
    const T* x, int64_t x_stride, const float (&by)[R], const W* w, T* out, int64_t out_stride, int64_t count) {
    const Vec weight = load(w, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
        put<NON_TEMPORAL>(out + r * out_stride, load(x + r * x_stride, count) * by[r] * weight, count);
}

// The norms of R rows from x on. A row ends before the hardware prefetcher has detected a stream, so this function
// prefetches: lines of `out` while it sums the squares, and, if R more rows follow (`next`), their lines of x while it
// stores results.
template <int R, bool NON_TEMPORAL = false, typename T, typename W>
static void rms_norm_block(
    const T* x, int64_t x_stride, const W* w, float eps, T* out, int64_t out_stride, int64_t d, bool next = false) {
    Vec squares[R][2] = {};
    int64_t i = 0;
    for (; i + 2 * VL <= d; i += 2 * VL)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec first = load(x + r * x_stride + i), second = load(x + r * x_stride + i + VL);
            if (R > 1 && !NON_TEMPORAL) __builtin_prefetch(out + r * out_stride + i, 1);
            squares[r][0] += first * first;
            squares[r][1] += second * second;
        }
    for (; i < d; i += VL)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec last = load(x + r * x_stride + i, d - i);
            squares[r][0] += last * last;
        }
    float by[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) by[r] = inverse_rms(sum(squares[r][0] + squares[r][1]), eps, d);
    for (i = 0; i + VL <= d; i += VL) {
        if (next)
#pragma GCC unroll 4
            for (int r = R; r < 2 * R; ++r) __builtin_prefetch(x + r * x_stride + i);
        scaled_at<R, NON_TEMPORAL>(x + i, x_stride, by, w + i, out + i, out_stride, VL);
    }
    if (i < d) scaled_at<R, false>(x + i, x_stride, by, w + i, out + i, out_stride, d - i);
}

static inline void rms_norm_row(const float* x, const float* w, float eps, float* out, int64_t d) {
    rms_norm_block<1>(x, 0, w, eps, out, 0, d);
}

template <bool NON_TEMPORAL, typename T, typename W>
static void rms_norm_rows(Rows<T> x, const W* w, float eps, Rows<T> out, int64_t begin, int64_t end, int64_t d) {
    int64_t t = begin;
    for (; t < end; t += t + 4 <= end ? 4 : 1)
        if (t + 4 <= end)
            rms_norm_block<4, NON_TEMPORAL>(x.at(t), x.stride, w, eps, out.at(t), out.stride, d, t + 8 <= end);
        else
            rms_norm_block<1, NON_TEMPORAL>(x.at(t), x.stride, w, eps, out.at(t), out.stride, d);
    if (NON_TEMPORAL) stream_fence();
}

template <int R, typename T, typename W>
EMBEDGRAD_INLINE void norm_sums_at(
    const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const W* w, int64_t count, Vec (&along)[R],
    Vec (&squares)[R]) {
    const Vec weight = load(w, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const Vec at = load(x + r * x_stride, count);
        along[r] += load(dy + r * dy_stride, count) * weight * at;
        squares[r] += at * at;
    }
}

template <int R, typename T, typename W>
EMBEDGRAD_INLINE void norm_gradient_at(
    const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const W* w, const float (&by)[R],
    const float (&back)[R], T* dx, int64_t dx_stride, int64_t count) {
    const Vec weight = load(w, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const Vec before = load(dx + r * dx_stride, count) - load(x + r * x_stride, count) * back[r];
        store(dx + r * dx_stride, before + load(dy + r * dy_stride, count) * weight * by[r], count);
    }
}

template <int R, typename T, typename W>
static void rms_norm_backward_block(
    const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const W* w, float eps, T* dx, int64_t dx_stride,
    int64_t d, bool next = false) {
    Vec along[R] = {}, squares[R] = {};
    float by[R], back[R];
    int64_t i = 0;
    for (; i + VL <= d; i += VL) norm_sums_at<R>(dy + i, dy_stride, x + i, x_stride, w + i, VL, along, squares);
    if (i < d) norm_sums_at<R>(dy + i, dy_stride, x + i, x_stride, w + i, d - i, along, squares);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        by[r] = inverse_rms(sum(squares[r]), eps, d);
        back[r] = sum(along[r]) / static_cast<float>(d) * by[r] * by[r] * by[r];
    }
    for (i = 0; i + VL <= d; i += VL) {
        if (next)
#pragma GCC unroll 4
            for (int r = R; r < 2 * R; ++r) {
                __builtin_prefetch(dy + r * dy_stride + i);
                __builtin_prefetch(x + r * x_stride + i);
                __builtin_prefetch(dx + r * dx_stride + i, 1);
            }
        norm_gradient_at<R>(dy + i, dy_stride, x + i, x_stride, w + i, by, back, dx + i, dx_stride, VL);
    }
    if (i < d) norm_gradient_at<R>(dy + i, dy_stride, x + i, x_stride, w + i, by, back, dx + i, dx_stride, d - i);
}

template <typename T, typename W>
static void rms_norm_backward_rows(
    Rows<T> dy, Rows<T> x, const W* w, float eps, Rows<T> dx, int64_t begin, int64_t end, int64_t d) {
    int64_t t = begin;
    for (; t + 4 <= end; t += 4)
        rms_norm_backward_block<4>(dy.at(t), dy.stride, x.at(t), x.stride, w, eps, dx.at(t), dx.stride, d, t + 8 <= end);
    for (; t < end; ++t) rms_norm_backward_block<1>(dy.at(t), dy.stride, x.at(t), x.stride, w, eps, dx.at(t), dx.stride, d);
}

// Rotates all heads of a token by one vector of angles, so that cos and sin stay in registers.
template <typename T>
EMBEDGRAD_INLINE void rotate_at(T* x, const T* cos, const T* sin, int64_t heads, int64_t half, float sign, int64_t count) {
    const Vec c = load(cos, count), s = load(sin, count) * sign;
    for (int64_t h = 0; h < heads; ++h, x += 2 * half) {
        const Vec first = load(x, count), second = load(x + half, count);
        store(x, first * c - second * s, count);
        store(x + half, second * c + first * s, count);
    }
}

template <typename T>
static inline void rotate(T* x, const T* cos, const T* sin, int64_t heads, int64_t half, float sign) {
    int64_t i = 0;
    for (; i + VL <= half; i += VL) rotate_at(x + i, cos + i, sin + i, heads, half, sign, VL);
    if (i < half) rotate_at(x + i, cos + i, sin + i, heads, half, sign, half - i);
}

template <typename T, typename W>
static void rope_row(T* x, const T* cos, const T* sin, const HeadNorms<W>& norms, int64_t heads, int64_t half) {
    for (int64_t h = 0; h < heads; ++h) {
        const W* weight = h < norms.q_heads ? norms.q : norms.k;
        T* head = x + h * 2 * half;
        if (weight) rms_norm_block<1, false>(head, 0, weight, norms.eps, head, 0, 2 * half);
    }
    rotate(x, cos, sin, heads, half, 1.0f);
}

template <typename T, typename W>
static void rope_rows(
    Rows<T> x, const T* cos, const T* sin, const HeadNorms<W>& norms, int64_t begin, int64_t end, int64_t heads,
    int64_t half) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t t = begin; t < end; ++t) {
        if (t + 1 < end)  // the hardware prefetcher does not predict the order in which a row is read
            for (int64_t c = 0; c < 2 * half * heads; c += line) __builtin_prefetch(x.at(t + 1) + c, 1);
        rope_row(x.at(t), cos + t * half, sin + t * half, norms, heads, half);
    }
}

template <typename T, typename W>
EMBEDGRAD_INLINE void head_gradient_at(T* dx, const T* x, const W* w, float by, float back, int64_t count) {
    store(dx, load(dx, count) * load(w, count) * by - load(x, count) * back, count);
}

// In place: dx becomes the gradient with respect to the input of one head's norm.
template <typename T, typename W>
static void head_norm_backward(T* dx, const T* x, const W* w, float eps, int64_t size) {
    Vec along[1] = {}, squares[1] = {};
    int64_t i = 0;
    for (; i + VL <= size; i += VL) norm_sums_at<1>(dx + i, 0, x + i, 0, w + i, VL, along, squares);
    if (i < size) norm_sums_at<1>(dx + i, 0, x + i, 0, w + i, size - i, along, squares);
    const float by = inverse_rms(sum(squares[0]), eps, size);
    const float back = sum(along[0]) / static_cast<float>(size) * by * by * by;
    for (i = 0; i + VL <= size; i += VL) head_gradient_at(dx + i, x + i, w + i, by, back, VL);
    if (i < size) head_gradient_at(dx + i, x + i, w + i, by, back, size - i);
}

template <typename T, typename W>
static void rope_backward_rows(
    Rows<T> dx, Rows<T> raw, const T* cos, const T* sin, const HeadNorms<W>& norms, int64_t begin, int64_t end,
    int64_t heads, int64_t half) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t t = begin; t < end; ++t) {
        if (t + 1 < end)
            for (int64_t c = 0; c < 2 * half * heads; c += line) __builtin_prefetch(dx.at(t + 1) + c, 1);
        rotate(dx.at(t), cos + t * half, sin + t * half, heads, half, -1.0f);
        for (int64_t h = 0; h < heads; ++h) {
            const W* weight = h < norms.q_heads ? norms.q : norms.k;
            const int64_t at = h * 2 * half;
            if (weight) head_norm_backward(dx.at(t) + at, raw.at(t) + at, weight, norms.eps, 2 * half);
        }
    }
}

// numerator[k] · σ(x[k]) = numerator[k] / (1 + exp(−x[k])) of N vectors; 0 for x < −87, where σ(x) is below 1.7e-38.
template <int N>
EMBEDGRAD_INLINE void times_sigmoid(const Vec (&numerator)[N], const Vec (&x)[N], Vec (&result)[N]) {
    const Vec high = broadcast(87.0f), zero = {};
    Vec y[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) y[k] = max(-high, x[k]);  // max gives NaN for NaN
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) y[k] = -min(high, y[k]);
    exp_inside<N>(y, result);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) result[k] = x[k] < -high ? zero : numerator[k] / (result[k] + 1.0f);
}

// Prefetches what a later iteration reads. The arithmetic of one iteration fills the processor's out-of-order window,
// so it does not reach the next loads by itself.
template <int N, typename T>
EMBEDGRAD_INLINE void prefetch_ahead(const T* p) {
    constexpr int64_t bytes = N * VL * sizeof(T), distance = 1024;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + distance + at);
}

// What a gate is the sigmoid of: g σ(z) is SiLU with z = g, and GELU's tanh form with z = 2√(2/π)(g + 0.044715 g³).
// `slope` is z′.
struct Silu {
    EMBEDGRAD_INLINE Vec argument(Vec g) { return g; }
    EMBEDGRAD_INLINE Vec times_slope(Vec x, Vec) { return x; }
};
struct Gelu {
    EMBEDGRAD_INLINE Vec argument(Vec g) { return 1.595769121605731f * (g + 0.044715f * g * g * g); }
    EMBEDGRAD_INLINE Vec times_slope(Vec x, Vec g) { return x * (1.595769121605731f + 0.2140644488178509f * g * g); }
};

// N vectors; the last one holds `count` numbers, the others VL.
template <int N, bool NON_TEMPORAL, typename Gate, typename T>
EMBEDGRAD_INLINE void swiglu_at(const T* gate, const T* up, T* out, int64_t count) {
    Vec g[N], both[N], result[N];
    prefetch_ahead<N>(gate), prefetch_ahead<N>(up);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        const Vec value = load(gate + k * VL, count);
        g[k] = Gate::argument(value), both[k] = value * load(up + k * VL, count);
    }
    times_sigmoid<N>(both, g, result);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) put<NON_TEMPORAL>(out + k * VL, result[k], count);
}

template <bool NON_TEMPORAL = false, typename Gate = Silu, typename T>
static inline void swiglu_row(const T* gate, const T* up, T* out, int64_t width) {
    int64_t i = 0;
    for (; i + 4 * VL <= width; i += 4 * VL) swiglu_at<4, NON_TEMPORAL, Gate>(gate + i, up + i, out + i, VL);
    for (; i < width; i += VL) swiglu_at<1, NON_TEMPORAL, Gate>(gate + i, up + i, out + i, width - i);
}

template <bool NON_TEMPORAL, typename T>
static void swiglu_rows(Rows<T> gate_up, Rows<T> out, int64_t begin, int64_t end, int64_t width, bool gelu) {
    for (int64_t t = begin; t < end; ++t) {
        const T *gate = gate_up.at(t), *up = gate + width;
        if (gelu)
            swiglu_row<NON_TEMPORAL, Gelu>(gate, up, out.at(t), width);
        else
            swiglu_row<NON_TEMPORAL, Silu>(gate, up, out.at(t), width);
    }
    if (NON_TEMPORAL) stream_fence();
}

template <int N, typename Gate, typename T>
EMBEDGRAD_INLINE void swiglu_backward_at(const T* da, const T* gate, const T* up, T* d_gate, T* d_up, int64_t count) {
    Vec g[N], z[N], s[N], d[N], u[N], one[N];
    prefetch_ahead<N>(da), prefetch_ahead<N>(gate), prefetch_ahead<N>(up);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) g[k] = load(gate + k * VL, count), z[k] = Gate::argument(g[k]), one[k] = broadcast(1.0f);
    times_sigmoid<N>(one, z, s);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) d[k] = load(da + k * VL, count), u[k] = load(up + k * VL, count);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        const Vec silu = g[k] * s[k];
        store(d_gate + k * VL, d[k] * u[k] * (s[k] + Gate::times_slope(silu, g[k]) * (1.0f - s[k])), count);
        store(d_up + k * VL, d[k] * silu, count);
    }
}

template <typename Gate, typename T>
static void swiglu_backward_row(const T* da, const T* gate, T* d_gate, int64_t width) {
    const T* up = gate + width;
    T* d_up = d_gate + width;
    int64_t i = 0;
    for (; i + 4 * VL <= width; i += 4 * VL)
        swiglu_backward_at<4, Gate>(da + i, gate + i, up + i, d_gate + i, d_up + i, VL);
    for (; i < width; i += VL) swiglu_backward_at<1, Gate>(da + i, gate + i, up + i, d_gate + i, d_up + i, width - i);
}

template <typename T>
static void swiglu_backward_rows(
    Rows<T> da, Rows<T> gate_up, Rows<T> out, int64_t begin, int64_t end, int64_t width, bool gelu) {
    for (int64_t t = begin; t < end; ++t)
        if (gelu)
            swiglu_backward_row<Gelu>(da.at(t), gate_up.at(t), out.at(t), width);
        else
            swiglu_backward_row<Silu>(da.at(t), gate_up.at(t), out.at(t), width);
}
