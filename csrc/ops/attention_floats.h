/* Attention over floats in pages: products of a chunk's keys and values, in float32. Included inside an anonymous
 * namespace. */

constexpr int ATTENTION_BLOCK = 4; /* rows, and keys, whose products are summed together */

/* Numbers of a token's head as they lie in a page, from `first` on, of which there may be fewer than a vector. */
template <int CODE, bool IS_WHOLE> INLINE F stored_vector(const char* row, int64_t first, int64_t dimension) {
    if (IS_WHOLE || first + BW_LANES <= dimension) return load_number(row, first, CODE);
    alignas(64) char part[64] = {};
    memcpy(part, row + stored_bytes<CODE>(first), (size_t)stored_bytes<CODE>(dimension - first));
    return load_number(part, 0, CODE);
}

/* Products of COUNT rows with all keys of a chunk. */
template <int KEY, int COUNT, bool IS_WHOLE>
INLINE void score_rows(const AttentionChunk& chunk, const float* queries, int64_t dimension, float* scores) {
    constexpr int64_t BYTES = ATTENTION_BLOCK * stored_bytes<KEY>(BW_LANES); /* that a step reads, and asks for */
    int64_t stride = padded_dimension<KEY>(dimension);
    for (int64_t j = 0; j < chunk.count; j += ATTENTION_BLOCK) {
        const char* rows = chunk.key(j);
        const char* later = chunk.later_key(j);
        F sums[BW_LANES];
        UNROLL
        for (int i = 0; i < BW_LANES; i++) sums[i] = set_f(0.0f);
        for (int64_t d = 0; d < dimension; d += BW_LANES) {
            F keys[ATTENTION_BLOCK];
            UNROLL
            for (int64_t at = 0; at < BYTES; at += 64) __builtin_prefetch(later + d / BW_LANES * BYTES + at, 0, 2);
            UNROLL
            for (int i = 0; i < ATTENTION_BLOCK; i++)
                keys[i] = stored_vector<KEY, IS_WHOLE>(rows + i * stored_bytes<KEY>(dimension), d, dimension);
            UNROLL
            for (int i = 0; i < ATTENTION_BLOCK * COUNT; i++)
                sums[i] = multiply_add(load_f(queries + i / ATTENTION_BLOCK * stride + d), keys[i % ATTENTION_BLOCK], sums[i]);
        }
        alignas(64) float found[BW_LANES];
        store_f(found, sum_across(sums));
        for (int row = 0; row < COUNT; row++) memcpy(scores + row * BW_CHUNK + j, found + row * ATTENTION_BLOCK, 16);
    }
}

/* WIDTH vectors, from number `d` on, of the weighted values of tokens [first, last) to the sums of COUNT rows. */
template <int VALUE, int COUNT, int WIDTH, bool IS_WHOLE>
INLINE void add_vectors(const AttentionChunk& chunk, const float* weights, int64_t first, int64_t last, int64_t dimension,
                        int64_t d, float* sums) {
    int64_t stride = padded_dimension<VALUE>(dimension);
    F part[COUNT * WIDTH];
    UNROLL
    for (int i = 0; i < COUNT * WIDTH; i++) part[i] = load_f(sums + i / WIDTH * stride + d + i % WIDTH * BW_LANES);
    for (int64_t j = first; j < last; j++) {
        const char *row = chunk.value(j), *later = chunk.later_value(j) + stored_bytes<VALUE>(d);
        F values[WIDTH];
        UNROLL
        for (int64_t at = 0; at < stored_bytes<VALUE>(WIDTH * BW_LANES); at += 64) __builtin_prefetch(later + at, 0, 2);
        UNROLL
        for (int i = 0; i < WIDTH; i++) values[i] = stored_vector<VALUE, IS_WHOLE>(row, d + i * BW_LANES, dimension);
        UNROLL
        for (int i = 0; i < COUNT * WIDTH; i++)
            part[i] = multiply_add(set_f(weights[i / WIDTH * BW_CHUNK + j]), values[i % WIDTH], part[i]);
    }
    UNROLL
    for (int i = 0; i < COUNT * WIDTH; i++) store_f(sums + i / WIDTH * stride + d + i % WIDTH * BW_LANES, part[i]);
}

/* Adds the weighted values of tokens [first, last) of a chunk to the sums of COUNT rows. */
template <int VALUE, int COUNT, bool IS_WHOLE>
INLINE void add_values(const AttentionChunk& chunk, const float* weights, int64_t first, int64_t last, int64_t dimension,
                       float* sums) {
    constexpr int WIDTH = 4; /* vectors of a row in registers */
    int64_t stride = padded_dimension<VALUE>(dimension), d = 0;
    for (; d + WIDTH * BW_LANES <= stride; d += WIDTH * BW_LANES)
        add_vectors<VALUE, COUNT, WIDTH, IS_WHOLE>(chunk, weights, first, last, dimension, d, sums);
    for (; d < stride; d += BW_LANES)
        add_vectors<VALUE, COUNT, 1, IS_WHOLE>(chunk, weights, first, last, dimension, d, sums);
}

/* COUNT rows of a tile, from row `first` on, over one chunk. */
template <int CODE, int COUNT, bool IS_WHOLE>
void attend_float_rows(const AttentionChunk& chunk, AttentionRows& rows, int first, int64_t dimension) {
    int64_t stride = padded_dimension<CODE>(dimension);
    float *sums = rows.values + first * stride, *scores = rows.scores + first * BW_CHUNK;
    score_rows<CODE, COUNT, IS_WHOLE>(chunk, rows.queries + first * stride, dimension, scores);
    int64_t begin = chunk.count, together = chunk.count;
    for (int row = first; row < first + COUNT; row++) {
        weigh_row(rows, row);
        begin = rows.least[row] < begin ? rows.least[row] : begin;
        together = rows.end[row] < together ? rows.end[row] : together;
    }
    memset(sums, 0, sizeof(float) * (size_t)(COUNT * stride));
    add_values<CODE, COUNT, IS_WHOLE>(chunk, scores, begin, together, dimension, sums);
    for (int row = 0; row < COUNT; row++) { /* what a later row sees alone must not touch the others, were it NaN */
        int64_t from = begin > together ? begin : together;
        add_values<CODE, 1, IS_WHOLE>(chunk, scores + row * BW_CHUNK, from, rows.end[first + row], dimension,
                                      sums + row * stride);
    }
}

template <int CODE, bool IS_WHOLE>
void attend_float_chunk(const AttentionChunk& chunk, AttentionRows& rows, int64_t count, int64_t dimension) {
    int row = 0;
    for (; row + 4 <= count; row += 4) attend_float_rows<CODE, 4, IS_WHOLE>(chunk, rows, row, dimension);
    if (count - row == 3) attend_float_rows<CODE, 3, IS_WHOLE>(chunk, rows, row, dimension);
    if (count - row == 2) attend_float_rows<CODE, 2, IS_WHOLE>(chunk, rows, row, dimension);
    if (count - row == 1) attend_float_rows<CODE, 1, IS_WHOLE>(chunk, rows, row, dimension);
}
