#include "multiply_adds.h"

#include "isa.h"

namespace embedgrad {

constexpr int kChains = 12;  // independent multiply-adds, enough to hide the latency of each other

#define EMBEDGRAD_KERNELS "multiply_adds.inl"
#include "per_isa.inl"

int64_t multiply_adds(const Pool& pool, int64_t rounds) {
    pool.run(pool.threads(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
            float result = 0;
            EMBEDGRAD_DISPATCH(multiply_add, rounds, result)
            volatile float used = result;  // or the compiler would drop the loop
            static_cast<void>(used);
        }
    });
    int64_t length = 0;
    EMBEDGRAD_DISPATCH(vector_length, length)
    return rounds * kChains * length * pool.threads();
}

}  // namespace embedgrad
