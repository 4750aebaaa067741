// Products with quantised matrices, one matrix row at a time, for two instruction sets: plain (every quantised matrix)
// and AVX2 (GGUF's own blocks). A lane has four neighbouring columns; lanes are summed at the end of the row.

constexpr int64_t kBlockRows = 8;  // matrix rows that are prepared together and then meet every activation row

// Floats for one matrix row: scales (eight times each), offsets and unpacked bytes, with room for a whole vector behind
// each.
constexpr int64_t row_floats(int64_t groups) { return groups * 17 + 32; }

constexpr int64_t kStep = 32;  // bytes per vector

// add_dots multiplies unsigned bytes by signed ones. Signed splits weights for it: w x = |w| · (sign(w) x).
#if EMBEDGRAD_ISA == 2
typedef __m256i Bytes;
typedef __m256 Sums;
static inline Bytes read_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline Bytes low_nibbles(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline Bytes high_nibbles(Bytes w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
static inline Sums add_dots(Sums acc, Bytes u, Bytes x, Sums scale) {
    const __m256i pairs = _mm256_maddubs_epi16(u, x);
    const __m256i dots = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, acc);
}
static inline Sums multiply(const float* a, const float* b) { return _mm256_mul_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b)); }
static inline Sums add_product(Sums acc, const float* a, const float* b) {
    return _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), acc);
}
struct Signed {
    Bytes magnitude, sign;
    explicit Signed(Bytes w) : magnitude(_mm256_abs_epi8(w)), sign(w) {}
    Bytes apply_sign(Bytes x) const { return _mm256_sign_epi8(x, sign); }
};
static inline Sums no_sums() { return _mm256_setzero_ps(); }
#else
struct Bytes {
    int8_t element[32];
};
struct Sums {
    float lane[8];
};
static inline Bytes read_bytes(const void* p) {
    Bytes b;
    __builtin_memcpy(&b, p, sizeof b);
    return b;
}
static inline Bytes low_nibbles(Bytes w) {
    for (auto& e : w.element) e = static_cast<int8_t>(static_cast<uint8_t>(e) & 15);
    return w;
}
static inline Bytes high_nibbles(Bytes w) {
    for (auto& e : w.element) e = static_cast<int8_t>(static_cast<uint8_t>(e) >> 4);
    return w;
}
static inline Sums add_dots(Sums acc, const Bytes& u, const Bytes& x, const Sums& scale) {
    for (int i = 0; i < 8; ++i) {
        int32_t dot = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j) dot += static_cast<uint8_t>(u.element[j]) * x.element[j];
        acc.lane[i] += static_cast<float>(dot) * scale.lane[i];
    }
    return acc;
}
static inline Sums multiply(const float* a, const float* b) {
    Sums s;
    for (int i = 0; i < 8; ++i) s.lane[i] = a[i] * b[i];
    return s;
}
static inline Sums add_product(Sums acc, const float* a, const float* b) {
    for (int i = 0; i < 8; ++i) acc.lane[i] += a[i] * b[i];
    return acc;
}
struct Signed {
    Bytes magnitude, sign;
    explicit Signed(const Bytes& w) : magnitude(w), sign(w) {
        for (auto& e : magnitude.element) e = static_cast<int8_t>(e < 0 ? -e : e);  // −128 becomes 128, read as unsigned
    }
    Bytes apply_sign(Bytes x) const {
        for (int i = 0; i < 32; ++i) x.element[i] = static_cast<int8_t>(sign.element[i] < 0 ? -x.element[i] : x.element[i]);
        return x;
    }
};
static inline Sums no_sums() { return Sums{}; }
#endif

// Weights that are unsigned as they are stored, with the interface of Signed.
struct Unsigned {
    Bytes apply_sign(const Bytes& x) const { return x; }
};

