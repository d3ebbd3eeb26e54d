/* How the product of one token with a 4-bit weight came to be as it is, step by step.
 *
 *     gemv_w4a8 [ROWS COLUMNS]
 *
 * Each version is checked against sums in float64 and timed on one thread against a loop that only reads. Times are the
 * least of many rounds in which all take turns. Needs AVX-512 VNNI; groups of 128, symmetric, float32 scales. */
#include <immintrin.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../kernels.h"

namespace {

constexpr int GROUP = 128;

struct Problem {
    int64_t rows, columns, groups;
    std::vector<uint8_t> codes;           // [rows][columns], 0 to 15
    std::vector<float> scale;             // [rows][groups]
    std::vector<int8_t> x;                // [columns]
    std::vector<uint8_t> rows_packed;     // [rows][columns / 2]: low half even column
    std::vector<uint8_t> bytes_packed;    // [rows][groups][64]: low halves the first 64 columns of a group
    std::vector<uint8_t> panels;          // as bw_weight.codes
    std::vector<float> panel_scale;       // as bw_weight.scale
    std::vector<float> x_float;           // what bw_linear rounds to x
    std::vector<float> y;
};

/* v0: sums in float64, the truth. */
std::vector<double> truth(const Problem& p) {
    std::vector<double> y(p.rows);
    for (int64_t r = 0; r < p.rows; r++)
        for (int64_t c = 0; c < p.columns; c++)
            y[r] += double(p.scale[r * p.groups + c / GROUP]) * (p.codes[r * p.columns + c] - 8) * p.x[c];
    return y;
}

/* v1: plain C++, a row after the other, halves of bytes in order. */
void plain(Problem& p) {
    for (int64_t r = 0; r < p.rows; r++) {
        float total = 0;
        const uint8_t* codes = &p.rows_packed[r * p.columns / 2];
        for (int64_t g = 0; g < p.groups; g++) {
            int32_t sum = 0;
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c += 2)
                sum += ((codes[c / 2] & 15) - 8) * p.x[c] + ((codes[c / 2] >> 4) - 8) * p.x[c + 1];
            total += sum * p.scale[r * p.groups + g];
        }
        p.y[r] = total;
    }
}

/* v2: a group of a row is one vector, whose halves are each one VNNI product; every group ends in a sum across lanes. */
void vector_rows(Problem& p) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t r = 0; r < p.rows; r++) {
        float total = 0;
        for (int64_t g = 0; g < p.groups; g++) {
            __m512i v = _mm512_loadu_si512(&p.bytes_packed[(r * p.groups + g) * 64]);
            __m512i a = _mm512_loadu_si512(&p.x[g * GROUP]), b = _mm512_loadu_si512(&p.x[g * GROUP + 64]);
            __m512i eight = _mm512_set1_epi8(8), sum = _mm512_setzero_si512(), shift = sum;
            sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(v, low), a);
            sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(v, 4), low), b);
            shift = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(shift, eight, a), eight, b);
            total += _mm512_reduce_add_epi32(_mm512_sub_epi32(sum, shift)) * p.scale[r * p.groups + g];
        }
        p.y[r] = total;
    }
}

/* v3: sixteen rows to a vector, a word of the token the same in all lanes: no sum across lanes, no token sums per row. */
void panels_of_rows(Problem& p) {
    const __m512i low = _mm512_set1_epi8(15);
    std::vector<int32_t> shift(p.groups);
    for (int64_t c = 0; c < p.columns; c++) shift[c / GROUP] += 8 * p.x[c];
    for (int64_t panel = 0; panel < p.rows / 64; panel++) {
        __m512 total[4] = {};
        const uint8_t* codes = &p.panels[panel * p.columns * 32];
        for (int64_t g = 0; g < p.groups; g++) {
            __m512i sum[4];
            for (auto& s : sum) s = _mm512_set1_epi32(-shift[g]);
            for (int64_t c = g * GROUP; c < (g + 1) * GROUP; c += 32)
                for (int lane = 0; lane < 4; lane++, codes += 256)
                    for (int v = 0; v < 4; v++) {
                        int32_t words[2];
                        std::memcpy(words, &p.x[c + 8 * v], 8);
                        __m512i w = _mm512_loadu_si512(codes + 64 * v);
                        sum[lane] = _mm512_dpbusd_epi32(sum[lane], _mm512_and_si512(w, low), _mm512_set1_epi32(words[0]));
                        sum[lane] = _mm512_dpbusd_epi32(sum[lane], _mm512_and_si512(_mm512_srli_epi32(w, 4), low),
                                                        _mm512_set1_epi32(words[1]));
                    }
            const float* scale = &p.panel_scale[(panel * p.groups + g) * 64];
            for (int lane = 0; lane < 4; lane++)
                total[lane] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[lane]), _mm512_loadu_ps(scale + 16 * lane), total[lane]);
        }
        for (int lane = 0; lane < 4; lane++) _mm512_storeu_ps(&p.y[panel * 64 + 16 * lane], total[lane]);
    }
}

