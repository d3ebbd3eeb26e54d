/* How a token is chosen from the logits of a large vocabulary, step by step.
 *
 *     sampling [VOCABULARY]
 *
 * In every way of choosing: all in float64, sorted; the same in float32; plain vectors and selection instead of sorting;
 * the library, which selects by digits of the numbers. A choice is right if the number that it was drawn by lies in the
 * token's part of all that is left, by the sums in float64; `error` is how far outside it was at most. One thread; beside
 * a loop that only reads as much. Processor times are the least of rounds in which all take turns. Needs AVX-512. */
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "../kernels.h"
#include "clock.h"

namespace {

constexpr int ROUNDS = 12;
constexpr double TOLERANCE = 1e-4;

struct Problem {
    std::vector<float> logits, chances, ranked;
    std::vector<int32_t> order;
    std::vector<double> exact;  // what is left of each token's chance, by the truth
    double mass = 0;            // the sum of it
};

/* v0: in float64, by the definition; what a choice is checked against. */
void truth(Problem& p, const bw_sampling& s) {
    int64_t count = int64_t(p.logits.size());
    float most = *std::max_element(p.logits.begin(), p.logits.end());
    std::vector<double> chances(count);
    for (int64_t i = 0; i < count; i++)
        chances[i] = s.temperature > 0 ? std::exp((double(p.logits[i]) - most) / s.temperature) : p.logits[i] == most;
    std::iota(p.order.begin(), p.order.end(), 0);
    std::stable_sort(p.order.begin(), p.order.end(), [&](int32_t a, int32_t b) { return p.logits[a] > p.logits[b]; });
    int64_t left = s.temperature > 0 ? (s.top_k && s.top_k < count ? s.top_k : count) : 1;
    double all = 0, sum = 0;
    for (int64_t i = 0; i < left; i++) all += chances[p.order[i]];
    p.exact.assign(count, 0);
    p.mass = 0;
    for (int64_t i = 0; i < left && (s.top_p == 1 || sum < s.top_p * all); i++) {
        double chance = chances[p.order[i]];
        sum += chance;
        if (chance < s.min_p) break;
        p.exact[p.order[i]] = chance;
        p.mass += chance;
    }
}

/* The token among those with a chance of at least `least` that `uniform` stands for. */
int64_t draw(const Problem& p, float least, double uniform) {
    double left = 0;
    for (float chance : p.chances) left += chance >= least ? chance : 0;
    left *= uniform;
    int64_t last = 0;
    for (size_t i = 0; i < p.chances.size(); i++) {
        if (!(p.chances[i] >= least) || p.chances[i] == 0) continue;
        last = int64_t(i);
        left -= p.chances[i];
        if (left < 0) break;
    }
    return last;
}

int64_t likeliest(const Problem& p) { return std::max_element(p.logits.begin(), p.logits.end()) - p.logits.begin(); }

/* v1: plain C++: chances, sorted from the largest, cut where the first rule says. */
int64_t sorted(Problem& p, const bw_sampling& s, double uniform) {
    if (s.temperature == 0) return likeliest(p);
    float most = p.logits[likeliest(p)];
    for (size_t i = 0; i < p.logits.size(); i++) p.chances[i] = std::exp((p.logits[i] - most) / s.temperature);
    p.ranked = p.chances;
    std::sort(p.ranked.begin(), p.ranked.end(), std::greater<float>());
    size_t left = s.top_k && size_t(s.top_k) < p.ranked.size() ? s.top_k : p.ranked.size(), kept = 0;
    double all = std::accumulate(p.ranked.begin(), p.ranked.begin() + left, 0.0), sum = 0;
    while (kept < left && (s.top_p == 1 || sum < double(s.top_p) * all)) sum += p.ranked[kept++];
    return draw(p, std::max(p.ranked[kept - 1], s.min_p), uniform);
}

/* The largest logit, in vectors. */
float largest(const Problem& p) {
    size_t count = p.logits.size(), whole = count / 16 * 16;
    __m512 high = _mm512_set1_ps(-INFINITY);
    for (size_t i = 0; i < whole; i += 16) high = _mm512_max_ps(high, _mm512_loadu_ps(&p.logits[i]));
    float most = _mm512_reduce_max_ps(high);
    for (size_t i = whole; i < count; i++) most = std::max(most, p.logits[i]);
    return most;
}

/* v2: chances in vectors; the likeliest by selection, more and more of them until they are enough. */
int64_t selected(Problem& p, const bw_sampling& s, double uniform) {
    float most = largest(p);
    if (s.temperature == 0) return std::find(p.logits.begin(), p.logits.end(), most) - p.logits.begin();
    size_t count = p.logits.size(), whole = count / 16 * 16;
    const __m512 factor = _mm512_set1_ps(1.44269504f / s.temperature);
    for (size_t i = 0; i < whole; i += 16) {
        __m512 power = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(&p.logits[i]), _mm512_set1_ps(most)), factor);
        __m512 near = _mm512_roundscale_ps(power, 0), rest = _mm512_mul_ps(_mm512_sub_ps(power, near), _mm512_set1_ps(0.693147181f));
        __m512 sum = _mm512_set1_ps(1.0f / 720);
        for (float each : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(each));
        _mm512_storeu_ps(&p.chances[i], _mm512_scalef_ps(sum, near));
    }
    for (size_t i = whole; i < count; i++) p.chances[i] = std::exp((p.logits[i] - most) / s.temperature);
    float least = 0;
    auto first = p.ranked.begin(), end = first + int64_t(count);
    if ((s.top_k && size_t(s.top_k) < count) || s.top_p < 1) p.ranked = p.chances, first = p.ranked.begin(), end = p.ranked.end();
    if (s.top_k && size_t(s.top_k) < count) {
        std::nth_element(first, first + s.top_k - 1, end, std::greater<float>());
        end = first + s.top_k;
        least = end[-1];
    }
    if (s.top_p < 1) {
        double wanted = double(s.top_p) * std::accumulate(first, end, 0.0), sum = 0;
        for (int64_t some = 64; sum < wanted && first != end; some *= 2) {
            auto next = first + std::min<int64_t>(some, end - first);
            if (next != end) std::nth_element(first, next - 1, end, std::greater<float>());
            std::sort(first, next, std::greater<float>());
            for (; first != next && sum < wanted; ++first) sum += least = *first;
        }
    }
    return draw(p, std::max(least, s.min_p), uniform);
}

