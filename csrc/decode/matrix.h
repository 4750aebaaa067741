// Frozen matrices as they are stored, for products with a few rows of activations.
#pragma once

#include "formats.h"

namespace embedgrad {

// Matrix rows that are stored alike: the rows [first, first + rows) of what `data` holds.
struct Part {
    Stored stored;
    int32_t in_blocks;  // quantised types: not 0 where `data` has the file's blocks instead of tiles. Such rows can only
                        // be read.
    int64_t first, rows;
    int64_t row_bytes;  // distance of matrix rows; not used for tiles
    const void* data;
};

// Parts on top of each other: [rows, columns].
struct Matrix {
    const Part* parts;
    int32_t num_parts;
    int64_t rows, columns;
    const float* bias;  // [rows] or null
};

}  // namespace embedgrad
