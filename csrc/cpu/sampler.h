// The sampler on the CPU; common/sampling.h defines what is computed.
#pragma once

#include "../common/sampling.h"

namespace embedgrad {

// Samples for the sequences [begin, end) of the batch. Sequences are independent, so threads may share a batch.
void sample(const SamplingBatch&, int32_t begin, int32_t end);

}  // namespace embedgrad

extern "C" {

// Returns a SamplingError. With kCallIsFine the status of every sequence is set.
EMBEDGRAD_API int32_t embedgrad_sample_cpu(const embedgrad::SamplingBatch*);
}
