#include "repack.h"

#include <algorithm>
#include <cstring>

#include "../cpu/isa.h"

namespace embedgrad {

#define EMBEDGRAD_KERNELS "../decode/repack.inl"
#include "../cpu/per_isa.inl"

void repack(
    Stored stored, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t columns, uint8_t* out, int64_t begin,
    int64_t end) {
    EMBEDGRAD_DISPATCH(fill_tiles, stored, blocks, row_bytes, rows, columns, out, begin, end)
}

void read_quantised(const Part& part, int64_t begin, int64_t end, int64_t columns, float* out) {
    EMBEDGRAD_DISPATCH(read_part, part, begin, end, columns, out)
}

}  // namespace embedgrad
