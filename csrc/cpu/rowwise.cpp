#include "rowwise.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "rowwise.inl"
#include "per_isa.inl"

namespace {
constexpr int64_t kGrain = 1 << 14;  // numbers that are worth a thread

int64_t grain(int64_t d) { return d < kGrain ? kGrain / (d ? d : 1) : 1; }
}  // namespace

void rms_norm(const Pool& pool, Rows x, Rows residual, const float* weight, float eps, Rows out, int64_t rows, int64_t d) {
    pool.run(rows, grain(d), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* added = residual.data ? residual.data + t * residual.row : nullptr;
            EMBEDGRAD_DISPATCH(rms_norm_row, x.data + t * x.row, added, weight, eps, out.data + t * out.row, d)
        }
    });
}

void rms_norm_backward(
    const Pool& pool, Rows dy, Rows x, const float* weight, float eps, Rows dx, int64_t rows, int64_t d) {
    pool.run(rows, grain(d), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            EMBEDGRAD_DISPATCH(
                rms_norm_backward_row, dy.data + t * dy.row, x.data + t * x.row, weight, eps, dx.data + t * dx.row, d)
        }
    });
}

void rope(
    const Pool& pool, Rows x, const float* cos, const float* sin, HeadNorms norms, int64_t rows, int64_t heads,
    int64_t half) {
    pool.run(rows, grain(heads * half), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            EMBEDGRAD_DISPATCH(rope_row, x.data + t * x.row, cos + t * half, sin + t * half, norms, heads, half)
        }
    });
}

void rope_backward(
    const Pool& pool, Rows dx, Rows raw, const float* cos, const float* sin, HeadNorms norms, int64_t rows, int64_t heads,
    int64_t half) {
    pool.run(rows, grain(heads * half), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* x = raw.data ? raw.data + t * raw.row : nullptr;
            EMBEDGRAD_DISPATCH(
                rope_backward_row, dx.data + t * dx.row, x, cos + t * half, sin + t * half, norms, heads, half)
        }
    });
}

void swiglu(const Pool& pool, Rows gate_up, Rows out, int64_t rows, int64_t width) {
    pool.run(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* gate = gate_up.data + t * gate_up.row;
            EMBEDGRAD_DISPATCH(swiglu_row, gate, gate + width, out.data + t * out.row, width)
        }
    });
}

void swiglu_backward(const Pool& pool, Rows da, Rows gate_up, Rows out, int64_t rows, int64_t width) {
    pool.run(rows, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* gate = gate_up.data + t * gate_up.row;
            float* d = out.data + t * out.row;
            EMBEDGRAD_DISPATCH(swiglu_backward_row, da.data + t * da.row, gate, gate + width, d, d + width, width)
        }
    });
}

void softmax_loss(
    const Pool& pool, Rows z, const int64_t* targets, const float* weights, float* nll, int64_t* predicted, int64_t rows,
    int64_t vocabulary) {
    pool.run(rows, grain(vocabulary), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* weight = weights ? weights + t : nullptr;
            EMBEDGRAD_DISPATCH(softmax_loss_row, z.data + t * z.row, vocabulary, targets[t], weight, nll[t], predicted[t])
        }
    });
}

}  // namespace embedgrad
