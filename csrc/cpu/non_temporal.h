// When results are written with non-temporal stores. A normal store first reads the line into the cache, which is
// wasted where the results are too many to stay there.
#pragma once

#include <cstdint>

#include "tensor_views.h"

namespace embedgrad {

// Bytes of results that are taken to stay in the last-level cache. The size that systems report is not what one process
// gets of it.
constexpr int64_t kCachedBytes = int64_t{32} << 20;

// Whether the rows exceed the last-level cache and consist of whole cache lines.
template <typename T>
bool prefers_non_temporal(Rows<T> out, int64_t rows, int64_t d) {
    constexpr int64_t line = 64 / sizeof(T);
    const bool whole = reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && out.stride % line == 0 && d % line == 0;
    return whole && rows * d * static_cast<int64_t>(sizeof(T)) > kCachedBytes;
}

}  // namespace embedgrad
