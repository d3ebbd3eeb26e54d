/* Activations to the words that the products read. Included inside an anonymous namespace. */

INLINE float number_at(const void* x, int64_t index, int32_t dtype) {
    alignas(64) char bytes[64] = {};
    int size = dtype == BW_FLOAT32 ? 4 : 2;
    memcpy(bytes, (const char*)x + index * size, (size_t)size);
    float first[BW_LANES];
    store_f(first, load_number(bytes, 0, dtype));
    return first[0];
}

/* The numbers of a token as float32, padded with zeros to whole vectors. */
inline void read_row(const void* x, int64_t first, int64_t columns, int64_t slots, int32_t dtype, float* row) {
    int64_t whole = columns / BW_LANES * BW_LANES;
    for (int64_t c = 0; c < whole; c += BW_LANES) store_f(row + c, load_number(x, first + c, dtype));
    for (int64_t c = whole; c < columns; c++) row[c] = number_at(x, first + c, dtype);
    for (int64_t c = columns; c < slots; c++) row[c] = 0;
}

/* The scale of a token (max|x| / most, of a constant token its magnitude), or NaN if it holds NaN or infinity.
 * For int8, whose most is 127, the same arithmetic as bitwright.core.grid. */
inline float token_scale(const float* row, int64_t columns, float most) {
    constexpr float tiny = 1.17549435e-38f;
    F least = set_f(row[0]), greatest = least, damage = set_f(0.0f);
    int64_t whole = columns / BW_LANES * BW_LANES;
    for (int64_t c = 0; c < whole; c += BW_LANES) {
        F v = load_f(row + c);
        least = min_f(v, least);
        greatest = max_f(v, greatest);
        damage = add_f(damage, sub_f(v, v)); /* 0, or NaN */
    }
    float low = -lane_most(sub_f(set_f(0.0f), least)), high = lane_most(greatest), bad = lane_sum(damage);
    for (int64_t c = whole; c < columns; c++) {
        low = row[c] < low ? row[c] : low;
        high = row[c] > high ? row[c] : high;
        bad += row[c] - row[c];
    }
    if (bad != 0) return bad;
    float largest = -low > high ? -low : high, scale = largest / most;
    if (largest == 0) return 0;
    if (low == high && largest >= tiny) return largest;
    return scale < tiny ? tiny : scale;
}

/* One group of a token to int8 words; their sum. */
inline int32_t write_bytes(const float* row, int64_t slots, float scale, uint32_t* words) {
    F divisor = set_f(scale > 0 ? scale : 1.0f);
    I sum = set_i(0);
    for (int64_t s = 0; s < slots; s += BW_LANES) {
        I code = round_to_i(div_f(load_f(row + s), divisor));
        code = max_i(min_i(code, set_i(127)), set_i(-128));
        sum = add_i(sum, code);
        store_bytes(words + s / 4, code);
    }
    int32_t lanes[BW_LANES], total = 0;
    store_i(lanes, sum);
    for (int32_t lane : lanes) total += lane;
    return total;
}

/* One group of a token to 16 bits, as the sum 256 * high + low of int8 words; the sums of both. */
inline void write_halves(const float* row, int64_t slots, float scale, uint32_t* high, uint32_t* low, int32_t* sums) {
    F divisor = set_f(scale > 0 ? scale : 1.0f);
    I high_sum = set_i(0), low_sum = set_i(0);
    for (int64_t s = 0; s < slots; s += BW_LANES) {
        I code = max_i(min_i(round_to_i(div_f(load_f(row + s), divisor)), set_i(BW_MOST_WIDE)), set_i(-BW_MOST_WIDE));
        I upper = sub_i(shift_right<8>(add_i(code, set_i(32768 + 128))), set_i(128)); /* the nearest, so that low fits */
        I lower = sub_i(code, shift_left<8>(upper));
        high_sum = add_i(high_sum, upper);
        low_sum = add_i(low_sum, lower);
        store_bytes(high + s / 4, upper);
        store_bytes(low + s / 4, lower);
    }
    int32_t lanes[2][BW_LANES];
    store_i(lanes[0], high_sum);
    store_i(lanes[1], low_sum);
    sums[0] = sums[1] = 0;
    for (int i = 0; i < 2 * BW_LANES; i++) sums[i / BW_LANES] += lanes[i / BW_LANES][i % BW_LANES];
}

