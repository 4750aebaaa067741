// Rows [begin, end) of each row-wise op; see rowwise.h. Each op has an `_at` for one vector of a row, of which the last
// may hold fewer than VL numbers. Rows are taken in fours where their sums would otherwise wait for each other.

static inline float inverse_rms(float squares, float eps, int64_t d) {
    return 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
}

template <typename T>
EMBEDGRAD_INLINE void add_at(T* x, const T* added, int64_t count) {
    store(x, load(x, count) + load(added, count), count);
}

// The first `count` numbers of x to p; PAST: all of them, past the caches (of Bf16 the bound is arithmetic).
template <bool PAST, typename T>
EMBEDGRAD_INLINE void put(T* p, Vec x, int64_t count) {
    if constexpr (PAST && sizeof(T) == sizeof(float))
        stream(p, x);
    else
        store(p, x, count);
}

template <int R, bool PAST, typename T>
EMBEDGRAD_INLINE void scaled_at(
    const T* x, int64_t x_row, const float (&by)[R], const T* w, T* out, int64_t out_row, int64_t count) {
    const Vec weight = load(w, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
        put<PAST>(out + r * out_row, load(x + r * x_row, count) * by[r] * weight, count);
}

// R rows from x on; `added` null where nothing is; PAST: the results go past the caches. Lines of `out` are asked for while the squares are summed and, where
// as many rows come `next`, theirs while the results are stored: a row ends before the processor has seen that it is a
// stream.
template <int R, bool PAST = false, typename T>
static void rms_norm_block(
    T* x, int64_t x_row, const T* added, int64_t added_row, const T* w, float eps, T* out, int64_t out_row, int64_t d,
    bool next = false) {
    if (added)
        for (int r = 0; r < R; ++r) {
            int64_t i = 0;
            for (; i + VL <= d; i += VL) add_at(x + r * x_row + i, added + r * added_row + i, VL);
            if (i < d) add_at(x + r * x_row + i, added + r * added_row + i, d - i);
        }
    Vec squares[R][2] = {};
    int64_t i = 0;
    for (; i + 2 * VL <= d; i += 2 * VL)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec first = load(x + r * x_row + i), second = load(x + r * x_row + i + VL);
            if (R > 1 && !PAST) __builtin_prefetch(out + r * out_row + i, 1);
            squares[r][0] += first * first;
            squares[r][1] += second * second;
        }
    for (; i < d; i += VL)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec last = load(x + r * x_row + i, d - i);
            squares[r][0] += last * last;
        }
    float by[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) by[r] = inverse_rms(sum(squares[r][0] + squares[r][1]), eps, d);
    for (i = 0; i + VL <= d; i += VL) {
        if (next)
#pragma GCC unroll 4
            for (int r = R; r < 2 * R; ++r) __builtin_prefetch(x + r * x_row + i);
        scaled_at<R, PAST>(x + i, x_row, by, w + i, out + i, out_row, VL);
    }
    if (i < d) scaled_at<R, false>(x + i, x_row, by, w + i, out + i, out_row, d - i);
}

static inline void rms_norm_row(float* x, const float* residual, const float* w, float eps, float* out, int64_t d) {
    rms_norm_block<1>(x, 0, residual, 0, w, eps, out, 0, d);
}

template <bool PAST, typename T>
static void rms_norm_rows(
    Rows<T> x, Rows<T> residual, const T* w, float eps, Rows<T> out, int64_t begin, int64_t end, int64_t d) {
    int64_t t = begin;
    for (; t < end; t += t + 4 <= end ? 4 : 1) {
        const T* added = residual.data ? residual.at(t) : nullptr;
        if (t + 4 <= end)
            rms_norm_block<4, PAST>(x.at(t), x.row, added, residual.row, w, eps, out.at(t), out.row, d, t + 8 <= end);
        else
            rms_norm_block<1, PAST>(x.at(t), x.row, added, residual.row, w, eps, out.at(t), out.row, d);
    }
    if (PAST) streamed();
}

