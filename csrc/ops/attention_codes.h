/* Attention over codes in pages: queries and weights become whole numbers of 16 bits, and products with codes are
 * summed exactly, in 32. Included inside an anonymous namespace.
 *
 * Keys are turned once for all rows of a tile (all query heads that read a head), so that a vector holds a word of the codes
 * of 16 tokens: scores need no sum across lanes. Of values a vector holds 16 numbers of a pair of tokens, spread out in
 * registers for up to eight rows. Numbers of values stand in places that suit the instruction set, until the last sum is
 * done. */

constexpr int KEY_BLOCK = 32;   /* tokens whose keys are turned at once */
constexpr int SLAB = BW_SLAB;   /* numbers to whose multiples heads are padded */
constexpr int HALF = SLAB / 2;  /* numbers of values that are summed at once */
constexpr int CODE_BYTES = 32;  /* of a row of codes that are loaded at once */
constexpr int CODED_ROWS = 8;   /* rows whose sums stay in registers */

/* What a tile's rows are as whole numbers, and a piece of the codes. */
struct AttentionCodes {
    alignas(64) uint32_t queries[BW_ROWS * BW_MOST_DIMENSION / 2]; /* [row / CODED_ROWS][pair][row] */
    alignas(64) int16_t weights[BW_ROWS * BW_CHUNK];
    alignas(64) uint32_t keys[BW_MOST_DIMENSION / 4 * KEY_BLOCK]; /* [word][token] */
    alignas(64) char padded[BW_MOST_DIMENSION * KEY_BLOCK];       /* rows that end within a slab */
    float factor[BW_ROWS];                                        /* of the weights */
};

/* How many pairs a word of codes holds: bytes 0 and 2, then 1 and 3, each of its halves if it has two. */
template <int CODE> INLINE constexpr int pairs_of_word() { return CODE == BW_INT8 ? 2 : 4; }
template <int CODE> INLINE int64_t words_of_row(int64_t dimension) {
    return padded_dimension<CODE>(dimension) / 2 / pairs_of_word<CODE>();
}

template <int CODE> INLINE constexpr float middle_code() { return CODE == BW_INT8 ? 127.5f : 7.5f; }

template <int CODE, int PAIR> INLINE I pair_of(I word) {
    if constexpr (CODE == BW_INT8) return and_i(shift_right<8 * PAIR>(word), set_i(0x00ff00ff));
    else return and_i(shift_right<4 * PAIR>(word), set_i(0x000f000f));
}

/* `bytes` of a row of codes, and zeros up to `size`. */
INLINE void pad_codes(char* to, const char* row, int64_t bytes, int64_t size) {
    memcpy(to, row, (size_t)bytes);
    memset(to + bytes, 0, (size_t)(size - bytes));
}

/* The keys of 16 tokens at `low` and 16 at `high`, rows of `bytes`, as `words` words: out [word][token]. */
APART void turn_keys(const char* low, const char* high, int64_t bytes, int64_t words, uint32_t* out) {
    for (int64_t at = 0; at < 4 * words; at += CODE_BYTES, out += 8 * KEY_BLOCK) {
        I turned[BW_LANES]; /* then: word i of the first 16 tokens, and word i - 8 of the others */
        UNROLL
        for (int i = 0; i < BW_LANES; i++) turned[i] = load_two(low + i * bytes + at, high + i * bytes + at);
        transpose(turned);
        UNROLL
        for (int i = 0; i < BW_LANES; i++) store_i(out + i % 8 * KEY_BLOCK + i / 8 * BW_LANES, turned[i]);
    }
}

/* Scores of COUNT rows, from `row` on, and the keys of a block, from token `first` on. The block in its place in the next
 * chunk is asked for meanwhile, as many bytes of it as a step needs. */
