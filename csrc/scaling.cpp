/* Scaled weights and their gradients: checks and threads. The arithmetic is in csrc/ops/scaling.h. */
#include <cstdlib>

#include "isa_table.h"
#include "threads.h"

namespace {

bool is_sound(const bw_scaling* s, int32_t threads) {
    return s && s->rows >= 0 && s->columns >= 1 && s->group >= 1 && s->group <= s->columns && s->dtype >= BW_FLOAT32 &&
           s->dtype <= BW_BFLOAT16 && s->range >= BW_RANGE_MAGNITUDE && s->range <= BW_RANGE_WIDTH && threads >= 1 &&
           (!s->rows || s->weight);
}

struct Scaled {
    const bw_scaling* scaling;
    void* scaled;
};

struct Pulled {
    const bw_scaling* scaling;
    const void *rounded, *gradient;
    float *by_scale, *by_divisor, *scratch;
};

}  // namespace

int bw_scale_weight(const bw_scaling* scaling, void* scaled, int32_t threads) {
    if (!is_sound(scaling, threads) || (scaling->rows && !scaled)) return BW_BAD_ARGUMENT;
    Scaled job{scaling, scaled};
    bitwright::parallel(threads, scaling->rows, 16, [](void* context, int64_t first, int64_t last, int) {
        const Scaled& j = *static_cast<Scaled*>(context);
        bw_isa()->scale_rows(j.scaling, j.scaled, first, last);
    }, &job);
    return BW_OK;
}

int bw_scaling_gradient(const bw_scaling* scaling, const void* rounded, const void* gradient, float* by_scale,
                        float* by_divisor, int32_t threads) {
    if (!is_sound(scaling, threads) || (scaling->rows && (!rounded || !gradient || !by_scale))) return BW_BAD_ARGUMENT;
    if (threads > bitwright::MAX_THREADS) threads = bitwright::MAX_THREADS;
    size_t part = 3 * static_cast<size_t>(scaling->group);
    auto* scratch = static_cast<float*>(std::malloc(part * sizeof(float) * static_cast<size_t>(threads)));
    if (!scratch) return BW_NO_MEMORY;
    Pulled job{scaling, rounded, gradient, by_scale, by_divisor, scratch};
    int64_t chunks = (scaling->rows + BW_SCALED_ROWS - 1) / BW_SCALED_ROWS;
    bitwright::parallel(threads, chunks, 1, [](void* context, int64_t first, int64_t last, int worker) {
        const Pulled& j = *static_cast<Pulled*>(context);
        for (int64_t chunk = first; chunk < last; chunk++) {
            int64_t start = chunk * BW_SCALED_ROWS, end = start + BW_SCALED_ROWS, rows = j.scaling->rows;
            bw_isa()->pull_back(j.scaling, j.rounded, j.gradient, start, end < rows ? end : rows,
                                j.by_scale + chunk * j.scaling->columns, j.by_divisor,
                                j.scratch + 3 * j.scaling->group * worker);
        }
    }, &job);
    std::free(scratch);
    return BW_OK;
}
