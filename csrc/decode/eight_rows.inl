// Products with int8 and int4 matrices for AVX2: eight rows of the matrix stand side by side in a register, four columns
// of each in its lane of 32 bits, so that no sum across lanes is left. The rows are brought into that order where they
// are multiplied, once for all activations; the stored bytes stay as they are. Integers and the order of the sums over
// groups are the same for any number of activations, and so are the bits of the result.
//
// int4: the halves are unsigned, and the eight products of pairs that a lane of 16 bits meets in a group are at most
// 8 · 2 · 15 · 127 < 2¹⁵: a group is summed in 16 bits and widened once.
//
// int8: two such products would not fit. With s = Σ over pairs of neighbours (w₀ + x₁)(w₁ + x₀),
//
//     Σ w x = s − Σ w₀ w₁ − Σ x₀ x₁                                       (Winograd 1968)
//
// takes one product of 16 bits for two columns, half as many as w₀ x₀ + w₁ x₁, and integers lose nothing by it. The sum
// over the weights is found while they are ordered, that over the activations while they are quantised. For a row or two
// of activations that would not pay: they take |w| and the sign of w, which gives the same integers.

typedef __m256i Eight;  // a number, or four bytes, of each of eight rows

constexpr int64_t kEight = 8, kQuads = kGroup / 4;

// Eight rows of a part, ordered: quads [strips, kStripVectors], scales, offsets and squares [groups].
struct EightRows {
    Eight* quads;
    __m256 *scales, *offsets;
    Eight* squares;  // int8: Σ w₀ w₁
};

static inline const __m128i* sixteen_bytes(const uint8_t* p) { return reinterpret_cast<const __m128i*>(p); }

// use(i, quad) with bytes at + 4 i to at + 4 i + 3 of eight rows, for i from 0 to 7.
template <class Use>
static inline __attribute__((always_inline)) void order_rows(const uint8_t* const* rows, int64_t at, const Use& use) {
    for (int64_t i = 0; i < kQuads; i += 4, at += 16) {
        Eight two[4];  // rows r and r + 4
        for (int r = 0; r < 4; ++r)
            two[r] = _mm256_inserti128_si256(
                _mm256_castsi128_si256(_mm_loadu_si128(sixteen_bytes(rows[r] + at))),
                _mm_loadu_si128(sixteen_bytes(rows[r + 4] + at)), 1);
        const Eight a = _mm256_unpacklo_epi32(two[0], two[1]), b = _mm256_unpackhi_epi32(two[0], two[1]);
        const Eight c = _mm256_unpacklo_epi32(two[2], two[3]), d = _mm256_unpackhi_epi32(two[2], two[3]);
        use(i, _mm256_unpacklo_epi64(a, c));
        use(i + 1, _mm256_unpackhi_epi64(a, c));
        use(i + 2, _mm256_unpacklo_epi64(b, d));
        use(i + 3, _mm256_unpackhi_epi64(b, d));
    }
}

