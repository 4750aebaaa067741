// Brings a file's quantised blocks into tiles (formats.h), and reads rows of float32 from both.
#pragma once

#include "matrix.h"

namespace embedgrad {

// Tiles [begin, end) of `out`, from blocks [rows, super-blocks] as in the file, rows `row_bytes` apart. Rows behind the
// last one are 0.
void repack(
    Stored, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t columns, uint8_t* out, int64_t begin,
    int64_t end);

// out [end − begin, columns] = the rows [begin, end) of a quantised part in float32.
void read_quantised(const Part&, int64_t begin, int64_t end, int64_t columns, float* out);

}  // namespace embedgrad
