// kChains chains of multiply-adds for one instruction set.

static void multiply_add(int64_t rounds, float& result) {
    Vec chain[kChains];
    for (int k = 0; k < kChains; ++k) chain[k] = broadcast(1.0f + static_cast<float>(k));
    const Vec by = broadcast(0.999f + result);
    for (int64_t n = 0; n < rounds; ++n)
#pragma GCC unroll 12
        for (int k = 0; k < kChains; ++k) chain[k] = chain[k] * by + by;
    for (int k = 1; k < kChains; ++k) chain[0] += chain[k];
    result = sum(chain[0]);
}

static void vector_length(int64_t& length) { length = VL; }
