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
 * Number (row, slot) is worth (code - zero) * scale, or levels[code] * scale; code is unsigned.
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

/* y[tokens, rows] = x[tokens, columns] W^T + bias; x, y and bias have one dtype; rows are contiguous.
 * activation_bits 16: sums in float32 of the activations as they are; 8: each token rounded to int8 by itself (one
 * scale, half to even), sums in integers. BW_NOT_FINITE: a token that is to be rounded holds NaN or infinity. */
int bw_linear(const bw_weight* weight, const void* x, int32_t dtype, int64_t tokens, const void* bias,
              int32_t activation_bits, void* y, int32_t threads);

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

/* y = silu(gate) * up, of `count` numbers; y may be gate or up. */
int bw_silu_multiply(const void* gate, const void* up, int32_t dtype, int64_t count, void* y, int32_t threads);

/* Rotary positions, in place: x [tokens, heads, dimension], the halves of each head a pair; cosine and sine float32
 * [position_count, dimension / 2]; positions [tokens]. */
int bw_rotate(void* x, int32_t dtype, int64_t tokens, int64_t heads, int64_t dimension, const float* cosine,
              const float* sine, const int32_t* positions, int32_t position_count, int32_t threads);

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
