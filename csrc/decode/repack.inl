// Repacks blocks into tiles, and reads rows of either in float32, for one instruction set; see repack.h.
#include "floats.inl"
#include "tiles.inl"
#include "file_blocks.inl"

// ---- into tiles -----------------------------------------------------------------------------------------------------

// A quant group's elements into lane r of its planes.
template <Stored S>
EMBEDGRAD_INLINE void put_group(const uint8_t* q, int64_t r, uint8_t* planes) {
    constexpr Format f = format(S);
    uint32_t quads[kQuads];
    __builtin_memcpy(quads, q, sizeof quads);
    const auto put = [&](int64_t vector, uint32_t word) __attribute__((always_inline)) {
        __builtin_memcpy(planes + vector * kTileVector + 4 * r, &word, 4);
    };
#pragma GCC unroll 8
    for (int v = 0; v < f.low; ++v) {
        uint32_t word = 0;
#pragma GCC unroll 4
        for (int k = 0; k < 8 / f.low; ++k)
            word |= (quads[v + f.low * k] & uint32_t{0x01010101} * ((1u << f.low) - 1)) << f.low * k;
        put(v, word);
    }
    if constexpr (f.high != 0)
#pragma GCC unroll 2
        for (int v = 0; v < f.high; ++v) {
            uint32_t word = 0;
#pragma GCC unroll 8
            for (int k = 0; k < 8 / f.high; ++k)
                word |= (quads[v + f.high * k] >> f.low & uint32_t{0x01010101} * ((1u << f.high) - 1)) << f.high * k;
            put(f.low + v, word);
        }
}

template <Stored S>
static void put_block(const FileBlock& from, int64_t super, int64_t r, int64_t columns, uint8_t* tile) {
    constexpr Format f = format(S);
    uint8_t* numbers = tile + super * f.number_row_bytes() + r * f.number_bytes;
    for (int64_t n = 0; n < f.numbers; ++n)
        __builtin_memcpy(numbers + n * kTileRows * f.number_bytes, from.numbers + n * f.number_bytes, f.number_bytes);
    uint8_t* body = tile + f.head_bytes(columns) + super * f.body_bytes();
    for (int c = 0; c < f.codes; ++c) __builtin_memcpy(body + c * kTileVector + 4 * r, from.codes + c, 4);
    body += f.codes * kTileVector;
    for (int64_t g = 0; g < f.super / kQuantGroup; ++g)
        put_group<S>(from.q + g * kQuantGroup, r, body + g * f.group_bytes());
}

static void fill_tiles(
    Stored stored, const uint8_t* blocks, int64_t row_bytes, int64_t rows, int64_t columns, uint8_t* out, int64_t begin,
    int64_t end) {
    with_type(stored, [&](auto type) {
        constexpr Stored S = decltype(type)::stored;
        constexpr Format f = format(S);
        const int64_t tile_bytes = f.tile_bytes(columns), head = f.head_bytes(columns);
        FileBlock block[kTileRows] = {};  // written and read apart, because a load waits for narrower stores before it
        for (int64_t t = begin; t < end; ++t) {
            uint8_t* tile = out + t * tile_bytes;
            const int64_t first = t * kTileRows, count = std::min(kTileRows, rows - first);
            std::memset(tile, 0, count < kTileRows ? tile_bytes : head);
            for (int64_t super = 0; super < f.supers(columns); ++super) {
                const uint8_t* from = blocks + first * row_bytes + super * f.block_bytes;
                for (int64_t r = 0; r < count; ++r) read_file_block<S>(from + r * row_bytes, block[r]);
                for (int64_t r = 0; r < count; ++r) put_block<S>(block[r], super, r, columns, tile);
            }
        }
    });
}

// ---- rows in float32 ------------------------------------------------------------------------------------------------

// VL bytes as integers. Intrinsics, because GCC 12 takes the bytes one by one.
EMBEDGRAD_INLINE IVec widen_bytes(const uint8_t* q) {
#if EMBEDGRAD_ISA == 512
    return bits_as<IVec>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
#elif EMBEDGRAD_ISA == 2
    return bits_as<IVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q))));
#else
    typedef uint8_t Narrow __attribute__((vector_size(VL)));
    Narrow narrow;
    __builtin_memcpy(&narrow, q, VL);
    return __builtin_convertvector(__builtin_convertvector(narrow, Halves), IVec);
#endif
}

