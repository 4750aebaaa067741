// Tree attention on the CPU. Numbers are stored as float or Bf16 and computed in float32, in one pass over the visible
// keys of each block of queries.
//
//     key j is visible to tree index i   ⇔   key_begin[j] ≤ i < key_end[j]   (and, with a window, close enough)
//     o = softmax(scale · q kᵀ) v,   lse = log Σ exp(scale · q kᵀ)           0 and −inf where no key is visible
//     P = exp(scale · q kᵀ − lse)    dV = Pᵀ do      dS = P ⊙ (do Vᵀ − D)    D = Σ do ⊙ o
//     dq = scale · dS k              dk = scale · dSᵀ q                      (summed over the key's query heads)
//
// With a softcap, c · tanh(scale · q kᵀ / c) takes the place of scale · q kᵀ, and dS has its slope as a factor.
//
// The query heads of a key/value head are rows of one block, so each key is read once for all of them. Keys lie in
// panels: kPanel keys, transposed to [head_dim, kPanel], so that every product is `broadcast a number, multiply a
// vector, add`. A panel is multiplied with the queries of a block that see at least one of its keys; where some of
// these queries do not see all of its keys, scores are masked.
//
// Which panels a block sees depends on the mask only. `tree_schedule` finds it once for all layers. Nothing here
// allocates: the caller passes the memory of a call.
#pragma once

#include <cstdint>
#include <vector>

#include "pool.h"
#include "tensor_views.h"

namespace embedgrad {

constexpr int64_t kPanel = 16;

struct TreeMask {
    int64_t queries, keys;
    const int32_t *key_begin, *key_end;            // [keys]
    const int32_t* query_index;                    // [queries], ascending
    const int32_t* block_start;                    // [blocks + 1]: block b is [block_start[b], block_start[b + 1])
    int64_t blocks;
    const int32_t *query_position, *key_position;  // [queries], [keys]; null without a window
    int64_t window;
};

// The schedule of a mask, one array after the other:
//   3 × [panels · kPanel]   key_begin, key_end and key_position; behind the last key an empty interval
//   [blocks + 1]            where each block's entries begin in the last array
//   [blocks]                each block's cost: its queries, plus for each panel the queries that see some key of it
//   [entries, 4]            for each panel that a block sees: its number; from and to, the block's queries that see some
//                           key of it; 1 where one of these queries does not see every key of it
std::vector<int32_t> tree_schedule(const TreeMask&);
// Whether a schedule of `length` numbers has the form of a schedule of the mask.
bool fits(const TreeMask&, const int32_t* schedule, int64_t length);

struct TreeShape {
    int64_t prefix;                     // the first keys, which have no gradient
    int64_t heads, kv_heads, head_dim;  // heads: of q
    float scale;
    float softcap = 0;  // c in c · tanh(s / c) of the scaled scores s; 0: none
};

// Floats of memory that a call takes on `threads` threads. `rows` is the largest queries · heads per key/value head of
// a block.
int64_t tree_attention_floats(int64_t keys, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t threads);
int64_t tree_attention_backward_floats(
    int64_t keys, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t threads, bool wants_dq, bool wants_dkv);

// lse [queries, heads], contiguous; memory: aligned to 64 bytes.
template <typename T>
void tree_attention(
    const Pool&, const TreeMask&, const int32_t* schedule, const TreeShape&, Heads<T> q, Heads<T> k, Heads<T> v,
    Heads<T> out, float* lse, float* memory);

// Computes dq where it has data, and dk and dv (both or neither) of the keys from `prefix` on.
template <typename T>
void tree_attention_backward(
    const Pool&, const TreeMask&, const int32_t* schedule, const TreeShape&, Heads<T> d_out, Heads<T> q, Heads<T> k,
    Heads<T> v, Heads<T> out, const float* lse, Heads<T> dq, Heads<T> dk, Heads<T> dv, float* memory);

}  // namespace embedgrad
