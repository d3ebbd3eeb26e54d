#include "../ops/prelude.h"
#include <immintrin.h>

namespace {
#include "../simd/avx2.h"
#include "../ops/unpack.h"
#include "../ops/kernels.h"
}  // namespace

BW_TABLE(bw_avx2_table, "avx2");
