/* Attention over keys and values in pages, a chunk of BW_CHUNK tokens at a time. Included inside an anonymous namespace.
 *
 * A row is one token's query of one head. Its result is made of the chunks that it sees, each computed by itself (scores,
 * the largest, exponentials, weighted sum) and folded in from first to last, every sum in one fixed order. So a row does
 * not depend on the rows beside it, on how chunks were dealt out to threads, nor on how the prompt was cut. */

constexpr int ATTENTION_BLOCK = 4;                /* rows, and keys, whose products are summed together */
constexpr float UNSEEN = -3.0e38f;                /* a score that no sum sees */

/* Numbers of a token's head as they lie in a page. */
template <int CODE> struct Stored {
    static constexpr bool IS_CODED = CODE >= BW_INT8;
    static INLINE int64_t bytes(int64_t numbers) {
        return CODE == BW_FLOAT32 ? 4 * numbers : CODE == BW_INT8 ? numbers : CODE == BW_INT4 ? numbers / 2 : 2 * numbers;
    }
    static INLINE F load(const char* p) {
        if constexpr (CODE == BW_INT8) return to_f(load_bytes((const uint8_t*)p));
        else if constexpr (CODE == BW_INT4) return to_f(load_nibbles((const uint8_t*)p));
        else return load_number(p, 0, CODE);
    }
    /* The numbers from `first` on, of which there may be fewer than a vector. */
    template <bool IS_WHOLE> static INLINE F vector(const char* row, int64_t first, int64_t dimension) {
        if (IS_WHOLE || first + BW_LANES <= dimension) return load(row + bytes(first));
        alignas(64) char part[64] = {};
        memcpy(part, row + bytes(first), (size_t)bytes(dimension - first));
        return load(part);
    }
};

/* A chunk as a tile of rows sees it. */
struct AttentionChunk {
    int64_t first, count; /* tokens of the context */
    const char *keys[BW_CHUNK], *values[BW_CHUNK];
    float key_scale[BW_CHUNK], key_least[BW_CHUNK], value_scale[BW_CHUNK], value_least[BW_CHUNK];
};

/* What is known of each row of a tile after some chunks: the largest score, the sum of weights, the weighted sum. */
struct AttentionRows {
    alignas(64) float queries[BW_ROWS * BW_MOST_DIMENSION];
    alignas(64) float scores[BW_ROWS * BW_CHUNK];
    float largest[BW_ROWS], weight[BW_ROWS], query_sum[BW_ROWS], offset[BW_ROWS];
    int64_t least[BW_ROWS], end[BW_ROWS]; /* of the tokens of the chunk that a row sees */
    alignas(64) float values[BW_ROWS * BW_MOST_DIMENSION];
};

INLINE int64_t padded_dimension(int64_t dimension) { return (dimension + BW_LANES - 1) / BW_LANES * BW_LANES; }

template <int KEY, int VALUE>
INLINE void find_chunk(const bw_attention_job& job, const bw_tile& tile, AttentionChunk& chunk) {
    const bw_pages& p = *job.pages;
    const int32_t* table = job.batch->pages + tile.sequence * job.batch->most_pages;
    int64_t key_bytes = Stored<KEY>::bytes(p.dimension), value_bytes = Stored<VALUE>::bytes(p.dimension);
    for (int64_t j = 0; j < chunk.count; j++) {
        int64_t token = chunk.first + j;
        int64_t at = ((int64_t)table[token / p.page] * p.heads + tile.head) * p.page + token % p.page;
        chunk.keys[j] = (const char*)p.keys + at * key_bytes;
        chunk.values[j] = (const char*)p.values + at * value_bytes;
        if constexpr (Stored<KEY>::IS_CODED) {
            chunk.key_scale[j] = p.key_scale[2 * at];
            chunk.key_least[j] = p.key_scale[2 * at + 1];
        }
        if constexpr (Stored<VALUE>::IS_CODED) {
            chunk.value_scale[j] = p.value_scale[2 * at];
            chunk.value_least[j] = p.value_scale[2 * at + 1];
        }
    }
    int64_t rest = chunk.count; /* whole blocks of keys are read */
    for (; rest % ATTENTION_BLOCK; rest++) chunk.keys[rest] = chunk.keys[chunk.count - 1];
    for (int64_t j = chunk.count; j % BW_LANES; j++)
        chunk.key_scale[j] = chunk.key_least[j] = chunk.value_scale[j] = chunk.value_least[j] = 0;
}

