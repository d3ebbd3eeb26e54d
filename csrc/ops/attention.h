/* Attention over keys and values in pages, a chunk of BW_CHUNK tokens at a time. Included inside an anonymous namespace.
 *
 * A row is one token's query of one head. Its result is made of the chunks that it sees, each computed by itself (scores,
 * the largest, exponentials, weighted sum), folded from first to last into spans of BW_SPAN chunks, and those again, every
 * sum in one fixed order. So a row does not depend on the rows beside it, on how spans were dealt out to threads, nor on
 * how the prompt was cut. Scores are in bits: queries are multiplied by log2(e), weights are powers of two. */

constexpr float UNSEEN = -3.0e38f;             /* a score that no sum sees */
constexpr float BITS_OF_E = 1.44269504f;       /* log2(e) */
constexpr int GROUPS = BW_CHUNK / BW_LANES;    /* of tokens that lie one after the other in a page */

/* The bytes of a token's head, or of some of its numbers. */
template <int CODE> INLINE constexpr int64_t stored_bytes(int64_t numbers) {
    return CODE == BW_FLOAT32 ? 4 * numbers : CODE == BW_INT8 ? numbers : CODE == BW_INT4 ? numbers / 2 : 2 * numbers;
}

/* Numbers of a row of queries or sums: whole vectors; over codes, whole slabs. */
template <int CODE> INLINE int64_t padded_dimension(int64_t dimension) {
    constexpr int64_t unit = CODE >= BW_INT8 ? BW_SLAB : BW_LANES;
    return (dimension + unit - 1) / unit * unit;
}

/* A chunk as a tile of rows sees it. */
struct AttentionChunk {
    int64_t first, count; /* tokens of the context */
    int64_t asked;        /* the first token of the chunk that was asked for while the one before it was computed */
    int64_t key_bytes, value_bytes;
    const char *keys[GROUPS], *values[GROUPS];
    const char *later_keys[GROUPS], *later_values[GROUPS]; /* in their places in the next chunk, or these where it ends */
    alignas(64) float key_scale[BW_CHUNK], key_least[BW_CHUNK], value_scale[BW_CHUNK], value_least[BW_CHUNK];

    INLINE const char* key(int64_t j) const { return keys[j / BW_LANES] + j % BW_LANES * key_bytes; }
    INLINE const char* value(int64_t j) const { return values[j / BW_LANES] + j % BW_LANES * value_bytes; }
    /* What is asked for while these are computed. */
    INLINE const char* later_key(int64_t j) const { return later_keys[j / BW_LANES] + j % BW_LANES * key_bytes; }
    INLINE const char* later_value(int64_t j) const { return later_values[j / BW_LANES] + j % BW_LANES * value_bytes; }
    /* All of it at once, if that did not happen yet. */
    INLINE void ask() {
        for (int group = 0; asked != first && group < GROUPS; group++)
            for (int64_t at = 0; at < BW_LANES * key_bytes; at += 64) __builtin_prefetch(keys[group] + at, 0, 2);
        for (int group = 0; asked != first && group < GROUPS; group++)
            for (int64_t at = 0; at < BW_LANES * value_bytes; at += 64) __builtin_prefetch(values[group] + at, 0, 2);
        asked = first + BW_CHUNK;
    }
};

/* What is known of each row of a tile after a chunk: the largest score, the sum of weights, the weighted sum. */
struct AttentionRows {
    alignas(64) float queries[BW_ROWS * BW_MOST_DIMENSION];
    alignas(64) float scores[BW_ROWS * BW_CHUNK];
    alignas(64) float largest[BW_ROWS], weight[BW_ROWS], offset[BW_ROWS];
    float query_sum[BW_ROWS], query_scale[BW_ROWS], query_rest[BW_ROWS]; /* over codes */
    int64_t position[BW_ROWS];            /* of the row's token in its context */
    int64_t least[BW_ROWS], end[BW_ROWS]; /* of the tokens of the chunk that a row sees */
    alignas(64) float values[BW_ROWS * BW_MOST_DIMENSION];
};

/* The number of a context's token among those of all pages, which have 2^shift tokens. */
INLINE int64_t place_of(const bw_attention_job& job, const bw_tile& tile, int64_t token, int shift) {
    int64_t page = job.batch->pages[tile.sequence * job.batch->most_pages + (token >> shift)];
    return ((page * job.pages->heads + tile.head) << shift) + (token & ((int64_t{1} << shift) - 1));
}

/* 2^x of numbers up to 0, to two units in the last place: 2^n times a polynomial in what remains, within (-1/2, 1/2),
 * of the least relative error (2e-9) among those that are 1 at 0. */
