// C functions that only tests call: the CPU twins of the CUDA kernels, and the shared maths by itself.
#include "common/advance.h"
#include "common/entropy.h"
#include "common/sampling.h"

using namespace embedgrad;

extern "C" {

// The twin of embedgrad_advance_cuda.
void embedgrad_advance_cpu(const AdvanceBatch* batch) {
    for (int32_t s = 0; s < batch->sequences; ++s)
        if (advance_sequence(*batch, s)) --*batch->running;
}

// The twin of embedgrad_token_entropy_cuda.
void embedgrad_token_entropy_cpu(
    const float* logits, int64_t logits_stride, int32_t sequences, int32_t vocabulary, const int32_t* tokens,
    float* entropy, float* log_probability) {
    for (int32_t s = 0; s < sequences; ++s) {
        const float* x = logits + s * logits_stride;
        OnlineEntropy online;
        for (int32_t i = 0; i < vocabulary; ++i) online.add(x[i]);
        const bool asked = tokens && tokens[s] >= 0;
        entropy[s] = static_cast<float>(normalised(online.entropy(), vocabulary));
        log_probability[s] = asked ? static_cast<float>(online.log_probability(x[tokens[s]])) : NAN;
    }
}

uint64_t embedgrad_random_bits(uint64_t seed, uint64_t stream, uint32_t step) { return random_bits(seed, stream, step); }

// `counter` [4] becomes the block of random words.
void embedgrad_philox(uint32_t* counter, const uint32_t* key) {
    const Philox block = philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    for (int i = 0; i < 4; ++i) counter[i] = block.word[i];
}

// exp(−d) in units of 2⁻⁴⁰.
uint64_t embedgrad_weight(float d) { return weight(d); }
}
