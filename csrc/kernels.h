/* The C ABI of the native kernels: plain records and pointers, no Python, no torch.
 *
 * Every function checks what it is given and returns a status; nothing is converted or copied behind the caller's back.
 * A result does not depend on the number of threads, nor on how many rows are computed together. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum bw_dtype { BW_FLOAT32 = 0, BW_FLOAT16 = 1, BW_BFLOAT16 = 2 };
enum bw_status { BW_OK = 0, BW_BAD_ARGUMENT = 1, BW_NOT_FINITE = 2, BW_NO_MEMORY = 3 };

/* Rows of a weight lie in panels of BW_PANEL, columns ("slots") in blocks of BW_BLOCK; both are padded to whole ones. */
#define BW_PANEL 64
#define BW_BLOCK 32
#define BW_LANES 16
#define BW_LEVELS 16
/* The most slots that may share a scale: 255 * 128 * 65536 < 2^31, so integer sums cannot overflow. */
#define BW_MAX_GROUP 65536

/* A packed weight W [rows, columns].
 *
 * Number (row, slot) is worth (code - zero) * scale, or levels[code] * scale; code is unsigned, of 2 to 8 bits. Of 16 and
 * 32 bits it is a bfloat16 or float32 number times its scale, without zeros.
 * codes: [panels][blocks][4][bits] vectors of 64 bytes; see csrc/ops/unpack.h.
 * scale, zero, remainder: [panels][groups][64]; zero may be NULL (then every zero is `center`), and so may remainder,
 * what a zero point is above the whole number in `zero`.
 * order: [slots], the column of x in each slot, or -1: nothing; NULL: slot is column. */
typedef struct bw_weight {
    int64_t rows, columns, slots, group;
    int32_t bits, center, scale_dtype, reserved;
    const uint8_t* codes;
    const void* scale;
    const uint8_t* zero;
    const float* remainder;
    const int32_t* order;
    const float* levels;
} bw_weight;

/* How many bytes the codes of a weight take; 0 if the numbers make no sense. */
size_t bw_codes_bytes(int64_t rows, int64_t slots, int32_t bits);

/* codes uint8 [rows, columns] into the layout of bw_weight.codes, and back. order as in bw_weight. */
int bw_pack_codes(const uint8_t* codes, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                  const int32_t* order, uint8_t* packed, int32_t threads);
int bw_unpack_codes(const uint8_t* packed, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                    const int32_t* order, uint8_t* codes, int32_t threads);

/* Numbers [rows, columns] of a bw_dtype as codes of 32 bits, or bfloat16 ones of 16. */
int bw_pack_floats(const void* numbers, int32_t dtype, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                   uint8_t* packed, int32_t threads);

/* y float32 [count, columns]: rows `ids` of a weight. */
int bw_look_up(const bw_weight* weight, const int64_t* ids, int64_t count, float* y, int32_t threads);

/* y[tokens, rows] = x[tokens, columns] W^T + bias; x, y and bias have one dtype; rows are contiguous.
 * activation_bits 16: sums in float32 of the activations as they are; 8: each token rounded to int8 by itself (half to
 * even), sums in integers. activation_group, of 8 bits only: slots of a token that share a scale, a multiple of BW_BLOCK;
 * one of it and the weight's group is a multiple of the other, unless the weight has one group; and the weight has no
 * order. 0: a token has one scale. BW_NOT_FINITE: a token that is to be rounded holds NaN or infinity. */
int bw_linear(const bw_weight* weight, const void* x, int32_t dtype, int64_t tokens, const void* bias,
              int32_t activation_bits, int32_t activation_group, void* y, int32_t threads);

/* A root mean square norm of rows [columns]: sum = x + residual if residual is not NULL (else sum is not used), and
 * y = sum / sqrt(mean(sum^2) + epsilon) * weight. All arrays have one dtype; y may be x, and sum may be residual. */
typedef struct bw_norm {
    const void *x, *residual, *weight;
    void *sum, *y;
    int64_t columns;
    int32_t dtype;
    float epsilon;
} bw_norm;

int bw_rms_norm(const bw_norm* norm, int64_t tokens, int32_t threads);

/* y[tokens, rows] = norm(x) W^T + bias, float32: bw_rms_norm and bw_linear, bit for bit, in one pass over each token; the
 * normalized rows are nowhere stored (the norm's y is not used). Its sums, which may be NULL, must lie apart from x and
 * residual. activation_bits, activation_group and BW_NOT_FINITE as in bw_linear. */
int bw_norm_linear(const bw_norm* norm, const bw_weight* weight, int64_t tokens, const float* bias,
                   int32_t activation_bits, int32_t activation_group, float* y, int32_t threads);

