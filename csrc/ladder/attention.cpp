/* Attention of one token over a long context, of heads of 64 or 128 numbers.
 *
 *     attention [QUERY_HEADS HEADS NUMBERS [CONTEXT ...]]
 *
 * First how the kernel for 8-bit codes came to be as it is, step by step, on one thread and the longest context; then the
 * library over bfloat16, 8-bit and 4-bit keys and values at every context, on one thread and two. All is checked against
 * sums in float64. Before each call 64 MiB of other memory are read, as a step's weights are; that is the read loop which
 * bytes a second are compared with. Products are compared with a loop of nothing else: in float32, and, where the library
 * sums codes, in pairs of 16 bits, of which a vector holds twice as many. Times are the least of rounds in which all take
 * turns. Needs AVX-512. */
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../kernels.h"

namespace {

constexpr int64_t PAGE = 32;
constexpr int64_t MULTIPLIED = 20000; // rounds of 256 products
constexpr double TOLERANCE = 3e-4;

struct Problem {
    int64_t context, query_heads, heads, group, size, count;
    int32_t code;
    std::vector<uint8_t> keys, values;         // [page][head][PAGE][size] numbers
    std::vector<float> key_scale, value_scale; // [page][head][PAGE][2]
    std::vector<float> queries, y;             // [query head][size]
    std::vector<int32_t> table;
    std::vector<double> expected;

    int64_t cell(int64_t head, int64_t token) const { return (table[token / PAGE] * heads + head) * PAGE + token % PAGE; }
    double number(const std::vector<uint8_t>& codes, const std::vector<float>& scale, int64_t at, int64_t d) const {
        int64_t i = at * size + d;
        if (code == BW_BFLOAT16) {
            uint32_t word = uint32_t(codes[2 * i] | codes[2 * i + 1] << 8) << 16;
            float value;
            std::memcpy(&value, &word, 4);
            return value;
        }
        int own = code == BW_INT8 ? codes[i] : codes[i / 2] >> (i % 2 * 4) & 15;
        return double(own) * scale[2 * at] + scale[2 * at + 1];
    }
    double products() const { return 2.0 * double(context * query_heads * size); }
    double bytes() const { return double(keys.size() + values.size() + 4 * (key_scale.size() + value_scale.size())); }
};

/* v0: sums in float64, the truth. */
std::vector<double> truth(const Problem& p) {
    std::vector<double> y(p.y.size()), weights(p.context);
    for (int64_t head = 0; head < p.query_heads; head++) {
        double total = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            double sum = 0;
            for (int64_t d = 0; d < p.size; d++) sum += p.queries[head * p.size + d] * p.number(p.keys, p.key_scale, at, d);
            total += weights[t] = std::exp(sum / std::sqrt(double(p.size)));
        }
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            for (int64_t d = 0; d < p.size; d++)
                y[head * p.size + d] += weights[t] / total * p.number(p.values, p.value_scale, at, d);
        }
    }
    return y;
}

/* v1: plain C++, a query head after the other: every head reads all keys and values anew. */
void plain(Problem& p, int) {
    std::vector<float> weights(p.context);
    for (int64_t head = 0; head < p.query_heads; head++) {
        const float* q = &p.queries[head * p.size];
        float* y = &p.y[head * p.size];
        float total = 0, query_sum = 0;
        for (int64_t d = 0; d < p.size; d++) query_sum += q[d];
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            float sum = 0;
            for (int64_t d = 0; d < p.size; d++) sum += q[d] * p.keys[at * p.size + d];
            sum = sum * p.key_scale[2 * at] + query_sum * p.key_scale[2 * at + 1];
            total += weights[t] = std::exp(sum / std::sqrt(float(p.size)));
        }
        for (int64_t d = 0; d < p.size; d++) y[d] = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head / p.group, t);
            float weight = weights[t] / total * p.value_scale[2 * at], least = weights[t] / total * p.value_scale[2 * at + 1];
            for (int64_t d = 0; d < p.size; d++) y[d] += weight * p.values[at * p.size + d] + least;
        }
    }
}

