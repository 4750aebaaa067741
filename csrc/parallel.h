// The thread pool, as the core sees it: the binding passes torch's own, so torch.set_num_threads holds.
#pragma once

#include <cstdint>
#include <functional>

namespace embedgrad {

class Pool {
public:
    virtual ~Pool() = default;
    virtual int64_t threads() const = 0;
    // body(begin, end) over [0, n), at least `grain` at a time, in any order; returns when all is done.
    virtual void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) const = 0;
};

}  // namespace embedgrad