template <int CODE, int COUNT>
APART void score_codes(const AttentionChunk& chunk, const AttentionCodes& codes, AttentionRows& rows, int64_t row,
                       int64_t first, int64_t words) {
    constexpr int PAIRS = pairs_of_word<CODE>();
    const uint32_t *keys = codes.keys, *queries = codes.queries + row * words * PAIRS;
    const char *later[2] = {chunk.later_keys[first / BW_LANES], chunk.later_keys[first / BW_LANES + 1]};
    I sums[2 * COUNT];
    UNROLL
    for (int i = 0; i < 2 * COUNT; i++) sums[i] = set_i(0);
    for (int64_t word = 0; word < words; word++, keys += KEY_BLOCK, queries += PAIRS * CODED_ROWS) {
        I low = load_i(keys), high = load_i(keys + BW_LANES);
        __builtin_prefetch(later[0] + 4 * BW_LANES * word, 0, 2);
        __builtin_prefetch(later[1] + 4 * BW_LANES * word, 0, 2);
        for_each<PAIRS>([&](auto pair) INLINE_LAMBDA {
            I lower = pair_of<CODE, pair>(low), upper = pair_of<CODE, pair>(high);
            UNROLL
            for (int i = 0; i < COUNT; i++) {
                I query = set_i((int32_t)queries[pair * CODED_ROWS + i]);
                sums[2 * i] = dot_halves(sums[2 * i], lower, query);
                sums[2 * i + 1] = dot_halves(sums[2 * i + 1], upper, query);
            }
        });
    }
    const float *scale = chunk.key_scale + first, *least = chunk.key_least + first;
    UNROLL
    for (int i = 0; i < 2 * COUNT; i++) {
        int64_t own = row + i / 2, lane = i % 2 * BW_LANES;
        F product = multiply_add(to_f(sums[i]), set_f(rows.query_scale[own]), set_f(rows.query_rest[own]));
        F offset = mul_f(load_f(least + lane), set_f(rows.query_sum[own]));
        store_f(rows.scores + own * BW_CHUNK + first + lane, multiply_add(product, load_f(scale + lane), offset));
    }
}

/* Where number `d` of a slab of values stands among its places. */
template <int CODE> INLINE int value_place(int d) {
    if (CODE == BW_INT8) return d / HALF * HALF + paired_place(d % HALF);
    int place = paired_place(d / 2);
    return place / BW_LANES * HALF + d % 2 * BW_LANES + place % BW_LANES;
}

/* The values of two tokens, rows of `bytes`: the first (0) or second (1) half of a slab, as pairs in two vectors. */
template <int CODE, int WHICH> INLINE void pair_values(const char* row, int64_t bytes, I& first, I& second) {
    pair_bytes((const uint8_t*)row, (const uint8_t*)row + bytes, first, second);
    if constexpr (CODE == BW_INT4) {
        I both = WHICH ? second : first;
        first = pair_of<CODE, 0>(both);
        second = pair_of<CODE, 1>(both);
    }
}

/* Where the values of a chunk's groups of tokens lie, from byte `at` on of rows of `bytes`; and, of those in their places
 * in the next chunk, what is asked for beside a pair of tokens. */
struct ValueRows {
    const char *const *groups, *const *later;
    int64_t at, bytes, later_at, later_bytes, count;
};

/* Weighted values of half a slab, of COUNT rows from `row` on: sums [row][stride]. */
template <int CODE, int COUNT, int WHICH>
APART void add_codes(const AttentionCodes& codes, const AttentionRows& rows, int64_t row, const ValueRows& values,
                     int64_t stride, float* sums) {
    const int64_t bytes = values.bytes, count = values.count;
    const int16_t* weights = codes.weights + row * BW_CHUNK;
    I part[2 * COUNT];
    UNROLL
    for (int i = 0; i < 2 * COUNT; i++) part[i] = set_i(0);
    for (int64_t j = 0; j < count;) {
        const char *from = values.groups[j / BW_LANES] + values.at, *later = values.later[j / BW_LANES] + values.later_at;
        for (int64_t end = j + BW_LANES < count ? j + BW_LANES : count; j < end; j += 2, from += 2 * bytes) {
            I first, second;
            __builtin_prefetch(later, 0, 2);
            later += 2 * values.later_bytes;
            pair_values<CODE, WHICH>(from, bytes, first, second);
            UNROLL
            for (int i = 0; i < COUNT; i++) {
                int32_t both;
                memcpy(&both, weights + i * BW_CHUNK + j, 4);
                part[2 * i] = dot_halves(part[2 * i], first, set_i(both));
                part[2 * i + 1] = dot_halves(part[2 * i + 1], second, set_i(both));
            }
        }
    }
    UNROLL
    for (int i = 0; i < 2 * COUNT; i++)
        store_f(sums + i / 2 * stride + i % 2 * BW_LANES,
                multiply_add(to_f(part[i]), set_f(codes.factor[row + i / 2]), set_f(rows.offset[row + i / 2])));
}

/* Calls f(how many, the first) for groups of up to CODED_ROWS rows. */
template <class Function> INLINE void for_rows(int64_t count, Function f) {
    for (int64_t row = 0; row < count; row += CODED_ROWS) {
        int64_t size = count - row < CODED_ROWS ? count - row : CODED_ROWS;
        for_each<CODED_ROWS>([&](auto i) INLINE_LAMBDA {
            if (size == i + 1) f(Number<i + 1>{}, row);
        });
    }
}

