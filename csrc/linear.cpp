/* Linear layers: checks, scratch memory, blocks of tokens, threads. The arithmetic is in csrc/ops. */
#include "linear.h"

#include <atomic>

#include "isa_table.h"
#include "scratch.h"
#include "threads.h"

namespace bitwright {
namespace {

thread_local Scratch scratch;

constexpr int64_t MOST_PANELS = 4; // of a piece: the last one is waited for

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

/* Slots whose products are summed together. */
int64_t group_of(const Product& p) {
    bool are_parts = p.activation_group && p.activation_group < p.weight->group;
    return are_parts ? p.activation_group : p.weight->group;
}

/* Whether two products read the same words. */
bool read_alike(const Product& a, const Product& b, const Input& input) {
    const bw_weight &v = *a.weight, &w = *b.weight;
    return v.columns == w.columns && v.slots == w.slots && group_of(a) == group_of(b) && !v.order && !w.order &&
           a.activation_group == b.activation_group && a.input_scale == b.input_scale &&
           route_of(a, input) == route_of(b, input) && !v.zero == !w.zero && v.center == w.center;
}

struct Preparation {
    const Product* product;
    const Input* input;
    int64_t first; /* of the block of tokens */
    bw_tokens* tokens;
    float* rows;
    std::atomic<int>* status;
    bool writes_sums; /* of the norm: one of those who take it */
};

/* A norm from number `first` of its rows on. */
bw_norm part_of(const bw_norm& whole, int64_t first, bool writes_sums) {
    bw_norm part = whole;
    part.x = static_cast<const float*>(whole.x) + first;
    part.residual = whole.residual ? static_cast<const float*>(whole.residual) + first : nullptr;
    part.sum = whole.sum && writes_sums ? static_cast<float*>(whole.sum) + first : nullptr;
    return part;
}

void prepare_tokens(void* context, int64_t first, int64_t last, int worker) {
    const Preparation& p = *static_cast<Preparation*>(context);
    const bw_weight& w = *p.product->weight;
    float* row = p.rows + (3 * w.slots + w.columns) * worker;
    int64_t passed = p.first * w.columns; /* numbers before the block */
    bw_norm norm;
    if (p.input->norm) norm = part_of(*p.input->norm, passed, p.writes_sums);
    const char* x = static_cast<const char*>(p.input->x);
    if (x) x += passed * size_of(p.input->x_dtype);
    bw_source source{x, p.input->norm ? &norm : nullptr, p.product->input_scale, p.input->x_dtype};
    for (int64_t token = first; token < last; token++) {
        int status = bw_isa()->prepare(&w, &source, token, p.tokens, row);
        if (status != BW_OK) p.status->store(status);
    }
}

/* Memory of a product's words, sums and scales. */
struct Room {
    size_t words, sums, scales;
    Room(const Product& p, bw_route route, int64_t count) {
        int64_t per_word = route == BW_ROUTE_FLOAT32 ? 1 : route == BW_ROUTE_BFLOAT16 ? 2 : 4;
        count *= rows_of(route);
        int64_t group = group_of(p), groups = (p.weight->slots + group - 1) / group;
        words = padded(count * p.weight->slots / per_word * 4);
        sums = padded(groups * count * 4);
        scales = p.activation_group ? sums : padded(count * 4);
    }
    size_t bytes() const { return words + sums + scales; }
    void place(bw_tokens& tokens, char* memory) const {
        tokens.words = reinterpret_cast<uint32_t*>(memory);
        tokens.sums = memory + words;
        bool is_rounded = tokens.route == BW_ROUTE_INTEGER || tokens.route == BW_ROUTE_WIDE;
        tokens.scale = is_rounded ? reinterpret_cast<float*>(memory + words + sums) : nullptr;
    }
};

/* Products of one block of tokens. Few tokens are prepared by every worker for itself: that takes less time than waiting
 * until another has done it. More are dealt out. */
struct Block {
    const Product* products;
    int count;
    const Input* input;
    int64_t first, tokens;
    bool is_gated, is_private;
    bw_linear_job jobs[MOST_PRODUCTS];
    int source[MOST_PRODUCTS];   /* the first product that reads the same words */
    int64_t ends[MOST_PRODUCTS]; /* where each job's panels end in those of all */
    int64_t row;                 /* numbers that preparing a token takes */
    size_t words;                /* bytes of all prepared tokens */
    char* memory = nullptr;
    std::atomic<int> status{BW_OK};
    std::atomic<bool> has_sums{false}; /* whether somebody has the sums of the norm to write */