// Numbers [groups] of eight rows that stand `row` apart, in float16 or float32: out[g] has the g-th of each.
static inline void order_numbers(const void* from, bool half, int64_t groups, const int64_t* rows, __m256* out) {
    int64_t g = 0;
    if (half && groups >= 8) {
        const auto* p = static_cast<const uint16_t*>(from);
        for (; g < groups; g = g + 8 < groups && g + 16 > groups ? groups - 8 : g + 8) {
            __m128i x[8];
            for (int r = 0; r < 8; ++r) x[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + rows[r] * groups + g));
            __m128i y[8], z[8];
            for (int r = 0; r < 4; ++r) {
                y[2 * r] = _mm_unpacklo_epi16(x[2 * r], x[2 * r + 1]);
                y[2 * r + 1] = _mm_unpackhi_epi16(x[2 * r], x[2 * r + 1]);
            }
            for (int r = 0; r < 2; ++r)
                for (int i = 0; i < 2; ++i) {  // of columns 4 i and on, rows 4 r and on
                    z[4 * r + 2 * i] = _mm_unpacklo_epi32(y[4 * r + i], y[4 * r + 2 + i]);
                    z[4 * r + 2 * i + 1] = _mm_unpackhi_epi32(y[4 * r + i], y[4 * r + 2 + i]);
                }
            for (int i = 0; i < 4; ++i) {
                out[g + 2 * i] = _mm256_cvtph_ps(_mm_unpacklo_epi64(z[i], z[4 + i]));
                out[g + 2 * i + 1] = _mm256_cvtph_ps(_mm_unpackhi_epi64(z[i], z[4 + i]));
            }
        }
        return;
    }
    auto* to = reinterpret_cast<float*>(out);
    for (int r = 0; r < kEight; ++r)
        for (g = 0; g < groups; ++g) {
            const int64_t at = rows[r] * groups + g;
            to[g * kEight + r] = half ? F16::one(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
        }
}

// One strip of int4: the group of the low halves, and behind it that of the high ones.
static void split_halves(const uint8_t* const* rows, int64_t at, Eight* quads) {
    order_rows(rows, at, [&](int64_t i, const Eight& both) __attribute__((always_inline)) {
        quads[i] = low_halves(both);
        quads[kQuads + i] = high_halves(both);
    });
}

// One strip of int8 in 16 bits: of each quad the elements 0 and 2, and then 1 and 3.
static void split_neighbours(const uint8_t* const* rows, int64_t at, Eight* quads, Eight* squares) {
    Eight sum = _mm256_setzero_si256();
    order_rows(rows, at, [&](int64_t i, const Eight& quad) __attribute__((always_inline)) {
        const Eight even = _mm256_maddubs_epi16(_mm256_set1_epi16(1), quad), odd = _mm256_srai_epi16(quad, 8);
        quads[2 * i] = even, quads[2 * i + 1] = odd;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, odd));
    });
    *squares = sum;
}

static inline Eight four_bytes(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// acc += Σ w x over one group of eight rows, for M rows of activations from b on.
template <int M>
static inline __attribute__((always_inline)) void add_group(
    __m256* acc, const Eight* dots, const EightRows& w, int64_t g, const Activations& x, int64_t b, bool has_offsets) {
    const float *scales = x.scales(b) + g, *sums = x.sums(b) + g;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        const __m256 scale = _mm256_mul_ps(w.scales[g], _mm256_broadcast_ss(scales + m * x.sums_row()));
        acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m]), scale, acc[m]);
        if (has_offsets) acc[m] = _mm256_fmadd_ps(w.offsets[g], _mm256_broadcast_ss(sums + m * x.sums_row()), acc[m]);
    }
}

template <int M>
static inline __attribute__((always_inline)) void int4_group(
    __m256* acc, const Eight* quads, const EightRows& w, int64_t g, const Activations& x, int64_t b) {
    const int8_t* bytes[M];
    Eight dots[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) bytes[m] = x.bytes(b + m) + g * kGroup, dots[m] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int64_t i = 0; i < kQuads; ++i) {
        const Eight quad = quads[i];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
            dots[m] = _mm256_add_epi16(dots[m], _mm256_maddubs_epi16(quad, four_bytes(bytes[m] + 4 * i)));
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) dots[m] = _mm256_madd_epi16(dots[m], _mm256_set1_epi16(1));
    add_group<M>(acc, dots, w, g, x, b, true);
}

