/* The three ways to sum products, each as one small type. Included inside an anonymous namespace.
 *
 * A step is one vector of weights (a 32-bit word for each row) times one word of a token: four slots, two or one. A
 * group's steps are summed in one chain from first to last, whoever sums them, so that a row's result is the same in
 * every batch; then the group is folded into the row's total. */

struct Levels {
    float values[BW_LEVELS];
#if defined(BW_PAIRS)
    uint16_t pairs[32];
#endif
    float center;
};

/* What a group needs of its 64 rows. */
struct Parameters {
    float scale[BW_PANEL];
    float offset[BW_PANEL]; /* float routes: zero - center; integer route: remainder */
    int32_t zero[BW_PANEL];
    bool has_zero, has_remainder;
};

INLINE F load_number(const void* p, int64_t index, int32_t dtype) {
    if (dtype == BW_FLOAT32) return load_f((const float*)p + index);
    const uint16_t* halves = (const uint16_t*)p + index;
    return dtype == BW_FLOAT16 ? load_float16(halves) : bits_to_f(shift_left<16>(load_halves(halves)));
}

inline Parameters load_parameters(const bw_weight& w, int64_t panel, int64_t group, int64_t groups, bool is_integer) {
    Parameters p;
    p.has_zero = w.zero != nullptr;
    p.has_remainder = w.remainder != nullptr;
    for (int lane = 0; lane < BW_PANEL; lane += BW_LANES) {
        int64_t at = (panel * groups + group) * BW_PANEL + lane;
        store_f(p.scale + lane, load_number(w.scale, at, w.scale_dtype));
        if (!p.has_zero) continue;
        I zero = load_bytes(w.zero + at);
        store_i(p.zero + lane, zero);
        F remainder = p.has_remainder ? load_f(w.remainder + at) : set_f(0.0f);
        F offset = add_f(sub_f(to_f(zero), set_f((float)w.center)), remainder);
        store_f(p.offset + lane, is_integer ? remainder : offset);
    }
    return p;
}

/* Of them, what 16 rows need. */
struct LaneParameters {
    F scale, offset;
    I zero;

    INLINE LaneParameters(const Parameters& p, int lane)
        : scale(load_f(p.scale + lane)), offset(load_f(p.offset + lane)), zero(load_i(p.zero + lane)) {}
    INLINE LaneParameters(F a, F b, I c) : scale(a), offset(b), zero(c) {}
};

/* Those of 16 rows straight from the weight, whose first number is `at`; `is_integer` as in load_parameters. */
template <bool HAS_ZERO, bool HAS_REMAINDER>
INLINE LaneParameters load_lane(const bw_weight& w, int64_t at, bool is_integer) {
    F scale = load_number(w.scale, at, w.scale_dtype), offset = set_f(0.0f);
    I zero = set_i(0);
    if constexpr (HAS_ZERO) zero = load_bytes(w.zero + at);
    if constexpr (HAS_REMAINDER) offset = load_f(w.remainder + at);
    if (HAS_ZERO && !is_integer) offset = add_f(sub_f(to_f(zero), set_f((float)w.center)), offset);
    return {scale, offset, zero};
}

struct Integer {
    using Sum = I;
    static constexpr int STEPS = 1; /* a quad */
    static constexpr int64_t CHUNK = 512, SMALL = 256; /* slots whose weights are spread out at once */

    template <int BITS> struct Weights {
        I word[1];
        template <int Q> INLINE Weights(const Block<BITS>& b, const Levels&, Number<Q>)
            : word{b.template quad<Q, true>()} {}
    };
    /* What every sum of a token begins with: where no zero points are stored, they are taken off at once, by prepare_token. */
    static INLINE I start(bool has_zero, const void* sums) { return set_i(has_zero ? 0 : *(const int32_t*)sums); }
    static INLINE I load(const uint32_t* p) { return load_i(p); }
    static INLINE void store(uint32_t* p, I v) { store_i(p, v); }
    template <bool IS_WIDE> static INLINE I dot(I sum, I w, uint32_t x) {
        return dot_bytes<IS_WIDE>(sum, w, (int32_t)x);
    }
    /* A token's total and a group's sum to the new total; HAS_SCALES: the token has a scale for the group. Every step rounds by itself, as the reference does: the
     * results are equal bit for bit. */
    template <bool HAS_ZERO, bool HAS_REMAINDER, bool HAS_SCALES>
    static INLINE F fold(F total, I sum, const LaneParameters& p, const void* sums, const float* scales) {
        [[maybe_unused]] int32_t codes = *(const int32_t*)sums;
        if constexpr (HAS_ZERO) sum = sub_i(sum, mul_i(p.zero, set_i(codes)));
        F value = to_f(sum);
        if constexpr (HAS_REMAINDER) value = sub_f(value, mul_f(set_f((float)codes), p.offset));
        value = mul_f(value, p.scale);
        if constexpr (HAS_SCALES) value = mul_f(value, set_f(*scales));
        return add_f(total, value);
    }
};

