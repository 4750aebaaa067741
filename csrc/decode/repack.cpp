#include "repack.h"

#include <cstring>

namespace embedgrad {
namespace {

constexpr int64_t kHalf = 16;  // bytes of a block of 32 halves

// The elements of blocks `low` and `high` (null: none), which belong to the two halves of the columns.
void pair(const uint8_t* low, const uint8_t* high, uint8_t* to) {
    uint8_t nothing[kHalf] = {};
    if (!high) high = nothing;
    for (int64_t i = 0; i < kHalf; ++i) {
        to[i] = static_cast<uint8_t>((low[i] & 15) | (high[i] & 15) << 4);
        to[kHalf + i] = static_cast<uint8_t>(low[i] >> 4 | (high[i] & 0xf0));
    }
}

void int4_row(const uint8_t* blocks, int64_t count, int64_t header, uint8_t* to, uint16_t* scales, uint16_t* offsets) {
    const int64_t half = (count + 1) / 2, size = header + kHalf;
    for (int64_t b = 0; b < half; ++b, to += 2 * kHalf) {
        const uint8_t* high = half + b < count ? blocks + (half + b) * size + header : nullptr;
        pair(blocks + b * size + header, high, to);
    }
    for (int64_t b = 0; b < 2 * half; ++b) {
        scales[b] = 0;
        if (offsets) offsets[b] = 0;
        if (b >= count) continue;
        std::memcpy(scales + b, blocks + b * size, 2);
        if (offsets) std::memcpy(offsets + b, blocks + b * size + 2, 2);
    }
}

}  // namespace
}  // namespace embedgrad

void embedgrad_repack(
    int32_t kind, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t count, uint8_t* elements,
    uint16_t* scales, uint16_t* offsets) {
    using namespace embedgrad;
    const auto block = static_cast<GgufBlock>(kind);
    const int64_t even = (count + 1) / 2 * 2;
    for (int64_t r = 0; r < rows; ++r, blocks += row_bytes) {
        if (block != GgufBlock::q8_0) {
            uint16_t* to = offsets ? offsets + r * even : nullptr;
            int4_row(blocks, count, block == GgufBlock::q4_1 ? 4 : 2, elements + r * even * kHalf, scales + r * even, to);
            continue;
        }
        for (int64_t b = 0; b < count; ++b) {
            std::memcpy(scales + r * count + b, blocks + b * 34, 2);
            std::memcpy(elements + (r * count + b) * 32, blocks + b * 34 + 2, 32);
        }
    }
}
