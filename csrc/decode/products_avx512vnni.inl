// Products with quantised matrices for AVX-512 with VNNI. No sum runs across lanes: a 32-bit lane has four columns of
// one of sixteen matrix rows, and the same four columns of an activation row are broadcast to all lanes. For one or two
// activation rows, matrix rows are transposed to that order as they are multiplied; for more, into a tile that all
// activation rows meet. Both ways have the same integers and the same order of the sums over groups, so they give the
// same bits.
//
// VNNI multiplies unsigned bytes by signed ones. int4 weights are unsigned nibbles. To other weights 128 is added,
// which the sums correct by starting at −128 Σ x (QuantizedGroup::excess).

typedef __m512i Sixteen;  // four bytes of each of sixteen matrix rows

constexpr int64_t kSixteen = 16, kQuads = kQuantGroup / 4;  // a quad: four bytes in a lane

// GGUF's blocks are unpacked to bytes, with a scale for every 16 columns.
enum class Kind { int4, int8, unpacked };

constexpr Kind kind(Stored stored) {
    return stored == Stored::int4 ? Kind::int4 : stored == Stored::int8 ? Kind::int8 : Kind::unpacked;
}

// Sixteen matrix rows: scales [groups], or [2 groups] where 16 columns share a scale; offsets alike, or null; quads
// [columns / 4].
struct Tile {
    __m512 *scales, *offsets;
    Sixteen* quads;
};

static inline __m256i half_vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Calls use(i, quad) for i from 0 to 7 in some order, where `quad` has the bytes at + 4 i to at + 4 i + 3 of sixteen
// rows.
template <class Use>
static inline __attribute__((always_inline)) void for_each_quad(
    const uint8_t* const* rows, int64_t at, const Use& use) {
    // Of eight rows: out[i] has quad i in its even 128-bit quarters and quad 4 + i in its odd ones.
    const auto transpose_eight = [&](const uint8_t* const* eight, Sixteen* out) __attribute__((always_inline)) {
        Sixteen two[4];
        for (int r = 0; r < 4; ++r)
            two[r] = _mm512_inserti64x4(_mm512_castsi256_si512(half_vector(eight[r] + at)), half_vector(eight[r + 4] + at), 1);
        const Sixteen a = _mm512_unpacklo_epi32(two[0], two[1]), b = _mm512_unpackhi_epi32(two[0], two[1]);
        const Sixteen c = _mm512_unpacklo_epi32(two[2], two[3]), d = _mm512_unpackhi_epi32(two[2], two[3]);
        out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
        out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
    };
    Sixteen low[4], high[4];
    transpose_eight(rows, low);
    transpose_eight(rows + 8, high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        use(i, _mm512_shuffle_i32x4(low[i], high[i], 0x88));
        use(4 + i, _mm512_shuffle_i32x4(low[i], high[i], 0xdd));
    }
}

// Widens the float16 in the lower half of each lane.
static inline __m512 lower_halves(Sixteen x) { return _mm512_maskz_cvtph_ps(0xffff, _mm512_cvtepi32_epi16(x)); }

// out[g] = number g of each of sixteen matrix rows, which have `count` numbers each, in float16 or float32.
static inline void transpose_numbers(const uint8_t* const* rows, bool half, int64_t count, __m512* out) {
    const int64_t step = half ? 16 : 8;
    if (count < step) {
        auto* to = reinterpret_cast<float*>(out);
        for (int64_t r = 0; r < kSixteen; ++r)
            for (int64_t g = 0; g < count; ++g)
                widen_any(rows[r] + g * (half ? 2 : 4), half, 1, to + g * kSixteen + r);
        return;
    }
    for (int64_t from = 0; from < count; from += step) {
        const int64_t g = std::min(from, count - step);
        if (half)
            for_each_quad(rows, 2 * g, [&](int64_t i, const Sixteen& pairs) __attribute__((always_inline)) {
                out[g + 2 * i] = lower_halves(pairs);
                out[g + 2 * i + 1] = lower_halves(_mm512_srli_epi32(pairs, 16));
            });
        else
            for_each_quad(rows, 4 * g, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
                out[g + i] = _mm512_castsi512_ps(quad);
            });
    }
}

