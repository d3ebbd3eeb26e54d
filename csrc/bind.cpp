/* The Python module: every array is an integer address, checked and owned by the caller; the GIL is released. */
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace {

template <class T> T* address(uintptr_t value) { return reinterpret_cast<T*>(value); }

const char* reason(int status) {
    switch (status) {
        case BW_BAD_ARGUMENT: return "an argument is out of range";
        case BW_NO_MEMORY: return "out of memory";
        default: return "unknown status";
    }
}

void check(int status) {
    if (status == BW_NO_MEMORY) throw std::bad_alloc();
    if (status != BW_OK) throw nb::value_error(reason(status));
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

/* False: a token that is to be rounded is not finite. */
bool linear(const Weight& weight, uintptr_t x, int32_t dtype, int64_t tokens, uintptr_t bias, int32_t activation_bits,
            uintptr_t y, int32_t threads) {
    int status;
    {
        nb::gil_scoped_release release;
        status = bw_linear(&weight.record, address<const void>(x), dtype, tokens, address<const void>(bias),
                           activation_bits, address<void>(y), threads);
    }
    if (status == BW_NOT_FINITE) return false;
    check(status);
    return true;
}

void pack_codes(uintptr_t codes, int64_t rows, int64_t columns, int64_t slots, int32_t bits, uintptr_t order,
                uintptr_t packed, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_pack_codes(address<const uint8_t>(codes), rows, columns, slots, bits, address<const int32_t>(order),
                        address<uint8_t>(packed), threads));
}

void unpack_codes(uintptr_t packed, int64_t rows, int64_t columns, int64_t slots, int32_t bits, uintptr_t order,
                  uintptr_t codes, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_unpack_codes(address<const uint8_t>(packed), rows, columns, slots, bits, address<const int32_t>(order),
                          address<uint8_t>(codes), threads));
}

void rms_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t sum, uintptr_t y, int64_t tokens,
              int64_t columns, int32_t dtype, float epsilon, int32_t threads) {
    bw_norm norm{address<const void>(x), address<const void>(residual), address<const void>(weight),
                 address<void>(sum), address<void>(y), columns, dtype, epsilon};
    nb::gil_scoped_release release;
    check(bw_rms_norm(&norm, tokens, threads));
}

void silu_multiply(uintptr_t gate, uintptr_t up, int32_t dtype, int64_t count, uintptr_t y, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_silu_multiply(address<const void>(gate), address<const void>(up), dtype, count, address<void>(y), threads));
}

void rotate(uintptr_t x, int32_t dtype, int64_t tokens, int64_t heads, int64_t dimension, uintptr_t cosine,
            uintptr_t sine, uintptr_t positions, int32_t position_count, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_rotate(address<void>(x), dtype, tokens, heads, dimension, address<const float>(cosine),
                    address<const float>(sine), address<const int32_t>(positions), position_count, threads));
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (int i = 0; i < bw_isa_count(); i++)
        if (bw_isa_is_supported(i)) names.emplace_back(bw_isa_name(i));
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::class_<Weight>(m, "Weight")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, uintptr_t, uintptr_t>());
    m.def("linear", linear);
    m.def("pack_codes", pack_codes);
    m.def("unpack_codes", unpack_codes);
    m.def("rms_norm", rms_norm);
    m.def("silu_multiply", silu_multiply);
    m.def("rotate", rotate);
    m.def("read_memory", [](uintptr_t memory, int64_t bytes, int32_t threads) {
        nb::gil_scoped_release release;
        return bw_read_memory(address<const void>(memory), bytes, threads);
    });
    m.def("multiply", [](int32_t route, int64_t rounds, int32_t threads) {
        nb::gil_scoped_release release;
        return bw_multiply(route, rounds, threads);
    });
    m.def("codes_bytes", bw_codes_bytes);
    m.def("supported_isas", supported_isas);
    m.def("select_isa", [](const std::string& name) { return bw_isa_select(name.c_str()) == BW_OK; });
    m.def("selected_isa", [] { return std::string(bw_isa_selected()); });
}
