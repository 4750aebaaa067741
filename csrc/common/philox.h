// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC '11).
//
// A number depends on (seed, stream, step) only. Each sequence draws from its own stream, so its text does not depend
// on the other sequences of the batch, and the generator has no state to store.
#pragma once

#include "host_device.h"

namespace embedgrad {

struct Philox {
    uint32_t word[4];
};

EMBEDGRAD_HD inline Philox philox4x32_10(Philox counter, uint32_t key0, uint32_t key1) {
    uint32_t* c = counter.word;
    for (int round = 0; round < 10; ++round) {
        const uint64_t left = uint64_t{0xD2511F53u} * c[0], right = uint64_t{0xCD9E8D57u} * c[2];
        const uint32_t c1 = c[1], c3 = c[3];
        c[0] = static_cast<uint32_t>(right >> 32) ^ c1 ^ key0;
        c[1] = static_cast<uint32_t>(right);
        c[2] = static_cast<uint32_t>(left >> 32) ^ c3 ^ key1;
        c[3] = static_cast<uint32_t>(left);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// 64 random bits: key = seed, counter = (step, 0, stream).
EMBEDGRAD_HD inline uint64_t random_bits(uint64_t seed, uint64_t stream, uint32_t step) {
    const Philox counter = {{step, 0, static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}};
    const Philox r = philox4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return uint64_t{r.word[0]} << 32 | r.word[1];
}

}  // namespace embedgrad
