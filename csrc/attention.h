/* Attention and its pages, once their arguments are known to be sound. */
#pragma once

#include "kernels.h"

namespace bitwright {

bool is_sound(const bw_pages& pages);
/* Positions are those at the ends of the contexts; every page that a context lies in exists. */
bool is_sound(const bw_batch& batch, const bw_pages& pages);
void write_pages(const bw_pages& pages, const bw_batch& batch, const float* keys, const float* values, int threads);
int attend(const bw_pages& pages, const bw_batch& batch, const float* queries, int64_t heads, float scale,
           int64_t window, float* output, int threads);

}  // namespace bitwright
