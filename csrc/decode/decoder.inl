// Attention of one token for one instruction set; see decoder.h. Norms, rotation and SwiGLU come from rowwise.inl.
#include "../cpu/rowwise.inl"

constexpr int64_t kKeys = 128;               // keys whose scores exist at once
constexpr int64_t kScores = kKeys + 2 * VL;  // score_keys writes whole vectors, some lanes behind the last key

// The first additions of `sum`, for kGathered vectors at a time: four partial sums of each vector, side by side.
#if EMBEDGRAD_ISA == 512
constexpr int kGathered = 4;
static inline Vec gather(const Vec* x) {
    const auto v = [&](int i) __attribute__((always_inline)) { return reinterpret_cast<__m512>(x[i]); };
    const __m512 one = _mm512_add_ps(_mm512_shuffle_f32x4(v(0), v(1), 0x44), _mm512_shuffle_f32x4(v(0), v(1), 0xee));
    const __m512 two = _mm512_add_ps(_mm512_shuffle_f32x4(v(2), v(3), 0x44), _mm512_shuffle_f32x4(v(2), v(3), 0xee));
    return reinterpret_cast<Vec>(_mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x88), _mm512_shuffle_f32x4(one, two, 0xdd)));
}
template <int kSelection>
static inline Vec select(Vec a, Vec b) {
    return reinterpret_cast<Vec>(_mm512_shuffle_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), kSelection));
}
#elif EMBEDGRAD_ISA == 2
constexpr int kGathered = 2;
static inline Vec gather(const Vec* x) {
    const auto a = reinterpret_cast<__m256>(x[0]), b = reinterpret_cast<__m256>(x[1]);
    return reinterpret_cast<Vec>(_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
}
template <int kSelection>
static inline Vec select(Vec a, Vec b) {
    return reinterpret_cast<Vec>(_mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), kSelection));
}
#endif

// p[h][j] = scale · (sums[h] + Σ q_h k over the columns c to d − 1)
template <int H>
static inline void finish_score(
    const float* q, float scale, const float* k, int64_t c, int64_t d, const float* sums, float (*p)[kScores],
    int64_t j) {
    for (int h = 0; h < H; ++h) {
        float score = sums[h];
        for (int64_t i = c; i < d; ++i) score += q[h * d + i] * k[i];
        p[h][j] = score * scale;
    }
}

// p[h][j] = scale · q_h k
template <int H>
static inline void score_key(const float* q, float scale, const float* k, int64_t d, float (*p)[kScores], int64_t j) {
    Vec dots[H] = {};
    int64_t c = 0;
    for (; c + VL <= d; c += VL) {
        const Vec key = load(k + c);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) dots[h] += load(q + h * d + c) * key;
    }
    float sums[H];
    for (int h = 0; h < H; ++h) sums[h] = sum(dots[h]);
    finish_score<H>(q, scale, k, c, d, sums, p, j);
}

#if EMBEDGRAD_ISA
// The same for min(VL, count) keys, to p[h][j] and on; the lanes of p behind them are undefined. Lanes are summed in
// the order of `sum`, so a score does not depend on the key's place among the VL.
template <int H>
static inline void score_keys(
    const float* q, float scale, const float* k, int64_t k_stride, int64_t count, int64_t d, float (*p)[kScores],
    int64_t j) {
    const auto key = [&](int64_t n) __attribute__((always_inline)) { return k + std::min(n, count - 1) * k_stride; };
    Vec quarters[H][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const float* keys[kGathered];
        for (int n = 0; n < kGathered; ++n) keys[n] = key(i + 4 * n);
        Vec dots[H][kGathered] = {};
        for (int64_t c = 0; c + VL <= d; c += VL) {
            Vec some[kGathered];
#pragma GCC unroll 4
            for (int n = 0; n < kGathered; ++n) some[n] = load(keys[n] + c);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const Vec query = load(q + h * d + c);
#pragma GCC unroll 4
                for (int n = 0; n < kGathered; ++n) dots[h][n] += query * some[n];
            }
        }
        for (int h = 0; h < H; ++h) quarters[h][i] = gather(dots[h]);
    }
    const int64_t whole = d / VL * VL;
    for (int h = 0; h < H; ++h) {
        const Vec* x = quarters[h];
        const Vec low = select<0x44>(x[0], x[1]) + select<0xee>(x[0], x[1]);
        const Vec high = select<0x44>(x[2], x[3]) + select<0xee>(x[2], x[3]);
        const Vec sums = select<0x88>(low, high) + select<0xdd>(low, high);
        if (whole == d) {
            store(p[h] + j, sums * scale);
            continue;
        }
        store(p[h] + j, sums);
        for (int64_t n = 0; n < std::min<int64_t>(VL, count); ++n)
            finish_score<1>(q + h * d, scale, key(n), whole, d, p[h] + j + n, p + h, j + n);
    }
}
#endif

