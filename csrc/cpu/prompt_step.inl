// Rows of the prompt for one instruction set; see prompt_step.h.

constexpr int HALF = VL / 2;
typedef double Wide __attribute__((vector_size(VL * 4)));  // HALF numbers
typedef float Narrow __attribute__((vector_size(VL * 2)));
typedef float NarrowAnywhere __attribute__((vector_size(VL * 2), aligned(4), may_alias));
typedef int32_t NarrowInts __attribute__((vector_size(VL * 2)));

struct Floats {  // the numbers of a Vec as two halves; two loads of halves are cheaper than splitting a Vec
    Narrow low, high;
};

struct Pair {
    Wide low, high;
};

// Intrinsics, because GCC 12 compiles __builtin_convertvector to four instructions instead of one.
#if EMBEDGRAD_ISA == 512
EMBEDGRAD_INLINE Wide wide(Narrow x) { return Wide(_mm512_cvtps_pd(__m256(x))); }
EMBEDGRAD_INLINE Narrow narrow(Wide x) { return Narrow(_mm512_cvtpd_ps(__m512d(x))); }
#elif EMBEDGRAD_ISA == 2
EMBEDGRAD_INLINE Wide wide(Narrow x) { return Wide(_mm256_cvtps_pd(__m128(x))); }
EMBEDGRAD_INLINE Narrow narrow(Wide x) { return Narrow(_mm256_cvtpd_ps(__m256d(x))); }
#else
EMBEDGRAD_INLINE Wide wide(Narrow x) { return __builtin_convertvector(x, Wide); }
EMBEDGRAD_INLINE Narrow narrow(Wide x) { return __builtin_convertvector(x, Narrow); }
#endif

EMBEDGRAD_INLINE Floats halves(const float* p, int64_t count) {
    float some[VL] = {};
    if (count < VL) {
        __builtin_memcpy(some, p, count * sizeof(float));
        p = some;
    }
    return {*reinterpret_cast<const NarrowAnywhere*>(p), *reinterpret_cast<const NarrowAnywhere*>(p + HALF)};
}

EMBEDGRAD_INLINE void store(float* p, Floats x, int64_t count) {
    if (count < VL) return void(__builtin_memcpy(p, &x, count * sizeof(float)));
    *reinterpret_cast<NarrowAnywhere*>(p) = x.low, *reinterpret_cast<NarrowAnywhere*>(p + HALF) = x.high;
}

EMBEDGRAD_INLINE Pair widened(Floats x) { return {wide(x.low), wide(x.high)}; }

EMBEDGRAD_INLINE Pair widened(const float* p, int64_t count) { return widened(halves(p, count)); }

struct Sum {
    Pair pair = {};
    void add(Pair a, Pair b) { pair.low += a.low * b.low, pair.high += a.high * b.high; }
    double total() const {
        const Wide both = pair.low + pair.high;
        double sum = 0;
        for (int i = 0; i < HALF; ++i) sum += both[i];
        return sum;
    }
};

