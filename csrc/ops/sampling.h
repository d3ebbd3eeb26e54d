/* Passes over the logits of a vocabulary. Included inside an anonymous namespace. */

/* The largest number and the first place where it is; NaN if there is one. */
float largest(const float* x, int64_t count, int64_t* index) {
    F high = set_f(x[0]), damage = set_f(0.0f);
    for_vectors(count, [&](int64_t i, int64_t n) INLINE_LAMBDA {
        alignas(64) float part[BW_LANES];
        for (int lane = 0; n < BW_LANES && lane < BW_LANES; lane++) part[lane] = x[lane < n ? i + lane : i];
        F v = load_f(n < BW_LANES ? part : x + i);
        high = max_f(v, high);
        damage = add_f(damage, mul_f(v, set_f(0.0f))); /* NaN for infinity, too */
    });
    float lanes[BW_LANES], most, bad = lane_sum(damage);
    store_f(lanes, high);
    most = lanes[0];
    for (float lane : lanes) most = lane > most ? lane : most;
    *index = 0;
    if (bad != 0) /* a rare look at each */
        for (int64_t i = 0; i < count; i++)
            if (x[i] != x[i]) return x[i];
    while (x[*index] != most) ++*index;
    return most;
}

/* y = e^((x - largest) * factor); below e^-87 zero. */
void weigh_numbers(const float* x, int64_t count, float largest, float factor, float* y) {
    for_vectors(count, [&](int64_t i, int64_t n) INLINE_LAMBDA {
        F v = mul_f(sub_f(load_part(x, i, BW_FLOAT32, n), set_f(largest)), set_f(factor));
        F e = exponential(v);
        I is_small = shift_right<31>(bits_to_i(add_f(v, set_f(87.0f))));              /* 1 or 0 */
        store_part(y, i, BW_FLOAT32, n, bits_to_f(and_i(bits_to_i(e), sub_i(is_small, set_i(1)))));
    });
}
