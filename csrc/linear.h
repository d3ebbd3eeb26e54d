/* Products of tokens and packed weights, once their arguments are known to be sound. */
#pragma once

#include "kernels.h"

namespace bitwright {

/* One weight that reads some tokens: y [tokens, rows] = (x * input_scale) W^T + bias. */
struct Product {
    const bw_weight* weight;
    const void* bias;         /* of y's dtype, or null */
    const float* input_scale; /* [columns], or null */
    int32_t activation_bits, activation_group;
    void* y;
};

/* as_they_are: bfloat16 ones are multiplied as such, all others as float32. rounded: before codes to 16 bits of their
 * token's largest, before bfloat16 weights to bfloat16. */
enum class Precision { as_they_are, rounded };

/* Tokens [count, columns] that several weights read: x, or the norms of float32 rows, taken where they are rounded: the
 * norm's sums, if it has a residual, are apart from what it reads, and its y is not used. */
struct Input {
    const void* x;
    int64_t count;
    int32_t x_dtype, y_dtype;
    Precision precision;           /* of activations that are not rounded to 8 bits */
    const bw_norm* norm = nullptr;
};

constexpr int MOST_PRODUCTS = 4;

bool is_dtype(int32_t dtype);
bool is_sound(const bw_weight& weight);
/* Whether what the weight reads can be rounded so; see bw_linear. */
bool can_read(const bw_weight& weight, int32_t activation_bits, int32_t activation_group);
/* At most MOST_PRODUCTS. BW_NOT_FINITE: some tokens that were to be rounded are not finite; their results are NaN, the
 * others' as they should be. */
int multiply(const Product* products, int count, const Input& input, int threads);
/* Two products of equal rows, float32; the first one's y becomes silu(y) times the other's. */
int multiply_gated(const Product& gate, const Product& up, const Input& input, int threads);
/* Row `id` of a weight, float32. */
void look_up(const bw_weight& weight, int64_t id, float* y);
/* Numbers [first, first + count) of a bw_dtype as float32. */
void read_numbers(const void* numbers, int64_t first, int64_t count, int32_t dtype, float* y);

}  // namespace bitwright