template <int R, typename T>
EMBEDGRAD_INLINE void norm_sums_at(
    const T* dy, int64_t dy_row, const T* x, int64_t x_row, const T* w, int64_t count, Vec (&along)[R], Vec (&squares)[R]) {
    const Vec weight = load(w, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const Vec at = load(x + r * x_row, count);
        along[r] += load(dy + r * dy_row, count) * weight * at;
        squares[r] += at * at;
    }
}

template <int R, typename T>
EMBEDGRAD_INLINE void norm_gradient_at(
    const T* dy, int64_t dy_row, const T* x, int64_t x_row, const T* w, const float (&by)[R], const float (&back)[R], T* dx,
    int64_t dx_row, int64_t count) {
    const Vec weight = load(w, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const Vec before = load(dx + r * dx_row, count) - load(x + r * x_row, count) * back[r];
        store(dx + r * dx_row, before + load(dy + r * dy_row, count) * weight * by[r], count);
    }
}

template <int R, typename T>
static void rms_norm_backward_block(
    const T* dy, int64_t dy_row, const T* x, int64_t x_row, const T* w, float eps, T* dx, int64_t dx_row, int64_t d,
    bool next = false) {
    Vec along[R] = {}, squares[R] = {};
    float by[R], back[R];
    int64_t i = 0;
    for (; i + VL <= d; i += VL) norm_sums_at<R>(dy + i, dy_row, x + i, x_row, w + i, VL, along, squares);
    if (i < d) norm_sums_at<R>(dy + i, dy_row, x + i, x_row, w + i, d - i, along, squares);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        by[r] = inverse_rms(sum(squares[r]), eps, d);
        back[r] = sum(along[r]) / static_cast<float>(d) * by[r] * by[r] * by[r];
    }
    for (i = 0; i + VL <= d; i += VL) {
        if (next)
#pragma GCC unroll 4
            for (int r = R; r < 2 * R; ++r) {
                __builtin_prefetch(dy + r * dy_row + i);
                __builtin_prefetch(x + r * x_row + i);
                __builtin_prefetch(dx + r * dx_row + i, 1);
            }
        norm_gradient_at<R>(dy + i, dy_row, x + i, x_row, w + i, by, back, dx + i, dx_row, VL);
    }
    if (i < d) norm_gradient_at<R>(dy + i, dy_row, x + i, x_row, w + i, by, back, dx + i, dx_row, d - i);
}

template <typename T>
static void rms_norm_backward_rows(
    Rows<T> dy, Rows<T> x, const T* w, float eps, Rows<T> dx, int64_t begin, int64_t end, int64_t d) {
    int64_t t = begin;
    for (; t + 4 <= end; t += 4)
        rms_norm_backward_block<4>(dy.at(t), dy.row, x.at(t), x.row, w, eps, dx.at(t), dx.row, d, t + 8 <= end);
    for (; t < end; ++t) rms_norm_backward_block<1>(dy.at(t), dy.row, x.at(t), x.row, w, eps, dx.at(t), dx.row, d);
}

// One vector of the angles for all heads of a row: cos and sin stay in registers.
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

template <typename T>
static void rope_row(T* x, const T* cos, const T* sin, const HeadNorms<T>& norms, int64_t heads, int64_t half) {
    for (int64_t h = 0; h < heads; ++h) {
        const T* weight = h < norms.q_heads ? norms.q : norms.k;
        T* head = x + h * 2 * half;
        if (weight) rms_norm_block<1, false, T>(head, 0, nullptr, 0, weight, norms.eps, head, 0, 2 * half);
    }
    rotate(x, cos, sin, heads, half, 1.0f);
}

template <typename T>
static void rope_rows(
    Rows<T> x, const T* cos, const T* sin, const HeadNorms<T>& norms, int64_t begin, int64_t end, int64_t heads,
    int64_t half) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t t = begin; t < end; ++t) {
        if (t + 1 < end)  // a row is read here and there, which no processor foresees
            for (int64_t c = 0; c < 2 * half * heads; c += line) __builtin_prefetch(x.at(t + 1) + c, 1);
        rope_row<T>(x.at(t), cos + t * half, sin + t * half, norms, heads, half);
    }
}

