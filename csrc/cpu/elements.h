// What numbers are stored in. Sums are float32 (or wider) whatever the storage.
#pragma once

#include <cstdint>

namespace embedgrad {

struct Bf16 {  // the upper half of a float32; numbers are rounded to it to the nearest, ties to even
    uint16_t bits;
};

template <typename T>
struct Rows {
    T* data;
    int64_t row;  // distance of rows, in elements; the elements of a row are contiguous

    T* at(int64_t t) const { return data + t * row; }
};

}  // namespace embedgrad
