// Products of tiles (formats.h) with activations in bytes, for one instruction set. No sum runs across lanes: a 32-bit
// lane has four columns (a quad) of one of VL matrix rows, and the same four columns of an activation row are broadcast
// to all lanes. A scale's share of a sum is an exact integer; these are added in float32 in the order of the columns,
// each with one rounding. So every instruction set and every number of activation rows gives the same bits.
//
// Few activation rows meet the elements in registers, as they are unpacked. For more of them a chunk of a tile is
// unpacked to bytes first, and the sums of all activation rows are kept meanwhile.

constexpr int64_t kAhead = 2048;  // bytes by which elements that are read once are prefetched

// Integer sums of lanes for M activation rows: sums[m] += Σ q x over kCount quads of a group from `first` on.
// next(i): the quad's elements q, which have at most kBits bits.
#if defined(EMBEDGRAD_VNNI)

constexpr int64_t kFew = 4;   // up to so many activation rows meet the elements in registers
constexpr int64_t kMost = 8;  // activation rows at a time

template <int M, int kBits, int kCount, class Next>
EMBEDGRAD_INLINE void add_dots(IVec* sums, const QuantizedGroup* const* x, int first, const Next& next) {
#pragma GCC unroll 8
    for (int i = first; i < first + kCount; ++i) {
        const __m512i q = bits_as<__m512i>(next(i));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            int32_t four;
            __builtin_memcpy(&four, x[m]->bytes + 4 * i, 4);
            sums[m] = bits_as<IVec>(_mm512_dpbusd_epi32(bits_as<__m512i>(sums[m]), q, _mm512_set1_epi32(four)));
        }
    }
}

#elif EMBEDGRAD_ISA == 2

constexpr int64_t kFew = 2;
constexpr int64_t kMost = 4;

// Sums of neighbouring 16-bit numbers, times `by`.
EMBEDGRAD_INLINE IVec times(__m256i pairs, int16_t by) {
    return bits_as<IVec>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(by)));
}

// Products of bytes are added in 16 bits as long as they fit: 2 · 15 · 127 · 8 < 2¹⁵ for eight quads of four bits, four
// quads of five bits, two of six. Elements of eight bits are split in two halves of four.
template <int M, int kBits, int kCount, class Next>
EMBEDGRAD_INLINE void add_dots(IVec* sums, const QuantizedGroup* const* x, int first, const Next& next) {
    constexpr bool kSplit = kBits > 6;
    constexpr int kFit = kSplit || kBits <= 4 ? 8 : kBits == 5 ? 4 : 2, kRun = kFit < kCount ? kFit : kCount;
    const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int run = first; run < first + kCount; run += kRun) {
        __m256i low[M], high[M];
        for (int m = 0; m < M; ++m) low[m] = high[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int i = run; i < run + kRun; ++i) {
            const __m256i q = bits_as<__m256i>(next(i));
            const __m256i q_low = kSplit ? _mm256_and_si256(q, nibble) : q;
            const __m256i q_high = kSplit ? _mm256_and_si256(_mm256_srli_epi16(q, 4), nibble) : q;
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                int32_t four;
                __builtin_memcpy(&four, x[m]->bytes + 4 * i, 4);
                const __m256i quad_x = _mm256_set1_epi32(four);
                low[m] = _mm256_add_epi16(low[m], _mm256_maddubs_epi16(q_low, quad_x));
                if constexpr (kSplit) high[m] = _mm256_add_epi16(high[m], _mm256_maddubs_epi16(q_high, quad_x));
            }
        }
        for (int m = 0; m < M; ++m) {
            sums[m] += times(low[m], 1);
            if constexpr (kSplit) sums[m] += times(high[m], 16);
        }
    }
}

#else

constexpr int64_t kFew = 2;
constexpr int64_t kMost = 4;

