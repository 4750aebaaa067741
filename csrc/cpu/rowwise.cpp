#include "rowwise.h"

#include <cmath>

#include "isa.h"
#include "non_temporal.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "rowwise.inl"
#include "per_isa.inl"

template <typename T, typename W>
void rms_norm(const Pool& pool, Rows<T> x, const W* weight, float eps, Rows<T> out, int64_t rows, int64_t d) {
    const bool non_temporal = prefers_non_temporal(out, rows, d);
    pool.run(rows, rows_per_thread(d), [&](int64_t begin, int64_t end) {
        if (non_temporal) {
            EMBEDGRAD_DISPATCH(rms_norm_rows<true>, x, weight, eps, out, begin, end, d)
        } else {
            EMBEDGRAD_DISPATCH(rms_norm_rows<false>, x, weight, eps, out, begin, end, d)
        }
    });
}

template <typename T, typename W>
void rms_norm_backward(
    const Pool& pool, Rows<T> dy, Rows<T> x, const W* weight, float eps, Rows<T> dx, int64_t rows, int64_t d) {
    pool.run(rows, rows_per_thread(d), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(rms_norm_backward_rows, dy, x, weight, eps, dx, begin, end, d)
    });
}

template <typename T, typename W>
void rope(
    const Pool& pool, Rows<T> x, const T* cos, const T* sin, HeadNorms<W> norms, int64_t rows, int64_t heads,
    int64_t half) {
    pool.run(rows, rows_per_thread(heads * half), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(rope_rows, x, cos, sin, norms, begin, end, heads, half)
    });
}

template <typename T, typename W>
void rope_backward(
    const Pool& pool, Rows<T> dx, Rows<T> raw, const T* cos, const T* sin, HeadNorms<W> norms, int64_t rows,
    int64_t heads, int64_t half) {
    pool.run(rows, rows_per_thread(heads * half), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(rope_backward_rows, dx, raw, cos, sin, norms, begin, end, heads, half)
    });
}

template <typename T>
void swiglu(const Pool& pool, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width, bool gelu) {
    const bool non_temporal = prefers_non_temporal(out, rows, width);
    pool.run(rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
        if (non_temporal) {
            EMBEDGRAD_DISPATCH(swiglu_rows<true>, gate_up, out, begin, end, width, gelu)
        } else {
            EMBEDGRAD_DISPATCH(swiglu_rows<false>, gate_up, out, begin, end, width, gelu)
        }
    });
}

template <typename T>
void swiglu_backward(
    const Pool& pool, Rows<T> da, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width, bool gelu) {
    pool.run(rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(swiglu_backward_rows, da, gate_up, out, begin, end, width, gelu)
    });
}

#define EMBEDGRAD_NORMS_OF(T, W)                                                                                       \
    template void rms_norm(const Pool&, Rows<T>, const W*, float, Rows<T>, int64_t, int64_t);                          \
    template void rms_norm_backward(const Pool&, Rows<T>, Rows<T>, const W*, float, Rows<T>, int64_t, int64_t);        \
    template void rope(const Pool&, Rows<T>, const T*, const T*, HeadNorms<W>, int64_t, int64_t, int64_t);             \
    template void rope_backward(                                                                                       \
        const Pool&, Rows<T>, Rows<T>, const T*, const T*, HeadNorms<W>, int64_t, int64_t, int64_t);
EMBEDGRAD_NORMS_OF(float, float)
EMBEDGRAD_NORMS_OF(Bf16, Bf16)
EMBEDGRAD_NORMS_OF(Bf16, float)

#define EMBEDGRAD_OF(T)                                                                                                \
    template void swiglu(const Pool&, Rows<T>, Rows<T>, int64_t, int64_t, bool);                                       \
    template void swiglu_backward(const Pool&, Rows<T>, Rows<T>, Rows<T>, int64_t, int64_t, bool);
EMBEDGRAD_OF(float)
EMBEDGRAD_OF(Bf16)

}  // namespace embedgrad
