// The generation loop's C ABI: raw pointers, no torch. Structs are those of decoder.h and loop.h; what they point to
// stays the caller's, and must outlive the decoder.
#pragma once

#include "loop.h"

extern "C" {

EMBEDGRAD_API void* embedgrad_decoder_create(const embedgrad::DecoderSpec*);
EMBEDGRAD_API void embedgrad_decoder_free(void* decoder);

// Runs the loop on `threads` threads. Returns a LoopEnd, or −1 − a SamplingError for a call that is wrong.
EMBEDGRAD_API int32_t embedgrad_generate(void* decoder, embedgrad::Loop*, int32_t threads);

// Tokens of several sequences, and the logits of those that are wanted.
EMBEDGRAD_API void embedgrad_decoder_advance(
    void* decoder, const embedgrad::Cache*, const embedgrad::Tokens*, const embedgrad::Wanted*, int32_t threads);

// y [rows, matrix rows] = x [rows, columns] Wᵀ + bias, as the loop computes it.
EMBEDGRAD_API void embedgrad_linear(
    const embedgrad::Matrix*, const float* x, int64_t rows, float* y, int32_t threads);

// Rows [begin, end) of the matrix in float32, without its bias: out [end − begin, columns].
EMBEDGRAD_API void embedgrad_widen(
    const embedgrad::Matrix*, int64_t begin, int64_t end, float* out, int32_t threads);
}