INLINE F power_of_two(F x) {
    x = max_f(x, set_f(-126.0f));
    I n = round_to_i(x);
    F r = sub_f(x, to_f(n)), p = set_f(1.53533620e-4f);
    static const float FACTORS[] = {1.33988750e-3f, 9.61843692e-3f, 5.55033237e-2f, 0.240226477f, 0.693147182f, 1.0f};
    for (float c : FACTORS) p = multiply_add(p, r, set_f(c));
    return bits_to_f(add_i(bits_to_i(p), shift_left<23>(n)));
}

INLINE void read_scales(const float* __restrict pairs, float* __restrict scale, float* __restrict least) {
    for (int i = 0; i < BW_LANES; i++) {
        scale[i] = pairs[2 * i];
        least[i] = pairs[2 * i + 1];
    }
}

/* Groups behind the context's end are the last one again. */
template <int KEY, int VALUE>
INLINE void find_chunk(const bw_attention_job& job, const bw_tile& tile, AttentionChunk& chunk) {
    const bw_pages& p = *job.pages;
    int shift = __builtin_ctzll((uint64_t)p.page);
    chunk.key_bytes = stored_bytes<KEY>(p.dimension);
    chunk.value_bytes = stored_bytes<VALUE>(p.dimension);
    for (int64_t group = 0, at = 0; group < GROUPS; group++) {
        int64_t token = chunk.first + group * BW_LANES, later = token + BW_CHUNK;
        if (token < tile.context) at = place_of(job, tile, token, shift);
        chunk.keys[group] = (const char*)p.keys + at * chunk.key_bytes;
        chunk.values[group] = (const char*)p.values + at * chunk.value_bytes;
        int64_t next = later < tile.context ? place_of(job, tile, later, shift) : at;
        chunk.later_keys[group] = (const char*)p.keys + next * chunk.key_bytes;
        chunk.later_values[group] = (const char*)p.values + next * chunk.value_bytes;
        if constexpr (KEY >= BW_INT8) {
            for (int i = 0; i < 2 * BW_LANES; i += BW_LANES) {
                __builtin_prefetch(p.key_scale + 2 * next + i, 0, 2);
                __builtin_prefetch(p.value_scale + 2 * next + i, 0, 2);
            }
            read_scales(p.key_scale + 2 * at, chunk.key_scale + group * BW_LANES, chunk.key_least + group * BW_LANES);
            read_scales(p.value_scale + 2 * at, chunk.value_scale + group * BW_LANES, chunk.value_least + group * BW_LANES);
        }
    }
}

/* A vector of what belongs to tokens [j, j + BW_LANES), zero outside [least, end). */
INLINE F seen_part(const float* of_tokens, int64_t j, int64_t least, int64_t end) {
    if (j >= least && j + BW_LANES <= end) return load_f(of_tokens + j);
    alignas(64) float part[BW_LANES];
    for (int64_t i = 0; i < BW_LANES; i++) part[i] = j + i >= least && j + i < end ? of_tokens[j + i] : 0.0f;
    return load_f(part);
}

/* Scores of one row to weights, in place; their sum. Without finite scores it is NaN. */
INLINE void weigh_row(AttentionRows& rows, int64_t row) {
    float* s = rows.scores + row * BW_CHUNK;
    int64_t least = rows.least[row], end = rows.end[row], whole = (end + BW_LANES - 1) / BW_LANES * BW_LANES;
    for (int64_t j = 0; j < least; j++) s[j] = UNSEEN;
    for (int64_t j = end; j < whole; j++) s[j] = UNSEEN;
    F high = set_f(UNSEEN), damage = set_f(0.0f), sum = set_f(0.0f);
    for (int64_t j = 0; j < whole; j += BW_LANES) {
        F v = load_f(s + j);
        high = max_f(v, high);
        damage = add_f(damage, sub_f(v, v)); /* 0, or NaN */
    }
    float largest = lane_most(high);
    for (int64_t j = 0; j < whole; j += BW_LANES) {
        F v = power_of_two(sub_f(load_f(s + j), set_f(largest)));
        store_f(s + j, v);
        sum = add_f(sum, seen_part(s, j, least, end));
    }
    for (int64_t j = 0; j < least; j++) s[j] = 0;
    for (int64_t j = end; j < whole; j++) s[j] = 0;
    rows.largest[row] = largest;
    rows.weight[row] = lane_sum(add_f(sum, damage));
}

#include "attention_floats.h"
#include "attention_codes.h"

