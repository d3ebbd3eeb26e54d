/* What the files that make the Python module share. */
#pragma once

#include <nanobind/nanobind.h>

#include "kernels.h"

namespace nb = nanobind;

template <class T> T* address(uintptr_t value) { return reinterpret_cast<T*>(value); }

inline void check(int status) {
    if (status == BW_NO_MEMORY) throw std::bad_alloc();
    if (status != BW_OK) throw nb::value_error(status == BW_BAD_ARGUMENT ? "an argument is out of range" : "unknown status");
}

struct Weight {
    bw_weight record;

    Weight(int64_t rows, int64_t columns, int64_t slots, int64_t group, int32_t bits, int32_t center,
           int32_t scale_dtype, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t remainder, uintptr_t order,
           uintptr_t levels)
        : record{rows, columns, slots, group, bits, center, scale_dtype, 0, address<const uint8_t>(codes),
                 address<const void>(scale), address<const uint8_t>(zero), address<const float>(remainder),
                 address<const int32_t>(order), address<const float>(levels)} {}
};

/* Pages, and decoders. */
void bind_decoder(nb::module_& m);
