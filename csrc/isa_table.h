/* What each file in csrc/isa exports: one table of functions, and nothing else. */
#pragma once

#include <stdint.h>

#include "kernels.h"

/* How products are summed: int8 dot products, bfloat16 pairs, or float32; wide: two int8 dot products, of the high and
 * the low halves of tokens that are rounded to 16 bits. */
enum bw_route { BW_ROUTE_INTEGER, BW_ROUTE_BFLOAT16, BW_ROUTE_FLOAT32, BW_ROUTE_WIDE };

/* Activations as the kernels read them: 32-bit words of four int8, two bfloat16 or one float32.
 * words: [group][tile of bw_tile_width tokens, the last one may be narrower][word of the group][token of the tile];
 * sums: [group][token], int32 or float32, of the rounded tokens; int32 ones times -center if the weight has no zeros. */
typedef struct bw_tokens {
    enum bw_route route;
    int64_t count; /* on the wide route two for each token of x, its high halves first */
    int64_t group; /* slots whose products are summed together: they share a scale of the weight, and of the token */
    int64_t scale_group; /* slots of a token that share a scale: whole groups, or 0: all */
    uint32_t* words;
    void* sums;
    float* scale; /* integer and wide routes only: [token of x], or with a scale_group [group][token] */
} bw_tokens;

typedef struct bw_linear_job {
    const bw_weight* weight;
    bw_tokens tokens;
    const void* bias; /* in dtype, as y is */
    void* y;
    int32_t dtype;
} bw_linear_job;

/* Up to BW_ROWS consecutive rows (token after token of a sequence, within a token the query heads that read key head
 * `head`), and the chunks [first_chunk, chunks) of the `context` tokens that they see. */
typedef struct bw_tile {
    int64_t sequence, head, first, rows, context, first_chunk, chunks;
    int64_t first_piece, pieces; /* the number of its first span among those of all tiles, and how many it has */
} bw_tile;

typedef struct bw_attention_job {
    const bw_pages* pages;
    const bw_batch* batch;
    const float* queries; /* [token][heads][dimension], as output is */
    float* output;
    int64_t heads, window;
    float scale;
    const bw_tile* tiles;
    float* parts; /* of single spans, where they are dealt out to threads */
} bw_attention_job;

/* What is dealt out: whole tiles; or single spans of all tiles, and then tiles, whose spans are put together. */
enum bw_phase { BW_PHASE_WHOLE, BW_PHASE_PIECES, BW_PHASE_FOLDED };

/* What tokens are made of: x [tokens, columns], or norms of float32 rows where `norm` is not NULL, whose sums are written
 * where there is a residual and a place for them, and whose y is not used; times input_scale [columns] if that is not NULL. */
typedef struct bw_source {
    const void* x;
    const bw_norm* norm;
    const float* input_scale;
    int32_t dtype;
} bw_source;

/* One token to words, sums and scale; `row` is scratch of columns + 3 * slots floats. Returns a bw_status. */
typedef int (*bw_prepare)(const bw_weight* weight, const bw_source* source, int64_t token, bw_tokens* tokens, float* row);
/* Panels [first, last) of a product. */
typedef void (*bw_panels)(const bw_linear_job* job, int64_t first, int64_t last);

typedef struct bw_isa_table {
    const char* name;
    int has_bfloat16; /* the bfloat16 route exists */
    bw_prepare prepare;
    bw_panels panels;
    void (*rms_norm)(const bw_norm* norm, int64_t token);
    void (*silu_multiply)(const void* gate, const void* up, int32_t dtype, int64_t first, int64_t last, void* y);
    void (*rotate)(void* x, int32_t dtype, int64_t first, int64_t heads, int64_t dimension, const float* cosine,
                   const float* sine);
    void (*write_token)(const bw_pages* pages, const float* keys, const float* values, int64_t page, int64_t offset);
    void (*attend)(const bw_attention_job* job, enum bw_phase phase, int64_t first, int64_t last);
    float (*largest)(const float* x, int64_t count, int64_t* index);
    void (*weigh)(const float* x, int64_t count, float largest, float factor, float* y);
    bool (*find_ranges)(const bw_grid* grid, int64_t first, int64_t last); /* false: not all are finite */
    void (*encode)(const bw_grid* grid, int64_t first, int64_t last);
    void (*decode)(const bw_grid* grid, int64_t first, int64_t last);
    void (*step_offsets)(const bw_grid* grid, const void* gradient, float step, int64_t first, int64_t last,
                         float* by_scale, float* by_zero);
    void (*scale_rows)(const bw_scaling* scaling, void* scaled, int64_t first, int64_t last);
    void (*pull_back)(const bw_scaling* scaling, const void* rounded, const void* gradient, int64_t first, int64_t last,
                      float* by_scale, float* by_divisor, float* scratch);
    uint32_t (*read_memory)(const void* memory, int64_t bytes);
    uint32_t (*multiply)(enum bw_route route, int64_t rounds);
} bw_isa_table;

#ifdef __cplusplus
extern "C" {
#endif
extern const bw_isa_table bw_scalar_table;
extern const bw_isa_table bw_avx2_table;
extern const bw_isa_table bw_avx512_table;
extern const bw_isa_table bw_avx512_vnni_table;
extern const bw_isa_table bw_avx512_bf16_table;
extern const bw_isa_table bw_neon_table;
extern const bw_isa_table bw_neon_dotprod_table;
#ifdef __cplusplus
}
#endif

/* The most tokens of one job: their sums of a panel stay in the second-level cache, beside the weights. */
#define BW_TOKENS 240
#define BW_TILE 6
/* How many tokens a tile has: of as few tiles as can be, of about equal sizes, as narrow ones are slow. */
static inline int64_t bw_tile_width(int64_t tokens) {
    int64_t tiles = (tokens + BW_TILE - 1) / BW_TILE;
    return tiles ? (tokens + tiles - 1) / tiles : 1;
}
/* The largest 16-bit activation: its high half, to the nearest, is at most 127. */
#define BW_MOST_WIDE (127 * 256 + 127)
/* Tokens of a context whose scores are taken together, and rows of a tile of attention. */
#define BW_CHUNK 128
#define BW_ROWS 16
/* Chunks that are folded by themselves, and may be another thread's than those before. */
#define BW_SPAN 4
/* Numbers of a head are padded to a multiple of this where codes are read. */
#define BW_SLAB 64
#ifndef BW_AHEAD
#define BW_AHEAD 4096 /* bytes */
#endif

/* The table in use. */
const bw_isa_table* bw_isa(void);
