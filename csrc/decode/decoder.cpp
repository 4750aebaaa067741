#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/rowwise.h"

namespace embedgrad {

// Keys and values of one kv head: [count, head_dim], keys `stride` floats apart.
struct KeySlice {
    const float *k, *v;
    int64_t count, stride;
};

// Prefetches the keys and values: they come from main memory, a few cache lines per key.
static inline void prefetch(const KeySlice& s, int64_t head_dim) {
    constexpr int64_t kLine = 16;  // floats
    for (int64_t j = 0; j < s.count; ++j)
        for (int64_t c = 0; c < head_dim; c += kLine) {
            __builtin_prefetch(s.k + j * s.stride + c, 0, 2);
            __builtin_prefetch(s.v + j * s.stride + c, 0, 2);
        }
}

// A layer's own keys of a slot from its token `at` on. Values stand `values_behind` floats behind their keys.
int64_t Decoder::values_behind(const Cache& cache) const {
    return cache.slots * cache.capacity * spec_.kv_heads * spec_.head_dim;
}

float* Decoder::own_key(const Cache& cache, int64_t layer, int64_t slot, int64_t at) const {
    return cache.own + layer * 2 * values_behind(cache) +
           (slot * cache.capacity + at) * spec_.kv_heads * spec_.head_dim;
}

#define EMBEDGRAD_KERNELS "../decode/decoder.inl"
#include "../cpu/per_isa.inl"

Decoder::Work::Work(const DecoderSpec& s, int64_t tokens)
    : x(tokens, s.hidden),
      normed(tokens, s.hidden),
      attended(tokens, int64_t{s.heads} * s.head_dim),
      active(tokens, s.intermediate),
      qkv(tokens * (s.heads + 2 * s.kv_heads) * s.head_dim),
      gate_up(tokens * 2 * s.intermediate),
      branch(tokens * s.hidden) {}

void Decoder::reserve(int64_t tokens) {
    if (tokens <= reserved_) return;
    work_ = std::make_unique<Work>(spec_, tokens);
    reserved_ = tokens;
}

void Decoder::advance(const Team& team, const Cache& cache, const Tokens& tokens, const Wanted& wanted) {
    Work& w = *work_;
    const int64_t count = tokens.count;
    embed(team, tokens);
    for (int64_t l = 0; l < spec_.num_layers; ++l) {
        const LayerSpec& layer = spec_.layers[l];
        const Activations& input = normalise(team, layer.attention_norm, layer.qkv, count);
        const auto qkv = team.share(layer.qkv.rows, kTileRows);
        linear(layer.qkv, input, count, nullptr, w.qkv.data(), layer.qkv.rows, false, qkv.begin, qkv.end);
        team.wait();
        if (spec_.wide_qk_norm) norm_all_heads(team, layer, count);
        rotate_and_store(team, cache, tokens, l);
        attention(team, cache, tokens, l);
        add_branch(team, layer.out, w.attended, layer.attention_post_norm, count);
        feed_forward(team, layer, count);
    }
    predict(team, wanted);
}

// x = the tokens' embeddings. Each thread writes its share of the tokens.
void Decoder::embed(const Team& team, const Tokens& tokens) {
    Work& w = *work_;
    const int64_t d = spec_.hidden;
    const auto [first, last] = team.share(tokens.count);
    for (int64_t b = first; b < last; ++b) {
        float* x = w.x.row(b);
        if (tokens.ids)
            read_rows(spec_.embedding, tokens.ids[b], tokens.ids[b] + 1, x);
        else
            std::memcpy(x, tokens.embeddings + b * d, sizeof(float) * d);
        if (spec_.embedding_scale != 1)
            for (int64_t i = 0; i < d; ++i) x[i] *= spec_.embedding_scale;
    }
}

// The wanted logits, of the final-normed x.
void Decoder::predict(const Team& team, const Wanted& wanted) {
    Work& w = *work_;
    const int64_t d = spec_.hidden;
    const auto [begin, end] = team.share(wanted.count);
    for (int64_t i = begin; i < end; ++i) {
        EMBEDGRAD_DISPATCH(rms_norm_row, w.x.row(wanted.tokens[i]), spec_.final_norm, spec_.eps, w.normed.row(i), d)
        if (takes_quantised(spec_.head)) w.normed.quantise(i);
    }
    team.wait();
    const auto share = team.share(spec_.head.rows, kTileRows);
    linear(
        spec_.head, w.normed, wanted.count, wanted.target, wanted.logits, spec_.vocabulary, false, share.begin,
        share.end);
    for (int64_t i = 0; spec_.logit_softcap && i < wanted.count; ++i) {
        float* logits = wanted.logits + int64_t{wanted.target[i]} * spec_.vocabulary + share.begin;
        EMBEDGRAD_DISPATCH(soften, logits, spec_.logit_softcap, share.end - share.begin)
    }
    team.wait();
}

// rms_norm(x), or x itself where there is no norm, quantised for the product with `next`. The caller has waited since x
// was written, or each thread has written x for its own share of the tokens.
const Activations& Decoder::normalise(const Team& team, const float* weight, const Matrix& next, int64_t tokens) {
    Work& w = *work_;
    Activations& out = weight ? w.normed : w.x;
    const auto [begin, end] = team.share(tokens);
    for (int64_t b = begin; b < end; ++b) {
        if (weight)
            EMBEDGRAD_DISPATCH(rms_norm_row, w.x.row(b), weight, spec_.eps, out.row(b), int64_t{spec_.hidden})
        if (takes_quantised(next)) out.quantise(b);
    }
    team.wait();
    return out;
}

// x += m · norm(input Wᵀ), with the residual scale m; without a norm and with m = 1 in the product itself.
void Decoder::add_branch(
    const Team& team, const Matrix& matrix, const Activations& input, const float* norm, int64_t tokens) {
    Work& w = *work_;
    const int64_t d = spec_.hidden;
    const bool apart = branches_apart(norm);
    const auto rows = team.share(matrix.rows, kTileRows);
    linear(matrix, input, tokens, nullptr, apart ? w.branch.data() : w.x.row(0), d, !apart, rows.begin, rows.end);
    team.wait();
    if (!apart) return;
    const auto [begin, end] = team.share(tokens);
    for (int64_t b = begin; b < end; ++b) {
        float *branch = w.branch.data() + b * d, *x = w.x.row(b);
        if (norm) EMBEDGRAD_DISPATCH(rms_norm_row, branch, norm, spec_.eps, branch, d)
        for (int64_t i = 0; i < d; ++i) x[i] += spec_.residual_scale * branch[i];
    }
    team.wait();
}

// Normalises q and k of each token, each over all of its heads.
void Decoder::norm_all_heads(const Team& team, const LayerSpec& layer, int64_t tokens) {
    const int64_t queries = int64_t{spec_.heads} * spec_.head_dim, keys = int64_t{spec_.kv_heads} * spec_.head_dim;
    const auto [begin, end] = team.share(tokens);
    for (int64_t b = begin; b < end; ++b) {
        float *q = work_->qkv.data() + b * layer.qkv.rows, *k = q + queries;
        EMBEDGRAD_DISPATCH(rms_norm_row, q, layer.q_norm, spec_.eps, q, queries)
        EMBEDGRAD_DISPATCH(rms_norm_row, k, layer.k_norm, spec_.eps, k, keys)
    }
    team.wait();
}

// Norms each head of q and k where it has a norm of its own, rotates it, and appends k and v to the cache.
void Decoder::rotate_and_store(const Team& team, const Cache& cache, const Tokens& tokens, int64_t l) {
    const LayerSpec& layer = spec_.layers[l];
    const int64_t d = spec_.head_dim, half = d / 2, kv_heads = spec_.kv_heads, each = spec_.heads / kv_heads;
    const int64_t count = tokens.count, width = kv_heads * d, queries = spec_.heads * d;
    const float* q_norm = spec_.wide_qk_norm ? nullptr : layer.q_norm;
    const float* k_norm = spec_.wide_qk_norm ? nullptr : layer.k_norm;
    const int64_t table = layer.rotation * cache.rotary_positions * half;
    const auto pairs = team.share(count * kv_heads);
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
        const int64_t b = i / kv_heads, g = i % kv_heads, position = tokens.positions[b];
        float* qkv = work_->qkv.data() + b * layer.qkv.rows;
        const float *cos = cache.cos + table + position * half, *sin = cache.sin + table + position * half;
        float* k = qkv + queries + g * d;
        EMBEDGRAD_DISPATCH(rotate_heads, qkv + g * each * d, cos, sin, q_norm, spec_.eps, each, half)
        EMBEDGRAD_DISPATCH(rotate_heads, k, cos, sin, k_norm, spec_.eps, int64_t{1}, half)
        float* own = own_key(cache, l, tokens.slots[b], position - cache.prefix_length) + g * d;
        std::memcpy(own, k, sizeof(float) * d);
        std::memcpy(own + values_behind(cache), k + width, sizeof(float) * d);
    }
    team.wait();
}