/* y = silu(gate) * up, of `count` numbers; y may be gate or up. */
int bw_silu_multiply(const void* gate, const void* up, int32_t dtype, int64_t count, void* y, int32_t threads);

/* Rotary positions, in place: x [tokens, heads, dimension], the halves of each head a pair; cosine and sine float32
 * [position_count, dimension / 2]; positions [tokens]. */
int bw_rotate(void* x, int32_t dtype, int64_t tokens, int64_t heads, int64_t dimension, const float* cosine,
              const float* sine, const int32_t* positions, int32_t position_count, int32_t threads);

/* How numbers lie in pages: as a bw_dtype says, or as codes. */
enum bw_code { BW_INT8 = 3, BW_INT4 = 4 };
#define BW_MOST_DIMENSION 512

/* Keys and values of one layer: [count][heads][page][dimension], `page` (16, 32, 64 or 128) tokens a page. What is
 * rotated is multiplied by an orthonormal Hadamard matrix (of the largest power of two that divides the dimension) before
 * it is stored; queries are too, then, and results are turned back.
 * Codes are unsigned, number = code * scale + least, of int4 two a byte (the even one in the low half; the dimension is
 * even); key_scale, value_scale: [count][heads][page][2], scale and least. Codes of keys and values: both the same, or
 * int8 keys with int4 values. */
typedef struct bw_pages {
    int64_t count, page, heads, dimension;
    int32_t key_code, value_code, key_rotated, value_rotated;
    void *keys, *values;
    float *key_scale, *value_scale;
} bw_pages;

/* Several sequences with new tokens: starts [sequences + 1] in the tokens; positions [tokens]; lengths [sequences] of
 * the contexts with the new tokens; pages [sequences][most_pages], in which the contexts lie. */
typedef struct bw_batch {
    int64_t tokens, sequences, most_pages;
    const int32_t *positions, *starts, *lengths, *pages;
} bw_batch;

/* Puts keys and values, float32 [tokens][heads][dimension], where their positions belong. */
int bw_write_pages(const bw_pages* pages, const bw_batch* batch, const float* keys, const float* values, int32_t threads);

/* output = softmax(scale * queries keys^T) values, float32 [tokens][heads][dimension]: `heads` query heads, a multiple of
 * those of the pages; a token sees the positions up to its own, of those the last `window` (0: all). */
int bw_attend(const bw_pages* pages, const bw_batch* batch, const float* queries, int64_t heads, float scale,
              int64_t window, float* output, int32_t threads);

/* A linear layer of a model: y = (x * input_scale) W^T + bias. activation_bits, activation_group as in bw_linear. */
typedef struct bw_dense {
    const bw_weight* weight;
    const float *bias, *input_scale; /* [rows], [columns]; or NULL */
    int32_t activation_bits, activation_group;
} bw_dense;

/* A block: x += attention(norm(x)), x += down(silu(gate(norm(x))) * up(norm(x))). */
typedef struct bw_layer {
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *query_norm, *key_norm;     /* [dimension], of each head before it is rotated; or NULL */
    bw_dense query, key, value, output, gate, up, down;
    int64_t window;
} bw_layer;

/* A decoder of such blocks. Embeddings are rows of `embedding`, or of embedding_rows [vocabulary, hidden] of a bw_dtype
 * where `embedding` is NULL. Everything between products is float32. With `are_halves`, activations of 16 bits are
 * rounded: before codes to 1/32639 of the largest of their token, before bfloat16 weights to bfloat16. */
typedef struct bw_decoder {
    int64_t layer_count, hidden, intermediate, heads, kv_heads, dimension, vocabulary;
    float epsilon, score_scale;
    int32_t are_halves, embedding_dtype;
    const bw_layer* layers;
    const bw_weight* embedding;
    const void* embedding_rows;
    const float* final_norm; /* [hidden] */
    bw_dense head;
} bw_decoder;

/* What a decoder computes at once: the batch's new tokens `ids`, of which rows `outputs` want logits; cosine and sine
 * [position_count, dimension / 2]; pages: one record a layer. */
typedef struct bw_step {
    bw_batch batch;
    const int64_t* ids;
    const int32_t* outputs;
    int64_t output_count, position_count;
    const float *cosine, *sine;
    const bw_pages* pages;
} bw_step;

/* logits float32 [output_count, vocabulary]. A token whose numbers are not finite makes its own sequence's NaN, and no
 * other's. */
int bw_decode_step(const bw_decoder* decoder, const bw_step* step, float* logits, int32_t threads);

