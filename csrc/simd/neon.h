/* Sixteen lanes of 32 bits in four NEON registers. BW_DOTPROD says that there are dot products of bytes. Included inside
 * an anonymous namespace. */

struct I { int32x4_t v[4]; };
struct F { float32x4_t v[4]; };
struct Table { uint8x16x4_t bytes; };

#define QUARTERS(type, ...)                                  \
    type r;                                                  \
    UNROLL                                                   \
    for (int q = 0; q < 4; q++) r.v[q] = __VA_ARGS__;        \
    return r

INLINE I load_i(const void* p) { QUARTERS(I, vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + 16 * q))); }
INLINE void store_i(void* p, I a) {
    UNROLL
    for (int q = 0; q < 4; q++) vst1q_u8((uint8_t*)p + 16 * q, vreinterpretq_u8_s32(a.v[q]));
}
INLINE I set_i(int32_t a) { QUARTERS(I, vdupq_n_s32(a)); }
INLINE I and_i(I a, I b) { QUARTERS(I, vandq_s32(a.v[q], b.v[q])); }
INLINE I or_i(I a, I b) { QUARTERS(I, vorrq_s32(a.v[q], b.v[q])); }
INLINE I add_i(I a, I b) { QUARTERS(I, vaddq_s32(a.v[q], b.v[q])); }
INLINE I sub_i(I a, I b) { QUARTERS(I, vsubq_s32(a.v[q], b.v[q])); }
INLINE I mul_i(I a, I b) { QUARTERS(I, vmulq_s32(a.v[q], b.v[q])); }
INLINE I min_i(I a, I b) { QUARTERS(I, vminq_s32(a.v[q], b.v[q])); }
INLINE I max_i(I a, I b) { QUARTERS(I, vmaxq_s32(a.v[q], b.v[q])); }
template <int N> INLINE I shift_right(I a) {
    if constexpr (N == 0) return a;
    else { QUARTERS(I, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[q]), N))); }
}
template <int N> INLINE I shift_left(I a) { QUARTERS(I, vshlq_n_s32(a.v[q], N)); }

INLINE F load_f(const float* p) { QUARTERS(F, vld1q_f32(p + 4 * q)); }
INLINE void store_f(float* p, F a) {
    UNROLL
    for (int q = 0; q < 4; q++) vst1q_f32(p + 4 * q, a.v[q]);
}
INLINE F set_f(float a) { QUARTERS(F, vdupq_n_f32(a)); }
INLINE F add_f(F a, F b) { QUARTERS(F, vaddq_f32(a.v[q], b.v[q])); }
INLINE F sub_f(F a, F b) { QUARTERS(F, vsubq_f32(a.v[q], b.v[q])); }
INLINE F mul_f(F a, F b) { QUARTERS(F, vmulq_f32(a.v[q], b.v[q])); }
INLINE F div_f(F a, F b) { QUARTERS(F, vdivq_f32(a.v[q], b.v[q])); }
/* As elsewhere, b if one is not a number: vminq would keep what is not. */
INLINE F min_f(F a, F b) { QUARTERS(F, vbslq_f32(vcltq_f32(a.v[q], b.v[q]), a.v[q], b.v[q])); }
INLINE F max_f(F a, F b) { QUARTERS(F, vbslq_f32(vcgtq_f32(a.v[q], b.v[q]), a.v[q], b.v[q])); }
INLINE F multiply_add(F a, F b, F c) { QUARTERS(F, vfmaq_f32(c.v[q], a.v[q], b.v[q])); }
INLINE F bits_to_f(I a) { QUARTERS(F, vreinterpretq_f32_s32(a.v[q])); }
INLINE I bits_to_i(F a) { QUARTERS(I, vreinterpretq_s32_f32(a.v[q])); }
INLINE F to_f(I a) { QUARTERS(F, vcvtq_f32_s32(a.v[q])); }
INLINE I round_to_i(F a) { QUARTERS(I, vcvtnq_s32_f32(a.v[q])); }

INLINE I load_halves(const void* p) {
    QUARTERS(I, vreinterpretq_s32_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t*)p + 8 * q)))));
}
INLINE uint16x4_t low_halves(int32x4_t a) { return vmovn_u32(vreinterpretq_u32_s32(a)); }
INLINE void store_halves(void* p, I a) {
    UNROLL
    for (int q = 0; q < 4; q++) vst1_u8((uint8_t*)p + 8 * q, vreinterpret_u8_u16(low_halves(a.v[q])));
}
INLINE I load_bytes(const uint8_t* p) {
    uint8x16_t bytes = vld1q_u8(p);
    uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)};
    QUARTERS(I, vreinterpretq_s32_u32(q % 2 ? vmovl_high_u16(halves[q / 2]) : vmovl_u16(vget_low_u16(halves[q / 2]))));
}
INLINE void store_bytes(void* p, I a) {
    uint16x8_t low = vcombine_u16(low_halves(a.v[0]), low_halves(a.v[1]));
    uint16x8_t high = vcombine_u16(low_halves(a.v[2]), low_halves(a.v[3]));
    vst1q_u8((uint8_t*)p, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
}
INLINE F load_float16(const void* p) {
    QUARTERS(F, vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t*)p + 8 * q))));
}
INLINE void store_float16(void* p, F a) {
    UNROLL
    for (int q = 0; q < 4; q++) vst1_u8((uint8_t*)p + 8 * q, vreinterpret_u8_f16(vcvt_f16_f32(a.v[q])));
}

