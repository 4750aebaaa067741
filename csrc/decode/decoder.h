// The frozen decoder in float32, for new tokens of several sequences that share a prefix: one token of each sequence
// (decoding), or many tokens of each (prefill). Equations: docs/design.md, section 4.
//
// The threads of a team share each matrix by its rows, and the attention by tokens and heads. What one token gets does
// not depend on the other tokens of the call, to the bit.
#pragma once

#include <memory>
#include <vector>

#include "linear.h"
#include "thread_team.h"

namespace embedgrad {

// Null norms are not there. Families differ in which norms there are and in the numbers of DecoderSpec; the code asks
// nothing else (docs/design.md, "What a family changes").
struct LayerSpec {
    const float *attention_norm, *attention_post_norm;  // [hidden]: in front of the attention, behind it
    const float *mlp_norm, *mlp_post_norm;              // [hidden]
    const float *q_norm, *k_norm;                       // [head_dim], or [heads · head_dim] and [kv_heads · head_dim]
    Matrix qkv, out, gate_up, down;
    int64_t window;    // how many keys a token sees, its own included; 0: all
    int32_t rotation;  // which of the cache's tables rotates q and k
};

struct DecoderSpec {
    int32_t num_layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
    int32_t gelu;          // not 0: the gate is GELU's tanh form, else SiLU
    int32_t wide_qk_norm;  // not 0: q_norm and k_norm are over all heads
    float eps, scale;
    float embedding_scale, residual_scale;   // of the embeddings, and of what attention and MLP add to x
    float attention_softcap, logit_softcap;  // c in c · tanh(x / c); 0: none
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
    const float *cos, *sin;  // [tables, rotary_positions, head_dim / 2]
    int64_t rotary_positions;
};

// New tokens [count]; those of one sequence in the order of their positions.
struct Tokens {
    int64_t count;
    const int32_t *slots, *positions;
    const int32_t* ids;       // null: the input is `embeddings`
    const float* embeddings;  // [count, hidden], before the embedding scale
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
        std::vector<float> qkv, gate_up, branch;
    };

    void embed(const Team&, const Tokens&);
    const Activations& normalise(const Team&, const float* weight, const Matrix& next, int64_t tokens);
    void add_branch(const Team&, const Matrix&, const Activations&, const float* norm, int64_t tokens);
    void norm_all_heads(const Team&, const LayerSpec&, int64_t tokens);
    void rotate_and_store(const Team&, const Cache&, const Tokens&, int64_t layer);
    void attention(const Team&, const Cache&, const Tokens&, int64_t layer);
    void feed_forward(const Team&, const LayerSpec&, int64_t tokens);
    void predict(const Team&, const Wanted&);

    int64_t values_behind(const Cache&) const;
    float* own_key(const Cache&, int64_t layer, int64_t slot, int64_t at) const;
    bool branches_apart(const float* norm) const { return norm || spec_.residual_scale != 1; }

    DecoderSpec spec_;
    std::unique_ptr<Work> work_;
    int64_t reserved_ = 0;
};

}  // namespace embedgrad