static inline Sixteen four_bytes(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

static inline Sixteen low_nibbles(Sixteen w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline Sixteen high_nibbles(Sixteen w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
static inline Sixteen plus_128(Sixteen w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }

// acc + scale_w · scale_x · dots and acc + offset_w · scale_x · Σ q_x; x: the activations' group.
static inline __m512 add_scaled(__m512 acc, Sixteen dots, __m512 scale, const QuantizedGroup& x) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(scale, _mm512_set1_ps(x.scale)), acc);
}
static inline __m512 add_offset(__m512 acc, __m512 offset, const QuantizedGroup& x) {
    return _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum), acc);
}

// Stores y for `count` matrix rows from n on and M activation rows from b on.
template <int M>
static inline void put(const __m512* acc, int64_t b, int64_t n, int64_t count, const Output& out) {
    for (int m = 0; m < M; ++m) {
        float y[kSixteen];
        _mm512_storeu_ps(y, acc[m]);
        out.put(b + m, n, y, 1, count);
    }
}

// ---- sixteen matrix rows --------------------------------------------------------------------------------------------

// Where sixteen matrix rows from `first` on begin; row `last` stands in for rows behind it.
static void find_rows(const void* data, int64_t row_bytes, int64_t first, int64_t last, const uint8_t** rows) {
    for (int64_t r = 0; r < kSixteen; ++r)
        rows[r] = static_cast<const uint8_t*>(data) + std::min(first + r, last) * row_bytes;
}

static void transpose_scales(const Part& part, int64_t first, int64_t last, Tile& to) {
    const auto transposed = [&](const void* numbers, __m512* out) {
        const uint8_t* rows[kSixteen];
        const int64_t row_bytes = part.quant_groups * (part.half_scales ? 2 : 4);
        find_rows(numbers, row_bytes, first, last, rows);
        prefetch(rows[0] + kSixteen * row_bytes, kSixteen * row_bytes);
        transpose_numbers(rows, part.half_scales, part.quant_groups, out);
    };
    transposed(part.scales, to.scales);
    if (!to.offsets) return;
    if (part.offsets) return transposed(part.offsets, to.offsets);
    for (int64_t g = 0; g < part.quant_groups; ++g)  // int4 without offsets: w = scale·(q − 8)
        to.offsets[g] = _mm512_mul_ps(to.scales[g], _mm512_set1_ps(-8));
}

// Prefetches part s of the memory of the next sixteen matrix rows.
static inline __attribute__((always_inline)) void prefetch_strip(const uint8_t* const* rows, int64_t row_bytes, int64_t s) {
    prefetch(rows[0] + kSixteen * (row_bytes + s * kQuantGroup), kSixteen * kQuantGroup);
}

// Bytes of an unpacked matrix row: the elements, and a scale and an offset for every 16 of them.
constexpr int64_t unpacked_bytes(int64_t groups) {
    return groups * (kQuantGroup + 2 * 2 * static_cast<int64_t>(sizeof(float)));
}

// Fills the tile with the matrix rows from `first` on; `spare` has room for sixteen unpacked rows.
template <Kind K>
static void fill(const Part& part, int64_t first, int64_t last, int64_t groups, uint8_t* spare, Tile& to) {
    const uint8_t* rows[kSixteen];
    if constexpr (K == Kind::unpacked) {
        const int64_t columns = groups * kQuantGroup, numbers = 2 * groups;
        const uint8_t *scales[kSixteen], *offsets[kSixteen];
        for (int64_t r = 0; r < kSixteen; ++r, spare += unpacked_bytes(groups)) {
            auto* row = reinterpret_cast<float*>(spare + columns);
            unpack_row(part, std::min(first + r, last), columns, reinterpret_cast<int8_t*>(spare), row, row + numbers);
            rows[r] = spare;
            scales[r] = reinterpret_cast<const uint8_t*>(row);
            offsets[r] = reinterpret_cast<const uint8_t*>(row + numbers);
        }
        transpose_numbers(scales, false, numbers, to.scales);
        if (to.offsets) transpose_numbers(offsets, false, numbers, to.offsets);
    } else {
        transpose_scales(part, first, last, to);
        find_rows(part.data, part.row_bytes, first, last, rows);
    }
    if constexpr (K == Kind::int4) {
        for (int64_t s = 0; s < groups / 2; ++s) {
            prefetch_strip(rows, part.row_bytes, s);
            Sixteen *low = to.quads + s * kQuads, *high = low + groups / 2 * kQuads;
            for_each_quad(rows, s * kQuantGroup, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
                low[i] = low_nibbles(quad), high[i] = high_nibbles(quad);
            });
        }
    } else {
        for (int64_t g = 0; g < groups; ++g) {
            if constexpr (K == Kind::int8) prefetch_strip(rows, part.row_bytes, g);
            for_each_quad(rows, g * kQuantGroup, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
                to.quads[g * kQuads + i] = plus_128(quad);
            });
        }
    }
}

