/* Integer products of three tokens and more with 4-bit and 8-bit codes, straight from memory. Included inside an anonymous
 * namespace.
 *
 * A tile is summed for all rows of a panel at once, or for half of them: twelve sums (six tokens by two vectors of rows)
 * and as many totals fit in registers together. With small groups, totals that go through memory take a quarter of the
 * time, and unpacking codes again for every tile takes less than spreading them out once. Sums are taken in the same
 * order as everywhere. */

/* What is asked for while something else is summed: so many lines of 64 bytes for each block of columns; if they are soon
 * to be read, into the first-level cache. */
struct Ahead {
    const uint8_t* codes;
    int lines;
    bool is_near;

    INLINE void ask() {
        if (is_near)
            for (int i = 0; i < lines; i++, codes += 64) __builtin_prefetch(codes, 0, 3);
        else
            for (int i = 0; i < lines; i++, codes += 64) __builtin_prefetch(codes, 0, 2);
    }
};

/* A block of columns, LANES vectors of rows, times TOKENS tokens. */
template <int BITS, int LANES, int TOKENS>
INLINE void add_block(const uint8_t* codes, const uint32_t* x, I (&sums)[TOKENS][LANES]) {
    for_each<8>([&](auto q) INLINE_LAMBDA {
        I word[LANES];
        UNROLL
        for (int lane = 0; lane < LANES; lane++) word[lane] = Block<BITS>(codes + lane * 64 * BITS).template quad<q, true>();
        UNROLL
        for (int i = 0; i < LANES * TOKENS; i++) {
            I& sum = sums[i / LANES][i % LANES];
            sum = Integer::dot<BITS == 8>(sum, word[i % LANES], x[q * TOKENS + i / LANES]);
        }
        IN_ORDER; /* or words of all steps are loaded first, and spilled */
    });
}

/* Where the parameters of a panel's groups lie, one group after the other. Groups of tokens that have scales may be parts
 * of one of the weight. */
template <bool HAS_SCALES> struct WeightGroup {
    int64_t first, passed, step, size; /* the number of its first parameter; of its slots, those that are done */

    INLINE WeightGroup(const PanelPlace& at, int first_lane)
        : first(at.panel * at.weight_groups * BW_PANEL + first_lane * BW_LANES), passed(0), step(at.job.tokens.group),
          size(at.job.weight->group) {}
    INLINE void pass() {
        if constexpr (HAS_SCALES) {
            passed += step;
            if (passed < size) return;
            passed = 0;
        }
        first += BW_PANEL;
    }
};

/* All groups of LANES vectors of rows, from `first` on, times the TOKENS tokens from `token` on, into totals [token][64]. */
template <int BITS, int LANES, int TOKENS, bool HAS_ZERO, bool HAS_REMAINDER, bool HAS_SCALES>
APART void sum_rows(const PanelPlace& at, int first, int64_t token, Ahead ahead, float* totals) {
    constexpr bool ARE_KEPT = LANES * TOKENS <= 12; /* totals, in registers */
    const bw_weight& w = *at.job.weight;
    const uint8_t* codes = at.codes + first * 64 * BITS;
    const int32_t* token_sums = (const int32_t*)at.job.tokens.sums + token;
    const float* token_scales = at.job.tokens.scale + token; /* with HAS_SCALES, of a group */
    const int64_t group = at.job.tokens.group, last = at.groups - 1, whole_blocks = group / BW_BLOCK;
    const int64_t last_blocks = group_slots(at.job, last) / BW_BLOCK, count = at.job.tokens.count, stride = group / 4 * count;
    const uint32_t* x = at.job.tokens.words + token * group / 4;
    const uint32_t* last_x = group_words<Integer>(at.job, last) + token * last_blocks * (BW_BLOCK / 4);
    WeightGroup<HAS_SCALES> own_group(at, first);
    F total[TOKENS][LANES];
    UNROLL
    for (int i = 0; i < LANES * TOKENS; i++) total[i / LANES][i % LANES] = set_f(0.0f);
    for (int64_t g = 0; g <= last; g++, x += stride, token_sums += count, own_group.pass()) {
        const uint32_t* words = g < last ? x : last_x;
        I sums[TOKENS][LANES];
        UNROLL
        for (int i = 0; i < LANES * TOKENS; i++) sums[i / LANES][i % LANES] = Integer::start(HAS_ZERO, token_sums + i / LANES);
        for (int64_t b = g < last ? whole_blocks : last_blocks; b > 0; b--, words += 8 * TOKENS, codes += 4 * 64 * BITS) {
            ahead.ask();
            add_block<BITS, LANES, TOKENS>(codes, words, sums);
        }
        UNROLL
        for (int lane = 0; lane < LANES; lane++) {
            LaneParameters p = load_lane<HAS_ZERO, HAS_REMAINDER>(w, own_group.first + lane * BW_LANES, true);
            UNROLL
            for (int t = 0; t < TOKENS; t++) {
                float* to = totals + t * BW_PANEL + (first + lane) * BW_LANES;
                F before = ARE_KEPT ? total[t][lane] : g ? load_f(to) : set_f(0.0f);
                F after = Integer::fold<HAS_ZERO, HAS_REMAINDER, HAS_SCALES>(before, sums[t][lane], p, token_sums + t, token_scales + t);
                if constexpr (ARE_KEPT) total[t][lane] = after;
                else store_f(to, after);
            }
        }
        if constexpr (HAS_SCALES) token_scales += count;
    }
    UNROLL
    for (int i = 0; i < LANES * TOKENS && ARE_KEPT; i++)
        store_f(totals + i / LANES * BW_PANEL + (first + i % LANES) * BW_LANES, total[i / LANES][i % LANES]);
}

