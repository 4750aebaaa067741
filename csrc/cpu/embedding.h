// The first layer's input, and the gradient of the prompt's rows.
#pragma once

#include <cstdint>

#include "pool.h"
#include "tensor_views.h"

namespace embedgrad {

// out[i] = prompt[prompt_rows[i]] where prompt_rows[i] ≥ 0, otherwise table[ids[i]]. Without `table.data` the latter
// rows are not written.
template <typename Table, typename Out>
void embed(
    const Pool&, Rows<float> prompt, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows, Rows<Out> out,
    int64_t count, int64_t d);

// grad [k, d]: grad[r] = Σ dx[i] over the positions i with prompt_rows[i] = r, summed in the order of i for any number
// of threads.
template <typename T>
void embed_backward(
    const Pool&, Rows<T> dx, const int64_t* prompt_rows, Rows<float> grad, int64_t count, int64_t k, int64_t d);

}  // namespace embedgrad
