// Products of frozen matrices with a few rows of activations: y [batch, rows] = x [batch, columns] Wᵀ + bias.
//
// Matrices in float types are multiplied in float32. The others are multiplied as they are stored, with activations
// rounded to int8: each group of 32 activations becomes signed bytes q_x and a scale (the largest magnitude / 127). A
// quant group's share of a dot product is then
//
//     Σ w x ≈ scale_w · scale_x · Σ q_w q_x + offset_w · scale_x · Σ q_x
//
// with exact integer sums. Besides float32 rounding, the only error is that of rounding the activations: at most
// scale_x / 2 per element.
//
// A row of y does not depend on the other rows of x, to the bit: the order of its sums is the same for every batch.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.h"

namespace embedgrad {

// The layouts of rounded activations; README.md draws them.
//
//   kUnits, kSplitUnits      for products_plain_avx2.inl. In kSplitUnits the second half of the columns begins at a
//                            whole unit, because a byte of an int4 row holds an element of each half.
//   kGroups                  for products_avx512vnni.inl, and for one or two activation rows in products_avx2.inl
//   kByteLanes, kPairLanes   for more activation rows in products_avx2.inl: int4 and int8
enum Layout : int32_t { kUnits = 1, kSplitUnits = 2, kGroups = 4, kByteLanes = 8, kPairLanes = 16 };

// A group of an activation row in kGroups: x ≈ scale · bytes and sum = scale · Σ bytes. `excess` is −128 · Σ bytes of
// each half of the group: VNNI multiplies by w + 128, and adding `excess` gives the product with w.
struct QuantizedGroup {
    int8_t bytes[kQuantGroup];
    float scale, sum;
    int32_t excess[2];
};

// Eight activation rows side by side, group by group. A vector of 32 bytes has 32 bits of each row:
//
//   kByteLanes   four bytes, the columns 4 i to 4 i + 3
//   kPairLanes   two 16-bit numbers: the columns 4 i + 1 and 4 i + 3, and in the next vector 4 i and 4 i + 2
//
// Behind the columns come a vector of the rows' scales, one of scale · Σ bytes and, in kPairLanes, one of −Σ x_{2j}
// x_{2j+1}. kByteLanes has the groups in the order of an int4 row: each group of the first half of the columns, then
// its partner of the second half. kPairLanes has them in the order of the columns.
struct Lanes {
    static constexpr int64_t kRows = 8;
    static constexpr int64_t kByteGroup = kRows * (kQuantGroup + 2 * 4);      // bytes of a group in kByteLanes
    static constexpr int64_t kPairGroup = kRows * (2 * kQuantGroup + 3 * 4);  // and in kPairLanes

    int64_t group_bytes, groups;
    std::vector<uint8_t> memory;
    uint8_t* first;

    Lanes(int64_t batch, int64_t groups, int64_t group_bytes);
    Lanes(const Lanes&) = delete;
    int64_t stride() const { return groups * group_bytes; }  // from eight rows to the next eight
    uint8_t* at(int64_t b) const { return first + b / kRows * stride(); }
};

// Rows of activations in float32 and, for quantised matrices, in int8.
//
// kUnits has units of 64 columns of one row: 64 bytes, then the scales of its two groups, each eight times, as the
// kernels multiply by vectors of eight. The units of eight rows are interleaved, so that a kernel reads memory in one
// stream. Behind the columns all bytes and scales are 0.
class Activations {
public:
    static constexpr int64_t kInterleaved = 8, kUnit = 64, kUnitBytes = 2 * kUnit;

    Activations(int64_t batch, int64_t columns);

    int64_t columns() const { return columns_; }
    float* row(int64_t b) { return x_.data() + b * columns_; }
    const float* row(int64_t b) const { return x_.data() + b * columns_; }

    // Rounds the columns [begin, end) of row b into each of the `layouts`; `begin` is a multiple of kQuantGroup.
    void quantise(int64_t b, int32_t layouts, int64_t begin, int64_t end);
    void quantise(int64_t b, int32_t layouts) { quantise(b, layouts, 0, columns_); }

    // Row b's first unit. The row's next unit is kInterleaved · kUnitBytes further, that of row b + 1 kUnitBytes
    // further.
    const uint8_t* units(Layout layout, int64_t b) const { return const_cast<Activations*>(this)->at(layout, b); }
    // From units() of kSplitUnits to the unit where the second half of the columns begins.
    int64_t second_half() const { return half_units_ * kInterleaved * kUnitBytes; }
    // Row b in kGroups.
    const QuantizedGroup* groups(int64_t b) const { return groups_.data() + b * 2 * half_groups_; }
    const Lanes& byte_lanes() const { return byte_lanes_; }
    const Lanes& pair_lanes() const { return pair_lanes_; }
    // scale · Σ bytes of each group of row b; 0 behind the last group.
    const float* sums(int64_t b) const { return sums_.data() + b * sums_stride_; }
    int64_t sums_stride() const { return sums_stride_; }

private:
    uint8_t* at(Layout layout, int64_t b) {
        const int64_t units = layout == kUnits ? half_groups_ : 2 * half_units_;
        return (layout == kUnits ? units_ : split_units_) +
               (b / kInterleaved * units * kInterleaved + b % kInterleaved) * kUnitBytes;
    }

    int64_t columns_, half_groups_, half_units_, sums_stride_;
    std::vector<float> x_, sums_;
    std::vector<QuantizedGroup> groups_;
    Lanes byte_lanes_, pair_lanes_;
    std::vector<uint8_t> memory_;
    uint8_t *units_, *split_units_;
};

// The layouts in which the matrix reads `batch` rows of activations; 0: none.
int32_t layouts(const Matrix&, int64_t batch);

// Columns [begin, end) of y (these rows of the matrix) for the activation rows 0 to batch − 1:
// y[target[b] · y_stride + n] = Σ w x + bias, plus the old value where `add`. A null target means target[b] = b. The
// activations must be quantised in layouts(matrix, batch).
void linear(
    const Matrix&, const Activations&, int64_t batch, const int32_t* target, float* y, int64_t y_stride, bool add,
    int64_t begin, int64_t end);

// out [columns] = a row of the matrix in float32.
void read_row(const Matrix&, int64_t row, float* out);

}  // namespace embedgrad
