// A team of threads that go through a computation in steps, with a barrier between steps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <sched.h>

namespace embedgrad {

// A spinning barrier. A decoded token takes about three hundred short steps, and a parallel region per step would cost
// more than the work. So the team enters one region and waits here between steps.
class Barrier {
public:
    explicit Barrier(int32_t size) : size_(size) {}

    void wait() {
        if (size_ == 1) return;
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int32_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins < kSpins)
                pause();
            else
                sched_yield();  // another thread needs this core, perhaps the one that is waited for
    }

private:
    static constexpr int32_t kSpins = 4000;

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    const int32_t size_;
    alignas(64) std::atomic<int32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

// One thread's view of its team.
struct Team {
    int32_t rank, size;
    Barrier* barrier;

    void wait() const { barrier->wait(); }

    // This thread's share of [0, n), in multiples of `unit`. It depends on n and `unit` only, so a thread can read
    // without a barrier what it wrote in its share of an earlier step.
    struct Share {
        int64_t begin, end;
    };
    Share share(int64_t n, int64_t unit = 1) const {
        const int64_t units = (n + unit - 1) / unit;
        return {std::min(n, units * rank / size * unit), std::min(n, units * (rank + 1) / size * unit)};
    }
};

}  // namespace embedgrad
