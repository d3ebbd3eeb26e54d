/* Sixteen lanes of 32 bits in plain C++: what every other file must agree with. Included inside an anonymous namespace. */

struct I { int32_t v[16]; };
struct F { float v[16]; };
struct Table { const float* values; };

#define LANES(type, expression) \
    type r;                     \
    for (int l = 0; l < 16; l++) r.v[l] = (expression); \
    return r

INLINE uint32_t bits(int32_t v) { return (uint32_t)v; }
INLINE I load_i(const void* p) { I r; memcpy(&r, p, 64); return r; }
INLINE void store_i(void* p, I v) { memcpy(p, &v, 64); }
INLINE I set_i(int32_t v) { LANES(I, v); }
INLINE I and_i(I a, I b) { LANES(I, a.v[l] & b.v[l]); }
INLINE I or_i(I a, I b) { LANES(I, a.v[l] | b.v[l]); }
INLINE I add_i(I a, I b) { LANES(I, (int32_t)(bits(a.v[l]) + bits(b.v[l]))); }
INLINE I sub_i(I a, I b) { LANES(I, (int32_t)(bits(a.v[l]) - bits(b.v[l]))); }
INLINE I mul_i(I a, I b) { LANES(I, (int32_t)(bits(a.v[l]) * bits(b.v[l]))); }
INLINE I min_i(I a, I b) { LANES(I, a.v[l] < b.v[l] ? a.v[l] : b.v[l]); }
INLINE I max_i(I a, I b) { LANES(I, a.v[l] > b.v[l] ? a.v[l] : b.v[l]); }
template <int N> INLINE I shift_right(I a) { LANES(I, (int32_t)(bits(a.v[l]) >> N)); }
template <int N> INLINE I shift_left(I a) { LANES(I, (int32_t)(bits(a.v[l]) << N)); }

INLINE F load_f(const float* p) { F r; memcpy(&r, p, 64); return r; }
INLINE void store_f(float* p, F v) { memcpy(p, &v, 64); }
INLINE F set_f(float v) { LANES(F, v); }
INLINE F add_f(F a, F b) { LANES(F, a.v[l] + b.v[l]); }
INLINE F sub_f(F a, F b) { LANES(F, a.v[l] - b.v[l]); }
INLINE F mul_f(F a, F b) { LANES(F, a.v[l] * b.v[l]); }
INLINE F div_f(F a, F b) { LANES(F, a.v[l] / b.v[l]); }
INLINE F min_f(F a, F b) { LANES(F, a.v[l] < b.v[l] ? a.v[l] : b.v[l]); }
INLINE F max_f(F a, F b) { LANES(F, a.v[l] > b.v[l] ? a.v[l] : b.v[l]); }
INLINE F multiply_add(F a, F b, F c) { LANES(F, a.v[l] * b.v[l] + c.v[l]); }
INLINE F bits_to_f(I v) { F r; memcpy(&r, &v, 64); return r; }
INLINE I bits_to_i(F v) { I r; memcpy(&r, &v, 64); return r; }
INLINE F to_f(I a) { LANES(F, (float)a.v[l]); }
/* Half to even, as the vector instructions round: adding 1.5 * 2^23 leaves the whole number in the low bits. */
INLINE int32_t round_one(float v) {
    if (!(v > -4194304.0f && v < 4194304.0f)) return v > 0 ? 4194304 : -4194304;
    float moved = v + 12582912.0f;
    int32_t r;
    memcpy(&r, &moved, 4);
    return r - 0x4B400000;
}
INLINE I round_to_i(F a) { LANES(I, round_one(a.v[l])); }

