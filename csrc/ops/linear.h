/* The product of tokens and packed weights, a panel of 64 rows at a time. Included inside an anonymous namespace.
 *
 * Few tokens: weights go from memory through registers into the sums. More: a chunk of a panel's weights is spread out
 * in the first-level cache, and tiles of six tokens by 64 rows are summed from there. Both sum in the same order. */

constexpr int TILE_TOKENS = BW_TILE; /* by four vectors: 24 sums in 32 registers */

/* The vectors that will be read some blocks later: while sums fill the processor's window, nothing else looks ahead. */
template <int BITS> INLINE void prefetch(const uint8_t* codes) {
    UNROLL
    for (int i = 0; i < BITS; i++) __builtin_prefetch(codes + 64 * i + BW_AHEAD);
}

/* groups: of the tokens; weight_groups: of the weight, each of which takes in whole groups of the tokens. */
struct PanelPlace {
    const bw_linear_job& job;
    int64_t panel, groups, weight_groups;
    const uint8_t* codes; /* of the panel */

    /* The parameters of a group: its group of the weight. */
    INLINE Parameters parameters(int64_t group, bool is_integer) const {
        if (job.tokens.scale_group) group = group * job.tokens.group / job.weight->group;
        return load_parameters(*job.weight, panel, group, weight_groups, is_integer);
    }
};

INLINE int64_t group_slots(const bw_linear_job& job, int64_t group) {
    int64_t size = job.tokens.group, first = group * size, slots = job.weight->slots;
    return size < slots - first ? size : slots - first;
}

/* Words of a group: tile after tile, within a tile step after step. */
template <class R> INLINE const uint32_t* group_words(const bw_linear_job& job, int64_t group) {
    return job.tokens.words + group * job.tokens.group / 4 * R::STEPS * job.tokens.count;
}

/* What a group needs of its tokens, from `token` on: their sums and, if they have any for groups, their scales. */
struct TokenParameters {
    const void* sums;
    const float* scales;

    INLINE TokenParameters(const bw_linear_job& job, int64_t group, int64_t token)
        : sums((const uint32_t*)job.tokens.sums + group * job.tokens.count + token),
          scales(job.tokens.scale_group ? job.tokens.scale + group * job.tokens.count + token : nullptr) {}
};

/* Sums of a group, still in registers, into the totals of TOKENS tokens. */
template <class R, int TOKENS, bool HAS_ZERO, bool HAS_REMAINDER, bool HAS_SCALES>
INLINE void fold_tile(typename R::Sum (&sums)[TOKENS][4], float* totals, const Parameters& p, const TokenParameters& own) {
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) {
        F total = load_f(totals + i * BW_LANES);
        total = R::template fold<HAS_ZERO, HAS_REMAINDER, HAS_SCALES>(
            total, sums[i / 4][i % 4], LaneParameters(p, i % 4 * BW_LANES), (const uint32_t*)own.sums + i / 4,
            HAS_SCALES ? own.scales + i / 4 : nullptr);
        store_f(totals + i * BW_LANES, total);
        IN_ORDER; /* or all totals are loaded first, and spilled */
    }
}

template <class R, int TOKENS, bool HAS_SCALES>
INLINE void fold(typename R::Sum (&sums)[TOKENS][4], float* totals, const Parameters& p, const TokenParameters& own) {
    if (!p.has_zero) fold_tile<R, TOKENS, false, false, HAS_SCALES>(sums, totals, p, own);
    else if (!p.has_remainder) fold_tile<R, TOKENS, true, false, HAS_SCALES>(sums, totals, p, own);
    else fold_tile<R, TOKENS, true, true, HAS_SCALES>(sums, totals, p, own);
}

/* How each token's four sums begin. */
template <class R, int TOKENS>
INLINE void start(typename R::Sum (&sums)[TOKENS][4], bool has_zero, const void* group_sums) {
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++)
        sums[i / 4][i % 4] = R::start(has_zero, (const uint32_t*)group_sums + i / 4);
}

/* `blocks` blocks of a panel times TOKENS tokens, added to sums; codes and words of the tokens move on. */
template <class R, int BITS, int TOKENS>
INLINE void sum_blocks(int64_t blocks, const uint8_t*& codes, const uint32_t*& x, const Levels& levels,
                       typename R::Sum (&sums)[TOKENS][4]) {
    for (int64_t b = 0; b < blocks; b++, x += 8 * R::STEPS * TOKENS)
        for_each<4>([&](auto lane) INLINE_LAMBDA {
            Block<BITS> block(codes);
            prefetch<BITS>(codes);
            codes += 64 * BITS;
            for_each<8>([&](auto q) INLINE_LAMBDA {
                typename R::template Weights<BITS> weights(block, levels, q);
                for_each<TOKENS * R::STEPS>([&](auto i) INLINE_LAMBDA {
                    constexpr int token = i % TOKENS, step = i / TOKENS;
                    sums[token][lane] = R::template dot<BITS == 8>(sums[token][lane], weights.word[step],
                                                                   x[q * R::STEPS * TOKENS + i]);
                });
            });
        });
}

