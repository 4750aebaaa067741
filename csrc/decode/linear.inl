// Products with a few activation rows for one instruction set; see linear.h.

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

static inline float from_half(uint16_t h) {
#if EMBEDGRAD_ISA
    return _cvtsh_ss(h);
#else
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
#endif
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

// y for N matrix rows from n on and M activation rows from b on.
template <class Format, int N, int M>
static inline void float_tile(
    const char* w, int64_t row_bytes, const Activations& x, int64_t b, int64_t n, const Output& out) {
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
static void float_rows(
    const char* w, int64_t row_bytes, const Activations& x, int64_t batch, int64_t n, const Output& out) {
    constexpr int MOST = VL == 16 ? 6 : 2;
    int64_t b = 0;
    for (; b + MOST <= batch; b += MOST) float_tile<Format, N, MOST>(w, row_bytes, x, b, n, out);
    for (; b + 2 <= batch; b += 2) float_tile<Format, N, 2>(w, row_bytes, x, b, n, out);
    if (b < batch) float_tile<Format, N, 1>(w, row_bytes, x, b, n, out);
}

template <class Format>
static void float_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    const char* w = static_cast<const char*>(part.data);
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) float_rows<Format, 4>(w + n * part.row_bytes, part.row_bytes, x, batch, n, out);
    for (; n < end; ++n) float_rows<Format, 1>(w + n * part.row_bytes, part.row_bytes, x, batch, n, out);
}

// ---- quantised matrices ---------------------------------------------------------------------------------------------

#include "gguf_blocks.inl"

// Unpacks a matrix row of GGUF blocks: q [columns], scales and offsets [columns / 16].
static void unpack_row(const Part& part, int64_t row, int64_t columns, int8_t* q, float* scales, float* offsets) {
    const auto* block = static_cast<const uint8_t*>(part.data) + row * part.row_bytes;
    const int64_t size = part.stored == Stored::q5_0 ? 32 : 256;
    const int64_t bytes = part.stored == Stored::q5_0 ? 22 : part.stored == Stored::q4_k ? 144 : 210;
    for (int64_t k = 0; k < columns; k += size, block += bytes) {
        const int64_t g = k / kGgufGroup;
        if (part.stored == Stored::q5_0)
            unpack_q5_0(block, q + k, scales + g, offsets + g);
        else if (part.stored == Stored::q4_k)
            unpack_q4_k(block, q + k, scales + g, offsets + g);
        else
            unpack_q6_k(block, q + k, scales + g, offsets + g);
    }
}

// The products below read several matrix rows at once. The hardware prefetcher does not detect that memory as a whole
// is read in order, so they prefetch.
#if EMBEDGRAD_ISA != 512
#include "products_plain_avx2.inl"
#endif
#if EMBEDGRAD_ISA == 2
#include "products_avx2.inl"
#elif defined(EMBEDGRAD_VNNI)
#include "products_avx512vnni.inl"
#endif

static void linear_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    switch (part.stored) {
#if EMBEDGRAD_ISA == 2
        case Stored::int4: return eight_lane_part<true>(part, x, batch, begin, end, out);
        case Stored::int8: return eight_lane_part<false>(part, x, batch, begin, end, out);
#endif
        case Stored::f32: return float_part<F32>(part, x, batch, begin, end, out);
        case Stored::bf16: return float_part<Bf16>(part, x, batch, begin, end, out);
        case Stored::f16: return float_part<F16>(part, x, batch, begin, end, out);
#if EMBEDGRAD_ISA != 512
        default: return row_by_row_part(part, x, batch, begin, end, out);
#elif defined(EMBEDGRAD_VNNI)
        default: return sixteen_lane_part(part, x, batch, begin, end, out);
#else
        default: return;  // linear() calls the AVX2 kernel instead
#endif
    }
}

#if !defined(EMBEDGRAD_VNNI)  // the rest is dispatched without VNNI

// ---- quantise and widen rows ----------------------------------------------------------------------------------------

