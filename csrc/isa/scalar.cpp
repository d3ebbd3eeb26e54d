#define BW_PLAIN 1
#include "../ops/prelude.h"

namespace {
#include "../simd/scalar.h"
#include "../ops/unpack.h"
#include "../ops/kernels.h"
}  // namespace

BW_TABLE(bw_scalar_table, "scalar");
