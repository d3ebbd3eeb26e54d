/* How the product of many tokens with a 4-bit weight in groups of 32 came to be as it is, step by step.
 *
 *     gemm_w4a8 [ROWS COLUMNS TOKENS]
 *
 * Each version is checked against sums in float64 and timed on one thread against a loop of VNNI products alone. Times are
 * the processor's, the least of several rounds in which all take turns. Needs AVX-512 VNNI; symmetric, float32 scales. */
#include <immintrin.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../kernels.h"
#include "clock.h"

namespace {

constexpr int GROUP = 32, TILE = 6; /* tokens whose sums fit in registers, times 64 rows */
constexpr int CHUNK = 256;          /* columns of a panel that are spread out at once */
#define UNROLL _Pragma("GCC unroll 32")
#define APART __attribute__((noinline, noclone)) /* in a caller's loop GCC keeps sums on the stack */

struct Problem {
    int64_t rows, columns, tokens, groups;
    std::vector<uint8_t> codes;     // [rows][columns], 0 to 15
    std::vector<float> scale;       // [rows][groups]
    std::vector<int8_t> x;          // [tokens][columns]
    std::vector<float> x_float;     // what bw_linear rounds to x
    std::vector<uint8_t> panels;    // as bw_weight.codes
    std::vector<float> panel_scale; // as bw_weight.scale
    std::vector<uint32_t> words;    // [group][tile of tokens][word of the group][token of the tile]
    std::vector<int32_t> starts;    // [group][token]: -8 times the sum of the token's numbers
    std::vector<float> y;           // [tokens][rows]

    const uint8_t* panel(int64_t number) const { return &panels[static_cast<size_t>(number * columns * 32)]; }
    const float* scales(int64_t number, int64_t group) const {
        return &panel_scale[static_cast<size_t>((number * groups + group) * 64)];
    }
    const uint32_t* tile(int64_t group, int64_t token) const {
        return &words[static_cast<size_t>((group * tokens + token) * GROUP / 4)];
    }
    const int32_t* start(int64_t group, int64_t token) const { return &starts[static_cast<size_t>(group * tokens + token)]; }
};

/* v0: whole sums of a group, scaled and summed in float64: the truth. */
std::vector<double> truth(const Problem& p) {
    std::vector<double> y(static_cast<size_t>(p.tokens * p.rows));
    for (int64_t t = 0; t < p.tokens; t++)
        for (int64_t r = 0; r < p.rows; r++)
            for (int64_t g = 0; g < p.groups; g++) {
                const int8_t* x = &p.x[static_cast<size_t>(t * p.columns + g * GROUP)];
                const uint8_t* codes = &p.codes[static_cast<size_t>(r * p.columns + g * GROUP)];
                int32_t sum = 0;
                for (int c = 0; c < GROUP; c++) sum += (codes[c] - 8) * x[c];
                y[static_cast<size_t>(t * p.rows + r)] += double(p.scale[static_cast<size_t>(r * p.groups + g)]) * sum;
            }
    return y;
}

/* v1: plain C++ over unpacked codes: a token, a row, a group after the other, in float32. */
void plain(Problem& p) {
    for (int64_t t = 0; t < p.tokens; t++)
        for (int64_t r = 0; r < p.rows; r++) {
            const int8_t* x = &p.x[static_cast<size_t>(t * p.columns)];
            const uint8_t* codes = &p.codes[static_cast<size_t>(r * p.columns)];
            float total = 0;
            for (int64_t g = 0; g < p.groups; g++, x += GROUP, codes += GROUP) {
                int32_t sum = 0;
                for (int c = 0; c < GROUP; c++) sum += (codes[c] - 8) * x[c];
                total += static_cast<float>(sum) * p.scale[static_cast<size_t>(r * p.groups + g)];
            }
            p.y[static_cast<size_t>(t * p.rows + r)] = total;
        }
}

/* Sums of a group of 64 rows and some tokens, scaled, to their totals [token][64]. */
template <int TOKENS> inline void fold(__m512i (&sums)[TOKENS][4], const float* scale, float* totals) {
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) {
        __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i / 4][i % 4]), _mm512_loadu_ps(scale + i % 4 * 16));
        _mm512_storeu_ps(totals + i * 16, _mm512_add_ps(_mm512_loadu_ps(totals + i * 16), part));
        __asm__ volatile("" ::: "memory"); /* or all totals are loaded first, and spilled */
    }
}