/* What is known of the rows of a tile after some chunks. A row that has seen none has largest UNSEEN, and else zeros. */
struct AttentionTotals {
    alignas(64) float largest[BW_ROWS], weight[BW_ROWS];
    alignas(64) float values[BW_ROWS * BW_MOST_DIMENSION];

    INLINE void start(int64_t count, int64_t stride) {
        for (int row = 0; row < BW_ROWS; row++) {
            largest[row] = UNSEEN;
            weight[row] = 0;
        }
        memset(values, 0, sizeof(float) * (size_t)(count * stride));
    }
    /* The next ones of all rows; exactly the same where a row has seen none, before or now. */
    INLINE void fold(int64_t count, const float* next_largest, const float* next_weight, const float* next, int64_t stride) {
        alignas(64) float keep[BW_ROWS], take[BW_ROWS];
        F before = load_f(largest), now = load_f(next_largest), most = max_f(before, now);
        store_f(keep, power_of_two(sub_f(before, most)));
        store_f(take, power_of_two(sub_f(now, most)));
        store_f(largest, most);
        store_f(weight, multiply_add(load_f(next_weight), load_f(take), mul_f(load_f(weight), load_f(keep))));
        for (int64_t row = 0; row < count; row++)
            for (int64_t d = row * stride; d < (row + 1) * stride; d += BW_LANES) {
                F kept = mul_f(load_f(values + d), set_f(keep[row]));
                store_f(values + d, multiply_add(load_f(next + d), set_f(take[row]), kept));
            }
    }
};

/* All that is computed for one tile after the other. */
struct AttentionRoom {
    AttentionRows rows;
    AttentionChunk chunk;
    AttentionCodes codes;
    AttentionTotals span;
};

/* Heads [count][stride] turned as turn_head turns each of them, bit for bit; of heads of whole vectors 16 vectors at once. */
APART void turn_rows(float* rows, int64_t count, int64_t dimension, int64_t stride) {
    int64_t block = dimension & -dimension, per_row = dimension / BW_LANES;
    for (int64_t row = 0; block < BW_LANES && row < count; row++) turn_head(rows + row * stride, dimension);
    if (block < BW_LANES) return;
    for (int64_t first = 0; first < count * per_row; first += BW_LANES) {
        I v[BW_LANES]; /* pairs of numbers in a vector are pairs of vectors once they are transposed */
        auto place = [&](int64_t i) INLINE_LAMBDA { return rows + i / per_row * stride + i % per_row * BW_LANES; };
        for (int64_t i = 0; i < BW_LANES; i++) v[i] = first + i < count * per_row ? load_i(place(first + i)) : set_i(0);
        transpose(v);
        for_each<4>([&](auto stage) INLINE_LAMBDA {
            UNROLL
            for (int i = 0; i < BW_LANES / 2; i++) {
                int at = i % (1 << stage) + (i >> stage << (stage + 1)), other = at + (1 << stage);
                F a = bits_to_f(v[at]), b = bits_to_f(v[other]);
                v[at] = bits_to_i(add_f(a, b));
                v[other] = bits_to_i(sub_f(a, b));
            }
        });
        transpose(v);
        for (int64_t i = 0; i < BW_LANES && first + i < count * per_row; i++) store_i(place(first + i), v[i]);
    }
    F factor = set_f(1.0f / __builtin_sqrtf((float)block));
    for (float* row = rows; row < rows + count * stride; row += stride) {
        for (int64_t half = BW_LANES; half < block; half *= 2)
            for (int64_t first = 0; first < dimension; first += 2 * half)
                for (int64_t i = first; i < first + half; i += BW_LANES) {
                    F a = load_f(row + i), b = load_f(row + i + half);
                    store_f(row + i, add_f(a, b));
                    store_f(row + i + half, sub_f(a, b));
                }
        for (int64_t i = 0; i < dimension; i += BW_LANES) store_f(row + i, mul_f(load_f(row + i), factor));
    }
}