/* All groups of a panel times all tokens of the job, of which there are TOKENS, one or two, with one scale each. Totals
 * stay in registers: with small groups, moving them takes as long as the products. */
template <class R, int BITS, int TOKENS, bool HAS_ZERO, bool HAS_REMAINDER>
void sum_panel(const PanelPlace& at, const Levels& levels, float* totals) {
    const bw_weight& w = *at.job.weight;
    const uint32_t* x = at.job.tokens.words;
    const uint8_t* codes = at.codes;
    F total[4 * TOKENS];
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) total[i] = set_f(0.0f);
    for (int64_t group = 0; group < at.groups; group++) {
        const uint32_t* own_sums = (const uint32_t*)at.job.tokens.sums + group * at.job.tokens.count;
        typename R::Sum sums[TOKENS][4];
        start<R, TOKENS>(sums, HAS_ZERO, own_sums);
        sum_blocks<R, BITS, TOKENS>(group_slots(at.job, group) / BW_BLOCK, codes, x, levels, sums);
        for_each<4>([&](auto lane) INLINE_LAMBDA {
            int64_t first = (at.panel * at.groups + group) * BW_PANEL + lane * BW_LANES;
            LaneParameters p = load_lane<HAS_ZERO, HAS_REMAINDER>(w, first, R::STEPS == 1);
            for_each<TOKENS>([&](auto token) INLINE_LAMBDA {
                F& own = total[4 * token + lane];
                own = R::template fold<HAS_ZERO, HAS_REMAINDER, false>(own, sums[token][lane], p, own_sums + token, nullptr);
            });
        });
    }
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) store_f(totals + i * BW_LANES, total[i]);
}

template <class R, int BITS, int TOKENS>
INLINE void sum_whole_panel(const PanelPlace& at, const Levels& levels, float* totals) {
    if (!at.job.weight->zero) return sum_panel<R, BITS, TOKENS, false, false>(at, levels, totals);
    if (!at.job.weight->remainder) return sum_panel<R, BITS, TOKENS, true, false>(at, levels, totals);
    sum_panel<R, BITS, TOKENS, true, true>(at, levels, totals);
}

/* Blocks of codes to weights: out [step][64] words. */
template <class R, int BITS>
void spread(const uint8_t* codes, int64_t blocks, const Levels& levels, uint32_t* out) {
    for (int64_t b = 0; b < blocks; b++)
        for (int lane = 0; lane < 4; lane++, codes += 64 * BITS) {
            Block<BITS> block(codes);
            prefetch<BITS>(codes);
            uint32_t* to = out + b * 8 * R::STEPS * BW_PANEL + lane * BW_LANES;
            for_each<8>([&](auto q) INLINE_LAMBDA {
                typename R::template Weights<BITS> weights(block, levels, q);
                for_each<R::STEPS>([&](auto step) INLINE_LAMBDA {
                    store_i(to + (q * R::STEPS + step) * BW_PANEL, weights.word[step]);
                });
            });
        }
}

/* What a tile needs of its chunk: weights [step][64], sums of earlier chunks, and of the last one where totals are. */
struct Chunk {
    const uint32_t* weights;
    int64_t steps;
    bool is_first, is_last;
    const Parameters& parameters;
};

/* Steps of spread weights times TOKENS tokens. Apart: in a caller's loop, or made
 * anew for its arguments, compilers keep the sums on the stack. */
