// Vectors of VL floats, in the compiler's vector extensions. per_isa.inl sets VL and includes this once per instruction
// set.

#define EMBEDGRAD_INLINE static inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef float VecAnywhere __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(VL * 4)));
typedef uint32_t UVec __attribute__((vector_size(VL * 4)));
typedef uint16_t Halves __attribute__((vector_size(VL * 2)));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(VL * 2), aligned(2), may_alias));

// Prefetches the cache lines of [from, from + bytes), for accesses that the hardware prefetcher does not predict.
EMBEDGRAD_INLINE void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

template <typename To, typename From>
EMBEDGRAD_INLINE To bits_as(const From& from) {
    To to;
    static_assert(sizeof to == sizeof from, "the same bits");
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

static inline Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }
static inline Vec broadcast(float x) { return x - Vec{}; }  // exact for every x; 0 + x would turn −0 into 0

// a · b + c, rounded once, whatever the compiler makes of a product and a sum.
#if EMBEDGRAD_ISA == 512
static inline Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
#elif EMBEDGRAD_ISA == 2
static inline Vec fma(Vec a, Vec b, Vec c) { return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }
#else
static inline Vec fma(Vec a, Vec b, Vec c) {
    Vec result = {};
    for (int i = 0; i < VL; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
}
#endif

// Non-temporal store; p is aligned to a vector. `stream_fence` must follow before another thread reads the data.
#if EMBEDGRAD_ISA == 512
static inline void stream(float* p, Vec x) { _mm512_stream_ps(p, __m512(x)); }
#elif EMBEDGRAD_ISA == 2
static inline void stream(float* p, Vec x) { _mm256_stream_ps(p, __m256(x)); }
#elif defined(__x86_64__)
static inline void stream(float* p, Vec x) { _mm_stream_ps(p, __m128(x)); }
#else
static inline void stream(float* p, Vec x) { store(p, x); }
#endif
static inline void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

static inline Vec load(const Bf16* p) {
    return bits_as<Vec>(__builtin_convertvector(*reinterpret_cast<const HalvesAnywhere*>(p), UVec) << 16);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
static inline void store(Bf16* p, Vec x) {
    const UVec bits = bits_as<UVec>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const UVec result = x == x ? rounded : UVec{} + 0x7fc0;
    *reinterpret_cast<HalvesAnywhere*>(p) = __builtin_convertvector(result, Halves);
}

// The first min(count, VL) numbers at p; the other lanes are `rest`.
template <typename T>
EMBEDGRAD_INLINE Vec load(const T* p, int64_t count, float rest = 0.0f) {
    if (count >= VL) return load(p);
    T some[VL] = {};
    __builtin_memcpy(some, p, count * sizeof(T));
    Vec x = load(some);
    for (int64_t i = count; i < VL; ++i) x[i] = rest;
    return x;
}

template <typename T>
EMBEDGRAD_INLINE void store(T* p, Vec x, int64_t count) {
    if (count >= VL) return store(p, x);
    T some[VL];
    store(some, x);
    __builtin_memcpy(p, some, count * sizeof(T));
}

// Adds the two halves, then the halves of the result, and so on.
static inline float sum(Vec x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[VL / 4];
    __builtin_memcpy(parts, &x, sizeof x);
    for (int n = VL / 8; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// a > b ? a : b and a < b ? a : b; b where one of them is NaN. Intrinsics, because compilers do not find the
// instruction.
#if EMBEDGRAD_ISA == 512
static inline Vec max(Vec a, Vec b) { return Vec(_mm512_max_ps(__m512(a), __m512(b))); }
static inline Vec min(Vec a, Vec b) { return Vec(_mm512_min_ps(__m512(a), __m512(b))); }
#elif EMBEDGRAD_ISA == 2
static inline Vec max(Vec a, Vec b) { return Vec(_mm256_max_ps(__m256(a), __m256(b))); }
static inline Vec min(Vec a, Vec b) { return Vec(_mm256_min_ps(__m256(a), __m256(b))); }
#elif defined(__x86_64__)
static inline Vec max(Vec a, Vec b) { return Vec(_mm_max_ps(__m128(a), __m128(b))); }
static inline Vec min(Vec a, Vec b) { return Vec(_mm_min_ps(__m128(a), __m128(b))); }
#else
static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

static inline float highest(Vec x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[VL / 4];
    __builtin_memcpy(parts, &x, sizeof x);
    for (int n = VL / 8; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) parts[i] = parts[i] > parts[i + n] ? parts[i] : parts[i + n];
    const float even = parts[0][0] > parts[0][2] ? parts[0][0] : parts[0][2];
    const float odd = parts[0][1] > parts[0][3] ? parts[0][1] : parts[0][3];
    return even > odd ? even : odd;
}

// exp of N vectors of numbers from −87.33 to 88.37, with an error of at most 0.87 units in the last place. x = n ln 2 +
// r with |r| ≤ ln 2 / 2, and exp(x) = 2ⁿ·p(r). ln 2 is split in two parts as in Cephes. p is the polynomial of degree 6
// with the least relative error (3.6e-9) among those that begin with 1 + r. N vectors at a time hide the operations'
// latency.
template <int N>
EMBEDGRAD_INLINE void exp_inside(const Vec (&x)[N], Vec (&result)[N]) {
    constexpr float c[] = {1.3814539415761828e-3f, 8.36874544620514e-3f, 4.166838899254799e-2f, 0.1666652113199234f,
                           0.4999999403953552f,    1.0f,                 1.0f};
    const Vec shifter = broadcast(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer, in the low bits of the sum
    Vec n[N], r[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) n[k] = x[k] * 1.44269504088896341f + shifter;
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) r[k] = x[k] - (n[k] - shifter) * 0.693359375f;
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) r[k] = r[k] - (n[k] - shifter) * -2.12194440e-4f;
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) result[k] = broadcast(c[0]);
#pragma GCC unroll 8
    for (int i = 1; i < 7; ++i)
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) result[k] = result[k] * r[k] + c[i];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) result[k] = bits_as<Vec>(bits_as<UVec>(result[k]) + (bits_as<UVec>(n[k]) << 23));
}

