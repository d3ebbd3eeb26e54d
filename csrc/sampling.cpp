/* A token from logits, without sorting them: what a rank or a share of the chance leaves out is found digit by digit. */
#include <cmath>
#include <cstring>

#include "isa_table.h"
#include "scratch.h"

namespace bitwright {
namespace {

thread_local Scratch scratch;

constexpr int DIGITS[] = {11, 11, 10};  // of a float's 32 bits, from above: chances are not negative, so they order floats
constexpr int MOST_BUCKETS = 1 << 11;

/* Of the tokens whose chance is `least`, the first `equal` are in; all whose chance is larger, too. */
struct Cut {
    float least = 0;
    int64_t equal = INT64_MAX;
};

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

/* The likeliest tokens whose amounts reach `wanted`: an amount is 1 a token, or its chance. Considers what `cut` leaves. */
Cut reach(const float* chances, int64_t count, double wanted, bool by_chance, const Cut& cut) {
    uint32_t prefix = 0, least = bits_of(cut.least);
    int below = 32;
    double above = 0;
    double amounts[MOST_BUCKETS];
    int64_t tokens[MOST_BUCKETS], equal = 0;
    for (int digits : DIGITS) {
        below -= digits;
        std::memset(amounts, 0, sizeof amounts);
        std::memset(tokens, 0, sizeof tokens);
        equal = 0;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = bits_of(chances[i]);
            if (bits < least || (bits == least && equal++ >= cut.equal)) continue;
            if (below + digits < 32 && bits >> (below + digits) != prefix >> (below + digits)) continue;
            uint32_t bucket = bits >> below & ((1u << digits) - 1);
            amounts[bucket] += by_chance ? static_cast<double>(chances[i]) : 1.0;
            tokens[bucket]++;
        }
        int bucket = (1 << digits) - 1, last = -1;
        for (; bucket >= 0; bucket--) {
            if (!tokens[bucket]) continue;
            last = bucket;
            if (above + amounts[bucket] >= wanted) break;
            above += amounts[bucket];
        }
        if (bucket < 0) return cut;  // they do not reach it: all are in
        prefix |= static_cast<uint32_t>(last) << below;
        equal = tokens[last];
    }
    Cut found;
    std::memcpy(&found.least, &prefix, 4);
    double each = by_chance ? static_cast<double>(found.least) : 1.0;
    double ties = each > 0 ? std::ceil((wanted - above) / each) : 1.0;
    found.equal = ties < 1 ? 1 : ties > static_cast<double>(equal) ? equal : static_cast<int64_t>(ties);
    return found;
}

template <class Function> void for_kept(const float* chances, int64_t count, const Cut& cut, float least, Function f) {
    int64_t equal = 0;
    for (int64_t i = 0; i < count; i++) {
        float chance = chances[i];
        if (chance < cut.least || chance < least || (chance == cut.least && equal++ >= cut.equal)) continue;
        if (!f(i, chance)) return;
    }
}

double kept_mass(const float* chances, int64_t count, const Cut& cut, float least) {
    double mass = 0;
    for_kept(chances, count, cut, least, [&](int64_t, float chance) {
        mass += static_cast<double>(chance);
        return true;
    });
    return mass;
}

}  // namespace
}  // namespace bitwright

int bw_sample(const float* logits, int64_t count, const bw_sampling* s, double uniform, int64_t* token) {
    using namespace bitwright;
    if (!logits || !s || !token || count < 1 || !(uniform >= 0 && uniform < 1)) return BW_BAD_ARGUMENT;
    if (!(s->temperature >= 0 && s->temperature < INFINITY) || !(s->top_p > 0 && s->top_p <= 1) || s->top_k < 0 ||
        !(s->min_p >= 0 && s->min_p <= 1))
        return BW_BAD_ARGUMENT;
    float most = bw_isa()->largest(logits, count, token);
    if (!(most - most == 0)) return BW_NOT_FINITE;
    float factor = 1.0f / s->temperature;
    if (!(factor < INFINITY)) return BW_OK;  // temperature 0, or as good as that
    float* chances = reinterpret_cast<float*>(scratch.take(static_cast<size_t>(count) * 4));
    if (!chances) return BW_NO_MEMORY;
    bw_isa()->weigh(logits, count, most, factor, chances);
    Cut cut;
    if (s->top_k > 0 && s->top_k < count) cut = reach(chances, count, s->top_k, false, cut);
    if (s->top_p < 1) cut = reach(chances, count, static_cast<double>(s->top_p) * kept_mass(chances, count, cut, 0), true, cut);
    double left = uniform * kept_mass(chances, count, cut, s->min_p);
    for_kept(chances, count, cut, s->min_p, [&](int64_t i, float chance) {
        if (chance <= 0) return true;
        *token = i;
        left -= static_cast<double>(chance);
        return left >= 0;
    });
    return BW_OK;
}
