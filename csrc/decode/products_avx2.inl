// Products with int8 and int4 matrices for AVX2. No sum runs across lanes: a 32-bit lane has four columns of
//
//   one of eight matrix rows, for one or two activation rows. Matrix rows are transposed to that order as they are
//   read.
//
//   one of eight activation rows, for more of them. Activations were laid out in that order when they were quantised
//   (Lanes). Four columns of a matrix row at a time are broadcast to all lanes.
//
// Both ways have the same integers and the same order of the sums over groups, so they give the same bits.
//
// int4: weights are unsigned nibbles. A 16-bit lane adds 8 products of pairs over a group, at most 8 · 2 · 15 · 127 <
// 2¹⁵, so a group is summed in 16 bits and widened once.
//
// int8: two such products would overflow 16 bits. With s = Σ (w₀ + x₁)(w₁ + x₀) over pairs of neighbouring columns,
//
//     Σ w x = s − Σ w₀ w₁ − Σ x₀ x₁                                       (Winograd 1968)
//
// needs one 16-bit product for two columns instead of two, and is exact. Σ w₀ w₁ is computed when a matrix row is
// unpacked, Σ x₀ x₁ when the activations are quantised. For one or two activation rows this does not pay; there
// |w| · (sign(w) x) gives the same integers.

typedef __m256i Eight;  // 32 bits, or four bytes, of each of eight rows

constexpr int64_t kEight = 8, kQuads = kQuantGroup / 4;  // a quad: four bytes in a lane

// Scales and offsets [groups] of eight matrix rows.
struct EightRows {
    __m256 *scales, *offsets;
};

static inline const __m128i* sixteen_bytes(const uint8_t* p) { return reinterpret_cast<const __m128i*>(p); }

// Calls use(i, quad) for i from 0 to 7, where `quad` has the bytes at + 4 i to at + 4 i + 3 of eight rows.
template <class Use>
static inline __attribute__((always_inline)) void for_each_quad(const uint8_t* const* rows, int64_t at, const Use& use) {
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

// out[g] = number g of each of eight matrix rows; `from` has `groups` numbers per matrix row, in float16 or float32.
static inline void transpose_numbers(
    const void* from, bool half, int64_t groups, const int64_t* rows, __m256* out) {
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
                for (int i = 0; i < 2; ++i) {  // columns from 4 i on, rows from 4 r on
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
            to[g * kEight + r] =
                half ? F16::one(static_cast<const uint16_t*>(from)[at]) : static_cast<const float*>(from)[at];
        }
}

static inline Eight four_bytes(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
}

// ---- one or two activation rows: a lane per matrix row --------------------------------------------------------------

// acc += Σ w x over group g of eight matrix rows, for M activation rows from b on; dots = Σ q_w q_x.
template <int M>
static inline __attribute__((always_inline)) void add_group(
    __m256* acc, const Eight* dots, const EightRows& w, int64_t g, const Activations& x, int64_t b, bool has_offsets) {
#pragma GCC unroll 2
    for (int m = 0; m < M; ++m) {
        const QuantizedGroup& group = x.groups(b + m)[g];
        const __m256 scale = _mm256_mul_ps(w.scales[g], _mm256_broadcast_ss(&group.scale));
        acc[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[m]), scale, acc[m]);
        if (has_offsets) acc[m] = _mm256_fmadd_ps(w.offsets[g], _mm256_broadcast_ss(&group.sum), acc[m]);
    }
}

