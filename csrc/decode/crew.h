// Threads that go through a computation together, step by step.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>

namespace embedgrad {

// A decoded token takes some three hundred short steps; starting and joining a parallel region for each would cost more
// than the work. The crew enters one region and its members wait for each other here.
class Meeting {
public:
    explicit Meeting(int32_t size) : size_(size) {}

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
                sched_yield();  // somebody else wants this core, perhaps the member that is waited for
    }

private:
    static constexpr int32_t kSpins = 4000;

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    const int32_t size_;
    alignas(64) std::atomic<int32_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

// One member's view of the crew.
struct Crew {
    int32_t rank, size;
    Meeting* meeting;

    void wait() const { meeting->wait(); }

    // This member's share of [0, n), in multiples of `unit`: contiguous, the same for every call with the same n.
    struct Share {
        int64_t begin, end;
    };
    Share share(int64_t n, int64_t unit = 1) const {
        const int64_t units = (n + unit - 1) / unit;
        return {std::min(n, units * rank / size * unit), std::min(n, units * (rank + 1) / size * unit)};
    }
};

}  // namespace embedgrad