/* A group of a panel, unpacked on the way, times TOKENS tokens; words of tokens are `width` apart. */
template <int TOKENS>
APART void sum_packed(const uint8_t* codes, const uint32_t* x, int64_t width, const int32_t* starts, const float* scale,
                      float* totals) {
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sums[TOKENS][4];
    UNROLL
    for (int i = 0; i < 4 * TOKENS; i++) sums[i / 4][i % 4] = _mm512_set1_epi32(starts[i / 4]);
    UNROLL
    for (int lane = 0; lane < 4; lane++)
        UNROLL
        for (int q = 0; q < 8; q++) {
            __m512i w = _mm512_loadu_si512(codes + 256 * lane + 64 * (q / 2));
            w = _mm512_and_si512(q % 2 ? _mm512_srli_epi32(w, 4) : w, low);
            UNROLL
            for (int t = 0; t < TOKENS; t++)
                sums[t][lane] = _mm512_dpbusd_epi32(sums[t][lane], w, _mm512_set1_epi32(static_cast<int>(x[q * width + t])));
        }
    fold<TOKENS>(sums, scale, totals);
}

void write_totals(Problem& p, int64_t panel, const std::vector<float>& totals) {
    for (int64_t t = 0; t < p.tokens; t++)
        std::memcpy(&p.y[static_cast<size_t>(t * p.rows + panel * 64)], &totals[static_cast<size_t>(t * 64)], 256);
}

/* Calls body(panel, totals) for every panel, with totals that are zero, and writes them. */
template <class Body> void for_panels(Problem& p, Body body) {
    static std::vector<float> totals;
    for (int64_t panel = 0; panel < p.rows / 64; panel++) {
        totals.assign(static_cast<size_t>(p.tokens * 64), 0.0f);
        body(panel, totals.data());
        write_totals(p, panel, totals);
    }
}

/* v2: panels of rows, as one token is multiplied (gemv_w4a8, v3), one token after the other. */
void token_by_token(Problem& p) {
    for_panels(p, [&](int64_t panel, float* totals) {
        for (int64_t t = 0; t < p.tokens; t++)
            for (int64_t g = 0; g < p.groups; g++)
                sum_packed<1>(p.panel(panel) + g * 1024, p.tile(g, t / TILE * TILE) + t % TILE, TILE, p.start(g, t),
                              p.scales(panel, g), totals + t * 64);
    });
}

/* v3: six tokens at once: a code is unpacked for every six products, and 24 sums hide the products' latency. */
void tiles_of_tokens(Problem& p) {
    for_panels(p, [&](int64_t panel, float* totals) {
        for (int64_t g = 0; g < p.groups; g++)
            for (int64_t t = 0; t < p.tokens; t += TILE)
                sum_packed<TILE>(p.panel(panel) + g * 1024, p.tile(g, t), TILE, p.start(g, t), p.scales(panel, g), totals + t * 64);
    });
}

/* Codes of some groups of a panel to bytes: [word of a column's four][64 rows]. */
void spread(const uint8_t* codes, int64_t groups, uint32_t* out) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < groups; g++)
        for (int lane = 0; lane < 4; lane++, codes += 256) {
            UNROLL
            for (int v = 0; v < 4; v++) {
                __m512i w = _mm512_loadu_si512(codes + 64 * v);
                uint32_t* to = out + (8 * g + 2 * v) * 64 + lane * 16;
                _mm512_storeu_si512(to, _mm512_and_si512(w, low));
                _mm512_storeu_si512(to + 64, _mm512_and_si512(_mm512_srli_epi32(w, 4), low));
            }
        }
}

/* A group of a panel that is spread out, times a tile. */
APART void sum_spread(const uint32_t* weights, const uint32_t* x, const int32_t* starts, const float* scale, float* totals) {
    __m512i sums[TILE][4];
    UNROLL
    for (int i = 0; i < 4 * TILE; i++) sums[i / 4][i % 4] = _mm512_set1_epi32(starts[i / 4]);
    for (int step = 0; step < GROUP / 4; step++, weights += 64, x += TILE) {
        __m512i w[4] = {_mm512_loadu_si512(weights), _mm512_loadu_si512(weights + 16), _mm512_loadu_si512(weights + 32),
                        _mm512_loadu_si512(weights + 48)};
        UNROLL
        for (int i = 0; i < 4 * TILE; i++)
            sums[i / 4][i % 4] = _mm512_dpbusd_epi32(sums[i / 4][i % 4], w[i % 4], _mm512_set1_epi32(static_cast<int>(x[i / 4])));
    }
    fold<TILE>(sums, scale, totals);
}

