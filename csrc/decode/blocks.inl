// GGUF's Q5_0, Q4_K and Q6_K blocks: w = scale · q + offset with small integers q, one scale and offset per group of 16
// elements (those of types with longer groups are repeated).
//
//     Q5_0   32 elements, 22 bytes:   d, 32 fifth bits, 32 low halves           scale d,         q − 16 instead of q
//     Q4_K   256 elements, 144 bytes: d, m, 8 · 6 bits s and t, 256 halves      scale d · s,     offset −m · t
//     Q6_K   256 elements, 210 bytes: 256 low halves, 256 pairs, 16 s, d        scale d · s,     q − 32 instead of q
//
// d and m are float16. The layouts are those of the GGUF files that llama.cpp writes (ggml-common.h: block_q5_0,
// block_q4_K, block_q6_K). scale · q is exact in float32, and adding the offset rounds once: the values are those that
// the gguf package dequantises to, bit for bit.

constexpr int64_t kSixteen = 16;  // elements that a scale is given for

static inline void unpack_q5_0(const uint8_t* __restrict block, int8_t* __restrict q, float* __restrict scales, float* __restrict offsets) {
    uint16_t d;
    uint32_t fifth;
    __builtin_memcpy(&d, block, 2);
    __builtin_memcpy(&fifth, block + 2, 4);
    for (int i = 0; i < 16; ++i) {
        const uint8_t both = block[6 + i];
        q[i] = static_cast<int8_t>(((both & 15) | (fifth >> i & 1) << 4) - 16);
        q[16 + i] = static_cast<int8_t>(((both >> 4) | (fifth >> (16 + i) & 1) << 4) - 16);
    }
    scales[0] = scales[1] = from_half(d);
    offsets[0] = offsets[1] = 0;
}

static inline void unpack_q4_k(const uint8_t* __restrict block, int8_t* __restrict q, float* __restrict scales, float* __restrict offsets) {
    uint16_t d, m;
    __builtin_memcpy(&d, block, 2);
    __builtin_memcpy(&m, block + 2, 2);
    const float scale = from_half(d), least = from_half(m);
    const uint8_t* six = block + 4;
    for (int g = 0; g < 8; ++g) {  // the upper two bits of the first eight bytes belong to the last four groups
        const int s = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | six[g - 4] >> 6 << 4;
        const int t = g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | six[g] >> 6 << 4;
        scales[2 * g] = scales[2 * g + 1] = scale * static_cast<float>(s);
        offsets[2 * g] = offsets[2 * g + 1] = -(least * static_cast<float>(t));
    }
    const uint8_t* halves = block + 16;
    for (int pair = 0; pair < 4; ++pair, halves += 32, q += 64)
        for (int i = 0; i < 32; ++i) {
            q[i] = static_cast<int8_t>(halves[i] & 15);
            q[32 + i] = static_cast<int8_t>(halves[i] >> 4);
        }
}

static inline void unpack_q6_k(const uint8_t* __restrict block, int8_t* __restrict q, float* __restrict scales, float* __restrict offsets) {
    const uint8_t *low = block, *high = block + 128;
    const auto* s = reinterpret_cast<const int8_t*>(block + 192);
    uint16_t d;
    __builtin_memcpy(&d, block + 208, 2);
    const float scale = from_half(d);
    for (int g = 0; g < 16; ++g) scales[g] = scale * static_cast<float>(s[g]), offsets[g] = 0;
    for (int part = 0; part < 2; ++part, low += 64, high += 32, q += 128)
        for (int i = 0; i < 32; ++i) {
            q[i] = static_cast<int8_t>(((low[i] & 15) | (high[i] & 3) << 4) - 32);
            q[32 + i] = static_cast<int8_t>(((low[32 + i] & 15) | (high[i] >> 2 & 3) << 4) - 32);
            q[64 + i] = static_cast<int8_t>((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
            q[96 + i] = static_cast<int8_t>((low[32 + i] >> 4 | high[i] >> 6 << 4) - 32);
        }
}