// Rounds n ≤ 32 numbers to bytes · scale; sums: of the bytes of each half. Where a number is NaN or infinite the scale
// is NaN and the bytes are 0.
static void quantise_group(const float* x, int64_t n, int8_t* bytes, float& scale, float* sums) {
    typedef int8_t Narrow __attribute__((vector_size(VL)));
    float some[kQuantGroup] = {};
    if (n < kQuantGroup) {
        for (int64_t i = 0; i < n; ++i) some[i] = x[i];
        x = some;
    }
    Vec most = {}, differences = {};
    for (int64_t i = 0; i < kQuantGroup; i += VL) {
        const Vec v = load(x + i);
        most = max(most, max(v, -v));
        differences += v - v;
    }
    const float largest = highest(most), odd = sum(differences);
    const Vec inverse = broadcast(odd == 0 && largest > 0 ? 127.0f / largest : 0.0f), shifter = broadcast(12582912.0f);
    for (int64_t half = 0; half < 2; ++half) {
        Vec along = {};
        for (int64_t i = half * kQuantGroup / 2; i < (half + 1) * kQuantGroup / 2; i += VL) {
            Vec q = (load(x + i) * inverse + shifter) - shifter;  // adding 1.5 · 2²³ rounds
            q = odd == 0 ? q : Vec{};
            along += q;
            const Narrow narrow = __builtin_convertvector(__builtin_convertvector(q, IVec), Narrow);
            __builtin_memcpy(bytes + i, &narrow, VL);
        }
        sums[half] = sum(along);
    }
    scale = odd == 0 ? largest / 127.0f : odd;
}

// out = scale · q + offset over a quant group.
template <class Read>
static inline void widen_group(const Read& read, float scale, float offset, float* out) {
    for (int64_t i = 0; i < kQuantGroup; i += VL) store(out + i, read(i) * scale + offset);
}

static void widen_packed(const Part& part, int64_t row, int64_t columns, float* out) {
    typedef int8_t Narrow __attribute__((vector_size(VL)));
    const int64_t size = part.half_scales ? 2 : 4, half = part.quant_groups / 2;
    const auto* bytes = static_cast<const int8_t*>(part.data) + row * part.row_bytes;
    const char* scales = static_cast<const char*>(part.scales) + row * part.quant_groups * size;
    const char* offsets = part.offsets ? static_cast<const char*>(part.offsets) + row * part.quant_groups * size : nullptr;
    const bool is_int4 = part.stored == Stored::int4;
    const int shift = is_int4 && !part.offsets ? 8 : 0;
    for (int64_t g = 0; g * kQuantGroup < columns; ++g) {
        float scale, offset = 0, group[kQuantGroup];
        widen_any(scales + g * size, part.half_scales, 1, &scale);
        if (offsets) widen_any(offsets + g * size, part.half_scales, 1, &offset);
        const int8_t* from = bytes + (is_int4 && g >= half ? g - half : g) * kQuantGroup;
        const int down = is_int4 && g >= half ? 4 : 0;
        const auto read = [&](int64_t i) __attribute__((always_inline)) {
            Narrow narrow;
            __builtin_memcpy(&narrow, from + i, VL);
            IVec q = __builtin_convertvector(narrow, IVec);
            if (is_int4) q = ((q >> down) & 15) - shift;
            return __builtin_convertvector(q, Vec);
        };
        const int64_t left = columns - g * kQuantGroup;
        widen_group(read, scale, offset, left < kQuantGroup ? group : out + g * kQuantGroup);
        if (left < kQuantGroup) std::memcpy(out + g * kQuantGroup, group, sizeof(float) * left);
    }
}

static void widen_unpacked(const Part& part, int64_t row, int64_t columns, float* out) {
    thread_local std::vector<int8_t> q;
    thread_local std::vector<float> numbers;
    const int64_t gguf_groups = columns / kGgufGroup;
    q.resize(columns), numbers.resize(2 * gguf_groups);
    unpack_row(part, row, columns, q.data(), numbers.data(), numbers.data() + gguf_groups);
    for (int64_t g = 0; g < gguf_groups; ++g)
        for (int64_t k = g * kGgufGroup; k < (g + 1) * kGgufGroup; ++k)
            out[k] = numbers[g] * static_cast<float>(q[k]) + numbers[gguf_groups + g];
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

#endif
