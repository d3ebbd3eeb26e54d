/* Attention over codes in pages: queries and weights become whole numbers of 16 bits, and products with codes are
 * summed exactly, in 32. Included inside an anonymous namespace.
 *
 * Keys are turned so that a vector holds a pair of codes of 16 tokens: scores need no sum across lanes. Of values a
 * vector holds 16 numbers of a pair of tokens. Both are spread out once for all rows of a tile, which are all query heads
 * that read a head. Numbers of values stand in places that suit the instruction set, until the last sum is done. */

constexpr int KEY_BLOCK = 32;   /* tokens whose keys are spread out at once */
constexpr int SLAB = BW_SLAB;   /* numbers of values that are */
constexpr int CODE_BYTES = 32;  /* of a row of codes that are loaded at once */

/* What a tile's rows are as whole numbers, and a piece of the codes. */
struct AttentionCodes {
    alignas(64) uint32_t queries[BW_ROWS * BW_MOST_DIMENSION / 2]; /* [row][pair] */
    alignas(64) int16_t weights[BW_ROWS * BW_CHUNK];
    alignas(64) uint32_t keys[BW_MOST_DIMENSION / 2 * KEY_BLOCK]; /* [pair][token] */
    alignas(64) uint32_t values[BW_CHUNK / 2 * SLAB];             /* [pair of tokens][place] */
    float factor[BW_ROWS];                                        /* of the weights */
};

/* How many pairs a word of codes holds: bytes 0 and 2, then 1 and 3, each of its halves if it has two. */
template <int CODE> INLINE constexpr int pairs_of_word() { return CODE == BW_INT8 ? 2 : 4; }
template <int CODE> INLINE int64_t pairs_of_row(int64_t dimension) { return padded_dimension<CODE>(dimension) / 2; }

template <int CODE> INLINE constexpr float middle_code() { return CODE == BW_INT8 ? 127.5f : 7.5f; }

template <int CODE, int PAIR> INLINE I pair_of(I word) {
    if constexpr (CODE == BW_INT8) return and_i(shift_right<8 * PAIR>(word), set_i(0x00ff00ff));
    else return and_i(shift_right<4 * PAIR>(word), set_i(0x000f000f));
}

/* The 32 bytes from `at` on of a row that has `bytes`, and zeros where it has ended. */
template <bool IS_WHOLE> INLINE const char* row_bytes(const char* row, int64_t at, int64_t bytes, char* part) {
    if (IS_WHOLE || at + CODE_BYTES <= bytes) return row + at;
    memset(part, 0, CODE_BYTES);
    if (at < bytes) memcpy(part, row + at, (size_t)(bytes - at));
    return part;
}

/* The keys of KEY_BLOCK tokens, from `first` on, as pairs: out [pair][token]. */
template <int CODE, bool IS_WHOLE>
void spread_keys(const AttentionChunk& chunk, int64_t first, int64_t dimension, uint32_t* out) {
    int64_t bytes = stored_bytes<CODE>(dimension), end = stored_bytes<CODE>(padded_dimension<CODE>(dimension));
    const char *low = chunk.key(first), *high = chunk.key(first + BW_LANES);
    for (int64_t at = 0; at < end; at += CODE_BYTES) {
        I words[BW_LANES]; /* then: word i of the first 16 tokens, and word i - 8 of the others */
        char parts[2][CODE_BYTES];
        UNROLL
        for (int i = 0; i < BW_LANES; i++)
            words[i] = load_two(row_bytes<IS_WHOLE>(low + i * bytes, at, bytes, parts[0]),
                                row_bytes<IS_WHOLE>(high + i * bytes, at, bytes, parts[1]));
        transpose(words);
        for_each<8>([&](auto i) INLINE_LAMBDA {
            for_each<pairs_of_word<CODE>()>([&](auto pair) INLINE_LAMBDA {
                store_i(out, pair_of<CODE, pair>(words[i]));
                store_i(out + BW_LANES, pair_of<CODE, pair>(words[8 + i]));
                out += KEY_BLOCK;
            });
        });
    }
}

/* The values of `pairs` pairs of tokens, SLAB numbers from `slab` on: out [pair][place]. */
template <int CODE, bool IS_WHOLE>
void spread_values(const AttentionChunk& chunk, int64_t pairs, int64_t slab, int64_t dimension, uint32_t* out) {
    int64_t bytes = stored_bytes<CODE>(dimension), at = stored_bytes<CODE>(slab);
    for (int64_t pair = 0; pair < pairs; pair++, out += SLAB) {
        const char* row = chunk.value(2 * pair);
        char parts[2][CODE_BYTES];
        I v[4];
        auto load = [&](int64_t from, I& first, I& second) INLINE_LAMBDA {
            pair_bytes((const uint8_t*)row_bytes<IS_WHOLE>(row, from, bytes, parts[0]),
                       (const uint8_t*)row_bytes<IS_WHOLE>(row + bytes, from, bytes, parts[1]), first, second);
        };
        load(at, v[0], v[2]);
        if constexpr (CODE == BW_INT8) load(at + CODE_BYTES, v[1], v[3]);
        else {
            v[1] = pair_of<CODE, 1>(v[0]);
            v[3] = pair_of<CODE, 1>(v[2]);
            v[0] = pair_of<CODE, 0>(v[0]);
            v[2] = pair_of<CODE, 0>(v[2]);
        }
        UNROLL
        for (int i = 0; i < 4; i++) store_i(out + i * BW_LANES, v[i]);
    }
}