template <int M>
static inline __attribute__((always_inline)) void int8_group(
    __m256* acc, const Eight* quads, const EightRows& w, int64_t g, const Activations& x, int64_t b, bool has_offsets) {
    const int16_t* neighbours[M];
    Eight dots[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
        neighbours[m] = x.neighbours(b + m) + g * kGroup;
        dots[m] = _mm256_sub_epi32(_mm256_set1_epi32(-x.squares(b + m)[g]), w.squares[g]);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < kQuads; ++i) {
        const Eight even = quads[2 * i], odd = quads[2 * i + 1];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
            const Eight left = _mm256_add_epi16(even, four_bytes(neighbours[m] + 4 * i));
            const Eight right = _mm256_add_epi16(odd, four_bytes(neighbours[m] + 4 * i + 2));
            dots[m] = _mm256_add_epi32(dots[m], _mm256_madd_epi16(left, right));
        }
    }
    add_group<M>(acc, dots, w, g, x, b, has_offsets);
}

// The same for one strip that is ordered on the way, which pays for a row or two of activations.
template <int M, bool kInt4>
static inline __attribute__((always_inline)) void unordered_strip(
    __m256* acc, const uint8_t* const* rows, const EightRows& w, int64_t s, int64_t half, const Activations& x,
    int64_t b, bool has_offsets) {
    const int64_t at = s * kGroup, high_at = (half + s) * kGroup;
    Eight dots[M], high_dots[M];
    for (int m = 0; m < M; ++m) dots[m] = high_dots[m] = _mm256_setzero_si256();
    order_rows(rows, at, [&](int64_t i, const Eight& quad) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
            const Eight quad_x = four_bytes(x.bytes(b + m) + at + 4 * i);
            if constexpr (kInt4) {
                const Eight high_x = four_bytes(x.bytes(b + m) + high_at + 4 * i);
                dots[m] = _mm256_add_epi16(dots[m], _mm256_maddubs_epi16(low_halves(quad), quad_x));
                high_dots[m] = _mm256_add_epi16(high_dots[m], _mm256_maddubs_epi16(high_halves(quad), high_x));
            } else {
                const Eight pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(quad), _mm256_sign_epi8(quad_x, quad));
                dots[m] = _mm256_add_epi32(dots[m], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
    });
    if constexpr (kInt4)
        for (int m = 0; m < M; ++m) {
            dots[m] = _mm256_madd_epi16(dots[m], _mm256_set1_epi16(1));
            high_dots[m] = _mm256_madd_epi16(high_dots[m], _mm256_set1_epi16(1));
        }
    add_group<M>(acc, dots, w, s, x, b, has_offsets);
    if constexpr (kInt4) add_group<M>(acc, high_dots, w, half + s, x, b, has_offsets);
}

constexpr int64_t kStripVectors = 2 * kQuads;
constexpr int kFew = 2;  // rows of activations for which those of the matrix are not ordered first
constexpr int64_t kOrderedBytes = 20 << 10;  // of rows that are ordered at once: they stay in the nearest cache

// Everything about the eight rows from `first` on but their quads. Rows behind `last` are row `last` again.
static void prepare_eight(const Part& part, int64_t first, int64_t last, const uint8_t** bytes, EightRows& w) {
    int64_t rows[kEight];
    for (int64_t r = 0; r < kEight; ++r) {
        rows[r] = std::min(first + r, last);
        bytes[r] = static_cast<const uint8_t*>(part.data) + rows[r] * part.row_bytes;
    }
    order_numbers(part.scales, part.half_scales, part.groups, rows, w.scales);
    if (part.offsets)
        order_numbers(part.offsets, part.half_scales, part.groups, rows, w.offsets);
    else if (part.stored == Stored::int4)
        for (int64_t g = 0; g < part.groups; ++g) w.offsets[g] = _mm256_mul_ps(w.scales[g], _mm256_set1_ps(-8));
}

