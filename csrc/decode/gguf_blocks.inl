// Unpacks GGUF's Q5_0, Q4_K and Q6_K blocks: w = scale · q + offset with small integers q, and a scale and an offset
// for every 16 elements (repeated where a type has longer groups). README.md draws the blocks.
//
//     Q5_0   scale d,         no offset,        q − 16 instead of q
//     Q4_K   scale d · s,     offset −m · t
//     Q6_K   scale d · s,     no offset,        q − 32 instead of q
//
// The layouts are those of the GGUF files that llama.cpp writes (ggml-common.h: block_q5_0, block_q4_K, block_q6_K).
// scale · q is exact in float32, and adding the offset rounds once. So the values are, bit for bit, those that the gguf
// package dequantises to.

constexpr int64_t kGgufGroup = 16;  // elements per scale

static inline void unpack_q5_0(
    const uint8_t* __restrict block, int8_t* __restrict q, float* __restrict scales, float* __restrict offsets) {
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

static inline void unpack_q4_k(
    const uint8_t* __restrict block, int8_t* __restrict q, float* __restrict scales, float* __restrict offsets) {
    uint16_t d, m;
    __builtin_memcpy(&d, block, 2);
    __builtin_memcpy(&m, block + 2, 2);
    const float scale = from_half(d), least = from_half(m);
    const uint8_t* six = block + 4;
    for (int g = 0; g < 8; ++g) {  // groups 4 to 7 have their upper two bits in bytes 0 to 7
        const int s = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | six[g - 4] >> 6 << 4;
        const int t = g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | six[g] >> 6 << 4;
        scales[2 * g] = scales[2 * g + 1] = scale * static_cast<float>(s);
        offsets[2 * g] = offsets[2 * g + 1] = -(least * static_cast<float>(t));
    }
    const uint8_t* nibbles = block + 16;
    for (int pair = 0; pair < 4; ++pair, nibbles += 32, q += 64)
        for (int i = 0; i < 32; ++i) {
            q[i] = static_cast<int8_t>(nibbles[i] & 15);
            q[32 + i] = static_cast<int8_t>(nibbles[i] >> 4);
        }
}

static inline void unpack_q6_k(
    const uint8_t* __restrict block, int8_t* __restrict q, float* __restrict scales, float* __restrict offsets) {
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