/* Where number `d` stands among the places of the values. */
template <int CODE> INLINE int64_t value_place(int64_t d) {
    int64_t slab = d / SLAB * SLAB, rest = d % SLAB;
    int byte = (int)(CODE == BW_INT8 ? rest % CODE_BYTES : rest / 2), place = paired_place(byte);
    int64_t vector = place / BW_LANES * 2 + (CODE == BW_INT8 ? rest / CODE_BYTES : rest % 2);
    return slab + vector * BW_LANES + place % BW_LANES;
}

/* Products of COUNT rows with the keys of a block, not yet scaled. */
template <int COUNT>
APART void score_codes(const uint32_t* keys, const uint32_t* queries, int64_t pairs, float* scores) {
    I sums[2 * COUNT];
    UNROLL
    for (int i = 0; i < 2 * COUNT; i++) sums[i] = set_i(0);
    for (int64_t pair = 0; pair < pairs; pair++, keys += KEY_BLOCK) {
        I low = load_i(keys), high = load_i(keys + BW_LANES);
        UNROLL
        for (int row = 0; row < COUNT; row++) {
            I query = set_i((int32_t)queries[row * pairs + pair]);
            sums[2 * row] = dot_halves(sums[2 * row], low, query);
            sums[2 * row + 1] = dot_halves(sums[2 * row + 1], high, query);
        }
    }
    UNROLL
    for (int i = 0; i < 2 * COUNT; i++) store_f(scores + i / 2 * BW_CHUNK + i % 2 * BW_LANES, to_f(sums[i]));
}

/* The weighted values of a slab, of COUNT rows: sums [row][stride] from place `slab` on. */
template <int COUNT>
APART void add_codes(const AttentionCodes& codes, const AttentionRows& rows, int64_t first, int64_t pairs, int64_t stride,
                      float* sums) {
    const int16_t* weights = codes.weights + first * BW_CHUNK;
    const uint32_t* values = codes.values;
    I part[4 * COUNT];
    UNROLL
    for (int i = 0; i < 4 * COUNT; i++) part[i] = set_i(0);
    for (int64_t pair = 0; pair < pairs; pair++, values += SLAB) {
        I v[4] = {load_i(values), load_i(values + 16), load_i(values + 32), load_i(values + 48)};
        UNROLL
        for (int i = 0; i < 4 * COUNT; i++) {
            int32_t both;
            memcpy(&both, weights + i / 4 * BW_CHUNK + 2 * pair, 4);
            part[i] = dot_halves(part[i], v[i % 4], set_i(both));
        }
    }
    UNROLL
    for (int i = 0; i < 4 * COUNT; i++)
        store_f(sums + i / 4 * stride + i % 4 * BW_LANES,
                multiply_add(to_f(part[i]), set_f(codes.factor[first + i / 4]), set_f(rows.offset[first + i / 4])));
}

/* Calls f(how many, the first) for groups of up to MOST rows. */
template <int MOST, class Function> INLINE void for_rows(int64_t count, Function f) {
    for (int64_t row = 0; row < count;) {
        int64_t left = count - row, size = left <= MOST ? left : 4;
        for_each<MOST>([&](auto i) INLINE_LAMBDA {
            if (size == i + 1) f(Number<i + 1>{}, row);
        });
        row += size;
    }
}

/* A row's queries [stride] to pairs of whole numbers; their scale, and what rounding took off. */
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
    constexpr int per_word = 2 * pairs_of_word<CODE>();
    for (int64_t d = 0; d < stride; d += BW_LANES) {
        I rounded = round_to_i(div_f(load_f(x + d), set_f(scale)));
        int32_t code[BW_LANES];
        store_i(code, rounded);
        lost = add_f(lost, multiply_add(to_f(rounded), set_f(-scale), load_f(x + d)));
        for (int i = 0; i < BW_LANES; i++) {
            int64_t within = (d + i) % per_word, half = per_word / 2, place = (d + i) / per_word * half + within % half;
            uint32_t word = (uint32_t)code[i] & 0xffff, kept = within < half ? 0 : pairs[place];
            pairs[place] = within < half ? word : kept | word << 16;
        }
    }
    *rest = lane_sum(lost);
    return scale + lane_sum(damage);
}

/* The scores of `whole` tokens, as sums of whole numbers, to scores; the largest of those that a row sees. What is not
 * finite makes the result's second NaN. */
