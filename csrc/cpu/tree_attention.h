// Tree attention on the CPU, on float or Bf16, computed in float32: one pass over the visible keys of each block of
// queries.
//
//     key j is visible to tree index i   ⇔   key_begin[j] ≤ i < key_end[j]   (and, with a window, close enough)
//     o = softmax(scale · q kᵀ) v,   lse = log Σ exp(scale · q kᵀ)           0 and −inf where no key is visible
//     P = exp(scale · q kᵀ − lse)    dV = Pᵀ do      dS = P ⊙ (do Vᵀ − D)    D = Σ do ⊙ o
//     dq = scale · dS k              dk = scale · dSᵀ q                      (summed over the group's query heads)
//
// The query heads of a group are the rows of one block, so that a key is read once for all of them. Keys are laid out in
// panels of kPanel, transposed, so that a product is `broadcast one number, multiply a vector, add` throughout. A panel is
// multiplied for those queries of a block that see some key of it, and masked where one of them does not see all.
//
// Which panels a block sees depends on the mask only: `tree_schedule` finds it once for all layers. Nothing here
// allocates: memory for one call is handed in.
#pragma once

#include <cstdint>
#include <vector>

#include "../parallel.h"
#include "elements.h"

namespace embedgrad {

constexpr int64_t kPanel = 16;

template <typename T>
struct Heads {  // [n, heads, size]: a row is `row` elements after the one before, heads stand `size` apart
    T* data;
    int64_t row;
};

struct TreeMask {
    int64_t queries, keys;
    const int32_t *key_begin, *key_end;            // [keys]
    const int32_t* query_index;                    // [queries], ascending
    const int32_t* block_start;                    // [blocks + 1]: block b has the query rows [start[b], start[b + 1])
    int64_t blocks;
    const int32_t *query_position, *key_position;  // [queries], [keys]; null without a window
    int64_t window;
};

// Three arrays [panels · kPanel] of the keys' begin, end and position, with empty intervals behind the last key; then
// [blocks + 1], where each block's panels begin; [blocks], what a block costs (queries · panels); then 4 numbers for each
// panel that a block sees: which, the queries of the block that see some key of it (from, to), and 1 where one of these
// does not see every key.
std::vector<int32_t> tree_schedule(const TreeMask&);
// Whether a schedule of so many numbers has a schedule's form for the mask.
bool fits(const TreeMask&, const int32_t* schedule, int64_t length);

struct TreeShape {
    int64_t kept;                     // keys in front that have no gradient
    int64_t heads, groups, head_dim;  // heads: of q; groups: of k and v
    float scale;
};

// Floats of memory that a call takes on `threads` threads, where a block has at most `rows` queries · heads per group.
int64_t tree_attention_floats(int64_t keys, int64_t groups, int64_t head_dim, int64_t rows, int64_t threads);
int64_t tree_attention_backward_floats(
    int64_t keys, int64_t groups, int64_t head_dim, int64_t rows, int64_t threads, bool wants_dq, bool wants_dkv);

// lse [queries, heads], contiguous; memory: aligned to 64 bytes.
template <typename T>
void tree_attention(
    const Pool&, const TreeMask&, const int32_t* schedule, const TreeShape&, Heads<T> q, Heads<T> k, Heads<T> v,
    Heads<T> out, float* lse, float* memory);

// dq where it has data; dk and dv (both or neither) of the keys from `kept` on.
template <typename T>
void tree_attention_backward(
    const Pool&, const TreeMask&, const int32_t* schedule, const TreeShape&, Heads<T> d_out, Heads<T> q, Heads<T> k,
    Heads<T> v, Heads<T> out, const float* lse, Heads<T> dq, Heads<T> dk, Heads<T> dv, float* memory);

}  // namespace embedgrad
