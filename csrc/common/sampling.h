// How the next token is chosen from a row of logits: the maths that the CPU, the CUDA kernel and the Python reference
// (embedgrad/sampler.py) share.
//
//   value   x_i = logit_i, after penalties and bias                                       float
//   order   by value, the highest first; equal values by token id, the lowest first
//   weight  w_i = exp((x_i − max x) / temperature), in units of 2⁻⁴⁰                       integer
//   top_k   the first k of the order
//   top_p   of those, the shortest beginning whose weight is at least top_p of theirs
//   min_p   of those, w_i ≥ min_p · max w
//   draw    the first i, by id, at which the running sum of the kept weights exceeds r = ⌊bits · sum / 2⁶⁴⌋
//
// All three must choose the same token although each adds in another order. Floating-point sums would differ in their
// last bits, and once in a while so would a choice; sums of integers do not depend on their order. The exponential is
// therefore computed in integers too, since no two maths libraries round it alike. What is left in floating point is
// either one correctly rounded operation, or exact in double before the one rounding to float, so that it makes no
// difference whether a compiler contracts a product and a sum into one operation.
//
// A token below 2⁻⁴⁰ of the likeliest one's probability is never drawn.
#pragma once

#include "philox.h"

namespace embedgrad {

constexpr int kWeightBits = 40;           // the likeliest token weighs 2^40: 2^18 tokens sum to at most 2^58
constexpr int32_t kMaxVocabulary = 1 << 18;  // keeps every sum of weights within 64 bits with room to spare

enum SamplingStatus : int32_t {
    kSampled = 0,
    kNotANumber = 1,     // a candidate's value is NaN
    kInfinite = 2,       // a candidate's value is +inf: there is no distribution
    kNothingAllowed = 3,  // every candidate's value is -inf
    kNoCandidate = 4,    // a forced choice that is already complete
};

// Shared by all rows of a call.
struct SamplingParams {
    float temperature = 0;      // 0: the first in the order
    int32_t top_k = 0;          // 0: off
    double top_p = 1;           // 1: off
    double min_p = 0;           // 0: off
    float repetition = 1;       // seen tokens: a positive logit is divided by it, a negative one multiplied; 1: off
    float presence = 0;         // subtracted once from each seen token
    float frequency = 0;        // subtracted for each time a token was seen
    uint64_t seed = 0;
};

// Row-major arrays. Pointers that may be null switch their option off.
struct SamplingBatch {
    const float* logits;      // [rows, stride], of which `vocabulary` are read
    int64_t stride;
    int32_t rows;
    int32_t vocabulary;
    const uint64_t* streams;  // [rows] which stream of random numbers the row draws from
    const uint32_t* steps;    // [rows] how many tokens it has drawn
    const int32_t* counts;    // [rows, vocabulary] how often each token was seen (below 2^29), or null
    const float* bias;        // [vocabulary] added to the logits; -inf forbids a token; or null
    const int32_t* nodes;     // [rows] forced choice: the row's node in the tree of continuations, -1: free; or null
    const int32_t* children;  // [nodes + 1] where the node's tokens begin in `child_tokens`
    const int32_t* child_tokens;  // tokens that may follow, ascending by id within a node
    const int32_t* reasons;   // [rows] rows that are not 0 have ended and are left alone, out included; or null
    int32_t* tokens;          // [rows] out; -1 where the status is not kSampled
    int32_t* status;          // [rows] out
};

// One row's candidates: all of the vocabulary, or the tokens of a forced choice. Either way ascending by id.
struct Candidates {
    const float* logits;
    const int32_t* counts;
    const float* bias;
    const int32_t* forced;
    int32_t size;
    float repetition, presence, frequency;

