/* All layers of a decoder for one step: checks, then one operation after the other, each dealt out to the threads. */
#include <initializer_list>
#include <utility>

#include "attention.h"
#include "isa_table.h"
#include "linear.h"
#include "scratch.h"
#include "threads.h"

namespace bitwright {
namespace {

thread_local Scratch scratch;

constexpr int64_t MOST_TOKENS = 1 << 20;
constexpr int64_t PIECE = 4096;  // numbers that are worth handing to another thread

bool fits(const bw_dense& d, int64_t rows, int64_t columns) {
    if (!d.weight || !is_sound(*d.weight) || d.weight->rows != rows || d.weight->columns != columns) return false;
    return can_read(*d.weight, d.activation_bits, d.activation_group);
}

bool fits(const bw_layer& l, const bw_decoder& d) {
    int64_t queries = d.heads * d.dimension, keys = d.kv_heads * d.dimension;
    if (!l.attention_norm || !l.mlp_norm || l.window < 0) return false;
    return fits(l.query, queries, d.hidden) && fits(l.key, keys, d.hidden) && fits(l.value, keys, d.hidden) &&
           fits(l.output, d.hidden, queries) && fits(l.gate, d.intermediate, d.hidden) &&
           fits(l.up, d.intermediate, d.hidden) && fits(l.down, d.hidden, d.intermediate);
}

bool is_size(int64_t size) { return size >= 1 && size <= 1 << 24; }

bool is_complete(const bw_decoder& d) {
    for (int64_t size : {d.layer_count, d.hidden, d.intermediate, d.heads, d.kv_heads, d.vocabulary})
        if (!is_size(size)) return false;
    if (d.heads > 65536 || d.heads % d.kv_heads || d.dimension < 2 || d.dimension % 2 || d.dimension > BW_MOST_DIMENSION)
        return false;
    if (!d.layers || !d.final_norm || !fits(d.head, d.vocabulary, d.hidden)) return false;
    if (d.embedding ? !is_sound(*d.embedding) || d.embedding->rows != d.vocabulary || d.embedding->columns != d.hidden
                    : !d.embedding_rows || !is_dtype(d.embedding_dtype))
        return false;
    for (int64_t i = 0; i < d.layer_count; i++)
        if (!fits(d.layers[i], d)) return false;
    return true;
}

bool fits(const bw_step& s, const bw_decoder& d) {
    if (!s.pages || s.batch.tokens > MOST_TOKENS || s.output_count < 0 || s.output_count > s.batch.tokens) return false;
    for (int64_t i = 0; i < d.layer_count; i++) {
        const bw_pages& p = s.pages[i];
        if (!is_sound(p) || p.heads != d.kv_heads || p.dimension != d.dimension || p.page != s.pages[0].page) return false;
        if (!is_sound(s.batch, p)) return false;
    }
    if (s.batch.tokens == 0) return true;
    if (!s.ids || !s.cosine || !s.sine || (s.output_count && !s.outputs)) return false;
    for (int64_t i = 0; i < s.batch.tokens; i++)
        if (s.ids[i] < 0 || s.ids[i] >= d.vocabulary || s.batch.positions[i] < 0 || s.batch.positions[i] >= s.position_count)
            return false;
    for (int64_t i = 0; i < s.output_count; i++)
        if (s.outputs[i] < 0 || s.outputs[i] >= s.batch.tokens) return false;
    return true;
}

/* Where the numbers of a step lie between its operations. */
struct Rooms {
    float *hidden, *next, *normed, *branch, *query, *key, *value, *mixed, *gate, *up;

    bool take(const bw_decoder& d, int64_t tokens) {
        const int64_t wide = d.intermediate, queries = d.heads * d.dimension, keys = d.kv_heads * d.dimension;
        const int64_t sizes[] = {d.hidden, d.hidden, d.hidden, d.hidden, queries, keys, keys, queries, wide, wide};
        float** const places[] = {&hidden, &next, &normed, &branch, &query, &key, &value, &mixed, &gate, &up};
        int64_t total = 0;
        for (int64_t size : sizes) total += (size * tokens + 15) / 16 * 16;
        char* memory = scratch.take(static_cast<size_t>(total) * sizeof(float));
        if (!memory) return false;
        for (int i = 0; i < 10; i++) {
            *places[i] = reinterpret_cast<float*>(memory);
            memory += (sizes[i] * tokens + 15) / 16 * 16 * static_cast<int64_t>(sizeof(float));
        }
        return true;
    }
};

struct Run {
    const bw_decoder& decoder;
    const bw_step& step;
    Rooms rooms;
    int threads;
    const bw_layer* layer = nullptr;

    Input input(const float* x, int64_t tokens) const {
        return {x, tokens, BW_FLOAT32, BW_FLOAT32, decoder.are_halves ? Precision::rounded : Precision::as_they_are};
    }
};

template <class Body> void for_tokens(const Run& run, int64_t count, int64_t numbers, Body body) {
    struct Context {
        Body* body;
    } context{&body};
    parallel(run.threads, count, PIECE / numbers + 1, [](void* c, int64_t first, int64_t last, int) {
        for (int64_t token = first; token < last; token++) (*static_cast<Context*>(c)->body)(token);
    }, &context);
}

void embed(const Run& run) {
    const bw_decoder& d = run.decoder;
    for_tokens(run, run.step.batch.tokens, d.hidden, [&](int64_t token) {
        float* to = run.rooms.hidden + token * d.hidden;
        int64_t id = run.step.ids[token];
        if (d.embedding) return look_up(*d.embedding, id, to);
        read_numbers(d.embedding_rows, id * d.hidden, d.hidden, d.embedding_dtype, to);
    });
}

/* What products of norm(hidden + branch) read, without a branch of norm(hidden); their sum is then `hidden`. Tokens are
 * normalized where they are rounded. */
struct Normed {
    bw_norm norm;
    Input input;

