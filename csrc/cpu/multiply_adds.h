// The machine's rate of multiply-adds, which benchmarks compare the ops with.
#pragma once

#include <cstdint>

#include "pool.h"

namespace embedgrad {

// Multiplies and adds `rounds` times in registers, on every thread. Returns the number of multiply-adds.
int64_t multiply_adds(const Pool&, int64_t rounds);

}  // namespace embedgrad
