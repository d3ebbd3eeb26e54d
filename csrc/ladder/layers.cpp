/* What lies between the products: how it came to be as it is, step by step.
 *
 *     layers [TOKENS COLUMNS]
 *
 * A norm whose results are rounded to 8 bits for the next product, silu times a gate, rotary positions of heads of 64
 * numbers, and rows of a 4-bit weight as an embedding needs them: sums in float64, plain C++, plain vectors, the library;
 * float32, on one thread. Each is checked against float64 and timed beside a loop that reads as many bytes as x has. What
 * is counted is what has to be read and written once; it stays in the caches as it does in a model. Processor times are the
 * least of rounds in which all take turns. Needs AVX-512. */
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../isa_table.h"
#include "clock.h"

namespace {

constexpr int64_t GROUP = 128, SIZE = 64, VOCABULARY = 4096;
constexpr float EPSILON = 1e-6f;
constexpr int ROUNDS = 60;

struct Problem {
    int64_t tokens, columns;
    std::vector<float> x, other, weight, y;          // [tokens][columns], the same, [columns], [tokens][columns]
    std::vector<int8_t> codes;                       // of the norm, [tokens][columns]
    std::vector<float> scale;                        // [tokens]
    std::vector<uint32_t> words;                     // as the library lays them out
    std::vector<int32_t> sums, positions;
    std::vector<float> cosine, sine;                 // [tokens][SIZE / 2]
    std::vector<uint8_t> rows, panels;               // of the embedding: [VOCABULARY][columns / 2], and as bw_weight
    std::vector<float> row_scale, panel_scale;       // [VOCABULARY][columns / GROUP], and as bw_weight
    std::vector<int64_t> ids;                        // [tokens]
    std::vector<double> expected;                    // [tokens][columns]

    int64_t groups() const { return columns / GROUP; }
    int64_t count() const { return tokens * columns; }
};

/* ---- a norm, rounded */

void norm_truth(Problem& p) {
    for (int64_t t = 0; t < p.tokens; t++) {
        double squares = 0;
        for (int64_t c = 0; c < p.columns; c++) squares += double(p.x[t * p.columns + c]) * p.x[t * p.columns + c];
        double root = std::sqrt(squares / double(p.columns) + EPSILON);
        for (int64_t c = 0; c < p.columns; c++)
            p.expected[t * p.columns + c] = p.x[t * p.columns + c] / root * p.weight[c];
    }
}

/* v1: plain C++: a norm as one writes it, then the largest, then the codes and their sums. */
void norm_plain(Problem& p) {
    std::vector<float> row(p.columns);
    for (int64_t t = 0; t < p.tokens; t++) {
        const float* x = &p.x[t * p.columns];
        float squares = 0, largest = 0;
        for (int64_t c = 0; c < p.columns; c++) squares += x[c] * x[c];
        float root = std::sqrt(squares / float(p.columns) + EPSILON);
        for (int64_t c = 0; c < p.columns; c++) row[c] = x[c] / root * p.weight[c];
        for (int64_t c = 0; c < p.columns; c++) largest = std::max(largest, std::abs(row[c]));
        p.scale[t] = largest / 127;
        for (int64_t g = 0; g < p.groups(); g++) {
            int32_t sum = 0;
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c++)
                sum += p.codes[t * p.columns + c] = static_cast<int8_t>(std::nearbyint(row[c] / p.scale[t]));
            p.sums[g * p.tokens + t] = sum;
        }
    }
}

/* v2: the same in vectors, the largest found while the norm is written. */
void norm_vectors(Problem& p) {
    std::vector<float> row(p.columns);
    for (int64_t t = 0; t < p.tokens; t++) {
        const float* x = &p.x[t * p.columns];
        __m512 squares = _mm512_setzero_ps(), most = squares;
        for (int64_t c = 0; c < p.columns; c += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + c), _mm512_loadu_ps(x + c), squares);
        __m512 root = _mm512_set1_ps(std::sqrt(_mm512_reduce_add_ps(squares) / float(p.columns) + EPSILON));
        for (int64_t c = 0; c < p.columns; c += 16) {
            __m512 v = _mm512_mul_ps(_mm512_div_ps(_mm512_loadu_ps(x + c), root), _mm512_loadu_ps(&p.weight[c]));
            most = _mm512_max_ps(most, _mm512_abs_ps(v));
            _mm512_storeu_ps(&row[c], v);
        }
        p.scale[t] = _mm512_reduce_max_ps(most) / 127;
        __m512 scale = _mm512_set1_ps(p.scale[t]);
        for (int64_t g = 0; g < p.groups(); g++) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c += 16) {
                __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(_mm512_loadu_ps(&row[c]), scale));
                sum = _mm512_add_epi32(sum, code);
                _mm_storeu_si128(reinterpret_cast<__m128i*>(&p.codes[t * p.columns + c]), _mm512_cvtsepi32_epi8(code));
            }
            p.sums[g * p.tokens + t] = _mm512_reduce_add_epi32(sum);
        }
    }
}

