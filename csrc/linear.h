/* Products of tokens and packed weights, once their arguments are known to be sound. */
#pragma once

#include "kernels.h"

namespace bitwright {

/* One weight that reads some tokens: y [tokens, rows] = (x * input_scale) W^T + bias. */
struct Product {
    const bw_weight* weight;
    const void* bias;         /* of y's dtype, or null */
    const float* input_scale; /* [columns], or null */
    int32_t activation_bits;
    void* y;
};

/* Tokens [count, columns] that several weights read. */
struct Input {
    const void* x;
    int64_t count;
    int32_t x_dtype, y_dtype;
    bool are_halves; /* where activations stay floats, they may be rounded to bfloat16 */
};

constexpr int MOST_PRODUCTS = 4;

bool is_dtype(int32_t dtype);
bool is_sound(const bw_weight& weight);
/* At most MOST_PRODUCTS. BW_NOT_FINITE: some tokens that were to be rounded are not finite; their results are NaN, the
 * others' as they should be. */
int multiply(const Product* products, int count, const Input& input, int threads);
/* Row `id` of a weight, float32. */
void look_up(const bw_weight& weight, int64_t id, float* y);
/* Numbers [first, first + count) of a bw_dtype as float32. */
void read_numbers(const void* numbers, int64_t first, int64_t count, int32_t dtype, float* y);

}  // namespace bitwright