/* All rows of a tile, turned back where values are turned. */
template <int VALUE> INLINE void write_rows(const bw_attention_job& job, const bw_tile& tile, AttentionTotals& totals) {
    int64_t dimension = job.pages->dimension, group = job.heads / job.pages->heads, stride = padded_dimension<VALUE>(dimension);
    int32_t places[SLAB]; /* of the numbers of a slab */
    for (int32_t d = 0; VALUE >= BW_INT8 && d < SLAB; d++) places[d] = value_place<VALUE>(d);
    for (int64_t row = 0; row < tile.rows; row++) {
        float *own = totals.values + row * stride, ordered[SLAB];
        for (int64_t slab = 0; VALUE >= BW_INT8 && slab < stride; slab += SLAB) {
            for (int d = 0; d < SLAB; d++) ordered[d] = own[slab + places[d]];
            memcpy(own + slab, ordered, sizeof ordered);
        }
        for (int64_t d = 0; d < stride; d += BW_LANES) store_f(own + d, div_f(load_f(own + d), set_f(totals.weight[row])));
    }
    if (job.pages->value_rotated) turn_rows(totals.values, tile.rows, dimension, stride);
    for (int64_t row = 0; row < tile.rows; row++) {
        int64_t at = tile.first + row, token = job.batch->starts[tile.sequence] + at / group;
        float* output = job.output + (token * job.heads + tile.head * group + at % group) * dimension;
        memcpy(output, totals.values + row * stride, sizeof(float) * (size_t)dimension);
    }
}

template <int KEY> INLINE void read_queries(const bw_attention_job& job, const bw_tile& tile, AttentionRoom& room) {
    AttentionRows& rows = room.rows;
    int64_t dimension = job.pages->dimension, stride = padded_dimension<KEY>(dimension), group = job.heads / job.pages->heads;
    room.chunk.asked = -1;
    memset(rows.queries, 0, sizeof(float) * (size_t)(tile.rows * stride));
    for (int64_t row = 0; row < tile.rows; row++) {
        int64_t at = tile.first + row, token = job.batch->starts[tile.sequence] + at / group;
        const float* from = job.queries + (token * job.heads + tile.head * group + at % group) * dimension;
        rows.position[row] = job.batch->positions[token];
        memcpy(rows.queries + row * stride, from, sizeof(float) * (size_t)dimension);
    }
    if (job.pages->key_rotated) turn_rows(rows.queries, tile.rows, dimension, stride);
    for (int64_t row = 0; row < tile.rows; row++) {
        float* to = rows.queries + row * stride;
        F sum = set_f(0.0f);
        for (int64_t d = 0; d < stride; d += BW_LANES) {
            F v = mul_f(load_f(to + d), set_f(job.scale * BITS_OF_E));
            store_f(to + d, v);
            sum = add_f(sum, v);
        }
        rows.query_sum[row] = lane_sum(sum);
        if constexpr (KEY >= BW_INT8) { /* what rounding took off meets a code of middle size */
            float rest;
            uint32_t* pairs = room.codes.queries + row / CODED_ROWS * CODED_ROWS * stride / 2 + row % CODED_ROWS;
            rows.query_scale[row] = code_queries<KEY>(to, dimension, pairs, &rest);
            rows.query_rest[row] = rest * middle_code<KEY>();
        }
    }
}

/* Which tokens of the chunk each row sees; whether any does. */
INLINE bool find_limits(const AttentionChunk& chunk, int64_t count, int64_t window, AttentionRows& rows) {
    bool is_seen = false;
    for (int64_t row = 0; row < count; row++) {
        int64_t end = rows.position[row] + 1 - chunk.first, least = window ? end - window : 0;
        rows.end[row] = end < 0 ? 0 : end < chunk.count ? end : chunk.count;
        rows.least[row] = least < 0 ? 0 : least;
        if (rows.least[row] >= rows.end[row]) rows.least[row] = rows.end[row] = 0;
        is_seen |= rows.end[row] > 0;
    }
    return is_seen;
}

template <int KEY, int VALUE> INLINE void attend_chunk(AttentionRoom& room, int64_t count, int64_t dimension) {
    if constexpr (KEY >= BW_INT8) {
        auto attend = dimension % SLAB ? attend_coded_chunk<KEY, VALUE, false> : attend_coded_chunk<KEY, VALUE, true>;
        attend(room.chunk, room.rows, room.codes, count, dimension);
    } else {
        if (dimension % BW_LANES == 0) return attend_float_chunk<KEY, true>(room.chunk, room.rows, count, dimension);
        attend_float_chunk<KEY, false>(room.chunk, room.rows, count, dimension);
    }
}

/* A span of a tile, whose queries are read, into room.span. */
template <int KEY, int VALUE>
void attend_span(const bw_attention_job& job, const bw_tile& tile, int64_t span, AttentionRoom& room) {
    int64_t dimension = job.pages->dimension, stride = padded_dimension<VALUE>(dimension);
    int64_t begin = span * BW_SPAN, end = begin + BW_SPAN < tile.chunks ? begin + BW_SPAN : tile.chunks;
    room.span.start(tile.rows, stride);
    for (int64_t c = begin < tile.first_chunk ? tile.first_chunk : begin; c < end; c++) {
        room.chunk.first = c * BW_CHUNK;
        room.chunk.count = tile.context - room.chunk.first < BW_CHUNK ? tile.context - room.chunk.first : BW_CHUNK;
        if (!find_limits(room.chunk, tile.rows, job.window, room.rows)) continue;
        find_chunk<KEY, VALUE>(job, tile, room.chunk);
        room.chunk.ask();
        attend_chunk<KEY, VALUE>(room, tile.rows, dimension);
        room.span.fold(tile.rows, room.rows.largest, room.rows.weight, room.rows.values, stride);
    }
}

