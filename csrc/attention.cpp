/* Attention over paged keys and values: checks, tiles of rows, threads. The arithmetic is in csrc/ops. */
#include "attention.h"

#include "isa_table.h"
#include "scratch.h"
#include "threads.h"

namespace bitwright {
namespace {

constexpr int64_t FEW_PIECES = 64;  // are put together in less time than another thread takes to begin

thread_local Scratch scratch;

struct Writing {
    const bw_pages* pages;
    const bw_batch* batch;
    const float *keys, *values;
};

void write_sequences(void* context, int64_t first, int64_t last, int) {
    const Writing& w = *static_cast<Writing*>(context);
    int64_t size = w.pages->heads * w.pages->dimension, sequence = 0;
    for (int64_t token = first; token < last; token++) {
        while (token >= w.batch->starts[sequence + 1]) sequence++;
        int64_t position = w.batch->positions[token];
        int64_t page = w.batch->pages[sequence * w.batch->most_pages + position / w.pages->page];
        bw_isa()->write_token(w.pages, w.keys + token * size, w.values + token * size, page, position % w.pages->page);
    }
}

/* The tiles of one sequence and key head; how many. With `tiles` null they are only counted. */
int64_t make_tiles(const bw_batch& b, int64_t sequence, int64_t head, int64_t group, int64_t window, bw_tile* tiles) {
    int64_t rows = (b.starts[sequence + 1] - b.starts[sequence]) * group, count = 0;
    for (int64_t first = 0; first < rows; first += BW_ROWS, count++) {
        if (!tiles) continue;
        int64_t size = rows - first < BW_ROWS ? rows - first : BW_ROWS;
        const int32_t* positions = b.positions + b.starts[sequence];
        int64_t earliest = positions[first / group], context = positions[(first + size - 1) / group] + 1;
        int64_t least = window && earliest + 1 > window ? earliest + 1 - window : 0;
        int64_t chunks = (context + BW_CHUNK - 1) / BW_CHUNK, spans = (chunks + BW_SPAN - 1) / BW_SPAN;
        int64_t pieces = spans - least / BW_CHUNK / BW_SPAN;
        tiles[count] = {sequence, head, first, size, context, least / BW_CHUNK, chunks, 0, pieces};
    }
    return count;
}

}  // namespace

bool is_sound(const bw_pages& p) {
    constexpr int64_t most = int64_t{1} << 31;
    if (p.count < 1 || p.count > most || p.heads < 1 || p.heads > 65536) return false;
    if (p.page != 16 && p.page != 32 && p.page != 64 && p.page != 128) return false;
    if (p.dimension < 1 || p.dimension > BW_MOST_DIMENSION || !p.keys || !p.values) return false;
    bool is_pair = p.key_code == p.value_code || (p.key_code == BW_INT8 && p.value_code == BW_INT4);
    if (p.key_code < BW_FLOAT32 || p.key_code > BW_INT4 || !is_pair) return false;
    if (p.value_code == BW_INT4 && p.dimension % 2) return false;
    return p.key_code < BW_INT8 || (p.key_scale && p.value_scale);
}

bool is_sound(const bw_batch& b, const bw_pages& p) {
    if (b.tokens < 0 || b.sequences < 0 || b.most_pages < 0 || b.tokens > INT32_MAX || b.sequences > INT32_MAX) return false;
    if (b.tokens == 0) return true;
    if (!b.positions || !b.starts || !b.lengths || !b.pages || b.starts[0] != 0) return false;
    for (int64_t s = 0; s < b.sequences; s++) {
        int64_t first = b.starts[s], last = b.starts[s + 1], length = b.lengths[s];
        if (last < first || last > b.tokens || length < last - first || (length + p.page - 1) / p.page > b.most_pages) return false;
        for (int64_t i = first; i < last; i++)
            if (b.positions[i] != length - (last - i)) return false;
        for (int64_t i = 0; i < (length + p.page - 1) / p.page; i++)
            if (b.pages[s * b.most_pages + i] < 0 || b.pages[s * b.most_pages + i] >= p.count) return false;
    }
    return b.sequences > 0 && b.starts[b.sequences] == b.tokens;
}

void write_pages(const bw_pages& pages, const bw_batch& batch, const float* keys, const float* values, int threads) {
    Writing writing{&pages, &batch, keys, values};
    parallel(threads, batch.tokens, 8, write_sequences, &writing);
}

int attend(const bw_pages& pages, const bw_batch& b, const float* queries, int64_t heads, float scale, int64_t window,
           float* output, int threads) {
    int64_t count = 0, pieces = 0, group = heads / pages.heads;
    for (int64_t s = 0; s < b.sequences; s++) count += pages.heads * make_tiles(b, s, 0, group, window, nullptr);
    int64_t stride = (pages.dimension + BW_SLAB - 1) / BW_SLAB * BW_SLAB + 2; /* of a row, at most */
    size_t table = static_cast<size_t>(count) * sizeof(bw_tile);
    char* memory = scratch.take(table);
    if (!memory) return BW_NO_MEMORY;
    bw_tile* tiles = reinterpret_cast<bw_tile*>(memory);
    count = 0;
    for (int64_t s = 0; s < b.sequences; s++)
        for (int64_t head = 0; head < pages.heads; head++) count += make_tiles(b, s, head, group, window, tiles + count);
    for (int64_t i = 0; i < count; i++) {
        tiles[i].first_piece = pieces;
        pieces += tiles[i].pieces;
    }
    bw_attention_job job{&pages, &b, queries, output, heads, window, scale, tiles, nullptr};
    if (threads == 1 || count >= 4 * threads || pieces == count) {
        parallel(threads, count, 1, [](void* context, int64_t first, int64_t last, int) {
            bw_isa()->attend(static_cast<bw_attention_job*>(context), BW_PHASE_WHOLE, first, last);
        }, &job);
        return BW_OK;
    }
    size_t first_part = (table + 63) / 64 * 64;
    memory = scratch.extend(first_part + static_cast<size_t>(pieces * BW_ROWS * stride) * 4, table);
    if (!memory) return BW_NO_MEMORY;
    job.tiles = reinterpret_cast<bw_tile*>(memory);
    job.parts = reinterpret_cast<float*>(memory + first_part);
    parallel(threads, pieces, (pieces + 8 * threads - 1) / (8 * threads), [](void* context, int64_t first, int64_t last, int) {
        bw_isa()->attend(static_cast<bw_attention_job*>(context), BW_PHASE_PIECES, first, last);
    }, &job);
    parallel(pieces < FEW_PIECES ? 1 : threads, count, 1, [](void* context, int64_t first, int64_t last, int) {
        bw_isa()->attend(static_cast<bw_attention_job*>(context), BW_PHASE_FOLDED, first, last);
    }, &job);
    return BW_OK;
}

}  // namespace bitwright

int bw_write_pages(const bw_pages* pages, const bw_batch* batch, const float* keys, const float* values, int32_t threads) {
    if (!pages || !batch || threads < 1 || !bitwright::is_sound(*pages) || !bitwright::is_sound(*batch, *pages))
        return BW_BAD_ARGUMENT;
    if (batch->tokens && (!keys || !values)) return BW_BAD_ARGUMENT;
    bitwright::write_pages(*pages, *batch, keys, values, threads);
    return BW_OK;
}

int bw_attend(const bw_pages* pages, const bw_batch* batch, const float* queries, int64_t heads, float scale,
              int64_t window, float* output, int32_t threads) {
    if (!pages || !batch || threads < 1 || !bitwright::is_sound(*pages) || !bitwright::is_sound(*batch, *pages))
        return BW_BAD_ARGUMENT;
    if (heads < 1 || heads > 65536 || heads % pages->heads || window < 0) return BW_BAD_ARGUMENT;
    if (batch->tokens && (!queries || !output)) return BW_BAD_ARGUMENT;
    return bitwright::attend(*pages, *batch, queries, heads, scale, window, output, threads);
}