template <typename T>
EMBEDGRAD_INLINE void head_gradient_at(T* dx, const T* x, const T* w, float by, float back, int64_t count) {
    store(dx, load(dx, count) * load(w, count) * by - load(x, count) * back, count);
}

// dx = the gradient before the norm of one head, from the one behind it.
template <typename T>
static void head_norm_backward(T* dx, const T* x, const T* w, float eps, int64_t size) {
    Vec along[1] = {}, squares[1] = {};
    int64_t i = 0;
    for (; i + VL <= size; i += VL) norm_sums_at<1, T>(dx + i, 0, x + i, 0, w + i, VL, along, squares);
    if (i < size) norm_sums_at<1, T>(dx + i, 0, x + i, 0, w + i, size - i, along, squares);
    const float by = inverse_rms(sum(squares[0]), eps, size);
    const float back = sum(along[0]) / static_cast<float>(size) * by * by * by;
    for (i = 0; i + VL <= size; i += VL) head_gradient_at(dx + i, x + i, w + i, by, back, VL);
    if (i < size) head_gradient_at(dx + i, x + i, w + i, by, back, size - i);
}

template <typename T>
static void rope_backward_rows(
    Rows<T> dx, Rows<T> raw, const T* cos, const T* sin, const HeadNorms<T>& norms, int64_t begin, int64_t end,
    int64_t heads, int64_t half) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t t = begin; t < end; ++t) {
        if (t + 1 < end)
            for (int64_t c = 0; c < 2 * half * heads; c += line) __builtin_prefetch(dx.at(t + 1) + c, 1);
        rotate(dx.at(t), cos + t * half, sin + t * half, heads, half, -1.0f);
        for (int64_t h = 0; h < heads; ++h) {
            const T* weight = h < norms.q_heads ? norms.q : norms.k;
            const int64_t at = h * 2 * half;
            if (weight) head_norm_backward(dx.at(t) + at, raw.at(t) + at, weight, norms.eps, 2 * half);
        }
    }
}

// above[k] / (1 + exp(−x[k])) of N vectors; 0 below −87, where the quotient is less than 1.7e-38 of `above`.
template <int N>
EMBEDGRAD_INLINE void over_one_plus_exp_minus(const Vec (&above)[N], const Vec (&x)[N], Vec (&result)[N]) {
    const Vec high = all(87.0f), zero = {};
    Vec y[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) y[k] = max(-high, x[k]);  // NaN stays
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) y[k] = -min(high, y[k]);
    exp_inside<N>(y, result);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) result[k] = x[k] < -high ? zero : above[k] / (result[k] + 1.0f);
}

// Asks for what will be read some iterations from now: the arithmetic of a few vectors is longer than the window in which
// the processor looks for loads.
template <int N, typename T>
EMBEDGRAD_INLINE void ahead(const T* p) {
    constexpr int64_t bytes = N * VL * sizeof(T), distance = 1024;
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + distance + at);
}

// N vectors of which the last holds `count` numbers, the others VL.
template <int N, bool PAST, typename T>
EMBEDGRAD_INLINE void swiglu_at(const T* gate, const T* up, T* out, int64_t count) {
    Vec g[N], both[N], result[N];
    ahead<N>(gate), ahead<N>(up);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) g[k] = load(gate + k * VL, count), both[k] = g[k] * load(up + k * VL, count);
    over_one_plus_exp_minus<N>(both, g, result);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) put<PAST>(out + k * VL, result[k], count);
}

template <bool PAST = false, typename T>
static inline void swiglu_row(const T* gate, const T* up, T* out, int64_t width) {
    int64_t i = 0;
    for (; i + 4 * VL <= width; i += 4 * VL) swiglu_at<4, PAST>(gate + i, up + i, out + i, VL);
    for (; i < width; i += VL) swiglu_at<1, PAST>(gate + i, up + i, out + i, width - i);
}

