// The frozen decoder in float32, for new tokens of several sequences that share a prefix: one token of each sequence
// (decoding), or many tokens of each (prefill). Equations: README, "One frozen block".
//
// The threads of a team share each matrix by its rows, and the attention by tokens and heads. What one token gets does
// not depend on the other tokens of the call, to the bit.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"
#include "thread_team.h"

namespace embedgrad {

struct LayerSpec {
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *q_norm, *k_norm;            // [head_dim] or null
    Matrix qkv, out, gate_up, down;
    int64_t window;  // how many keys a token sees, its own included; 0: all
};

struct DecoderSpec {
    int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
    float eps, scale;
    const LayerSpec* layers;
    const float* final_norm;
    Matrix embedding, head;
};

// The KV cache: prefix [layers, 2, prefix_length, kv_heads, head_dim] for all sequences, and own [layers, 2, slots,
// capacity, kv_heads, head_dim] with the sequence of each slot.
struct Cache {
    const float* prefix;
    float* own;
    int64_t prefix_length, slots, capacity;
    const float *cos, *sin;  // [positions, head_dim / 2]
};

// New tokens [count]; those of one sequence in the order of their positions.
struct Tokens {
    int64_t count;
    const int32_t *slots, *positions;
    const int32_t* ids;       // null: the input is `embeddings`
    const float* embeddings;  // [count, hidden]
};

// Tokens whose logits are wanted: those of Tokens[tokens[i]] go to logits + target[i] · vocabulary.
struct Wanted {
    int64_t count;
    const int32_t *tokens, *target;
    float* logits;
};

class Decoder {
public:
    explicit Decoder(const DecoderSpec& spec) : spec_(spec) {}

    const DecoderSpec& spec() const { return spec_; }

    // Allocates for calls of `advance` with so many tokens. Call it before the team starts.
    void reserve(int64_t tokens);

    // Appends the keys and values of the tokens to the cache, and computes the wanted logits. Every thread of the team
    // calls it.
    void advance(const Team&, const Cache&, const Tokens&, const Wanted&);

private:
    struct Work {
        Work(const DecoderSpec&, int64_t tokens);
        Activations x, normed, attended, active;
        std::vector<float> qkv, gate_up;
    };

    void normalise(const Team&, const float* weight, const Matrix& next, int64_t tokens);
    void attention(const Team&, const Cache&, const Tokens&, int64_t layer);
    void feed_forward(const Team&, const LayerSpec&, int64_t tokens);

    DecoderSpec spec_;
    std::unique_ptr<Work> work_;
    int64_t reserved_ = 0;
};

}  // namespace embedgrad
