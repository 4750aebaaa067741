// Norms, rotation, SwiGLU and attention of one token for one instruction set; see decoder.h.
#include "../cpu/rowwise.inl"

constexpr int64_t kKeys = 128;  // keys whose weights are kept at once

// The sums of the lanes of N vectors, of each in the same order for every N.
template <int N>
static inline void sums_of(const Vec* x, float* out) {
#if EMBEDGRAD_ISA
    if constexpr (N == 4) {
        __m256 half[4];
#if EMBEDGRAD_ISA == 512
        for (int i = 0; i < 4; ++i) {
            const auto v = reinterpret_cast<__m512>(x[i]);
            half[i] = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
        }
#else
        for (int i = 0; i < 4; ++i) half[i] = reinterpret_cast<__m256>(x[i]);
#endif
        // Lanes 0 and 2, 1 and 3 of each quarter, as `sum` adds them.
        __m128 quarter[4];
        for (int i = 0; i < 4; ++i)
            quarter[i] = _mm_add_ps(_mm256_castps256_ps128(half[i]), _mm256_extractf128_ps(half[i], 1));
        const __m128 low = _mm_unpacklo_ps(quarter[0], quarter[1]), high = _mm_unpackhi_ps(quarter[0], quarter[1]);
        const __m128 low2 = _mm_unpacklo_ps(quarter[2], quarter[3]), high2 = _mm_unpackhi_ps(quarter[2], quarter[3]);
        const __m128 one = _mm_add_ps(low, high), two = _mm_add_ps(low2, high2);  // (x0+x2, y0+y2, x1+x3, y1+y3)
        _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(one, two), _mm_movehl_ps(two, one)));
        return;
    }
#endif
    for (int i = 0; i < N; ++i) out[i] = sum(x[i]);
}

// p[h][j] = scale · q_h k_j for N keys from j on.
template <int H, int N>
static inline void score_keys(
    const float* q, float scale, const float* k, int64_t row, int64_t d, float (*p)[kKeys], int64_t j) {
    Vec dots[H][N] = {};
    int64_t c = 0;
    for (; c + VL <= d; c += VL) {
        Vec keys[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) keys[n] = load(k + n * row + c);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const Vec query = load(q + h * d + c);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) dots[h][n] += query * keys[n];
        }
    }
    for (int h = 0; h < H; ++h) {
        sums_of<N>(dots[h], p[h] + j);
        for (int n = 0; n < N; ++n) {
            for (int64_t i = c; i < d; ++i) p[h][j + n] += q[h * d + i] * k[n * row + i];
            p[h][j + n] *= scale;
        }
    }
}

// out_h += Σ p[h][first + j] v_j over j < count.
template <int H>
static inline void add_values(
    const float (*p)[kKeys], int64_t count, const float* v, int64_t row, int64_t d, float* out, int64_t first_key) {
    int64_t c = 0;
    for (; c + 2 * VL <= d; c += 2 * VL) {
        Vec sums[H][2];
        for (int h = 0; h < H; ++h) sums[h][0] = load(out + h * d + c), sums[h][1] = load(out + h * d + c + VL);
        for (int64_t j = 0; j < count; ++j) {
            const Vec first = load(v + j * row + c), second = load(v + j * row + c + VL);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) sums[h][0] += p[h][first_key + j] * first, sums[h][1] += p[h][first_key + j] * second;
        }
        for (int h = 0; h < H; ++h) store(out + h * d + c, sums[h][0]), store(out + h * d + c + VL, sums[h][1]);
    }
    for (; c < d; ++c)
        for (int64_t j = 0; j < count; ++j)
            for (int h = 0; h < H; ++h) out[h * d + c] += p[h][first_key + j] * v[j * row + c];
}

// softmax(scale · q kᵀ) v for H heads of a group; q, out [H, d]. At least one key is visible: the token's own.
template <int H>
static void attend(const float* q, float scale, const Stretch* stretches, int64_t d, float* out) {
    float p[H][kKeys], top[H], mass[H];
    for (int h = 0; h < H; ++h) top[h] = -std::numeric_limits<float>::infinity(), mass[h] = 0;
    for (int64_t i = 0; i < H * d; ++i) out[i] = 0;
    const int64_t total = stretches[0].count + stretches[1].count;
    // Pieces are cut where the keys stand in the sequence: what a token gets does not depend on how long the trunk is.
    for (int64_t from = 0; from < total; from += kKeys) {
        const int64_t count = std::min(kKeys, total - from);
        const int64_t in_first = std::max<int64_t>(0, std::min(count, stretches[0].count - from));
        const int64_t second = std::max<int64_t>(0, from - stretches[0].count);
        for (int64_t j = 0; j < count;) {
            const Stretch& s = stretches[j < in_first ? 0 : 1];
            const float* k = s.k + (j < in_first ? from + j : second + j - in_first) * s.row;
            const int64_t left = (j < in_first ? in_first : count) - j;
            if (left >= 4)
                score_keys<H, 4>(q, scale, k, s.row, d, p, j), j += 4;
            else
                score_keys<H, 1>(q, scale, k, s.row, d, p, j), j += 1;
        }
        for (int h = 0; h < H; ++h) {
            for (int64_t j = count; j % VL; ++j) p[h][j] = -std::numeric_limits<float>::infinity();
            Vec most = load(p[h]);
            for (int64_t j = VL; j < count; j += VL) most = max(most, load(p[h] + j));
            const float now = std::max(top[h], highest(most));
            Vec sums = {};
            for (int64_t j = 0; j < count; j += VL) {
                const Vec weight = exp(load(p[h] + j) - now);
                store(p[h] + j, weight);
                sums += weight;
            }
            const float shrink = top[h] == now ? 1.0f : std::exp(top[h] - now);
            mass[h] = std::fma(mass[h], shrink, sum(sums));  // by name: for every H the compiler must do the same
            top[h] = now;
            if (shrink != 1.0f)
                for (int64_t c = 0; c < d; ++c) out[h * d + c] *= shrink;
        }
        if (in_first) add_values<H>(p, in_first, stretches[0].v + from * stretches[0].row, stretches[0].row, d, out, 0);
        if (in_first < count)
            add_values<H>(
                p, count - in_first, stretches[1].v + second * stretches[1].row, stretches[1].row, d, out, in_first);
    }
    for (int h = 0; h < H; ++h)
        for (int64_t c = 0; c < d; ++c) out[h * d + c] /= mass[h];
}

static void attend_heads(const float* q, float scale, const Stretch* stretches, int64_t d, int64_t heads, float* out) {
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) attend<4>(q + h * d, scale, stretches, d, out + h * d);
    switch (heads - h) {
        case 3: return attend<3>(q + h * d, scale, stretches, d, out + h * d);
        case 2: return attend<2>(q + h * d, scale, stretches, d, out + h * d);
        case 1: return attend<1>(q + h * d, scale, stretches, d, out + h * d);
        default: return;
    }
}

// Norm and rotation of the heads [first, first + count) of a row; `weight` null: no norm.
static void rotate_heads(
    float* x, const float* cos, const float* sin, const float* weight, float eps, int64_t count, int64_t half) {
    rope_row(x, cos, sin, {weight, weight, 0, eps}, count, half);
}
