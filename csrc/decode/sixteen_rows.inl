// Products with matrices in blocks for AVX-512 with VNNI, in which no sum across lanes is left: a lane of 32 bits has four
// columns of one of sixteen rows of the matrix, and of a row of activations these four columns go to all lanes. The rows of
// the matrix are brought into that order on the way: for a row or two of activations just as they are multiplied, for more
// into a tile that all rows of activations meet. Integers and the order of the sums over groups are the same either way,
// and so are the bits of the result.
//
// The instruction multiplies unsigned bytes by signed ones. int4 is unsigned as it is stored; to other weights 128 is added,
// which the sums make up for by beginning at −128 Σ x (GroupOfBytes::excess).

typedef __m512i Sixteen;  // four bytes of each of sixteen rows

constexpr int64_t kSixteenRows = 16, kQuads = kGroup / 4;

// What a matrix's blocks are to these products: unpacked ones are GGUF's, in bytes, with a scale for every 16 columns.
enum class Kind { int4, int8, unpacked };

constexpr Kind kind(Stored stored) {
    return stored == Stored::int4 ? Kind::int4 : stored == Stored::int8 ? Kind::int8 : Kind::unpacked;
}

// Sixteen rows: scales [groups] or, where 16 columns share one, [2 groups]; offsets the same, or null; quads [columns / 4].
struct Tile {
    __m512 *scales, *offsets;
    Sixteen* quads;
};

static inline __m256i half_vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// use(i, quad) with the bytes at + 4 i to at + 4 i + 3 of sixteen rows, for i from 0 to 7 in some order.
template <class Use>
static inline __attribute__((always_inline)) void order_rows(const uint8_t* const* rows, int64_t at, const Use& use) {
    // Of eight rows: out[i] has the quads i in its even quarters and 4 + i in its odd ones.
    const auto order_eight = [&](const uint8_t* const* eight, Sixteen* out) __attribute__((always_inline)) {
        Sixteen two[4];
        for (int r = 0; r < 4; ++r)
            two[r] = _mm512_inserti64x4(_mm512_castsi256_si512(half_vector(eight[r] + at)), half_vector(eight[r + 4] + at), 1);
        const Sixteen a = _mm512_unpacklo_epi32(two[0], two[1]), b = _mm512_unpackhi_epi32(two[0], two[1]);
        const Sixteen c = _mm512_unpacklo_epi32(two[2], two[3]), d = _mm512_unpackhi_epi32(two[2], two[3]);
        out[0] = _mm512_unpacklo_epi64(a, c), out[1] = _mm512_unpackhi_epi64(a, c);
        out[2] = _mm512_unpacklo_epi64(b, d), out[3] = _mm512_unpackhi_epi64(b, d);
    };
    Sixteen low[4], high[4];
    order_eight(rows, low);
    order_eight(rows + 8, high);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        use(i, _mm512_shuffle_i32x4(low[i], high[i], 0x88));
        use(4 + i, _mm512_shuffle_i32x4(low[i], high[i], 0xdd));
    }
}

// The float16 in the lower half of each lane.
static inline __m512 lower_halves(Sixteen x) { return _mm512_maskz_cvtph_ps(0xffff, _mm512_cvtepi32_epi16(x)); }

// Numbers [count] of sixteen rows, in float16 or float32: out[g] has the g-th of each.
static inline void order_numbers(const uint8_t* const* rows, bool half, int64_t count, __m512* out) {
    const int64_t together = half ? 16 : 8;
    if (count < together) {
        auto* to = reinterpret_cast<float*>(out);
        for (int64_t r = 0; r < kSixteenRows; ++r)
            for (int64_t g = 0; g < count; ++g) widen_any(rows[r] + g * (half ? 2 : 4), half, 1, to + g * kSixteenRows + r);
        return;
    }
    for (int64_t from = 0; from < count; from += together) {
        const int64_t g = std::min(from, count - together);
        if (half)
            order_rows(rows, 2 * g, [&](int64_t i, const Sixteen& pairs) __attribute__((always_inline)) {
                out[g + 2 * i] = lower_halves(pairs);
                out[g + 2 * i + 1] = lower_halves(_mm512_srli_epi32(pairs, 16));
            });
        else
            order_rows(rows, 4 * g, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
                out[g + i] = _mm512_castsi512_ps(quad);
            });
    }
}

