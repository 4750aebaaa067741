// When results are better written past the caches: they would not stay there, and to write a line through the cache it is
// read first.
#pragma once

#include <cstdint>

#include "elements.h"

namespace embedgrad {

constexpr int64_t kKept = int64_t{32} << 20;  // bytes of results that a last cache may keep; what systems say is not its size

// Whether rows are larger than the last cache, and all their lines whole.
template <typename T>
bool past_caches(Rows<T> out, int64_t rows, int64_t d) {
    constexpr int64_t line = 64 / sizeof(T);
    const bool whole = reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && out.row % line == 0 && d % line == 0;
    return whole && rows * d * static_cast<int64_t>(sizeof(T)) > kKept;
}

}  // namespace embedgrad
