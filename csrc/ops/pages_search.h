/* The best of many grids for one token's head of rotated 4-bit codes, or of a few 8-bit ones; the arithmetic of
 * bitwright.core.kv_search, bit for bit. Included inside an anonymous namespace.
 *
 * Numbers are measured in whole units of their range, which float32 sums exactly in any order. Of each grid's codes the
 * straight line through them that fits best explains S_cu^2 / S_cc of the numbers' squares; the first grid that explains
 * most is kept, and its line is the scale and the least number. */

constexpr int64_t MOST_SEARCHED = 256;  /* numbers of a head of 4-bit codes: sums of codes times units stay below 2^24 */
constexpr int64_t MOST_SEARCHED_8 = 8;  /* and of 8-bit codes */
constexpr float RANGE_UNITS = 4095.0f;  /* 15 steps divide it */

/* Codes are round((unit - offset) * factor): of the plain grid, then of `RATIOS` narrower and wider ones, shifted. */
template <int LEVELS, int RATIOS> struct Grids {
    static constexpr int COUNT = 4 * RATIOS + 1;
    float offset[COUNT], factor[COUNT];

    constexpr Grids(double narrowest, double further) : offset(), factor() {
        constexpr double units = 4095, step = units / LEVELS;
        factor[0] = (float)(LEVELS / units);
        for (int i = 1; i < COUNT; i++) {
            double ratio = narrowest + further * ((i - 1) / 4), shift = ((i - 1) % 4 + 0.5) / 4 - 0.5;
            offset[i] = (float)(units * (1 - ratio) / 2 + shift * (step * ratio));
            factor[i] = (float)(1 / (step * ratio));
        }
    }
};

constexpr Grids<15, 8> GRIDS_4(0.75, 0.05);
constexpr Grids<255, 64> GRIDS_8(1.0, 1.0 / 128);

/* Sums over a head: of codes and units, n sum(cc) - sum(c)^2 and n sum(cu) - sum(c) sum(u). */
struct GridFit {
    int64_t codes, units, squares, products;
};

/* Codes, as floats, of units [stride] on a grid; zero where `kept` is. */
INLINE GridFit fit_grid(const float* units, const float* kept, int64_t count, int64_t stride, float offset, float factor,
                        int32_t levels, float* codes) {
    F c_sum = set_f(0.0f), cc_sum = c_sum, cu_sum = c_sum, u_sum = c_sum;
    for (int64_t d = 0; d < stride; d += BW_LANES) {
        F u = load_f(units + d);
        I code = round_to_i(mul_f(sub_f(u, set_f(offset)), set_f(factor)));
        F c = mul_f(to_f(max_i(min_i(code, set_i(levels)), set_i(0))), load_f(kept + d));
        store_f(codes + d, c);
        c_sum = add_f(c_sum, c);
        cc_sum = multiply_add(c, c, cc_sum);
        cu_sum = multiply_add(c, u, cu_sum);
        u_sum = add_f(u_sum, u);
    }
    int64_t c = (int64_t)lane_sum(c_sum), u = (int64_t)lane_sum(u_sum);
    return {c, u, count * (int64_t)lane_sum(cc_sum) - c * c, count * (int64_t)lane_sum(cu_sum) - c * u};
}

/* A head whose least number and range are known to codes [dimension], one a byte; false: the range is not for this. */
template <int LEVELS, int RATIOS>
bool search_head(const Grids<LEVELS, RATIOS>& grids, const float* x, int64_t dimension, float least, float range,
                 uint8_t* codes, float* scale_and_least) {
    if (dimension > MOST_SEARCHED || !(range >= 0x1p-100f && range <= 0x1p100f)) return false;
    alignas(64) float units[MOST_SEARCHED], kept[MOST_SEARCHED], tried[2][MOST_SEARCHED];
    int64_t stride = (dimension + BW_LANES - 1) / BW_LANES * BW_LANES;
    float inverse = 1.0f / range * RANGE_UNITS; /* as torch divides a number by a tensor */
    for (int64_t d = 0; d < stride; d += BW_LANES) {
        for (int64_t i = d; i < d + BW_LANES; i++) {
            kept[i] = i < dimension ? 1.0f : 0.0f;
            units[i] = i < dimension ? x[i] : least;
        }
        store_f(units + d, to_f(round_to_i(mul_f(sub_f(load_f(units + d), set_f(least)), set_f(inverse)))));
    }
    GridFit best{};
    double most = 0;
    int chosen = 0; /* which of the two rooms holds the best codes */
    for (int i = 0; i < grids.COUNT; i++) {
        float* next = tried[1 - chosen];
        GridFit fit = fit_grid(units, kept, dimension, stride, grids.offset[i], grids.factor[i], LEVELS, next);
        if (fit.squares == 0) continue;
        double share = (double)fit.products * (double)fit.products / (double)fit.squares;
        if (!(share > most)) continue;
        most = share;
        best = fit;
        chosen = 1 - chosen;
    }
    double step = (double)range / 4095.0;
    int64_t shift = best.units * best.squares - best.products * best.codes;
    scale_and_least[0] = (float)((double)best.products / (double)best.squares * step);
    scale_and_least[1] = least + (float)((double)shift / (double)(dimension * best.squares) * step);
    for (int64_t d = 0; d < dimension; d++) codes[d] = (uint8_t)tried[chosen][d];
    return true;
}
