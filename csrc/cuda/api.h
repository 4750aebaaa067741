// The C ABI of the CUDA library. Pointers are device addresses, `stream` is a cudaStream_t. Every call except
// embedgrad_problem_cuda only launches: it does not allocate, synchronise or read device memory on the host. So a CUDA
// graph can capture decode → embedgrad_sample_cuda → embedgrad_advance_cuda → decode. Calls return a SamplingError.
#pragma once

#include "../common/advance.h"
#include "../common/entropy.h"
#include "../common/sampling.h"

extern "C" {

// 0 where the kernels run on the current device; otherwise 1, and the reason in `message` (at most `size` bytes).
EMBEDGRAD_API int32_t embedgrad_problem_cuda(char* message, int32_t size);

EMBEDGRAD_API int32_t embedgrad_sample_cuda(const embedgrad::SamplingBatch*, void* stream);

EMBEDGRAD_API int32_t embedgrad_advance_cuda(const embedgrad::AdvanceBatch*, void* stream);

// For each of the `sequences` rows of logits: the entropy of its distribution divided by log(vocabulary) (0 for a
// vocabulary of one), and the log-probability of tokens[s]. The latter is NaN where `tokens` is null or tokens[s] < 0;
// both are NaN where a logit is NaN or +inf, or where all are -inf.
EMBEDGRAD_API int32_t embedgrad_token_entropy_cuda(
    const float* logits, int64_t logits_stride, int32_t sequences, int32_t vocabulary, const int32_t* tokens,
    float* entropy, float* log_probability, void* stream);
}
