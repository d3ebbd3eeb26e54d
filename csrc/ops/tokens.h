/* Activations to the words that the products read. Included inside an anonymous namespace. */

/* The least and the greatest of whole vectors of numbers, and what is NaN if some are not finite. */
struct Extremes {
    F least = set_f(__builtin_inff()), greatest = set_f(-__builtin_inff()), damage = set_f(0.0f);

    INLINE void add(F v) {
        least = min_f(v, least);
        greatest = max_f(v, greatest);
        damage = add_f(damage, sub_f(v, v)); /* 0, or NaN */
    }
};

/* The numbers of a token as float32, padded with zeros to whole blocks: as they are, or normalized on the way. Extremes
 * are of whole vectors. */
inline Extremes read_row(const bw_source* s, int64_t token, int64_t columns, int64_t slots, float* row) {
    Extremes extremes;
    const F divisor = set_f(s->norm ? read_before_norm(s->norm, token, row) : 1.0f);
    for_vectors(columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        F v;
        if (!s->norm) v = load_part(s->x, token * columns + c, s->dtype, count);
        else v = mul_f(div_f(load_part(row, c, BW_FLOAT32, count), divisor), load_part(s->norm->weight, c, BW_FLOAT32, count));
        if (s->input_scale) v = mul_f(v, load_part(s->input_scale, c, BW_FLOAT32, count));
        store_part(row, c, BW_FLOAT32, count, v);
        if (count == BW_LANES) extremes.add(v);
    });
    for (int64_t c = columns; c < slots; c++) row[c] = 0;
    return extremes;
}

/* The scale of a token (max|x| / most, of a constant token its magnitude), or NaN if it holds NaN or infinity.
 * For int8, whose most is 127, the same arithmetic as bitwright.core.grid. */
inline float token_scale(const Extremes& e, const float* row, int64_t columns, float most) {
    constexpr float tiny = 1.17549435e-38f;
    float low = -lane_most(sub_f(set_f(0.0f), e.least)), high = lane_most(e.greatest), bad = lane_sum(e.damage);
    for (int64_t c = columns / BW_LANES * BW_LANES; c < columns; c++) {
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

/* The scale of the numbers [first, first + size) of a row, as far as there are columns. */
inline float part_scale(const float* row, int64_t first, int64_t size, int64_t columns) {
    int64_t count = size < columns - first ? size : columns - first;
    if (count <= 0) return 0;
    Extremes extremes;
    for (int64_t c = 0; c + BW_LANES <= count; c += BW_LANES) extremes.add(load_f(row + first + c));
    return token_scale(extremes, row + first, count, 127.0f);
}

/* The sum of lanes whose magnitudes together are below 2^24 (those of a group are): in float32 it is exact. */
INLINE int32_t whole_sum(I lanes) { return (int32_t)lane_sum(to_f(lanes)); }

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
    return whole_sum(sum);
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
    sums[0] = whole_sum(high_sum);
    sums[1] = whole_sum(low_sum);
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

/* Where the words of one row of the tokens lie: in its tile, `width` apart. */
struct WordPlace {
    const bw_tokens& tokens;
    int64_t first_of_tile, lane, width;

    INLINE WordPlace(const bw_tokens& all, int64_t index) : tokens(all) {
        int64_t widest = bw_tile_width(all.count);
        first_of_tile = index / widest * widest;
        lane = index - first_of_tile;
        width = all.count - first_of_tile < widest ? all.count - first_of_tile : widest;
    }
    /* Words [count] of a group that begins with word `first`. */
    INLINE void put(int64_t first, int64_t count, const uint32_t* words) const {
        uint32_t* to = tokens.words + first * tokens.count + first_of_tile * count + lane;
        for (int64_t i = 0; i < count; i++) to[i * width] = words[i];
    }
};

int prepare_token(const bw_weight* w, const bw_source* source, int64_t token, bw_tokens* tokens, float* row) {
    int64_t longest = w->columns > w->slots ? w->columns : w->slots;
    const Extremes extremes = read_row(source, token, w->columns, w->slots, row);
    bool is_integer = tokens->route == BW_ROUTE_INTEGER, is_wide = tokens->route == BW_ROUTE_WIDE;
    bool has_parts = tokens->scale_group != 0, is_finite = true;
    float scale = is_integer || is_wide ? token_scale(extremes, row, w->columns, is_wide ? (float)BW_MOST_WIDE : 127.0f) : 1.0f;
    if ((is_integer || is_wide) && !has_parts) tokens->scale[token] = scale; /* if it is NaN, so are all of the token's results */
    const float* slots = row;
    if (w->order) {
        float* moved = row + longest;
        for (int64_t s = 0; s < w->slots; s++) moved[s] = (uint32_t)w->order[s] < w->columns ? row[w->order[s]] : 0.0f;
        slots = moved;
    }
    const WordPlace place(*tokens, is_wide ? 2 * token : token), next(*tokens, is_wide ? 2 * token + 1 : token);
    int64_t per_word = tokens->route == BW_ROUTE_FLOAT32 ? 1 : tokens->route == BW_ROUTE_BFLOAT16 ? 2 : 4;
    uint32_t* words = (uint32_t*)(row + longest + w->slots);
    const int32_t factor = w->zero ? 1 : -w->center; /* what products of codes have too much, if it is one number */
    for (int64_t first = 0, group = 0; first < w->slots; first += tokens->group, group++) {
        int64_t count = tokens->group < w->slots - first ? tokens->group : w->slots - first, at = group * tokens->count + token;
        if (has_parts) {
            if (first % tokens->scale_group == 0) scale = part_scale(row, first, tokens->scale_group, w->columns);
            tokens->scale[at] = scale;
        }
        is_finite = is_finite && scale == scale;
        if (is_wide) {
            int32_t* sums = (int32_t*)tokens->sums + group * tokens->count + 2 * token;
            write_halves(slots + first, count, scale, words, words + count / 4, sums);
            for (int half = 0; half < 2; half++) sums[half] *= factor;
            place.put(first / 4, count / 4, words);
            next.put(first / 4, count / 4, words + count / 4);
            continue;
        }
        if (is_integer) ((int32_t*)tokens->sums)[at] = factor * write_bytes(slots + first, count, scale, words);
        else ((float*)tokens->sums)[at] = write_floats(slots + first, count, per_word == 2, words);
        place.put(first / per_word, count / per_word, words);
    }
    return is_integer && !is_finite ? BW_NOT_FINITE : BW_OK;
}
