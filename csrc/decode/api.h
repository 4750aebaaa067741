// The C ABI of the decoder and its products: raw pointers, no torch. The structs are in matrix.h, decoder.h and loop.h.
// The caller owns what they point to, and what a DecoderSpec points to must outlive the decoder.
#pragma once

#include "loop.h"

extern "C" {

EMBEDGRAD_API void* embedgrad_decoder_create(const embedgrad::DecoderSpec*);
EMBEDGRAD_API void embedgrad_decoder_free(void* decoder);

// Runs the generation loop. Returns a LoopEnd, or −1 − SamplingError where the sampler refuses its settings.
EMBEDGRAD_API int32_t embedgrad_generate(void* decoder, embedgrad::Loop*, int32_t threads);

// Appends tokens of several sequences to the cache, and computes the wanted logits.
EMBEDGRAD_API void embedgrad_decoder_advance(
    void* decoder, const embedgrad::Cache*, const embedgrad::Tokens*, const embedgrad::Wanted*, int32_t threads);

// y [batch, matrix rows] = x [batch, columns] Wᵀ + bias, with the bits of the generation loop.
EMBEDGRAD_API void embedgrad_linear(
    const embedgrad::Matrix*, const float* x, int64_t batch, float* y, int32_t threads);

// out [end − begin, columns] = matrix rows [begin, end) in float32, without the bias.
EMBEDGRAD_API void embedgrad_widen(
    const embedgrad::Matrix*, int64_t begin, int64_t end, float* out, int32_t threads);

// out [count, columns] = the matrix rows `rows` in float32, without the bias.
EMBEDGRAD_API void embedgrad_gather(
    const embedgrad::Matrix*, const int64_t* rows, int64_t count, float* out, int32_t threads);

// Bytes of a tile of 16 matrix rows of a quantised type (formats.h).
EMBEDGRAD_API int64_t embedgrad_tile_bytes(int32_t stored, int64_t columns);

// out [tiles] = blocks [rows, super-blocks], which are as in a file, rows `row_bytes` apart.
EMBEDGRAD_API void embedgrad_repack(
    int32_t stored, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t columns, uint8_t* out,
    int32_t threads);
}