/* Lane i: the sum of vector i's lanes, all summed in one order. */
INLINE F sum_across(const F (&a)[16]) {
    float32x4_t sums[16];
    UNROLL
    for (int i = 0; i < 16; i++) sums[i] = vaddq_f32(vaddq_f32(a[i].v[0], a[i].v[1]), vaddq_f32(a[i].v[2], a[i].v[3]));
    QUARTERS(F, vpaddq_f32(vpaddq_f32(sums[4 * q], sums[4 * q + 1]), vpaddq_f32(sums[4 * q + 2], sums[4 * q + 3])));
}
/* The sum of all lanes, halves to halves, and the largest. */
INLINE float lane_sum(F a) {
    float32x4_t four = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float lane_most(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
INLINE I load_two(const void* low, const void* high) { /* 32 bytes each */
    QUARTERS(I, vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)(q < 2 ? low : high) + 16 * (q % 2))));
}
/* Lane j of vector i to lane i of vector j. */
INLINE void transpose(I (&v)[16]) {
    I found[16];
    UNROLL
    for (int i = 0; i < 16; i++) { /* rows 4 (i / 4) on, lanes 4 (i % 4) on */
        int row = i / 4, lane = i % 4;
        int32x4_t a = v[4 * row].v[lane], b = v[4 * row + 1].v[lane], c = v[4 * row + 2].v[lane], d = v[4 * row + 3].v[lane];
        int64x2_t ab[2] = {vreinterpretq_s64_s32(vtrn1q_s32(a, b)), vreinterpretq_s64_s32(vtrn2q_s32(a, b))};
        int64x2_t cd[2] = {vreinterpretq_s64_s32(vtrn1q_s32(c, d)), vreinterpretq_s64_s32(vtrn2q_s32(c, d))};
        UNROLL
        for (int j = 0; j < 2; j++) {
            found[4 * lane + j].v[row] = vreinterpretq_s32_s64(vtrn1q_s64(ab[j], cd[j]));
            found[4 * lane + 2 + j].v[row] = vreinterpretq_s32_s64(vtrn2q_s64(ab[j], cd[j]));
        }
    }
    UNROLL
    for (int i = 0; i < 16; i++) v[i] = found[i];
}
INLINE int32x4_t paired_sums(int16x8_t x, int16x8_t y) {
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
/* Sums of the products of signed 16-bit halves. */
INLINE I dot_halves(I sum, I x, I y) {
    QUARTERS(I, vaddq_s32(sum.v[q], paired_sums(vreinterpretq_s16_s32(x.v[q]), vreinterpretq_s16_s32(y.v[q]))));
}
/* 32 bytes each: of every byte a word with that of x in its low half; byte i is word paired_place(i) of both vectors. */
INLINE void pair_bytes(const uint8_t* x, const uint8_t* y, I& first, I& second) {
    first = or_i(load_bytes(x), shift_left<16>(load_bytes(y)));
    second = or_i(load_bytes(x + 16), shift_left<16>(load_bytes(y + 16)));
}
INLINE int paired_place(int byte) { return byte; }

INLINE Table load_table(const float* levels) {
    const uint8_t* p = (const uint8_t*)levels;
    return {{{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}};
}
INLINE F look_up(Table t, I index) { /* of each of a number's four bytes the place in the table */
    I places = add_i(mul_i(and_i(index, set_i(15)), set_i(0x04040404)), set_i(0x03020100));
    QUARTERS(F, vreinterpretq_f32_u8(vqtbl4q_u8(t.bytes, vreinterpretq_u8_s32(places.v[q]))));
}

/* Sums of four products of signed bytes. */
INLINE int32x4_t dot_signed(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(BW_DOTPROD)
    return vdotq_s32(sum, a, b);
#else
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b))), high = vpaddlq_s16(vmull_high_s8(a, b));
    return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
}
/* Sums of four products, u unsigned and x signed bytes, x the same in every lane. IS_WIDE: u may exceed 127; then
 * u = (u - 128) + 64 + 64, of which each is a signed byte. */
template <bool IS_WIDE> INLINE I dot_bytes(I sum, I u, int32_t x) {
    int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
    if constexpr (!IS_WIDE) { QUARTERS(I, dot_signed(sum.v[q], vreinterpretq_s8_s32(u.v[q]), xs)); }
    int32x4_t half = dot_signed(vdupq_n_s32(0), vdupq_n_s8(64), xs), rest = vaddq_s32(half, half);
    int8x16_t top = vdupq_n_s8(-128);
    QUARTERS(I, dot_signed(vaddq_s32(sum.v[q], rest), veorq_s8(vreinterpretq_s8_s32(u.v[q]), top), xs));
}