    EMBEDGRAD_HD Candidates(const SamplingParams& params, const SamplingBatch& batch, int32_t row)
        : logits(batch.logits + row * batch.stride),
          counts(batch.counts ? batch.counts + int64_t{row} * batch.vocabulary : nullptr),
          bias(batch.bias),
          forced(nullptr),
          size(batch.vocabulary),
          repetition(params.repetition),
          presence(params.presence),
          frequency(params.frequency) {
        const int32_t node = batch.nodes ? batch.nodes[row] : -1;
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

// Integers in the order of the floats: NaN above +inf above all finite numbers; both zeros are one.
EMBEDGRAD_HD inline uint32_t order_key(float x) {
    const uint32_t bits = float_bits(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
    if (bits == 0x80000000u) return 0x80000000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr uint32_t kKeyOfInfinity = 0xff800000u, kKeyOfMinusInfinity = 0x007fffffu;

// The status that follows from the highest key of a row.
EMBEDGRAD_HD inline SamplingStatus row_status(uint32_t highest_key) {
    return highest_key == 0xffffffffu           ? kNotANumber
           : highest_key == kKeyOfInfinity      ? kInfinite
           : highest_key == kKeyOfMinusInfinity ? kNothingAllowed
                                                : kSampled;
}

// (highest − x) / temperature, both operations rounded to float; +inf where they overflow.
EMBEDGRAD_HD inline float distance(float highest, float x, float temperature) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(__fsub_rn(highest, x), temperature);  // exact rounding whatever the compiler's flags
#else
    return (highest - x) / temperature;
#endif
}

// exp(−d) for d ≥ 0 in units of 2⁻⁴⁰, relative error below 2⁻²³ before the rounding down; never increases with d.
//
// exp(−d) = 2^−t, t = d·log₂e = q + f. With g = 1 − f this is 2^g · 2^−(q+1), 2^g by a polynomial on [0, 1] that is
// exactly 1 and 2 at the ends; its coefficients (units of 2⁻³¹) are all positive, so rounding down keeps the order.
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

// The weight that a beginning of the order must reach to hold `top_p` of `total`: at least 1.
EMBEDGRAD_HD inline uint64_t needed_weight(double top_p, uint64_t total) {
    const uint64_t part = static_cast<uint64_t>(top_p * 4294967296.0);  // exact: a power of two, then the integer below
    const uint64_t need = (total >> 32) * part + (((total & 0xffffffffu) * part + 0xffffffffu) >> 32);
    return need ? need : 1;
}

// The least weight that min_p keeps: at least 1, because weight 0 is never drawn.
EMBEDGRAD_HD inline uint64_t least_weight(double min_p) {
    const double scaled = min_p * static_cast<double>(uint64_t{1} << kWeightBits);
    const uint64_t below = static_cast<uint64_t>(scaled);
    const uint64_t least = below + (static_cast<double>(below) < scaled);
    return least ? least : 1;
}

// A beginning of the order: candidates whose key is higher than `key`, and those with this very key up to place `last`.
struct Cut {
    uint32_t key = 0;
    int32_t last = INT32_MAX;

    EMBEDGRAD_HD bool keeps(uint32_t k, int32_t place) const { return k > key || (k == key && place <= last); }
};

// How many of the candidates with the cut's key are needed for the missing measure, each counting `unit`.
EMBEDGRAD_HD inline uint64_t ties_needed(uint64_t missing, uint64_t unit) { return (missing + unit - 1) / unit; }

// The cut is found digit by digit from the top of the key (radix selection): per digit one histogram of the measure
// over the candidates that share the digits found so far, which tells the next digit. Nothing is sorted.
constexpr int kDigits = 3;
constexpr int kBins = 1 << 11;

struct Digit {
    int shift, bits;
    EMBEDGRAD_HD uint32_t bin(uint32_t key) const { return (key >> shift) & ((1u << bits) - 1); }
    EMBEDGRAD_HD bool shares_prefix(uint32_t key, uint32_t found) const {
        return shift + bits == 32 || (key ^ found) >> (shift + bits) == 0;
    }
};

EMBEDGRAD_HD inline Digit digit(int i) { return i == 0 ? Digit{21, 11} : i == 1 ? Digit{10, 11} : Digit{0, 10}; }

// The running sum (1-based) at which the token is drawn.
EMBEDGRAD_HD inline uint64_t drawn_target(
    const SamplingParams& params, const SamplingBatch& batch, int32_t row, uint64_t total) {
    return multiply_high(random_bits(params.seed, batch.streams[row], batch.steps[row]), total) + 1;
}

// 0, or the number of the first thing that is wrong with a call.
enum SamplingError : int32_t {
    kCallIsFine = 0,
    kBadTemperature = 1,
    kBadTopK = 2,
    kBadTopP = 3,
    kBadMinP = 4,
    kBadPenalty = 5,
    kBadSize = 6,
    kLaunchFailed = 7,
};

inline SamplingError check_call(const SamplingParams& p, const SamplingBatch& b) {
    const float largest = 3.4028234e38f;
    if (!(p.temperature == 0 || (p.temperature >= 1e-6f && p.temperature <= largest))) return kBadTemperature;
    if (p.top_k < 0) return kBadTopK;
    if (!(p.top_p > 0 && p.top_p <= 1)) return kBadTopP;
    if (!(p.min_p >= 0 && p.min_p <= 1)) return kBadMinP;
    if (!(p.repetition > 0 && p.repetition <= largest)) return kBadPenalty;
    if (!(p.presence >= -largest && p.presence <= largest)) return kBadPenalty;
    if (!(p.frequency >= -largest && p.frequency <= largest)) return kBadPenalty;
    if (b.rows < 0 || b.vocabulary < 1 || b.vocabulary > kMaxVocabulary || b.stride < b.vocabulary) return kBadSize;
    return kCallIsFine;
}

}  // namespace embedgrad
