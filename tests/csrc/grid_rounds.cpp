/* Numbers to codes and back, and scaled weights: arbitrary bytes, hostile arguments. */
#include <cmath>

#include "rounds.h"

void grid_round() {
    int64_t rows = draw(0, 5), columns = draw(1, 90), group = draw(1, 100), groups = (columns + group - 1) / group;
    int64_t size[] = {4, 2, 2};
    int32_t dtype = draw32(0, 2), threads = draw32(1, 3), lowest = draw32(-128, 20);
    int32_t highest = lowest < 0 ? draw32(0, 127) : draw32(20, 255);
    size_t bytes = static_cast<size_t>(rows * columns * size[dtype]), parts = static_cast<size_t>(rows * groups * 4);
    Bytes given(bytes), decoded(bytes), codes(static_cast<size_t>(rows * columns));
    Bytes scale(parts), zero(parts), low(parts), high(parts), offset(static_cast<size_t>(rows * columns * 4));
    bw_grid grid{rows, columns, group, dtype, lowest, highest, draw32(0, 1), given.as<void>(), scale.as<float>(),
                 draw(0, 1) ? zero.as<float>() : nullptr, draw(0, 1) ? offset.as<float>() : nullptr, low.as<float>(), high.as<float>(), codes.as<uint8_t>(),
                 decoded.as<void>()};
    if (!rows) return; /* nothing to point at */
    int status = bw_find_ranges(&grid, threads);
    require(status == BW_OK || status == BW_NOT_FINITE, "bw_find_ranges");
    for (int64_t i = 0; status == BW_OK && i < rows * groups; i++)
        require(low.as<float>()[i] <= high.as<float>()[i], "ranges of finite numbers");
    if (draw(0, 1)) grid.decoded = nullptr;
    require(bw_encode(&grid, threads) == BW_OK, "bw_encode");
    grid.decoded = decoded.as<void>(), grid.codes = nullptr;
    require(bw_encode(&grid, threads) == BW_OK, "bw_encode of numbers alone");
    grid.codes = codes.as<uint8_t>();
    for (unsigned char byte : codes.values) {
        int code = lowest < 0 ? static_cast<int8_t>(byte) : byte;
        require(code >= lowest && code <= highest, "codes within their range");
    }
    require(bw_decode(&grid, threads) == BW_OK, "bw_decode");
    auto step = [&] {
        return bw_step_offsets(&grid, decoded.as<void>(), 0.01f, low.as<float>(), high.as<float>(), threads);
    };
    require(step() == (grid.offset ? BW_OK : BW_BAD_ARGUMENT), "bw_step_offsets");
    for (int64_t i = 0; grid.offset && i < rows * columns; i++)
        require(!(std::abs(offset.as<float>()[i]) > 0.5f), "offsets within half a code");
    switch (draw(0, 5)) {
        case 0: grid.rows = -1; break;
        case 1: grid.columns = 0; break;
        case 2: grid.group = 0; break;
        case 3: grid.dtype = 3; break;
        case 4: grid.codes = nullptr, grid.decoded = nullptr, grid.offset = nullptr; break;
        default: grid.highest = lowest < 0 ? 128 : 256;
    }
    require(bw_encode(&grid, threads) == BW_BAD_ARGUMENT, "bw_encode of an unsound argument");
    require(step() == BW_BAD_ARGUMENT, "bw_step_offsets of an unsound argument");
}

void scaling_round() {
    int64_t rows = draw(1, 300), columns = draw(1, 60), group = draw(1, columns), size[] = {4, 2, 2};
    int32_t dtype = draw32(0, 2), threads = draw32(1, 3);
    size_t bytes = static_cast<size_t>(rows * columns * size[dtype]);
    size_t chunks = static_cast<size_t>((rows + BW_SCALED_ROWS - 1) / BW_SCALED_ROWS);
    Bytes weight(bytes), rounded(bytes), gradient(bytes), scaled(bytes), scale(static_cast<size_t>(columns * 4));
    Bytes divisor(static_cast<size_t>(rows * 4)), by_scale(chunks * static_cast<size_t>(columns * 4)), by_divisor(divisor);
    bw_scaling s{rows, columns, group, dtype, draw32(0, 2), weight.as<void>(), draw(0, 1) ? scale.as<float>() : nullptr,
                 draw(0, 1) ? divisor.as<float>() : nullptr};
    auto pull = [&] {
        return bw_scaling_gradient(&s, rounded.as<void>(), gradient.as<void>(), by_scale.as<float>(),
                                   draw(0, 1) ? by_divisor.as<float>() : nullptr, threads);
    };
    require(bw_scale_weight(&s, scaled.as<void>(), threads) == BW_OK, "bw_scale_weight");
    require(pull() == BW_OK, "bw_scaling_gradient");
    switch (draw(0, 5)) {
        case 0: s.rows = -1; break;
        case 1: s.group = draw(0, 1) ? 0 : columns + 1; break;
        case 2: s.dtype = -1; break;
        case 3: s.range = draw(0, 1) ? 3 : -1; break;
        case 4: s.weight = nullptr; break;
        default: threads = 0;
    }
    require(pull() == BW_BAD_ARGUMENT, "bw_scaling_gradient of an unsound argument");
    require(bw_scale_weight(&s, scaled.as<void>(), threads) == BW_BAD_ARGUMENT, "bw_scale_weight of an unsound argument");
}
