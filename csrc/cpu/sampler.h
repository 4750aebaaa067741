// The sampler on the CPU; its maths is in common/sampling.h.
#pragma once

#include "../common/advance.h"
#include "../common/sampling.h"

namespace embedgrad {

// Rows [begin, end) of the batch. Rows are independent: a caller may split them among threads as it likes.
void sample_rows(const SamplingParams&, const SamplingBatch&, int32_t begin, int32_t end);

}  // namespace embedgrad

extern "C" {

// A SamplingError; with kCallIsFine every row's status is set.
EMBEDGRAD_API int32_t embedgrad_sample_cpu(const embedgrad::SamplingParams*, const embedgrad::SamplingBatch*);

// Appends what was sampled and decrements *running for each row that ends.
EMBEDGRAD_API void embedgrad_advance_cpu(const embedgrad::AdvanceBatch*);

EMBEDGRAD_API uint64_t embedgrad_random_bits(uint64_t seed, uint64_t stream, uint32_t step);

// For known-answer tests: `counter` [4] is replaced by the block of random words.
EMBEDGRAD_API void embedgrad_philox(uint32_t* counter, const uint32_t* key);

// exp(−d) in units of 2^-40, for tests.
EMBEDGRAD_API uint64_t embedgrad_weight(float d);
}
