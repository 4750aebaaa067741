// What goes into the first layer, and the way back to the prompt's rows.
#pragma once

#include <cstdint>

#include "../parallel.h"
#include "elements.h"

namespace embedgrad {

// out[i] = rows[prompt_rows[i]] where that is not negative, else table[ids[i]], or left alone where `table` has no data.
template <typename Table, typename Out>
void embed(
    const Pool&, Rows<float> rows, Rows<Table> table, const int64_t* ids, const int64_t* prompt_rows, Rows<Out> out,
    int64_t count, int64_t d);

// grad[r] = Σ of dx[i] over the positions i that show row r, in order of position, whatever the threads; grad [k, d].
template <typename T>
void embed_backward(
    const Pool&, Rows<T> dx, const int64_t* prompt_rows, Rows<float> grad, int64_t count, int64_t k, int64_t d);

}  // namespace embedgrad