// ---- many activation rows -------------------------------------------------------------------------------------------

// acc += Σ w x over group g, for M activation rows.
template <int M, Kind K, bool kOffsets>
static inline __attribute__((always_inline)) void add_group(
    __m512* acc, const Tile& w, int64_t g, const QuantizedGroup* const* x) {
    constexpr int kSums = K == Kind::int4 ? 1 : 2;  // one sum over 32 columns, or two over 16
    Sixteen dots[kSums][M];
    for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
            dots[s][m] = K == Kind::int4 ? _mm512_setzero_si512() : _mm512_set1_epi32(x[m][g].excess[s]);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kQuads; ++i) {
        const Sixteen quad = w.quads[g * kQuads + i];
        Sixteen* sums = dots[i * kSums / kQuads];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[m] = _mm512_dpbusd_epi32(sums[m], quad, four_bytes(x[m][g].bytes + 4 * i));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        if constexpr (K == Kind::int4) acc[m] = add_scaled(acc[m], dots[0][m], w.scales[g], x[m][g]);
        if constexpr (K == Kind::int8)
            acc[m] = add_scaled(acc[m], _mm512_add_epi32(dots[0][m], dots[1][m]), w.scales[g], x[m][g]);
        if constexpr (K == Kind::unpacked)
            for (int s = 0; s < 2; ++s) acc[m] = add_scaled(acc[m], dots[s][m], w.scales[2 * g + s], x[m][g]);
        if constexpr (kOffsets) acc[m] = add_offset(acc[m], w.offsets[K == Kind::unpacked ? 2 * g : g], x[m][g]);
    }
}

template <int M, Kind K, bool kOffsets>
static __attribute__((noinline)) void tile_rows(
    const Tile& w, int64_t groups, const Activations& x, int64_t b, int64_t n, int64_t count, const Output& out) {
    const QuantizedGroup* rows[M];
    __m512 acc[M];
    for (int m = 0; m < M; ++m) rows[m] = x.groups(b + m), acc[m] = _mm512_setzero_ps();
    if constexpr (K == Kind::int4) {
        for (int64_t s = 0; s < groups / 2; ++s) {
            add_group<M, K, kOffsets>(acc, w, s, rows);
            add_group<M, K, kOffsets>(acc, w, groups / 2 + s, rows);
        }
    } else {
        for (int64_t g = 0; g < groups; ++g) add_group<M, K, kOffsets>(acc, w, g, rows);
    }
    put<M>(acc, b, n, count, out);
}

template <Kind K, bool kOffsets>
static void many_part(
    const Part& part, int64_t groups, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    const int64_t numbers = groups * (K == Kind::unpacked ? 2 : 1);
    const int64_t vectors = groups * kQuads + numbers * (kOffsets ? 2 : 1);
    const int64_t spare = K == Kind::unpacked ? kSixteen * unpacked_bytes(groups) : 0;
    auto* memory = reinterpret_cast<__m512*>(thread_memory(vectors * sizeof(__m512) + spare));
    Tile w = {memory, kOffsets ? memory + numbers : nullptr,
              reinterpret_cast<Sixteen*>(memory + numbers * (kOffsets ? 2 : 1))};
    for (int64_t n = begin; n < end; n += kSixteen) {
        const int64_t count = std::min(kSixteen, end - n);
        fill<K>(part, n, end - 1, groups, reinterpret_cast<uint8_t*>(memory + vectors), w);
        int64_t b = 0;
        for (; b + 8 <= batch; b += 8) tile_rows<8, K, kOffsets>(w, groups, x, b, n, count, out);
        if (b + 4 <= batch) tile_rows<4, K, kOffsets>(w, groups, x, b, n, count, out), b += 4;
        if (b + 2 <= batch) tile_rows<2, K, kOffsets>(w, groups, x, b, n, count, out), b += 2;
        if (b < batch) tile_rows<1, K, kOffsets>(w, groups, x, b, n, count, out);
    }
}

