/* Codes of 2 to 8 bits, as they lie in memory, to bytes; and floats of 16 and 32. Included inside an anonymous namespace.
 *
 * A block is 32 slots of 16 rows: `BITS` vectors of 64 bytes. A lane of 32 bits belongs to one row; a "quad" is four
 * slots, one a byte. Eight-bit codes are eight quads. Others are planes of 4, 2 and 1 bits, widest first, as the width
 * is their sum: a plane of 4 bits holds two quads a vector (low halves of the bytes first), one of 2 bits four, one of
 * 1 bit eight. */

template <int BITS> struct Codes {
    I vectors[BITS];

    INLINE explicit Codes(const uint8_t* p) {
        UNROLL
        for (int i = 0; i < BITS; i++) vectors[i] = load_i(p + 64 * i);
    }

    /* Quad Q. Unless IS_CLEAN, other codes may stand above each: tables that repeat do not see them. */
    template <int Q, bool IS_CLEAN> INLINE I quad() const {
        if constexpr (BITS == 8) return vectors[Q];
        else if constexpr (BITS == 4 || BITS == 2) return plane<BITS, Q, IS_CLEAN>(vectors);
        else {
            constexpr int wide = BITS & 4 ? 4 : 2, rest = BITS - wide;
            I high = plane<wide, Q, true>(vectors);
            if constexpr (rest == 3)
                return or_i(or_i(shift_left<3>(high), shift_left<1>(plane<2, Q, true>(vectors + 4))),
                            plane<1, Q, true>(vectors + 6));
            else return or_i(shift_left<rest>(high), plane<rest, Q, true>(vectors + wide));
        }
    }

  private:
    template <int WIDTH, int Q, bool IS_CLEAN> static INLINE I plane(const I* v) {
        constexpr int per_vector = 8 / WIDTH, shift = Q % per_vector * WIDTH;
        I found = v[Q / per_vector];
        if constexpr (shift > 0) found = shift_right<shift>(found);
        if constexpr (IS_CLEAN) found = and_i(found, set_i(((1 << WIDTH) - 1) * 0x01010101));
        return found;
    }
};

/* Floats: 16 vectors of bfloat16 pairs (slots 0 and 2 of each quad, then 1 and 3), or 32 vectors of float32. */
struct Pairs {
    I vectors[16];

    INLINE explicit Pairs(const uint8_t* p) {
        UNROLL
        for (int i = 0; i < 16; i++) vectors[i] = load_i(p + 64 * i);
    }
};

struct Singles {
    const uint8_t* vectors; /* too many for registers */

    INLINE explicit Singles(const uint8_t* p) : vectors(p) {}
};

/* A number that is a type: unlike std::integral_constant, it leaves no function that two files would share. */
template <int N> struct Number {
    INLINE constexpr operator int() const { return N; }
};

template <int BITS> struct BlockOf { using Type = Codes<BITS>; };
template <> struct BlockOf<16> { using Type = Pairs; };
template <> struct BlockOf<32> { using Type = Singles; };
template <int BITS> using Block = typename BlockOf<BITS>::Type;

/* Calls f with 0, 1, ... N - 1 as constants. */
template <int N, class Function> INLINE void for_each(Function f) {
    [&]<int... i>(std::integer_sequence<int, i...>) INLINE_LAMBDA {
        (f(Number<i>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}