/* One group of a token to float32 words, or to pairs of bfloat16 (slots 0 and 2 of each four, then 1 and 3). */
inline float write_floats(const float* row, int64_t slots, bool are_pairs, uint32_t* words) {
    F sum = set_f(0.0f);
    for (int64_t s = 0; s < slots; s += BW_LANES) {
        F v = load_f(row + s);
        if (!are_pairs) {
            sum = add_f(sum, v);
            store_f((float*)words + s, v);
            continue;
        }
        I rounded = to_bfloat16(v); /* as it is, if it was one */
        sum = add_f(sum, bits_to_f(shift_left<16>(rounded)));
        uint32_t lane[BW_LANES];
        store_i(lane, rounded);
        for (int i = 0; i < BW_LANES; i += 4) {
            words[(s + i) / 2] = lane[i] | lane[i + 2] << 16;
            words[(s + i) / 2 + 1] = lane[i + 1] | lane[i + 3] << 16;
        }
    }
    return lane_sum(sum);
}

/* Words [count] of a group of row `index` of the tokens, to their places in its tile. */
INLINE void place_words(const bw_tokens* tokens, int64_t index, int64_t first, int64_t count, const uint32_t* words) {
    int64_t first_of_tile = index / BW_TILE * BW_TILE, left = tokens->count - first_of_tile;
    int64_t width = left < BW_TILE ? left : BW_TILE;
    uint32_t* to = tokens->words + first * tokens->count + first_of_tile * count + index - first_of_tile;
    for (int64_t i = 0; i < count; i++) to[i * width] = words[i];
}

int prepare_token(const bw_weight* w, const void* x, int32_t dtype, int64_t token, const float* input_scale,
                  bw_tokens* tokens, float* row) {
    int64_t longest = w->columns > w->slots ? w->columns : w->slots;
    read_row(x, token * w->columns, w->columns, w->slots, dtype, row);
    for (int64_t c = 0; input_scale && c < w->columns; c++) row[c] *= input_scale[c];
    bool is_integer = tokens->route == BW_ROUTE_INTEGER, is_wide = tokens->route == BW_ROUTE_WIDE;
    float scale = is_integer || is_wide ? token_scale(row, w->columns, is_wide ? (float)BW_MOST_WIDE : 127.0f) : 1.0f;
    if (is_integer || is_wide) tokens->scale[token] = scale; /* if it is NaN, so are all of the token's results */
    const float* slots = row;
    if (w->order) {
        float* moved = row + longest;
        for (int64_t s = 0; s < w->slots; s++) moved[s] = (uint32_t)w->order[s] < w->columns ? row[w->order[s]] : 0.0f;
        slots = moved;
    }
    int64_t per_word = tokens->route == BW_ROUTE_FLOAT32 ? 1 : tokens->route == BW_ROUTE_BFLOAT16 ? 2 : 4;
    uint32_t* words = (uint32_t*)(row + longest + w->slots);
    for (int64_t first = 0, group = 0; first < w->slots; first += w->group, group++) {
        int64_t count = w->group < w->slots - first ? w->group : w->slots - first, at = group * tokens->count + token;
        if (is_wide) {
            int32_t* sums = (int32_t*)tokens->sums + group * tokens->count + 2 * token;
            write_halves(slots + first, count, scale, words, words + count / 4, sums);
            place_words(tokens, 2 * token, first / 4, count / 4, words);
            place_words(tokens, 2 * token + 1, first / 4, count / 4, words + count / 4);
            continue;
        }
        if (is_integer) ((int32_t*)tokens->sums)[at] = write_bytes(slots + first, count, scale, words);
        else ((float*)tokens->sums)[at] = write_floats(slots + first, count, per_word == 2, words);
        place_words(tokens, token, first / per_word, count / per_word, words);
    }
    return is_integer && scale != scale ? BW_NOT_FINITE : BW_OK;
}
