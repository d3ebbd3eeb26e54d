/* Weights whose columns and rows are scaled, and what a gradient of such a rounded weight says of the scales. Included
 * inside an anonymous namespace. */

void scale_rows(const bw_scaling* s, void* scaled, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        F divisor = set_f(s->divisor ? s->divisor[row] : 1.0f);
        for_vectors(s->columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            F v = load_part(s->weight, row * s->columns + c, s->dtype, count);
            if (s->scale) v = mul_f(v, load_part(s->scale, c, BW_FLOAT32, count));
            if (s->divisor) v = div_f(v, divisor);
            store_part(scaled, row * s->columns + c, s->dtype, count, v);
        });
    }
}

struct Row { /* of one group of a row, float32 */
    float *own, *scaled, *gradient;
};

struct Pulls { /* what the range of a group takes from its gradient at its greatest and at its least number */
    float high, low;
};

/* The derivatives of a group's range at its extremes, times `along`; over the range itself. */
INLINE Pulls range_pulls(int32_t range, float low, float high, float along) {
    float size = high - low, at_high = 1.0f, at_low = -1.0f;
    if (range == BW_RANGE_MAGNITUDE) {
        float a = __builtin_fabsf(high), b = __builtin_fabsf(low);
        size = a > b ? a : b;
        at_high = (a > b ? 1.0f : a == b ? 0.5f : 0.0f) * (high < 0 ? -1.0f : 1.0f);
        at_low = (b > a ? 1.0f : a == b ? 0.5f : 0.0f) * (low < 0 ? -1.0f : 1.0f);
    } else if (range == BW_RANGE_WITH_ZERO) {
        size = (high > 0 ? high : 0.0f) - (low < 0 ? low : 0.0f);
        at_high = high >= 0 ? 1.0f : 0.0f;
        at_low = low <= 0 ? -1.0f : 0.0f;
    }
    if (!(size > 0)) return {0.0f, 0.0f};
    return {along / size * at_high, along / size * at_low};
}

/* Reads a group into `row`; adds gradient times rounded number to `turned`; the pulls of its extremes, for each of equals. */
INLINE Pulls read_group(const bw_scaling* s, const void* rounded, const void* gradient, int64_t at, int64_t column,
                        int64_t size, float divisor, const Row& row, F& turned, float& low, float& high) {
    F least = set_f(0.0f), most = least, along = least;
    for_vectors(size, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        F own = div_f(load_repeated(s->weight, at + c, s->dtype, count), set_f(divisor));
        F v = s->scale ? mul_f(own, load_repeated(s->scale, column + c, BW_FLOAT32, count)) : own;
        F g = load_part(gradient, at + c, s->dtype, count), q = load_part(rounded, at + c, s->dtype, count);
        least = c ? min_f(least, v) : v;
        most = c ? max_f(most, v) : v;
        along = add_f(along, mul_f(g, sub_f(q, v)));
        turned = add_f(turned, mul_f(g, q));
        store_part(row.own, c, BW_FLOAT32, count, own);
        store_part(row.scaled, c, BW_FLOAT32, count, v);
        store_part(row.gradient, c, BW_FLOAT32, count, g);
    });
    low = -lane_most(sub_f(set_f(0.0f), least));
    high = lane_most(most);
    Pulls pulls = range_pulls(s->range, low, high, lane_sum(along));
    int32_t highest = 0, lowest = 0;
    for (int64_t c = 0; c < size; c++) {
        highest += row.scaled[c] == high;
        lowest += row.scaled[c] == low;
    }
    return {pulls.high / (float)highest, pulls.low / (float)lowest};
}

/* by_scale [columns], of these rows, and by_divisor of each of them. `scratch`: 3 * group floats. */
void pull_back(const bw_scaling* s, const void* rounded, const void* gradient, int64_t first, int64_t last, float* by_scale,
               float* by_divisor, float* scratch) {
    Row row = {scratch, scratch + s->group, scratch + 2 * s->group};
    for (int64_t c = 0; c < s->columns; c++) by_scale[c] = 0.0f;
    for (int64_t r = first; r < last; r++) {
        float divisor = s->divisor ? s->divisor[r] : 1.0f, low, high;
        F turned = set_f(0.0f);
        for (int64_t column = 0; column < s->columns; column += s->group) {
            int64_t size = s->columns - column < s->group ? s->columns - column : s->group;
            Pulls pulls = read_group(s, rounded, gradient, r * s->columns + column, column, size, divisor, row, turned,
                                     low, high);
            float* to = by_scale + column;
            for (int64_t c = 0; c < size; c++) {
                float pull = (row.scaled[c] == high ? pulls.high : 0.0f) + (row.scaled[c] == low ? pulls.low : 0.0f);
                to[c] += (row.gradient[c] + pull) * row.own[c];
            }
        }
        if (by_divisor) by_divisor[r] = -lane_sum(turned) / divisor;
    }
}
