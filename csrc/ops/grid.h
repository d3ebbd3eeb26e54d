/* Rounding to the grid of each group, in float32 as in core/grid.py, bit for bit. Included inside an anonymous namespace. */

/* Like load_part, but lanes beyond the last number repeat the first: no lane is another number. */
INLINE F load_repeated(const void* p, int64_t index, int32_t dtype, int64_t count) {
    if (count == BW_LANES) return load_number(p, index, dtype);
    alignas(64) char part[64];
    int64_t size = dtype == BW_FLOAT32 ? 4 : 2;
    for (int64_t lane = 0; lane < BW_LANES; lane++)
        memcpy(part + lane * size, (const char*)p + (index + (lane < count ? lane : 0)) * size, (size_t)size);
    return load_number(part, 0, dtype);
}

/* Where a group of a row begins and how many numbers it has. */
INLINE int64_t group_size(const bw_grid* g, int64_t first) { return g->columns - first < g->group ? g->columns - first : g->group; }

/* The least and the greatest number of each group of a row; whether all of them are finite. */
template <int DTYPE> bool row_ranges(const bw_grid* g, int64_t row) {
    int64_t groups = (g->columns + g->group - 1) / g->group, first = row * g->columns;
    F excess = set_f(0.0f); /* of finite numbers 0 */
    for (int64_t group = 0; group < groups; group++) {
        int64_t start = group * g->group;
        F low = load_repeated(g->numbers, first + start, DTYPE, 1), high = low;
        for_vectors(group_size(g, start), [&](int64_t c, int64_t count) INLINE_LAMBDA {
            F v = load_repeated(g->numbers, first + start + c, DTYPE, count);
            low = min_f(low, v);
            high = max_f(high, v);
            excess = multiply_add(v, set_f(0.0f), excess);
        });
        g->low[row * groups + group] = -lane_most(sub_f(set_f(0.0f), low));
        g->high[row * groups + group] = lane_most(high);
    }
    return lane_sum(excess) == 0.0f;
}

bool find_ranges(const bw_grid* g, int64_t first, int64_t last) {
    bool is_finite = true;
    for (int64_t row = first; row < last; row++)
        is_finite &= g->dtype == BW_FLOAT32   ? row_ranges<BW_FLOAT32>(g, row)
                     : g->dtype == BW_FLOAT16 ? row_ranges<BW_FLOAT16>(g, row)
                                              : row_ranges<BW_BFLOAT16>(g, row);
    return is_finite;
}

INLINE void store_codes(uint8_t* p, I codes, int64_t count) {
    if (count == BW_LANES) return store_bytes(p, codes);
    alignas(64) uint8_t part[BW_LANES];
    store_bytes(part, codes);
    memcpy(p, part, (size_t)count);
}

/* The number that a code stands for. */
INLINE F worth(I code, float zero, float scale) { return mul_f(sub_f(to_f(code), set_f(zero)), set_f(scale)); }

/* code = clamp(round(number / scale) + zero), or with zeros that are no whole numbers clamp(round(number / scale + zero)). */
template <int DTYPE> void encode_row(const bw_grid* g, int64_t row) {
    int64_t groups = (g->columns + g->group - 1) / g->group, first = row * g->columns;
    const F most = set_f(65536.0f); /* of a quotient, beyond all codes; whole numbers are exact up to it */
    const I lowest = set_i(g->lowest), highest = set_i(g->highest);
    for (int64_t group = 0; group < groups; group++) {
        int64_t start = group * g->group;
        float scale = g->scale[row * groups + group], zero = g->zero ? g->zero[row * groups + group] : 0.0f;
        bool is_whole = g->has_whole_zeros && zero > -65536.0f && zero < 65536.0f;
        F divisor = set_f(scale == 0.0f ? 1.0f : scale), shift = set_f(g->has_whole_zeros ? 0.0f : zero);
        I whole = set_i(is_whole ? (int32_t)zero : 0);
        for_vectors(group_size(g, start), [&](int64_t c, int64_t count) INLINE_LAMBDA {
            F v = add_f(div_f(load_part(g->numbers, first + start + c, DTYPE, count), divisor), shift);
            if (g->offset) v = add_f(v, load_part(g->offset, first + start + c, BW_FLOAT32, count));
            v = max_f(min_f(v, most), sub_f(set_f(0.0f), most));
            I code = min_i(max_i(add_i(round_to_i(v), whole), lowest), highest);
            if (g->codes) store_codes(g->codes + first + start + c, code, count);
            if (g->decoded) store_part(g->decoded, first + start + c, DTYPE, count, worth(code, zero, scale));
        });
    }
}

void encode_rows(const bw_grid* g, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        g->dtype == BW_FLOAT32   ? encode_row<BW_FLOAT32>(g, row)
        : g->dtype == BW_FLOAT16 ? encode_row<BW_FLOAT16>(g, row)
                                 : encode_row<BW_BFLOAT16>(g, row);
}