/* Products of COUNT rows with all keys of a chunk. */
template <int KEY, int COUNT, bool IS_WHOLE>
INLINE void score_rows(const AttentionChunk& chunk, const float* queries, int64_t dimension, float* scores) {
    int64_t stride = padded_dimension(dimension);
    for (int64_t j = 0; j < chunk.count; j += ATTENTION_BLOCK) {
        F sums[BW_LANES];
        UNROLL
        for (int i = 0; i < BW_LANES; i++) sums[i] = set_f(0.0f);
        for (int64_t d = 0; d < dimension; d += BW_LANES) {
            F keys[ATTENTION_BLOCK];
            UNROLL
            for (int i = 0; i < ATTENTION_BLOCK; i++)
                keys[i] = Stored<KEY>::template vector<IS_WHOLE>(chunk.keys[j + i], d, dimension);
            UNROLL
            for (int i = 0; i < ATTENTION_BLOCK * COUNT; i++)
                sums[i] = multiply_add(load_f(queries + i / ATTENTION_BLOCK * stride + d), keys[i % ATTENTION_BLOCK], sums[i]);
        }
        alignas(64) float found[BW_LANES];
        store_f(found, sum_across(sums));
        for (int row = 0; row < COUNT; row++) memcpy(scores + row * BW_CHUNK + j, found + row * ATTENTION_BLOCK, 16);
    }
}

/* Scores of one row to weights, in place; their sum. Without finite scores it is NaN. */
template <int KEY, int VALUE> INLINE void weigh_row(const AttentionChunk& chunk, AttentionRows& rows, int row) {
    float* s = rows.scores + row * BW_CHUNK;
    int64_t least = rows.least[row], end = rows.end[row], whole = padded_dimension(end);
    if constexpr (Stored<KEY>::IS_CODED)
        for (int64_t j = 0; j < whole; j += BW_LANES) {
            F offset = mul_f(load_f(chunk.key_least + j), set_f(rows.query_sum[row]));
            store_f(s + j, multiply_add(load_f(s + j), load_f(chunk.key_scale + j), offset));
        }
    for (int64_t j = 0; j < least; j++) s[j] = UNSEEN;
    for (int64_t j = end; j < whole; j++) s[j] = UNSEEN;
    F high = set_f(UNSEEN), damage = set_f(0.0f), sum = set_f(0.0f), offset = set_f(0.0f);
    for (int64_t j = 0; j < whole; j += BW_LANES) {
        F v = load_f(s + j);
        high = max_f(v, high);
        damage = add_f(damage, sub_f(v, v)); /* 0, or NaN */
    }
    float lanes[BW_LANES], largest = UNSEEN;
    store_f(lanes, high);
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    for (int64_t j = 0; j < whole; j += BW_LANES)
        store_f(s + j, exponential(sub_f(load_f(s + j), set_f(largest))));
    for (int64_t j = 0; j < least; j++) s[j] = 0;
    for (int64_t j = end; j < whole; j++) s[j] = 0;
    for (int64_t j = 0; j < whole; j += BW_LANES) {
        F v = load_f(s + j);
        sum = add_f(sum, v);
        if constexpr (Stored<VALUE>::IS_CODED) {
            offset = multiply_add(v, load_f(chunk.value_least + j), offset);
            store_f(s + j, mul_f(v, load_f(chunk.value_scale + j)));
        }
    }
    rows.largest[row] = largest;
    rows.weight[row] = lane_sum(add_f(sum, damage));
    rows.offset[row] = lane_sum(offset);
}