/* v4: a chunk of a panel is unpacked once, into the first-level cache, for all tokens. */
void spread_chunks(Problem& p) {
    alignas(64) static uint32_t weights[CHUNK / 4 * 64];
    for_panels(p, [&](int64_t panel, float* totals) {
        for (int64_t first = 0; first < p.groups; first += CHUNK / GROUP) {
            int64_t count = std::min<int64_t>(CHUNK / GROUP, p.groups - first);
            spread(p.panel(panel) + first * 1024, count, weights);
            for (int64_t t = 0; t < p.tokens; t += TILE)
                for (int64_t g = 0; g < count; g++)
                    sum_spread(weights + g * 512, p.tile(first + g, t), p.start(first + g, t), p.scales(panel, first + g),
                               totals + t * 64);
        }
    });
}

/* All groups of half a panel's rows, unpacked on the way, times a tile. The intrinsic of the product would copy every sum. */
APART void sum_half(const Problem& p, int64_t panel, int half, int64_t token, float* totals) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t* codes = p.panel(panel) + 512 * half;
    __m512 total[TILE][2] = {};
    for (int64_t g = 0; g < p.groups; g++, codes += 1024) {
        const uint32_t* x = p.tile(g, token);
        __m512i sums[TILE][2];
        UNROLL
        for (int i = 0; i < 2 * TILE; i++) sums[i / 2][i % 2] = _mm512_set1_epi32(p.start(g, token)[i / 2]);
        UNROLL
        for (int q = 0; q < 8; q++) {
            __m512i w[2] = {_mm512_loadu_si512(codes + 64 * (q / 2)), _mm512_loadu_si512(codes + 256 + 64 * (q / 2))};
            UNROLL
            for (int i = 0; i < 2; i++) w[i] = _mm512_and_si512(q % 2 ? _mm512_srli_epi32(w[i], 4) : w[i], low);
            UNROLL
            for (int i = 0; i < 2 * TILE; i++)
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[i / 2][i % 2]) : "v"(w[i % 2]), "v"(_mm512_set1_epi32(static_cast<int>(x[q * TILE + i / 2]))));
            __asm__ volatile("" ::: "memory"); /* or all words are loaded first, and spilled */
        }
        const float* scale = p.scales(panel, g) + 32 * half;
        UNROLL
        for (int i = 0; i < 2 * TILE; i++) {
            __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i / 2][i % 2]), _mm512_loadu_ps(scale + i % 2 * 16));
            total[i / 2][i % 2] = _mm512_add_ps(total[i / 2][i % 2], part);
        }
    }
    UNROLL
    for (int i = 0; i < 2 * TILE; i++) _mm512_storeu_ps(totals + i / 2 * 64 + 32 * half + i % 2 * 16, total[i / 2][i % 2]);
}

/* v5: sums and totals of half a panel stay in registers; a panel is unpacked again for every tile. */
void half_panels(Problem& p) {
    for_panels(p, [&](int64_t panel, float* totals) {
        for (int64_t t = 0; t < p.tokens; t += TILE)
            for (int half = 0; half < 2; half++) sum_half(p, panel, half, t, totals + t * 64);
    });
}

/* v6: the library: v5, asking for the next panel meanwhile; rounding the tokens is part of it. */
void library(Problem& p) {
    bw_weight w{p.rows, p.columns, p.columns, GROUP, 4, 8, BW_FLOAT32, 0, p.panels.data(), p.panel_scale.data(),
                nullptr, nullptr, nullptr, nullptr};
    if (bw_linear(&w, p.x_float.data(), BW_FLOAT32, p.tokens, nullptr, 8, 0, p.y.data(), 1) != BW_OK) std::exit(1);
}

void lay_out_weight(Problem& p) {
    p.panels.resize(bw_codes_bytes(p.rows, p.columns, 4));
    p.panel_scale.resize(p.scale.size());
    bw_pack_codes(p.codes.data(), p.rows, p.columns, p.columns, 4, nullptr, p.panels.data(), 1);
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t g = 0; g < p.groups; g++)
            p.panel_scale[static_cast<size_t>((r / 64 * p.groups + g) * 64 + r % 64)] = p.scale[static_cast<size_t>(r * p.groups + g)];
}

