// Writes the answers of a tiny random model in every storage form and with every instruction set that the machine has, on
// one and on three threads, behind a line with the number of sets; what it prints must not depend on the build. Compiled by
// test_decode_builds.py, under sanitizers among others.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "cpu/isa.h"
#include "decode/api.h"

using namespace embedgrad;

namespace {

constexpr int32_t kLayers = 2, kWidth = 256, kInner = 256, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kVocabulary = 70;
constexpr int32_t kSlots = 3, kPrefix = 5, kCapacity = 40, kMost = 6;

uint64_t state = 1;
uint32_t draw() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}
float number() { return static_cast<float>(draw() % 2001) / 1000.0f - 1.0f; }

std::deque<std::vector<uint8_t>> memory;
uint8_t* room(size_t bytes) { return memory.emplace_back(bytes).data(); }

float* numbers(size_t count, float size, float centre = 0) {
    auto* x = reinterpret_cast<float*>(room(count * sizeof(float)));
    for (size_t i = 0; i < count; ++i) x[i] = centre + size * number();
    return x;
}

std::deque<Part> parts;

// A float number of a block: a half where the type has halves.
void put_number(uint8_t* block, const Format& f, float value) {
    if (f.number_bytes == 4) {
        std::memcpy(block, &value, 4);
        return;
    }
    uint32_t bits;  // of a normal number; its fraction is cut
    std::memcpy(&bits, &value, 4);
    const auto half = static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 13) - (112 << 10) & 0x7fff));
    std::memcpy(block, &half, 2);
}

// Where the float numbers of a block begin.
int numbers_at(Stored stored) {
    return stored == Stored::q2_k ? 80 : stored == Stored::q3_k ? 108 : stored == Stored::q6_k ? 208 : 0;
}

Matrix matrix(Stored stored, int64_t rows, int64_t columns) {
    Part part{stored, 0, 0, rows, 0, nullptr};
    if (stored == Stored::f32) {
        part.row_bytes = columns * 4;
        part.data = numbers(rows * columns, 0.15f);
    } else {
        const Format f = format(stored);
        const int64_t supers = f.supers(columns), row_bytes = supers * f.block_bytes;
        const float most = f.zero ? static_cast<float>(f.zero) : static_cast<float>(1 << f.bits());
        uint8_t* blocks = room(rows * row_bytes);
        for (int64_t i = 0; i < rows * row_bytes; ++i) blocks[i] = static_cast<uint8_t>(draw());
        for (int64_t i = 0; i < rows * supers; ++i)
            for (int n = 0; n < f.numbers - (stored == Stored::iq4_xs); ++n)
                put_number(
                    blocks + i * f.block_bytes + numbers_at(stored) + n * f.number_bytes, f,
                    (0.2f + 0.02f * number()) / most / (f.codes ? 16.0f : 1.0f));
        uint8_t* tiles = room((rows + kTileRows - 1) / kTileRows * embedgrad_tile_bytes(int32_t(stored), columns));
        embedgrad_repack(int32_t(stored), blocks, row_bytes, rows, columns, tiles, 2);
        part.data = tiles;
    }
    parts.push_back(part);
    return {&parts.back(), 1, rows, columns, nullptr};
}

float* norm(int64_t width) { return numbers(width, 0.1f, 1); }

// Llama's equations, or everything in which a family may differ from them.
DecoderSpec model(Stored stored, bool other, LayerSpec* layers) {
    const int64_t queries = kHeads * kHeadDim, keys = kKvHeads * kHeadDim;
    for (int l = 0; l < kLayers; ++l) {
        layers[l] = {
            norm(kWidth), nullptr, norm(kWidth), nullptr, l ? norm(kHeadDim) : nullptr, nullptr,
            matrix(stored, queries + 2 * keys, kWidth), matrix(stored, kWidth, queries),
            matrix(stored, 2 * kInner, kWidth), matrix(stored, kWidth, kInner), l ? 9 : 0, 0};
        if (!other) continue;
        if (l) layers[l].attention_norm = layers[l].mlp_norm = nullptr;
        layers[l].attention_post_norm = norm(kWidth), layers[l].mlp_post_norm = l ? norm(kWidth) : nullptr;
        layers[l].q_norm = norm(queries), layers[l].k_norm = norm(keys);
        layers[l].rotation = 1 - l;
    }
    DecoderSpec spec = {
        kLayers, kWidth, kInner, kHeads, kKvHeads, kHeadDim, kVocabulary, 0, 0, 1e-6f, 0.18f, 1, 1, 0, 0, layers,
        norm(kWidth), matrix(Stored::f32, kVocabulary, kWidth), matrix(stored, kVocabulary, kWidth)};
    if (other) {
        spec.gelu = spec.wide_qk_norm = 1;
        spec.embedding_scale = 3, spec.residual_scale = 0.7f, spec.attention_softcap = 5, spec.logit_softcap = 3;
    }
    return spec;
}

