/* What lies between the linear layers, computed in float32 and rounded once. Included inside an anonymous namespace. */

/* Calls f(first, count, is_whole) over a row in vectors; the last may be short. */
template <class Function> INLINE void for_vectors(int64_t columns, Function f) {
    int64_t c = 0;
    for (; c + BW_LANES <= columns; c += BW_LANES) f(c, BW_LANES);
    if (c < columns) f(c, columns - c);
}

INLINE F load_part(const void* p, int64_t index, int32_t dtype, int64_t count) {
    if (count == BW_LANES) return load_number(p, index, dtype);
    alignas(64) char part[64] = {};
    int64_t size = dtype == BW_FLOAT32 ? 4 : 2;
    memcpy(part, (const char*)p + index * size, (size_t)(count * size));
    return load_number(part, 0, dtype);
}

INLINE void store_part(void* p, int64_t index, int32_t dtype, int64_t count, F value) {
    if (count == BW_LANES) return store_number(p, index, dtype, value);
    alignas(64) char part[64];
    int64_t size = dtype == BW_FLOAT32 ? 4 : 2;
    store_number(part, 0, dtype, value);
    memcpy((char*)p + index * size, part, (size_t)(count * size));
}

/* e^x to two units in the last place: 2^n times a polynomial in what remains, within (-ln 2 / 2, ln 2 / 2). */
INLINE F exponential(F x) {
    x = min_f(max_f(x, set_f(-87.3f)), set_f(88.3f));
    I n = round_to_i(mul_f(x, set_f(1.44269504f)));
    F r = multiply_add(to_f(n), set_f(-0.693145752f), x);
    r = multiply_add(to_f(n), set_f(-1.42860677e-6f), r);
    F p = set_f(1.0f / 5040);
    static const float FACTORS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float c : FACTORS) p = multiply_add(p, r, set_f(c));
    return bits_to_f(add_i(bits_to_i(p), shift_left<23>(n)));
}

/* What a norm divides by: the root of the mean square of its token, and epsilon. */
INLINE float norm_divisor(const bw_norm* n, F squares) {
    return __builtin_sqrtf(lane_sum(squares) / (float)n->columns + n->epsilon);
}

/* What a token's norm is taken of, float32 numbers, into `row`, and into its sums if there are such; what it divides by.
 * The first half of rms_norm, bit for bit. */
inline float read_before_norm(const bw_norm* n, int64_t token, float* row) {
    int64_t first = token * n->columns;
    F squares = set_f(0.0f);
    for_vectors(n->columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        F v = load_part(n->x, first + c, BW_FLOAT32, count);
        if (n->residual) {
            v = add_f(v, load_part(n->residual, first + c, BW_FLOAT32, count));
            if (n->sum) store_part(n->sum, first + c, BW_FLOAT32, count, v);
        }
        store_part(row, c, BW_FLOAT32, count, v);
        squares = multiply_add(v, v, squares);
    });
    return norm_divisor(n, squares);
}

/* sum = x + residual (if there is one), then y = sum / sqrt(mean(sum^2) + epsilon) * weight, of one token. */
void rms_norm(const bw_norm* n, int64_t token) {
    int64_t first = token * n->columns;
    F squares = set_f(0.0f);
    for_vectors(n->columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        F v = load_part(n->x, first + c, n->dtype, count);
        if (n->residual) {
            v = add_f(v, load_part(n->residual, first + c, n->dtype, count));
            store_part(n->sum, first + c, n->dtype, count, v);
            v = load_part(n->sum, first + c, n->dtype, count); /* as it is stored */
        }
        squares = multiply_add(v, v, squares);
    });
    F divisor = set_f(norm_divisor(n, squares));
    const void* from = n->residual ? n->sum : n->x;
    for_vectors(n->columns, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        F v = div_f(load_part(from, first + c, n->dtype, count), divisor);
        store_part(n->y, first + c, n->dtype, count, mul_f(v, load_part(n->weight, c, n->dtype, count)));
    });
}

/* y = gate / (1 + e^-gate) * up, of some numbers. */
void silu_multiply(const void* gate, const void* up, int32_t dtype, int64_t first, int64_t last, void* y) {
    for_vectors(last - first, [&](int64_t c, int64_t count) INLINE_LAMBDA {
        F g = load_part(gate, first + c, dtype, count), u = load_part(up, first + c, dtype, count);
        F e = exponential(sub_f(set_f(0.0f), g));
        store_part(y, first + c, dtype, count, mul_f(div_f(g, add_f(set_f(1.0f), e)), u));
    });
}

/* One token's heads [heads, dimension] turned in place: halves (a, b) to (a cos - b sin, b cos + a sin). */
void rotate(void* x, int32_t dtype, int64_t first, int64_t heads, int64_t dimension, const float* cosine,
            const float* sine) {
    int64_t half = dimension / 2;
    for (int64_t head = 0; head < heads; head++, first += dimension)
        for_vectors(half, [&](int64_t c, int64_t count) INLINE_LAMBDA {
            F a = load_part(x, first + c, dtype, count), b = load_part(x, first + half + c, dtype, count);
            F turn = load_part(cosine, c, BW_FLOAT32, count), lift = load_part(sine, c, BW_FLOAT32, count);
            store_part(x, first + c, dtype, count, sub_f(mul_f(a, turn), mul_f(b, lift)));
            store_part(x, first + half + c, dtype, count, add_f(mul_f(b, turn), mul_f(a, lift)));
        });
}
