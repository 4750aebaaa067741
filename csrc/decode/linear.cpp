#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../cpu/isa.h"
#include "repack.h"

namespace embedgrad {

constexpr int64_t kLine = 64;  // bytes of a cache line

// Scratch memory of this thread, aligned to a cache line. A call invalidates what an earlier call returned.
static uint8_t* thread_memory(int64_t bytes) {
    thread_local std::vector<uint8_t> memory;
    if (memory.size() < static_cast<size_t>(bytes + kLine)) memory.resize(bytes + kLine);
    return memory.data() + (kLine - reinterpret_cast<uintptr_t>(memory.data()) % kLine) % kLine;
}

namespace {

// Where a part's products go.
struct Output {
    const int32_t* target;
    float* y;
    int64_t y_stride;
    const float* bias;  // of the part's first matrix row, or null
    bool add;

    float* place(int64_t b, int64_t n) const { return y + (target ? target[b] : b) * y_stride + n; }

    // Prefetches what put(b, n, …) is going to write, for every b.
    void prefetch(int64_t batch, int64_t n) const {
        for (int64_t b = 0; b < batch; ++b) __builtin_prefetch(place(b, n), 1);
    }

    // The columns [n, n + count) of activation row b.
    void put(int64_t b, int64_t n, const float* values, int64_t count) const {
        float* to = place(b, n);
        if (!add && !bias) {
            for (int64_t i = 0; i < count; ++i) to[i] = values[i];
            return;
        }
        for (int64_t i = 0; i < count; ++i)
            to[i] = (add ? to[i] : 0.0f) + (values[i] + (bias ? bias[n + i] : 0.0f));
    }
};

}  // namespace

#define EMBEDGRAD_WITH_VNNI
#define EMBEDGRAD_KERNELS "../decode/linear.inl"
#include "../cpu/per_isa.inl"

Activations::Activations(int64_t batch, int64_t columns)
    : columns_(columns),
      row_groups_((columns + kQuantGroup - 1) / kQuantGroup),
      x_(batch * columns),
      groups_(batch * row_groups_) {}

void Activations::quantise(int64_t b, int64_t begin, int64_t end) {
    QuantizedGroup* to = &groups_[b * row_groups_ + begin / kQuantGroup];
    int64_t from = begin;
    for (; from + kQuantGroup <= end; from += kQuantGroup, ++to) EMBEDGRAD_DISPATCH(quantise_group, row(b) + from, *to)
    if (from < end) {
        float padded[kQuantGroup] = {};
        std::copy(row(b) + from, row(b) + end, padded);
        EMBEDGRAD_DISPATCH(quantise_group, padded, *to)
    }
}

bool takes_quantised(const Matrix& matrix) {
    return std::any_of(matrix.parts, matrix.parts + matrix.num_parts, [](const Part& part) {
        return part.stored >= kFirstQuantised;
    });
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
            if (part.stored >= kFirstQuantised && isa() == Isa::avx512)
                avx2::linear_part(part, x, batch, from, to, out);
            else
#endif
                EMBEDGRAD_DISPATCH_VNNI(linear_part, part, x, batch, from, to, out)
        }
        first += part.rows;
    }
}

void read_rows(const Matrix& matrix, int64_t begin, int64_t end, float* out) {
    int64_t first = 0;
    for (int32_t i = 0; i < matrix.num_parts; first += matrix.parts[i++].rows) {
        const Part& part = matrix.parts[i];
        const int64_t from = std::max(begin, first) - first, to = std::min(end, first + part.rows) - first;
        if (from >= to) continue;
        float* place = out + (first + from - begin) * matrix.columns;
        if (part.stored >= kFirstQuantised) {
            read_quantised(part, from, to, matrix.columns, place);
            continue;
        }
        for (int64_t row = from; row < to; ++row, place += matrix.columns)
            EMBEDGRAD_DISPATCH(read_float_row, part, row, matrix.columns, place)
    }
}

}  // namespace embedgrad
