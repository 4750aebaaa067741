// The frozen decoder in float32 for new tokens of several sequences behind a shared trunk: one of each (decoding), or
// whole contexts (prefill).
//
// Equations: README, "One frozen block". The members of a crew share every matrix by its rows and the attention by
// tokens and heads; what one token gets does not depend on the others that are computed with it, to the bit.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"

namespace embedgrad {

struct LayerSpec {
    const float *attention_norm, *mlp_norm;  // [d]
    const float *q_norm, *k_norm;            // [D] or null
    Matrix qkv, out, gate_up, down;
    int64_t window;  // keys that a token sees, itself among them; 0: all
};

struct DecoderSpec {
    int32_t num_layers, hidden, intermediate, heads, groups, head_dim, vocabulary;
    float eps, scale;
    const LayerSpec* layers;
    const float* final_norm;
    Matrix embedding, head;
};

// Keys and values: trunk [L, 2, S, G, D] for all, own [L, 2, slots, capacity, G, D] for each slot.
struct Cache {
    const float* trunk;
    float* own;
    int64_t trunk_length, slots, capacity;
    const float *cos, *sin;  // [positions, D/2]
};

// Tokens [rows]; those of one sequence in the order of their positions.
struct Tokens {
    int64_t rows;
    const int32_t *slots, *positions;
    const int32_t* ids;       // null: `embeddings` are what goes in
    const float* embeddings;  // [rows, d]
};

// Rows of Tokens whose logits are wanted: those of rows[i] go to logits + target[i]·V.
struct Wanted {
    int64_t count;
    const int32_t *rows, *target;
    float* logits;
};

class Decoder {
public:
    explicit Decoder(const DecoderSpec& spec) : spec_(spec) {}

    const DecoderSpec& spec() const { return spec_; }

    // Room for so many tokens at once; before the crew enters `advance`.
    void reserve(int64_t rows);

    // Appends the keys and values of the tokens to the cache. Entered by every member of the crew.
    void advance(const Crew&, const Cache&, const Tokens&, const Wanted&);

private:
    struct Work {
        Work(const DecoderSpec&, int64_t rows);
        Activations x, normed, attended, active;
        std::vector<float> qkv, gate_up;
    };

    void normalise(const Crew&, const float* weight, const Matrix& next, int64_t rows);
    void attention(const Crew&, const Cache&, const Tokens&, int64_t layer);
    void feed_forward(const Crew&, const LayerSpec&, int64_t rows);

    DecoderSpec spec_;
    std::unique_ptr<Work> work_;
    int64_t reserved_ = 0;
};

}  // namespace embedgrad