/* A row's queries [stride] to pairs [pair][CODED_ROWS] of whole numbers; their scale, and what rounding took off. */
template <int CODE> INLINE float code_queries(const float* x, int64_t dimension, uint32_t* pairs, float* rest) {
    /* 255 * 32767 * 256 < 2^31 */
    float most = CODE == BW_INT8 && dimension > 256 ? 16383.0f : 32767.0f;
    int64_t stride = padded_dimension<CODE>(dimension);
    F high = set_f(0.0f), damage = set_f(0.0f);
    for (int64_t d = 0; d < stride; d += BW_LANES) {
        F v = load_f(x + d);
        high = max_f(max_f(v, sub_f(set_f(0.0f), v)), high);
        damage = add_f(damage, sub_f(v, v));
    }
    float scale = lane_most(high) / most;
    scale = scale > 1e-30f ? scale : 1e-30f; /* less is nothing beside the keys' least numbers */
    F lost = set_f(0.0f);
    alignas(64) uint16_t codes[BW_MOST_DIMENSION];
    for (int64_t d = 0; d < stride; d += BW_LANES) {
        I rounded = round_to_i(div_f(load_f(x + d), set_f(scale)));
        lost = add_f(lost, multiply_add(to_f(rounded), set_f(-scale), load_f(x + d)));
        store_halves(codes + d, rounded);
    }
    constexpr int PAIRS = pairs_of_word<CODE>();
    for (int64_t d = 0; d < stride; d += 2 * PAIRS)
        for (int64_t i = d; i < d + PAIRS; i++, pairs += CODED_ROWS) *pairs = codes[i] | (uint32_t)codes[i + PAIRS] << 16;
    *rest = lane_sum(lost);
    return scale + lane_sum(damage);
}

/* The largest of the scores that a row sees; those beside them become UNSEEN. */
INLINE void find_largest(AttentionRows& rows, int64_t row) {
    float* s = rows.scores + row * BW_CHUNK;
    int64_t least = rows.least[row], end = rows.end[row];
    F high = set_f(UNSEEN);
    for (int64_t j = 0; j < least; j++) s[j] = UNSEEN;
    for (int64_t j = end; j % BW_LANES; j++) s[j] = UNSEEN;
    for (int64_t j = 0; j < end; j += BW_LANES) high = max_f(load_f(s + j), high);
    rows.largest[row] = lane_most(high);
}

/* A row's scores to weights times the values' scales; the largest of these goes to `most`. What is not finite makes
 * weight and factor NaN. IS_ALL: the row sees all tokens. */
template <bool IS_ALL>
INLINE void weigh_scores(const AttentionChunk& chunk, AttentionRows& rows, int64_t row, AttentionCodes& codes, float* most) {
    float* s = rows.scores + row * BW_CHUNK;
    int64_t least = IS_ALL ? 0 : rows.least[row], end = IS_ALL ? BW_CHUNK : rows.end[row];
    F largest = set_f(rows.largest[row]), zero = set_f(0.0f);
    F damage = zero, sum = zero, offset = zero, high = zero, spoilt = zero;
    auto weigh = [&](int64_t j) INLINE_LAMBDA {
        F score = load_f(s + j), v = power_of_two(sub_f(score, largest));
        F scale = load_f(chunk.value_scale + j), lowest = load_f(chunk.value_least + j);
        damage = multiply_add(score, zero, damage); /* 0, or NaN */
        if (!IS_ALL && (j < least || j + BW_LANES > end)) {
            store_f(s + j, v);
            v = seen_part(s, j, least, end);
            scale = seen_part(chunk.value_scale, j, least, end);
            lowest = seen_part(chunk.value_least, j, least, end);
        }
        sum = add_f(sum, v);
        offset = multiply_add(v, lowest, offset);
        v = mul_f(v, scale);
        high = max_f(v, high);
        spoilt = multiply_add(v, zero, spoilt);
        store_f(s + j, v);
    };
    if constexpr (IS_ALL) for_each<GROUPS>([&](auto group) INLINE_LAMBDA { weigh(group * BW_LANES); });
    else for (int64_t j = 0; j < end; j += BW_LANES) weigh(j);
    *most = lane_most(high);
    rows.weight[row] = lane_sum(add_f(sum, damage));
    rows.offset[row] = lane_sum(offset);
    codes.factor[row] = *most / 32767.0f + lane_sum(spoilt);
}

