// Products of frozen matrices with a few rows of activations: y [B, rows] = x [B, columns] Wᵀ + bias.
//
// Matrices in float types are multiplied in float32. Those in int8 and int4 are multiplied as they are stored: each
// group of 32 activations becomes signed bytes and a scale (the largest magnitude / 127), so that a group's share of a
// dot product is
//
//     Σ w x ≈ scale_w · scale_x · Σ q_w q_x + offset_w · scale_x · Σ q_x            exact integers inside a group
//
// Its error is that of rounding the activations: per element at most scale_x / 2.
//
// A row of y does not depend on the other rows of x, to the bit: each is summed in the same order however many there are.
#pragma once

#include <cstdint>
#include <vector>

#include "crew.h"
#include "matrix.h"

namespace embedgrad {

// The orders in which activations are laid out for matrices in blocks:
//
//   kPlain, kSplit      for one_row.inl; split: as int4 needs them, whose second half of the columns begins at a whole
//                       unit, because one byte of its rows holds an element of either half
//   kBytes              group by group, for sixteen_rows.inl, and for a row or two in eight_rows.inl
//   kLanes, kNeighbours eight rows side by side, for more of them in eight_rows.inl
enum Order : int32_t { kPlain = 1, kSplit = 2, kBytes = 4, kLanes = 8, kNeighbours = 16 };

// A group of a row: x ≈ scale · bytes, sum = scale · Σ bytes, and −128 · Σ bytes of either half: what Σ (w + 128) · bytes
// counts too much.
struct GroupOfBytes {
    int8_t bytes[kGroup];
    float scale, sum;
    int32_t excess[2];
};

// Eight rows of activations side by side, group by group: of every four columns the bytes of one row after the other, or
// as numbers of 16 bits the second and the fourth column and behind them, of all rows, the first and the third. Behind
// those the eight scales, scale · Σ bytes and, for 16 bits, minus the sums over pairs of columns of their products.
//
// Groups stand in the order in which an int4 row holds them, that of the other half of the columns behind each, or, for
// 16 bits, in that of the columns.
struct Lanes {
    static constexpr int64_t kRows = 8, kBytes = kRows * (kGroup + 2 * 4), kNeighbours = kRows * (2 * kGroup + 3 * 4);

    int64_t group_bytes, groups;
    std::vector<uint8_t> memory;
    uint8_t* first;

    Lanes(int64_t rows, int64_t groups, int64_t group_bytes);
    Lanes(const Lanes&) = delete;
    int64_t apart() const { return groups * group_bytes; }
    uint8_t* at(int64_t b) const { return first + b / kRows * apart(); }
};

// Rows of activations, in float32 and, for matrices in blocks, in bytes.
//
// Bytes stand in units of 64 elements followed by their two scales, each of them eight times as the kernels multiply by
// them; the units of eight rows are interleaved, so that a kernel reads one stretch of memory. Behind the columns all is
// 0.
class Activations {
public:
    static constexpr int64_t kTogether = 8, kUnit = 64, kUnitBytes = 2 * kUnit;

    Activations(int64_t rows, int64_t columns);

    int64_t columns() const { return columns_; }
    float* row(int64_t b) { return x_.data() + b * columns_; }
    const float* row(int64_t b) const { return x_.data() + b * columns_; }

    // Bytes and scales of row b, from its floats, in each of the `orders`: of the columns [begin, end), where whole
    // groups begin.
    void quantise(int64_t b, int32_t orders, int64_t begin, int64_t end);
    void quantise(int64_t b, int32_t orders) { quantise(b, orders, 0, columns_); }

    // Row b's first unit; its next one is kTogether · kUnitBytes further, row b + 1's is kUnitBytes further.
    const uint8_t* units(Order order, int64_t b) const { return const_cast<Activations*>(this)->at(order, b); }
    // From units() of kSplit to the unit where the second half of the columns begins.
    int64_t second_half() const { return half_units_ * kTogether * kUnitBytes; }
    // Row b in kBytes.
    const GroupOfBytes* groups(int64_t b) const { return groups_.data() + b * 2 * half_groups_; }
    const Lanes& lanes(bool bytes) const { return bytes ? lanes_ : neighbours_; }
    // scale · Σ bytes of each group of row b, 0 behind the last one.
    const float* sums(int64_t b) const { return sums_.data() + b * sums_row_; }
    int64_t sums_row() const { return sums_row_; }

private:
    uint8_t* at(Order order, int64_t b) {
        const int64_t units = order == kPlain ? half_groups_ : 2 * half_units_;
        return (order == kPlain ? plain_ : split_) + (b / kTogether * units * kTogether + b % kTogether) * kUnitBytes;
    }

    int64_t columns_, half_groups_, half_units_, sums_row_;
    std::vector<float> x_, sums_;
    std::vector<GroupOfBytes> groups_;
    Lanes lanes_, neighbours_;
    std::vector<uint8_t> memory_;
    uint8_t *plain_, *split_;
};

// Which orders a matrix reads so many activations in; 0: none.
int32_t orders(const Matrix&, int64_t rows);

// Rows [begin, end) of y for activations 0 to `rows` − 1: y[target[b] · y_row + n] = …, plus what is there already
// where `add`. target null: b. Activations must be quantised in orders(matrix, rows).
void linear(
    const Matrix&, const Activations&, int64_t rows, const int32_t* target, float* y, int64_t y_row, bool add,
    int64_t begin, int64_t end);

// Row `row` of the matrix in float32: out [columns].
void read_row(const Matrix&, int64_t row, float* out);

}  // namespace embedgrad
