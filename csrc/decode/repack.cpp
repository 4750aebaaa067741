#include "repack.h"

#include <cstring>

namespace embedgrad {
namespace {

constexpr int64_t kNibbleBytes = 16;  // bytes of a block's 32 nibbles

// Elements of two blocks that lie in the first and in the second half of the columns. second: null where it is missing.
void pair_blocks(const uint8_t* first, const uint8_t* second, uint8_t* to) {
    uint8_t zeros[kNibbleBytes] = {};
    if (!second) second = zeros;
    for (int64_t i = 0; i < kNibbleBytes; ++i) {
        to[i] = static_cast<uint8_t>((first[i] & 15) | (second[i] & 15) << 4);
        to[kNibbleBytes + i] = static_cast<uint8_t>(first[i] >> 4 | (second[i] & 0xf0));
    }
}

void int4_row(const uint8_t* blocks, int64_t count, int64_t header, uint8_t* to, uint16_t* scales, uint16_t* offsets) {
    const int64_t half = (count + 1) / 2, size = header + kNibbleBytes;
    for (int64_t b = 0; b < half; ++b, to += 2 * kNibbleBytes) {
        const uint8_t* second = half + b < count ? blocks + (half + b) * size + header : nullptr;
        pair_blocks(blocks + b * size + header, second, to);
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
            int4_row(
                blocks, count, block == GgufBlock::q4_1 ? 4 : 2, elements + r * even * kNibbleBytes, scales + r * even,
                offsets ? offsets + r * even : nullptr);
            continue;
        }
        for (int64_t b = 0; b < count; ++b) {
            std::memcpy(scales + r * count + b, blocks + b * 34, 2);
            std::memcpy(elements + (r * count + b) * 32, blocks + b * 34 + 2, 32);
        }
    }
}