/* Groups of this size need their totals so rarely that all rows can be summed at once. */
constexpr int64_t LARGE_GROUP = 256;

INLINE bool are_halved(const bw_linear_job& job, int64_t tokens) {
    return tokens > 3 && job.tokens.group < LARGE_GROUP && job.tokens.group < job.weight->slots;
}

/* One tile; `ahead` moves on. */
template <int BITS, int TOKENS, bool HAS_ZERO, bool HAS_REMAINDER, bool HAS_SCALES>
INLINE void sum_rows_of_tile(const PanelPlace& at, int64_t token, Ahead& ahead, float* totals) {
    int64_t bytes = at.job.weight->slots / BW_BLOCK * 64 * ahead.lines;
    if (!are_halved(at.job, TOKENS)) {
        sum_rows<BITS, 4, TOKENS, HAS_ZERO, HAS_REMAINDER, HAS_SCALES>(at, 0, token, ahead, totals);
        ahead.codes += bytes;
        return;
    }
    for (int first = 0; first < 4; first += 2, ahead.codes += bytes)
        sum_rows<BITS, 2, TOKENS, HAS_ZERO, HAS_REMAINDER, HAS_SCALES>(at, first, token, ahead, totals);
}

template <int BITS, int TOKENS, bool HAS_SCALES>
INLINE void sum_packed_tile(const PanelPlace& at, int64_t token, Ahead& ahead, float* totals) {
    const bw_weight& w = *at.job.weight;
    if (!w.zero) return sum_rows_of_tile<BITS, TOKENS, false, false, HAS_SCALES>(at, token, ahead, totals);
    if (!w.remainder) return sum_rows_of_tile<BITS, TOKENS, true, false, HAS_SCALES>(at, token, ahead, totals);
    sum_rows_of_tile<BITS, TOKENS, true, true, HAS_SCALES>(at, token, ahead, totals);
}

/* All groups of a panel times all tokens of the job. The panel is read anew for every tile, or half of one, and every time
 * a part of the next panel is asked for, so that memory is busy throughout. What is read once is asked for just before. */
template <int BITS, bool HAS_SCALES> void sum_packed_tiles(const PanelPlace& at, float* totals) {
    int64_t tokens = at.job.tokens.count, width = bw_tile_width(tokens), tiles = (tokens + width - 1) / width;
    int64_t passes = tiles * (are_halved(at.job, width) ? 2 : 1);
    int64_t distance = passes == 1 ? BW_AHEAD : at.job.weight->slots / BW_BLOCK * 4 * 64 * BITS;
    Ahead ahead{at.codes + distance, (int)((4 * BITS + passes - 1) / passes), passes == 1};
    for (int64_t token = 0; token < tokens; token += width, totals += width * BW_PANEL)
        switch (tokens - token < width ? tokens - token : width) {
            case 1: sum_packed_tile<BITS, 1, HAS_SCALES>(at, token, ahead, totals); break;
            case 2: sum_packed_tile<BITS, 2, HAS_SCALES>(at, token, ahead, totals); break;
            case 3: sum_packed_tile<BITS, 3, HAS_SCALES>(at, token, ahead, totals); break;
            case 4: sum_packed_tile<BITS, 4, HAS_SCALES>(at, token, ahead, totals); break;
            case 5: sum_packed_tile<BITS, 5, HAS_SCALES>(at, token, ahead, totals); break;
            default: sum_packed_tile<BITS, TILE_TOKENS, HAS_SCALES>(at, token, ahead, totals);
        }
}

/* One or two tokens with scales for parts of them, times codes that have no other way straight from memory. */
template <int BITS> APART void sum_few(const PanelPlace& at, float* totals) {
    Ahead ahead{at.codes + BW_AHEAD, 4 * BITS, true};
    if (at.job.tokens.count == 1) sum_packed_tile<BITS, 1, true>(at, 0, ahead, totals);
    else sum_packed_tile<BITS, 2, true>(at, 0, ahead, totals);
}