void lay_out_tokens(Problem& p) {
    p.words.resize(static_cast<size_t>(p.tokens * p.columns / 4));
    p.starts.resize(static_cast<size_t>(p.groups * p.tokens));
    for (int64_t t = 0; t < p.tokens; t++)
        for (int64_t g = 0; g < p.groups; g++) {
            const int8_t* x = &p.x[static_cast<size_t>(t * p.columns + g * GROUP)];
            uint32_t* to = &p.words[static_cast<size_t>((g * p.tokens + t / TILE * TILE) * GROUP / 4 + t % TILE)];
            int32_t sum = 0;
            for (int c = 0; c < GROUP; c++) sum += x[c];
            for (int q = 0; q < GROUP / 4; q++) std::memcpy(to + q * TILE, x + 4 * q, 4);
            p.starts[static_cast<size_t>(g * p.tokens + t)] = -8 * sum;
        }
}

Problem make(int64_t rows, int64_t columns, int64_t tokens) {
    Problem p{};
    p.rows = rows, p.columns = columns, p.tokens = tokens, p.groups = columns / GROUP;
    std::mt19937 generator(std::random_device{}());
    auto draw = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); };
    p.codes.resize(static_cast<size_t>(rows * columns));
    for (auto& code : p.codes) code = static_cast<uint8_t>(draw(0, 15));
    p.scale.resize(static_cast<size_t>(rows * p.groups));
    for (auto& scale : p.scale) scale = 0.5f + static_cast<float>(draw(0, 1000)) / 1000;
    p.x.resize(static_cast<size_t>(tokens * columns));
    for (auto& x : p.x) x = static_cast<int8_t>(draw(-127, 127));
    for (int64_t t = 0; t < tokens; t++) p.x[static_cast<size_t>(t * columns)] = 127; // so that the library finds scale 1
    p.x_float.assign(p.x.begin(), p.x.end());
    p.y.resize(static_cast<size_t>(tokens * rows));
    lay_out_weight(p);
    lay_out_tokens(p);
    return p;
}

bool is_near(const Problem& p, const std::vector<double>& expected) {
    for (size_t i = 0; i < expected.size(); i++)
        if (std::abs(p.y[i] - expected[i]) > 1e-6 * static_cast<double>(p.columns) * 8 * 127 * 1.5) return false;
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    bool is_given = count > 3;
    Problem p = make(is_given ? std::atol(arguments[1]) : 1216, is_given ? std::atol(arguments[2]) : 896,
                     is_given ? std::atol(arguments[3]) : 240);
    if (p.rows < 64 || p.rows % 64 || p.columns < GROUP || p.columns % GROUP || p.tokens < TILE || p.tokens % TILE) return 2;
    const struct { const char* name; void (*run)(Problem&); } versions[] = {
        {"v1 plain", plain}, {"v2 token by token", token_by_token}, {"v3 tiles of tokens", tiles_of_tokens},
        {"v4 chunks spread out", spread_chunks}, {"v5 half panels", half_panels}, {"v6 library", library},
    };
    constexpr int VERSIONS = 6, ROUNDS = 15;
    const int64_t products = 200'000;
    std::vector<double> expected = truth(p), least(VERSIONS + 1, 1e9);
    for (int round = 0; round < ROUNDS; round++)
        for (int v = 0; v <= VERSIONS; v++) {
            if (v == 0 && round >= 2) continue; /* plain takes long */
            double start = processor_seconds();
            if (v == VERSIONS) bw_multiply(0, products, 1);
            else versions[v].run(p);
            least[static_cast<size_t>(v)] = std::min(least[static_cast<size_t>(v)], processor_seconds() - start);
            if (v < VERSIONS && !is_near(p, expected)) return std::printf("%s is wrong\n", versions[v].name), 1;
        }
    double ceiling = 2048.0 * products / least[VERSIONS] / 1e9;
    double operations = 2.0 * static_cast<double>(p.rows * p.columns * p.tokens);
    std::printf("products alone %.0f GOP/s\n", ceiling);
    for (int v = 0; v < VERSIONS; v++) {
        double rate = operations / least[static_cast<size_t>(v)] / 1e9;
        std::printf("%-22s %9.3f ms %7.1f GOP/s %4.0f%% of products alone\n", versions[v].name,
                    least[static_cast<size_t>(v)] * 1e3, rate, 100 * rate / ceiling);
    }
}
