#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/isa.h"

namespace embedgrad {

constexpr int64_t kFewRows = 2;  // up to so many activation rows, products_avx2.inl assigns lanes to matrix rows

constexpr int64_t kLine = 64;  // bytes of a cache line

// The first whole cache line of `memory`, which is one line larger than needed.
static uint8_t* first_line(std::vector<uint8_t>& memory) {
    return memory.data() + (kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine) % kLine;
}

// Scratch memory of this thread, aligned to a cache line. A call invalidates what an earlier call returned.
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
    int64_t y_stride;
    const float* bias;  // of the part's first matrix row, or null
    bool add;

    // The columns [n, n + count) of activation row b; value i is values[i · step].
    void put(int64_t b, int64_t n, const float* values, int64_t step, int64_t count) const {
        float* place = y + (target ? target[b] : b) * y_stride + n;
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

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Lanes::Lanes(int64_t batch, int64_t groups, int64_t group_bytes)
    : group_bytes(group_bytes),
      groups(groups),
      memory(round_up(batch, kRows) / kRows * groups * group_bytes + kLine),
      first(first_line(memory)) {}

Activations::Activations(int64_t batch, int64_t columns)
    : columns_(columns),
      half_groups_(round_up(columns, 2 * kQuantGroup) / (2 * kQuantGroup)),
      half_units_(round_up(half_groups_, 2) / 2),
      sums_stride_(round_up(2 * half_groups_, 16)),
      x_(batch * columns),
      sums_(batch * sums_stride_),
      groups_(batch * 2 * half_groups_),
      byte_lanes_(batch, 2 * half_groups_, Lanes::kByteGroup),
      pair_lanes_(batch, 2 * half_groups_, Lanes::kPairGroup) {
    const int64_t tiles = round_up(batch, kInterleaved) * kUnitBytes;
    memory_.resize(tiles * (half_groups_ + 2 * half_units_) + kLine);
    units_ = first_line(memory_);
    split_units_ = units_ + tiles * half_groups_;
}

void Activations::quantise(int64_t b, int32_t layouts, int64_t begin, int64_t end) {
    if (!layouts) return;
    for (int64_t from = begin; from < end; from += kQuantGroup) {
        const int64_t g = from / kQuantGroup, count = std::min(kQuantGroup, end - from);
        int8_t bytes[kQuantGroup];
        float scale, halves[2];
        EMBEDGRAD_DISPATCH(quantise_group, row(b) + from, count, bytes, scale, halves)
        const float sum = sums_[b * sums_stride_ + g] = scale * (halves[0] + halves[1]);
        const auto put = [&](uint8_t* first, int64_t place) {
            uint8_t* unit = first + place / 2 * kInterleaved * kUnitBytes;
            std::memcpy(unit + place % 2 * kQuantGroup, bytes, kQuantGroup);
            float scales[8];
            std::fill(scales, scales + 8, scale);
            std::memcpy(unit + kUnit + place % 2 * sizeof scales, scales, sizeof scales);
        };
        const auto number = [&](uint8_t* numbers, int64_t which, const auto& x) {
            std::memcpy(numbers + (which * Lanes::kRows + b % Lanes::kRows) * 4, &x, 4);
        };
        if (layouts & kGroups) {
            QuantizedGroup& to = groups_[b * 2 * half_groups_ + g];
            std::memcpy(to.bytes, bytes, kQuantGroup);
            to.scale = scale, to.sum = sum;
            for (int half = 0; half < 2; ++half) to.excess[half] = -128 * static_cast<int32_t>(halves[half]);
        }
        if (layouts & kByteLanes) {
            const int64_t place = g < half_groups_ ? 2 * g : 2 * (g - half_groups_) + 1;
            uint8_t* to = byte_lanes_.at(b) + place * Lanes::kByteGroup;
            for (int64_t i = 0; i < kQuantGroup / 4; ++i)
                std::memcpy(to + (i * Lanes::kRows + b % Lanes::kRows) * 4, bytes + 4 * i, 4);
            number(to + Lanes::kRows * kQuantGroup, 0, scale), number(to + Lanes::kRows * kQuantGroup, 1, sum);
        }
        if (layouts & kPairLanes) {
            uint8_t* to = pair_lanes_.at(b) + g * Lanes::kPairGroup;
            int32_t pairs = 0;
            for (int64_t i = 0; i < kQuantGroup; i += 4) {
                const int16_t odd[2] = {bytes[i + 1], bytes[i + 3]}, even[2] = {bytes[i], bytes[i + 2]};
                std::memcpy(to + (i / 2 * Lanes::kRows + b % Lanes::kRows) * 4, odd, 4);
                std::memcpy(to + ((i / 2 + 1) * Lanes::kRows + b % Lanes::kRows) * 4, even, 4);
                pairs -= bytes[i] * bytes[i + 1] + bytes[i + 2] * bytes[i + 3];
            }
            uint8_t* numbers = to + 2 * Lanes::kRows * kQuantGroup;
            number(numbers, 0, scale), number(numbers, 1, sum), number(numbers, 2, pairs);
        }
        const bool second = g >= half_groups_;
        if (layouts & kUnits) put(at(kUnits, b), g);
        if (layouts & kSplitUnits)
            put(at(kSplitUnits, b) + (second ? second_half() : 0), second ? g - half_groups_ : g);
    }
}

int32_t layouts(const Matrix& matrix, int64_t batch) {
    const bool vnni = isa() == Isa::avx512vnni, avx2 = isa() == Isa::avx2 || isa() == Isa::avx512;
    const bool few = batch <= kFewRows;
    int32_t found = 0;
    for (int32_t i = 0; i < matrix.num_parts; ++i) {
        const Stored stored = matrix.parts[i].stored;
        if (stored < Stored::int8) continue;
        if (vnni)
            found |= kGroups;
        else if (stored == Stored::int4)
            found |= !avx2 ? kSplitUnits : few ? kGroups : kByteLanes;
        else
            found |= !avx2 || stored != Stored::int8 ? kUnits : few ? kGroups : kPairLanes;
    }
    return found;
}

void linear(
    const Matrix& matrix, const Activations& x, int64_t batch, const int32_t* target, float* y, int64_t y_stride,
    bool add, int64_t begin, int64_t end) {
    if (batch == 0) return;
    int64_t first = 0;
    for (int32_t i = 0; i < matrix.num_parts; ++i) {
        const Part& part = matrix.parts[i];
        const int64_t from = std::max(begin, first) - first, to = std::min(end, first + part.rows) - first;
        if (from < to) {
            const float* bias = matrix.bias ? matrix.bias + first : nullptr;
            const Output out = {target, y + first, y_stride, bias, add};
#if defined(__x86_64__)
            // Quantised products have no kernel for AVX-512 without VNNI; such a machine runs the AVX2 kernel.
            if (part.stored >= Stored::int8 && isa() == Isa::avx512)
                avx2::linear_part(part, x, batch, from, to, out);
            else
#endif
                EMBEDGRAD_DISPATCH_VNNI(linear_part, part, x, batch, from, to, out)
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
