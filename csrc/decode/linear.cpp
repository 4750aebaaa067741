#include "linear.h"

#include <cmath>
#include <cstring>

#include "../cpu/isa.h"

namespace embedgrad {

// Rows of activations that eight_rows.inl multiplies as rows.
constexpr int64_t kFew = 2;

constexpr int64_t kLine = 64;  // bytes of a cache line

// The first whole line of the memory, which has one line more than is needed.
static uint8_t* first_line(std::vector<uint8_t>& memory) {
    return memory.data() + (kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine) % kLine;
}

// Whole cache lines of this thread's; what an earlier call gave is gone.
static uint8_t* thread_memory(int64_t bytes) {
    thread_local std::vector<uint8_t> memory;
    if (memory.size() < static_cast<size_t>(bytes + kLine)) memory.resize(bytes + kLine);
    return first_line(memory);
}

namespace {

// Where a part's products go.
struct Output {
    const int32_t* target;
    float* y;
    int64_t row;
    const float* bias;  // of the part's first row, or null
    bool add;

    // The columns [n, n + count) of activation b; the values stand `step` apart.
    void put(int64_t b, int64_t n, const float* values, int64_t step, int64_t count) const {
        float* place = y + (target ? target[b] : b) * row + n;
        if (!add && !bias) {
            for (int64_t i = 0; i < count; ++i) place[i] = values[i * step];
            return;
        }
        for (int64_t i = 0; i < count; ++i)
            place[i] = (add ? place[i] : 0.0f) + (values[i * step] + (bias ? bias[n + i] : 0.0f));
    }
};

}  // namespace

#define EMBEDGRAD_WITH_VNNI
#define EMBEDGRAD_KERNELS "../decode/linear.inl"
#include "../cpu/per_isa.inl"

namespace {

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Lanes::Lanes(int64_t rows, int64_t groups, int64_t group_bytes)
    : group_bytes(group_bytes),
      groups(groups),
      memory(up(rows, kRows) / kRows * groups * group_bytes + kLine),
      first(first_line(memory)) {}

Activations::Activations(int64_t rows, int64_t columns)
    : columns_(columns),
      half_groups_(up(columns, 2 * kGroup) / (2 * kGroup)),
      half_units_(up(half_groups_, 2) / 2),
      sums_row_(up(2 * half_groups_, 16)),
      x_(rows * columns),
      sums_(rows * sums_row_),
      groups_(rows * 2 * half_groups_),
      lanes_(rows, 2 * half_groups_, Lanes::kBytes),
      neighbours_(rows, 2 * half_groups_, Lanes::kNeighbours) {
    const int64_t tiles = up(rows, kTogether) * kUnitBytes;
    memory_.resize(tiles * (half_groups_ + 2 * half_units_) + kLine);
    plain_ = first_line(memory_);
    split_ = plain_ + tiles * half_groups_;
}

void Activations::quantise(int64_t b, int32_t orders, int64_t begin, int64_t end) {
    if (!orders) return;
    for (int64_t from = begin; from < end; from += kGroup) {
        const int64_t g = from / kGroup, count = std::min(kGroup, end - from);
        int8_t bytes[kGroup];
        float scale, halves[2];
        EMBEDGRAD_DISPATCH(quantise_group, row(b) + from, count, bytes, scale, halves)
        const float sum = sums_[b * sums_row_ + g] = scale * (halves[0] + halves[1]);
        const auto put = [&](uint8_t* first, int64_t place) {
            uint8_t* unit = first + place / 2 * kTogether * kUnitBytes;
            std::memcpy(unit + place % 2 * kGroup, bytes, kGroup);
            float scales[8];
            std::fill(scales, scales + 8, scale);
            std::memcpy(unit + kUnit + place % 2 * sizeof scales, scales, sizeof scales);
        };
        const auto number = [&](uint8_t* numbers, int64_t which, const auto& x) {
            std::memcpy(numbers + (which * Lanes::kRows + b % Lanes::kRows) * 4, &x, 4);
        };
        if (orders & kBytes) {
            GroupOfBytes& to = groups_[b * 2 * half_groups_ + g];
            std::memcpy(to.bytes, bytes, kGroup);
            to.scale = scale, to.sum = sum;
            for (int half = 0; half < 2; ++half) to.excess[half] = -128 * static_cast<int32_t>(halves[half]);
        }
        if (orders & kLanes) {
            const int64_t place = g < half_groups_ ? 2 * g : 2 * (g - half_groups_) + 1;
            uint8_t* to = lanes_.at(b) + place * Lanes::kBytes;
            for (int64_t i = 0; i < kGroup / 4; ++i) std::memcpy(to + (i * Lanes::kRows + b % Lanes::kRows) * 4, bytes + 4 * i, 4);
            number(to + Lanes::kRows * kGroup, 0, scale), number(to + Lanes::kRows * kGroup, 1, sum);
        }
        if (orders & kNeighbours) {
            uint8_t* to = neighbours_.at(b) + g * Lanes::kNeighbours;
            int32_t squares = 0;
            for (int64_t i = 0; i < kGroup; i += 4) {
                const int16_t odd[2] = {bytes[i + 1], bytes[i + 3]}, even[2] = {bytes[i], bytes[i + 2]};
                std::memcpy(to + (i / 2 * Lanes::kRows + b % Lanes::kRows) * 4, odd, 4);
                std::memcpy(to + ((i / 2 + 1) * Lanes::kRows + b % Lanes::kRows) * 4, even, 4);
                squares -= bytes[i] * bytes[i + 1] + bytes[i + 2] * bytes[i + 3];
            }
            uint8_t* numbers = to + 2 * Lanes::kRows * kGroup;
            number(numbers, 0, scale), number(numbers, 1, sum), number(numbers, 2, squares);
        }
        if (orders & kPlain) put(at(kPlain, b), g);
        if (orders & kSplit) put(at(kSplit, b) + (g < half_groups_ ? 0 : second_half()), g < half_groups_ ? g : g - half_groups_);
    }
}

int32_t orders(const Matrix& matrix, int64_t rows) {
    const bool sixteen_rows = isa() == Isa::avx512vnni, few = rows <= kFew;
    const bool eight_rows = isa() == Isa::avx2 || isa() == Isa::avx512;
    int32_t found = 0;
    for (int32_t i = 0; i < matrix.num_parts; ++i) {
        const Stored stored = matrix.parts[i].stored;
        if (stored < Stored::int8) continue;
        if (sixteen_rows)
            found |= kBytes;
        else if (stored == Stored::int4)
            found |= !eight_rows ? kSplit : few ? kBytes : kLanes;
        else
            found |= !eight_rows || stored != Stored::int8 ? kPlain : few ? kBytes : kNeighbours;
    }
    return found;
}

void linear(
    const Matrix& matrix, const Activations& x, int64_t rows, const int32_t* target, float* y, int64_t y_row, bool add,
    int64_t begin, int64_t end) {
    if (rows == 0) return;
    int64_t first = 0;
    for (int32_t i = 0; i < matrix.num_parts; ++i) {
        const Part& part = matrix.parts[i];
        const int64_t from = std::max(begin, first) - first, to = std::min(end, first + part.rows) - first;
        if (from < to) {
            const float* bias = matrix.bias ? matrix.bias + first : nullptr;
            const Output out = {target, y + first, y_row, bias, add};
#if defined(__x86_64__)
            if (part.stored >= Stored::int8 && isa() == Isa::avx512)
                avx2::linear_part(part, x, rows, from, to, out);
            else
#endif
                EMBEDGRAD_DISPATCH_VNNI(linear_part, part, x, rows, from, to, out)
        }
        first += part.rows;
    }
}

void read_row(const Matrix& matrix, int64_t row, float* out) {
    for (int32_t i = 0; i < matrix.num_parts; row -= matrix.parts[i++].rows)
        if (row < matrix.parts[i].rows) {
            EMBEDGRAD_DISPATCH(read_part_row, matrix.parts[i], row, matrix.columns, out)
            return;
        }
}

}  // namespace embedgrad
