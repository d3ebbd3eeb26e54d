/* Sixteen lanes of 32 bits in two AVX2 registers (with FMA and F16C). Included inside an anonymous namespace. */

struct I { __m256i a, b; };
struct F { __m256 a, b; };
struct Table { __m256 low, high; };

#define BOTH(type, f, ...) type{f(x.a __VA_OPT__(,) __VA_ARGS__), f(x.b __VA_OPT__(,) __VA_ARGS__)}
#define PAIR(type, f) type{f(x.a, y.a), f(x.b, y.b)}

INLINE I load_i(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE void store_i(void* p, I v) {
    _mm256_storeu_si256((__m256i*)p, v.a);
    _mm256_storeu_si256((__m256i*)p + 1, v.b);
}
INLINE I set_i(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
INLINE I and_i(I x, I y) { return PAIR(I, _mm256_and_si256); }
INLINE I or_i(I x, I y) { return PAIR(I, _mm256_or_si256); }
INLINE I add_i(I x, I y) { return PAIR(I, _mm256_add_epi32); }
INLINE I sub_i(I x, I y) { return PAIR(I, _mm256_sub_epi32); }
INLINE I mul_i(I x, I y) { return PAIR(I, _mm256_mullo_epi32); }
INLINE I min_i(I x, I y) { return PAIR(I, _mm256_min_epi32); }
INLINE I max_i(I x, I y) { return PAIR(I, _mm256_max_epi32); }
template <int N> INLINE I shift_right(I x) { return BOTH(I, _mm256_srli_epi32, N); }
template <int N> INLINE I shift_left(I x) { return BOTH(I, _mm256_slli_epi32, N); }

INLINE F load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store_f(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
INLINE F set_f(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
INLINE F add_f(F x, F y) { return PAIR(F, _mm256_add_ps); }
INLINE F sub_f(F x, F y) { return PAIR(F, _mm256_sub_ps); }
INLINE F mul_f(F x, F y) { return PAIR(F, _mm256_mul_ps); }
INLINE F div_f(F x, F y) { return PAIR(F, _mm256_div_ps); }
INLINE F min_f(F x, F y) { return PAIR(F, _mm256_min_ps); }
INLINE F max_f(F x, F y) { return PAIR(F, _mm256_max_ps); }
INLINE F multiply_add(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE F bits_to_f(I x) { return BOTH(F, _mm256_castsi256_ps); }
INLINE I bits_to_i(F x) { return BOTH(I, _mm256_castps_si256); }
INLINE F to_f(I x) { return BOTH(F, _mm256_cvtepi32_ps); }
INLINE I round_to_i(F x) { return BOTH(I, _mm256_cvtps_epi32); }

INLINE I load_bytes(const uint8_t* p) {
    __m128i v = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
}
INLINE __m256i halves(I v) { /* the low 16 bits of each lane, in order */
    __m256i mask = _mm256_set1_epi32(0xffff);
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask));
    return _mm256_permute4x64_epi64(packed, 0xd8);
}
INLINE void store_bytes(void* p, I v) {
    __m256i h = _mm256_and_si256(halves(v), _mm256_set1_epi16(255));
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
INLINE I load_halves(const void* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
}
INLINE void store_halves(void* p, I v) { _mm256_storeu_si256((__m256i*)p, halves(v)); }
INLINE F load_float16(const void* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
INLINE void store_float16(void* p, F v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.a, 0));
    _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(v.b, 0));
}

INLINE __m256 sum_eight_across(const __m256 (&v)[8]) {
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
/* Lane i: the sum of vector i's lanes, all summed in one order. */
INLINE F sum_across(const F (&v)[16]) {
    __m256 sums[16];
    for (int i = 0; i < 16; i++) sums[i] = _mm256_add_ps(v[i].a, v[i].b);
    const __m256 low[8] = {sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7]};
    const __m256 high[8] = {sums[8], sums[9], sums[10], sums[11], sums[12], sums[13], sums[14], sums[15]};
    return {sum_eight_across(low), sum_eight_across(high)};
}

/* The sum of all lanes, halves to halves, and the largest. */
INLINE float lane_sum(F v) {
    __m256 eight = _mm256_add_ps(v.a, v.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE float lane_most(F v) {
    __m256 eight = _mm256_max_ps(v.a, v.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE I load_two(const void* low, const void* high) { /* 32 bytes each */
    return {_mm256_loadu_si256((const __m256i*)low), _mm256_loadu_si256((const __m256i*)high)};
}
INLINE void transpose_eight(__m256i (&v)[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
        v[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
}
/* Lane j of vector i to lane i of vector j. */
INLINE void transpose(I (&v)[16]) {
    __m256i quarters[4][8]; /* vectors 0 to 7 and 8 to 15, lower lanes; the same, upper lanes */
    for (int i = 0; i < 8; i++) {
        quarters[0][i] = v[i].a;
        quarters[1][i] = v[8 + i].a;
        quarters[2][i] = v[i].b;
        quarters[3][i] = v[8 + i].b;
    }
    for (auto& quarter : quarters) transpose_eight(quarter);
    for (int i = 0; i < 8; i++) {
        v[i] = {quarters[0][i], quarters[1][i]};
        v[8 + i] = {quarters[2][i], quarters[3][i]};
    }
}
/* Sums of the products of signed 16-bit halves. */
INLINE I dot_halves(I sum, I x, I y) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x.b, y.b))};
}
/* 32 bytes each: of every byte a word with that of x in its low half; byte i is word paired_place(i) of both vectors. */
INLINE void pair_bytes(const uint8_t* x, const uint8_t* y, I& first, I& second) {
    first = or_i(load_bytes(x), shift_left<16>(load_bytes(y)));
    second = or_i(load_bytes(x + 16), shift_left<16>(load_bytes(y + 16)));
}
INLINE int paired_place(int byte) { return byte; }

INLINE Table load_table(const float* levels) { return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)}; }
INLINE __m256 look_up_half(Table t, __m256i index) { /* bit 3 of the index, moved to the sign, chooses the half */
    __m256 low = _mm256_permutevar8x32_ps(t.low, index), high = _mm256_permutevar8x32_ps(t.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INLINE F look_up(Table t, I index) { return {look_up_half(t, index.a), look_up_half(t, index.b)}; }

template <bool IS_WIDE> INLINE __m256i dot_half(__m256i sum, __m256i u, __m256i x) {
    if constexpr (!IS_WIDE)
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, x), _mm256_set1_epi16(1)));
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                     _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
template <bool IS_WIDE> INLINE I dot_bytes(I sum, I u, int32_t x) {
    __m256i xs = _mm256_set1_epi32(x);
    return {dot_half<IS_WIDE>(sum.a, u.a, xs), dot_half<IS_WIDE>(sum.b, u.b, xs)};
}