// `attended` is quantised for the output projection.
void Decoder::attention(const Team& team, const Cache& cache, const Tokens& tokens, int64_t l) {
    Work& w = *work_;
    const int64_t count = tokens.count;
    const int32_t *slots = tokens.slots, *positions = tokens.positions;
    const LayerSpec& layer = spec_.layers[l];
    const int64_t d = spec_.head_dim, kv_heads = spec_.kv_heads, each = spec_.heads / kv_heads, width = kv_heads * d;
    const float* prefix = cache.prefix + l * 2 * cache.prefix_length * width;

    // One item has all query heads of a kv head, so that its keys are read once; or a single query head where there
    // would be too few items for the team.
    const int64_t together = count * kv_heads >= 2 * team.size ? each : 1;
    const auto items = team.share(count * spec_.heads / together);
    const bool quantised = takes_quantised(layer.out);
    const bool quantised_apart = d % kQuantGroup != 0;  // a quant group then belongs to several items
    const int64_t items_per_token = spec_.heads / together;
    const auto own_slice = [&](int64_t b, int64_t g, int64_t first_key) {
        const int64_t from = std::max<int64_t>(0, first_key - cache.prefix_length);
        const float* k = own_key(cache, l, slots[b], from) + g * d;
        return KeySlice{k, k + values_behind(cache), positions[b] + 1 - cache.prefix_length - from, width};
    };
    for (int64_t i = items.begin; i < items.end; ++i) {
        const int64_t b = i / items_per_token, h = i % items_per_token * together, g = h / each;
        const int64_t first_key = layer.window ? std::max<int64_t>(0, int64_t{positions[b]} + 1 - layer.window) : 0;
        const int64_t first_in_prefix = std::min(first_key, cache.prefix_length);
        const KeySlice slices[2] = {
            {prefix + first_in_prefix * width + g * d, prefix + (cache.prefix_length + first_in_prefix) * width + g * d,
             cache.prefix_length - first_in_prefix, width},
            own_slice(b, g, first_key),
        };
        if (i + 1 < items.end)
            prefetch(own_slice((i + 1) / items_per_token, (i + 1) % items_per_token * together / each, first_key), d);
        const float* q = w.qkv.data() + b * layer.qkv.rows + h * d;
        EMBEDGRAD_DISPATCH(attend_heads, q, spec_.scale, spec_.attention_softcap, slices, d, together, w.attended.row(b) + h * d)
        if (quantised && !quantised_apart) w.attended.quantise(b, h * d, (h + together) * d);
    }
    team.wait();
    if (quantised && quantised_apart) {
        const auto [begin, end] = team.share(count);
        for (int64_t b = begin; b < end; ++b) w.attended.quantise(b);
        team.wait();
    }
}

void Decoder::feed_forward(const Team& team, const LayerSpec& layer, int64_t tokens) {
    Work& w = *work_;
    const Activations& input = normalise(team, layer.mlp_norm, layer.gate_up, tokens);
    const int64_t width = spec_.intermediate;
    float* gate_up = w.gate_up.data();
    const auto [begin, end] = team.share(width, kQuantGroup);  // whole quant groups, which this thread quantises below
    for (int64_t half = 0; half < 2; ++half)
        linear(
            layer.gate_up, input, tokens, nullptr, gate_up, 2 * width, false, half * width + begin, half * width + end);
    for (int64_t b = 0; b < tokens && begin < end; ++b) {
        const float* gate = gate_up + b * 2 * width;
        float* active = w.active.row(b) + begin;
        EMBEDGRAD_DISPATCH(gate_row, spec_.gelu != 0, gate + begin, gate + width + begin, active, end - begin)
        if (takes_quantised(layer.down)) w.active.quantise(b, begin, end);
    }
    team.wait();
    add_branch(team, layer.down, w.active, layer.mlp_post_norm, tokens);
}

}  // namespace embedgrad
