/* Linear layers: checks, scratch memory, blocks of tokens, threads. The arithmetic is in csrc/ops. */
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "isa_table.h"
#include "threads.h"

namespace {

bool is_dtype(int32_t dtype) { return dtype >= BW_FLOAT32 && dtype <= BW_BFLOAT16; }

bool is_sound(const bw_weight& w) {
    if (!bw_codes_bytes(w.rows, w.slots, w.bits) || w.columns < 1 || (!w.order && w.slots < w.columns)) return false;
    if (w.group < BW_BLOCK || w.group % BW_BLOCK || w.group > BW_MAX_GROUP || w.columns > INT32_MAX) return false;
    if (w.center < 0 || w.center > 255 || (w.levels && w.bits > 4) || (w.remainder && !w.zero)) return false;
    return w.codes && w.scale && is_dtype(w.scale_dtype);
}

/* Memory that a thread keeps from call to call, so that a token's product asks the system for none. */
struct Scratch {
    struct Release {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<char, Release> bytes;
    size_t size = 0;

    char* take(size_t wanted) {
        if (wanted <= size) return bytes.get();
        bytes.reset();
        size = (wanted + 4095) / 4096 * 4096;
        bytes.reset(static_cast<char*>(std::aligned_alloc(64, size)));
        if (!bytes) size = 0;
        return bytes.get();
    }
};
thread_local Scratch scratch;

struct Preparation {
    const bw_weight* weight;
    const char* x;
    int32_t dtype;
    bw_tokens* tokens;
    float* rows;
    std::atomic<int> status{BW_OK};
};

void prepare_tokens(void* context, int64_t first, int64_t last, int worker) {
    Preparation& p = *static_cast<Preparation*>(context);
    float* row = p.rows + 3 * p.weight->slots * worker;
    for (int64_t token = first; token < last; token++) {
        int status = bw_isa()->prepare(p.weight, p.x, p.dtype, token, p.tokens, row);
        if (status != BW_OK) p.status.store(status);
    }
}

void run_panels(void* context, int64_t first, int64_t last, int) {
    bw_isa()->panels(static_cast<const bw_linear_job*>(context), first, last);
}

size_t padded(int64_t bytes) { return static_cast<size_t>((bytes + 63) / 64 * 64); }

/* At most BW_TOKENS tokens. */
int run_block(const bw_weight* w, const char* x, bw_linear_job job, int32_t threads) {
    int64_t groups = (w->slots + w->group - 1) / w->group, panels = (w->rows + BW_PANEL - 1) / BW_PANEL;
    int64_t per_word = job.tokens.route == BW_ROUTE_INTEGER ? 4 : job.tokens.route == BW_ROUTE_BFLOAT16 ? 2 : 1;
    int64_t count = job.tokens.count;
    size_t words = padded(count * w->slots / per_word * 4), sums = padded(groups * count * 4), scales = padded(count * 4);
    char* memory = scratch.take(words + sums + scales + padded(threads * 3 * w->slots * 4));
    if (!memory) return BW_NO_MEMORY;
    job.tokens.words = reinterpret_cast<uint32_t*>(memory);
    job.tokens.sums = memory + words;
    job.tokens.scale = per_word == 4 ? reinterpret_cast<float*>(memory + words + sums) : nullptr;
    Preparation preparation{w, x, job.dtype, &job.tokens, reinterpret_cast<float*>(memory + words + sums + scales)};
    bitwright::parallel(count < BW_TILE ? 1 : threads, count, BW_TILE, prepare_tokens, &preparation);
    if (preparation.status.load() != BW_OK) return preparation.status.load();
    int64_t pieces = count <= 4 ? threads * 4 : threads * 8;
    bitwright::parallel(threads, panels, panels / pieces, run_panels, &job);
    return BW_OK;
}

}  // namespace

int bw_linear(const bw_weight* w, const void* x, int32_t dtype, int64_t tokens, const void* bias,
              int32_t activation_bits, void* y, int32_t threads) {
    if (!w || !is_sound(*w) || !is_dtype(dtype) || tokens < 0 || threads < 1) return BW_BAD_ARGUMENT;
    if (activation_bits != 16 && (activation_bits != 8 || w->levels)) return BW_BAD_ARGUMENT;
    if (tokens > 0 && (!x || !y)) return BW_BAD_ARGUMENT;
    if (threads > bitwright::MAX_THREADS) threads = bitwright::MAX_THREADS;
    bool has_pairs = dtype == BW_BFLOAT16 && bw_isa()->has_bfloat16 && !w->levels;
    bw_route route = activation_bits == 8 ? BW_ROUTE_INTEGER : has_pairs ? BW_ROUTE_BFLOAT16 : BW_ROUTE_FLOAT32;
    int64_t size = dtype == BW_FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < tokens; first += BW_TOKENS) {
        int64_t count = tokens - first < BW_TOKENS ? tokens - first : BW_TOKENS;
        bw_linear_job job{w, {route, count, nullptr, nullptr, nullptr}, bias, nullptr, dtype};
        job.y = static_cast<char*>(y) + first * w->rows * size;
        int status = run_block(w, static_cast<const char*>(x) + first * w->columns * size, job, threads);
        if (status != BW_OK) return status;
    }
    return BW_OK;
}