bw_weight operand(const Problem& p) {
    return {VOCABULARY, p.columns, p.columns, GROUP, 4, 8, BW_FLOAT32, 0, p.panels.data(), p.panel_scale.data(),
            nullptr, nullptr, nullptr, nullptr};
}

/* v3: the library, as its products call it: words where tiles of tokens read them, sums times what codes have too much. */
void norm_library(Problem& p) {
    bw_weight w = operand(p);
    bw_norm norm{p.x.data(), nullptr, p.weight.data(), nullptr, nullptr, p.columns, BW_FLOAT32, EPSILON};
    bw_source source{nullptr, &norm, nullptr, BW_FLOAT32};
    bw_tokens tokens{};
    tokens.route = BW_ROUTE_INTEGER;
    tokens.count = p.tokens;
    tokens.group = GROUP;
    tokens.words = p.words.data();
    tokens.sums = p.sums.data();
    tokens.scale = p.scale.data();
    std::vector<float> row(4 * p.columns);
    for (int64_t t = 0; t < p.tokens; t++)
        if (bw_isa()->prepare(&w, &source, t, &tokens, row.data()) != BW_OK) std::exit(1);
}

/* The library's words as rows of codes, and its sums without their factor. */
void norm_spread(Problem& p) {
    int64_t widest = bw_tile_width(p.tokens);
    for (int64_t t = 0; t < p.tokens; t++) {
        int64_t first = t / widest * widest, width = std::min(widest, p.tokens - first);
        for (int64_t g = 0; g < p.groups(); g++)
            for (int64_t i = 0; i < GROUP / 4; i++)
                std::memcpy(&p.codes[t * p.columns + g * GROUP + 4 * i],
                            &p.words[g * GROUP / 4 * p.tokens + first * (GROUP / 4) + i * width + t - first], 4);
    }
    for (int64_t i = 0; i < p.groups() * p.tokens; i++) p.sums[i] /= -8;
}

/* How many steps of a token's codes are between them and the truth: half of one is what rounding takes. */
double norm_error(const Problem& p) {
    double error = 0;
    std::vector<int32_t> sums(p.groups() * p.tokens);
    for (int64_t i = 0; i < p.count(); i++) {
        int64_t t = i / p.columns, group = i % p.columns / GROUP;
        error = std::max(error, std::abs(p.codes[i] - p.expected[i] / p.scale[t]));
        sums[group * p.tokens + t] += p.codes[i];
    }
    return sums == p.sums ? error : INFINITY;
}

/* ---- silu(x) * other */

void silu_truth(Problem& p) {
    for (int64_t i = 0; i < p.count(); i++) p.expected[i] = p.x[i] / (1 + std::exp(-double(p.x[i]))) * p.other[i];
}

void silu_plain(Problem& p) {
    for (int64_t i = 0; i < p.count(); i++) p.y[i] = p.x[i] / (1 + std::exp(-p.x[i])) * p.other[i];
}

