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

// A group of an activation row: x ≈ scale · bytes and sum = scale · Σ bytes. sums: Σ bytes of each half.
struct QuantizedGroup {
    int8_t bytes[kQuantGroup];
    float scale, sum;
    int32_t sums[2];
};

// Rows of activations in float32 and, for quantised matrices, in int8.
class Activations {
public:
    Activations(int64_t batch, int64_t columns);

    int64_t columns() const { return columns_; }
    float* row(int64_t b) { return x_.data() + b * columns_; }
    const float* row(int64_t b) const { return x_.data() + b * columns_; }

    // Rounds the columns [begin, end) of row b; `begin` is a multiple of kQuantGroup.
    void quantise(int64_t b, int64_t begin, int64_t end);
    void quantise(int64_t b) { quantise(b, 0, columns_); }

    const QuantizedGroup* groups(int64_t b) const { return groups_.data() + b * row_groups_; }

private:
    int64_t columns_, row_groups_;
    std::vector<float> x_;
    std::vector<QuantizedGroup> groups_;
};

// Whether the matrix is multiplied by quantised activations, in all of it or in some of its parts.
bool takes_quantised(const Matrix&);

// Columns [begin, end) of y (these rows of the matrix) for the activation rows 0 to batch − 1:
// y[target[b] · y_stride + n] = Σ w x + bias, plus the old value where `add`. A null target means target[b] = b. The
// activations must be quantised where takes_quantised(matrix). Quantised parts must be tiles.
void linear(
    const Matrix&, const Activations&, int64_t batch, const int32_t* target, float* y, int64_t y_stride, bool add,
    int64_t begin, int64_t end);

// out [end − begin, columns] = the rows [begin, end) of the matrix in float32.
void read_rows(const Matrix&, int64_t begin, int64_t end, float* out);

}  // namespace embedgrad
