// Reads tiles (formats.h) for one instruction set: scales and offsets in float32, elements as bytes, rows in float32.

// ---- scales ---------------------------------------------------------------------------------------------------------

// The sub-scale of group s of a super-block, in two's complement. codes and high: the words of sub-scales and, of
// iq4_xs, the 16 bits that stand beside d. U: uint32_t, or a vector of them.
template <Stored S, class U>
EMBEDGRAD_INLINE U sub_scale(const U* codes, const U& high, int s) {
    const int byte = 8 * (s % 4);
    if constexpr (S == Stored::q2_k) return codes[s / 4] >> byte & 15;
    if constexpr (S == Stored::q3_k) {
        const U low = codes[s / 4 % 2] >> (byte + 4 * (s / 8)) & 15;
        return (low | (codes[2] >> (byte + 2 * (s / 4)) & 3) << 4) - 32;
    }
    if constexpr (S == Stored::q4_k || S == Stored::q5_k)
        return s < 4 ? codes[0] >> byte & 63 : (codes[2] >> byte & 15) | (codes[0] >> (byte + 6) & 3) << 4;
    if constexpr (S == Stored::q6_k) return ((codes[s / 4] >> byte & 255) ^ 128) - 128;
    if constexpr (S == Stored::iq4_xs) return ((codes[0] >> 4 * s & 15) | (high >> 2 * s & 3) << 4) - 32;
    return U{};
}

// The integer by which the second number is multiplied; offset = −number · it.
template <Stored S, class U>
EMBEDGRAD_INLINE U sub_offset(const U* codes, int s) {
    const int byte = 8 * (s % 4);
    if constexpr (S == Stored::q2_k) return codes[s / 4] >> (byte + 4) & 15;
    if constexpr (S == Stored::q4_k || S == Stored::q5_k)
        return s < 4 ? codes[1] >> byte & 63 : (codes[2] >> (byte + 4) & 15) | (codes[1] >> (byte + 6) & 3) << 4;
    return U{};
}

// Scales and offsets of a chunk of a tile: those of group i of its columns in row i.
struct Scales {
    static constexpr int64_t kMost = kChunkGroups * 2;
    alignas(64) float scales[kMost][kTileRows], offsets[kMost][kTileRows];
};

EMBEDGRAD_INLINE UVec load_words(const uint8_t* from) {
    UVec words;
    __builtin_memcpy(&words, from, sizeof words);
    return words;
}

EMBEDGRAD_INLINE Vec signed_to_float(UVec x) { return __builtin_convertvector(bits_as<IVec>(x), Vec); }

template <int kBytes>
EMBEDGRAD_INLINE Vec load_numbers(const uint8_t* from) {
    if constexpr (kBytes == 2) return F16::read(reinterpret_cast<const uint16_t*>(from));
    return load(reinterpret_cast<const float*>(from));
}

// The scales of a tile's quant groups from kChunkGroups · chunk on, `groups` of them.
template <Stored S>
static inline void read_scales(const uint8_t* tile, int64_t columns, int64_t chunk, int64_t groups, Scales& to) {
    constexpr Format f = format(S);
    constexpr int64_t kNumber = kTileRows * f.number_bytes;  // from a number of the sixteen rows to the next one
    if constexpr (f.super == kQuantGroup) {
        const uint8_t* numbers = tile + chunk * kChunkGroups * f.number_row_bytes();
        for (int64_t g = 0; g < groups; ++g, numbers += f.number_row_bytes())
            for (int64_t lane = 0; lane < kTileRows; lane += VL) {
                const uint8_t* at = numbers + lane * f.number_bytes;
                constexpr int64_t scales = kQuantGroup / f.group;
                for (int64_t i = 0; i < scales; ++i)
                    store(to.scales[g * scales + i] + lane, load_numbers<f.number_bytes>(at + i * kNumber));
                if constexpr (f.offsets) store(to.offsets[g] + lane, load_numbers<f.number_bytes>(at + kNumber));
            }
    } else {
        const uint8_t* codes = tile + f.head_bytes(columns) + chunk * f.body_bytes();
        const uint8_t* numbers = tile + chunk * f.number_row_bytes();
        for (int64_t lane = 0; lane < kTileRows; lane += VL) {
            UVec words[f.codes], high = {};
            for (int c = 0; c < f.codes; ++c) words[c] = load_words(codes + c * kTileVector + 4 * lane);
            const Vec scale = load_numbers<2>(numbers + 2 * lane);
            Vec least = {};
            if constexpr (f.offsets) least = -load_numbers<2>(numbers + kNumber + 2 * lane);
            if constexpr (S == Stored::iq4_xs)
                high = __builtin_convertvector(
                    *reinterpret_cast<const HalvesAnywhere*>(numbers + kNumber + 2 * lane), UVec);
            for (int s = 0; s < f.super / f.group; ++s) {
                store(to.scales[s] + lane, scale * signed_to_float(sub_scale<S>(words, high, s)));
                if constexpr (f.offsets) store(to.offsets[s] + lane, least * signed_to_float(sub_offset<S>(words, s)));
            }
        }
    }
}