template <bool PAST, typename T>
static void swiglu_rows(Rows<T> gate_up, Rows<T> out, int64_t begin, int64_t end, int64_t width) {
    for (int64_t t = begin; t < end; ++t) swiglu_row<PAST>(gate_up.at(t), gate_up.at(t) + width, out.at(t), width);
    if (PAST) streamed();
}

template <int N, typename T>
EMBEDGRAD_INLINE void swiglu_backward_at(const T* da, const T* gate, const T* up, T* d_gate, T* d_up, int64_t count) {
    Vec g[N], s[N], d[N], u[N], one[N];
    ahead<N>(da), ahead<N>(gate), ahead<N>(up);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) g[k] = load(gate + k * VL, count), one[k] = all(1.0f);
    over_one_plus_exp_minus<N>(one, g, s);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) d[k] = load(da + k * VL, count), u[k] = load(up + k * VL, count);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
        const Vec silu = g[k] * s[k];
        store(d_gate + k * VL, d[k] * u[k] * (s[k] + silu * (1.0f - s[k])), count);
        store(d_up + k * VL, d[k] * silu, count);
    }
}

template <typename T>
static void swiglu_backward_rows(Rows<T> da, Rows<T> gate_up, Rows<T> out, int64_t begin, int64_t end, int64_t width) {
    for (int64_t t = begin; t < end; ++t) {
        const T *d = da.at(t), *gate = gate_up.at(t), *up = gate + width;
        T *d_gate = out.at(t), *d_up = d_gate + width;
        int64_t i = 0;
        for (; i + 4 * VL <= width; i += 4 * VL) swiglu_backward_at<4>(d + i, gate + i, up + i, d_gate + i, d_up + i, VL);
        for (; i < width; i += VL) swiglu_backward_at<1>(d + i, gate + i, up + i, d_gate + i, d_up + i, width - i);
    }
}

static inline float largest(const float* z, int64_t n) {
    const float least = -std::numeric_limits<float>::infinity();
    Vec most[4] = {all(least), all(least), all(least), all(least)};
    int64_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) most[k] = max(load(z + i + k * VL), most[k]);
    for (; i < n; i += VL) most[0] = max(load(z + i, n - i, least), most[0]);
    return highest(max(max(most[0], most[1]), max(most[2], most[3])));
}

// The first place of `wanted`, n where it is nowhere.
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

// exp(z − top) of N vectors, the last of which holds `count` numbers; added to `part`, and with KEEP stored over z.
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

// Σ exp(z − top), in float32 over a few hundred terms, then in double: over a whole vocabulary float32 would lose three
// digits.
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

static void softmax_loss_row(float* z, int64_t n, int64_t target, const float* weight, float& nll, int64_t& predicted) {
    const float top = largest(z, n), wanted = target < 0 ? 0.0f : z[target];
    predicted = first_of(z, n, top);
    if (predicted == n) predicted = 0;  // all are NaN, as the loss will be
    const double mass = weight ? mass_of<true>(z, n, top) : mass_of<false>(z, n, top);
    nll = target < 0 ? 0.0f : static_cast<float>(std::log(mass) - (wanted - top));
    if (!weight) return;
    const float scale = target < 0 ? 0.0f : static_cast<float>(*weight / mass);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(z + i, load(z + i) * scale);
    if (i < n) store(z + i, load(z + i, n - i) * scale, n - i);
    if (target >= 0) z[target] -= *weight;
}

// Twelve chains, which hide the latency of each other; what they come to is of no interest, but must be used.
static void multiply_add(int64_t rounds, float& result) {
    Vec chain[12];
    for (int k = 0; k < 12; ++k) chain[k] = all(1.0f + static_cast<float>(k));
    const Vec by = all(0.999f + result);
    for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 12
        for (int k = 0; k < 12; ++k) chain[k] = chain[k] * by + by;
    for (int k = 1; k < 12; ++k) chain[0] += chain[k];
    result = sum(chain[0]);
}
static void vector_length(int64_t& length) { length = VL; }