/* How a token is chosen from logits: by chance exp(logit / temperature), among the top_k likeliest (0: all), of those
 * among the fewest that have top_p of the chance together, of those among the ones of min_p times the likeliest's chance.
 * Of equal logits the first counts as likelier. Temperature 0: the likeliest. */
typedef struct bw_sampling {
    float temperature, top_p, min_p;
    int32_t top_k;
} bw_sampling;

/* The token that `uniform` (0 up to, not including, 1) stands for. BW_NOT_FINITE: a logit is NaN, or the largest is not
 * finite. */
int bw_sample(const float* logits, int64_t count, const bw_sampling* sampling, double uniform, int64_t* token);

/* Rounding numbers [rows, columns] of a bw_dtype to whole codes. Runs of `group` columns of a row (the last may be shorter)
 * share a grid; low, high, scale and zero are [rows][groups]. */
typedef struct bw_grid {
    int64_t rows, columns, group;
    int32_t dtype, lowest, highest, has_whole_zeros;
    const void* numbers;
    const float *scale, *zero; /* zero may be NULL: all are 0 */
    float* offset;             /* [rows, columns], in codes: added before rounding; or NULL */
    float *low, *high;
    uint8_t* codes; /* of int8 where `lowest` is below 0 */
    void* decoded;
} bw_grid;

/* The least and the greatest number of each group, from `numbers` into low and high. BW_NOT_FINITE: some are NaN or
 * infinite. */
int bw_find_ranges(const bw_grid* grid, int32_t threads);
/* codes [rows, columns] = clamp(round(number / scale + offset) + zero, lowest, highest), half to even; a scale of 0 divides
 * like 1. Without has_whole_zeros the zero point is added before rounding. Numbers are finite; lowest and highest are of int8
 * or uint8. Where `decoded` is given, what bw_decode makes of the codes is written there, too; `codes` may be NULL then. */
int bw_encode(const bw_grid* grid, int32_t threads);
/* decoded [rows, columns], of `dtype`: (code - zero) * scale, from `codes`. */
int bw_decode(const bw_grid* grid, int32_t threads);

/* From the gradient [rows, columns] (of the numbers' dtype) of what bw_encode and bw_decode make of `numbers`, with whole
 * zeros, to those of its parts: by_scale and by_zero, float32 [rows][groups]. Rounding passes it on, a clamped code does not.
 * The offsets themselves move, by `step` against the sign of their gradient (0 and NaN have none), within -0.5 and 0.5. */
int bw_step_offsets(const bw_grid* grid, const void* gradient, float step, float* by_scale, float* by_zero, int32_t threads);

/* A weight W [rows, columns] of a bw_dtype whose columns are multiplied by `scale` [columns] and whose rows are divided by
 * `divisor` [rows] (each may be NULL: ones), in float32: W s / d, rounded once to its dtype. */
typedef struct bw_scaling {
    int64_t rows, columns, group;
    int32_t dtype, range; /* a bw_range */
    const void* weight;
    const float *scale, *divisor;
} bw_scaling;

int bw_scale_weight(const bw_scaling* scaling, void* scaled, int32_t threads);

/* What the step of a group's grid follows: its largest magnitude, its width with zero in it, or its width. */
enum bw_range { BW_RANGE_MAGNITUDE, BW_RANGE_WITH_ZERO, BW_RANGE_WIDTH };

/* From the gradient g of a rounded weight Q to those of what scaled it, where Q = V + (Q - V) R(V) / R with V = W s / d of
 * a range R of each group: by_scale float32 [chunks][columns], a chunk for BW_SCALED_ROWS rows, whose sum is the gradient
 * of s, and by_divisor [rows] (or NULL), that of d. Gradient and rounded weight have the dtype of W. Extremes that are equal
 * share what is theirs. */
#define BW_SCALED_ROWS 256
int bw_scaling_gradient(const bw_scaling* scaling, const void* rounded, const void* gradient, float* by_scale,
                        float* by_divisor, int32_t threads);

/* The machine's ceilings: read whole MiB of memory; do `rounds` rounds of 16 vector products on every thread (route 0:
 * 1024 int8 multiply-adds a round, 1: 512 of bfloat16, where there are such products, 2: 256 of float32). */
uint32_t bw_read_memory(const void* memory, int64_t bytes, int32_t threads);
uint32_t bw_multiply(int32_t route, int64_t rounds, int32_t threads);

/* Instruction sets, best last. Selecting is not thread-safe: do it once, before any other call. */
int bw_isa_count(void);
const char* bw_isa_name(int index);
int bw_isa_is_supported(int index);
int bw_isa_select(const char* name);
const char* bw_isa_selected(void);

#ifdef __cplusplus
}
#endif