// A product of an element and an activation fits 16 bits: 255 · 127 < 2¹⁵.
template <int M, int kBits, int kCount, class Next>
EMBEDGRAD_INLINE void add_dots(IVec* sums, const QuantizedGroup* const* x, int first, const Next& next) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * VL)));
    typedef int8_t SignedBytes __attribute__((vector_size(4 * VL)));
    typedef int16_t Words __attribute__((vector_size(8 * VL)));
    typedef int32_t Pairs __attribute__((vector_size(8 * VL)));  // two sums for each lane
    Pairs pairs[M] = {};
    for (int i = first; i < first + kCount; ++i) {
        const Words q = __builtin_convertvector(bits_as<Bytes>(next(i)), Words);
        for (int m = 0; m < M; ++m) {
            int32_t four;
            __builtin_memcpy(&four, x[m]->bytes + 4 * i, 4);
            const Words words = q * __builtin_convertvector(bits_as<SignedBytes>(IVec{} + four), Words);
            const Pairs two = bits_as<Pairs>(words);
            pairs[m] += (two << 16 >> 16) + (two >> 16);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int lane = 0; lane < VL; ++lane) sums[m][lane] += pairs[m][2 * lane] + pairs[m][2 * lane + 1];
}

#endif

// acc[m] += Σ w x over a quant group for M activation rows. scales, offsets: of the group's first scale, at the lanes.
template <int M, int kBits, int kGroup, bool kOffsets, class Next>
EMBEDGRAD_INLINE void add_group(
    Vec* acc, const QuantizedGroup* const* x, int zero, const float* scales, const float* offsets, const Next& next) {
    constexpr int kParts = kQuantGroup / kGroup, kCount = kGroup / 4;
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part, scales += kTileRows, offsets += kTileRows) {
        IVec sums[M] = {};
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
            sums[m] = IVec{} - zero * (kParts == 1 ? x[m]->sums[0] + x[m]->sums[1] : x[m]->sums[part]);
        add_dots<M, kBits, kCount>(sums, x, part * kCount, next);
        const Vec scale = load(scales);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            acc[m] = fma(__builtin_convertvector(sums[m], Vec), scale * x[m]->scale, acc[m]);
            if constexpr (kOffsets) {
                const float sum = kParts == 1 ? x[m]->sum : x[m]->scale * static_cast<float>(x[m]->sums[part]);
                acc[m] = fma(load(offsets), broadcast(sum), acc[m]);
            }
        }
    }
}

// Sums of an activation row for the rows of a tile.
struct alignas(64) RowSums {
    float row[kTileRows];
};

// A chunk of a tile: its scales, its elements in planes or unpacked, and the activations' groups that meet it.
struct Chunk {
    int64_t first, groups;  // quant groups
    const Scales* scales;
    const uint8_t* elements;
};

// sums += the share of a chunk for M activation rows from b on. quad_of(group, slice, i): elements of quad i.
template <int M, int kBits, int kGroup, bool kOffsets, class QuadOf>
EMBEDGRAD_INLINE void add_chunk(
    const Chunk& chunk, int zero, const Activations& x, int64_t b, RowSums* sums, const QuadOf& quad_of) {
    for (int64_t slice = 0; slice < kTileVector; slice += kSlice) {
        const int64_t lane = slice / 4;
        Vec acc[M];
        const QuantizedGroup* rows[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] = load(sums[m].row + lane), rows[m] = x.groups(b + m) + chunk.first;
        const float *scales = chunk.scales->scales[0] + lane, *offsets = chunk.scales->offsets[0] + lane;
        for (int64_t g = 0; g < chunk.groups; ++g) {
            add_group<M, kBits, kGroup, kOffsets>(
                acc, rows, zero, scales, offsets,
                [&](int i) __attribute__((always_inline)) { return quad_of(g, slice, i); });
            scales += kQuantGroup / kGroup * kTileRows, offsets += kQuantGroup / kGroup * kTileRows;
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) ++rows[m];
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store(sums[m].row + lane, acc[m]);
    }
}

template <int M, Stored S>
static __attribute__((noinline)) void add_packed(const Chunk& chunk, const Activations& x, int64_t b, RowSums* sums) {
    constexpr Format f = format(S);
    add_chunk<M, f.bits(), f.group, f.offsets>(
        chunk, f.zero, x, b, sums, [&](int64_t g, int64_t slice, int i) __attribute__((always_inline)) {
            const uint8_t* planes = chunk.elements + g * f.group_bytes();
            if (i == 0 && slice == 0) prefetch(planes + kAhead, f.group_bytes());
            return quad<S>(planes + slice, i);
        });
}

