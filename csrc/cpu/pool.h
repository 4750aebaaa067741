// The thread pool as the core sees it. torch_ops.cpp passes torch's pool, so that torch.set_num_threads holds.
#pragma once

#include <cstdint>
#include <functional>

namespace embedgrad {

// How many rows of d numbers are enough work for one thread.
inline int64_t rows_per_thread(int64_t d) {
    constexpr int64_t numbers = 1 << 14;
    return d < numbers ? numbers / (d ? d : 1) : 1;
}

class Pool {
public:
    virtual ~Pool() = default;
    virtual int64_t threads() const = 0;
    // Calls body(begin, end) over [0, n) in any order, with at least `grain` items a call; returns when all have run.
    virtual void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const = 0;
};

}  // namespace embedgrad
