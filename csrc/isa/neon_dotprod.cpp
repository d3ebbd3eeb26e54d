#define BW_DOTPROD
#include "../ops/prelude.h"
#include <arm_neon.h>

namespace {
#include "../simd/neon.h"
#include "../ops/unpack.h"
#include "../ops/kernels.h"
}  // namespace

BW_TABLE(bw_neon_dotprod_table, "neon_dotprod");
