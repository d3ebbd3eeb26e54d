/* Norms, activations, rotary positions and packed embeddings: checks and threads. The arithmetic is in csrc/ops. */
#include <cstring>

#include "isa_table.h"
#include "threads.h"

namespace {

constexpr int64_t PIECE = 4096;  // numbers that are worth handing to another thread

bool is_dtype(int32_t dtype) { return dtype >= BW_FLOAT32 && dtype <= BW_BFLOAT16; }

struct Gating {
    const void *gate, *up;
    int32_t dtype;
    int64_t count;
    void* y;
};

struct Turning {
    void* x;
    int32_t dtype;
    int64_t heads, dimension;
    const float *cosine, *sine;
    const int32_t* positions;
};

}  // namespace

int bw_rms_norm(const bw_norm* norm, int64_t tokens, int32_t threads) {
    if (!norm || !is_dtype(norm->dtype) || norm->columns < 1 || tokens < 0 || threads < 1) return BW_BAD_ARGUMENT;
    if (tokens == 0) return BW_OK;
    if (!norm->x || !norm->weight || !norm->y || (norm->residual && !norm->sum)) return BW_BAD_ARGUMENT;
    bw_norm copy = *norm;
    int64_t grain = PIECE / norm->columns + 1;
    bitwright::parallel(threads, tokens, grain, [](void* context, int64_t first, int64_t last, int) {
        for (int64_t token = first; token < last; token++) bw_isa()->rms_norm(static_cast<bw_norm*>(context), token);
    }, &copy);
    return BW_OK;
}

int bw_silu_multiply(const void* gate, const void* up, int32_t dtype, int64_t count, void* y, int32_t threads) {
    if (!is_dtype(dtype) || count < 0 || threads < 1 || (count && (!gate || !up || !y))) return BW_BAD_ARGUMENT;
    Gating gating{gate, up, dtype, count, y};
    bitwright::parallel(threads, (count + PIECE - 1) / PIECE, 1, [](void* context, int64_t first, int64_t last, int) {
        const Gating& g = *static_cast<Gating*>(context);
        int64_t end = last * PIECE < g.count ? last * PIECE : g.count;
        bw_isa()->silu_multiply(g.gate, g.up, g.dtype, first * PIECE, end, g.y);
    }, &gating);
    return BW_OK;
}

int bw_rotate(void* x, int32_t dtype, int64_t tokens, int64_t heads, int64_t dimension, const float* cosine,
              const float* sine, const int32_t* positions, int32_t position_count, int32_t threads) {
    if (!is_dtype(dtype) || tokens < 0 || heads < 1 || dimension < 2 || dimension % 2 || threads < 1) return BW_BAD_ARGUMENT;
    if (tokens && (!x || !cosine || !sine || !positions)) return BW_BAD_ARGUMENT;
    for (int64_t token = 0; token < tokens; token++)
        if (positions[token] < 0 || positions[token] >= position_count) return BW_BAD_ARGUMENT;
    Turning turning{x, dtype, heads, dimension, cosine, sine, positions};
    bitwright::parallel(threads, tokens, PIECE / (heads * dimension) + 1,
                        [](void* context, int64_t first, int64_t last, int) {
        const Turning& t = *static_cast<Turning*>(context);
        for (int64_t token = first; token < last; token++) {
            int64_t at = t.positions[token] * (t.dimension / 2);
            bw_isa()->rotate(t.x, t.dtype, token * t.heads * t.dimension, t.heads, t.dimension, t.cosine + at, t.sine + at);
        }
    }, &turning);
    return BW_OK;
}
