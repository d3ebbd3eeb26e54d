/* How attention of one token over a long context in 8-bit codes came to be as it is, step by step.
 *
 *     attention [CONTEXT QUERY_HEADS HEADS]
 *
 * Heads of 128 numbers. Each version is checked against sums in float64 and timed on one thread against a loop that only
 * reads as many bytes. Times are the least of many rounds in which all take turns. Needs AVX-512. */
#include <immintrin.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../kernels.h"

namespace {

constexpr int64_t SIZE = 128, PAGE = 32;

struct Problem {
    int64_t context, query_heads, heads, group, count;
    std::vector<uint8_t> keys, values;         // [page][head][PAGE][SIZE]
    std::vector<float> key_scale, value_scale; // [page][head][PAGE][2]
    std::vector<float> queries, y;             // [query head][SIZE]
    std::vector<int32_t> table;

    int64_t cell(int64_t head, int64_t token) const { return (table[token / PAGE] * heads + head) * PAGE + token % PAGE; }
};

/* v0: sums in float64, the truth. */
std::vector<double> truth(const Problem& p) {
    std::vector<double> y(p.y.size()), weights(p.context);
    for (int64_t head = 0; head < p.query_heads; head++) {
        double total = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            double sum = 0;
            for (int64_t d = 0; d < SIZE; d++)
                sum += p.queries[head * SIZE + d] * (double(p.keys[at * SIZE + d]) * p.key_scale[2 * at] + p.key_scale[2 * at + 1]);
            total += weights[t] = std::exp(sum / std::sqrt(double(SIZE)));
        }
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            for (int64_t d = 0; d < SIZE; d++)
                y[head * SIZE + d] += weights[t] / total * (double(p.values[at * SIZE + d]) * p.value_scale[2 * at] + p.value_scale[2 * at + 1]);
        }
    }
    return y;
}

/* v1: plain C++, a query head after the other: every head reads all keys and values anew. */
void plain(Problem& p) {
    std::vector<float> weights(p.context);
    for (int64_t head = 0; head < p.query_heads; head++) {
        const float* q = &p.queries[head * SIZE];
        float* y = &p.y[head * SIZE];
        float total = 0, query_sum = 0;
        for (int64_t d = 0; d < SIZE; d++) query_sum += q[d];
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            float sum = 0;
            for (int64_t d = 0; d < SIZE; d++) sum += q[d] * p.keys[at * SIZE + d];
            sum = sum * p.key_scale[2 * at] + query_sum * p.key_scale[2 * at + 1];
            total += weights[t] = std::exp(sum / std::sqrt(float(SIZE)));
        }
        for (int64_t d = 0; d < SIZE; d++) y[d] = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            float weight = weights[t] / total * p.value_scale[2 * at], least = weights[t] / total * p.value_scale[2 * at + 1];
            for (int64_t d = 0; d < SIZE; d++) y[d] += weight * p.values[at * SIZE + d] + least;
        }
    }
}

/* v2: codes are made floats once for the heads that share them, with vectors; a score is a sum across lanes. */
void shared(Problem& p) {
    std::vector<float> weights(p.context * p.group), totals(p.group), offsets(p.group);
    for (int64_t head = 0; head < p.heads; head++) {
        const float* q = &p.queries[head * p.group * SIZE];
        float* y = &p.y[head * p.group * SIZE];
        for (int64_t g = 0; g < p.group; g++) {
            totals[g] = offsets[g] = 0;
            for (int64_t d = 0; d < SIZE; d++) totals[g] += q[g * SIZE + d];
        }
        std::vector<float> sums = totals;
        for (float& total : totals) total = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head, t);
            __m512 key[SIZE / 16];
            for (int i = 0; i < SIZE / 16; i++)
                key[i] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)&p.keys[at * SIZE + 16 * i])));
            for (int64_t g = 0; g < p.group; g++) {
                __m512 sum = _mm512_setzero_ps();
                for (int i = 0; i < SIZE / 16; i++) sum = _mm512_fmadd_ps(_mm512_loadu_ps(q + g * SIZE + 16 * i), key[i], sum);
                float score = _mm512_reduce_add_ps(sum) * p.key_scale[2 * at] + sums[g] * p.key_scale[2 * at + 1];
                float weight = std::exp(score / std::sqrt(float(SIZE)));
                totals[g] += weight;
                offsets[g] += weight * p.value_scale[2 * at + 1];
                weights[t * p.group + g] = weight * p.value_scale[2 * at];
            }
        }
        for (int64_t i = 0; i < p.group * SIZE; i++) y[i] = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head, t);
            for (int i = 0; i < SIZE / 16; i++) {
                __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)&p.values[at * SIZE + 16 * i])));
                for (int64_t g = 0; g < p.group; g++) {
                    float* to = y + g * SIZE + 16 * i;
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[t * p.group + g]), value, _mm512_loadu_ps(to)));
                }
            }
        }
        for (int64_t i = 0; i < p.group * SIZE; i++) y[i] = (y[i] + offsets[i / SIZE]) / totals[i / SIZE];
    }
}