static inline Sixteen four_bytes(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

static inline Sixteen low_halves(Sixteen w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline Sixteen high_halves(Sixteen w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
static inline Sixteen plus_128(Sixteen w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }

// acc + scale · dots, and scale and Σ x of the activations' group.
static inline __m512 add_scaled(__m512 acc, Sixteen dots, __m512 scale, const GroupOfBytes& x) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(scale, _mm512_set1_ps(x.scale)), acc);
}
static inline __m512 add_offset(__m512 acc, __m512 offset, const GroupOfBytes& x) {
    return _mm512_fmadd_ps(offset, _mm512_set1_ps(x.sum), acc);
}

// y of `count` rows of the matrix from n on, for M rows of activations from b on.
template <int M>
static inline void put(const __m512* acc, int64_t b, int64_t n, int64_t count, const Output& out) {
    for (int m = 0; m < M; ++m) {
        float y[kSixteenRows];
        _mm512_storeu_ps(y, acc[m]);
        out.put(b + m, n, y, 1, count);
    }
}

// ---- sixteen rows of the matrix -------------------------------------------------------------------------------------

// Places of the rows from `first` on. Rows behind `last` are row `last` again.
static void find_rows(const void* data, int64_t row_bytes, int64_t first, int64_t last, const uint8_t** rows) {
    for (int64_t r = 0; r < kSixteenRows; ++r)
        rows[r] = static_cast<const uint8_t*>(data) + std::min(first + r, last) * row_bytes;
}

static void order_scales(const Part& part, int64_t first, int64_t last, Tile& to) {
    const auto order = [&](const void* numbers, __m512* out) {
        const uint8_t* rows[kSixteenRows];
        const int64_t row_bytes = part.groups * (part.half_scales ? 2 : 4);
        find_rows(numbers, row_bytes, first, last, rows);
        fetch(rows[0] + kSixteenRows * row_bytes, kSixteenRows * row_bytes);
        order_numbers(rows, part.half_scales, part.groups, out);
    };
    order(part.scales, to.scales);
    if (!to.offsets) return;
    if (part.offsets) return order(part.offsets, to.offsets);
    for (int64_t g = 0; g < part.groups; ++g)  // of int4, which stands for q − 8
        to.offsets[g] = _mm512_mul_ps(to.scales[g], _mm512_set1_ps(-8));
}

// Asks for a strip's share of the sixteen rows behind these.
static inline __attribute__((always_inline)) void fetch_strip(const uint8_t* const* rows, int64_t row_bytes, int64_t s) {
    fetch(rows[0] + kSixteenRows * (row_bytes + s * kGroup), kSixteenRows * kGroup);
}

// Of a row that unpack_row writes: bytes, and a scale and an offset for every 16 of them.
constexpr int64_t unpacked_bytes(int64_t groups) { return groups * (kGroup + 2 * 2 * static_cast<int64_t>(sizeof(float))); }

// The tile of the rows from `first` on; `spare` has room for sixteen unpacked rows.
template <Kind K>
static void fill(const Part& part, int64_t first, int64_t last, int64_t groups, uint8_t* spare, Tile& to) {
    const uint8_t* rows[kSixteenRows];
    if constexpr (K == Kind::unpacked) {
        const int64_t columns = groups * kGroup, numbers = 2 * groups;
        const uint8_t *scales[kSixteenRows], *offsets[kSixteenRows];
        for (int64_t r = 0; r < kSixteenRows; ++r, spare += unpacked_bytes(groups)) {
            auto* row = reinterpret_cast<float*>(spare + columns);
            unpack_row(part, std::min(first + r, last), columns, reinterpret_cast<int8_t*>(spare), row, row + numbers);
            rows[r] = spare;
            scales[r] = reinterpret_cast<const uint8_t*>(row), offsets[r] = reinterpret_cast<const uint8_t*>(row + numbers);
        }
        order_numbers(scales, false, numbers, to.scales);
        if (to.offsets) order_numbers(offsets, false, numbers, to.offsets);
    } else {
        order_scales(part, first, last, to);
        find_rows(part.data, part.row_bytes, first, last, rows);
    }
    if constexpr (K == Kind::int4) {
        for (int64_t s = 0; s < groups / 2; ++s) {
            fetch_strip(rows, part.row_bytes, s);
            Sixteen *low = to.quads + s * kQuads, *high = low + groups / 2 * kQuads;
            order_rows(rows, s * kGroup, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
                low[i] = low_halves(quad), high[i] = high_halves(quad);
            });
        }
    } else {
        for (int64_t g = 0; g < groups; ++g) {
            if constexpr (K == Kind::int8) fetch_strip(rows, part.row_bytes, g);
            order_rows(rows, g * kGroup, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
                to.quads[g * kQuads + i] = plus_128(quad);
            });
        }
    }
}

// ---- many rows of activations ---------------------------------------------------------------------------------------