// exp of N vectors of numbers up to 88.37; 0 below −87.3, where the result would be subnormal.
template <int N>
EMBEDGRAD_INLINE void exp_below(const Vec (&x)[N], Vec (&result)[N]) {
    const Vec low = broadcast(-87.3365447f), zero = {};
    Vec y[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) y[k] = max(low, x[k]);  // max gives NaN for NaN
    exp_inside<N>(y, result);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) result[k] = x[k] < low ? zero : result[k];
}

// exp of any number; 2.4e38 above 88.37.
static inline Vec exp(Vec x) {
    const Vec one[1] = {min(broadcast(88.3762626647950f), x)};
    Vec result[1];
    exp_below<1>(one, result);
    return result[0];
}

// tanh, with an error of at most 2 units in the last place. Below 0.625 it is x + x³·p(x²), where 1 − 2 / (e^2x + 1)
// would cancel; p is the polynomial of degree 4 with the least relative error of the result (4.4e-9).
static inline Vec tanh(Vec x) {
    constexpr float c[] = {-5.704985e-3f, 2.0639086e-2f, -5.3739715e-2f, 0.13331442f, -0.3333328f};
    const Vec size = max(-x, x), square = x * x;
    Vec p = broadcast(c[0]);
    for (int i = 1; i < 5; ++i) p = p * square + c[i];
    const Vec large = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
    return size < 0.625f ? x + x * square * p : x < Vec{} ? -large : large;
}

// In place: x = cap · tanh(x / cap).
static inline void soften(float* x, float cap, int64_t count) {
    for (int64_t i = 0; i < count; i += VL) store(x + i, tanh(load(x + i, count - i) / cap) * cap, count - i);
}

// The slope of cap · tanh(x / cap) at `capped`, its value.
static inline Vec cap_slope(Vec capped, float cap) {
    const Vec t = capped / cap;
    return 1.0f - t * t;
}
