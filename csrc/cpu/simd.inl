// Vectors of VL floats through the compiler's vector extensions. Included once per instruction set; VL is set there.

typedef float Vec __attribute__((vector_size(VL * 4)));
typedef float VecAnywhere __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t IVec __attribute__((vector_size(VL * 4)));

static inline Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
static inline void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }
static inline Vec all(float x) { return Vec{} + x; }

// The two halves added, again and again: the order of a tree.
static inline float sum(Vec x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[VL / 4];
    __builtin_memcpy(parts, &x, sizeof x);
    for (int n = VL / 8; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

static inline float highest(Vec x) {
    float found = x[0];
    for (int i = 1; i < VL; ++i) found = x[i] > found ? x[i] : found;
    return found;
}

static inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// exp(x) to about one unit in the last place: 2ⁿ·p(r) with x = n ln 2 + r, |r| ≤ ln 2 / 2, ln 2 in two parts (the
// split and the polynomial of degree 6 are Cephes' expf). 0 below −87.3, where the result would be subnormal.
static inline Vec exp(Vec x) {
    const Vec high = all(88.3762626647950f), low = all(-87.3365447f);
    const Vec y = x > high ? high : (x < low ? low : x);
    const Vec shifter = all(12582912.0f);  // 1.5 · 2²³: adding it rounds to an integer
    const Vec n = (y * 1.44269504088896341f + shifter) - shifter;
    const Vec r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
    Vec scale;
    __builtin_memcpy(&scale, &power, sizeof scale);
    const Vec result = p * scale;
    const Vec zero = {};
    return x < low ? zero : result;  // NaN stays: it is not below, and y was NaN
}
