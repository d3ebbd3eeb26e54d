/* New keys and values into their pages. Included inside an anonymous namespace. */

/* One token's head [dimension] to unsigned codes of `levels` + 1 steps from its least number on; scale and least. Where
 * the grid is searched, see pages_search.h. A number that is not finite makes the scale NaN. The same arithmetic as the
 * caches in Python. */
INLINE void code_head(const float* x, int64_t dimension, bool is_eight, bool is_rotated, uint8_t* codes, float* scale_and_least) {
    float levels = is_eight ? 255.0f : 15.0f;
    F low = set_f(x[0]), high = low, damage = set_f(0.0f);
    for_vectors(dimension, [&](int64_t d, int64_t count) INLINE_LAMBDA {
        alignas(64) float part[BW_LANES];
        for (int i = 0; count < BW_LANES && i < BW_LANES; i++) part[i] = x[i < count ? d + i : 0];
        F v = load_f(count < BW_LANES ? part : x + d);
        low = min_f(v, low);
        high = max_f(v, high);
        damage = add_f(damage, sub_f(v, v));
    });
    float least = -lane_most(sub_f(set_f(0.0f), low)), range = lane_most(high) - least, spoilt = lane_sum(damage);
    bool is_searched = spoilt == 0 && (is_eight ? dimension <= MOST_SEARCHED_8 : is_rotated);
    if (is_searched && (is_eight ? search_head(GRIDS_8, x, dimension, least, range, codes, scale_and_least)
                                 : search_head(GRIDS_4, x, dimension, least, range, codes, scale_and_least)))
        return;
    float scale = range / levels;
    if (scale < 0x1p-126f && range != 0) scale = 0x1p-126f; /* the least normal number */
    for_vectors(dimension, [&](int64_t d, int64_t count) INLINE_LAMBDA {
        F v = div_f(sub_f(load_part(x, d, BW_FLOAT32, count), set_f(least)), set_f(scale == 0 ? 1.0f : scale));
        I code = max_i(min_i(round_to_i(v), set_i((int32_t)levels)), set_i(0));
        alignas(64) uint8_t bytes[BW_LANES];
        store_bytes(bytes, code);
        memcpy(codes + d, bytes, (size_t)count);
    });
    scale_and_least[0] = scale + spoilt;
    scale_and_least[1] = least;
}

/* A head times the Hadamard matrix of the largest power of two that divides its dimension, which undoes itself. */
inline void turn_head(float* x, int64_t dimension) {
    int64_t block = dimension & -dimension;
    float factor = 1.0f / __builtin_sqrtf((float)block);
    for (int64_t half = 1; half < block; half *= 2)
        for (int64_t first = 0; first < dimension; first += 2 * half)
            for (int64_t i = first; i < first + half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    for (int64_t i = 0; i < dimension; i++) x[i] *= factor;
}

/* One token's head into its place, number `at` of [page][head][token]. */
inline void write_head(const float* x, int64_t dimension, int32_t code, bool is_rotated, void* storage, float* scales,
                       int64_t at) {
    float turned[BW_MOST_DIMENSION];
    if (is_rotated) {
        memcpy(turned, x, sizeof(float) * (size_t)dimension);
        turn_head(turned, dimension);
        x = turned;
    }
    if (code <= BW_BFLOAT16) {
        for_vectors(dimension, [&](int64_t d, int64_t count) INLINE_LAMBDA {
            store_part(storage, at * dimension + d, code, count, load_part(x, d, BW_FLOAT32, count));
        });
        return;
    }
    uint8_t codes[BW_MOST_DIMENSION];
    code_head(x, dimension, code == BW_INT8, is_rotated, codes, scales + 2 * at);
    if (code == BW_INT8) {
        memcpy((uint8_t*)storage + at * dimension, codes, (size_t)dimension);
        return;
    }
    uint8_t* to = (uint8_t*)storage + at * (dimension / 2);
    for (int64_t d = 0; d < dimension; d += 2) to[d / 2] = (uint8_t)(codes[d] | codes[d + 1] << 4);
}

/* Keys and values [heads][dimension] of one token into their place. */
void write_token(const bw_pages* p, const float* keys, const float* values, int64_t page, int64_t offset) {
    for (int64_t head = 0; head < p->heads; head++) {
        int64_t at = (page * p->heads + head) * p->page + offset;
        write_head(keys + head * p->dimension, p->dimension, p->key_code, p->key_rotated, p->keys, p->key_scale, at);
        write_head(values + head * p->dimension, p->dimension, p->value_code, p->value_rotated, p->values, p->value_scale, at);
    }
}