// out_h += Σ p[h][first_key + j] v_j over j < count.
template <int H>
static inline void add_values(
    const float (*p)[kScores], int64_t count, const float* v, int64_t v_stride, int64_t d, float* out,
    int64_t first_key) {
    int64_t c = 0;
    for (; c + 2 * VL <= d; c += 2 * VL) {
        Vec sums[H][2];
        for (int h = 0; h < H; ++h) sums[h][0] = load(out + h * d + c), sums[h][1] = load(out + h * d + c + VL);
        for (int64_t j = 0; j < count; ++j) {
            const Vec first = load(v + j * v_stride + c), second = load(v + j * v_stride + c + VL);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                sums[h][0] += p[h][first_key + j] * first;
                sums[h][1] += p[h][first_key + j] * second;
            }
        }
        for (int h = 0; h < H; ++h) store(out + h * d + c, sums[h][0]), store(out + h * d + c + VL, sums[h][1]);
    }
    for (; c < d; ++c)
        for (int64_t j = 0; j < count; ++j)
            for (int h = 0; h < H; ++h) out[h * d + c] += p[h][first_key + j] * v[j * v_stride + c];
}

// out = softmax(scores) v with scores scale · q kᵀ, or softcap · tanh of them / softcap where it is not 0, for H query heads of one kv head; q, out [H, d]. The keys are those of slices[0], then
// those of slices[1]; at least one is visible, the token's own.
template <int H>
static void attend(const float* q, float scale, float softcap, const KeySlice* slices, int64_t d, float* out) {
    float p[H][kScores], top[H], mass[H];
    for (int h = 0; h < H; ++h) top[h] = -std::numeric_limits<float>::infinity(), mass[h] = 0;
    for (int64_t i = 0; i < H * d; ++i) out[i] = 0;
    const int64_t total = slices[0].count + slices[1].count;
    // Pieces of kKeys are counted over both slices, so the result does not depend on the length of the prefix.
    for (int64_t from = 0; from < total; from += kKeys) {
        const int64_t count = std::min(kKeys, total - from);
        const int64_t in_first = std::max<int64_t>(0, std::min(count, slices[0].count - from));
        const int64_t second = std::max<int64_t>(0, from - slices[0].count);
        for (int64_t j = 0; j < count;) {
            const KeySlice& s = slices[j < in_first ? 0 : 1];
            const float* k = s.k + (j < in_first ? from + j : second + j - in_first) * s.stride;
#if EMBEDGRAD_ISA
            const int64_t left = (j < in_first ? in_first : count) - j;
            if (left > 2) {
                score_keys<H>(q, scale, k, s.stride, left, d, p, j);
                j += std::min<int64_t>(VL, left);
                continue;
            }
#endif
            score_key<H>(q, scale, k, d, p, j++);
        }
        if (softcap)
            for (int h = 0; h < H; ++h) soften(p[h], softcap, count);
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
            mass[h] = std::fma(mass[h], shrink, sum(sums));  // explicit, so that the rounding is the same for every H
            top[h] = now;
            if (shrink != 1.0f)
                for (int64_t c = 0; c < d; ++c) out[h * d + c] *= shrink;
        }
        const KeySlice &prefix = slices[0], &own = slices[1];
        if (in_first) add_values<H>(p, in_first, prefix.v + from * prefix.stride, prefix.stride, d, out, 0);
        if (in_first < count)
            add_values<H>(p, count - in_first, own.v + second * own.stride, own.stride, d, out, in_first);
    }
    for (int h = 0; h < H; ++h)
        for (int64_t c = 0; c < d; ++c) out[h * d + c] /= mass[h];
}

static void attend_heads(
    const float* q, float scale, float softcap, const KeySlice* slices, int64_t d, int64_t heads, float* out) {
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) attend<4>(q + h * d, scale, softcap, slices, d, out + h * d);
    switch (heads - h) {
        case 3: return attend<3>(q + h * d, scale, softcap, slices, d, out + h * d);
        case 2: return attend<2>(q + h * d, scale, softcap, slices, d, out + h * d);
        case 1: return attend<1>(q + h * d, scale, softcap, slices, d, out + h * d);
        default: return;
    }
}

static void gate_row(bool gelu, const float* gate, const float* up, float* out, int64_t width) {
    gelu ? swiglu_row<false, Gelu>(gate, up, out, width) : swiglu_row<false, Silu>(gate, up, out, width);
}

// Norms (unless `weight` is null) and rotates `count` heads in place.
static void rotate_heads(
    float* x, const float* cos, const float* sin, const float* weight, float eps, int64_t count, int64_t half) {
    rope_row(x, cos, sin, HeadNorms<float>{weight, weight, 0, eps}, count, half);
}