/* These to whole numbers, zeros up to `count`. What rounding takes off meets a code of middle size in the offset. */
template <int VALUE>
INLINE void round_weights(AttentionRows& rows, int64_t row, int64_t count, float most, AttentionCodes& codes) {
    float* s = rows.scores + row * BW_CHUNK;
    int16_t* to = codes.weights + row * BW_CHUNK;
    F inverse = set_f(most > 1e-30f ? 32767.0f / most : 0.0f), step = set_f(most / -32767.0f), lost = set_f(0.0f);
    int64_t j = 0;
    for (; j < rows.end[row]; j += BW_LANES) {
        F v = load_f(s + j);
        I code = round_to_i(mul_f(v, inverse));
        lost = add_f(lost, multiply_add(to_f(code), step, v));
        store_halves(to + j, code);
    }
    memset(to + j, 0, sizeof(int16_t) * (size_t)(count - j));
    rows.offset[row] += lane_sum(lost) * middle_code<VALUE>();
}

template <int KEY, bool IS_WHOLE>
INLINE void score_chunk(const AttentionChunk& chunk, AttentionRows& rows, AttentionCodes& codes, int64_t count,
                        int64_t dimension) {
    int64_t words = words_of_row<KEY>(dimension);
    for (int64_t j = 0; j < chunk.count; j += KEY_BLOCK) {
        const char *low = chunk.key(j), *high = chunk.key(j + BW_LANES);
        for (int64_t i = 0; !IS_WHOLE && i < KEY_BLOCK; i++)
            pad_codes(codes.padded + i * 4 * words, chunk.key(j + i), chunk.key_bytes, 4 * words);
        if (IS_WHOLE) turn_keys(low, high, chunk.key_bytes, words, codes.keys);
        else turn_keys(codes.padded, codes.padded + BW_LANES * 4 * words, 4 * words, words, codes.keys);
        for_rows(count, [&](auto size, int64_t row) INLINE_LAMBDA {
            score_codes<KEY, size>(chunk, codes, rows, row, j, words);
        });
    }
}

template <int VALUE, bool IS_WHOLE>
INLINE void add_chunk(const AttentionChunk& chunk, AttentionRows& rows, AttentionCodes& codes, int64_t count,
                      int64_t dimension) {
    constexpr int64_t size = stored_bytes<VALUE>(SLAB);
    int64_t stride = padded_dimension<VALUE>(dimension), seen = (chunk.count + 1) / 2 * 2, later_at = 0;
    for (int64_t slab = 0; slab < stride; slab += SLAB) {
        int64_t at = stored_bytes<VALUE>(slab), bytes = chunk.value_bytes, rest = bytes - at < size ? bytes - at : size;
        ValueRows values{chunk.values, chunk.later_values, at, bytes, later_at, bytes, seen};
        const char* padded[GROUPS];
        if (!IS_WHOLE) {
            for (int64_t j = 0; j < seen; j++) pad_codes(codes.padded + j * size, chunk.value(j) + at, rest, size);
            for (int64_t group = 0; group < GROUPS; group++) padded[group] = codes.padded + group * BW_LANES * size;
            values.groups = padded;
            values.bytes = size;
            values.at = 0;
        }
        for_each<2>([&](auto which) INLINE_LAMBDA {
            constexpr int WHICH = VALUE == BW_INT4 ? int(which) : 0; /* which bytes, or which of their pairs */
            if (which && VALUE == BW_INT8) values.at += HALF;
            for_rows(count, [&](auto number, int64_t row) INLINE_LAMBDA {
                float* sums = rows.values + row * stride + slab + which * HALF;
                add_codes<VALUE, number, WHICH>(codes, rows, row, values, stride, sums);
            });
            if (values.later_at + 64 < 2 * chunk.value_bytes) values.later_at = later_at += 64;
        });
    }
}

/* All rows of a tile over one chunk. */
template <int KEY, int VALUE, bool IS_WHOLE>
void attend_coded_chunk(const AttentionChunk& chunk, AttentionRows& rows, AttentionCodes& codes, int64_t count,
                        int64_t dimension) {
    float most[BW_ROWS];
    score_chunk<KEY, IS_WHOLE>(chunk, rows, codes, count, dimension);
    for (int64_t row = 0; row < count; row++) find_largest(rows, row);
    for (int64_t row = 0; row < count; row++) {
        if (rows.least[row] == 0 && rows.end[row] == BW_CHUNK) weigh_scores<true>(chunk, rows, row, codes, most + row);
        else weigh_scores<false>(chunk, rows, row, codes, most + row);
    }
    for (int64_t row = 0; row < count; row++) round_weights<VALUE>(rows, row, BW_CHUNK, most[row], codes);
    add_chunk<VALUE, IS_WHOLE>(chunk, rows, codes, count, dimension);
}