    Block(const Product* given, int number, const Input& from, int64_t begin, int64_t size, bool gates, int threads)
        : products(given), count(number), input(&from), first(begin), tokens(size), is_gated(gates),
          is_private(size < BW_TILE && threads > 1) {
        plan();
    }
    void plan();
    size_t bytes_of_worker() const { return 64 + words + padded(row * 4); }
    void prepare(int threads);
    bool is_ready(int worker) const { return *reinterpret_cast<const bool*>(memory + bytes_of_worker() * worker); }
    void look_ahead(int64_t panel) const;
    void prepare_alone(int worker);
    void place(char* at, bw_linear_job (&placed)[MOST_PRODUCTS]) const;
    void run(int64_t from, int64_t to, int worker);
};

void Block::plan() {
    int64_t total = 0;
    words = 0;
    row = 0;
    for (int i = 0; i < count; i++) {
        const bw_weight& w = *products[i].weight;
        source[i] = i;
        for (int j = i - 1; j >= 0; j--) source[i] = read_alike(products[j], products[i], *input) ? j : source[i];
        bw_route route = route_of(products[i], *input);
        char* y = static_cast<char*>(products[i].y) + first * w.rows * size_of(input->y_dtype);
        bw_tokens empty{route, tokens * rows_of(route), group_of(products[i]), products[i].activation_group, nullptr, nullptr, nullptr};
        jobs[i] = {&w, empty, products[i].bias, y, input->y_dtype};
        ends[i] = total += panels_of(w);
        if (source[i] == i) words += Room(products[i], route, tokens).bytes();
        row = 3 * w.slots + w.columns > row ? 3 * w.slots + w.columns : row;
    }
}

/* The jobs, with their tokens' memory from `at` on. */
void Block::place(char* at, bw_linear_job (&placed)[MOST_PRODUCTS]) const {
    for (int i = 0; i < count; i++) {
        placed[i] = jobs[i];
        if (source[i] != i) {
            placed[i].tokens = placed[source[i]].tokens;
            continue;
        }
        Room room(products[i], jobs[i].tokens.route, tokens);
        room.place(placed[i].tokens, at);
        at += room.bytes();
    }
}

/* For all workers. */
void Block::prepare(int threads) {
    bw_linear_job placed[MOST_PRODUCTS];
    place(memory, placed);
    for (int i = 0; i < count; i++) {
        jobs[i] = placed[i];
        if (source[i] != i) continue;
        Preparation preparation{&products[i], input, first, &jobs[i].tokens, reinterpret_cast<float*>(memory + words), &status, i == 0};
        parallel(threads, tokens, BW_TILE, prepare_tokens, &preparation);
    }
}

/* Asks for the beginning of a panel, so that memory is not idle while tokens are prepared. */
void Block::look_ahead(int64_t panel) const {
    int job = 0;
    while (panel >= ends[job]) job++;
    const bw_weight& w = *jobs[job].weight;
    panel -= job ? ends[job - 1] : 0;
    const uint8_t* codes = w.codes + panel * static_cast<int64_t>(bw_codes_bytes(BW_PANEL, w.slots, w.bits));
    for (int at = 0; at < BW_AHEAD; at += 64) __builtin_prefetch(codes + at);
}

/* For one worker: its memory holds whether it is ready, prepared tokens and a row. */
void Block::prepare_alone(int worker) {
    char* own = memory + bytes_of_worker() * static_cast<size_t>(worker);
    float* scratch_row = reinterpret_cast<float*>(own + 64 + words);
    bw_linear_job placed[MOST_PRODUCTS];
    place(own + 64, placed);
    for (int i = 0; i < count; i++) {
        if (source[i] != i) continue;
        bool writes_sums = i == 0 && !has_sums.exchange(true);
        Preparation preparation{&products[i], input, first, &placed[i].tokens, scratch_row, &status, writes_sums};
        prepare_tokens(&preparation, 0, tokens, 0);
    }
    *reinterpret_cast<bool*>(own) = true;
}

/* Panels [from, to) of all products one after the other; of gated ones those of both at once. */
void Block::run(int64_t from, int64_t to, int worker) {
    bw_linear_job own[MOST_PRODUCTS];
    if (is_private) {
        if (!is_ready(worker)) {
            look_ahead(from);
            prepare_alone(worker);
        }
        place(memory + bytes_of_worker() * static_cast<size_t>(worker) + 64, own);
    }
    const bw_linear_job* placed = is_private ? own : jobs;
    if (is_gated) {
        int64_t rows = placed[0].weight->rows, begin = from * BW_PANEL, end = to * BW_PANEL < rows ? to * BW_PANEL : rows;
        for (int i = 0; i < 2; i++) bw_isa()->panels(&placed[i], from, to);
        for (int64_t token = 0; token < tokens; token++)
            bw_isa()->silu_multiply(placed[0].y, placed[1].y, BW_FLOAT32, token * rows + begin, token * rows + end, placed[0].y);
        return;
    }
    for (int64_t job = 0, begin = 0; from < to; begin = ends[job++]) {
        if (from >= ends[job]) continue;
        int64_t end = to < ends[job] ? to : ends[job];
        bw_isa()->panels(&placed[job], from - begin, end - begin);
        from = end;
    }
}

/* Tokens [first, first + tokens), at most BW_TOKENS. */
int run_block(Block& block, int threads) {
    size_t shared = block.words + padded(threads * block.row * 4), all = block.bytes_of_worker() * static_cast<size_t>(threads);
    block.memory = scratch.take(block.is_private ? all : shared);
    if (!block.memory) return BW_NO_MEMORY;
    if (!block.is_private) block.prepare(threads);
    else
        for (int worker = 0; worker < threads; worker++)
            *reinterpret_cast<bool*>(block.memory + block.bytes_of_worker() * static_cast<size_t>(worker)) = false;
    int64_t total = block.is_gated ? block.ends[0] : block.ends[block.count - 1], grain = total / (threads * 8);
    if (grain > MOST_PANELS) grain = MOST_PANELS;
    if (block.tokens >= BW_TILE) grain = 1; /* a panel takes long, and what is left of one thread's part others wait for */
    parallel(threads, total, grain, [](void* context, int64_t from, int64_t to, int worker) {
        static_cast<Block*>(context)->run(from, to, worker);
    }, &block);
    return block.status.load();
}

int run_blocks(const Product* products, int count, const Input& input, bool is_gated, int threads) {
    int status = BW_OK;
    int64_t most = BW_TOKENS;
    for (int i = 0; i < count; i++) most = BW_TOKENS / rows_of(route_of(products[i], input)) < most ? BW_TOKENS / 2 : most;
    int64_t blocks = (input.count + most - 1) / most; /* of equal sizes, in whole tiles */
    int64_t size = blocks ? ((input.count + blocks - 1) / blocks + BW_TILE - 1) / BW_TILE * BW_TILE : most;
    for (int64_t first = 0; first < input.count; first += size) {
        int64_t tokens = input.count - first < size ? input.count - first : size;
        Block block(products, count, input, first, tokens, is_gated, threads);
        int found = run_block(block, threads);
        if (found == BW_NO_MEMORY) return found;
        if (found != BW_OK) status = found;
    }
    return status;
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

bool can_read(const bw_weight& w, int32_t bits, int32_t group) {
    if (bits == 16) return group == 0;
    if (bits != 8 || w.levels || w.bits > 8) return false;
    if (group == 0) return true;
    if (group < BW_BLOCK || group % BW_BLOCK || w.order) return false;
    return w.group >= w.slots || group % w.group == 0 || w.group % group == 0;
}

int multiply(const Product* products, int count, const Input& input, int threads) {
    return run_blocks(products, count, input, false, threads);
}

int multiply_gated(const Product& gate, const Product& up, const Input& input, int threads) {
    const Product both[] = {gate, up};
    return run_blocks(both, 2, input, true, threads);
}

}  // namespace bitwright

int bw_linear(const bw_weight* w, const void* x, int32_t dtype, int64_t tokens, const void* bias,
              int32_t activation_bits, int32_t activation_group, void* y, int32_t threads) {
    using namespace bitwright;
    if (!w || !is_sound(*w) || !is_dtype(dtype) || tokens < 0 || threads < 1) return BW_BAD_ARGUMENT;
    if (!can_read(*w, activation_bits, activation_group)) return BW_BAD_ARGUMENT;
    if (tokens > 0 && (!x || !y)) return BW_BAD_ARGUMENT;
    Product product{w, bias, nullptr, activation_bits, activation_group, y};
    return multiply(&product, 1, {x, tokens, dtype, dtype, Precision::as_they_are}, threads < MAX_THREADS ? threads : MAX_THREADS);
}

int bw_norm_linear(const bw_norm* norm, const bw_weight* w, int64_t tokens, const float* bias, int32_t activation_bits,
                   int32_t activation_group, float* y, int32_t threads) {
    using namespace bitwright;
    if (!norm || !w || !is_sound(*w) || norm->columns != w->columns || norm->dtype != BW_FLOAT32) return BW_BAD_ARGUMENT;
    if (tokens < 0 || threads < 1) return BW_BAD_ARGUMENT;
    if (!can_read(*w, activation_bits, activation_group)) return BW_BAD_ARGUMENT;
    if (tokens > 0 && (!norm->x || !norm->weight || !y)) return BW_BAD_ARGUMENT;
    if (norm->sum && (norm->sum == norm->x || norm->sum == norm->residual)) return BW_BAD_ARGUMENT;
    Product product{w, bias, nullptr, activation_bits, activation_group, y};
    Input input{nullptr, tokens, BW_FLOAT32, BW_FLOAT32, Precision::as_they_are, norm};
    return multiply(&product, 1, input, threads < MAX_THREADS ? threads : MAX_THREADS);
}