int32_t go_on(void*) { return 0; }

void write_answers(void* decoder, float temperature, int32_t threads, std::vector<int32_t>& ids) {
    state = 77;
    const size_t pair = kKvHeads * kHeadDim;
    float* prefix = numbers(kLayers * 2 * kPrefix * pair, 1);
    float* own = numbers(kLayers * 2 * kSlots * kCapacity * pair, 1);
    float* cos = numbers(2 * (kPrefix + kCapacity) * kHeadDim / 2, 1);
    float* sin = numbers(2 * (kPrefix + kCapacity) * kHeadDim / 2, 1);
    std::vector<float> logits(kSlots * kVocabulary), entropy(kSlots * kMost), log_p(kSlots * kMost);
    std::vector<int32_t> tokens(kSlots), status(kSlots), lengths(kSlots), nodes(kSlots, -1), reasons(kSlots);
    std::vector<int32_t> inputs = {1, 2, 3}, positions = {kPrefix, kPrefix + 3, kPrefix + 1}, fresh(kSlots);
    std::vector<uint64_t> streams = {5, 6, 7};
    std::vector<uint32_t> steps(kSlots);
    int32_t running = kSlots, stop = 11;
    ids.assign(kSlots * kMost, -1);
    Loop loop{};
    loop.cache = {prefix, own, kPrefix, kSlots, kCapacity, cos, sin, kPrefix + kCapacity};
    SamplingParams settings{};
    settings.temperature = temperature;
    settings.seed = 3;
    const std::vector<SamplingParams> params(kSlots, settings);
    const std::vector<int32_t> most(kSlots, kMost);
    loop.sampling = {params.data(), logits.data(), kVocabulary, kSlots, kVocabulary, streams.data(), steps.data(),
                     nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, reasons.data(), tokens.data(), status.data()};
    loop.advance = {kSlots, kVocabulary, kMost, 4096, 1, &stop, most.data(), tokens.data(), status.data(), nullptr,
                    nullptr, nullptr, ids.data(), lengths.data(), inputs.data(), positions.data(), steps.data(), nullptr,
                    nullptr, reasons.data(), &running};
    loop.fresh = fresh.data();
    loop.entropy = entropy.data();
    loop.log_probability = log_p.data();
    loop.on_step = go_on;
    if (embedgrad_generate(decoder, &loop, threads) != kAllDone) std::abort();
    for (int s = 0; s < kSlots; ++s)
        for (int i = 0; i < lengths[s]; ++i)
            if (!(entropy[s * kMost + i] >= 0 && entropy[s * kMost + i] <= 1 && log_p[s * kMost + i] <= 0)) std::abort();
}

}  // namespace

int main() {
    const int sets = static_cast<int>(best_isa()) + 1;
    std::printf("%d\n", sets);
    const auto last = 2 * static_cast<int32_t>(Stored::int4) + 1;
    for (int32_t i = 2 * static_cast<int32_t>(kFirstQuantised) - 2; i <= last; ++i) {
        const int32_t type = i / 2;
        const auto stored = type < static_cast<int32_t>(kFirstQuantised) ? Stored::f32 : static_cast<Stored>(type);
        LayerSpec layers[kLayers];
        const DecoderSpec spec = model(stored, i % 2 != 0, layers);
        void* decoder = embedgrad_decoder_create(&spec);
        for (int set = 0; set < sets; ++set) {
            isa_in_use() = static_cast<Isa>(set);
            for (float temperature : {0.0f, 1.0f}) {
                std::vector<int32_t> one, three;
                write_answers(decoder, temperature, 1, one);
                write_answers(decoder, temperature, 3, three);
                if (one != three) return std::puts("threads differ"), 1;
                for (int32_t id : one) std::printf("%d ", id);
                std::puts("");
            }
        }
        embedgrad_decoder_free(decoder);
    }
    return 0;
}
