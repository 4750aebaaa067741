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
constexpr int32_t kSlots = 3, kPrefix = 5, kCapacity = 40, kMost = 12;

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

Matrix matrix(Stored stored, int64_t rows, int64_t columns) {
    Part part{stored, 0, rows, 0, 0, nullptr, nullptr, nullptr};
    if (stored == Stored::f32) {
        part.row_bytes = columns * 4;
        part.data = numbers(rows * columns, 0.15f);
    } else if (stored == Stored::int8 || stored == Stored::int4) {
        part.quant_groups = columns / 32;
        part.row_bytes = stored == Stored::int8 ? columns : columns / 2;
        uint8_t* bytes = room(rows * part.row_bytes);
        for (int64_t i = 0; i < rows * part.row_bytes; ++i) bytes[i] = static_cast<uint8_t>(draw());
        part.data = bytes;
        part.scales = numbers(rows * part.quant_groups, 0.0002f, stored == Stored::int8 ? 0.001f : 0.02f);
        if (draw() % 2) part.offsets = numbers(rows * part.quant_groups, 0.02f, stored == Stored::int8 ? 0.0f : -0.15f);
        if (stored == Stored::int8) part.offsets = nullptr;
    } else {  // Q6_K, with a scale of 0.0002
        part.row_bytes = columns / 256 * 210;
        uint8_t* bytes = room(rows * part.row_bytes);
        for (int64_t i = 0; i < rows * part.row_bytes; ++i) bytes[i] = static_cast<uint8_t>(draw());
        for (int64_t i = 208; i < rows * part.row_bytes; i += 210) bytes[i] = 0x8e, bytes[i + 1] = 0x0a;
        part.data = bytes;
    }
    parts.push_back(part);
    return {&parts.back(), 1, rows, columns, nullptr};
}

DecoderSpec model(Stored stored, LayerSpec* layers) {
    const int64_t queries = kHeads * kHeadDim, pairs = 2 * kKvHeads * kHeadDim;
    for (int l = 0; l < kLayers; ++l)
        layers[l] = {
            numbers(kWidth, 0.1f, 1), numbers(kWidth, 0.1f, 1), l ? numbers(kHeadDim, 0.1f, 1) : nullptr, nullptr,
            matrix(stored, queries + pairs, kWidth), matrix(stored, kWidth, queries),
            matrix(stored, 2 * kInner, kWidth), matrix(stored, kWidth, kInner), l ? 9 : 0};
    // The attention's output has 128 columns, which blocks of 256 do not divide.
    if (stored == Stored::q6_k)
        for (int l = 0; l < kLayers; ++l) layers[l].out = matrix(Stored::int8, kWidth, queries);
    return {kLayers, kWidth, kInner, kHeads, kKvHeads, kHeadDim, kVocabulary, 1e-6f, 0.18f, layers,
            numbers(kWidth, 0.1f, 1), matrix(Stored::f32, kVocabulary, kWidth), matrix(stored, kVocabulary, kWidth)};
}

int32_t go_on(void*) { return 0; }

void write_answers(void* decoder, float temperature, int32_t threads, std::vector<int32_t>& ids) {
    state = 77;
    const size_t pair = kKvHeads * kHeadDim;
    float* prefix = numbers(kLayers * 2 * kPrefix * pair, 1);
    float* own = numbers(kLayers * 2 * kSlots * kCapacity * pair, 1);
    float* cos = numbers((kPrefix + kCapacity) * kHeadDim / 2, 1);
    float* sin = numbers((kPrefix + kCapacity) * kHeadDim / 2, 1);
    std::vector<float> logits(kSlots * kVocabulary), entropy(kSlots * kMost), log_p(kSlots * kMost);
    std::vector<int32_t> tokens(kSlots), status(kSlots), lengths(kSlots), nodes(kSlots, -1), reasons(kSlots);
    std::vector<int32_t> inputs = {1, 2, 3}, positions = {kPrefix, kPrefix + 3, kPrefix + 1}, fresh(kSlots);
    std::vector<uint64_t> streams = {5, 6, 7};
    std::vector<uint32_t> steps(kSlots);
    int32_t running = kSlots, stop = 11;
    ids.assign(kSlots * kMost, -1);
    Loop loop{};
    loop.cache = {prefix, own, kPrefix, kSlots, kCapacity, cos, sin};
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
    for (Stored stored : {Stored::f32, Stored::int8, Stored::int4, Stored::q6_k}) {
        LayerSpec layers[kLayers];
        const DecoderSpec spec = model(stored, layers);
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
