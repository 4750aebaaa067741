// Converts GGUF's Q4_0, Q4_1 and Q8_0 blocks to int4 and int8 matrices (kernels/packing.py), which have elements,
// scales and offsets in separate arrays. README.md draws both.
#pragma once

#include "../common/host_device.h"

namespace embedgrad {

enum class GgufBlock : int32_t { q4_0, q4_1, q8_0 };

}  // namespace embedgrad

extern "C" {

// blocks [rows, count] as in the file, rows `row_bytes` apart; `kind` is a GgufBlock. Scales and offsets (q4_1 only,
// else null) stay float16.
//
//     Q8_0         elements [rows, 32 · count], scales [rows, count]
//     Q4_0, Q4_1   elements [rows, 16 · even], scales and offsets [rows, even]; even = count rounded up to an even
//                  number, and the added block is 0
EMBEDGRAD_API void embedgrad_repack(
    int32_t kind, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, uint8_t* elements,
    uint16_t* scales, uint16_t* offsets);
}