INLINE I load_bytes(const uint8_t* p) { LANES(I, p[l]); }
INLINE void store_bytes(void* p, I v) {
    for (int l = 0; l < 16; l++) ((uint8_t*)p)[l] = (uint8_t)v.v[l];
}
INLINE I load_halves(const void* p) {
    uint16_t h[16];
    memcpy(h, p, 32);
    LANES(I, h[l]);
}
INLINE void store_halves(void* p, I v) {
    uint16_t h[16];
    for (int l = 0; l < 16; l++) h[l] = (uint16_t)v.v[l];
    memcpy(p, h, 32);
}
INLINE float float16_to_float(uint32_t h) {
    uint32_t sign = (h & 0x8000) << 16, rest = h & 0x7fff, r;
    float value;
    if (rest >= 0x7c00) r = (rest << 13) | 0x7f800000 | (rest > 0x7c00 ? 0x400000 : 0);
    else if (rest >= 0x400) r = (rest << 13) + 0x38000000;
    else {
        value = (float)rest * 5.9604644775390625e-08f; /* 2^-24: exact */
        memcpy(&r, &value, 4);
    }
    r |= sign;
    memcpy(&value, &r, 4);
    return value;
}
INLINE uint16_t float_to_float16(float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    uint32_t sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) { /* subnormal: adding 0.5 brings its last bit to the last bit of the sum */
        float magnitude, half = 0.5f;
        memcpy(&magnitude, &rest, 4);
        magnitude += half;
        memcpy(&rest, &magnitude, 4);
        return (uint16_t)(sign | (rest - 0x3f000000));
    }
    rest += 0xfff + ((rest >> 13) & 1);
    return (uint16_t)(sign | ((rest - 0x38000000) >> 13));
}
INLINE F load_float16(const void* p) {
    uint16_t h[16];
    memcpy(h, p, 32);
    LANES(F, float16_to_float(h[l]));
}
INLINE void store_float16(void* p, F v) {
    uint16_t h[16];
    for (int l = 0; l < 16; l++) h[l] = float_to_float16(v.v[l]);
    memcpy(p, h, 32);
}

/* The sum of all lanes, halves to halves, and the largest. */
INLINE float lane_sum(F a) {
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) a.v[l] += a.v[l + half];
    return a.v[0];
}
INLINE float lane_most(F a) {
    for (int l = 1; l < 16; l++) a.v[0] = a.v[l] > a.v[0] ? a.v[l] : a.v[0];
    return a.v[0];
}
INLINE I load_two(const void* low, const void* high) { /* 32 bytes each */
    I r;
    memcpy(r.v, low, 32);
    memcpy(r.v + 8, high, 32);
    return r;
}
/* Lane j of vector i to lane i of vector j. */
INLINE void transpose(I (&v)[16]) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            int32_t lane = v[i].v[j];
            v[i].v[j] = v[j].v[i];
            v[j].v[i] = lane;
        }
}
INLINE int32_t half_product(int32_t x, int32_t y) { return (int16_t)(bits(x) & 0xffff) * (int16_t)(bits(y) & 0xffff); }
/* Sums of the products of signed 16-bit halves. */
INLINE I dot_halves(I sum, I x, I y) {
    LANES(I, (int32_t)(bits(sum.v[l]) + bits(half_product(x.v[l], y.v[l])) + bits(half_product(x.v[l] >> 16, y.v[l] >> 16))));
}
/* 32 bytes each: of every byte a word with that of x in its low half; byte i is word paired_place(i) of both vectors. */
INLINE void pair_bytes(const uint8_t* x, const uint8_t* y, I& first, I& second) {
    for (int l = 0; l < 16; l++) {
        first.v[l] = x[l] | y[l] << 16;
        second.v[l] = x[16 + l] | y[16 + l] << 16;
    }
}
INLINE int paired_place(int byte) { return byte; }
/* Lane i: the sum of vector i's lanes, all summed in one order. */
INLINE F sum_across(const F (&a)[16]) {
    LANES(F, 0.0f + (((a[l].v[0] + a[l].v[8]) + (a[l].v[4] + a[l].v[12])) + ((a[l].v[2] + a[l].v[10]) + (a[l].v[6] + a[l].v[14]))) +
                 (((a[l].v[1] + a[l].v[9]) + (a[l].v[5] + a[l].v[13])) + ((a[l].v[3] + a[l].v[11]) + (a[l].v[7] + a[l].v[15]))));
}

INLINE Table load_table(const float* levels) { return {levels}; }
INLINE F look_up(Table t, I index) { LANES(F, t.values[index.v[l] & 15]); }

template <bool IS_WIDE> INLINE I dot_bytes(I sum, I u, int32_t x) {
    I r;
    for (int l = 0; l < 16; l++) {
        int32_t s = 0;
        for (int b = 0; b < 32; b += 8) s += (int32_t)((bits(u.v[l]) >> b) & 255) * (int8_t)((bits(x) >> b) & 255);
        r.v[l] = (int32_t)(bits(sum.v[l]) + bits(s));
    }
    return r;
}