// ---- one or two activation rows -------------------------------------------------------------------------------------

// acc += Σ w x over strip s, the bytes [32 s, 32 s + 32) of the matrix rows: group s and, of int4, group half + s.
template <int M, Kind K, bool kOffsets>
static inline __attribute__((always_inline)) void add_strip(
    __m512* acc, const uint8_t* const* rows, const Tile& w, int64_t s, int64_t half, const Activations& x) {
    const QuantizedGroup *groups[M], *high_groups[M];
    Sixteen dots[M], high_dots[M];
    for (int m = 0; m < M; ++m) {
        groups[m] = x.groups(m) + s, high_groups[m] = groups[m] + half;
        const int32_t excess = groups[m]->excess[0] + groups[m]->excess[1];
        dots[m] = K == Kind::int4 ? _mm512_setzero_si512() : _mm512_set1_epi32(excess);
        high_dots[m] = _mm512_setzero_si512();
    }
    for_each_quad(rows, s * kQuantGroup, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
            const Sixteen unsigned_w = K == Kind::int4 ? low_nibbles(quad) : plus_128(quad);
            dots[m] = _mm512_dpbusd_epi32(dots[m], unsigned_w, four_bytes(groups[m]->bytes + 4 * i));
            if constexpr (K == Kind::int4) {
                const Sixteen high_x = four_bytes(high_groups[m]->bytes + 4 * i);
                high_dots[m] = _mm512_dpbusd_epi32(high_dots[m], high_nibbles(quad), high_x);
            }
        }
    });
    for (int m = 0; m < M; ++m) {
        acc[m] = add_scaled(acc[m], dots[m], w.scales[s], *groups[m]);
        if constexpr (kOffsets) acc[m] = add_offset(acc[m], w.offsets[s], *groups[m]);
        if constexpr (K == Kind::int4) {
            acc[m] = add_scaled(acc[m], high_dots[m], w.scales[half + s], *high_groups[m]);
            acc[m] = add_offset(acc[m], w.offsets[half + s], *high_groups[m]);
        }
    }
}

template <int M, Kind K, bool kOffsets>
static __attribute__((noinline)) void few_part(
    const Part& part, const Activations& x, int64_t begin, int64_t end, const Output& out) {
    const int64_t groups = part.quant_groups, strips = K == Kind::int4 ? groups / 2 : groups;
    auto* memory = reinterpret_cast<__m512*>(thread_memory(2 * groups * sizeof(__m512)));
    Tile w = {memory, kOffsets ? memory + groups : nullptr, nullptr};
    for (int64_t n = begin; n < end; n += kSixteen) {
        const uint8_t* rows[kSixteen];
        find_rows(part.data, part.row_bytes, n, end - 1, rows);
        transpose_scales(part, n, end - 1, w);
        __m512 acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
        for (int64_t s = 0; s < strips; ++s) {
            prefetch_strip(rows, part.row_bytes, s);
            add_strip<M, K, kOffsets>(acc, rows, w, s, strips, x);
        }
        put<M>(acc, 0, n, std::min(kSixteen, end - n), out);
    }
}

template <Kind K, bool kOffsets>
static void kind_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    if constexpr (K != Kind::unpacked) {
        if (batch == 1) return few_part<1, K, kOffsets>(part, x, begin, end, out);
        if (batch == 2) return few_part<2, K, kOffsets>(part, x, begin, end, out);
    }
    const int64_t groups = K == Kind::unpacked ? x.columns() / kQuantGroup : part.quant_groups;
    many_part<K, kOffsets>(part, groups, x, batch, begin, end, out);
}

static void sixteen_lane_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    switch (kind(part.stored)) {
        case Kind::int4: return kind_part<Kind::int4, true>(part, x, batch, begin, end, out);
        case Kind::int8:
            return part.offsets ? kind_part<Kind::int8, true>(part, x, batch, begin, end, out)
                                : kind_part<Kind::int8, false>(part, x, batch, begin, end, out);
        case Kind::unpacked:
            return part.stored == Stored::q4_k ? kind_part<Kind::unpacked, true>(part, x, batch, begin, end, out)
                                               : kind_part<Kind::unpacked, false>(part, x, batch, begin, end, out);
    }
}
