// Runs a CUDA kernel on the CPU: one block after another, the threads of a block as fibres of one host thread.
//
// A fibre runs until it waits at a barrier or a warp collective. The next fibre is picked at random, so a kernel that
// relies on the order of threads gives different results for different seeds. Two checks do not depend on the seed:
//
//   SharedArray  records the last accesses to each element and the barriers before them. It reports a race where two
//                threads of a block access an element between the same two barriers, at least one writes, and not both
//                accesses are atomic: a __syncthreads (or, within a warp, a __syncwarp) is missing. It also reports a
//                read of an element that this block has not written.
//   barriers     All threads of a block must reach the same __syncthreads, and all lanes of a warp the same collective.
//
// Emulated: one-dimensional grids and blocks, warp collectives with the full mask, shared memory in SharedArrays,
// atomics, and the intrinsics below. Not emulated: streams (a launch returns when the kernel has ended), memory models,
// races in global memory.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state;
    int line;  // of the barrier it waits at
};

struct Warp {
    int waiting, line;
    uint32_t collectives;  // its parity selects the slots to write: a fast lane may be one collective ahead of a slow one
    uint32_t epoch;        // __syncwarp calls passed
    uint64_t slots[2][kWarp];
};

struct Machine {
    ucontext_t scheduler;
    std::vector<std::unique_ptr<Fibre>> fibres;
    std::vector<Warp> warps;
    const std::function<void()>* kernel = nullptr;
    int block = 0, threads = 0, thread = 0;
    int waiting = 0, line = 0;  // at the block's barrier
    uint32_t epoch = 0;         // barriers passed by this block
    uint64_t run = 0;           // how many blocks have run so far, over all launches
    uint64_t random = 1;
    std::string error;          // the first fault since embedgrad_emulation_error
    bool failed = false;        // in this launch

    bool in_fibre = false;

    // Ends the launch, because a kernel that runs on after a fault may never end.
    void fault(const std::string& what) {
        failed = true;
        if (error.empty()) error = "block " + std::to_string(block) + ": " + what;
        if (in_fibre) swapcontext(&fibres[thread]->context, &scheduler);  // this fibre is not resumed
    }
};

inline Machine& machine() {
    static Machine one;
    return one;
}

inline uint64_t next_random() {
    uint64_t& x = machine().random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

inline void yield() {
    Machine& m = machine();
    swapcontext(&m.fibres[m.thread]->context, &m.scheduler);
}

inline void wait_for_block(int line) {
    Machine& m = machine();
    if (m.waiting == 0) m.line = line;
    if (m.line != line)
        m.fault("threads wait at different barriers, lines " + std::to_string(m.line) + " and " + std::to_string(line));
    m.fibres[m.thread]->state = State::at_block_barrier;
    m.fibres[m.thread]->line = line;
    if (++m.waiting == m.threads) {
        m.waiting = 0;
        ++m.epoch;
        for (int t = 0; t < m.threads; ++t) m.fibres[t]->state = State::ready;
    }
    yield();
}

// Waits for all lanes of the warp; returns the value of each lane.
inline const uint64_t* exchange(uint64_t mine, int line) {
    Machine& m = machine();
    const int first = m.thread / kWarp * kWarp;
    Warp& warp = m.warps[m.thread / kWarp];
    uint64_t* slots = warp.slots[warp.collectives & 1];
    slots[m.thread - first] = mine;
    if (warp.waiting == 0) warp.line = line;
    if (warp.line != line)
        m.fault("lanes of a warp meet in different collectives, lines " + std::to_string(warp.line) + " and " +
                std::to_string(line));
    m.fibres[m.thread]->state = State::at_warp_barrier;
    m.fibres[m.thread]->line = line;
    if (++warp.waiting == kWarp) {
        warp.waiting = 0;
        ++warp.collectives;
        for (int t = first; t < first + kWarp; ++t) m.fibres[t]->state = State::ready;
    }
    yield();
    return slots;
}

inline void run_fibre() {
    Machine& m = machine();
    (*m.kernel)();
    m.fibres[m.thread]->state = State::done;
    yield();
}

inline void run_block() {
    Machine& m = machine();
    ++m.run;
    m.epoch = 0;
    m.waiting = 0;
    m.warps.assign(m.threads / kWarp, Warp{});
    while (static_cast<int>(m.fibres.size()) < m.threads) m.fibres.push_back(std::make_unique<Fibre>());
    for (int t = 0; t < m.threads; ++t) {
        Fibre& fibre = *m.fibres[t];
        fibre.state = State::ready;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStack;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, run_fibre, 0);
    }
    std::vector<int> ready;
    while (!m.failed) {
        ready.clear();
        for (int t = 0; t < m.threads; ++t)
            if (m.fibres[t]->state == State::ready) ready.push_back(t);
        if (ready.empty()) break;
        for (size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[next_random() % i]);
        for (int t : ready) {
            if (m.failed) return;
            m.thread = t;
            m.in_fibre = true;
            swapcontext(&m.scheduler, &m.fibres[t]->context);
            m.in_fibre = false;
        }
    }
    for (int t = 0; t < m.threads && !m.failed; ++t)
        if (m.fibres[t]->state != State::done) {
            m.fault("thread " + std::to_string(t) + " waits at line " + std::to_string(m.fibres[t]->line) +
                    " for threads that never arrive");
            break;
        }
}

