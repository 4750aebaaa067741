// Products with a few activation rows for one instruction set; see linear.h.
#include "floats.inl"

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
        out.put(b + m, n, totals, N);
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
    const char* w = static_cast<const char*>(part.data) + part.first * part.row_bytes;
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) float_rows<Format, 4>(w + n * part.row_bytes, part.row_bytes, x, batch, n, out);
    for (; n < end; ++n) float_rows<Format, 1>(w + n * part.row_bytes, part.row_bytes, x, batch, n, out);
}

// ---- quantised matrices ---------------------------------------------------------------------------------------------

#if EMBEDGRAD_ISA != 512 || defined(EMBEDGRAD_VNNI)
#include "tiles.inl"
#include "products.inl"
#endif

static void linear_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    switch (part.stored) {
        case Stored::f32: return float_part<F32>(part, x, batch, begin, end, out);
        case Stored::bf16: return float_part<Bf16>(part, x, batch, begin, end, out);
        case Stored::f16: return float_part<F16>(part, x, batch, begin, end, out);
#if EMBEDGRAD_ISA != 512 || defined(EMBEDGRAD_VNNI)
        default: return tiles_part(part, x, batch, begin, end, out);
#else
        default: return;  // linear() calls the AVX2 kernel instead
#endif
    }
}

#if !defined(EMBEDGRAD_VNNI)  // the rest is dispatched without VNNI

// ---- quantise and read rows -----------------------------------------------------------------------------------------

// Rounds kQuantGroup numbers. Where a number is NaN or infinite the scale is NaN and the bytes are 0.
static void quantise_group(const float* x, QuantizedGroup& to) {
    typedef int8_t Narrow __attribute__((vector_size(VL)));
    Vec most = {}, differences = {};
    for (int64_t i = 0; i < kQuantGroup; i += VL) {
        const Vec v = load(x + i);
        most = max(most, max(v, -v));
        differences += v - v;
    }
    const float largest = highest(most), odd = sum(differences);
    const Vec inverse = broadcast(odd == 0 && largest > 0 ? 127.0f / largest : 0.0f), shifter = broadcast(12582912.0f);
    float sums[2];
    for (int64_t half = 0; half < 2; ++half) {
        Vec along = {};
        for (int64_t i = half * kQuantGroup / 2; i < (half + 1) * kQuantGroup / 2; i += VL) {
            Vec q = fma(load(x + i), inverse, shifter) - shifter;  // adding 1.5 · 2²³ rounds
            q = odd == 0 ? q : Vec{};
            along += q;
            const Narrow narrow = __builtin_convertvector(__builtin_convertvector(q, IVec), Narrow);
            __builtin_memcpy(to.bytes + i, &narrow, VL);
        }
        sums[half] = sum(along);
        to.sums[half] = static_cast<int32_t>(sums[half]);
    }
    to.scale = odd == 0 ? largest / 127.0f : odd;
    to.sum = to.scale * (sums[0] + sums[1]);
}

static void read_float_row(const Part& part, int64_t row, int64_t columns, float* out) {
    const char* w = static_cast<const char*>(part.data) + (part.first + row) * part.row_bytes;
    switch (part.stored) {
        case Stored::f32: return widen<F32>(w, columns, out);
        case Stored::bf16: return widen<Bf16>(w, columns, out);
        default: return widen<F16>(w, columns, out);
    }
}

#endif