/* Adds the weighted values of tokens [first, last) of a chunk to the sums of COUNT rows. */
template <int VALUE, int COUNT, bool IS_WHOLE>
INLINE void add_values(const AttentionChunk& chunk, const float* weights, int64_t first, int64_t last, int64_t dimension,
                       float* sums) {
    constexpr int WIDTH = 4; /* vectors of a row in registers */
    int64_t stride = padded_dimension(dimension);
    int64_t d = 0;
    for (; d + WIDTH * BW_LANES <= stride; d += WIDTH * BW_LANES) {
        F part[COUNT * WIDTH];
        UNROLL
        for (int i = 0; i < COUNT * WIDTH; i++) part[i] = load_f(sums + i / WIDTH * stride + d + i % WIDTH * BW_LANES);
        for (int64_t j = first; j < last; j++) {
            F values[WIDTH];
            UNROLL
            for (int i = 0; i < WIDTH; i++)
                values[i] = Stored<VALUE>::template vector<IS_WHOLE>(chunk.values[j], d + i * BW_LANES, dimension);
            UNROLL
            for (int i = 0; i < COUNT * WIDTH; i++)
                part[i] = multiply_add(set_f(weights[i / WIDTH * BW_CHUNK + j]), values[i % WIDTH], part[i]);
        }
        UNROLL
        for (int i = 0; i < COUNT * WIDTH; i++) store_f(sums + i / WIDTH * stride + d + i % WIDTH * BW_LANES, part[i]);
    }
    for (; d < stride; d += BW_LANES) {
        F part[COUNT];
        UNROLL
        for (int i = 0; i < COUNT; i++) part[i] = load_f(sums + i * stride + d);
        for (int64_t j = first; j < last; j++) {
            F value = Stored<VALUE>::template vector<IS_WHOLE>(chunk.values[j], d, dimension);
            UNROLL
            for (int i = 0; i < COUNT; i++) part[i] = multiply_add(set_f(weights[i * BW_CHUNK + j]), value, part[i]);
        }
        UNROLL
        for (int i = 0; i < COUNT; i++) store_f(sums + i * stride + d, part[i]);
    }
}

/* COUNT rows of a tile, from row `first` on, over one chunk. */
template <int KEY, int VALUE, int COUNT, bool IS_WHOLE>
void attend_rows(const AttentionChunk& chunk, AttentionRows& rows, int first, int64_t dimension) {
    int64_t stride = padded_dimension(dimension);
    float *sums = rows.values + first * stride, *scores = rows.scores + first * BW_CHUNK;
    score_rows<KEY, COUNT, IS_WHOLE>(chunk, rows.queries + first * stride, dimension, scores);
    int64_t begin = chunk.count, together = chunk.count;
    for (int row = first; row < first + COUNT; row++) {
        weigh_row<KEY, VALUE>(chunk, rows, row);
        begin = rows.least[row] < begin ? rows.least[row] : begin;
        together = rows.end[row] < together ? rows.end[row] : together;
    }
    memset(sums, 0, sizeof(float) * (size_t)(COUNT * stride));
    add_values<VALUE, COUNT, IS_WHOLE>(chunk, scores, begin, together, dimension, sums);
    for (int row = 0; row < COUNT; row++) { /* what a later row sees alone must not touch the others, were it NaN */
        int64_t from = begin > together ? begin : together;
        add_values<VALUE, 1, IS_WHOLE>(chunk, scores + row * BW_CHUNK, from, rows.end[first + row], dimension,
                                       sums + row * stride);
        if constexpr (Stored<VALUE>::IS_CODED)
            for (int64_t d = 0; d < stride; d += BW_LANES)
                store_f(sums + row * stride + d, add_f(load_f(sums + row * stride + d), set_f(rows.offset[first + row])));
    }
}

/* The next chunk of a row into what is known: totals [dimension], largest and weight. */
INLINE void fold_chunk(bool is_first, float largest, float weight, const float* values, int64_t stride, float* total_largest,
                       float* total_weight, float* totals) {
    if (is_first) {
        *total_largest = largest;
        *total_weight = weight;
        memcpy(totals, values, sizeof(float) * (size_t)stride);
        return;
    }
    float most = *total_largest > largest ? *total_largest : largest, factors[BW_LANES];
    store_f(factors, exponential(sub_f(set_f(*total_largest), set_f(most))));
    float keep = factors[0];
    store_f(factors, exponential(sub_f(set_f(largest), set_f(most))));
    float take = factors[0];
    *total_largest = most;
    *total_weight = *total_weight * keep + weight * take;
    for (int64_t d = 0; d < stride; d += BW_LANES)
        store_f(totals + d, multiply_add(load_f(values + d), set_f(take), mul_f(load_f(totals + d), set_f(keep))));
}