__m512 sixteen(const uint8_t* codes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes))); }

/* v2: codes are made floats once for the heads that share them, with vectors; a score is a sum across lanes. */
void shared(Problem& p, int) {
    std::vector<float> weights(p.context * p.group), totals(p.group), offsets(p.group), sums(p.group);
    for (int64_t head = 0; head < p.heads; head++) {
        const float* q = &p.queries[head * p.group * p.size];
        float* y = &p.y[head * p.group * p.size];
        for (int64_t g = 0; g < p.group; g++) {
            totals[g] = offsets[g] = sums[g] = 0;
            for (int64_t d = 0; d < p.size; d++) sums[g] += q[g * p.size + d];
        }
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head, t), count = p.size / 16;
            __m512 key[8];
            for (int64_t i = 0; i < count; i++) key[i] = sixteen(&p.keys[at * p.size + 16 * i]);
            for (int64_t g = 0; g < p.group; g++) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t i = 0; i < count; i++) sum = _mm512_fmadd_ps(_mm512_loadu_ps(q + g * p.size + 16 * i), key[i], sum);
                float score = _mm512_reduce_add_ps(sum) * p.key_scale[2 * at] + sums[g] * p.key_scale[2 * at + 1];
                float weight = std::exp(score / std::sqrt(float(p.size)));
                totals[g] += weight;
                offsets[g] += weight * p.value_scale[2 * at + 1];
                weights[t * p.group + g] = weight * p.value_scale[2 * at];
            }
        }
        for (int64_t i = 0; i < p.group * p.size; i++) y[i] = 0;
        for (int64_t t = 0; t < p.context; t++) {
            int64_t at = p.cell(head, t);
            for (int64_t i = 0; i < p.size; i += 16) {
                __m512 value = sixteen(&p.values[at * p.size + i]);
                for (int64_t g = 0; g < p.group; g++) {
                    float* to = y + g * p.size + i;
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(weights[t * p.group + g]), value, _mm512_loadu_ps(to)));
                }
            }
        }
        for (int64_t i = 0; i < p.group * p.size; i++) y[i] = (y[i] + offsets[i / p.size]) / totals[i / p.size];
    }
}

/* v3: the library: queries and weights as 16-bit whole numbers, keys turned so that no score is summed across lanes. */
void library(Problem& p, int threads) {
    int32_t position = int32_t(p.context - 1), starts[2] = {0, 1}, length = int32_t(p.context);
    bw_pages pages{p.count, PAGE, p.heads, p.size, p.code, p.code, 0, 0, p.keys.data(), p.values.data(), p.key_scale.data(), p.value_scale.data()};
    bw_batch batch{1, 1, p.count, &position, starts, &length, p.table.data()};
    if (bw_attend(&pages, &batch, p.queries.data(), p.query_heads, 1 / std::sqrt(float(p.size)), 0, p.y.data(), threads) != BW_OK) std::exit(1);
}

Problem make(int64_t context, int64_t query_heads, int64_t heads, int64_t size, int32_t code) {
    Problem p{context, query_heads, heads, query_heads / heads, size, (context + PAGE - 1) / PAGE, code, {}, {}, {}, {}, {}, {}, {}, {}};
    std::mt19937 generator(std::random_device{}());
    std::normal_distribution<float> normal;
    int64_t cells = p.count * heads * PAGE, numbers = cells * size;
    for (auto* codes : {&p.keys, &p.values}) {
        codes->resize(code == BW_BFLOAT16 ? 2 * numbers : code == BW_INT8 ? numbers : numbers / 2);
        for (uint8_t& each : *codes) each = uint8_t(generator());
        for (int64_t i = 0; code == BW_BFLOAT16 && i < numbers; i++) { // of either sign, from 1/2 to 2
            (*codes)[2 * i + 1] = uint8_t((generator() & 0x80) | 0x3f);
        }
    }
    for (auto* scale : {&p.key_scale, &p.value_scale})
        for (int64_t i = 0; code != BW_BFLOAT16 && i < cells; i++) {
            scale->push_back((0.01f + 0.01f * float(generator() % 100) / 100) * (code == BW_INT8 ? 1 : 17));
            scale->push_back((code == BW_INT8 ? -127 : -7.5f) * scale->back());
        }
    for (int64_t i = 0; i < query_heads * size; i++) p.queries.push_back(normal(generator));
    for (int64_t i = 0; i < p.count; i++) p.table.push_back(int32_t(p.count - 1 - i));
    p.y.resize(p.queries.size());
    p.expected = truth(p);
    return p;
}