// y of eight rows and M activations. `bytes`: the rows themselves, where they have not been ordered.
template <int M, bool kInt4>
static __attribute__((noinline)) void eight_rows_tile(
    const EightRows& rows, const uint8_t* const* bytes, int64_t strips, const Activations& x, int64_t b, int64_t n,
    int64_t count, bool has_offsets, const Output& out) {
    const EightRows w = rows;
    __m256 acc[M];
    for (int m = 0; m < M; ++m) acc[m] = _mm256_setzero_ps();
    for (int64_t s = 0; s < strips; ++s) {
        const Eight* quads = w.quads + s * kStripVectors;
        if constexpr (M <= kFew)
            if (bytes) {
                unordered_strip<M, kInt4>(acc, bytes, w, s, strips, x, b, has_offsets);
                continue;
            }
        if constexpr (kInt4) {
            int4_group<M>(acc, quads, w, s, x, b);
            int4_group<M>(acc, quads + kQuads, w, strips + s, x, b);
        } else {
            int8_group<M>(acc, quads, w, s, x, b, has_offsets);
        }
    }
    for (int m = 0; m < M; ++m) {
        float y[kEight];
        _mm256_storeu_ps(y, acc[m]);
        out.put(b + m, n, y, 1, count);
    }
}

static Eight* eight_rows_memory(int64_t vectors) {
    thread_local std::vector<float> memory;
    const auto needed = static_cast<size_t>((vectors + 1) * sizeof(Eight) / sizeof(float));
    if (memory.size() < needed) memory.resize(needed);
    const auto odd = reinterpret_cast<uintptr_t>(memory.data()) % sizeof(Eight);
    return reinterpret_cast<Eight*>(reinterpret_cast<char*>(memory.data()) + (sizeof(Eight) - odd) % sizeof(Eight));
}

template <bool kInt4>
static void eight_rows_part(const Part& part, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out) {
    const int64_t groups = part.groups, strips = kInt4 ? groups / 2 : groups;
    const bool few = rows <= kFew;
    const int64_t each = (few ? 0 : strips) * kStripVectors + 3 * groups;
    const int64_t together = few ? 1 : std::max<int64_t>(1, std::min<int64_t>(4, kOrderedBytes / (each * sizeof(Eight))));
    Eight* memory = eight_rows_memory(together * each);
    EightRows blocks[4];
    for (int64_t e = 0; e < together; ++e) {
        Eight* at = memory + e * each;
        auto* numbers = reinterpret_cast<__m256*>(at);
        blocks[e] = {at + 3 * groups, numbers, numbers + groups, at + 2 * groups};
    }
    const bool has_offsets = kInt4 || part.offsets;
    const auto tile = [&](const EightRows& w, const uint8_t* const* bytes, int64_t b, int64_t n) {
        const int64_t count = std::min(kEight, end - n);
        switch (rows - b) {
            case 1: return eight_rows_tile<1, kInt4>(w, bytes, strips, x, b, n, count, has_offsets, out);
            case 2: return eight_rows_tile<2, kInt4>(w, bytes, strips, x, b, n, count, has_offsets, out);
            case 3: return eight_rows_tile<3, kInt4>(w, bytes, strips, x, b, n, count, has_offsets, out);
            default: return eight_rows_tile<4, kInt4>(w, bytes, strips, x, b, n, count, has_offsets, out);
        }
    };
    for (int64_t n = begin; n < end; n += together * kEight) {
        const int64_t here = std::min(together, (end - n + kEight - 1) / kEight);
        const uint8_t* bytes[kEight];
        for (int64_t e = 0; e < here; ++e) {
            const EightRows& w = blocks[e];
            prepare_eight(part, n + e * kEight, end - 1, bytes, blocks[e]);
            for (int64_t s = 0; !few && s < strips; ++s)
                if constexpr (kInt4)
                    split_halves(bytes, s * kGroup, w.quads + s * kStripVectors);
                else
                    split_neighbours(bytes, s * kGroup, w.quads + s * kStripVectors, w.squares + s);
        }
        for (int64_t b = 0; b < rows; b += 4)
            for (int64_t e = 0; e < here; ++e) tile(blocks[e], few ? bytes : nullptr, b, n + e * kEight);
    }
}