inline void launch(int blocks, int threads, const std::function<void()>& kernel) {
    Machine& m = machine();
    m.failed = false;
    m.kernel = &kernel;
    m.threads = threads;
    if (threads % kWarp) m.fault("a block of " + std::to_string(threads) + " threads is not a whole number of warps");
    for (m.block = 0; m.block < blocks && !m.failed; ++m.block) run_block();
}

struct Index {
    unsigned x;
};

inline Index thread_index() { return {static_cast<unsigned>(machine().thread)}; }
inline Index block_index() { return {static_cast<unsigned>(machine().block)}; }
inline Index block_size() { return {static_cast<unsigned>(machine().threads)}; }

// ---- warp collectives

template <class T>
uint64_t to_slot(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t slot = 0;
    std::memcpy(&slot, &value, sizeof(T));
    return slot;
}

template <class T>
T shuffle(T value, int from, int line) {  // a lane without a source lane gets its own value
    const int lane = machine().thread % kWarp;
    const uint64_t* slots = exchange(to_slot(value), line);
    T result;
    std::memcpy(&result, &slots[from < 0 || from >= kWarp ? lane : from], sizeof(T));
    return result;
}

inline unsigned ballot(bool vote, int line) {
    const uint64_t* slots = exchange(vote, line);
    unsigned votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<unsigned>(slots[lane]) << lane;
    return votes;
}

inline void wait_for_warp(int line) {
    Warp& warp = machine().warps[machine().thread / kWarp];
    const uint32_t before = warp.epoch;
    exchange(0, line);
    warp.epoch = before + 1;  // every lane writes the same number
}

// ---- shared memory

struct Access {
    uint64_t run = 0;
    int thread = -1;
    uint32_t epoch = 0, warp_epoch = 0;

    static Access mine() {
        const Machine& m = machine();
        return {m.run, m.thread, m.epoch, m.warps[m.thread / kWarp].epoch};
    }

    // Whether this access, by another thread, may run at the same time as `now`.
    bool races(const Access& now) const {
        if (run != now.run || epoch != now.epoch || thread == now.thread) return false;
        return thread / kWarp != now.thread / kWarp || warp_epoch == now.warp_epoch;
    }
};

struct Shadow {
    Access written, read, read_by_another;
    bool atomic = false;

    void on_read() {
        const Access now = Access::mine();
        if (written.run != now.run) machine().fault("shared memory is read that this block has not written");
        check(written, now, "reads what another writes");
        if (read.thread != now.thread && read.races(now))
            read_by_another = now;
        else
            read = now;
    }

    void on_write(bool atomically) {
        const Access now = Access::mine();
        if (atomically && written.run != now.run) machine().fault("an atomic on shared memory that was not written");
        if (!(atomically && atomic)) check(written, now, "writes what another writes");
        check(read, now, "writes what another reads");
        check(read_by_another, now, "writes what another reads");
        written = now;
        atomic = atomically;
    }

private:
    static void check(const Access& before, const Access& now, const char* what) {
        if (before.races(now))
            machine().fault("race: thread " + std::to_string(now.thread) + " " + what + " (thread " +
                            std::to_string(before.thread) + ") with no barrier between, after barrier number " +
                            std::to_string(now.epoch));
    }
};

template <class T>
struct SharedPointer {
    T* value;
    Shadow* shadow;
};

template <class T>
struct Element {
    T* value;
    Shadow* shadow;

    operator T() const {
        shadow->on_read();
        return *value;
    }
    Element& operator=(T v) {
        shadow->on_write(false);
        *value = v;
        return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
    SharedPointer<T> operator&() const { return {value, shadow}; }
};

template <class T, class F>
T atomic(T* p, F next) {
    const T old = *p;
    *p = next(old);
    return old;
}

template <class T, class F>
T atomic(SharedPointer<T> p, F next) {
    p.shadow->on_write(true);
    return atomic(p.value, next);
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())

#define __syncthreads() ::emulation::wait_for_block(__LINE__)
#define __syncwarp() ::emulation::wait_for_warp(__LINE__)
#define __shfl_sync(mask, value, lane) ::emulation::shuffle(value, lane, __LINE__)
#define __shfl_up_sync(mask, value, by) ::emulation::shuffle(value, int(threadIdx.x % 32) - int(by), __LINE__)
#define __shfl_xor_sync(mask, value, by) ::emulation::shuffle(value, int(threadIdx.x % 32) ^ int(by), __LINE__)
#define __ballot_sync(mask, vote) ::emulation::ballot(vote, __LINE__)

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

// On global or shared memory. The operand may have another integer type, as with CUDA's overloads.
template <class T>
T atomicAdd(T* p, std::common_type_t<T> v) {
    return emulation::atomic(p, [&](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicAdd(emulation::SharedPointer<T> p, std::common_type_t<T> v) {
    return emulation::atomic(p, [&](T old) { return static_cast<T>(old + v); });
}

namespace embedgrad {

template <class T, int N>
struct SharedArray {
    T data[N];
    emulation::Shadow shadow[N];

    emulation::Element<T> operator[](int i) {
        if (i < 0 || i >= N)
            emulation::machine().fault("index " + std::to_string(i) + " of a shared array of " + std::to_string(N));
        return {&data[i], &shadow[i]};
    }
};

template <class Kernel>
const char* problem_of(Kernel*) {
    return nullptr;
}

inline bool launched() { return !emulation::machine().failed; }

}  // namespace embedgrad

#define EMBEDGRAD_LAUNCH(kernel, blocks, threads, stream, ...) \
    (void)(stream), ::emulation::launch(blocks, threads, [&] { kernel(__VA_ARGS__); })