    Normed(Run& run, const float* branch, const float* weight) {
        const bw_decoder& d = run.decoder;
        Rooms& r = run.rooms;
        norm = {r.hidden, branch, weight, r.next, nullptr, d.hidden, BW_FLOAT32, d.epsilon};
        input = run.input(nullptr, run.step.batch.tokens);
        input.norm = &norm;
        if (branch) std::swap(r.hidden, r.next);
    }
    Normed(const Normed&) = delete;
    Normed& operator=(const Normed&) = delete;
};

Product product_of(const bw_dense& d, float* y) {
    return {d.weight, d.bias, d.input_scale, d.activation_bits, d.activation_group, y};
}

/* Products of one input; what is not finite goes on as NaN, in its own rows. */
bool apply(const Run& run, std::initializer_list<Product> products, const Input& input) {
    return multiply(products.begin(), static_cast<int>(products.size()), input, run.threads) != BW_NO_MEMORY;
}

/* Norms of single heads, and rotary positions. */
void turn_heads(const Run& run) {
    const bw_decoder& d = run.decoder;
    int64_t half = d.dimension / 2;
    for_tokens(run, run.step.batch.tokens, (d.heads + d.kv_heads) * d.dimension, [&](int64_t token) {
        const float *cosine = run.step.cosine + run.step.batch.positions[token] * half;
        const float *sine = run.step.sine + run.step.batch.positions[token] * half;
        const struct { float* x; int64_t heads; const float* norm; } both[] = {
            {run.rooms.query, d.heads, run.layer->query_norm}, {run.rooms.key, d.kv_heads, run.layer->key_norm}};
        for (const auto& part : both) {
            bw_norm norm{part.x, nullptr, part.norm, nullptr, part.x, d.dimension, BW_FLOAT32, d.epsilon};
            for (int64_t head = token * part.heads; part.norm && head < (token + 1) * part.heads; head++)
                bw_isa()->rms_norm(&norm, head);
            bw_isa()->rotate(part.x, BW_FLOAT32, token * part.heads * d.dimension, part.heads, d.dimension, cosine, sine);
        }
    });
}

bool run_layer(Run& run, int64_t index) {
    const bw_decoder& d = run.decoder;
    const bw_layer& l = run.decoder.layers[index];
    const bw_step& s = run.step;
    const Rooms& r = run.rooms;
    const bw_pages& pages = s.pages[index];
    int64_t tokens = s.batch.tokens;
    run.layer = &l;
    Normed first(run, index ? r.branch : nullptr, l.attention_norm);
    if (!apply(run, {product_of(l.query, r.query), product_of(l.key, r.key), product_of(l.value, r.value)}, first.input))
        return false;
    turn_heads(run);
    write_pages(pages, s.batch, r.key, r.value, run.threads);
    if (attend(pages, s.batch, r.query, d.heads, d.score_scale, l.window, r.mixed, run.threads) != BW_OK) return false;
    if (!apply(run, {product_of(l.output, r.branch)}, run.input(r.mixed, tokens))) return false;
    Normed second(run, r.branch, l.mlp_norm);
    if (multiply_gated(product_of(l.gate, r.gate), product_of(l.up, r.up), second.input, run.threads) == BW_NO_MEMORY) return false;
    return apply(run, {product_of(l.down, r.branch)}, run.input(r.gate, tokens));
}

/* The logits of the rows that want them. */
bool run_head(const Run& run, float* logits) {
    const bw_decoder& d = run.decoder;
    const bw_step& s = run.step;
    for (int64_t i = 0; i < s.output_count; i++) { /* gathered in places that nothing reads any more */
        int64_t row = s.outputs[i] * d.hidden;
        bw_norm norm{run.rooms.hidden + row, run.rooms.branch + row, d.final_norm, run.rooms.normed + i * d.hidden,
                     run.rooms.normed + i * d.hidden, d.hidden, BW_FLOAT32, d.epsilon};
        bw_isa()->rms_norm(&norm, 0);
    }
    return apply(run, {product_of(d.head, logits)}, run.input(run.rooms.normed, s.output_count));
}

}  // namespace
}  // namespace bitwright

int bw_decode_step(const bw_decoder* decoder, const bw_step* step, float* logits, int32_t threads) {
    using namespace bitwright;
    if (!decoder || !step || threads < 1 || !is_complete(*decoder) || !fits(*step, *decoder)) return BW_BAD_ARGUMENT;
    if (step->output_count && !logits) return BW_BAD_ARGUMENT;
    if (step->batch.tokens == 0) return BW_OK;
    Run run{*decoder, *step, {}, threads < MAX_THREADS ? threads : MAX_THREADS};
    if (!run.rooms.take(*decoder, step->batch.tokens)) return BW_NO_MEMORY;
    embed(run);
    for (int64_t i = 0; i < decoder->layer_count; i++)
        if (!run_layer(run, i)) return BW_NO_MEMORY;
    return run_head(run, logits) ? BW_OK : BW_NO_MEMORY;
}