// out [n] = scale · (q − zero) + offset. The product is exact except in int4, which rounds once at the end.
template <Stored S>
EMBEDGRAD_INLINE void widen_columns(const uint8_t* q, float scale, float offset, int64_t n, float* out) {
    constexpr Format f = format(S);
    for (int64_t i = 0; i < n; i += VL) {
        const Vec x = __builtin_convertvector(widen_bytes(q + i) - f.zero, Vec);
        if constexpr (S == Stored::int4)
            store(out + i, fma(x, broadcast(scale), broadcast(offset)));
        else if constexpr (f.offsets)
            store(out + i, x * scale + offset);
        else
            store(out + i, x * scale);
    }
}

// A row's columns of one super-block; q: after the table. The last one may be cut.
template <Stored S>
EMBEDGRAD_INLINE void widen_groups(
    const uint8_t* q, const float* scales, const float* offsets, int64_t stride, int64_t columns, float* out) {
    constexpr Format f = format(S);
    for (int64_t k = 0; k < columns; k += f.group) {
        const int64_t i = k / f.group * stride, left = columns - k;
        float some[f.group];
        widen_columns<S>(q + k, scales[i], f.offsets ? offsets[i] : 0.0f, f.group, left < f.group ? some : out + k);
        if (left < f.group) std::memcpy(out + k, some, sizeof(float) * left);
    }
}

// The rows [begin, end) of a tile.
template <Stored S>
static void widen_tile(const uint8_t* tile, int64_t begin, int64_t end, int64_t columns, float* out) {
    alignas(64) uint8_t quads[kChunkGroups * kUnpackedGroup];
    uint8_t q[kTileRows][kChunkGroups * kQuantGroup];
    Scales scales;
    const int64_t groups = (columns + kQuantGroup - 1) / kQuantGroup;
    for (int64_t chunk = 0; chunk * kChunkGroups < groups; ++chunk) {
        const int64_t here = std::min(kChunkGroups, groups - chunk * kChunkGroups), first = chunk * kChunkGroups * kQuantGroup;
        read_scales<S>(tile, columns, chunk, here, scales);
        unpack_chunk<S>(planes_of<S>(tile, columns, chunk), here, quads);
        for (int64_t r = begin; r < end; ++r)
            for (int64_t i = 0; i < here * kQuads; ++i)
                __builtin_memcpy(q[r] + 4 * i, quads + i * kTileVector + 4 * r, 4);
        for (int64_t r = begin; r < end; ++r)
            widen_groups<S>(
                q[r], scales.scales[0] + r, scales.offsets[0] + r, kTileRows,
                std::min(kChunkGroups * kQuantGroup, columns - first), out + (r - begin) * columns + first);
    }
}

// A row as it is in the file.
template <Stored S>
static void widen_blocks(const uint8_t* blocks, int64_t columns, float* out) {
    constexpr Format f = format(S);
    FileBlock block = {};
    for (int64_t k = 0; k < columns; k += f.super, blocks += f.block_bytes) {
        read_file_block<S>(blocks, block);
        if constexpr (f.table)
            for (int64_t i = 0; i < f.super; ++i) block.q[i] = kTable[block.q[i]];
        float numbers[2], scales[16], offsets[16] = {};
        for (int n = 0; n < f.numbers; ++n)
            widen_any(block.numbers + n * f.number_bytes, f.number_bytes == 2, 1, numbers + n);
        uint16_t high;
        __builtin_memcpy(&high, block.numbers + 2, 2);
        for (int s = 0; s < f.super / f.group; ++s) {
            scales[s] = numbers[f.codes ? 0 : s], offsets[s] = numbers[f.numbers - 1];
            if constexpr (f.codes != 0) {
                scales[s] *= static_cast<float>(static_cast<int32_t>(sub_scale<S, uint32_t>(block.codes, high, s)));
                offsets[s] *= -static_cast<float>(sub_offset<S, uint32_t>(block.codes, s));
            }
        }
        widen_groups<S>(block.q, scales, offsets, 1, std::min<int64_t>(f.super, columns - k), out + k);
    }
}

static void read_part(const Part& part, int64_t begin, int64_t end, int64_t columns, float* out) {
    with_type(part.stored, [&](auto type) {
        constexpr Stored S = decltype(type)::stored;
        const auto* data = static_cast<const uint8_t*>(part.data);
        int64_t row = part.first + begin;
        const int64_t last = part.first + end;
        if (part.in_blocks) {
            for (; row < last; ++row, out += columns) widen_blocks<S>(data + row * part.row_bytes, columns, out);
            return;
        }
        while (row < last) {
            const int64_t t = row / kTileRows, from = row % kTileRows, to = std::min(kTileRows, last - t * kTileRows);
            widen_tile<S>(data + t * format(S).tile_bytes(columns), from, to, columns, out);
            row += to - from, out += (to - from) * columns;
        }
    });
}
