// Products with a few rows for one instruction set; see linear.h.

// ---- numbers in 16 bits ---------------------------------------------------------------------------------------------

static inline float from_half(uint16_t h) {
    const uint32_t sign = uint32_t{h & 0x8000u} << 16, rest = h & 0x7fffu;
    uint32_t bits;
    if (rest >= 0x7c00u) {
        bits = 0x7f800000u | (rest & 0x3ffu) << 13;
    } else if (rest >= 0x400u) {
        bits = (rest << 13) + 0x38000000u;
    } else {  // subnormal: rest · 2⁻²⁴
        const float small = static_cast<float>(rest) * 5.9604644775390625e-8f;
        __builtin_memcpy(&bits, &small, 4);
    }
    bits |= sign;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

static inline float from_bf16(uint16_t b) {
    const uint32_t bits = uint32_t{b} << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

struct F32 {
    typedef float Element;
    static Vec read(const float* p) { return load(p); }
    static float one(float x) { return x; }
};

struct Bf16 {
    typedef uint16_t Element;
    static Vec read(const uint16_t* p) {
        typedef uint16_t Narrow __attribute__((vector_size(VL * 2)));
        typedef uint32_t Wide __attribute__((vector_size(VL * 4)));
        Narrow narrow;
        __builtin_memcpy(&narrow, p, sizeof narrow);
        const Wide bits = __builtin_convertvector(narrow, Wide) << 16;
        Vec result;
        __builtin_memcpy(&result, &bits, sizeof result);
        return result;
    }
    static float one(uint16_t x) { return from_bf16(x); }
};

struct F16 {
    typedef uint16_t Element;
    static Vec read(const uint16_t* p) {
#if EMBEDGRAD_ISA == 512
        return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif EMBEDGRAD_ISA == 2
        return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
        Vec result;
        for (int i = 0; i < VL; ++i) result[i] = from_half(p[i]);
        return result;
#endif
    }
    static float one(uint16_t x) { return from_half(x); }
};

template <class Format>
static inline void widen(const void* from, int64_t n, float* out) {
    const auto* p = static_cast<const typename Format::Element*>(from);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(out + i, Format::read(p + i));
    for (; i < n; ++i) out[i] = Format::one(p[i]);
}

static inline void widen_any(const void* from, bool half, int64_t n, float* out) {
    half ? widen<F16>(from, n, out) : widen<F32>(from, n, out);
}

// ---- matrices in float types ----------------------------------------------------------------------------------------

struct Output {
    const int32_t* target;
    float* y;
    int64_t row;
    const float* bias;  // of the part's first row, or null
    bool add;

    // The columns [n, n + count) of activation b; the values stand `step` apart.
    void put(int64_t b, int64_t n, const float* values, int64_t step, int64_t count) const {
        float* place = y + (target ? target[b] : b) * row + n;
        if (!add && !bias) {
            for (int64_t i = 0; i < count; ++i) place[i] = values[i * step];
            return;
        }
        for (int64_t i = 0; i < count; ++i)
            place[i] = (add ? place[i] : 0.0f) + (values[i * step] + (bias ? bias[n + i] : 0.0f));
    }
};

// y of N rows of the matrix and M of the activations.
template <class Format, int N, int M>
static inline void float_tile(const char* w, int64_t row_bytes, const Activations& x, int64_t b, int64_t n, const Output& out) {
    typedef typename Format::Element Element;
    const int64_t columns = x.columns();
    const Element* weights[N];
    const float* rows[M];
    for (int i = 0; i < N; ++i) weights[i] = reinterpret_cast<const Element*>(w + i * row_bytes);
    for (int m = 0; m < M; ++m) rows[m] = x.row(b + m);
    Vec sums[N][M] = {};
    int64_t k = 0;
    for (; k + VL <= columns; k += VL) {
        Vec left[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) left[i] = Format::read(weights[i] + k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vec right = load(rows[m] + k);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) sums[i][m] += left[i] * right;
        }
    }
    for (int m = 0; m < M; ++m) {
        float totals[N];
        for (int i = 0; i < N; ++i) {
            totals[i] = sum(sums[i][m]);
            for (int64_t j = k; j < columns; ++j) totals[i] += Format::one(weights[i][j]) * rows[m][j];
        }
        out.put(b + m, n, totals, 1, N);
    }
}

template <class Format, int N>
static void float_rows(const char* w, int64_t row_bytes, const Activations& x, int64_t rows, int64_t n, const Output& out) {
    constexpr int MOST = VL == 16 ? 6 : 2;
    int64_t b = 0;
    for (; b + MOST <= rows; b += MOST) float_tile<Format, N, MOST>(w, row_bytes, x, b, n, out);
    for (; b + 2 <= rows; b += 2) float_tile<Format, N, 2>(w, row_bytes, x, b, n, out);
    if (b < rows) float_tile<Format, N, 1>(w, row_bytes, x, b, n, out);
}

template <class Format>
static void float_part(const Part& part, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out) {
    const char* w = static_cast<const char*>(part.data);
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) float_rows<Format, 4>(w + n * part.row_bytes, part.row_bytes, x, rows, n, out);
    for (; n < end; ++n) float_rows<Format, 1>(w + n * part.row_bytes, part.row_bytes, x, rows, n, out);
}

