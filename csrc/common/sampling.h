// Choice of the next token from one sequence's logits: the maths that the CPU sampler, the CUDA kernel and the Python
// reference (embedgrad/generation/sampler.py) share.
//
//   value   x_i = logit_i, after penalties and bias                                       float
//   order   by value, highest first; equal values by token id, lowest first
//   weight  w_i = exp((x_i − max x) / temperature), in units of 2⁻⁴⁰                       integer
//   top_k   the first k of the order
//   top_p   of those, the shortest beginning of the order that has at least top_p of their weight
//   min_p   of those, w_i ≥ min_p · max w
//   draw    the first i, by id, at which the running sum of the kept weights exceeds r = ⌊bits · sum / 2⁶⁴⌋
//
// All three must choose the same token, and each adds in another order. Floating-point sums would differ in their last
// bits and sometimes change the choice; integer sums do not depend on the order. The exponential is an integer function
// as well, because maths libraries round it differently. Every remaining floating-point expression is one correctly
// rounded operation, or is exact in double before it is rounded to float. So it does not matter whether a compiler
// contracts a product and a sum into a fused multiply-add.
//
// A token with less than 2⁻⁴⁰ of the highest probability is never drawn.
#pragma once

#include "philox.h"

namespace embedgrad {

constexpr int kWeightBits = 40;              // the likeliest token's weight is 2^40
constexpr int32_t kMaxVocabulary = 1 << 18;  // so a sum of weights is at most 2^58 and fits 64 bits

enum SamplingStatus : int32_t {
    kSampled = 0,
    kNotANumber = 1,      // a candidate's value is NaN
    kInfinite = 2,        // a candidate's value is +inf: there is no distribution
    kNothingAllowed = 3,  // every candidate's value is -inf
    kNoCandidate = 4,     // a forced choice that is already complete
    kBadSettings = 5,     // the sequence's SamplingParams are not usable
};

// The settings of one sequence.
struct SamplingParams {
    float temperature = 0;  // 0: the first in the order
    int32_t top_k = 0;      // 0: off
    double top_p = 1;       // 1: off
    double min_p = 0;       // 0: off
    float repetition = 1;   // a seen token's logit is divided by it if positive, multiplied if negative; 1: off
    float presence = 0;     // subtracted once from each seen token
    float frequency = 0;    // subtracted for each time a token was seen
    uint64_t seed = 0;
};

// A null pointer switches its option off, where the field says "or null".
struct SamplingBatch {
    const SamplingParams* params;  // [sequences]
    const float* logits;           // [sequences, vocabulary], sequences `logits_stride` apart
    int64_t logits_stride;
    int32_t sequences;
    int32_t vocabulary;
    const uint64_t* streams;       // [sequences] the sequence's stream of random numbers
    const uint32_t* steps;         // [sequences] how many tokens the sequence has drawn
    const int32_t* counts;         // [sequences, vocabulary] how often each token was seen (below 2^29), or null
    const float* bias;             // [bias rows, vocabulary] added to the logits; -inf forbids a token; or null
    const int32_t* bias_rows;      // [sequences] the sequence's row of `bias`, -1: none; null where `bias` is
    const int32_t* nodes;          // [sequences] forced choice: node in the tree of continuations, -1: free; or null
    const int32_t* children;       // [nodes + 1] where each node's tokens begin in `child_tokens`
    const int32_t* child_tokens;   // tokens that may follow, ascending by id within a node
    const int32_t* reasons;        // [sequences] not 0: the sequence has ended and nothing of it is written; or null
    int32_t* tokens;               // [sequences] out; -1 where the status is not kSampled
    int32_t* status;               // [sequences] out
};

// One sequence's candidates, ascending by id: the whole vocabulary, or the tokens of a forced choice.
struct Candidates {
    const float* logits;
    const int32_t* counts;
    const float* bias;
    const int32_t* forced;
    int32_t size;
    float repetition, presence, frequency;

    EMBEDGRAD_HD Candidates(const SamplingBatch& batch, int32_t s)
        : logits(batch.logits + s * batch.logits_stride),
          counts(batch.counts ? batch.counts + int64_t{s} * batch.vocabulary : nullptr),
          bias(batch.bias && batch.bias_rows[s] >= 0 ? batch.bias + int64_t{batch.bias_rows[s]} * batch.vocabulary
                                                     : nullptr),
          forced(nullptr),
          size(batch.vocabulary),
          repetition(batch.params[s].repetition),
          presence(batch.params[s].presence),
          frequency(batch.params[s].frequency) {
        const int32_t node = batch.nodes ? batch.nodes[s] : -1;
        if (node >= 0) {
            forced = batch.child_tokens + batch.children[node];
            size = batch.children[node + 1] - batch.children[node];
        }
    }

    EMBEDGRAD_HD int32_t token(int32_t i) const { return forced ? forced[i] : i; }