/* Tiles [first, last), each from its first span to its last. */
template <int KEY, int VALUE> void attend_whole(const bw_attention_job& job, int64_t first, int64_t last) {
    AttentionRoom room;
    AttentionTotals totals;
    int64_t stride = padded_dimension<VALUE>(job.pages->dimension);
    for (int64_t i = first; i < last; i++) {
        const bw_tile& tile = job.tiles[i];
        read_queries<KEY>(job, tile, room);
        totals.start(tile.rows, stride);
        for (int64_t span = tile.first_chunk / BW_SPAN; span * BW_SPAN < tile.chunks; span++) {
            attend_span<KEY, VALUE>(job, tile, span, room);
            totals.fold(tile.rows, room.span.largest, room.span.weight, room.span.values, stride);
        }
        write_rows<VALUE>(job, tile, totals);
    }
}

/* Pieces [first, last): single spans of tiles, left in job.parts: of each the largest, the weights, and the values of
 * BW_ROWS rows. */
template <int KEY, int VALUE> void attend_pieces(const bw_attention_job& job, int64_t first, int64_t last) {
    AttentionRoom room;
    int64_t stride = padded_dimension<VALUE>(job.pages->dimension), known = -1;
    for (int64_t i = first, t = 0; i < last; i++) {
        while (i >= job.tiles[t].first_piece + job.tiles[t].pieces) t++;
        const bw_tile& tile = job.tiles[t];
        if (known != t) read_queries<KEY>(job, tile, room);
        known = t;
        attend_span<KEY, VALUE>(job, tile, tile.first_chunk / BW_SPAN + i - tile.first_piece, room);
        float* part = job.parts + i * BW_ROWS * (stride + 2);
        memcpy(part, room.span.largest, sizeof room.span.largest);
        memcpy(part + BW_ROWS, room.span.weight, sizeof room.span.weight);
        memcpy(part + 2 * BW_ROWS, room.span.values, sizeof(float) * (size_t)(tile.rows * stride));
    }
}

/* The pieces of tiles [first, last) together, in order. */
template <int VALUE> void attend_folded(const bw_attention_job& job, int64_t first, int64_t last) {
    AttentionTotals totals;
    int64_t stride = padded_dimension<VALUE>(job.pages->dimension);
    for (int64_t i = first; i < last; i++) {
        const bw_tile& tile = job.tiles[i];
        totals.start(tile.rows, stride);
        for (int64_t piece = tile.first_piece; piece < tile.first_piece + tile.pieces; piece++) {
            const float* part = job.parts + piece * BW_ROWS * (stride + 2);
            totals.fold(tile.rows, part, part + BW_ROWS, part + 2 * BW_ROWS, stride);
        }
        write_rows<VALUE>(job, tile, totals);
    }
}

template <int KEY, int VALUE> void attend_with(const bw_attention_job* job, enum bw_phase phase, int64_t first, int64_t last) {
    if (phase == BW_PHASE_WHOLE) return attend_whole<KEY, VALUE>(*job, first, last);
    if (phase == BW_PHASE_PIECES) return attend_pieces<KEY, VALUE>(*job, first, last);
    attend_folded<VALUE>(*job, first, last);
}

void attend(const bw_attention_job* job, enum bw_phase phase, int64_t first, int64_t last) {
    int key = job->pages->key_code, value = job->pages->value_code;
    if (key == BW_INT8) {
        if (value == BW_INT8) return attend_with<BW_INT8, BW_INT8>(job, phase, first, last);
        return attend_with<BW_INT8, BW_INT4>(job, phase, first, last);
    }
    if (key == BW_INT4) return attend_with<BW_INT4, BW_INT4>(job, phase, first, last);
    if (key == BW_FLOAT32) return attend_with<BW_FLOAT32, BW_FLOAT32>(job, phase, first, last);
    if (key == BW_FLOAT16) return attend_with<BW_FLOAT16, BW_FLOAT16>(job, phase, first, last);
    attend_with<BW_BFLOAT16, BW_BFLOAT16>(job, phase, first, last);
}