template <int M, int kBits, int kGroup, bool kOffsets>
static __attribute__((noinline)) void add_unpacked(
    const Chunk& chunk, int zero, const Activations& x, int64_t b, RowSums* sums) {
    add_chunk<M, kBits, kGroup, kOffsets>(
        chunk, zero, x, b, sums, [&](int64_t g, int64_t slice, int i) __attribute__((always_inline)) {
            return load_bits(chunk.elements + g * kUnpackedGroup + i * kTileVector + slice);
        });
}

// Calls add(rows, b) with a constant number of rows, at most kMost, until every one of the batch had its turn.
template <int kMost, class Add>
EMBEDGRAD_INLINE void for_each_row(int64_t batch, const Add& add) {
    int64_t b = 0;
    if constexpr (kMost >= 8)
        for (; b + 8 <= batch; b += 8) add(std::integral_constant<int, 8>{}, b);
    if constexpr (kMost >= 4)
        for (; b + 4 <= batch; b += 4) add(std::integral_constant<int, 4>{}, b);
    for (; b + 2 <= batch; b += 2) add(std::integral_constant<int, 2>{}, b);
    if (b < batch) add(std::integral_constant<int, 1>{}, b);
}

// sums [batch] = the products of a tile.
template <Stored S>
static void multiply_tile(const uint8_t* tile, const Activations& x, int64_t batch, RowSums* sums) {
    constexpr Format f = format(S);
    const int64_t columns = x.columns(), groups = (columns + kQuantGroup - 1) / kQuantGroup;
    alignas(64) uint8_t quads[kChunkGroups * kUnpackedGroup];
    Scales scales;
    std::memset(sums, 0, batch * sizeof *sums);
    for (int64_t first = 0; first < groups; first += kChunkGroups) {
        const int64_t index = first / kChunkGroups;
        Chunk chunk = {first, std::min(kChunkGroups, groups - first), &scales, planes_of<S>(tile, columns, index)};
        read_scales<S>(tile, columns, index, chunk.groups, scales);
        if (batch <= kFew) {
            for_each_row<kFew>(batch, [&](auto rows, int64_t b) {
                add_packed<decltype(rows)::value, S>(chunk, x, b, sums + b);
            });
            continue;
        }
        unpack_chunk<S>(chunk.elements, chunk.groups, quads);
        // While this chunk is multiplied, a share of the next one comes from main memory for every kMost rows.
        const int64_t bytes = chunk.groups * f.group_bytes(), share = (bytes * kMost + batch - 1) / batch;
        const uint8_t* next = chunk.elements + bytes;
        const uint8_t* const end = next + bytes;
        chunk.elements = quads;
        for_each_row<kMost>(batch, [&](auto rows, int64_t b) {
            if (next < end) prefetch(next, share);
            next += share;
            add_unpacked<decltype(rows)::value, f.bits(), f.group, f.offsets>(chunk, f.zero, x, b, sums + b);
        });
    }
}

static void tiles_part(
    const Part& part, const Activations& x, int64_t batch, int64_t begin, int64_t end, const Output& out) {
    auto* sums = reinterpret_cast<RowSums*>(thread_memory(batch * sizeof(RowSums)));
    with_type(part.stored, [&](auto type) {
        constexpr Stored S = decltype(type)::stored;
        const int64_t last = part.first + end, tile_bytes = format(S).tile_bytes(x.columns());
        for (int64_t row = part.first + begin; row < last;) {
            const int64_t t = row / kTileRows, next = std::min((t + 1) * kTileRows, last);
            out.prefetch(batch, row - part.first);
            multiply_tile<S>(static_cast<const uint8_t*>(part.data) + t * tile_bytes, x, batch, sums);
            for (int64_t b = 0; b < batch; ++b)
                out.put(b, row - part.first, sums[b].row + row % kTileRows, next - row);
            row = next;
        }
    });
}