// ---- matrices in blocks ---------------------------------------------------------------------------------------------

#if EMBEDGRAD_ISA == 512
constexpr int64_t kStep = 64;  // bytes multiplied at once
typedef __m512i Bytes;
typedef __m512 Sums;
static inline Bytes read_bytes(const void* p) { return _mm512_loadu_si512(p); }
static inline Bytes half_step(const void* p) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
static inline Bytes low_halves(Bytes w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
static inline Bytes high_halves(Bytes w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
// acc += scale · Σ of four products u·x, u unsigned: two at a time must fit into 16 bits.
static inline Sums add_dots(Sums acc, Bytes u, Bytes x, Sums scale) {
#if defined(EMBEDGRAD_VNNI)
    const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), u, x);
#else
    const __m512i pairs = _mm512_maddubs_epi16(u, x);
    const __m512i dots = _mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#endif
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, acc);
}
static inline Sums scales(const float* w, const float* x) { return _mm512_mul_ps(_mm512_loadu_ps(w), _mm512_loadu_ps(x)); }
static inline Sums add_product(Sums acc, const float* a, const float* b) {
    return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), acc);
}
struct Unshifted {  // |w| and what gives x the sign of w
    static constexpr float kExcess = 0;
    Bytes magnitude;
    __mmask64 negative;
    explicit Unshifted(Bytes w) : magnitude(_mm512_abs_epi8(w)), negative(_mm512_movepi8_mask(w)) {}
    Bytes turn(Bytes x) const { return _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x); }
};
#if defined(EMBEDGRAD_VNNI)
struct Signed {  // w + 128, which offsets make up for
    static constexpr float kExcess = 128;
    Bytes magnitude;
    explicit Signed(Bytes w) : magnitude(_mm512_xor_si512(w, _mm512_set1_epi8(-128))) {}
    Bytes turn(Bytes x) const { return x; }
};
#else
typedef Unshifted Signed;
#endif
typedef __m256 Halved;
static inline Halved halved(Sums s) {
    return _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
}
static inline Sums nothing() { return _mm512_setzero_ps(); }
#elif EMBEDGRAD_ISA == 2
constexpr int64_t kStep = 32;
typedef __m256i Bytes;
typedef __m256 Sums;
static inline Bytes read_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline Bytes low_halves(Bytes w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
static inline Bytes high_halves(Bytes w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
static inline Sums add_dots(Sums acc, Bytes u, Bytes x, Sums scale) {
    const __m256i pairs = _mm256_maddubs_epi16(u, x);
    const __m256i dots = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots), scale, acc);
}
static inline Sums scales(const float* w, const float* x) { return _mm256_mul_ps(_mm256_loadu_ps(w), _mm256_loadu_ps(x)); }
static inline Sums add_product(Sums acc, const float* a, const float* b) {
    return _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), acc);
}
struct Unshifted {
    static constexpr float kExcess = 0;
    Bytes magnitude, sign;
    explicit Unshifted(Bytes w) : magnitude(_mm256_abs_epi8(w)), sign(w) {}
    Bytes turn(Bytes x) const { return _mm256_sign_epi8(x, sign); }
};
typedef Unshifted Signed;
typedef __m256 Halved;
static inline Halved halved(Sums s) { return s; }
static inline Sums nothing() { return _mm256_setzero_ps(); }
#else
constexpr int64_t kStep = 32;
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
static inline Bytes low_halves(Bytes w) {
    for (auto& e : w.element) e = static_cast<int8_t>(static_cast<uint8_t>(e) & 15);
    return w;
}
static inline Bytes high_halves(Bytes w) {
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
static inline Sums scales(const float* w, const float* x) {
    Sums s;
    for (int i = 0; i < 8; ++i) s.lane[i] = w[i] * x[i];
    return s;
}
static inline Sums add_product(Sums acc, const float* a, const float* b) {
    for (int i = 0; i < 8; ++i) acc.lane[i] += a[i] * b[i];
    return acc;
}
struct Unshifted {
    static constexpr float kExcess = 0;
    Bytes magnitude, sign;
    explicit Unshifted(const Bytes& w) : magnitude(w), sign(w) {
        for (auto& e : magnitude.element) e = static_cast<int8_t>(e < 0 ? -e : e);  // −128 becomes 128 as unsigned
    }
    Bytes turn(Bytes x) const {
        for (int i = 0; i < 32; ++i) x.element[i] = static_cast<int8_t>(sign.element[i] < 0 ? -x.element[i] : x.element[i]);
        return x;
    }
};
typedef Unshifted Signed;
static inline Sums nothing() { return Sums{}; }
#endif

// The sum of each of M accumulators' lanes, in the same order for every M.
template <int M>
static inline void totals(const Sums* acc, float* y) {
#if EMBEDGRAD_ISA
    if constexpr (M % 4 == 0) {
        for (int m = 0; m < M; m += 4) {
            const Halved one = _mm256_hadd_ps(halved(acc[m]), halved(acc[m + 1]));
            const Halved two = _mm256_hadd_ps(halved(acc[m + 2]), halved(acc[m + 3]));
            const Halved all = _mm256_hadd_ps(one, two);
            _mm_storeu_ps(y + m, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
        }
        return;
    }
    for (int m = 0; m < M; ++m) {
        const Halved one = _mm256_hadd_ps(halved(acc[m]), halved(acc[m])), all = _mm256_hadd_ps(one, one);
        y[m] = _mm_cvtss_f32(_mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
#else
    for (int m = 0; m < M; ++m) {
        y[m] = 0;
        for (float lane : acc[m].lane) y[m] += lane;
    }
#endif
}

// A row of GGUF's blocks: bytes q [columns], scales and offsets [columns / 16].
static void unpack_row(const Part& part, int64_t row, int64_t columns, int8_t* q, float* scales, float* offsets) {
    const auto* block = static_cast<const uint8_t*>(part.data) + row * part.row_bytes;
    const int64_t size = part.stored == Stored::q5_0 ? 32 : 256;
    const int64_t bytes = part.stored == Stored::q5_0 ? 22 : part.stored == Stored::q4_k ? 144 : 210;
    for (int64_t k = 0; k < columns; k += size, block += bytes) {
        const int64_t g = k / kSixteen;
        if (part.stored == Stored::q5_0)
            unpack_q5_0(block, from_half, q + k, scales + g, offsets + g);
        else if (part.stored == Stored::q4_k)
            unpack_q4_k(block, from_half, q + k, scales + g, offsets + g);
        else
            unpack_q6_k(block, from_half, q + k, scales + g, offsets + g);
    }
}

// Some rows of a part, ready for the products: scales eight times each, offsets in float32.
struct BlockRows {
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

// The same for GGUF's blocks, whose bytes are unpacked behind the scales and offsets.
static void prepare_unpacked(
    const Part& part, int64_t first, int64_t rows, int64_t columns, int64_t groups, float* buffer, BlockRows& out) {
    const int64_t sixteens = columns / kSixteen;
    out.has_offsets = part.stored == Stored::q4_k;
    thread_local std::vector<float> spare;
    if (spare.size() < static_cast<size_t>(2 * sixteens)) spare.resize(2 * sixteens);
    for (int64_t r = 0; r < rows; ++r) {
        auto* bytes = reinterpret_cast<int8_t*>(buffer + groups * 9 + 16);
        float* scales = out.scales[r] = buffer;
        float* offsets = out.offsets[r] = buffer + groups * 8 + 16;
        out.bytes[r] = reinterpret_cast<const uint8_t*>(bytes);
        unpack_row(part, first + r, columns, bytes, spare.data(), spare.data() + sixteens);
        for (int64_t g = groups - 16; g < groups; g += VL) store(offsets + g, Vec{});
        for (int64_t g = 0; g < sixteens; ++g) store_four(scales + 4 * g, spare[g]);
        store_eight(scales + 4 * sixteens, 0);
        for (int64_t g = 0; g < sixteens / 2; ++g) offsets[g] = spare[sixteens + 2 * g];
        buffer += scratch_floats(groups) / kBlockRows;
    }
}

static void prepare(const Part& part, int64_t first, int64_t rows, int64_t groups, float* buffer, BlockRows& out) {
    const int64_t size = part.half_scales ? 2 : 4;
    // What the products count too much of every weight: the 8 of int4 without offsets, and what Signed adds.
    const float excess = part.stored == Stored::int8 ? Signed::kExcess : part.offsets ? 0 : 8;
    out.has_offsets = part.offsets || excess != 0;
    for (int64_t r = 0; r < rows; ++r) {
        out.bytes[r] = static_cast<const uint8_t*>(part.data) + (first + r) * part.row_bytes;
        float* scales = out.scales[r] = buffer;
        float* offsets = out.offsets[r] = buffer + groups * 8 + 16;
        buffer += scratch_floats(groups) / kBlockRows;
        const int64_t at = (first + r) * part.groups * size;
        for (int64_t g = groups - 16; g < groups; g += VL) store(offsets + g, Vec{});
        widen_any(static_cast<const char*>(part.scales) + at, part.half_scales, part.groups, offsets);
        for (int64_t g = 0; g < part.groups; ++g) store_eight(scales + 8 * g, offsets[g]);
        store_eight(scales + 8 * part.groups, 0);  // half a step may read it
        if (part.offsets)
            widen_any(static_cast<const char*>(part.offsets) + at, part.half_scales, part.groups, offsets);
        else
            for (int64_t g = 0; g < groups; g += VL) store(offsets + g, load(offsets + g) * -excess);
    }
}

constexpr int64_t kNextUnit = Activations::kTogether * Activations::kUnitBytes;

// The bytes and scales of rows of activations at the element k of their units.
static inline const uint8_t* unit_at(const uint8_t* units, int64_t k) {
    const auto place = static_cast<uint64_t>(k);
    return units + place / 64 * kNextUnit + place % 64;
}

// acc += Σ u x at k for M rows, u unsigned; `turn` gives x the sign that u has lost.
template <int M, class Turn>
static inline __attribute__((always_inline)) void add_step(
    Sums* acc, const Bytes& u, const float* w_scales, const uint8_t* units, int64_t k, const Turn& turn) {
    const uint8_t* at = unit_at(units, k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m, at += Activations::kUnitBytes)
        acc[m] = add_dots(
            acc[m], u, turn(read_bytes(at)),
            scales(w_scales + k / 4, reinterpret_cast<const float*>(at + Activations::kUnit)));
}

// Dot products of M rows of activations with one row in int4: byte j has element j in its low half, and the element
// j of the second half of the columns in its high half.
template <int M>
static inline void int4_dots(const uint8_t* w, const float* w_scales, int64_t groups, const Activations& x, int64_t b, Sums* sums) {
    const int64_t half = groups / 2 * kGroup;
    const float* high_scales = w_scales + groups / 2 * 8;
    const uint8_t* units = x.units(kSplit, b);
    const uint8_t* high_units = units + x.second_half();
    Sums acc[M];  // in registers: `sums` may be anywhere
    for (int m = 0; m < M; ++m) acc[m] = nothing();
    const auto keep = [](const Bytes& x) { return x; };
    const auto step = [&](const Bytes& both, int64_t k) __attribute__((always_inline)) {
        add_step<M>(acc, low_halves(both), w_scales, units, k, keep);
        add_step<M>(acc, high_halves(both), high_scales, high_units, k, keep);
    };
    int64_t k = 0;
    for (; k + kStep <= half; k += kStep) step(read_bytes(w + k), k);
#if EMBEDGRAD_ISA == 512
    if (k < half) step(half_step(w + k), k);
#endif
    for (int m = 0; m < M; ++m) sums[m] = acc[m];
}

template <int M, class Signed>
static inline void int8_dots(const uint8_t* w, const float* w_scales, int64_t groups, const Activations& x, int64_t b, Sums* sums) {
    const uint8_t* units = x.units(kPlain, b);
    Sums acc[M];
    for (int m = 0; m < M; ++m) acc[m] = nothing();
    const auto step = [&](const Bytes& both, int64_t k) __attribute__((always_inline)) {
        const Signed weights(both);
        add_step<M>(acc, weights.magnitude, w_scales, units, k, [&](const Bytes& x) { return weights.turn(x); });
    };
    const int64_t end = groups * kGroup;
    int64_t k = 0;
    for (; k + kStep <= end; k += kStep) step(read_bytes(w + k), k);
#if EMBEDGRAD_ISA == 512
    if (k < end) step(half_step(w + k), k);
#endif
    for (int m = 0; m < M; ++m) sums[m] = acc[m];
}

template <int M>
static inline void block_dots(
    const Part& part, const BlockRows& w, int64_t rows, const Activations& x, int64_t b, int64_t n, const Output& out) {
    const int64_t groups = part.stored <= Stored::int4 ? part.groups : x.columns() / kGroup;
    const float* sums = x.sums(b);
    float y[kBlockRows][M];
    for (int64_t r = 0; r < rows; ++r) {
        Sums acc[M];
        if (part.stored == Stored::int4)
            int4_dots<M>(w.bytes[r], w.scales[r], part.groups, x, b, acc);
        else if (part.stored == Stored::int8)
            int8_dots<M, Signed>(w.bytes[r], w.scales[r], part.groups, x, b, acc);
        else
            int8_dots<M, Unshifted>(w.bytes[r], w.scales[r], groups, x, b, acc);
        if (w.has_offsets)
            for (int64_t g = 0; g < groups; g += kStep / 4)
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) acc[m] = add_product(acc[m], w.offsets[r] + g, sums + m * x.sums_row() + g);
        totals<M>(acc, y[r]);
    }
    for (int m = 0; m < M; ++m) out.put(b + m, n, &y[0][m], M, rows);
}

static void block_part(
    const Part& part, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out, float* buffer) {
    constexpr int MOST = VL == 16 ? 8 : 4;
    for (int64_t n = begin; n < end; n += kBlockRows) {
        const int64_t count = std::min(kBlockRows, end - n);
        BlockRows w;
        if (part.stored <= Stored::int4)
            prepare(part, n, count, x.sums_row(), buffer, w);
        else
            prepare_unpacked(part, n, count, x.columns(), x.sums_row(), buffer, w);
        int64_t b = 0;
        for (; b + MOST <= rows; b += MOST) block_dots<MOST>(part, w, count, x, b, n, out);
        if (MOST == 8 && b + 4 <= rows) block_dots<4>(part, w, count, x, b, n, out), b += 4;
        if (b + 2 <= rows) block_dots<2>(part, w, count, x, b, n, out), b += 2;
        if (b < rows) block_dots<1>(part, w, count, x, b, n, out);
    }
}

#if EMBEDGRAD_ISA == 2
#include "eight_rows.inl"
#endif

static void linear_part(
    const Part& part, const Activations& x, int64_t rows, int64_t begin, int64_t end, const Output& out, float* buffer) {
    switch (part.stored) {
#if EMBEDGRAD_ISA == 2
        case Stored::int4: return eight_rows_part<true>(part, x, rows, begin, end, out);
        case Stored::int8: return eight_rows_part<false>(part, x, rows, begin, end, out);
#endif
        case Stored::f32: return float_part<F32>(part, x, rows, begin, end, out);
        case Stored::bf16: return float_part<Bf16>(part, x, rows, begin, end, out);
        case Stored::f16: return float_part<F16>(part, x, rows, begin, end, out);
        default: return block_part(part, x, rows, begin, end, out, buffer);
    }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// Up to 32 numbers as bytes, the scale that they are multiples of, and scale · Σ bytes. Both are NaN where a number is
// NaN or infinite.
static void quantise_group(const float* x, int64_t n, int8_t* bytes, float& scale, float& total) {
    typedef int8_t Narrow __attribute__((vector_size(VL)));
    float group[kGroup] = {};
    for (int64_t i = 0; i < n; ++i) group[i] = x[i];
    Vec most = {}, differences = {};
    for (int64_t i = 0; i < kGroup; i += VL) {
        const Vec v = load(group + i);
        most = max(most, max(v, -v));
        differences += v - v;
    }
    const float largest = highest(most), odd = sum(differences);
    const Vec inverse = all(odd == 0 && largest > 0 ? 127.0f / largest : 0.0f), shifter = all(12582912.0f);
    Vec along = {};
    for (int64_t i = 0; i < kGroup; i += VL) {
        Vec q = (load(group + i) * inverse + shifter) - shifter;  // adding 1.5 · 2²³ rounds
        q = odd == 0 ? q : Vec{};
        along += q;
        const Narrow narrow = __builtin_convertvector(__builtin_convertvector(q, IVec), Narrow);
        __builtin_memcpy(bytes + i, &narrow, VL);
    }
    scale = odd == 0 ? largest / 127.0f : odd;
    total = scale * sum(along);
}

// out = scale · q + offset over a whole group of 32.
template <class Read>
static inline void widen_group(const Read& read, float scale, float offset, float* out) {
    for (int64_t i = 0; i < kGroup; i += VL) store(out + i, read(i) * scale + offset);
}

static void widen_packed(const Part& part, int64_t row, int64_t columns, float* out) {
    typedef int8_t Narrow __attribute__((vector_size(VL)));
    const int64_t size = part.half_scales ? 2 : 4, half = part.groups / 2;
    const auto* bytes = static_cast<const int8_t*>(part.data) + row * part.row_bytes;
    const char* scales = static_cast<const char*>(part.scales) + row * part.groups * size;
    const char* offsets = part.offsets ? static_cast<const char*>(part.offsets) + row * part.groups * size : nullptr;
    const bool is_int4 = part.stored == Stored::int4;
    const int shift = is_int4 && !part.offsets ? 8 : 0;
    for (int64_t g = 0; g * kGroup < columns; ++g) {
        float scale, offset = 0, group[kGroup];
        widen_any(scales + g * size, part.half_scales, 1, &scale);
        if (offsets) widen_any(offsets + g * size, part.half_scales, 1, &offset);
        const int8_t* from = bytes + (is_int4 && g >= half ? g - half : g) * kGroup;
        const int down = is_int4 && g >= half ? 4 : 0;
        const auto read = [&](int64_t i) __attribute__((always_inline)) {
            Narrow narrow;
            __builtin_memcpy(&narrow, from + i, VL);
            IVec q = __builtin_convertvector(narrow, IVec);
            if (is_int4) q = ((q >> down) & 15) - shift;
            return __builtin_convertvector(q, Vec);
        };
        const int64_t left = columns - g * kGroup;
        widen_group(read, scale, offset, left < kGroup ? group : out + g * kGroup);
        if (left < kGroup) std::memcpy(out + g * kGroup, group, sizeof(float) * left);
    }
}

static void widen_unpacked(const Part& part, int64_t row, int64_t columns, float* out) {
    thread_local std::vector<int8_t> q;
    thread_local std::vector<float> numbers;
    const int64_t sixteens = columns / kSixteen;
    q.resize(columns), numbers.resize(2 * sixteens);
    unpack_row(part, row, columns, q.data(), numbers.data(), numbers.data() + sixteens);
    for (int64_t g = 0; g < sixteens; ++g)
        for (int64_t k = g * kSixteen; k < (g + 1) * kSixteen; ++k)
            out[k] = numbers[g] * static_cast<float>(q[k]) + numbers[sixteens + g];
}

static void read_part_row(const Part& part, int64_t row, int64_t columns, float* out) {
    const char* w = static_cast<const char*>(part.data) + row * part.row_bytes;
    switch (part.stored) {
        case Stored::f32: return widen<F32>(w, columns, out);
        case Stored::bf16: return widen<Bf16>(w, columns, out);
        case Stored::f16: return widen<F16>(w, columns, out);
        default: break;
    }
    if (part.stored > Stored::int4) return widen_unpacked(part, row, columns, out);
    widen_packed(part, row, columns, out);
}
