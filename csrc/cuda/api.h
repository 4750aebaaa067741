// The C interface of the CUDA library: raw device pointers, and a cudaStream_t as void*. Every call only launches; none
// allocates, synchronises or reads device memory on the host, so that all can be captured in a CUDA graph:
// decode -> embedgrad_sample_cuda -> embedgrad_advance_cuda -> decode. Results: a SamplingError.
#pragma once

#include "../common/advance.h"
#include "../common/entropy.h"
#include "../common/sampling.h"

extern "C" {

// 0 where the kernels run on the current device; else 1, and the reason in `message` (at most `size` bytes). The one
// call that is not for a graph.
EMBEDGRAD_API int32_t embedgrad_problem_cuda(char* message, int32_t size);

EMBEDGRAD_API int32_t embedgrad_sample_cuda(const embedgrad::SamplingParams*, const embedgrad::SamplingBatch*, void* stream);

EMBEDGRAD_API int32_t embedgrad_advance_cuda(const embedgrad::AdvanceBatch*, void* stream);

// As embedgrad_token_entropy_cpu.
EMBEDGRAD_API int32_t embedgrad_token_entropy_cuda(
    const float* logits, int64_t stride, int32_t rows, int32_t vocabulary, const int32_t* tokens, float* entropy,
    float* log_probability, void* stream);

// For each row of ids [rows, capacity], of which lengths[row] count: embedgrad_trajectory_entropy_cpu of the whole and
// of windows (the whole again where window is 0), and embedgrad_loop_period_cpu.
EMBEDGRAD_API int32_t embedgrad_trajectory_cuda(
    const int32_t* ids, int32_t capacity, const int32_t* lengths, int32_t rows, int32_t n, int32_t window,
    int32_t repeats, float* entropy, float* windowed_entropy, int32_t* period, void* stream);
}
