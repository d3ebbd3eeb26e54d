/* The product of tokens and packed weights, a panel of 64 rows at a time. Included inside an anonymous namespace.
 *
 * Few tokens: weights go from memory through registers into the sums. More: a chunk of a panel's weights is spread out
 * in the first-level cache, and tiles of six tokens by 64 rows are summed from there. Both sum in the same order. */

constexpr int TILE_TOKENS = 6; /* by four vectors: 24 sums in 32 registers */

struct PanelPlace {
    const bw_linear_job& job;
    int64_t panel, groups;
    const uint8_t* codes; /* of the panel */
};

INLINE int64_t group_slots(const bw_weight& w, int64_t group) {
    int64_t first = group * w.group;
    return w.group < w.slots - first ? w.group : w.slots - first;
}

/* Words of a token's group, and the step to the next token. */
template <class R> INLINE const uint32_t* group_words(const bw_linear_job& job, int64_t group, int64_t* stride) {
    *stride = group_slots(*job.weight, group) / 4 * R::STEPS;
    return job.tokens.words + group * job.weight->group / 4 * R::STEPS * job.tokens.count;
}

INLINE const void* group_sums(const bw_linear_job& job, int64_t group, int64_t token) {
    return (const uint32_t*)job.tokens.sums + group * job.tokens.count + token;
}

/* A group of a panel times TOKENS tokens, weights straight from memory. */
template <class R, int BITS, int TOKENS>
void sum_directly(const PanelPlace& at, int64_t group, const Levels& levels, float* totals) {
    const bw_linear_job& job = at.job;
    int64_t stride, blocks = group_slots(*job.weight, group) / BW_BLOCK;
    const uint32_t* x = group_words<R>(job, group, &stride);
    const uint8_t* codes = at.codes + group * job.weight->group / BW_BLOCK * 4 * 64 * BITS;
    typename R::Sum sums[TOKENS][4];
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) sums[i / 4][i % 4] = R::start();
    for (int64_t b = 0; b < blocks; b++, x += 8 * R::STEPS)
        for_each<4>([&](auto lane) INLINE_LAMBDA {
            Block<BITS> block(codes);
            codes += 64 * BITS;
            for_each<8>([&](auto q) INLINE_LAMBDA {
                typename R::template Weights<BITS> weights(block, levels, q);
                for_each<TOKENS * R::STEPS>([&](auto i) INLINE_LAMBDA {
                    constexpr int token = i / R::STEPS, step = i % R::STEPS;
                    sums[token][lane] = R::template dot<BITS == 8>(sums[token][lane], weights.word[step],
                                                                   x[token * stride + q * R::STEPS + step]);
                });
            });
        });
    Parameters p = load_parameters(*job.weight, at.panel, group, at.groups, R::STEPS == 1);
    for (int token = 0; token < TOKENS; token++)
        for_each<4>([&](auto lane) INLINE_LAMBDA {
            R::fold(totals + token * BW_PANEL, sums[token][lane], lane * BW_LANES, p, levels,
                    group_sums(job, group, token));
        });
}

/* Blocks of codes to weights: out [step][64] words. */
template <class R, int BITS>
void spread(const uint8_t* codes, int64_t blocks, const Levels& levels, uint32_t* out) {
    for (int64_t b = 0; b < blocks; b++)
        for (int lane = 0; lane < 4; lane++, codes += 64 * BITS) {
            Block<BITS> block(codes);
            uint32_t* to = out + b * 8 * R::STEPS * BW_PANEL + lane * BW_LANES;
            for_each<8>([&](auto q) INLINE_LAMBDA {
                typename R::template Weights<BITS> weights(block, levels, q);
                for_each<R::STEPS>([&](auto step) INLINE_LAMBDA {
                    store_i(to + (q * R::STEPS + step) * BW_PANEL, weights.word[step]);
                });
            });
        }
}

/* Steps of spread weights times TOKENS tokens; sums [token][64] are read unless this is a group's first chunk. */
template <class R, bool IS_WIDE, int TOKENS>
INLINE void sum_tile(const uint32_t* weights, int64_t steps, const uint32_t* x, int64_t stride, uint32_t* carried,
                     bool is_first) {
    typename R::Sum sums[TOKENS][4];
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++)
        sums[i / 4][i % 4] = is_first ? R::start() : R::load(carried + i * BW_LANES);
    for (int64_t step = 0; step < steps; step++, weights += BW_PANEL) {
        I w[4] = {load_i(weights), load_i(weights + 16), load_i(weights + 32), load_i(weights + 48)};
        UNROLL
        for (int token = 0; token < TOKENS; token++) {
            uint32_t word = x[token * stride + step];
            UNROLL
            for (int lane = 0; lane < 4; lane++)
                sums[token][lane] = R::template dot<IS_WIDE>(sums[token][lane], w[lane], word);
        }
    }
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) R::store(carried + i * BW_LANES, sums[i / 4][i % 4]);
}

template <class R, bool IS_WIDE>
void sum_tokens(int tokens, const uint32_t* weights, int64_t steps, const uint32_t* x, int64_t stride,
                uint32_t* carried, bool is_first) {
    switch (tokens) {
        case 1: return sum_tile<R, IS_WIDE, 1>(weights, steps, x, stride, carried, is_first);
        case 2: return sum_tile<R, IS_WIDE, 2>(weights, steps, x, stride, carried, is_first);
        case 3: return sum_tile<R, IS_WIDE, 3>(weights, steps, x, stride, carried, is_first);
        case 4: return sum_tile<R, IS_WIDE, 4>(weights, steps, x, stride, carried, is_first);
        case 5: return sum_tile<R, IS_WIDE, 5>(weights, steps, x, stride, carried, is_first);
        default: return sum_tile<R, IS_WIDE, 6>(weights, steps, x, stride, carried, is_first);
    }
}

/* A group of a panel times all tokens of the job (at most BW_TOKENS), in chunks that the first-level cache holds. */
template <class R, int BITS>
void sum_in_chunks(const PanelPlace& at, int64_t group, const Levels& levels, uint32_t* carried, float* totals) {
    alignas(64) uint32_t weights[R::CHUNK / 4 * R::STEPS * BW_PANEL];
    const bw_linear_job& job = at.job;
    int64_t stride, slots = group_slots(*job.weight, group);
    const uint32_t* x = group_words<R>(job, group, &stride);
    const uint8_t* codes = at.codes + group * job.weight->group / BW_BLOCK * 4 * 64 * BITS;
    Parameters p = load_parameters(*job.weight, at.panel, group, at.groups, R::STEPS == 1);
    for (int64_t first = 0; first < slots; first += R::CHUNK) {
        int64_t part = R::CHUNK < slots - first ? R::CHUNK : slots - first, steps = part / 4 * R::STEPS;
        bool is_last = first + part == slots;
        spread<R, BITS>(codes + first / BW_BLOCK * 4 * 64 * BITS, part / BW_BLOCK, levels, weights);
        for (int64_t token = 0; token < job.tokens.count; token += TILE_TOKENS) {
            int count = job.tokens.count - token < TILE_TOKENS ? (int)(job.tokens.count - token) : TILE_TOKENS;
            uint32_t* sums = carried + token * BW_PANEL;
            sum_tokens<R, BITS == 8>(count, weights, steps, x + token * stride + first / 4 * R::STEPS, stride, sums,
                                     first == 0);
            for (int i = 0; is_last && i < 4 * count; i++)
                R::fold(totals + (token + i / 4) * BW_PANEL, R::load(sums + i * BW_LANES), i % 4 * BW_LANES, p, levels,
                        group_sums(job, group, token + i / 4));
        }
    }
}
