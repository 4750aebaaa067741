// Reads one row of a super-block of GGUF's types, or a group of ours, as it is in the file: the integers q of its
// columns (of iq4_nl and iq4_xs the index into the table), its float numbers, and the 32-bit words of its sub-scales.

struct FileBlock {
    uint8_t q[256];
    uint8_t numbers[8];  // in the order of the format
    uint32_t codes[4];
};

static inline void low_and_high_nibbles(const uint8_t* from, int count, uint8_t* q) {
    for (int i = 0; i < count; ++i) q[i] = from[i] & 15;
    for (int i = 0; i < count; ++i) q[count + i] = from[i] >> 4;
}

// 128 elements of two bits: bits 2 k of from[i] belong to element 32 k + i.
static inline void bit_pairs(const uint8_t* from, uint8_t* q) {
    for (int k = 0; k < 4; ++k)
        for (int i = 0; i < 32; ++i) q[32 * k + i] = from[i] >> 2 * k & 3;
}

// q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, int8, int8_16, int4: numbers, the fifth bits if any, then the elements.
template <Stored S>
static inline void read_simple_block(const uint8_t* block, FileBlock& to) {
    constexpr Format f = format(S);
    constexpr int numbers = f.numbers * f.number_bytes;
    __builtin_memcpy(to.numbers, block, numbers);
    block += numbers;
    if constexpr (f.low == 8) {
        for (int i = 0; i < 32; ++i) to.q[i] = block[i] ^ 128;  // signed bytes
    } else {
        low_and_high_nibbles(block + 4 * f.high, 16, to.q);
        if constexpr (f.high == 1) {
            uint32_t fifth;
            __builtin_memcpy(&fifth, block, 4);
            for (int i = 0; i < 32; ++i) to.q[i] = static_cast<uint8_t>(to.q[i] | (fifth >> i & 1) << 4);
        }
    }
}

template <Stored S>
static inline void read_file_block(const uint8_t* block, FileBlock& to) {
    constexpr Format f = format(S);
    uint8_t* q = to.q;
    if constexpr (f.super == 32) return read_simple_block<S>(block, to);
    if constexpr (S == Stored::q2_k) {
        __builtin_memcpy(to.codes, block, 16);
        __builtin_memcpy(to.numbers, block + 80, 4);
        for (int half = 0; half < 2; ++half) bit_pairs(block + 16 + 32 * half, q + 128 * half);
    } else if constexpr (S == Stored::q3_k) {
        __builtin_memcpy(to.codes, block + 96, 12);
        __builtin_memcpy(to.numbers, block + 108, 2);
        for (int half = 0; half < 2; ++half) bit_pairs(block + 32 + 32 * half, q + 128 * half);
        for (int k = 0; k < 8; ++k)
            for (int i = 0; i < 32; ++i) q[32 * k + i] = static_cast<uint8_t>(q[32 * k + i] | (block[i] >> k & 1) << 2);
    } else if constexpr (S == Stored::q4_k || S == Stored::q5_k) {
        __builtin_memcpy(to.numbers, block, 4);
        __builtin_memcpy(to.codes, block + 4, 12);
        const uint8_t* fifth = block + 16;
        for (int k = 0; k < 4; ++k) low_and_high_nibbles(fifth + 32 * (f.high + k), 32, q + 64 * k);
        if constexpr (f.high == 1)
            for (int k = 0; k < 8; ++k)
                for (int i = 0; i < 32; ++i)
                    q[32 * k + i] = static_cast<uint8_t>(q[32 * k + i] | (fifth[i] >> k & 1) << 4);
    } else if constexpr (S == Stored::q6_k) {
        __builtin_memcpy(to.codes, block + 192, 16);
        __builtin_memcpy(to.numbers, block + 208, 2);
        for (int half = 0; half < 2; ++half) {
            uint8_t high[128];
            low_and_high_nibbles(block + 64 * half, 64, q + 128 * half);
            bit_pairs(block + 128 + 32 * half, high);
            for (int i = 0; i < 128; ++i) q[128 * half + i] = static_cast<uint8_t>(q[128 * half + i] | high[i] << 4);
        }
    } else if constexpr (S == Stored::iq4_xs) {
        __builtin_memcpy(to.numbers, block, 4);  // d, and the high bits of the sub-scales
        __builtin_memcpy(to.codes, block + 4, 4);
        for (int k = 0; k < 8; ++k) low_and_high_nibbles(block + 8 + 16 * k, 16, q + 32 * k);
    }
}
