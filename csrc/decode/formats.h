// How quantised matrices are stored: one descriptor for each type, and the layout in memory that follows from it.
//
// An element is w = scale · (q − zero) + offset with a small unsigned integer q, whose bits may lie in two planes. 16 or
// 32 neighbouring columns of a matrix row share a scale. In some types scale and offset are float numbers; in others a
// super-block of 256 columns has float numbers, and its groups have integer sub-scales to multiply them by.
//
// repack() brings a file's blocks into tiles of 16 matrix rows with the same number of bits, and the products read
// nothing else. README.md draws a tile:
//
//     numbers   [super-blocks] [numbers] [16 rows]           float16 or float32, padded to 64 bytes
//     body      [super-blocks]:
//       codes   [codes] [16 rows]                            32-bit words with sub-scales, as they are in the file
//       planes  [groups of 32 columns] [low + high] [64 bytes]
//
// A vector of 64 bytes has four bytes of each of the 16 rows. In a plane of b bits each of these bytes holds 8 / b
// elements: vector v of the plane has the columns 4 i to 4 i + 3 for i = v + b k, in the bits b k to b k + b − 1.
#pragma once

#include <cstdint>

namespace embedgrad {

// The types of a matrix's elements. q4_0 to iq4_xs are GGUF's. int8 and int4 are ours: q8_0 and q4_1 with float32
// numbers; int8_16 has a float32 scale for each 16 columns.
enum class Stored : int32_t {
    f32, bf16, f16,
    q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, iq4_xs,
    int8, int8_16, int4
};

constexpr Stored kFirstQuantised = Stored::q4_0;
constexpr int64_t kQuantGroup = 32;  // columns that share a scale of the activations
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileVector = 4 * kTileRows;  // bytes
constexpr int64_t kChunkGroups = 8;             // quant groups that are unpacked at once: a super-block of 256 columns

struct Format {
    int low, high;     // bits of an element in the low and in the high plane
    int zero;
    int group;         // columns that share a scale
    int super;         // columns of a super-block, or of a group where there are none
    int numbers;       // float numbers of a row of a super-block
    int number_bytes;
    int codes;         // 32-bit words with sub-scales of a row of a super-block
    bool offsets;
    bool table;        // q is an index into kTable
    int block_bytes;   // of a row of a super-block in the file

    constexpr int bits() const { return table ? 8 : low + high; }  // of q
    constexpr int64_t group_bytes() const { return kTileVector * (low + high); }
    constexpr int64_t body_bytes() const { return codes * kTileVector + super / kQuantGroup * group_bytes(); }
    constexpr int64_t number_row_bytes() const { return int64_t{numbers} * number_bytes * kTileRows; }
    constexpr int64_t supers(int64_t columns) const { return (columns + super - 1) / super; }
    constexpr int64_t head_bytes(int64_t columns) const {
        return (supers(columns) * number_row_bytes() + kTileVector - 1) / kTileVector * kTileVector;
    }
    constexpr int64_t tile_bytes(int64_t columns) const { return head_bytes(columns) + supers(columns) * body_bytes(); }
};

// llama.cpp's ggml-common.h defines the blocks of its types.
constexpr Format format(Stored stored) {
    switch (stored) {
        //                         low hi zero group super numbers codes offsets table bytes
        case Stored::q4_0: return {4, 0, 8, 32, 32, 1, 2, 0, false, false, 18};
        case Stored::q4_1: return {4, 0, 0, 32, 32, 2, 2, 0, true, false, 20};
        case Stored::q5_0: return {4, 1, 16, 32, 32, 1, 2, 0, false, false, 22};
        case Stored::q5_1: return {4, 1, 0, 32, 32, 2, 2, 0, true, false, 24};
        case Stored::q8_0: return {8, 0, 128, 32, 32, 1, 2, 0, false, false, 34};
        case Stored::q2_k: return {2, 0, 0, 16, 256, 2, 2, 4, true, false, 84};
        case Stored::q3_k: return {2, 1, 4, 16, 256, 1, 2, 3, false, false, 110};
        case Stored::q4_k: return {4, 0, 0, 32, 256, 2, 2, 3, true, false, 144};
        case Stored::q5_k: return {4, 1, 0, 32, 256, 2, 2, 3, true, false, 176};
        case Stored::q6_k: return {4, 2, 32, 16, 256, 1, 2, 4, false, false, 210};
        case Stored::iq4_nl: return {4, 0, 128, 32, 32, 1, 2, 0, false, true, 18};
        case Stored::iq4_xs: return {4, 0, 128, 32, 256, 2, 2, 1, false, true, 136};
        case Stored::int8: return {8, 0, 128, 32, 32, 1, 4, 0, false, false, 36};
        case Stored::int8_16: return {8, 0, 128, 16, 32, 2, 4, 0, false, false, 40};
        case Stored::int4: return {4, 0, 0, 32, 32, 2, 4, 0, true, false, 24};
        default: return {};
    }
}

// What q stands for in iq4_nl and iq4_xs, plus their zero.
constexpr uint8_t kTable[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace embedgrad
