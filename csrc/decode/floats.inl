// Numbers in float types, for one instruction set.

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
