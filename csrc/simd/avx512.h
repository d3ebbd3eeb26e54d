/* Sixteen lanes of 32 bits in one AVX-512 register. BW_VNNI and BW_PAIRS say which further instructions there are.
 * Included inside an anonymous namespace. */

using I = __m512i;
using F = __m512;
struct Table { F values; };

INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store_i(void* p, I v) { _mm512_storeu_si512(p, v); }
INLINE I set_i(int32_t v) { return _mm512_set1_epi32(v); }
INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
INLINE I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
INLINE I min_i(I a, I b) { return _mm512_min_epi32(a, b); }
INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
template <int N> INLINE I shift_right(I v) { return _mm512_srli_epi32(v, N); }
template <int N> INLINE I shift_left(I v) { return _mm512_slli_epi32(v, N); }

INLINE F load_f(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store_f(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE F set_f(float v) { return _mm512_set1_ps(v); }
INLINE F add_f(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub_f(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul_f(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div_f(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F min_f(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F max_f(F a, F b) { return _mm512_max_ps(a, b); }
INLINE F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F bits_to_f(I v) { return _mm512_castsi512_ps(v); }
INLINE I bits_to_i(F v) { return _mm512_castps_si512(v); }
INLINE F to_f(I v) { return _mm512_cvtepi32_ps(v); }
INLINE I round_to_i(F v) { return _mm512_cvtps_epi32(v); }

INLINE I load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE void store_bytes(void* p, I v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
INLINE I load_halves(const void* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_halves(void* p, I v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }
INLINE F load_float16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void store_float16(void* p, F v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, 0)); }

/* Lane i: the sum of vector i's lanes, all summed in one order. */
INLINE F sum_across(const F (&v)[16]) {
    F pairs[8], fours[4];
    for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    /* Quarter q of fours[i]: what the quarters q of vectors 4 i to 4 i + 3 sum to. */
    F a = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88), _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
    F b = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2], fours[3], 0x88), _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

INLINE __m256 upper_half(F v) { return _mm512_castps512_ps256(_mm512_shuffle_f32x4(v, v, 0x4e)); }
/* The sum of all lanes, halves to halves, and the largest. */
INLINE float lane_sum(F v) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), upper_half(v));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE float lane_most(F v) {
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(v), upper_half(v));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE I load_two(const void* low, const void* high) { /* 32 bytes each */
    I v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)low));
    return _mm512_mask_broadcast_i64x4(v, 0xf0, _mm256_loadu_si256((const __m256i*)high));
}
/* Lane j of vector i to lane i of vector j. */
INLINE void transpose(I (&v)[16]) {
    I a[16], b[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    UNROLL
    for (int i = 0; i < 4; i++) { /* quarter q of b[4 k + i]: lanes 4 q + i of vectors 4 k to 4 k + 3 */
        I even[2] = {_mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88)};
        I odd[2] = {_mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd), _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd)};
        v[i] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        v[4 + i] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        v[8 + i] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        v[12 + i] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
}
/* Sums of the products of signed 16-bit halves. */
INLINE I dot_halves(I sum, I x, I y) {
#if defined(BW_VNNI)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y)); /* of the intrinsic GCC makes a copy of every sum */
    return sum;
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x, y));
#endif
}
/* 32 bytes each: of every byte a word with that of x in its low half; byte i is word paired_place(i) of both vectors. */
INLINE void pair_bytes(const uint8_t* x, const uint8_t* y, I& first, I& second) {
    I a = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)x));
    I b = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)y));
    first = _mm512_unpacklo_epi16(a, b);
    second = _mm512_unpackhi_epi16(a, b);
}
INLINE int paired_place(int byte) { return byte % 8 / 4 * 16 + byte / 8 * 4 + byte % 4; }

INLINE Table load_table(const float* levels) { return {_mm512_loadu_ps(levels)}; }
INLINE F look_up(Table t, I index) { return _mm512_permutexvar_ps(index, t.values); }

/* Sums of four products, u unsigned and x signed bytes, x the same in every lane. IS_WIDE: u may exceed 127. */
template <bool IS_WIDE> INLINE I dot_bytes(I sum, I u, int32_t x) {
    I xs = _mm512_set1_epi32(x);
#if defined(BW_VNNI)
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(xs)); /* as in dot_halves */
    return sum;
#else
    if constexpr (!IS_WIDE)
        return add_i(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(u, xs), _mm512_set1_epi16(1)));
    I even = _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)),
                               _mm512_srai_epi16(_mm512_slli_epi16(xs, 8), 8));
    I odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(xs, 8));
    return add_i(sum, add_i(even, odd));
#endif
}

#if defined(BW_PAIRS)
struct PairTable { I values; };
INLINE PairTable load_pair_table(const uint16_t* levels) { return {_mm512_loadu_si512(levels)}; }
/* In every 16-bit half: the level of its low five bits. */
INLINE I look_up_pairs(PairTable t, I index) { return _mm512_permutexvar_epi16(index, t.values); }
template <int N> INLINE I shift_pairs(I v) { return _mm512_srli_epi16(v, N); }
INLINE F dot_pairs(F sum, I w, int32_t x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
}
#endif
