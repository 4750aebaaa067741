#include "softmax_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "softmax_loss.inl"
#include "per_isa.inl"

void softmax_loss(
    const Pool& pool, Rows<float> z, const int64_t* targets, const float* weights, float* nll, int64_t* predicted,
    int64_t rows, int64_t vocabulary, float softcap) {
    pool.run(rows, rows_per_thread(vocabulary), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float* weight = weights ? weights + t : nullptr;
            EMBEDGRAD_DISPATCH(softmax_loss_row, z.at(t), vocabulary, targets[t], weight, softcap, nll[t], predicted[t])
        }
    });
}

}  // namespace embedgrad