/* v2: e^x from five terms of its series around the nearest power of two. */
void silu_vectors(Problem& p) {
    const __m512 one = _mm512_set1_ps(1);
    for (int64_t i = 0; i < p.count(); i += 16) {
        __m512 x = _mm512_loadu_ps(&p.x[i]), power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
        __m512 whole = _mm512_roundscale_ps(power, 0), rest = _mm512_mul_ps(_mm512_sub_ps(power, whole), _mm512_set1_ps(0.693147181f));
        __m512 sum = _mm512_set1_ps(1.0f / 120);
        for (float factor : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
        __m512 y = _mm512_div_ps(x, _mm512_add_ps(one, _mm512_scalef_ps(sum, whole)));
        _mm512_storeu_ps(&p.y[i], _mm512_mul_ps(y, _mm512_loadu_ps(&p.other[i])));
    }
}

void silu_library(Problem& p) {
    if (bw_silu_multiply(p.x.data(), p.other.data(), BW_FLOAT32, p.count(), p.y.data(), 1) != BW_OK) std::exit(1);
}

/* ---- rotary positions, in place */

void turn_truth(Problem& p) {
    for (int64_t i = 0; i < p.count(); i++) {
        int64_t t = i / p.columns, d = i % SIZE, half = SIZE / 2, at = t * half + d % half;
        double other = d < half ? -double(p.x[i + half]) : double(p.x[i - half]);
        p.expected[i] = p.x[i] * double(p.cosine[at]) + other * p.sine[at];
    }
}

void start_turning(Problem& p) { p.y = p.x; }

void turn_plain(Problem& p) {
    for (int64_t t = 0; t < p.tokens; t++)
        for (int64_t first = t * p.columns; first < (t + 1) * p.columns; first += SIZE)
            for (int64_t d = 0; d < SIZE / 2; d++) {
                float a = p.y[first + d], b = p.y[first + SIZE / 2 + d];
                float turn = p.cosine[p.positions[t] * SIZE / 2 + d], lift = p.sine[p.positions[t] * SIZE / 2 + d];
                p.y[first + d] = a * turn - b * lift;
                p.y[first + SIZE / 2 + d] = b * turn + a * lift;
            }
}

/* v2: in vectors, a token's angles kept in registers for all of its heads. */
void turn_vectors(Problem& p) {
    for (int64_t t = 0; t < p.tokens; t++) {
        __m512 turn[2], lift[2];
        for (int64_t v = 0; v < 2; v++) {
            turn[v] = _mm512_loadu_ps(&p.cosine[p.positions[t] * SIZE / 2 + 16 * v]);
            lift[v] = _mm512_loadu_ps(&p.sine[p.positions[t] * SIZE / 2 + 16 * v]);
        }
        for (float* x = &p.y[t * p.columns]; x < p.y.data() + (t + 1) * p.columns; x += SIZE)
            for (int64_t v = 0; v < 2; v++) {
                __m512 a = _mm512_loadu_ps(x + 16 * v), b = _mm512_loadu_ps(x + 32 + 16 * v);
                _mm512_storeu_ps(x + 16 * v, _mm512_fnmadd_ps(b, lift[v], _mm512_mul_ps(a, turn[v])));
                _mm512_storeu_ps(x + 32 + 16 * v, _mm512_fmadd_ps(a, lift[v], _mm512_mul_ps(b, turn[v])));
            }
    }
}

void turn_library(Problem& p) {
    if (bw_rotate(p.y.data(), BW_FLOAT32, p.tokens, p.columns / SIZE, SIZE, p.cosine.data(), p.sine.data(), p.positions.data(),
                  int32_t(p.tokens), 1) != BW_OK)
        std::exit(1);
}

/* ---- rows of a weight */

void rows_truth(Problem& p) {
    for (int64_t i = 0; i < p.count(); i++) {
        int64_t at = p.ids[i / p.columns] * p.columns + i % p.columns;
        p.expected[i] = double((p.rows[at / 2] >> (at % 2 * 4) & 15) - 8) * p.row_scale[at / GROUP];
    }
}

void rows_plain(Problem& p) {
    for (int64_t t = 0; t < p.tokens; t++)
        for (int64_t c = 0; c < p.columns; c++) {
            int64_t at = p.ids[t] * p.columns + c;
            p.y[t * p.columns + c] = float((p.rows[at / 2] >> (at % 2 * 4) & 15) - 8) * p.row_scale[at / GROUP];
        }
}

/* v2: in vectors, from rows that lie one after the other, as no product would read them. */
void rows_vectors(Problem& p) {
    const __m512i shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    for (int64_t t = 0; t < p.tokens; t++)
        for (int64_t g = 0; g < p.groups(); g++) {
            __m512 scale = _mm512_set1_ps(p.row_scale[p.ids[t] * p.groups() + g]);
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c += 16) {
                __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&p.rows[(p.ids[t] * p.columns + c) / 2]));
                __m512i low = _mm512_broadcastd_epi32(eight), high = _mm512_broadcastd_epi32(_mm_srli_epi64(eight, 32));
                __m512i code = _mm512_and_si512(_mm512_srlv_epi32(_mm512_mask_blend_epi32(0xff00, low, high), shifts), _mm512_set1_epi32(15));
                __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(8)));
                _mm512_storeu_ps(&p.y[t * p.columns + c], _mm512_mul_ps(value, scale));
            }
        }
}

/* v3: the library, from the panels that the output head is multiplied from. */
void rows_library(Problem& p) {
    bw_weight w = operand(p);
    if (bw_look_up(&w, p.ids.data(), p.tokens, p.y.data(), 1) != BW_OK) std::exit(1);
}

/* ---- all of them */

/* The largest difference, as a part of what is large. */
double error_of_y(const Problem& p) {
    double error = 0;
    for (int64_t i = 0; i < p.count(); i++) error = std::max(error, std::abs(p.y[i] - p.expected[i]) / (1 + std::abs(p.expected[i])));
    return error;
}

void nothing(Problem&) {}

struct Operation {
    const char* name;
    void (*truth)(Problem&);
    void (*start)(Problem&);
    void (*versions[3])(Problem&);
    void (*after_library)(Problem&);
    double (*error)(const Problem&);
    double tolerance, bytes;  // a number of a token, read and written
};