static inline Vec root(Vec x) {
#if EMBEDGRAD_ISA == 512
    return reinterpret_cast<Vec>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif EMBEDGRAD_ISA == 2
    return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__x86_64__)
    return reinterpret_cast<Vec>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
    for (int i = 0; i < VL; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

static void sum_of_squares(const float* g, int64_t d, double& squared) {
    Sum sum;
    for (int64_t i = 0; i < d; i += VL) {
        const Pair x = widened(g + i, d - i);
        sum.add(x, x);
    }
    squared = sum.total();
}

// AdamW on one row with `clip · g`, and the sums of the new row.
static void adamw_row(
    const AdamW& s, float clip, float* e, const float* anchor, float* m, float* v, const float* g, int64_t d,
    Lengths& lengths) {
    Sum ee, ea, aa;
    Vec moments = {};  // 0 while all moments are finite: x − x is NaN for any other x
    const float inverse = 1.0f / s.correction;
    for (int64_t i = 0; i < d; i += VL) {
        const int64_t count = d - i;
        const Vec gradient = load(g + i, count) * clip, old_m = load(m + i, count);
        const Vec new_m = old_m + s.rest1 * (gradient - old_m);
        const Vec new_v = load(v + i, count) * s.beta2 + s.rest2 * gradient * gradient;
        moments += (new_m - new_m) + (new_v - new_v);
        store(m + i, new_m, count);
        store(v + i, new_v, count);
        const Vec by = root(new_v) * inverse + s.eps;
        store(e + i, load(e + i, count) * s.decay - s.rate * new_m / by, count);
        // Loaded again, so that the lanes behind the row's end are 0 in the sums (with eps = 0 they are NaN here).
        const Pair row = widened(e + i, count), to = widened(anchor + i, count);
        ee.add(row, row), ea.add(row, to), aa.add(to, to);
    }
    lengths = {ee.total(), ea.total(), aa.total(), true};
    for (int i = 0; i < VL; ++i) lengths.finite_moments &= moments[i] == 0;
}

static void measure(const float* e, const float* anchor, int64_t d, Lengths& lengths) {
    Sum ee, ea;
    for (int64_t i = 0; i < d; i += VL) {
        const Pair row = widened(e + i, d - i), to = widened(anchor + i, d - i);
        ee.add(row, row), ea.add(row, to);
    }
    lengths.ee = ee.total(), lengths.ea = ea.total();
}

// Σ (e − anchor)²
static void distance(const float* e, const float* anchor, int64_t d, double& squared) {
    Sum sum;
    for (int64_t i = 0; i < d; i += VL) {
        Pair row = widened(e + i, d - i);
        const Pair to = widened(anchor + i, d - i);
        row.low -= to.low, row.high -= to.high;
        sum.add(row, row);
    }
    squared = sum.total();
}

// One vector of v and of û; see Across.
EMBEDGRAD_INLINE void across_at(const Across& across, Wide e, Wide anchor, Wide& result, Wide& unit) {
    unit = anchor * across.unit;
    result = ((e - across.along * unit - across.first * unit) * across.scale - across.second * unit) * across.rescale;
}

EMBEDGRAD_INLINE void across_at(const Across& across, Pair e, Pair anchor, Pair& result, Pair& unit) {
    across_at(across, e.low, anchor.low, result.low, unit.low);
    across_at(across, e.high, anchor.high, result.high, unit.high);
}

// Σ v û and Σ v² for the v that `across` describes.
static void across_sums(
    const float* e, const float* anchor, int64_t d, const Across& across, double& along, double& squared) {
    Sum vu, vv;
    for (int64_t i = 0; i < d; i += VL) {
        Pair v, unit;
        across_at(across, widened(e + i, d - i), widened(anchor + i, d - i), v, unit);
        vu.add(v, unit), vv.add(v, v);
    }
    along = vu.total(), squared = vv.total();
}

// The row becomes of_row · e + of_anchor · anchor + of_across · v. Updates `lengths`; `moved` tells whether a number
// changed.
static void place_row(
    float* e, const float* anchor, int64_t d, double of_row, double of_anchor, double of_across, const Across& across,
    bool& moved, Lengths& lengths) {
    Sum ee, ea;
    NarrowInts changed = {};
    for (int64_t i = 0; i < d; i += VL) {
        const Floats before = halves(e + i, d - i);
        const Pair row = widened(before), to = widened(anchor + i, d - i);
        Pair v = {}, unit = {};
        if (of_across != 0) across_at(across, row, to, v, unit);
        const Floats after = {
            narrow(of_row * row.low + of_anchor * to.low + of_across * v.low),
            narrow(of_row * row.high + of_anchor * to.high + of_across * v.high)};
        store(e + i, after, d - i);
        changed |= (after.low != before.low) | (after.high != before.high);
        const Pair placed = widened(after);  // 0 behind the row's end, because e and the anchor are 0 there
        ee.add(placed, placed), ea.add(placed, to);
    }
    lengths.ee = ee.total(), lengths.ea = ea.total();
    for (int i = 0; i < HALF; ++i) moved |= changed[i] != 0;
}