/* v4: the library: v3, looking ahead in memory; rounding the token is part of it. */
void library(Problem& p) {
    bw_weight w{p.rows, p.columns, p.columns, GROUP, 4, 8, BW_FLOAT32, 0, p.panels.data(), p.panel_scale.data(),
                nullptr, nullptr, nullptr, nullptr};
    if (bw_linear(&w, p.x_float.data(), BW_FLOAT32, 1, nullptr, 8, 0, p.y.data(), 1) != BW_OK) std::exit(1);
}

Problem make(int64_t rows, int64_t columns) {
    Problem p{rows, columns, columns / GROUP, {}, {}, {}, {}, {}, {}, {}, {}, {}};
    std::mt19937 generator(std::random_device{}());
    auto draw = [&](int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); };
    p.codes.resize(rows * columns);
    for (auto& code : p.codes) code = static_cast<uint8_t>(draw(0, 15));
    p.scale.resize(rows * p.groups);
    for (auto& scale : p.scale) scale = 0.5f + static_cast<float>(draw(0, 1000)) / 1000;
    p.x.resize(columns);
    for (auto& x : p.x) x = static_cast<int8_t>(draw(-127, 127));
    p.x[0] = 127;  // so that the library's own rounding finds scale 1
    p.x_float.assign(p.x.begin(), p.x.end());
    p.y.resize(rows);
    p.rows_packed.resize(rows * columns / 2);
    p.bytes_packed.resize(rows * columns / 2);
    p.panels.resize(bw_codes_bytes(rows, columns, 4));
    p.panel_scale.resize(rows * p.groups);
    for (int64_t i = 0; i < rows * columns; i += 2)
        p.rows_packed[i / 2] = static_cast<uint8_t>(p.codes[i] | p.codes[i + 1] << 4);
    for (int64_t i = 0; i < rows * columns; i += GROUP)
        for (int j = 0; j < 64; j++) p.bytes_packed[i / 2 + j] = static_cast<uint8_t>(p.codes[i + j] | p.codes[i + 64 + j] << 4);
    bw_pack_codes(p.codes.data(), rows, columns, columns, 4, nullptr, p.panels.data(), 1);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t g = 0; g < p.groups; g++)
            p.panel_scale[(r / 64 * p.groups + g) * 64 + r % 64] = p.scale[r * p.groups + g];
    return p;
}

}  // namespace

int main(int count, char** arguments) {
    Problem p = make(count > 2 ? std::atol(arguments[1]) : 4096, count > 2 ? std::atol(arguments[2]) : 14336);
    if (p.rows % 64 || p.columns % GROUP || p.rows < 64 || p.columns < GROUP) return 2;
    const struct { const char* name; void (*run)(Problem&); } versions[] = {
        {"v1 plain", plain}, {"v2 vector rows", vector_rows}, {"v3 panels of rows", panels_of_rows}, {"v4 library", library},
    };
    std::vector<double> expected = truth(p);
    double least[5] = {1e9, 1e9, 1e9, 1e9, 1e9};
    for (int round = 0; round < 15; round++)
        for (int v = 0; v < 5; v++) {
            auto start = std::chrono::steady_clock::now();
            if (v == 4) bw_read_memory(p.codes.data(), p.rows * p.columns, 1);
            else versions[v].run(p);
            double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            least[v] = seconds < least[v] ? seconds : least[v];
            for (int64_t r = 0; v < 4 && r < p.rows; r++)
                if (std::abs(p.y[r] - expected[r]) > 1e-5 * p.columns * 127) return std::printf("%s is wrong\n", versions[v].name), 1;
        }
    double read = p.rows * p.columns / least[4] / 1e9, bytes = p.rows * p.columns * 0.5 + p.scale.size() * 4.0;
    std::printf("read loop %.1f GB/s\n", read);
    for (int v = 0; v < 4; v++)
        std::printf("%-18s %8.3f ms %6.1f GB/s %4.0f%% of the read loop\n", versions[v].name, least[v] * 1e3,
                    bytes / least[v] / 1e9, bytes / least[v] / 1e7 / read);
}