// ---- elements -------------------------------------------------------------------------------------------------------

// A slice of a vector of a tile: four bytes of each of VL rows.
typedef uint16_t Bits __attribute__((vector_size(4 * VL)));
constexpr int64_t kSlice = 4 * VL;  // bytes

EMBEDGRAD_INLINE Bits load_bits(const uint8_t* from) {
    Bits bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return bits;
}

// Every byte `mask`.
constexpr uint16_t both_bytes(int mask) { return static_cast<uint16_t>(mask * 0x0101); }

EMBEDGRAD_INLINE Bits looked_up(Bits index) {
#if EMBEDGRAD_ISA
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kTable));
#endif
#if EMBEDGRAD_ISA == 512
    return bits_as<Bits>(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), bits_as<__m512i>(index)));
#elif EMBEDGRAD_ISA == 2
    return bits_as<Bits>(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), bits_as<__m256i>(index)));
#else
    uint8_t bytes[kSlice];
    __builtin_memcpy(bytes, &index, sizeof index);
    for (uint8_t& byte : bytes) byte = kTable[byte];
    return load_bits(bytes);
#endif
}

// The elements q of the columns 4 i to 4 i + 3 of a quant group; planes: the group's first vector, at the slice.
template <Stored S>
EMBEDGRAD_INLINE Bits quad(const uint8_t* planes, int i) {
    constexpr Format f = format(S);
    Bits q = load_bits(planes + i % f.low * kTileVector);
    if constexpr (f.low < 8) q = q >> i / f.low * f.low & both_bytes((1 << f.low) - 1);
    if constexpr (f.high != 0) {
        const Bits high = load_bits(planes + (f.low + i % f.high) * kTileVector);
        const int down = i / f.high * f.high - f.low;
        q |= (down > 0 ? high >> down : high << -down) & both_bytes(((1 << f.high) - 1) << f.low);
    }
    if constexpr (f.table) q = looked_up(q);
    return q;
}

constexpr int64_t kQuads = kQuantGroup / 4;
constexpr int64_t kUnpackedGroup = kQuads * kTileVector;  // bytes of an unpacked quant group of a tile

template <Stored S>
EMBEDGRAD_INLINE const uint8_t* planes_of(const uint8_t* tile, int64_t columns, int64_t chunk) {
    constexpr Format f = format(S);
    constexpr int64_t supers = kChunkGroups * kQuantGroup / f.super;  // of a chunk
    return tile + f.head_bytes(columns) + chunk * supers * f.body_bytes() + f.codes * kTileVector;
}

// A chunk's elements in bytes: quads [groups] [kQuads] [kTileVector].
template <Stored S>
static inline void unpack_chunk(const uint8_t* planes, int64_t groups, uint8_t* quads) {
    constexpr Format f = format(S);
    for (int64_t g = 0; g < groups; ++g, planes += f.group_bytes(), quads += kUnpackedGroup) {
        prefetch(planes + kChunkGroups * f.group_bytes(), f.group_bytes());
        for (int64_t slice = 0; slice < kTileVector; slice += kSlice)
#pragma GCC unroll 8
            for (int i = 0; i < kQuads; ++i) {
                const Bits q = quad<S>(planes + slice, i);
                __builtin_memcpy(quads + i * kTileVector + slice, &q, sizeof q);
            }
    }
}

// Calls use(Type<stored>).
template <Stored S>
struct Type {
    static constexpr Stored stored = S;
};

template <class Use>
EMBEDGRAD_INLINE void with_type(Stored stored, const Use& use) {
    switch (stored) {
        case Stored::q4_0: return use(Type<Stored::q4_0>{});
        case Stored::q4_1: return use(Type<Stored::q4_1>{});
        case Stored::q5_0: return use(Type<Stored::q5_0>{});
        case Stored::q5_1: return use(Type<Stored::q5_1>{});
        case Stored::q8_0: return use(Type<Stored::q8_0>{});
        case Stored::q2_k: return use(Type<Stored::q2_k>{});
        case Stored::q3_k: return use(Type<Stored::q3_k>{});
        case Stored::q4_k: return use(Type<Stored::q4_k>{});
        case Stored::q5_k: return use(Type<Stored::q5_k>{});
        case Stored::q6_k: return use(Type<Stored::q6_k>{});
        case Stored::iq4_nl: return use(Type<Stored::iq4_nl>{});
        case Stored::iq4_xs: return use(Type<Stored::iq4_xs>{});
        case Stored::int8: return use(Type<Stored::int8>{});
        case Stored::int8_16: return use(Type<Stored::int8_16>{});
        case Stored::int4: return use(Type<Stored::int4>{});
        default: return;
    }
}
