// Views of tensors, and how their numbers are stored. Sums are float32 or wider whatever the storage.
#pragma once

#include <cstdint>

namespace embedgrad {

struct Bf16 {  // the upper half of a float32; stores round to the nearest, ties to even
    uint16_t bits;
};

// [n, d]: the numbers of a row are contiguous, rows are `stride` elements apart.
template <typename T>
struct Rows {
    T* data;
    int64_t stride;

    T* at(int64_t t) const { return data + t * stride; }
};

// [n, heads, head_dim]: the heads of a token are contiguous, tokens are `stride` elements apart.
template <typename T>
struct Heads {
    T* data;
    int64_t stride;
};

}  // namespace embedgrad
