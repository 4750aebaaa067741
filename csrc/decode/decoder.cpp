#include "decoder.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "../cpu/isa.h"
#include "../cpu/rowwise.h"

namespace embedgrad {

// Keys and values of one head group: [count, ·] rows that are `row` elements apart.
struct Stretch {
    const float *k, *v;
    int64_t count, row;
};

// Asks for keys and values that are needed soon: they come from main memory, a line here and a line there.
static inline void fetch(const Stretch& s, int64_t d) {
    constexpr int64_t kLine = 16;  // floats
    for (int64_t j = 0; j < s.count; ++j)
        for (int64_t c = 0; c < d; c += kLine) {
            __builtin_prefetch(s.k + j * s.row + c, 0, 2);
            __builtin_prefetch(s.v + j * s.row + c, 0, 2);
        }
}

#define EMBEDGRAD_KERNELS "../decode/decoder.inl"
#include "../cpu/per_isa.inl"

Decoder::Work::Work(const DecoderSpec& s, int64_t rows)
    : x(rows, s.hidden),
      normed(rows, s.hidden),
      attended(rows, int64_t{s.heads} * s.head_dim),
      active(rows, s.intermediate),
      qkv(rows * (s.heads + 2 * s.groups) * s.head_dim),
      gate_up(rows * 2 * s.intermediate) {}

void Decoder::reserve(int64_t rows) {
    if (rows <= reserved_) return;
    work_ = std::make_unique<Work>(spec_, rows);
    reserved_ = rows;
}

void Decoder::advance(const Crew& crew, const Cache& cache, const Tokens& tokens, const Wanted& wanted) {
    Work& w = *work_;
    const int64_t rows = tokens.rows, d = spec_.hidden;
    const auto [first, last] = crew.share(rows);
    for (int64_t b = first; b < last; ++b)
        if (tokens.ids)
            read_row(spec_.embedding, tokens.ids[b], w.x.row(b));
        else
            std::memcpy(w.x.row(b), tokens.embeddings + b * d, sizeof(float) * d);
    for (int64_t l = 0; l < spec_.num_layers; ++l) {
        const LayerSpec& layer = spec_.layers[l];
        normalise(crew, layer.attention_norm, layer.qkv, rows);
        const auto qkv = crew.share(layer.qkv.rows, 8);
        linear(layer.qkv, w.normed, rows, nullptr, w.qkv.data(), layer.qkv.rows, false, qkv.begin, qkv.end);
        crew.wait();
        attention(crew, cache, tokens, l);
        const auto out = crew.share(layer.out.rows, 8);
        linear(layer.out, w.attended, rows, nullptr, w.x.row(0), d, true, out.begin, out.end);
        crew.wait();
        feed_forward(crew, layer, rows);
    }
    const auto [begin, end] = crew.share(wanted.count);
    for (int64_t i = begin; i < end; ++i) {
        EMBEDGRAD_DISPATCH(rms_norm_row, w.x.row(wanted.rows[i]), nullptr, spec_.final_norm, spec_.eps, w.normed.row(i), d)
        w.normed.quantise(i, orders(spec_.head, wanted.count));
    }
    crew.wait();
    const auto share = crew.share(spec_.head.rows, 8);
    linear(
        spec_.head, w.normed, wanted.count, wanted.target, wanted.logits, spec_.vocabulary, false, share.begin,
        share.end);
    crew.wait();
}

// normed = rms_norm(x), ready for the products with `next`. A member finds its rows of x as it left them, or behind a
// wait.
void Decoder::normalise(const Crew& crew, const float* weight, const Matrix& next, int64_t rows) {
    Work& w = *work_;
    const auto [begin, end] = crew.share(rows);
    for (int64_t b = begin; b < end; ++b) {
        EMBEDGRAD_DISPATCH(rms_norm_row, w.x.row(b), nullptr, weight, spec_.eps, w.normed.row(b), int64_t{spec_.hidden})
        w.normed.quantise(b, orders(next, rows));
    }
    crew.wait();
}

void Decoder::attention(const Crew& crew, const Cache& cache, const Tokens& tokens, int64_t l) {
    Work& w = *work_;
    const int64_t rows = tokens.rows;
    const int32_t *slots = tokens.slots, *positions = tokens.positions;
    const LayerSpec& layer = spec_.layers[l];
    const int64_t d = spec_.head_dim, half = d / 2, groups = spec_.groups, each = spec_.heads / groups;
    const int64_t width = groups * d, queries = spec_.heads * d;
    const auto own = [&](int64_t what, int64_t slot, int64_t at) {
        return cache.own + (((l * 2 + what) * cache.slots + slot) * cache.capacity + at) * width;
    };
    const float* trunk = cache.trunk + l * 2 * cache.trunk_length * width;

    const auto pairs = crew.share(rows * groups);
    for (int64_t i = pairs.begin; i < pairs.end; ++i) {
        const int64_t b = i / groups, g = i % groups, position = positions[b];
        float* row = w.qkv.data() + b * layer.qkv.rows;
        const float *cos = cache.cos + position * half, *sin = cache.sin + position * half;
        float* k = row + queries + g * d;
        EMBEDGRAD_DISPATCH(rotate_heads, row + g * each * d, cos, sin, layer.q_norm, spec_.eps, each, half)
        EMBEDGRAD_DISPATCH(rotate_heads, k, cos, sin, layer.k_norm, spec_.eps, int64_t{1}, half)
        const int64_t at = position - cache.trunk_length;
        std::memcpy(own(0, slots[b], at) + g * d, k, sizeof(float) * d);
        std::memcpy(own(1, slots[b], at) + g * d, k + width, sizeof(float) * d);
    }
    crew.wait();

    // A group's heads read its keys once, unless that leaves members of the crew without work.
    const int64_t together = rows * groups >= 2 * crew.size ? each : 1;
    const auto items = crew.share(rows * spec_.heads / together);
    const bool quantised_apart = d % kGroup != 0;
    const int64_t per_row = spec_.heads / together;
    // The own keys and values of an item's head group.
    const auto own_stretch = [&](int64_t b, int64_t g, int64_t hidden) {
        const int64_t from = std::max<int64_t>(0, hidden - cache.trunk_length);
        return Stretch{own(0, slots[b], from) + g * d, own(1, slots[b], from) + g * d,
                       positions[b] + 1 - cache.trunk_length - from, width};
    };
    for (int64_t i = items.begin; i < items.end; ++i) {
        const int64_t b = i / per_row, h = i % per_row * together, g = h / each;
        const int64_t hidden = layer.window ? std::max<int64_t>(0, int64_t{positions[b]} + 1 - layer.window) : 0;
        const int64_t in_trunk = std::min(hidden, cache.trunk_length);
        const Stretch stretches[2] = {
            {trunk + in_trunk * width + g * d, trunk + (cache.trunk_length + in_trunk) * width + g * d,
             cache.trunk_length - in_trunk, width},
            own_stretch(b, g, hidden),
        };
        if (i + 1 < items.end) fetch(own_stretch((i + 1) / per_row, (i + 1) % per_row * together / each, hidden), d);
        const float* q = w.qkv.data() + b * layer.qkv.rows + h * d;
        EMBEDGRAD_DISPATCH(attend_heads, q, spec_.scale, stretches, d, together, w.attended.row(b) + h * d)
        if (!quantised_apart) w.attended.quantise(b, orders(layer.out, rows), h * d, (h + together) * d);
    }
    crew.wait();
    if (quantised_apart) {
        const auto [begin, end] = crew.share(rows);
        for (int64_t b = begin; b < end; ++b) w.attended.quantise(b, orders(layer.out, rows));
        crew.wait();
    }
}

void Decoder::feed_forward(const Crew& crew, const LayerSpec& layer, int64_t rows) {
    Work& w = *work_;
    normalise(crew, layer.mlp_norm, layer.gate_up, rows);
    const int64_t width = spec_.intermediate;
    float* gate_up = w.gate_up.data();
    const auto [begin, end] = crew.share(width, kGroup);  // whole groups, which their owner quantises at once
    for (int64_t half = 0; half < 2; ++half)
        linear(
            layer.gate_up, w.normed, rows, nullptr, gate_up, 2 * width, false, half * width + begin, half * width + end);
    for (int64_t b = 0; b < rows && begin < end; ++b) {
        const float* gate = gate_up + b * 2 * width;
        EMBEDGRAD_DISPATCH(swiglu_row, gate + begin, gate + width + begin, w.active.row(b) + begin, end - begin)
        w.active.quantise(b, orders(layer.down, rows), begin, end);
    }
    crew.wait();
    const auto down = crew.share(layer.down.rows, 8);
    linear(layer.down, w.active, rows, nullptr, w.x.row(0), spec_.hidden, true, down.begin, down.end);
    crew.wait();
}

}  // namespace embedgrad
