/* Every entry point of csrc/kernels.h with random shapes, arbitrary bytes and hostile arguments, for sanitizers.
 *
 *     entry_points ROUNDS SEED [MUTATIONS]
 *
 * Each round mutates the buffers of a packed weight MUTATIONS (4) times, and gives them to all that reads such weights.
 * Arrays are as long as the ABI says, to the byte, so that one read or write too far is a report. */
#include "rounds.h"

namespace {

int64_t hostile() {
    static const int64_t values[] = {0, -1, 1, 31, 33, INT32_MIN, INT32_MAX, INT64_MIN, INT64_MAX, int64_t{1} << 40};
    return values[draw(0, 9)];
}

long mutations = 4;

void mutate(Bytes& bytes) {
    for (int64_t i = draw(0, 3); i > 0 && !bytes.values.empty(); i--) {
        auto& byte = bytes.values[static_cast<size_t>(draw(0, static_cast<int64_t>(bytes.values.size()) - 1))];
        byte = static_cast<unsigned char>(draw(0, 1) ? byte ^ 1 << draw(0, 7) : draw(0, 1) ? 255 : draw(0, 255));
    }
}

/* A group of activations that goes with the weight's: a part of it, it, or several. */
int32_t part_of(const bw_weight& w) {
    int32_t group = static_cast<int32_t>(w.group);
    if (w.group >= w.slots && draw(0, 1)) return 32 * static_cast<int32_t>(draw(1, 9));
    return draw(0, 1) ? group * static_cast<int32_t>(draw(1, 4)) : group % 64 == 0 && draw(0, 1) ? group / 2 : 32;
}

/* Groups that are none, or that do not go with the weight's or with its order. */
void refuse_parts(bw_weight w, const void* x, int32_t dtype, int64_t tokens, void* y) {
    for (int32_t part : {-32, 1, 16, 33, INT32_MIN, INT32_MAX})
        require(bw_linear(&w, x, dtype, tokens, nullptr, 8, part, y, 1) == BW_BAD_ARGUMENT, "bw_linear of no group");
    bool is_part = w.group >= w.slots || w.group % 96 == 0 || 96 % w.group == 0;
    int status = w.order || is_part ? BW_BAD_ARGUMENT : bw_linear(&w, x, dtype, tokens, nullptr, 8, 96, y, 1);
    require(status == BW_BAD_ARGUMENT, "bw_linear of groups that do not go together");
    std::vector<int32_t> order(static_cast<size_t>(w.slots));
    if (!w.order) w.order = order.data();
    require(bw_linear(&w, x, dtype, tokens, nullptr, 8, 32, y, 1) == BW_BAD_ARGUMENT, "bw_linear of groups in an order");
}

void linear_round() {
    int64_t rows = draw(1, 140), columns = draw(1, 150), tokens = draw(0, 14), size[] = {4, 2, 2};
    int64_t group = 32 * draw(1, 4), slots = (columns + 31) / 32 * 32 + 32 * draw(0, 1);
    int32_t bits = static_cast<int32_t>(draw(2, 8)), dtype = static_cast<int32_t>(draw(0, 2));
    int32_t scale_dtype = static_cast<int32_t>(draw(0, 2));
    bool has_zero = draw(0, 1), has_levels = bits <= 4 && draw(0, 3) == 0, has_order = draw(0, 1);
    int64_t panels = (rows + BW_PANEL - 1) / BW_PANEL, groups = (slots + group - 1) / group, cells = panels * groups * 64;
    Bytes codes(bw_codes_bytes(rows, slots, bits)), scale(static_cast<size_t>(cells * size[scale_dtype]));
    Bytes zero(static_cast<size_t>(cells)), remainder(static_cast<size_t>(cells * 4)), levels(64);
    Bytes order(static_cast<size_t>(slots * 4)), x(static_cast<size_t>(tokens * columns * size[dtype]));
    Bytes bias(static_cast<size_t>(rows * size[dtype])), y(static_cast<size_t>(tokens * rows * size[dtype]));
    for (int64_t s = 0; draw(0, 3) && s < slots; s++) order.as<int32_t>()[s] = static_cast<int32_t>(draw(-1, columns - 1));
    bw_weight w{rows, columns, slots, group, bits, static_cast<int32_t>(draw(0, 255)), scale_dtype, 0,
                codes.as<uint8_t>(), scale.as<void>(), has_zero ? zero.as<uint8_t>() : nullptr,
                has_zero && draw(0, 1) ? remainder.as<float>() : nullptr, has_order ? order.as<int32_t>() : nullptr,
                has_levels ? levels.as<float>() : nullptr};
    int32_t activation = !has_levels && draw(0, 1) ? 8 : 16, threads = static_cast<int32_t>(draw(1, 3));
    int32_t part = activation == 8 && !has_order && draw(0, 1) ? part_of(w) : 0;
    int status = bw_linear(&w, x.as<void>(), dtype, tokens, draw(0, 1) ? bias.as<void>() : nullptr, activation, part,
                           y.as<void>(), threads);
    require(status == BW_OK || (activation == 8 && status == BW_NOT_FINITE), "bw_linear of sound arguments");
    Bytes row(static_cast<size_t>(columns * 4)), back(static_cast<size_t>(rows * columns));
    for (long i = 0; i < mutations; i++) {
        for (Bytes* each : {&codes, &scale, &zero, &remainder, &levels, &order, &x}) mutate(*each);
        status = bw_linear(&w, x.as<void>(), dtype, tokens, nullptr, activation, part, y.as<void>(), threads);
        require(status == BW_OK || (activation == 8 && status == BW_NOT_FINITE), "bw_linear of mutated buffers");
        int64_t id = draw(0, rows - 1);
        require(bw_look_up(&w, &id, 1, row.as<float>(), 1) == BW_OK, "bw_look_up in mutated buffers");
        require(bw_unpack_codes(codes.as<uint8_t>(), rows, columns, slots, bits, w.order, back.as<uint8_t>(), 1) == BW_OK,
                "bw_unpack_codes of mutated buffers");
    }
    if (activation == 8) refuse_parts(w, x.as<void>(), dtype, tokens, y.as<void>());
    require(bw_linear(&w, x.as<void>(), dtype, tokens, nullptr, 16, 32, y.as<void>(), threads) == BW_BAD_ARGUMENT,
            "bw_linear of exact activations in groups");
    switch (draw(0, 9)) { /* now one that is not sound; most of these are, some may be by chance */
        case 0: w.rows = -w.rows; break;
        case 1: w.slots = draw(0, 1) ? w.slots + 1 : -32; break;
        case 2: w.group = w.group + 1; break;
        case 3: w.bits = draw(0, 1) ? 1 : 9; break;
        case 4: w.codes = nullptr; break;
        case 5: w.scale_dtype = 3; break;
        case 6: w.order = nullptr; w.columns = w.slots + 1; break;
        case 7: w.center = 256; break;
        case 8: threads = 0; break;
        default: tokens = -1;
    }
    require(bw_linear(&w, x.as<void>(), dtype, tokens, nullptr, 16, 0, y.as<void>(), threads) == BW_BAD_ARGUMENT,
            "bw_linear of an unsound argument");
}

/* Norms of rows of anything, on their way into a product; and such whose sums would lie where they are read. */
void normed_round() {
    int64_t rows = draw(1, 70), columns = draw(1, 100), tokens = draw(0, 9), slots = (columns + 31) / 32 * 32;
    int32_t bits = static_cast<int32_t>(draw(2, 8)), activation = draw(0, 1) ? 8 : 16;
    int32_t part = activation == 8 && draw(0, 1) ? 32 * static_cast<int32_t>(draw(1, 5)) : 0;
    size_t numbers = static_cast<size_t>(tokens * columns * 4);
    Bytes codes(bw_codes_bytes(rows, slots, bits)), scale(static_cast<size_t>((rows + 63) / 64 * 256));
    Bytes x(numbers), residual(numbers), sum(numbers), weight(static_cast<size_t>(columns * 4));
    Bytes bias(static_cast<size_t>(rows * 4)), y(static_cast<size_t>(tokens * rows * 4));
    bw_weight w{rows, columns, slots, slots, bits, 1 << (bits - 1), BW_FLOAT32, 0, codes.as<uint8_t>(), scale.as<void>(),
                nullptr, nullptr, nullptr, nullptr};
    bw_norm norm{x.as<void>(), draw(0, 1) ? residual.as<void>() : nullptr, weight.as<void>(),
                 draw(0, 1) ? sum.as<void>() : nullptr, nullptr, columns, BW_FLOAT32, 1e-6f};
    auto run = [&] {
        return bw_norm_linear(&norm, &w, tokens, draw(0, 1) ? bias.as<float>() : nullptr, activation, part, y.as<float>(),
                              static_cast<int32_t>(draw(1, 3)));
    };
    int status = run();
    require(status == BW_OK || (activation == 8 && status == BW_NOT_FINITE), "bw_norm_linear");
    switch (draw(0, 4)) {
        case 0: norm.columns++; break;
        case 1: norm.dtype = BW_BFLOAT16; break;
        case 2: tokens = -1; break;
        case 3: part = activation == 8 ? 40 : 32; break;
        default: activation = 4;
    }
    require(run() == BW_BAD_ARGUMENT, "bw_norm_linear of an unsound argument");
}

void packing_round() {
    int64_t rows = draw(1, 70), columns = draw(1, 70), slots = (columns + 31) / 32 * 32;
    int32_t bits = static_cast<int32_t>(draw(2, 8));
    Bytes codes(static_cast<size_t>(rows * columns)), back(codes.values.size()), packed(bw_codes_bytes(rows, slots, bits));
    for (auto& code : codes.values) code = static_cast<unsigned char>(code & ((1 << bits) - 1));
    require(bw_pack_codes(codes.as<uint8_t>(), rows, columns, slots, bits, nullptr, packed.as<uint8_t>(), 2) == BW_OK &&
                bw_unpack_codes(packed.as<uint8_t>(), rows, columns, slots, bits, nullptr, back.as<uint8_t>(), 2) == BW_OK,
            "packing");
    require(codes.values == back.values, "unpacking what was packed");
    Bytes order(static_cast<size_t>(slots * 4)); /* columns that do not exist are nothing */
    bw_pack_codes(codes.as<uint8_t>(), rows, columns, slots, bits, order.as<int32_t>(), packed.as<uint8_t>(), 1);
    bw_codes_bytes(hostile(), hostile(), static_cast<int32_t>(hostile()));
    require(bw_pack_codes(codes.as<uint8_t>(), -rows, columns, slots, bits, nullptr, packed.as<uint8_t>(), 1) ==
                BW_BAD_ARGUMENT, "packing of no rows");
}

void layers_round() {
    int64_t tokens = draw(0, 4), columns = draw(1, 70), heads = draw(1, 3), dimension = 2 * draw(1, 40), size[] = {4, 2, 2};
    int32_t dtype = static_cast<int32_t>(draw(0, 2)), places = static_cast<int32_t>(draw(1, 5));
    size_t bytes = static_cast<size_t>(tokens * columns * size[dtype]);
    Bytes x(bytes), residual(bytes), sum(bytes), y(bytes), weight(static_cast<size_t>(columns * size[dtype]));
    bw_norm norm{x.as<void>(), draw(0, 1) ? residual.as<void>() : nullptr, weight.as<void>(), sum.as<void>(),
                 y.as<void>(), columns, dtype, 1e-6f};
    require(bw_rms_norm(&norm, tokens, 2) == BW_OK, "bw_rms_norm");
    require(bw_silu_multiply(x.as<void>(), residual.as<void>(), dtype, tokens * columns, y.as<void>(), 2) == BW_OK,
            "bw_silu_multiply");
    Bytes turned(static_cast<size_t>(tokens * heads * dimension * size[dtype])), cosine(static_cast<size_t>(places * dimension * 2));
    Bytes positions(static_cast<size_t>(tokens * 4));
    for (int64_t t = 0; t < tokens; t++) positions.as<int32_t>()[t] = static_cast<int32_t>(draw(0, places - 1));
    auto rotate = [&] {
        return bw_rotate(turned.as<void>(), dtype, tokens, heads, dimension, cosine.as<float>(), cosine.as<float>(),
                         positions.as<int32_t>(), places, 1);
    };
    require(rotate() == BW_OK, "bw_rotate");
    if (tokens) positions.as<int32_t>()[0] = draw(0, 1) ? -1 : places;
    require(!tokens || rotate() == BW_BAD_ARGUMENT, "bw_rotate beyond its table");
    norm.columns = 0;
    require(bw_rms_norm(&norm, tokens, 1) == BW_BAD_ARGUMENT, "bw_rms_norm of nothing");
}

}  // namespace

int main(int count, char** arguments) {
    long rounds = count > 1 ? std::atol(arguments[1]) : 1000;
    generator.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
    mutations = count > 3 ? std::atol(arguments[3]) : mutations;
    for (long round = 0; round < rounds; round++) {
        int isa = static_cast<int>(draw(0, bw_isa_count() - 1));
        if (bw_isa_is_supported(isa)) bw_isa_select(bw_isa_name(isa));
        linear_round();
        packing_round();
        layers_round();
        normed_round();
        rows_round();
        sampling_round();
        grid_round();
        scaling_round();
        if (round % 8 == 0) pages_round(); /* these take longer */
        if (round % 32 == 0) decoder_round();
    }
    require(bw_isa_select("none such") == BW_BAD_ARGUMENT && !bw_isa_name(-1) && !bw_isa_is_supported(99), "names");
    std::vector<unsigned char> memory(3 << 20, 1);
    require(bw_read_memory(memory.data(), 3 << 20, 2) == 0x01010101 && !bw_read_memory(nullptr, 1, 1), "bw_read_memory");
    for (int route = -1; route < 4; route++) bw_multiply(route, 10, 2);
    std::printf("%ld rounds, %ld mutated weights\n", rounds, rounds * mutations);
}
