/* What the machine can do at most: loops with nothing but loads, or nothing but products. Included inside an anonymous
 * namespace. Both return a number made of all they did, so that no compiler can leave it out. */

uint32_t read_memory(const void* memory, int64_t bytes) {
    const char* p = (const char*)memory;
    I sums[8];
    UNROLL
    for (int i = 0; i < 8; i++) sums[i] = set_i(0);
    for (int64_t at = 0; at + 512 <= bytes; at += 512) {
        UNROLL
        for (int i = 0; i < 8; i++) sums[i] = or_i(sums[i], load_i(p + at + 64 * i));
    }
    UNROLL
    for (int i = 1; i < 8; i++) sums[0] = or_i(sums[0], sums[i]);
    uint32_t lanes[BW_LANES], all = 0;
    store_i(lanes, sums[0]);
    for (uint32_t lane : lanes) all |= lane;
    return all;
}

template <class R> uint32_t multiply_rounds(int64_t rounds) {
    constexpr int CHAINS = 16;
    alignas(64) static volatile uint32_t unknown[CHAINS + 1] = {}; /* or equal chains would be computed once */
    alignas(64) uint32_t start[CHAINS + 1][BW_LANES];
    for (int i = 0; i <= CHAINS; i++)
        for (uint32_t& lane : start[i]) lane = unknown[i];
    typename R::Sum sums[CHAINS];
    UNROLL
    for (int i = 0; i < CHAINS; i++) sums[i] = R::load(start[i]);
    I w = load_i(start[CHAINS]);
    for (int64_t round = 0; round < rounds; round++) {
        UNROLL
        for (int i = 0; i < CHAINS; i++) sums[i] = R::template dot<true>(sums[i], w, (uint32_t)round);
    }
    uint32_t lanes[BW_LANES], all = 0;
    UNROLL
    for (int i = 0; i < CHAINS; i++) {
        R::store(lanes, sums[i]);
        all |= lanes[i];
    }
    return all;
}

/* Sixteen vectors of products a round: 1024 int8, 512 bfloat16 or 256 float32 multiply-adds. */
uint32_t multiply(enum bw_route route, int64_t rounds) {
    if (route == BW_ROUTE_INTEGER) return multiply_rounds<Integer>(rounds);
#if defined(BW_PAIRS)
    if (route == BW_ROUTE_BFLOAT16) return multiply_rounds<Bfloat16>(rounds);
#endif
    return multiply_rounds<Float32>(rounds);
}
