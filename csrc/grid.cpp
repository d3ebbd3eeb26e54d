/* Grids of groups of numbers: checks and threads. The arithmetic is in csrc/ops/grid.h. */
#include <atomic>

#include "isa_table.h"
#include "threads.h"

namespace {

constexpr int64_t PIECE = 1 << 15;  // numbers that are worth handing to another thread

struct Job {
    const bw_grid* grid;
    std::atomic<bool> is_finite{true};
};

struct Pulling {
    const bw_grid* grid;
    const void* gradient;
    float step, *by_scale, *by_zero;
};

bool is_sound(const bw_grid* g, int32_t threads) {
    return g && g->rows >= 0 && g->columns >= 1 && g->group >= 1 && g->dtype >= BW_FLOAT32 && g->dtype <= BW_BFLOAT16 &&
           threads >= 1;
}

bool has_codes(const bw_grid& g) {
    return g.lowest >= -128 && g.highest <= (g.lowest < 0 ? 127 : 255) && g.lowest <= g.highest;
}

int64_t grain(const bw_grid& g) { return PIECE / g.columns + 1; }

}  // namespace

int bw_find_ranges(const bw_grid* grid, int32_t threads) {
    if (!is_sound(grid, threads) || !grid->numbers || !grid->low || !grid->high) return BW_BAD_ARGUMENT;
    Job job{grid};
    bitwright::parallel(threads, grid->rows, grain(*grid), [](void* context, int64_t first, int64_t last, int) {
        Job& j = *static_cast<Job*>(context);
        if (!bw_isa()->find_ranges(j.grid, first, last)) j.is_finite = false;
    }, &job);
    return job.is_finite ? BW_OK : BW_NOT_FINITE;
}

int bw_encode(const bw_grid* grid, int32_t threads) {
    if (!is_sound(grid, threads) || !grid->numbers || !grid->scale || !has_codes(*grid)) return BW_BAD_ARGUMENT;
    if (!grid->codes && !grid->decoded) return BW_BAD_ARGUMENT;
    bw_grid copy = *grid;
    bitwright::parallel(threads, grid->rows, grain(*grid), [](void* context, int64_t first, int64_t last, int) {
        bw_isa()->encode(static_cast<bw_grid*>(context), first, last);
    }, &copy);
    return BW_OK;
}

int bw_decode(const bw_grid* grid, int32_t threads) {
    if (!is_sound(grid, threads) || !grid->codes || !grid->scale || !grid->decoded) return BW_BAD_ARGUMENT;
    bw_grid copy = *grid;
    bitwright::parallel(threads, grid->rows, grain(*grid), [](void* context, int64_t first, int64_t last, int) {
        bw_isa()->decode(static_cast<bw_grid*>(context), first, last);
    }, &copy);
    return BW_OK;
}

int bw_step_offsets(const bw_grid* grid, const void* gradient, float step, float* by_scale, float* by_zero, int32_t threads) {
    if (!is_sound(grid, threads) || !has_codes(*grid) || !grid->numbers || !grid->scale) return BW_BAD_ARGUMENT;
    if (!grid->offset || !gradient || !by_scale || !by_zero) return BW_BAD_ARGUMENT;
    Pulling job{grid, gradient, step, by_scale, by_zero};
    bitwright::parallel(threads, grid->rows, grain(*grid), [](void* context, int64_t first, int64_t last, int) {
        const Pulling& j = *static_cast<Pulling*>(context);
        bw_isa()->step_offsets(j.grid, j.gradient, j.step, first, last, j.by_scale, j.by_zero);
    }, &job);
    return BW_OK;
}