INLINE float scale_scores(const AttentionChunk& chunk, const AttentionRows& rows, int64_t row, float* s, F& damage) {
    int64_t least = rows.least[row], end = rows.end[row];
    F scale = set_f(rows.query_scale[row]), rest = set_f(rows.query_rest[row]), sum = set_f(rows.query_sum[row]);
    F high = set_f(UNSEEN);
    for (int64_t j = 0; j < end; j += BW_LANES) {
        F product = multiply_add(load_f(s + j), scale, rest);
        F v = multiply_add(product, load_f(chunk.key_scale + j), mul_f(load_f(chunk.key_least + j), sum));
        store_f(s + j, v);
        if (j < least || j + BW_LANES > end) {
            for (int64_t i = j; i < j + BW_LANES; i++) s[i] = i < least || i >= end ? UNSEEN : s[i];
            v = load_f(s + j);
        }
        high = max_f(v, high);
        damage = add_f(damage, sub_f(v, v));
    }
    return lane_most(high);
}

/* Sums of one row to weights, times the values' scales, as whole numbers; zero up to `count`, where it sees nothing. What
 * rounding takes off meets a code of middle size in the offset. What is not finite makes weight and factor NaN. */
template <int VALUE>
void weigh_codes(const AttentionChunk& chunk, AttentionRows& rows, int64_t row, int64_t count, AttentionCodes& codes) {
    float* s = rows.scores + row * BW_CHUNK;
    int16_t* to = codes.weights + row * BW_CHUNK;
    int64_t least = rows.least[row], end = rows.end[row];
    F damage = set_f(0.0f), sum = damage, offset = damage, high = damage, spoilt = damage, lost = damage;
    float largest = scale_scores(chunk, rows, row, s, damage);
    for (int64_t j = 0; j < end; j += BW_LANES) {
        F v = exponential(sub_f(load_f(s + j), set_f(largest)));
        F scale = load_f(chunk.value_scale + j), lowest = load_f(chunk.value_least + j);
        if (j < least || j + BW_LANES > end) {
            store_f(s + j, v);
            v = seen_part(s, j, least, end);
            scale = seen_part(chunk.value_scale, j, least, end);
            lowest = seen_part(chunk.value_least, j, least, end);
        }
        sum = add_f(sum, v);
        offset = multiply_add(v, lowest, offset);
        v = mul_f(v, scale);
        high = max_f(v, high);
        spoilt = add_f(spoilt, sub_f(v, v));
        store_f(s + j, v);
    }
    float most = lane_most(high), factor = most / 32767.0f;
    F inverse = set_f(most > 1e-30f ? 32767.0f / most : 0.0f), step = set_f(-factor);
    int64_t j = 0;
    for (; j < end; j += BW_LANES) {
        F v = load_f(s + j);
        I code = round_to_i(mul_f(v, inverse));
        lost = add_f(lost, multiply_add(to_f(code), step, v));
        store_halves(to + j, code);
    }
    memset(to + j, 0, sizeof(int16_t) * (size_t)(count - j));
    rows.largest[row] = largest;
    rows.weight[row] = lane_sum(add_f(sum, damage));
    rows.offset[row] = lane_sum(multiply_add(lost, set_f(middle_code<VALUE>()), offset));
    codes.factor[row] = factor + lane_sum(spoilt);
}

/* All rows of a tile over one chunk. */
template <int KEY, int VALUE, bool IS_WHOLE>
void attend_coded_chunk(const AttentionChunk& chunk, AttentionRows& rows, AttentionCodes& codes, int64_t count,
                        int64_t dimension) {
    int64_t pairs = pairs_of_row<KEY>(dimension), stride = padded_dimension<VALUE>(dimension);
    int64_t whole = (chunk.count + KEY_BLOCK - 1) / KEY_BLOCK * KEY_BLOCK;
    for (int64_t j = 0; j < whole; j += KEY_BLOCK) {
        spread_keys<KEY, IS_WHOLE>(chunk, j, dimension, codes.keys);
        chunk.look_ahead(j / BW_LANES);
        chunk.look_ahead(j / BW_LANES + 1);
        for_rows<8>(count, [&](auto size, int64_t row) INLINE_LAMBDA {
            score_codes<size>(codes.keys, codes.queries + row * pairs, pairs, rows.scores + row * BW_CHUNK + j);
        });
    }
    for (int64_t row = 0; row < count; row++) weigh_codes<VALUE>(chunk, rows, row, whole, codes);
    for (int64_t slab = 0; slab < stride; slab += SLAB) {
        spread_values<VALUE, IS_WHOLE>(chunk, (chunk.count + 1) / 2, slab, dimension, codes.values);
        for_rows<6>(count, [&](auto size, int64_t row) INLINE_LAMBDA {
            add_codes<size>(codes, rows, row, (chunk.count + 1) / 2, stride, rows.values + row * stride + slab);
        });
    }
}