// acc += Σ w x over strip s, the bytes [32 s, 32 s + 32) of eight matrix rows: group s and, of int4, group half + s.
template <int M, bool kInt4>
static inline __attribute__((always_inline)) void add_strip(
    __m256* acc, const uint8_t* const* rows, const EightRows& w, int64_t s, int64_t half, const Activations& x,
    int64_t b, bool has_offsets) {
    Eight dots[M], high_dots[M];
    for (int m = 0; m < M; ++m) dots[m] = high_dots[m] = _mm256_setzero_si256();
    for_each_quad(rows, s * kQuantGroup, [&](int64_t i, const Eight& quad) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
            const QuantizedGroup* groups = x.groups(b + m);
            const Eight quad_x = four_bytes(groups[s].bytes + 4 * i);
            if constexpr (kInt4) {
                const Eight high_x = four_bytes(groups[half + s].bytes + 4 * i);
                dots[m] = _mm256_add_epi16(dots[m], _mm256_maddubs_epi16(low_nibbles(quad), quad_x));
                high_dots[m] = _mm256_add_epi16(high_dots[m], _mm256_maddubs_epi16(high_nibbles(quad), high_x));
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

// Scales, offsets and bytes of eight matrix rows from `first` on; row `last` stands in for rows behind it.
static void prepare_eight(const Part& part, int64_t first, int64_t last, const uint8_t** bytes, EightRows& w) {
    int64_t rows[kEight];
    for (int64_t r = 0; r < kEight; ++r) {
        rows[r] = std::min(first + r, last);
        bytes[r] = static_cast<const uint8_t*>(part.data) + rows[r] * part.row_bytes;
    }
    const auto transposed = [&](const void* numbers, __m256* out) {
        const int64_t row_bytes = part.quant_groups * (part.half_scales ? 2 : 4);
        prefetch(static_cast<const char*>(numbers) + (rows[0] + kEight) * row_bytes, kEight * row_bytes);
        transpose_numbers(numbers, part.half_scales, part.quant_groups, rows, out);
    };
    transposed(part.scales, w.scales);
    if (part.offsets)
        transposed(part.offsets, w.offsets);
    else if (part.stored == Stored::int4)
        for (int64_t g = 0; g < part.quant_groups; ++g) w.offsets[g] = _mm256_mul_ps(w.scales[g], _mm256_set1_ps(-8));
}

template <int M, bool kInt4>
static __attribute__((noinline)) void few_part(
    const Part& part, const Activations& x, int64_t begin, int64_t end, const Output& out) {
    const int64_t groups = part.quant_groups, strips = kInt4 ? groups / 2 : groups;
    auto* memory = reinterpret_cast<__m256*>(thread_memory(2 * groups * sizeof(Eight)));
    EightRows w = {memory, memory + groups};
    const bool has_offsets = kInt4 || part.offsets;
    for (int64_t n = begin; n < end; n += kEight) {
        const uint8_t* bytes[kEight];
        prepare_eight(part, n, end - 1, bytes, w);
        __m256 acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm256_setzero_ps();
        for (int64_t s = 0; s < strips; ++s) {
            // Strip by strip, the memory of the next eight matrix rows.
            prefetch(bytes[0] + kEight * (part.row_bytes + s * kQuantGroup), kEight * kQuantGroup);
            add_strip<M, kInt4>(acc, bytes, w, s, strips, x, 0, has_offsets);
        }
        for (int m = 0; m < M; ++m) {
            float y[kEight];
            _mm256_storeu_ps(y, acc[m]);
            out.put(m, n, y, 1, std::min(kEight, end - n));
        }
    }
}

// ---- more activation rows: a lane per activation row ----------------------------------------------------------------

// A matrix row with the groups in the order of Lanes. int4: bytes. int8: 16-bit numbers, first the even columns of a
// group, then the odd ones, and Σ w₀ w₁ of each group in `pairs`.
struct UnpackedRow {
    uint8_t* elements;
    float *scales, *offsets;
    int32_t* pairs;
};

static inline int32_t sum_of(Eight x) {
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(two) + _mm_extract_epi32(two, 1);
}

template <bool kInt4>
static void unpack(const Part& part, int64_t row, float* spare, const UnpackedRow& to) {
    const int64_t groups = part.quant_groups, half = groups / 2, size = part.half_scales ? 2 : 4;
    const auto* bytes = static_cast<const uint8_t*>(part.data) + row * part.row_bytes;
    for (int64_t s = 0; s < (kInt4 ? half : groups); ++s) {
        const Eight both = read_bytes(bytes + s * kQuantGroup);
        auto* at = reinterpret_cast<Eight*>(to.elements + s * 2 * kQuantGroup);
        if constexpr (kInt4) {
            at[0] = low_nibbles(both), at[1] = high_nibbles(both);
        } else {
            at[0] = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8), at[1] = _mm256_srai_epi16(both, 8);
            to.pairs[s] = sum_of(_mm256_madd_epi16(at[0], at[1]));
        }
    }
    const auto numbers = [&](const void* from, float* out) {
        const char* place = static_cast<const char*>(from) + row * groups * size;
        widen_any(place, part.half_scales, groups, kInt4 ? spare : out);
        if constexpr (kInt4)
            for (int64_t s = 0; s < half; ++s) out[2 * s] = spare[s], out[2 * s + 1] = spare[half + s];
    };
    numbers(part.scales, to.scales);
    if (part.offsets)
        numbers(part.offsets, to.offsets);
    else
        for (int64_t g = 0; g < groups; ++g) to.offsets[g] = to.scales[g] * (kInt4 ? -8.0f : 0.0f);
}

// Keeps the compiler from reassociating the sum into a tree, whose leaves would be spilled to memory.
static inline __attribute__((always_inline)) Eight in_this_order(Eight x) {
    asm("" : "+x"(x));
    return x;
}

// sums += Σ w x over the groups [begin, end) of a matrix row, for V times eight activation rows.
template <int V, bool kInt4>
static inline __attribute__((always_inline)) void add_groups(
    __m256* sums, const UnpackedRow& w, const uint8_t* lanes, int64_t lanes_stride, int64_t begin, int64_t end,
    bool has_offsets) {
    constexpr int64_t bytes = kInt4 ? Lanes::kByteGroup : Lanes::kPairGroup;
    __m256 acc[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[v] = sums[v];
    lanes += begin * bytes;
    for (int64_t g = begin; g < end; ++g, lanes += bytes) {
        const uint8_t* quads = w.elements + g * (kInt4 ? 1 : 2) * kQuantGroup;
        const auto read = [&](int v, int64_t at) __attribute__((always_inline)) {
            return read_bytes(lanes + v * lanes_stride + at);
        };
        const auto number = [&](int v, int64_t which) __attribute__((always_inline)) {
            return _mm256_castsi256_ps(read(v, (kInt4 ? 1 : 2) * Lanes::kRows * kQuantGroup + which * 32));
        };
        Eight dots[V];
        if constexpr (kInt4) {
#pragma GCC unroll 8
            for (int64_t i = 0; i < kQuads; ++i) {
                const Eight quad = four_bytes(quads + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    const Eight pairs = _mm256_maddubs_epi16(quad, read(v, 32 * i));
                    dots[v] = i ? in_this_order(_mm256_add_epi16(dots[v], pairs)) : pairs;
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) dots[v] = _mm256_madd_epi16(dots[v], _mm256_set1_epi16(1));
        } else {
            const Eight pairs = _mm256_set1_epi32(w.pairs[g]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) dots[v] = _mm256_sub_epi32(_mm256_castps_si256(number(v, 2)), pairs);
#pragma GCC unroll 8
            for (int64_t i = 0; i < kQuads; ++i) {
                const Eight even = four_bytes(quads + 4 * i), odd = four_bytes(quads + kQuantGroup + 4 * i);
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) {
                    const Eight left = _mm256_add_epi16(even, read(v, 64 * i));
                    const Eight right = _mm256_add_epi16(odd, read(v, 64 * i + 32));
                    dots[v] = in_this_order(_mm256_add_epi32(dots[v], _mm256_madd_epi16(left, right)));
                }
            }
        }
        const __m256 scale = _mm256_broadcast_ss(w.scales + g), offset = _mm256_broadcast_ss(w.offsets + g);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            acc[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[v]), _mm256_mul_ps(scale, number(v, 0)), acc[v]);
            if (has_offsets) acc[v] = _mm256_fmadd_ps(offset, number(v, 1), acc[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] = acc[v];
}

// out[r][i] = in[i · in_stride][r]
static inline void transpose(const __m256* in, int64_t in_stride, __m256* out) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(in[i * in_stride], in[(i + 1) * in_stride]);
        a[i + 1] = _mm256_unpackhi_ps(in[i * in_stride], in[(i + 1) * in_stride]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        out[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        out[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}

constexpr int64_t kPieceBytes = 16 << 10;  // of activations that eight matrix rows meet in turn; they fit the L1 cache

// y for `num_rows` ≤ 8 matrix rows from n on and `count` ≤ 8 V activation rows from b on.
template <int V, bool kInt4>
static __attribute__((noinline)) void lanes_tile(
    const UnpackedRow* rows, int64_t groups, const Activations& x, int64_t b, int64_t count, int64_t n, int64_t num_rows,
    bool has_offsets, const Output& out) {
    const Lanes& lanes = kInt4 ? x.byte_lanes() : x.pair_lanes();
    const int64_t pieces = (groups * V * lanes.group_bytes + kPieceBytes - 1) / kPieceBytes, step = (groups + pieces - 1) / pieces;
    __m256 sums[kEight][V];
    for (auto& row : sums)
        for (__m256& sum : row) sum = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; g += step)
        for (int64_t r = 0; r < num_rows; ++r)
            add_groups<V, kInt4>(
                sums[r], rows[r], lanes.at(b), lanes.stride(), g, std::min(groups, g + step), has_offsets);
    for (int v = 0; v < V; ++v) {
        __m256 y[kEight];
        transpose(&sums[0][v], V, y);
        for (int64_t i = 0; i < kEight && 8 * v + i < count; ++i)
            out.put(b + 8 * v + i, n, reinterpret_cast<const float*>(y + i), 1, num_rows);
    }
}

template <bool kInt4>
static void many_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    const int64_t groups = part.quant_groups, element_vectors = groups * (kInt4 ? 1 : 2), number_vectors = (groups + 7) / 8;
    const int64_t vectors = kEight * (element_vectors + 3 * number_vectors) + number_vectors;
    auto* memory = reinterpret_cast<Eight*>(thread_memory(vectors * sizeof(Eight)));
    auto* spare = reinterpret_cast<float*>(memory);
    UnpackedRow w[kEight];
    memory += number_vectors;
    for (UnpackedRow& row : w) {
        auto* numbers = reinterpret_cast<float*>(memory + element_vectors);
        row = {reinterpret_cast<uint8_t*>(memory), numbers, numbers + 8 * number_vectors,
               reinterpret_cast<int32_t*>(numbers + 16 * number_vectors)};
        memory += element_vectors + 3 * number_vectors;
    }
    const bool has_offsets = kInt4 || part.offsets;
    for (int64_t n = begin; n < end; n += kEight) {
        const int64_t here = std::min(kEight, end - n);
        for (int64_t r = 0; r < here; ++r) unpack<kInt4>(part, n + r, spare, w[r]);
        for (int64_t b = 0; b < batch; b += 32) {
            const int64_t count = std::min<int64_t>(32, batch - b);
            switch ((count + 7) / 8) {
                case 1: lanes_tile<1, kInt4>(w, groups, x, b, count, n, here, has_offsets, out); break;
                case 2: lanes_tile<2, kInt4>(w, groups, x, b, count, n, here, has_offsets, out); break;
                case 3: lanes_tile<3, kInt4>(w, groups, x, b, count, n, here, has_offsets, out); break;
                default: lanes_tile<4, kInt4>(w, groups, x, b, count, n, here, has_offsets, out);
            }
        }
    }
}

template <bool kInt4>
static void eight_lane_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    if (batch > kFewRows) return many_part<kInt4>(part, x, batch, begin, end, out);
    batch == 1 ? few_part<1, kInt4>(part, x, begin, end, out) : few_part<2, kInt4>(part, x, begin, end, out);
}
