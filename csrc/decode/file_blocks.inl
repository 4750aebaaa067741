// Reads one row of a super-block of GGUF's types, or a group of ours, as it is in the file: the integers q of its
// columns (of iq4_nl and iq4_xs the index into the table), its float numbers, and the 32-bit words of its sub-scales.

struct FileBlock {
    uint8_t q[256];
    uint8_t numbers[8];  // in the order of the format
    uint32_t codes[4];
};

typedef uint8_t SixteenBytes __attribute__((vector_size(16)));

EMBEDGRAD_INLINE SixteenBytes sixteen_bytes(const uint8_t* from) {
    SixteenBytes bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

EMBEDGRAD_INLINE void put_bytes(uint8_t* to, SixteenBytes bytes) { __builtin_memcpy(to, &bytes, sizeof bytes); }

// Low nibbles to q[0] and on, high ones to q[kCount] and on.
template <int kCount>
EMBEDGRAD_INLINE void low_and_high_nibbles(const uint8_t* from, uint8_t* q) {
    for (int i = 0; i < kCount; i += 16) {
        const SixteenBytes bytes = sixteen_bytes(from + i);
        put_bytes(q + i, bytes & 15);
        put_bytes(q + kCount + i, bytes >> 4);
    }
}

// Adds `count` bits of from[i] from bit `at` on to q[i], from bit `place` on, for 32 elements.
EMBEDGRAD_INLINE void add_bits(const uint8_t* from, int at, int count, int place, uint8_t* q) {
    const auto mask = static_cast<uint8_t>((1 << count) - 1);
    for (int i = 0; i < 32; i += 16) put_bytes(q + i, sixteen_bytes(q + i) | (sixteen_bytes(from + i) >> at & mask) << place);
}

// 128 elements of two bits: bits 2 k of from[i] belong to element 32 k + i.
EMBEDGRAD_INLINE void bit_pairs(const uint8_t* from, uint8_t* q) {
    for (int i = 0; i < 32; i += 16)
        for (int k = 0; k < 4; ++k) put_bytes(q + 32 * k + i, sixteen_bytes(from + i) >> 2 * k & 3);
}

// Adds to q[i] bit i of `bits` as bit 4.
EMBEDGRAD_INLINE void add_fifth_bits(const uint8_t* bits, uint8_t* q) {
    for (int byte = 0; byte < 4; ++byte) {
        const uint64_t spread = bits[byte] * 0x0101010101010101u & 0x8040201008040201u;  // bit i is left in byte i
        uint64_t eight;
        __builtin_memcpy(&eight, q + 8 * byte, 8);
        eight |= (spread + 0x7f7f7f7f7f7f7f7fu) >> 3 & 0x1010101010101010u;  // the sum has bit 7 where a byte is not 0
        __builtin_memcpy(q + 8 * byte, &eight, 8);
    }
}

// q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, int8, int8_16, int4: numbers, the fifth bits if any, then the elements.
template <Stored S>
static inline void read_simple_block(const uint8_t* block, FileBlock& to) {
    constexpr Format f = format(S);
    constexpr int numbers = f.numbers * f.number_bytes;
    __builtin_memcpy(to.numbers, block, numbers);
    block += numbers;
    if constexpr (f.low == 8) {
        for (int i = 0; i < 32; i += 16) put_bytes(to.q + i, sixteen_bytes(block + i) ^ 128);  // signed bytes
    } else {
        low_and_high_nibbles<16>(block + 4 * f.high, to.q);
        if constexpr (f.high == 1) add_fifth_bits(block, to.q);
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
        for (int k = 0; k < 8; ++k) add_bits(block, k, 1, 2, q + 32 * k);
    } else if constexpr (S == Stored::q4_k || S == Stored::q5_k) {
        __builtin_memcpy(to.numbers, block, 4);
        __builtin_memcpy(to.codes, block + 4, 12);
        const uint8_t* fifth = block + 16;
        for (int k = 0; k < 4; ++k) low_and_high_nibbles<32>(fifth + 32 * (f.high + k), q + 64 * k);
        if constexpr (f.high == 1)
            for (int k = 0; k < 8; ++k) add_bits(fifth, k, 1, 4, q + 32 * k);
    } else if constexpr (S == Stored::q6_k) {
        __builtin_memcpy(to.codes, block + 192, 16);
        __builtin_memcpy(to.numbers, block + 208, 2);
        for (int half = 0; half < 2; ++half) {
            low_and_high_nibbles<64>(block + 64 * half, q + 128 * half);
            for (int k = 0; k < 4; ++k) add_bits(block + 128 + 32 * half, 2 * k, 2, 4, q + 128 * half + 32 * k);
        }
    } else if constexpr (S == Stored::iq4_xs) {
        __builtin_memcpy(to.numbers, block, 4);  // d, and the high bits of the sub-scales
        __builtin_memcpy(to.codes, block + 4, 4);
        for (int k = 0; k < 8; ++k) low_and_high_nibbles<16>(block + 8 + 16 * k, q + 32 * k);
    }
}