/* v3: the library: queries and weights as 16-bit whole numbers, keys turned so that no score is summed across lanes. */
void library(Problem& p) {
    int32_t position = int32_t(p.context - 1), starts[2] = {0, 1}, length = int32_t(p.context);
    bw_pages pages{p.count, PAGE, p.heads, SIZE, BW_INT8, BW_INT8, 0, 0, p.keys.data(), p.values.data(), p.key_scale.data(), p.value_scale.data()};
    bw_batch batch{1, 1, p.count, &position, starts, &length, p.table.data()};
    if (bw_attend(&pages, &batch, p.queries.data(), p.query_heads, 1 / std::sqrt(float(SIZE)), 0, p.y.data(), 1) != BW_OK) std::exit(1);
}

Problem make(int64_t context, int64_t query_heads, int64_t heads) {
    Problem p{context, query_heads, heads, query_heads / heads, (context + PAGE - 1) / PAGE, {}, {}, {}, {}, {}, {}, {}};
    std::mt19937 generator(std::random_device{}());
    std::normal_distribution<float> normal;
    for (auto* codes : {&p.keys, &p.values})
        for (int64_t i = 0; i < p.count * heads * PAGE * SIZE; i++) codes->push_back(uint8_t(generator()));
    for (auto* scale : {&p.key_scale, &p.value_scale})
        for (int64_t i = 0; i < p.count * heads * PAGE; i++) {
            scale->push_back(0.01f + 0.01f * float(generator() % 100) / 100);
            scale->push_back(-127 * scale->back());
        }
    for (int64_t i = 0; i < query_heads * SIZE; i++) p.queries.push_back(normal(generator));
    for (int64_t i = 0; i < p.count; i++) p.table.push_back(int32_t(p.count - 1 - i));
    p.y.resize(p.queries.size());
    return p;
}

}  // namespace

int main(int count, char** arguments) {
    bool is_given = count > 3;
    Problem p = make(is_given ? std::atol(arguments[1]) : 32768, is_given ? std::atol(arguments[2]) : 12, is_given ? std::atol(arguments[3]) : 2);
    const struct { const char* name; void (*run)(Problem&); } versions[] = {{"v1 plain", plain}, {"v2 shared", shared}, {"v3 library", library}};
    std::vector<double> expected = truth(p);
    double least[4] = {1e9, 1e9, 1e9, 1e9}, bytes = 2.0 * double(p.count * p.heads * PAGE) * (SIZE + 8);
    for (int round = 0; round < 9; round++)
        for (int v = 0; v < 4; v++) {
            auto start = std::chrono::steady_clock::now();
            if (v == 3) bw_read_memory(p.keys.data(), int64_t(p.keys.size()), 1), bw_read_memory(p.values.data(), int64_t(p.values.size()), 1);
            else versions[v].run(p);
            double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            least[v] = seconds < least[v] ? seconds : least[v];
            for (size_t i = 0; v < 3 && i < p.y.size(); i++)
                if (std::abs(p.y[i] - expected[i]) > 2e-4) return std::printf("%s is wrong\n", versions[v].name), 1;
        }
    double read = double(p.keys.size() + p.values.size()) / least[3] / 1e9;
    std::printf("read loop %.1f GB/s\n", read);
    for (int v = 0; v < 3; v++)
        std::printf("%-12s %8.3f ms %6.1f GB/s %4.0f%% of the read loop\n", versions[v].name, least[v] * 1e3, bytes / least[v] / 1e9,
                    bytes / least[v] / 1e7 / read);
}
