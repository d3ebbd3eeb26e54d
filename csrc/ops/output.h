/* Totals to y. Included inside an anonymous namespace. */

/* To bfloat16 in the low half of each lane: half to even, NaN stays NaN, subnormal numbers are kept. */
INLINE I to_bfloat16(F value) {
    I word = bits_to_i(value);
    I rounded = add_i(word, add_i(set_i(0x7fff), and_i(shift_right<16>(word), set_i(1))));
    I magnitude = and_i(word, set_i(0x7fffffff));
    I is_nan = shift_right<31>(sub_i(set_i(0x7f800000), magnitude)); /* 1 or 0 */
    I nan = shift_right<16>(or_i(word, set_i(0x400000)));
    return or_i(mul_i(is_nan, nan), mul_i(sub_i(set_i(1), is_nan), shift_right<16>(rounded)));
}

INLINE void store_number(void* p, int64_t index, int32_t dtype, F value) {
    if (dtype == BW_FLOAT32) return store_f((float*)p + index, value);
    uint16_t* to = (uint16_t*)p + index;
    if (dtype == BW_FLOAT16) return store_float16(to, value);
    store_halves(to, to_bfloat16(value));
}

/* A token's totals of a panel: scaled (integer and wide routes, unless groups were), with the bias, in the dtype of y. */
inline void write_totals(const bw_linear_job& job, int64_t panel, int64_t token, const float* totals) {
    int64_t rows = job.weight->rows, first = panel * BW_PANEL, count = rows - first < BW_PANEL ? rows - first : BW_PANEL;
    alignas(64) char part[BW_PANEL * 4], bias_part[BW_PANEL * 4];
    int size = job.dtype == BW_FLOAT32 ? 4 : 2;
    char* y = (char*)job.y + (token * rows + first) * size;
    const char* bias = job.bias ? (const char*)job.bias + first * size : nullptr;
    if (bias && count < BW_PANEL) {
        memcpy(bias_part, bias, (size_t)(count * size));
        bias = bias_part;
    }
    for (int lane = 0; lane < count; lane += BW_LANES) {
        F value = load_f(totals + lane);
        if (job.tokens.scale && !job.tokens.scale_group) value = mul_f(value, set_f(job.tokens.scale[token]));
        if (bias) value = add_f(value, load_number(bias, lane, job.dtype));
        store_number(count < BW_PANEL ? part : y, lane, job.dtype, value);
    }
    if (count < BW_PANEL) memcpy(y, part, (size_t)(count * size));
}

/* All totals of a panel; those of the wide route's halves together. */
inline void write_panel(const bw_linear_job& job, int64_t panel, float* totals) {
    bool is_wide = job.tokens.route == BW_ROUTE_WIDE;
    int64_t count = is_wide ? job.tokens.count / 2 : job.tokens.count;
    for (int64_t token = 0; token < count; token++) {
        float* own = totals + token * BW_PANEL * (is_wide ? 2 : 1);
        for (int lane = 0; is_wide && lane < BW_PANEL; lane += BW_LANES)
            store_f(own + lane, add_f(mul_f(load_f(own + lane), set_f(256.0f)), load_f(own + BW_PANEL + lane)));
        write_totals(job, panel, token, own);
    }
}
