#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "caches.h"
#include "isa.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "rowwise.inl"
#include "per_isa.inl"

template <typename T>
void rms_norm(
    const Pool& pool, Rows<T> x, Rows<T> residual, const T* weight, float eps, Rows<T> out, int64_t rows, int64_t d) {
    const bool past = past_caches(out, rows, d);
    pool.run(rows, rows_per_thread(d), [&](int64_t begin, int64_t end) {
        if (past) {
            EMBEDGRAD_DISPATCH(rms_norm_rows<true>, x, residual, weight, eps, out, begin, end, d)
        } else {
            EMBEDGRAD_DISPATCH(rms_norm_rows<false>, x, residual, weight, eps, out, begin, end, d)
        }
    });
}

template <typename T>
void rms_norm_backward(
    const Pool& pool, Rows<T> dy, Rows<T> x, const T* weight, float eps, Rows<T> dx, int64_t rows, int64_t d) {
    pool.run(rows, rows_per_thread(d), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(rms_norm_backward_rows, dy, x, weight, eps, dx, begin, end, d)
    });
}

template <typename T>
void rope(
    const Pool& pool, Rows<T> x, const T* cos, const T* sin, HeadNorms<T> norms, int64_t rows, int64_t heads,
    int64_t half) {
    pool.run(rows, rows_per_thread(heads * half), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(rope_rows, x, cos, sin, norms, begin, end, heads, half)
    });
}

template <typename T>
void rope_backward(
    const Pool& pool, Rows<T> dx, Rows<T> raw, const T* cos, const T* sin, HeadNorms<T> norms, int64_t rows,
    int64_t heads, int64_t half) {
    pool.run(rows, rows_per_thread(heads * half), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(rope_backward_rows, dx, raw, cos, sin, norms, begin, end, heads, half)
    });
}

template <typename T>
void swiglu(const Pool& pool, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width) {
    const bool past = past_caches(out, rows, width);
    pool.run(rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
        if (past) {
            EMBEDGRAD_DISPATCH(swiglu_rows<true>, gate_up, out, begin, end, width)
        } else {
            EMBEDGRAD_DISPATCH(swiglu_rows<false>, gate_up, out, begin, end, width)
        }
    });
}

template <typename T>
void swiglu_backward(const Pool& pool, Rows<T> da, Rows<T> gate_up, Rows<T> out, int64_t rows, int64_t width) {
    pool.run(rows, rows_per_thread(width), [&](int64_t begin, int64_t end) {
        EMBEDGRAD_DISPATCH(swiglu_backward_rows, da, gate_up, out, begin, end, width)
    });
}

#define EMBEDGRAD_OF(T)                                                                                                 \
    template void rms_norm(const Pool&, Rows<T>, Rows<T>, const T*, float, Rows<T>, int64_t, int64_t);                  \
    template void rms_norm_backward(const Pool&, Rows<T>, Rows<T>, const T*, float, Rows<T>, int64_t, int64_t);         \
    template void rope(const Pool&, Rows<T>, const T*, const T*, HeadNorms<T>, int64_t, int64_t, int64_t);              \
    template void rope_backward(                                                                                        \
        const Pool&, Rows<T>, Rows<T>, const T*, const T*, HeadNorms<T>, int64_t, int64_t, int64_t);                    \
    template void swiglu(const Pool&, Rows<T>, Rows<T>, int64_t, int64_t);                                              \
    template void swiglu_backward(const Pool&, Rows<T>, Rows<T>, Rows<T>, int64_t, int64_t);
EMBEDGRAD_OF(float)
EMBEDGRAD_OF(Bf16)

void softmax_loss(
    const Pool& pool, Rows<float> z, const int64_t* targets, const float* weights, float* nll, int64_t* predicted,
    int64_t rows, int64_t vocabulary) {
    pool.run(rows, rows_per_thread(vocabulary), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* weight = weights ? weights + t : nullptr;
            EMBEDGRAD_DISPATCH(softmax_loss_row, z.at(t), vocabulary, targets[t], weight, nll[t], predicted[t])
        }
    });
}

int64_t multiply_adds(const Pool& pool, int64_t rounds) {
    pool.run(pool.threads(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
            float result = 0;
            EMBEDGRAD_DISPATCH(multiply_add, rounds, result)
            volatile float used = result;
            static_cast<void>(used);
        }
    });
    int64_t length = 0;
    EMBEDGRAD_DISPATCH(vector_length, length)
    return rounds * 12 * length * pool.threads();
}

}  // namespace embedgrad
