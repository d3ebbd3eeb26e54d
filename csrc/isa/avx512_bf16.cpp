#define BW_VNNI
#define BW_PAIRS
#include "../ops/prelude.h"
#include <immintrin.h>

namespace {
#include "../simd/avx512.h"
#include "../ops/unpack.h"
#include "../ops/kernels.h"
}  // namespace

BW_TABLE(bw_avx512_bf16_table, "avx512_bf16");
