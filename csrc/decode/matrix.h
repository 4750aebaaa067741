// Frozen matrices as they are stored, for products with a few rows of activations.
#pragma once

#include <cstdint>

namespace embedgrad {

// How a part of a matrix is stored. int8 and int4 (kernels/packing.py) have a scale for each quant group, 32 elements
// of a matrix row. q5_0, q4_k and q6_k are GGUF's blocks as they are in the file (gguf_blocks.inl).
enum class Stored : int32_t { f32, bf16, f16, int8, int4, q5_0, q4_k, q6_k };

constexpr int64_t kQuantGroup = 32;

// Matrix rows that are stored alike.
struct Part {
    Stored stored;
    int32_t half_scales;   // not 0: scales and offsets are float16; otherwise float32
    int64_t rows;
    int64_t row_bytes;     // distance of matrix rows in `data`
    int64_t quant_groups;  // per matrix row; an even number for int4
    const void* data;
    const void* scales;    // [rows, quant_groups]; int8 and int4 only
    const void* offsets;   // [rows, quant_groups]: w = scale·q + offset; null: w = scale·q (int4: scale·(q − 8))
};

// Parts on top of each other: [rows, columns].
struct Matrix {
    const Part* parts;
    int32_t num_parts;
    int64_t rows, columns;
    const float* bias;  // [rows] or null
};

}  // namespace embedgrad
