// GGUF's Q4_0, Q4_1 and Q8_0 blocks in our own layout (kernels/packing.py): scales, offsets and elements apart, and of
// int4 the two halves of the columns in the two halves of a byte.
#pragma once

#include "../common/portable.h"

namespace embedgrad {

enum class GgufBlock : int32_t { q4_0, q4_1, q8_0 };

}  // namespace embedgrad

extern "C" {

// blocks [rows, count] as the file has them, rows `row_bytes` apart → elements [rows, 16 · even(count)] (int8:
// [rows, 32 · count]), scales and, of q4_1, offsets [rows, even(count)] (int8: [rows, count]) as the file's float16.
// A block that int4 lacks to an even number is filled with 0.
EMBEDGRAD_API void embedgrad_repack(
    int32_t kind, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, uint8_t* elements,
    uint16_t* scales, uint16_t* offsets);
}
