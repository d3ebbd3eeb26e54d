/* Linear layers: checks, scratch memory, blocks of tokens, threads. The arithmetic is in csrc/ops. */
#include "linear.h"

#include <atomic>

#include "isa_table.h"
#include "scratch.h"
#include "threads.h"

namespace bitwright {
namespace {

thread_local Scratch scratch;

constexpr int64_t MOST_PANELS = 16; // of a piece: the last one is waited for

int64_t size_of(int32_t dtype) { return dtype == BW_FLOAT32 ? 4 : 2; }
int64_t panels_of(const bw_weight& w) { return (w.rows + BW_PANEL - 1) / BW_PANEL; }
size_t padded(int64_t bytes) { return static_cast<size_t>((bytes + 63) / 64 * 64); }

bw_route route_of(const Product& p, const Input& input) {
    if (p.activation_bits == 8) return BW_ROUTE_INTEGER;
    bool is_rounded = input.precision == Precision::rounded, are_pairs = is_rounded || input.x_dtype == BW_BFLOAT16;
    if (p.weight->levels || p.weight->bits == 32) return BW_ROUTE_FLOAT32;
    if (is_rounded && p.weight->bits <= 8) return BW_ROUTE_WIDE;
    return are_pairs && bw_isa()->has_bfloat16 ? BW_ROUTE_BFLOAT16 : BW_ROUTE_FLOAT32;
}

/* How many rows of words a token becomes. */
int rows_of(bw_route route) { return route == BW_ROUTE_WIDE ? 2 : 1; }

/* Whether two products read the same words. */
bool read_alike(const Product& a, const Product& b, const Input& input) {
    const bw_weight &v = *a.weight, &w = *b.weight;
    return v.columns == w.columns && v.slots == w.slots && v.group == w.group && !v.order && !w.order &&
           a.input_scale == b.input_scale && route_of(a, input) == route_of(b, input);
}

struct Preparation {
    const Product* product;
    const Input* input;
    int64_t first; /* of the block of tokens */
    bw_tokens* tokens;
    float* rows;
    std::atomic<int>* status;
};

void prepare_tokens(void* context, int64_t first, int64_t last, int worker) {
    const Preparation& p = *static_cast<Preparation*>(context);
    const bw_weight& w = *p.product->weight;
    float* row = p.rows + (3 * w.slots + w.columns) * worker;
    const char* x = static_cast<const char*>(p.input->x) + p.first * w.columns * size_of(p.input->x_dtype);
    for (int64_t token = first; token < last; token++) {
        int status = bw_isa()->prepare(&w, x, p.input->x_dtype, token, p.product->input_scale, p.tokens, row);
        if (status != BW_OK) p.status->store(status);
    }
}

struct Panels {
    bw_linear_job jobs[MOST_PRODUCTS];
    int64_t ends[MOST_PRODUCTS]; /* where each job's panels end in those of all */
};

void run_panels(void* context, int64_t first, int64_t last, int) {
    const Panels& p = *static_cast<Panels*>(context);
    for (int64_t job = 0, begin = 0; first < last; begin = p.ends[job++]) {
        if (first >= p.ends[job]) continue;
        int64_t end = last < p.ends[job] ? last : p.ends[job];
        bw_isa()->panels(&p.jobs[job], first - begin, end - begin);
        first = end;
    }
}

/* Memory of a product's words, sums and scales. */
struct Room {
    size_t words, sums, scales;
    Room(const Product& p, bw_route route, int64_t count) {
        int64_t per_word = route == BW_ROUTE_FLOAT32 ? 1 : route == BW_ROUTE_BFLOAT16 ? 2 : 4;
        count *= rows_of(route);
        int64_t groups = (p.weight->slots + p.weight->group - 1) / p.weight->group;
        words = padded(count * p.weight->slots / per_word * 4);
        sums = padded(groups * count * 4);
        scales = padded(count * 4);
    }
    size_t bytes() const { return words + sums + scales; }
    void place(bw_tokens& tokens, char* memory) const {
        tokens.words = reinterpret_cast<uint32_t*>(memory);
        tokens.sums = memory + words;
        bool is_rounded = tokens.route == BW_ROUTE_INTEGER || tokens.route == BW_ROUTE_WIDE;
        tokens.scale = is_rounded ? reinterpret_cast<float*>(memory + words + sums) : nullptr;
    }
};

/* Tokens [first, first + tokens), at most BW_TOKENS. */
int run_block(const Product* products, int count, const Input& input, int64_t first, int64_t tokens, int threads) {
    Panels panels;
    int source[MOST_PRODUCTS];
    size_t wanted = 0;
    int64_t row = 0, total = 0;
    for (int i = 0; i < count; i++) {
        const bw_weight& w = *products[i].weight;
        source[i] = i;
        for (int j = i - 1; j >= 0; j--) source[i] = read_alike(products[j], products[i], input) ? j : source[i];
        bw_route route = route_of(products[i], input);
        char* y = static_cast<char*>(products[i].y) + first * w.rows * size_of(input.y_dtype);
        panels.jobs[i] = {&w, {route, tokens * rows_of(route), nullptr, nullptr, nullptr}, products[i].bias, y, input.y_dtype};
        panels.ends[i] = total += panels_of(w);
        if (source[i] == i) wanted += Room(products[i], route, tokens).bytes();
        row = 3 * w.slots + w.columns > row ? 3 * w.slots + w.columns : row;
    }
    char* memory = scratch.take(wanted + padded(threads * row * 4));
    if (!memory) return BW_NO_MEMORY;
    std::atomic<int> status{BW_OK};
    float* rows = reinterpret_cast<float*>(memory + wanted);
    for (int i = 0; i < count; i++) {
        bw_tokens& own = panels.jobs[i].tokens;
        if (source[i] != i) {
            own = panels.jobs[source[i]].tokens;
            continue;
        }
        Room room(products[i], own.route, tokens);
        room.place(own, memory);
        memory += room.bytes();
        Preparation preparation{&products[i], &input, first, &own, rows, &status};
        parallel(tokens < BW_TILE ? 1 : threads, tokens, BW_TILE, prepare_tokens, &preparation);
    }
    int64_t grain = total / (threads * 8);
    parallel(threads, total, grain < MOST_PANELS ? grain : MOST_PANELS, run_panels, &panels);
    return status.load();
}

}  // namespace

bool is_dtype(int32_t dtype) { return dtype >= BW_FLOAT32 && dtype <= BW_BFLOAT16; }

bool is_sound(const bw_weight& w) {
    if (!bw_codes_bytes(w.rows, w.slots, w.bits) || w.columns < 1 || (!w.order && w.slots < w.columns)) return false;
    if (w.group < BW_BLOCK || w.group % BW_BLOCK || w.group > BW_MAX_GROUP || w.columns > INT32_MAX) return false;
    if (w.center < 0 || w.center > 255 || (w.levels && w.bits > 4) || (w.remainder && !w.zero)) return false;
    if (w.bits > 8 && w.zero) return false;
    return w.codes && w.scale && is_dtype(w.scale_dtype);
}

int multiply(const Product* products, int count, const Input& input, int threads) {
    int status = BW_OK;
    int64_t most = BW_TOKENS;
    for (int i = 0; i < count; i++) most = BW_TOKENS / rows_of(route_of(products[i], input)) < most ? BW_TOKENS / 2 : most;
    for (int64_t first = 0; first < input.count; first += most) {
        int64_t tokens = input.count - first < most ? input.count - first : most;
        int found = run_block(products, count, input, first, tokens, threads);
        if (found == BW_NO_MEMORY) return found;
        if (found != BW_OK) status = found;
    }
    return status;
}

}  // namespace bitwright

int bw_linear(const bw_weight* w, const void* x, int32_t dtype, int64_t tokens, const void* bias,
              int32_t activation_bits, void* y, int32_t threads) {
    using namespace bitwright;
    if (!w || !is_sound(*w) || !is_dtype(dtype) || tokens < 0 || threads < 1) return BW_BAD_ARGUMENT;
    if (activation_bits != 16 && (activation_bits != 8 || w->levels || w->bits > 8)) return BW_BAD_ARGUMENT;
    if (tokens > 0 && (!x || !y)) return BW_BAD_ARGUMENT;
    Product product{w, bias, nullptr, activation_bits, y};
    return multiply(&product, 1, {x, tokens, dtype, dtype, Precision::as_they_are}, threads < MAX_THREADS ? threads : MAX_THREADS);
}