constexpr Operation OPERATIONS[] = {
    {"norm and rounding", norm_truth, nothing, {norm_plain, norm_vectors, norm_library}, norm_spread, norm_error, 0.501, 5},
    {"silu times gate", silu_truth, nothing, {silu_plain, silu_vectors, silu_library}, nothing, error_of_y, 1e-5, 12},
    {"rotary positions", turn_truth, start_turning, {turn_plain, turn_vectors, turn_library}, nothing, error_of_y, 1e-6, 8},
    {"rows of a weight", rows_truth, nothing, {rows_plain, rows_vectors, rows_library}, nothing, error_of_y, 1e-6, 4.53125},
};

Problem make(int64_t tokens, int64_t columns) {
    Problem p{};
    p.tokens = tokens, p.columns = columns;
    std::mt19937 generator(std::random_device{}());
    std::normal_distribution<float> normal;
    for (auto* numbers : {&p.x, &p.other}) {
        numbers->resize(p.count());
        for (float& each : *numbers) each = 3 * normal(generator);
    }
    for (int64_t c = 0; c < columns; c++) p.weight.push_back(1 + 0.1f * normal(generator));
    p.y.resize(p.count()), p.expected.resize(p.count()), p.codes.resize(p.count()), p.words.resize(p.count() / 4);
    p.scale.resize(tokens), p.sums.resize(tokens * p.groups());
    for (int64_t i = 0; i < tokens * SIZE / 2; i++) {
        p.cosine.push_back(std::cos(float(generator() % 1000)));
        p.sine.push_back(std::sqrt(1 - p.cosine.back() * p.cosine.back()));
    }
    for (int64_t t = 0; t < tokens; t++) p.positions.push_back(int32_t(t)), p.ids.push_back(int64_t(generator() % VOCABULARY));
    std::vector<uint8_t> codes(VOCABULARY * columns);
    for (uint8_t& code : codes) code = generator() & 15;
    for (size_t i = 0; i < codes.size(); i += 2) p.rows.push_back(uint8_t(codes[i] | codes[i + 1] << 4));
    p.panels.resize(bw_codes_bytes(VOCABULARY, columns, 4));
    if (bw_pack_codes(codes.data(), VOCABULARY, columns, columns, 4, nullptr, p.panels.data(), 1) != BW_OK) std::exit(1);
    p.row_scale.resize(VOCABULARY * p.groups()), p.panel_scale.resize(VOCABULARY * p.groups());
    for (int64_t r = 0; r < VOCABULARY; r++)
        for (int64_t g = 0; g < p.groups(); g++)
            p.row_scale[r * p.groups() + g] = p.panel_scale[(r / 64 * p.groups() + g) * 64 + r % 64] = 0.01f + 0.001f * float(generator() % 20);
    return p;
}

void climb(Problem& p, const Operation& operation) {
    static const char* const names[] = {"v1 plain", "v2 vectors", "v3 library"};
    double least[3] = {1e9, 1e9, 1e9}, error[3] = {}, reading = 1e9;
    operation.truth(p);
    for (int round = 0; round < ROUNDS; round++)
        for (int v = 0; v < 3; v++) {
            reading = std::min(reading, seconds_of([&] { bw_read_memory(p.x.data(), p.count() * 4, 1); }));
            operation.start(p);
            least[v] = std::min(least[v], seconds_of([&] { operation.versions[v](p); }));
            if (v == 2) operation.after_library(p);
            error[v] = std::max(error[v], operation.error(p));
        }
    double most = double(p.count() * 4 / (1 << 20) * (1 << 20)) / reading / 1e9, bytes = double(p.count()) * operation.bytes;
    for (int v = 0; v < 3; v++) {
        double rate = bytes / least[v] / 1e9;
        std::printf("%-18s %-11s %9.0f %7.1f %6.0f%% %9.1e\n", operation.name, names[v], least[v] * 1e9 / double(p.tokens), rate,
                    100 * rate / most, error[v]);
        if (!(error[v] <= operation.tolerance)) std::exit(1);
    }
}

}  // namespace

int main(int count, char** arguments) {
    int64_t tokens = count > 2 ? std::atol(arguments[1]) : 240, columns = count > 2 ? std::atol(arguments[2]) : 2048;
    if (tokens < 1 || tokens > BW_TOKENS || columns < GROUP || columns % GROUP || tokens * columns * 4 < 1 << 20) return 2;
    Problem p = make(tokens, columns);
    std::printf("%ld tokens of %ld numbers, %s\n", long(tokens), long(columns), bw_isa_selected());
    std::printf("%-18s %-11s %9s %7s %7s %9s\n", "", "", "ns a token", "GB/s", "of most", "error");
    for (const Operation& operation : OPERATIONS) climb(p, operation);
}
