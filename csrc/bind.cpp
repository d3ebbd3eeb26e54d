/* The Python module: every array is an integer address, checked and owned by the caller; the GIL is released. */
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bind.h"

namespace {

/* False: a token that is to be rounded is not finite. */
bool linear(const Weight& weight, uintptr_t x, int32_t dtype, int64_t tokens, uintptr_t bias, int32_t activation_bits,
            int32_t activation_group, uintptr_t y, int32_t threads) {
    int status;
    {
        nb::gil_scoped_release release;
        status = bw_linear(&weight.record, address<const void>(x), dtype, tokens, address<const void>(bias),
                           activation_bits, activation_group, address<void>(y), threads);
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

/* False: a token that is to be rounded is not finite. */
bool norm_linear(uintptr_t x, uintptr_t residual, uintptr_t norm_weight, uintptr_t sum, float epsilon, const Weight& weight,
                 int64_t tokens, uintptr_t bias, int32_t activation_bits, int32_t activation_group, uintptr_t y,
                 int32_t threads) {
    bw_norm norm{address<const void>(x), address<const void>(residual), address<const void>(norm_weight),
                 address<void>(sum), nullptr, weight.record.columns, BW_FLOAT32, epsilon};
    int status;
    {
        nb::gil_scoped_release release;
        status = bw_norm_linear(&norm, &weight.record, tokens, address<const float>(bias), activation_bits,
                                activation_group, address<float>(y), threads);
    }
    if (status == BW_NOT_FINITE) return false;
    check(status);
    return true;
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

void pack_floats(uintptr_t numbers, int32_t dtype, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                 uintptr_t packed, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_pack_floats(address<const void>(numbers), dtype, rows, columns, slots, bits, address<uint8_t>(packed), threads));
}

void look_up(const Weight& weight, uintptr_t ids, int64_t count, uintptr_t y, int32_t threads) {
    nb::gil_scoped_release release;
    check(bw_look_up(&weight.record, address<const int64_t>(ids), count, address<float>(y), threads));
}

bw_grid grid(int64_t rows, int64_t columns, int64_t group, int32_t dtype, uintptr_t numbers) {
    bw_grid made{};
    made.rows = rows, made.columns = columns, made.group = group, made.dtype = dtype;
    made.numbers = address<const void>(numbers);
    return made;
}

/* False: not all numbers are finite. */
bool find_ranges(uintptr_t numbers, int32_t dtype, int64_t rows, int64_t columns, int64_t group, uintptr_t low,
                 uintptr_t high, int32_t threads) {
    bw_grid made = grid(rows, columns, group, dtype, numbers);
    made.low = address<float>(low), made.high = address<float>(high);
    int status;
    {
        nb::gil_scoped_release release;
        status = bw_find_ranges(&made, threads);
    }
    if (status == BW_NOT_FINITE) return false;
    check(status);
    return true;
}

void encode(uintptr_t numbers, int32_t dtype, int64_t rows, int64_t columns, int64_t group, uintptr_t scale, uintptr_t zero,
            uintptr_t offset, bool has_whole_zeros, int32_t lowest, int32_t highest, uintptr_t codes, uintptr_t decoded,
            int32_t threads) {
    bw_grid made = grid(rows, columns, group, dtype, numbers);
    made.offset = address<float>(offset), made.decoded = address<void>(decoded);
    made.scale = address<const float>(scale), made.zero = address<const float>(zero);
    made.has_whole_zeros = has_whole_zeros, made.lowest = lowest, made.highest = highest;
    made.codes = address<uint8_t>(codes);
    nb::gil_scoped_release release;
    check(bw_encode(&made, threads));
}

void decode(uintptr_t codes, int64_t rows, int64_t columns, int64_t group, uintptr_t scale, uintptr_t zero, int32_t lowest,
            int32_t dtype, uintptr_t decoded, int32_t threads) {
    bw_grid made = grid(rows, columns, group, dtype, 0);
    made.scale = address<const float>(scale), made.zero = address<const float>(zero);
    made.lowest = lowest, made.codes = address<uint8_t>(codes), made.decoded = address<void>(decoded);
    nb::gil_scoped_release release;
    check(bw_decode(&made, threads));
}

void step_offsets(uintptr_t numbers, int32_t dtype, int64_t rows, int64_t columns, int64_t group, uintptr_t scale,
                  uintptr_t zero, uintptr_t offset, int32_t lowest, int32_t highest, uintptr_t gradient, float step,
                  uintptr_t by_scale, uintptr_t by_zero, int32_t threads) {
    bw_grid made = grid(rows, columns, group, dtype, numbers);
    made.scale = address<const float>(scale), made.zero = address<const float>(zero);
    made.offset = address<float>(offset), made.lowest = lowest, made.highest = highest;
    nb::gil_scoped_release release;
    check(bw_step_offsets(&made, address<const void>(gradient), step, address<float>(by_scale), address<float>(by_zero),
                          threads));
}

bw_scaling scaling(int64_t rows, int64_t columns, int64_t group, int32_t dtype, int32_t range, uintptr_t weight,
                   uintptr_t scale, uintptr_t divisor) {
    return {rows, columns, group, dtype, range, address<const void>(weight), address<const float>(scale),
            address<const float>(divisor)};
}

void scale_weight(uintptr_t weight, int32_t dtype, int64_t rows, int64_t columns, uintptr_t scale, uintptr_t divisor,
                  uintptr_t scaled, int32_t threads) {
    bw_scaling made = scaling(rows, columns, 1, dtype, BW_RANGE_WIDTH, weight, scale, divisor);
    nb::gil_scoped_release release;
    check(bw_scale_weight(&made, address<void>(scaled), threads));
}

void scaling_gradient(uintptr_t weight, int32_t dtype, int64_t rows, int64_t columns, int64_t group, int32_t range,
                      uintptr_t scale, uintptr_t divisor, uintptr_t rounded, uintptr_t gradient, uintptr_t by_scale,
                      uintptr_t by_divisor, int32_t threads) {
    bw_scaling made = scaling(rows, columns, group, dtype, range, weight, scale, divisor);
    nb::gil_scoped_release release;
    check(bw_scaling_gradient(&made, address<const void>(rounded), address<const void>(gradient), address<float>(by_scale),
                              address<float>(by_divisor), threads));
}

/* -1: a logit is not a number, or the largest is infinite. */
int64_t sample(uintptr_t logits, int64_t count, float temperature, int32_t top_k, float top_p, float min_p, double uniform) {
    bw_sampling sampling{temperature, top_p, min_p, top_k};
    int64_t token = -1;
    int status;
    {
        nb::gil_scoped_release release;
        status = bw_sample(address<const float>(logits), count, &sampling, uniform, &token);
    }
    if (status == BW_NOT_FINITE) return -1;
    check(status);
    return token;
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
    m.def("norm_linear", norm_linear);
    m.def("silu_multiply", silu_multiply);
    m.def("rotate", rotate);
    m.def("pack_floats", pack_floats);
    m.def("look_up", look_up);
    m.def("sample", sample);
    m.def("find_ranges", find_ranges);
    m.def("encode", encode);
    m.def("decode", decode);
    m.def("step_offsets", step_offsets);
    m.def("scale_weight", scale_weight);
    m.def("scaling_gradient", scaling_gradient);
    m.attr("SCALED_ROWS") = BW_SCALED_ROWS;
    bind_decoder(m);
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