// acc += Σ w x over group g, for M rows of activations.
template <int M, Kind K, bool kOffsets>
static inline __attribute__((always_inline)) void add_group(
    __m512* acc, const Tile& w, int64_t g, const GroupOfBytes* const* x) {
    constexpr int kSums = K == Kind::int4 ? 1 : 2;  // over 32 columns or twice 16
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
    const GroupOfBytes* rows[M];
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
    const Part& part, int64_t groups, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out) {
    const int64_t numbers = groups * (K == Kind::unpacked ? 2 : 1);
    const int64_t vectors = groups * kQuads + numbers * (kOffsets ? 2 : 1);
    const int64_t spare = K == Kind::unpacked ? kSixteenRows * unpacked_bytes(groups) : 0;
    auto* memory = reinterpret_cast<__m512*>(thread_memory(vectors * sizeof(__m512) + spare));
    Tile w = {memory, kOffsets ? memory + numbers : nullptr,
              reinterpret_cast<Sixteen*>(memory + numbers * (kOffsets ? 2 : 1))};
    for (int64_t n = begin; n < end; n += kSixteenRows) {
        const int64_t count = std::min(kSixteenRows, end - n);
        fill<K>(part, n, end - 1, groups, reinterpret_cast<uint8_t*>(memory + vectors), w);
        int64_t b = 0;
        for (; b + 8 <= rows; b += 8) tile_rows<8, K, kOffsets>(w, groups, x, b, n, count, out);
        if (b + 4 <= rows) tile_rows<4, K, kOffsets>(w, groups, x, b, n, count, out), b += 4;
        if (b + 2 <= rows) tile_rows<2, K, kOffsets>(w, groups, x, b, n, count, out), b += 2;
        if (b < rows) tile_rows<1, K, kOffsets>(w, groups, x, b, n, count, out);
    }
}

// ---- a row or two of them -------------------------------------------------------------------------------------------

// acc += Σ w x over the 32 stored bytes of strip s: group s and, of int4, group half + s.
template <int M, Kind K, bool kOffsets>
static inline __attribute__((always_inline)) void add_strip(
    __m512* acc, const uint8_t* const* rows, const Tile& w, int64_t s, int64_t half, const Activations& x) {
    const GroupOfBytes *groups[M], *high_groups[M];
    Sixteen dots[M], high_dots[M];
    for (int m = 0; m < M; ++m) {
        groups[m] = x.groups(m) + s, high_groups[m] = groups[m] + half;
        dots[m] = K == Kind::int4 ? _mm512_setzero_si512() : _mm512_set1_epi32(groups[m]->excess[0] + groups[m]->excess[1]);
        high_dots[m] = _mm512_setzero_si512();
    }
    order_rows(rows, s * kGroup, [&](int64_t i, const Sixteen& quad) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m) {
            const Sixteen quad_x = four_bytes(groups[m]->bytes + 4 * i);
            dots[m] = _mm512_dpbusd_epi32(dots[m], K == Kind::int4 ? low_halves(quad) : plus_128(quad), quad_x);
            if constexpr (K == Kind::int4)
                high_dots[m] = _mm512_dpbusd_epi32(high_dots[m], high_halves(quad), four_bytes(high_groups[m]->bytes + 4 * i));
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
    const int64_t groups = part.groups, strips = K == Kind::int4 ? groups / 2 : groups;
    auto* memory = reinterpret_cast<__m512*>(thread_memory(2 * groups * sizeof(__m512)));
    Tile w = {memory, kOffsets ? memory + groups : nullptr, nullptr};
    for (int64_t n = begin; n < end; n += kSixteenRows) {
        const uint8_t* rows[kSixteenRows];
        find_rows(part.data, part.row_bytes, n, end - 1, rows);
        order_scales(part, n, end - 1, w);
        __m512 acc[M];
        for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
        for (int64_t s = 0; s < strips; ++s) {
            fetch_strip(rows, part.row_bytes, s);
            add_strip<M, K, kOffsets>(acc, rows, w, s, strips, x);
        }
        put<M>(acc, 0, n, std::min(kSixteenRows, end - n), out);
    }
}

template <Kind K, bool kOffsets>
static void sixteen_rows(const Part& part, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out) {
    if constexpr (K != Kind::unpacked) {
        if (rows == 1) return few_part<1, K, kOffsets>(part, x, begin, end, out);
        if (rows == 2) return few_part<2, K, kOffsets>(part, x, begin, end, out);
    }
    many_part<K, kOffsets>(part, K == Kind::unpacked ? x.columns() / kGroup : part.groups, x, rows, begin, end, out);
}

static void sixteen_rows_part(const Part& part, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out) {
    switch (kind(part.stored)) {
        case Kind::int4: return sixteen_rows<Kind::int4, true>(part, x, rows, begin, end, out);
        case Kind::int8:
            return part.offsets ? sixteen_rows<Kind::int8, true>(part, x, rows, begin, end, out)
                                : sixteen_rows<Kind::int8, false>(part, x, rows, begin, end, out);
        case Kind::unpacked:
            return part.stored == Stored::q4_k ? sixteen_rows<Kind::unpacked, true>(part, x, rows, begin, end, out)
                                               : sixteen_rows<Kind::unpacked, false>(part, x, rows, begin, end, out);
    }
}
