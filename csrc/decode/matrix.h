// Frozen matrices as they are stored, for products with a few rows of activations.
#pragma once

#include <cstdint>

namespace embedgrad {

// How the elements of a part are stored: in int8 and int4 (kernels/packing.py) 32 elements of a row share a scale; q5_0,
// q4_k and q6_k are GGUF's blocks as a file has them (blocks.inl).
enum class Stored : int32_t { f32, bf16, f16, int8, int4, q5_0, q4_k, q6_k };

constexpr int64_t kGroup = 32;

// Rows of a matrix that are stored alike.
struct Part {
    Stored stored;
    int32_t half_scales;   // scales and offsets are float16, otherwise float32
    int64_t rows;
    int64_t row_bytes;     // distance of rows in `data`
    int64_t groups;        // per row of `scales` and `offsets`; int4: an even number
    const void* data;
    const void* scales;    // [rows, groups]; int8 and int4 only
    const void* offsets;   // [rows, groups] or null: w = scale·q + offset; without, w = scale·q (int4: scale·(q − 8))
};

// Parts on top of each other: [rows, columns].
struct Matrix {
    const Part* parts;
    int32_t num_parts;
    int64_t rows, columns;
    const float* bias;  // [rows] or null
};

}  // namespace embedgrad
