/* What each file in csrc/isa exports: one table of functions, and nothing else. */
#pragma once

#include <stdint.h>

#include "kernels.h"

/* How products are summed: int8 dot products, bfloat16 pairs, or float32. */
enum bw_route { BW_ROUTE_INTEGER, BW_ROUTE_BFLOAT16, BW_ROUTE_FLOAT32 };

/* Activations as the kernels read them: 32-bit words of four int8, two bfloat16 or one float32.
 * words: [group][tile of BW_TILE tokens, the last one narrower][word of the group][token of the tile];
 * sums: [group][token], int32 or float32, of the rounded tokens. */
typedef struct bw_tokens {
    enum bw_route route;
    int64_t count;
    uint32_t* words;
    void* sums;
    float* scale; /* [token], integer route only */
} bw_tokens;

typedef struct bw_linear_job {
    const bw_weight* weight;
    bw_tokens tokens;
    const void* bias; /* in dtype, as y is */
    void* y;
    int32_t dtype;
} bw_linear_job;

/* One token of x to words, sums and scale; `row` is scratch of 3 * slots floats. Returns a bw_status. */
typedef int (*bw_prepare)(const bw_weight* weight, const void* x, int32_t dtype, int64_t token, bw_tokens* tokens,
                          float* row);
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
#ifndef BW_AHEAD
#define BW_AHEAD 2048 /* bytes */
#endif

/* The table in use. */
const bw_isa_table* bw_isa(void);