// Sums the lanes of each of M accumulators, in the same order for every M.
template <int M>
static inline void totals(const Sums* acc, float* y) {
#if EMBEDGRAD_ISA
    if constexpr (M % 4 == 0) {
        for (int m = 0; m < M; m += 4) {
            const __m256 one = _mm256_hadd_ps(acc[m], acc[m + 1]);
            const __m256 two = _mm256_hadd_ps(acc[m + 2], acc[m + 3]);
            const __m256 four = _mm256_hadd_ps(one, two);
            _mm_storeu_ps(y + m, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
        }
        return;
    }
    for (int m = 0; m < M; ++m) {
        const __m256 one = _mm256_hadd_ps(acc[m], acc[m]), four = _mm256_hadd_ps(one, one);
        y[m] = _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
    }
#else
    for (int m = 0; m < M; ++m) {
        y[m] = 0;
        for (float lane : acc[m].lane) y[m] += lane;
    }
#endif
}

// Matrix rows ready for the products: scales (eight times each) and offsets in float32.
struct PreparedRows {
    const uint8_t* bytes[kBlockRows];
    float* scales[kBlockRows];
    float* offsets[kBlockRows];
    bool has_offsets;
};

static inline void store_eight(float* out, float x) {
    typedef float Eight __attribute__((vector_size(32)));
    const Eight eight = Eight{} + x;
    __builtin_memcpy(out, &eight, sizeof eight);
}

static inline void store_four(float* out, float x) {
    const float four[4] = {x, x, x, x};
    __builtin_memcpy(out, four, sizeof four);
}

// Prepares rows of GGUF's blocks; their bytes are unpacked into `buffer`, behind the scales and offsets.
static void prepare_unpacked(
    const Part& part, int64_t first, int64_t rows, int64_t columns, int64_t groups, float* buffer, PreparedRows& out) {
    const int64_t gguf_groups = columns / kGgufGroup;
    out.has_offsets = part.stored == Stored::q4_k;
    thread_local std::vector<float> spare;
    if (spare.size() < static_cast<size_t>(2 * gguf_groups)) spare.resize(2 * gguf_groups);
    for (int64_t r = 0; r < rows; ++r) {
        auto* bytes = reinterpret_cast<int8_t*>(buffer + groups * 9 + 16);
        float* scales = out.scales[r] = buffer;
        float* offsets = out.offsets[r] = buffer + groups * 8 + 16;
        out.bytes[r] = reinterpret_cast<const uint8_t*>(bytes);
        unpack_row(part, first + r, columns, bytes, spare.data(), spare.data() + gguf_groups);
        for (int64_t g = groups - 16; g < groups; g += VL) store(offsets + g, Vec{});
        for (int64_t g = 0; g < gguf_groups; ++g) store_four(scales + 4 * g, spare[g]);
        for (int64_t g = 0; g < gguf_groups / 2; ++g) offsets[g] = spare[gguf_groups + 2 * g];
        buffer += row_floats(groups);
    }
}

// Prepares rows of an int8 or int4 matrix.
static void prepare(const Part& part, int64_t first, int64_t rows, int64_t groups, float* buffer, PreparedRows& out) {
    const int64_t size = part.half_scales ? 2 : 4;
    const bool minus_eight = part.stored == Stored::int4 && !part.offsets;
    out.has_offsets = part.offsets || minus_eight;
    for (int64_t r = 0; r < rows; ++r) {
        out.bytes[r] = static_cast<const uint8_t*>(part.data) + (first + r) * part.row_bytes;
        float* scales = out.scales[r] = buffer;
        float* offsets = out.offsets[r] = buffer + groups * 8 + 16;
        buffer += row_floats(groups);
        const int64_t at = (first + r) * part.quant_groups * size;
        for (int64_t g = groups - 16; g < groups; g += VL) store(offsets + g, Vec{});
        widen_any(static_cast<const char*>(part.scales) + at, part.half_scales, part.quant_groups, offsets);
        for (int64_t g = 0; g < part.quant_groups; ++g) store_eight(scales + 8 * g, offsets[g]);
        if (part.offsets)
            widen_any(static_cast<const char*>(part.offsets) + at, part.half_scales, part.quant_groups, offsets);
        else if (minus_eight)
            for (int64_t g = 0; g < groups; g += VL) store(offsets + g, load(offsets + g) * -8.0f);
    }
}

constexpr int64_t kUnitStride = Activations::kInterleaved * Activations::kUnitBytes;  // from a row's unit to its next one

// The bytes of column k in units that begin at `units`.
static inline const uint8_t* unit_at(const uint8_t* units, int64_t k) {
    const auto place = static_cast<uint64_t>(k);
    return units + place / 64 * kUnitStride + place % 64;
}

// acc += Σ w x over the kStep columns from k on, for M activation rows. `magnitude` has |w|, `sign` the signs.
template <int M, class Sign>
static inline __attribute__((always_inline)) void add_step(
    Sums* acc, const Bytes& magnitude, const Sign& sign, const float* w_scales, const uint8_t* units, int64_t k) {
    const uint8_t* at = unit_at(units, k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m, at += Activations::kUnitBytes)
        acc[m] = add_dots(
            acc[m], magnitude, sign.apply_sign(read_bytes(at)),
            multiply(w_scales + k / 4, reinterpret_cast<const float*>(at + Activations::kUnit)));
}

// Dot products of M activation rows with one int4 row. Byte j has column j in its low half, and column j of the second
// half of the columns in its high half.
template <int M>
static inline void int4_dots(
    const uint8_t* w, const float* w_scales, int64_t groups, const Activations& x, int64_t b, Sums* sums) {
    const int64_t half = groups / 2 * kQuantGroup;
    const float* high_scales = w_scales + groups / 2 * 8;
    const uint8_t* units = x.units(kSplitUnits, b);
    const uint8_t* high_units = units + x.second_half();
    Sums acc[M];  // a local array, because `sums` may alias other memory and would not stay in registers
    for (int m = 0; m < M; ++m) acc[m] = no_sums();
    const auto step = [&](const Bytes& both, int64_t k) __attribute__((always_inline)) {
        add_step<M>(acc, low_nibbles(both), Unsigned{}, w_scales, units, k);
        add_step<M>(acc, high_nibbles(both), Unsigned{}, high_scales, high_units, k);
    };
    int64_t k = 0;
    for (; k + kStep <= half; k += kStep) step(read_bytes(w + k), k);
    for (int m = 0; m < M; ++m) sums[m] = acc[m];
}

template <int M>
static inline void int8_dots(
    const uint8_t* w, const float* w_scales, int64_t groups, const Activations& x, int64_t b, Sums* sums) {
    const uint8_t* units = x.units(kUnits, b);
    Sums acc[M];
    for (int m = 0; m < M; ++m) acc[m] = no_sums();
    const auto step = [&](const Bytes& both, int64_t k) __attribute__((always_inline)) {
        const Signed weights(both);
        add_step<M>(acc, weights.magnitude, weights, w_scales, units, k);
    };
    const int64_t end = groups * kQuantGroup;
    int64_t k = 0;
    for (; k + kStep <= end; k += kStep) step(read_bytes(w + k), k);
    for (int m = 0; m < M; ++m) sums[m] = acc[m];
}

template <int M>
static inline void block_dots(
    const Part& part, const PreparedRows& w, int64_t rows, const Activations& x, int64_t b, int64_t n, const Output& out) {
    const int64_t groups = part.stored <= Stored::int4 ? part.quant_groups : x.columns() / kQuantGroup;
    const float* sums = x.sums(b);
    float y[kBlockRows][M];
    for (int64_t r = 0; r < rows; ++r) {
        Sums acc[M];
        if (part.stored == Stored::int4)
            int4_dots<M>(w.bytes[r], w.scales[r], part.quant_groups, x, b, acc);
        else
            int8_dots<M>(w.bytes[r], w.scales[r], groups, x, b, acc);
        if (w.has_offsets)
            for (int64_t g = 0; g < groups; g += kStep / 4)
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
                    acc[m] = add_product(acc[m], w.offsets[r] + g, sums + m * x.sums_stride() + g);
        totals<M>(acc, y[r]);
    }
    for (int m = 0; m < M; ++m) out.put(b + m, n, &y[0][m], M, rows);
}

static void row_by_row_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    const int64_t groups = x.sums_stride();
    auto* buffer = reinterpret_cast<float*>(thread_memory(kBlockRows * row_floats(groups) * sizeof(float)));
    for (int64_t n = begin; n < end; n += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - n);
        PreparedRows w;
        if (part.stored <= Stored::int4)
            prepare(part, n, count, groups, buffer, w);
        else
            prepare_unpacked(part, n, count, x.columns(), groups, buffer, w);
        int64_t b = 0;
        for (; b + 4 <= batch; b += 4) block_dots<4>(part, w, count, x, b, n, out);
        if (b + 2 <= batch) block_dots<2>(part, w, count, x, b, n, out), b += 2;
        if (b < batch) block_dots<1>(part, w, count, x, b, n, out);
    }
}