INLINE void write_attention(const bw_attention_job& job, const bw_tile& tile, int64_t row, float weight, const float* totals) {
    int64_t dimension = job.pages->dimension, group = job.heads / job.pages->heads, at = tile.first + row;
    int64_t token = job.batch->starts[tile.sequence] + at / group, head = tile.head * group + at % group;
    float* output = job.output + (token * job.heads + head) * dimension;
    for_vectors(dimension, [&](int64_t d, int64_t count) INLINE_LAMBDA {
        store_part(output, d, BW_FLOAT32, count, div_f(load_f(totals + d), set_f(weight)));
    });
    if (job.pages->value_rotated) turn_head(output, dimension);
}

INLINE void read_queries(const bw_attention_job& job, const bw_tile& tile, AttentionRows& rows) {
    int64_t dimension = job.pages->dimension, stride = padded_dimension(dimension), group = job.heads / job.pages->heads;
    memset(rows.queries, 0, sizeof(float) * (size_t)(tile.rows * stride));
    for (int64_t row = 0; row < tile.rows; row++) {
        int64_t at = tile.first + row, token = job.batch->starts[tile.sequence] + at / group;
        const float* from = job.queries + (token * job.heads + tile.head * group + at % group) * dimension;
        float* to = rows.queries + row * stride;
        F sum = set_f(0.0f);
        memcpy(to, from, sizeof(float) * (size_t)dimension);
        if (job.pages->key_rotated) turn_head(to, dimension);
        for (int64_t d = 0; d < stride; d += BW_LANES) {
            F v = mul_f(load_f(to + d), set_f(job.scale));
            store_f(to + d, v);
            sum = add_f(sum, v);
        }
        rows.query_sum[row] = lane_sum(sum);
    }
}

/* Which tokens of the chunk each row sees; whether any does. */
INLINE bool find_limits(const bw_attention_job& job, const bw_tile& tile, const AttentionChunk& chunk, AttentionRows& rows) {
    int64_t group = job.heads / job.pages->heads;
    bool is_seen = false;
    for (int64_t row = 0; row < tile.rows; row++) {
        int64_t position = job.batch->positions[job.batch->starts[tile.sequence] + (tile.first + row) / group];
        int64_t end = position + 1 - chunk.first, least = job.window ? end - job.window : 0;
        rows.end[row] = end < 0 ? 0 : end < chunk.count ? end : chunk.count;
        rows.least[row] = least < 0 ? 0 : least;
        if (rows.least[row] >= rows.end[row]) rows.least[row] = rows.end[row] = 0;
        is_seen |= rows.end[row] > 0;
    }
    return is_seen;
}

template <int KEY, int VALUE, bool IS_WHOLE>
void attend_chunk(const AttentionChunk& chunk, AttentionRows& rows, int64_t count, int64_t dimension) {
    int row = 0;
    for (; row + 4 <= count; row += 4) attend_rows<KEY, VALUE, 4, IS_WHOLE>(chunk, rows, row, dimension);
    if (count - row == 3) attend_rows<KEY, VALUE, 3, IS_WHOLE>(chunk, rows, row, dimension);
    if (count - row == 2) attend_rows<KEY, VALUE, 2, IS_WHOLE>(chunk, rows, row, dimension);
    if (count - row == 1) attend_rows<KEY, VALUE, 1, IS_WHOLE>(chunk, rows, row, dimension);
}

/* Chunks [first, last) of a tile; each row's chunk is handed to `take(row, is seen)`. */
template <int KEY, int VALUE, class Take>
INLINE void attend_tile(const bw_attention_job& job, const bw_tile& tile, int64_t first, int64_t last,
                        AttentionRows& rows, Take take) {
    AttentionChunk chunk;
    int64_t dimension = job.pages->dimension;
    read_queries(job, tile, rows);
    for (int64_t c = first; c < last; c++) {
        chunk.first = c * BW_CHUNK;
        chunk.count = tile.context - chunk.first < BW_CHUNK ? tile.context - chunk.first : BW_CHUNK;
        if (!find_limits(job, tile, chunk, rows)) continue;
        find_chunk<KEY, VALUE>(job, tile, chunk);
        if (dimension % BW_LANES == 0) attend_chunk<KEY, VALUE, true>(chunk, rows, tile.rows, dimension);
        else attend_chunk<KEY, VALUE, false>(chunk, rows, tile.rows, dimension);
        for (int64_t row = 0; row < tile.rows; row++)
            if (rows.end[row] > 0) take(c, row);
    }
}