/* 1, 0 or -1; that of NaN is 0. */
INLINE F sign_f(F x) {
    const I none = set_i(0), one = set_i(1), bits = bits_to_i(x), magnitude = and_i(bits, set_i(0x7fffffff));
    I is_number = max_i(min_i(sub_i(set_i(0x7f800001), magnitude), one), none);
    I direction = max_i(min_i(or_i(bits, one), one), set_i(-1));
    return to_f(and_i(direction, sub_i(none, and_i(is_number, min_i(magnitude, one)))));
}

/* How a rounded number (code - zero) * scale moves with its scale and its zero point; its offset is moved by a step. */
template <int DTYPE>
void step_row(const bw_grid* g, const void* gradient, float step, int64_t row, float* by_scale, float* by_zero) {
    int64_t groups = (g->columns + g->group - 1) / g->group, first = row * g->columns;
    const F most = set_f(65536.0f), half = set_f(0.5f), size = set_f(step);
    const I lowest = set_i(g->lowest), highest = set_i(g->highest), none = set_i(0), one = set_i(1);
    for (int64_t group = 0; group < groups; group++) {
        int64_t start = group * g->group;
        float scale = g->scale[row * groups + group], zero = g->zero ? g->zero[row * groups + group] : 0.0f;
        F divisor = set_f(scale == 0.0f ? 1.0f : scale), scales = set_f(0.0f), zeros = scales;
        I whole = set_i(zero > -65536.0f && zero < 65536.0f ? (int32_t)zero : 0);
        for_vectors(group_size(g, start), [&](int64_t c, int64_t count) INLINE_LAMBDA {
            int64_t at = first + start + c;
            F v = div_f(load_part(g->numbers, at, DTYPE, count), divisor), pull = load_part(gradient, at, DTYPE, count);
            F offset = load_part(g->offset, at, BW_FLOAT32, count), moved = add_f(v, offset);
            I wanted = add_i(round_to_i(max_f(min_f(moved, most), sub_f(set_f(0.0f), most))), whole);
            I code = min_i(max_i(wanted, lowest), highest), beyond = sub_i(wanted, code);
            I is_clamped = min_i(max_i(beyond, sub_i(none, beyond)), one), is_free = sub_i(is_clamped, one); /* 0 or -1 */
            F inside = bits_to_f(and_i(bits_to_i(v), is_free));
            scales = add_f(scales, mul_f(sub_f(sub_f(to_f(code), set_f(zero)), inside), pull));
            F by_code = mul_f(pull, set_f(scale));
            zeros = add_f(zeros, mul_f(by_code, to_f(is_clamped)));
            offset = sub_f(offset, mul_f(size, sign_f(bits_to_f(and_i(bits_to_i(by_code), is_free)))));
            store_part(g->offset, at, BW_FLOAT32, count, max_f(min_f(offset, half), sub_f(set_f(0.0f), half)));
        });
        by_scale[row * groups + group] = lane_sum(scales);
        by_zero[row * groups + group] = -lane_sum(zeros);
    }
}

void step_rows(const bw_grid* g, const void* gradient, float step, int64_t first, int64_t last, float* by_scale,
               float* by_zero) {
    for (int64_t row = first; row < last; row++)
        g->dtype == BW_FLOAT32   ? step_row<BW_FLOAT32>(g, gradient, step, row, by_scale, by_zero)
        : g->dtype == BW_FLOAT16 ? step_row<BW_FLOAT16>(g, gradient, step, row, by_scale, by_zero)
                                 : step_row<BW_BFLOAT16>(g, gradient, step, row, by_scale, by_zero);
}

template <int DTYPE> void decode_row(const bw_grid* g, int64_t row) {
    const I bias = set_i(g->lowest < 0 ? 128 : 0);
    int64_t groups = (g->columns + g->group - 1) / g->group, first = row * g->columns;
    for (int64_t group = 0; group < groups; group++) {
        int64_t start = group * g->group;
        float scale = g->scale[row * groups + group], zero = g->zero ? g->zero[row * groups + group] : 0.0f;
        for_vectors(group_size(g, start), [&](int64_t c, int64_t count) INLINE_LAMBDA {
            const uint8_t* from = g->codes + first + start + c;
            alignas(64) uint8_t part[BW_LANES] = {};
            if (count < BW_LANES) from = (const uint8_t*)memcpy(part, from, (size_t)count);
            I code = sub_i(and_i(add_i(load_bytes(from), bias), set_i(255)), bias); /* with its sign */
            store_part(g->decoded, first + start + c, DTYPE, count, worth(code, zero, scale));
        });
    }
}

void decode_rows(const bw_grid* g, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
        g->dtype == BW_FLOAT32   ? decode_row<BW_FLOAT32>(g, row)
        : g->dtype == BW_FLOAT16 ? decode_row<BW_FLOAT16>(g, row)
                                 : decode_row<BW_BFLOAT16>(g, row);
}
