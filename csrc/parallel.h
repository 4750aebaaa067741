// The thread pool, as the core sees it: the binding passes torch's own, so torch.set_num_threads holds.
#pragma once

#include <cstdint>
#include <functional>

namespace embedgrad {

// Rows of d numbers that are worth a thread.
inline int64_t rows_per_thread(int64_t d) {
    constexpr int64_t numbers = 1 << 14;
    return d < numbers ? numbers / (d ? d : 1) : 1;
}

class Pool {
public:
    virtual ~Pool() = default;
    virtual int64_t threads() const = 0;
    // body(begin, end) over [0, n), at least `grain` at a time, in any order; returns when all is done.
    virtual void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const = 0;
};

}  // namespace embedgrad