    EMBEDGRAD_HD float value(int32_t i) const {
        const int32_t id = token(i);
        const int32_t count = counts ? counts[id] : 0;
        if (count == 0 && !bias) return logits[id];
        double x = logits[id];
        if (count > 0) {
            x = x > 0 ? x / repetition : x * repetition;  // a product of two floats is exact in double
            x -= presence;
            x -= double(count) * frequency;
        }
        if (bias) x += bias[id];
        return static_cast<float>(x);
    }
};

// An integer key in the order of the floats. NaN is above +inf; both zeros have one key.
EMBEDGRAD_HD inline uint32_t order_key(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    if (bits == 0x80000000u) return 0x80000000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr uint32_t kKeyOfInfinity = 0xff800000u, kKeyOfMinusInfinity = 0x007fffffu;

// The status that follows from the highest key of all candidates.
EMBEDGRAD_HD inline SamplingStatus status_of(uint32_t highest_key) {
    return highest_key == 0xffffffffu           ? kNotANumber
           : highest_key == kKeyOfInfinity      ? kInfinite
           : highest_key == kKeyOfMinusInfinity ? kNothingAllowed
                                                : kSampled;
}

// (highest − x) / temperature, both operations rounded to float; +inf where they overflow.
EMBEDGRAD_HD inline float distance(float highest, float x, float temperature) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(__fsub_rn(highest, x), temperature);  // correctly rounded whatever nvcc's flags are
#else
    return (highest - x) / temperature;
#endif
}

// exp(−d) for d ≥ 0 in units of 2⁻⁴⁰, with a relative error below 2⁻²³ before it is rounded down. Never increases with
// d.
//
// exp(−d) = 2^−t, t = d·log₂e = q + f. With g = 1 − f this is 2^g · 2^−(q+1). 2^g is a polynomial on [0, 1] that is
// exactly 1 and 2 at the ends. Its coefficients (units of 2⁻³¹) are positive, so rounding down keeps it monotonic.
EMBEDGRAD_HD inline uint64_t weight(float d) {
    if (!(d < 32)) return 0;  // exp(−32) < 2⁻⁴⁶
    const uint64_t t = static_cast<uint64_t>(d * 2147483648.0f) * 193635251u;  // d in 2⁻³¹, log₂e in 2⁻²⁷
    const uint64_t g = (uint64_t{1} << 32) - ((t >> 26) & 0xffffffffu);        // in 2⁻³²
    uint64_t p = 46187u;
    p = ((p * g) >> 32) + 308230u;
    p = ((p * g) >> 32) + 2882342u;
    p = ((p * g) >> 32) + 20646143u;
    p = ((p * g) >> 32) + 119196239u;
    p = ((p * g) >> 32) + 515882262u;
    p = ((p * g) >> 32) + 1488522245u;
    p = ((p * g) >> 32) + 2147483648u;
    return (p << (kWeightBits - 32)) >> (t >> 58);
}

// The least weight that is `top_p` of `total`: at least 1.
EMBEDGRAD_HD inline uint64_t needed_weight(double top_p, uint64_t total) {
    const uint64_t part = static_cast<uint64_t>(top_p * 4294967296.0);  // the product with 2³² is exact
    const uint64_t need = (total >> 32) * part + (((total & 0xffffffffu) * part + 0xffffffffu) >> 32);
    return need ? need : 1;
}

// The least weight that min_p keeps. At least 1: weight 0 is never drawn.
EMBEDGRAD_HD inline uint64_t least_weight(double min_p) {
    const double scaled = min_p * static_cast<double>(uint64_t{1} << kWeightBits);
    const uint64_t below = static_cast<uint64_t>(scaled);
    const uint64_t least = below + (static_cast<double>(below) < scaled);
    return least ? least : 1;
}

// A beginning of the order: the candidates with a key above `key`, and those with this key up to place `last`.
struct Cut {
    uint32_t key = 0;
    int32_t last = INT32_MAX;

    EMBEDGRAD_HD bool keeps(uint32_t k, int32_t place) const { return k > key || (k == key && place <= last); }
};

// How many candidates with the cut's key are needed for the missing measure, if each has `unit` of it.
EMBEDGRAD_HD inline uint64_t ties_needed(uint64_t missing, uint64_t unit) { return (missing + unit - 1) / unit; }

// Radix selection finds the cut digit by digit, from the top of the key, without sorting. For each digit, a histogram
// of the measure over the candidates that share the digits found so far gives the next digit.
constexpr int kDigits = 3;
constexpr int kBins = 1 << 11;

struct Digit {
    int shift, bits;
    EMBEDGRAD_HD uint32_t bin(uint32_t key) const { return (key >> shift) & ((1u << bits) - 1); }
    EMBEDGRAD_HD bool shares_digits(uint32_t key, uint32_t found) const {
        return shift + bits == 32 || (key ^ found) >> (shift + bits) == 0;
    }
};

EMBEDGRAD_HD inline Digit digit(int i) { return i == 0 ? Digit{21, 11} : i == 1 ? Digit{10, 11} : Digit{0, 10}; }

// The running sum (1-based) at which the token is drawn.
EMBEDGRAD_HD inline uint64_t drawn_target(const SamplingBatch& batch, int32_t s, uint64_t total) {
    return multiply_high(random_bits(batch.params[s].seed, batch.streams[s], batch.steps[s]), total) + 1;
}

// Whether a sequence's settings are in their ranges. NaN is in none.
EMBEDGRAD_HD inline bool usable(const SamplingParams& p) {
    const float largest = 3.4028234e38f;
    return (p.temperature == 0 || (p.temperature >= 1e-6f && p.temperature <= largest)) && p.top_k >= 0 &&
           p.top_p > 0 && p.top_p <= 1 && p.min_p >= 0 && p.min_p <= 1 && p.repetition > 0 &&
           p.repetition <= largest && p.presence >= -largest && p.presence <= largest && p.frequency >= -largest &&
           p.frequency <= largest;
}

// Why a call is refused; 0: it is not.
enum SamplingError : int32_t {
    kCallIsFine = 0,
    kBadSize = 1,
    kLaunchFailed = 2,
};

inline SamplingError check_call(const SamplingBatch& b) {
    if (b.sequences < 0 || b.vocabulary < 1 || b.vocabulary > kMaxVocabulary || b.logits_stride < b.vocabulary)
        return kBadSize;
    return kCallIsFine;
}

}  // namespace embedgrad