/* What is timed, and what came of it. */
struct Row {
    const char* name;
    Problem* problem;
    void (*run)(Problem&, int);
    int threads;
    double seconds = 1e9, reading = 1e9, multiplying = 1e9, error = 0;
};

double seconds_of(auto body) {
    auto start = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void time_rows(std::vector<Row>& rows, int rounds) {
    static std::vector<char> other(64 << 20, 1);
    for (int round = 0; round < rounds; round++)
        for (Row& row : rows) {
            Problem& p = *row.problem;
            row.reading = std::min(row.reading, seconds_of([&] { bw_read_memory(other.data(), int64_t(other.size()), row.threads); }));
            row.multiplying = std::min(row.multiplying, seconds_of([&] { bw_multiply(2, MULTIPLIED, row.threads); }));
            row.seconds = std::min(row.seconds, seconds_of([&] { row.run(p, row.threads); }));
            for (size_t i = 0; i < p.y.size(); i++) row.error = std::max(row.error, std::abs(p.y[i] - p.expected[i]));
        }
    for (const Row& row : rows) {
        const Problem& p = *row.problem;
        double rate = p.bytes() / row.seconds / 1e9, reading = double(other.size()) / row.reading / 1e9;
        double products = p.products() / row.seconds / 1e9, most = 256.0 * MULTIPLIED * row.threads / row.multiplying / 1e9;
        if (row.run == library && p.code != BW_BFLOAT16) most *= 2;
        std::printf("%-11s %6ld %7d %9.3f %7.1f %6.0f%% %8.1f %6.0f%% %8.0e\n", row.name, long(p.context), row.threads,
                    row.seconds * 1e3, rate, 100 * rate / reading, products, 100 * products / most, row.error);
        if (!(row.error <= TOLERANCE)) std::exit(1);
    }
}

}  // namespace

int main(int count, char** arguments) {
    int64_t query_heads = count > 3 ? std::atol(arguments[1]) : 14, heads = count > 3 ? std::atol(arguments[2]) : 2;
    int64_t size = count > 3 ? std::atol(arguments[3]) : 64;
    std::vector<int64_t> contexts;
    for (int i = 4; i < count; i++) contexts.push_back(std::atol(arguments[i]));
    if (contexts.empty()) contexts = {2048, 32768};
    if ((size != 64 && size != 128) || query_heads % heads) return 2;
    std::printf("%ld query heads that read %ld, of %ld numbers\n", long(query_heads), long(heads), long(size));
    std::printf("%-11s %6s %7s %9s %7s %7s %8s %7s %8s\n", "", "tokens", "threads", "ms", "GB/s", "of most", "G/s", "of most", "error");
    std::vector<Problem> problems;
    for (int64_t context : contexts)
        for (int code : {int(BW_BFLOAT16), int(BW_INT8), int(BW_INT4)}) problems.push_back(make(context, query_heads, heads, size, code));
    Problem* longest = &problems[problems.size() - 2];
    std::vector<Row> steps{{"v1 plain", longest, plain, 1}, {"v2 shared", longest, shared, 1}, {"v3 library", longest, library, 1}}, rows;
    time_rows(steps, 5);
    static const char* const names[] = {"bfloat16", "int8", "int4"};
    for (size_t i = 0; i < problems.size(); i++)
        for (int threads : {1, 2}) rows.push_back({names[i % 3], &problems[i], library, threads});
    time_rows(rows, 120);
}