/* v3: the library. */
int64_t library(Problem& p, const bw_sampling& s, double uniform) {
    int64_t token;
    if (bw_sample(p.logits.data(), int64_t(p.logits.size()), &s, uniform, &token) != BW_OK) std::exit(1);
    return token;
}

/* How far `uniform` is outside of the token's part of what is left; 1 for a token that is not left. */
double error_of(const Problem& p, int64_t token, double uniform) {
    if (p.exact[token] == 0) return 1;
    double before = std::accumulate(p.exact.begin(), p.exact.begin() + token, 0.0) / p.mass, part = p.exact[token] / p.mass;
    return std::max({0.0, before - uniform, uniform - before - part});
}

void climb(Problem& p, const char* name, const bw_sampling& s, std::mt19937& generator) {
    const struct { const char* name; int64_t (*run)(Problem&, const bw_sampling&, double); } versions[] = {
        {"v1 sorted", sorted}, {"v2 selected", selected}, {"v3 library", library}};
    static std::vector<char> other(8 << 20, 1);
    double least[3] = {1e9, 1e9, 1e9}, error[3] = {}, reading = 1e9, bytes = double(p.logits.size()) * 4;
    truth(p, s);
    for (int round = 0; round < ROUNDS; round++) {
        double uniform = std::uniform_real_distribution<double>()(generator);
        for (int v = 0; v < 3; v++) {
            int64_t token = 0;
            reading = std::min(reading, seconds_of([&] { bw_read_memory(other.data(), int64_t(other.size()), 1); }));
            least[v] = std::min(least[v], seconds_of([&] { token = versions[v].run(p, s, uniform); }));
            error[v] = std::max(error[v], error_of(p, token, uniform));
        }
    }
    double most = double(other.size()) / reading / 1e9;
    for (int v = 0; v < 3; v++) {
        double rate = bytes / least[v] / 1e9;
        std::printf("%-16s %-12s %9.3f %7.1f %6.0f%% %9.1e\n", name, versions[v].name, least[v] * 1e3, rate, 100 * rate / most, error[v]);
        if (!(error[v] <= TOLERANCE)) std::exit(1);
    }
}

}  // namespace

int main(int count, char** arguments) {
    int64_t vocabulary = count > 1 ? std::atol(arguments[1]) : 151936;
    if (vocabulary < 2) return 2;
    std::mt19937 generator(std::random_device{}());
    std::normal_distribution<float> normal(0, 2.5f);
    Problem p;
    p.logits.resize(vocabulary), p.chances.resize(vocabulary), p.ranked.resize(vocabulary), p.order.resize(vocabulary);
    for (float& logit : p.logits) logit = normal(generator);
    for (int i = 0; i < 8; i++) p.logits[generator() % vocabulary] = 14 + float(i) / 4;  // what a model is fairly sure of
    std::printf("%ld logits, %s\n%-16s %-12s %9s %7s %7s %9s\n", long(vocabulary), bw_isa_selected(), "", "", "ms", "GB/s", "of most", "error");
    const struct { const char* name; bw_sampling rules; } ways[] = {
        {"likeliest", {0, 1, 0, 0}}, {"temperature 0.8", {0.8f, 1, 0, 0}}, {"top-k 50", {1, 1, 0, 50}},
        {"top-p 0.9", {1, 0.9f, 0, 0}}, {"min-p 0.05", {1, 1, 0.05f, 0}}, {"k, p and min-p", {1, 0.9f, 0.05f, 50}},
    };
    for (const auto& way : ways) climb(p, way.name, way.rules, generator);
}