struct Float32 {
    using Sum = F;
    static constexpr int STEPS = 4;
    static constexpr int64_t CHUNK = 64, SMALL = 64;

    template <int BITS> struct Weights {
        I word[4];
        template <int Q> INLINE Weights(const Block<BITS>& b, const Levels& levels, Number<Q>) {
            if constexpr (BITS == 32) {
                UNROLL
                for (int i = 0; i < 4; i++) word[i] = load_i(b.vectors + 64 * (4 * Q + i));
                return;
            } else if constexpr (BITS == 16) {
                I high = set_i((int32_t)0xffff0000);
                word[0] = shift_left<16>(b.vectors[2 * Q]);
                word[1] = shift_left<16>(b.vectors[2 * Q + 1]);
                word[2] = and_i(b.vectors[2 * Q], high);
                word[3] = and_i(b.vectors[2 * Q + 1], high);
                return;
            } else spread(b.template quad<Q, (BITS > 4)>(), levels);
        }
        INLINE void spread(I quad, const Levels& levels) {
            word[0] = value(quad, levels);
            word[1] = value(shift_right<8>(quad), levels);
            word[2] = value(shift_right<16>(quad), levels);
            word[3] = value(shift_right<24>(quad), levels);
        }
        static INLINE I value(I code, const Levels& levels) {
            if constexpr (BITS <= 4) return bits_to_i(look_up(load_table(levels.values), code));
            return bits_to_i(sub_f(to_f(and_i(code, set_i(255))), set_f(levels.center)));
        }
    };
    static INLINE F start(bool, const void*) { return set_f(0.0f); }
    static INLINE F load(const uint32_t* p) { return load_f((const float*)p); }
    static INLINE void store(uint32_t* p, F v) { store_f((float*)p, v); }
    template <bool IS_WIDE> static INLINE F dot(F sum, I w, uint32_t x) {
        return multiply_add(bits_to_f(w), bits_to_f(set_i((int32_t)x)), sum);
    }
    template <bool HAS_ZERO, bool HAS_REMAINDER, bool HAS_SCALES>
    static INLINE F fold(F total, F sum, const LaneParameters& p, const void* sums, const float*) {
        if constexpr (HAS_ZERO) sum = sub_f(sum, mul_f(p.offset, set_f(*(const float*)sums)));
        return multiply_add(sum, p.scale, total);
    }
};

#if defined(BW_PAIRS)
/* Pairs of whole numbers of at most 8 bits, which bfloat16 holds exactly: slots 0 and 2 of a quad, then 1 and 3. */
struct Bfloat16 : Float32 {
    static constexpr int STEPS = 2;
    static constexpr int64_t CHUNK = 128, SMALL = 128;

    template <int BITS> struct Weights {
        I word[2];
        template <int Q> INLINE Weights(const Block<BITS>& b, const Levels& levels, Number<Q>) {
            if constexpr (BITS == 16) {
                word[0] = b.vectors[2 * Q];
                word[1] = b.vectors[2 * Q + 1];
                return;
            } else spread(b.template quad<Q, (BITS > 5)>(), levels);
        }
        INLINE void spread(I quad, const Levels& levels) {
            if constexpr (BITS <= 5) {
                PairTable table = load_pair_table(levels.pairs);
                word[0] = look_up_pairs(table, quad);
                word[1] = look_up_pairs(table, shift_pairs<8>(quad));
            } else {
                word[0] = pair(quad, levels);
                word[1] = pair(shift_right<8>(quad), levels);
            }
        }
        static INLINE I pair(I codes, const Levels& levels) {
            I low = bits_to_i(sub_f(to_f(and_i(codes, set_i(255))), set_f(levels.center)));
            I high = bits_to_i(sub_f(to_f(and_i(shift_right<16>(codes), set_i(255))), set_f(levels.center)));
            return or_i(shift_right<16>(low), high); /* the low halves of both are zero */
        }
    };
    template <bool IS_WIDE> static INLINE F dot(F sum, I w, uint32_t x) { return dot_pairs(sum, w, (int32_t)x); }
};
#endif

inline Levels make_levels(const bw_weight& w) {
    Levels levels;
    levels.center = (float)w.center;
    int count = w.bits <= 4 ? 1 << w.bits : BW_LEVELS; /* of more bits, and of floats, there are none */
    for (int i = 0; i < BW_LEVELS; i++)
        levels.values[i] = w.levels ? w.levels[i % count] : (float)(i % count) - levels.center;
#if defined(BW_PAIRS)
    for (int i = 0; i < 32; i++) {
        float value = (float)(w.bits <= 5 ? i % (1 << w.bits) : i) - levels.center;
        uint32_t word;
        memcpy(&word, &value, 4);
        levels.pairs[i] = (uint16_t)(word >> 16);
    }
#endif
    return levels;
}
