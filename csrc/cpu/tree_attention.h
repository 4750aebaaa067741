// Tree attention on the CPU in float32: one pass over the visible keys of each block of queries.
//
//     key j is visible to tree index i   ⇔   key_begin[j] ≤ i < key_end[j]   (and, with a window, close enough)
//     o = softmax(scale · q kᵀ) v,   lse = log Σ exp(scale · q kᵀ)           0 and −inf where no key is visible
//     P = exp(scale · q kᵀ − lse)    dV = Pᵀ do      dS = P ⊙ (do Vᵀ − D)    D = Σ do ⊙ o
//     dq = scale · dS k              dk = scale · dSᵀ q                      (summed over the group's query heads)
//
// The query heads of a group are the rows of one block, so that a key is read once for all of them. Keys are laid out in
// panels of kPanel, transposed, so that a product is `broadcast one number, multiply a vector, add` throughout; panels
// that no query of a block sees are skipped, and only panels that some see and some do not are masked.
#pragma once

#include <cstdint>

#include "../parallel.h"

namespace embedgrad {

constexpr int64_t kPanel = 16;

struct Heads {  // [n, heads, size]: a row is `row` elements after the one before, heads stand `size` apart
    float* data;
    int64_t row;
};

struct TreeShape {
    int64_t queries, keys, kept;      // kept: keys in front that have no gradient
    int64_t heads, groups, head_dim;  // heads: of q; groups: of k and v
    const int32_t *key_begin, *key_end;      // [keys]
    const int32_t *query_index;              // [queries], ascending
    const int32_t *block_start;              // [blocks + 1]: block b has the query rows [start[b], start[b + 1])
    int64_t blocks;
    const int32_t *query_position, *key_position;  // [queries], [keys]; null without a window
    int64_t window;
    float scale;
};

// lse [queries, heads], contiguous.
void tree_attention(const Pool&, const TreeShape&, Heads q, Heads k, Heads v, Heads out, float* lse);

// dq where it has data; dk and dv (both or neither) of the keys from `kept` on.
void tree_attention_backward(
    const Pool&, const TreeShape&, Heads d_out, Heads q, Heads k, Heads v, Heads out, const float* lse, Heads dq,
    Heads dk, Heads dv);

}  // namespace embedgrad