template <class R, bool IS_WIDE, int TOKENS>
APART void sum_tile(const Chunk& chunk, const uint32_t* x, uint32_t* carried, float* totals, const TokenParameters& own) {
    typename R::Sum sums[TOKENS][4];
    if (chunk.is_first) start<R, TOKENS>(sums, chunk.parameters.has_zero, own.sums);
    else {
        UNROLL
        for (int i = 0; i < 4 * TOKENS; i++) sums[i / 4][i % 4] = R::load(carried + i * BW_LANES);
    }
    const uint32_t* weights = chunk.weights;
    for (int64_t step = 0; step < chunk.steps; step++, weights += BW_PANEL, x += TOKENS) {
        I w[4] = {load_i(weights), load_i(weights + 16), load_i(weights + 32), load_i(weights + 48)};
        UNROLL
        for (int i = 0; i < 4 * TOKENS; i++)
            sums[i / 4][i % 4] = R::template dot<IS_WIDE>(sums[i / 4][i % 4], w[i % 4], x[i / 4]);
    }
    if constexpr (R::STEPS == 1)
        if (chunk.is_last && own.scales) return fold<R, TOKENS, true>(sums, totals, chunk.parameters, own);
    if (chunk.is_last) return fold<R, TOKENS, false>(sums, totals, chunk.parameters, own);
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) R::store(carried + i * BW_LANES, sums[i / 4][i % 4]);
}

template <class R, bool IS_WIDE>
INLINE void sum_tokens(int tokens, const Chunk& chunk, const uint32_t* x, uint32_t* carried, float* totals,
                       const TokenParameters& own) {
    switch (tokens) {
        case 1: return sum_tile<R, IS_WIDE, 1>(chunk, x, carried, totals, own);
        case 2: return sum_tile<R, IS_WIDE, 2>(chunk, x, carried, totals, own);
        case 3: return sum_tile<R, IS_WIDE, 3>(chunk, x, carried, totals, own);
        case 4: return sum_tile<R, IS_WIDE, 4>(chunk, x, carried, totals, own);
        case 5: return sum_tile<R, IS_WIDE, 5>(chunk, x, carried, totals, own);
        default: return sum_tile<R, IS_WIDE, 6>(chunk, x, carried, totals, own);
    }
}

/* A group of a panel times all tokens of the job (at most BW_TOKENS), in chunks that the first-level cache holds. */
template <class R, int BITS>
void sum_in_chunks(const PanelPlace& at, int64_t group, const Levels& levels, uint32_t* carried, float* totals) {
    alignas(64) uint32_t weights[R::CHUNK / 4 * R::STEPS * BW_PANEL];
    const bw_linear_job& job = at.job;
    int64_t slots = group_slots(job, group), words = slots / 4 * R::STEPS, width = bw_tile_width(job.tokens.count);
    const uint32_t* x = group_words<R>(job, group);
    const uint8_t* codes = at.codes + group * job.tokens.group / BW_BLOCK * 4 * 64 * BITS;
    Parameters p = at.parameters(group, R::STEPS == 1);
    for (int64_t first = 0; first < slots; first += R::CHUNK) {
        int64_t part = R::CHUNK < slots - first ? R::CHUNK : slots - first;
        spread<R, BITS>(codes + first / BW_BLOCK * 4 * 64 * BITS, part / BW_BLOCK, levels, weights);
        Chunk chunk{weights, part / 4 * R::STEPS, first == 0, first + part == slots, p};
        for (int64_t token = 0; token < job.tokens.count; token += width) {
            int count = (int)(job.tokens.count - token < width ? job.tokens.count - token : width);
            sum_tokens<R, BITS == 8>(count, chunk, x + token * words + first / 4 * R::STEPS * count,
                                     carried + token * BW_PANEL, totals + token * BW_PANEL,
                                     TokenParameters(job, group, token));
        }
    }
}

/* Groups [first, first + count), whole and small, times all tokens of the job: spread out together. */
template <class R, int BITS>
void sum_small_groups(const PanelPlace& at, int64_t first, int64_t count, const Levels& levels, float* totals) {
    alignas(64) uint32_t weights[R::SMALL / 4 * R::STEPS * BW_PANEL];
    Parameters parameters[R::SMALL / BW_BLOCK];
    const bw_linear_job& job = at.job;
    int64_t slots = job.tokens.group, words = slots / 4 * R::STEPS, tokens = job.tokens.count, width = bw_tile_width(tokens);
    for (int64_t g = 0; g < count; g++) parameters[g] = at.parameters(first + g, R::STEPS == 1);
    spread<R, BITS>(at.codes + first * slots / BW_BLOCK * 4 * 64 * BITS, count * slots / BW_BLOCK, levels, weights);
    const uint32_t* x = group_words<R>(job, first);
    for (int64_t token = 0; token < tokens; token += width) {
        int tile = (int)(tokens - token < width ? tokens - token : width);
        for (int64_t g = 0; g < count; g++) {
            Chunk chunk{weights + g * words * BW_PANEL, words, true, true, parameters[g]};
            sum_tokens<R, BITS == 8>(tile, chunk, x + g * words * tokens + token * words, nullptr, totals + token * BW_PANEL,
                                     TokenParameters(job, first + g, token));
        }
    }
}