/* Tiles [first, last), each from its first chunk to its last. */
template <int KEY, int VALUE> void attend_whole(const bw_attention_job& job, int64_t first, int64_t last) {
    AttentionRows rows;
    alignas(64) float totals[BW_ROWS * BW_MOST_DIMENSION];
    float largest[BW_ROWS], weight[BW_ROWS];
    int64_t stride = padded_dimension(job.pages->dimension);
    for (int64_t i = first; i < last; i++) {
        const bw_tile& tile = job.tiles[i];
        bool has_begun[BW_ROWS] = {};
        attend_tile<KEY, VALUE>(job, tile, tile.first_chunk, tile.chunks, rows, [&](int64_t, int64_t row) INLINE_LAMBDA {
            fold_chunk(!has_begun[row], rows.largest[row], rows.weight[row], rows.values + row * stride, stride,
                       largest + row, weight + row, totals + row * stride);
            has_begun[row] = true;
        });
        for (int64_t row = 0; row < tile.rows; row++) write_attention(job, tile, row, weight[row], totals + row * stride);
    }
}

/* Pieces [first, last): single chunks of tiles, left in job.parts: [piece][row][stride + BW_LANES]. */
template <int KEY, int VALUE> void attend_pieces(const bw_attention_job& job, int64_t first, int64_t last) {
    AttentionRows rows;
    int64_t stride = padded_dimension(job.pages->dimension);
    for (int64_t i = first, t = 0; i < last; i++) {
        while (i >= job.tiles[t].first_piece + job.tiles[t].chunks - job.tiles[t].first_chunk) t++;
        int64_t c = job.tiles[t].first_chunk + i - job.tiles[t].first_piece;
        float* part = job.parts + i * BW_ROWS * (stride + BW_LANES);
        for (int64_t row = 0; row < job.tiles[t].rows; row++) part[row * (stride + BW_LANES) + 2] = 0;
        attend_tile<KEY, VALUE>(job, job.tiles[t], c, c + 1, rows, [&](int64_t, int64_t row) INLINE_LAMBDA {
            float* to = part + row * (stride + BW_LANES);
            to[0] = rows.largest[row];
            to[1] = rows.weight[row];
            to[2] = 1; /* seen */
            memcpy(to + BW_LANES, rows.values + row * stride, sizeof(float) * (size_t)stride);
        });
    }
}

/* The pieces of tiles [first, last) together, in order. */
void attend_folded(const bw_attention_job& job, int64_t first, int64_t last) {
    alignas(64) float totals[BW_MOST_DIMENSION];
    int64_t stride = padded_dimension(job.pages->dimension);
    for (int64_t i = first; i < last; i++)
        for (int64_t row = 0; row < job.tiles[i].rows; row++) {
            const bw_tile& tile = job.tiles[i];
            float largest = 0, weight = 0;
            bool has_begun = false;
            for (int64_t piece = tile.first_piece; piece < tile.first_piece + tile.chunks - tile.first_chunk; piece++) {
                const float* part = job.parts + (piece * BW_ROWS + row) * (stride + BW_LANES);
                if (part[2] == 0) continue;
                fold_chunk(!has_begun, part[0], part[1], part + BW_LANES, stride, &largest, &weight, totals);
                has_begun = true;
            }
            write_attention(job, tile, row, weight, totals);
        }
}

template <int KEY, int VALUE> void attend_with(const bw_attention_job* job, enum bw_phase phase, int64_t first, int64_t last) {
    if (phase == BW_PHASE_WHOLE) return attend_whole<KEY, VALUE>(*job, first, last);
    if (phase == BW_PHASE_PIECES) return attend_pieces<KEY, VALUE>(*job, first, last);
    attend_folded(*job, first, last);
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
