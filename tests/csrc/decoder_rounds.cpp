/* Pages, attention, rows, sampling and whole decoder steps with random shapes and hostile arguments. */
#include <cmath>
#include <memory>

#include "rounds.h"

namespace {

/* Finite float32 numbers, or any bytes. */
Bytes numbers(int64_t count, bool are_any) {
    Bytes made(static_cast<size_t>(count * 4));
    for (int64_t i = 0; !are_any && i < count; i++) made.as<float>()[i] = static_cast<float>(draw(-1000, 1000)) / 500.0f;
    return made;
}

/* Several sequences with new tokens, whose pages are all different. */
struct Sequences {
    Array<int32_t> starts{0}, positions, lengths, pages;
    int64_t most = 1, count;

    Sequences(int64_t page, int64_t page_count) : count(draw(1, 3)) {
        for (int64_t s = 0; s < count; s++) {
            int64_t length = draw(1, draw(0, 3) ? 40 : 300), fresh = draw(1, length < 20 ? length : 20);
            for (int64_t i = length - fresh; i < length; i++) positions.push_back(static_cast<int32_t>(i));
            starts.push_back(static_cast<int32_t>(positions.size()));
            lengths.push_back(static_cast<int32_t>(length));
            if ((length + page - 1) / page > most) most = (length + page - 1) / page;
        }
        for (int64_t i = 0; i < count * most; i++) pages.push_back(draw32(0, page_count - 1));
        for (auto* each : {&starts, &positions, &lengths, &pages}) each->shrink_to_fit();
    }
    bw_batch batch() const {
        return {static_cast<int64_t>(positions.size()), count, most, positions.data(), starts.data(), lengths.data(),
                pages.data()};
    }
    /* Makes one number wrong; some wrong numbers are sound by chance, and some do no harm. */
    void spoil() {
        Array<int32_t>* all[] = {&starts, &positions, &lengths, &pages};
        Array<int32_t>& one = *all[draw(0, 3)];
        static const int32_t values[] = {-1, INT32_MIN, INT32_MAX, 0, 1, 1000};
        one[static_cast<size_t>(draw(0, static_cast<int64_t>(one.size()) - 1))] = values[draw(0, 5)];
    }
};

/* One layer's keys and values, exactly as long as they must be. */
struct Room {
    Bytes keys, values, key_scale, value_scale;
    bw_pages record;

    static int64_t bytes(int32_t code, int64_t numbers) {
        return code == BW_FLOAT32 ? 4 * numbers : code == BW_INT8 ? numbers : code == BW_INT4 ? numbers / 2 : 2 * numbers;
    }
    Room(int64_t count, int64_t page, int64_t heads, int64_t dimension, int32_t key, int32_t value, bool is_rotated)
        : keys(static_cast<size_t>(count * page * heads * bytes(key, dimension))),
          values(static_cast<size_t>(count * page * heads * bytes(value, dimension))),
          key_scale(key >= BW_INT8 ? static_cast<size_t>(count * page * heads * 8) : 0),
          value_scale(value >= BW_INT8 ? static_cast<size_t>(count * page * heads * 8) : 0),
          record{count, page, heads, dimension, key, value, is_rotated, is_rotated, keys.as<void>(), values.as<void>(),
                 key_scale.as<float>(), value_scale.as<float>()} {}
};

Room draw_room(int64_t heads, int64_t dimension) {
    static const int64_t sizes[] = {16, 32, 64, 128};
    int32_t key = draw32(0, 4), value = key == BW_INT8 && draw(0, 1) ? BW_INT4 : key;
    return Room(draw(1, 6), sizes[draw(0, 3)], heads, dimension, key, value, draw(0, 1));
}

/* A linear layer of a model with everything that it points to. */
struct Layer {
    bw_weight weight;
    Bytes codes, scale, zero, bias, input_scale;
    bw_dense dense;

    Layer(int64_t rows, int64_t columns, bool are_any)
        : weight(), codes(0), scale(0), zero(0), bias(numbers(rows, are_any)), input_scale(numbers(columns, are_any)) {
        static const int32_t widths[] = {2, 3, 4, 5, 6, 7, 8, 16, 32};
        int32_t bits = widths[draw(0, 8)];
        int64_t slots = (columns + 31) / 32 * 32, group = 32 * draw(1, 3), groups = (slots + group - 1) / group;
        int64_t cells = (rows + 63) / 64 * groups * 64;
        codes = bits == 32 ? numbers((rows + 63) / 64 * 64 * slots, are_any) : Bytes(bw_codes_bytes(rows, slots, bits));
        scale = numbers(cells, are_any);
        zero = Bytes(static_cast<size_t>(cells));
        weight = {rows, columns, slots, group, bits, bits <= 8 ? 1 << (bits - 1) : 0, BW_FLOAT32, 0, codes.as<uint8_t>(),
                  scale.as<void>(), bits <= 8 && draw(0, 1) ? zero.as<uint8_t>() : nullptr, nullptr, nullptr, nullptr};
        int32_t activation = bits <= 8 && draw(0, 1) ? 8 : 16;
        int32_t part = activation == 16 || draw(0, 1) ? 0 : draw(0, 1) ? 32 : static_cast<int32_t>(2 * group);
        dense = {&weight, draw(0, 1) ? bias.as<float>() : nullptr, draw(0, 2) ? nullptr : input_scale.as<float>(),
                 activation, part};
    }
};

}  // namespace

void rows_round() {
    int64_t rows = draw(1, 140), columns = draw(1, 150), slots = (columns + 31) / 32 * 32, size[] = {4, 2, 2};
    int32_t dtype = draw32(0, 2), bits = dtype == BW_BFLOAT16 && draw(0, 1) ? 16 : 32;
    Bytes x(static_cast<size_t>(rows * columns * size[dtype])), packed(bw_codes_bytes(rows, slots, bits));
    Bytes scale = numbers((rows + 63) / 64 * 64, false);
    require(bw_pack_floats(x.as<void>(), dtype, rows, columns, slots, bits, packed.as<uint8_t>(), 2) == BW_OK, "bw_pack_floats");
    bw_weight w{rows, columns, slots, slots, bits, 0, BW_FLOAT32, 0, packed.as<uint8_t>(), scale.as<void>(), nullptr,
                nullptr, nullptr, nullptr};
    Array<int64_t> ids;
    for (int64_t i = draw(0, 5); i > 0; i--) ids.push_back(draw(0, rows - 1));
    ids.shrink_to_fit();
    Bytes y(ids.size() * static_cast<size_t>(columns) * 4);
    int64_t count = static_cast<int64_t>(ids.size());
    require(bw_look_up(&w, ids.data(), count, y.as<float>(), 2) == BW_OK, "bw_look_up");
    Layer coded(rows, columns, true);
    require(bw_look_up(&coded.weight, ids.data(), count, y.as<float>(), 1) == BW_OK, "bw_look_up of codes");
    if (count) ids[0] = draw(0, 1) ? -1 : rows;
    require(!count || bw_look_up(&w, ids.data(), count, y.as<float>(), 1) == BW_BAD_ARGUMENT, "bw_look_up of no row");
    require(bw_pack_floats(x.as<void>(), dtype, rows, slots + 1, slots, bits, packed.as<uint8_t>(), 1) == BW_BAD_ARGUMENT,
            "bw_pack_floats of too many columns");
}

void pages_round() {
    int64_t heads = draw(1, 3), group = draw(1, 9), dimension = 2 * draw(1, draw(0, 4) ? 40 : 256);
    Room room = draw_room(heads, dimension);
    Sequences sequences(room.record.page, room.record.count);
    bw_batch batch = sequences.batch();
    int64_t size = batch.tokens * heads * dimension, window = draw(0, 1) ? draw(1, 200) : 0;
    Bytes keys = numbers(size, draw(0, 3) == 0), values = numbers(size, draw(0, 3) == 0);
    Bytes queries = numbers(size * group, draw(0, 3) == 0), output = numbers(size * group, true);
    require(bw_write_pages(&room.record, &batch, keys.as<float>(), values.as<float>(), draw32(1, 3)) == BW_OK, "bw_write_pages");
    require(bw_attend(&room.record, &batch, queries.as<float>(), heads * group, 0.1f, window, output.as<float>(),
                      draw32(1, 3)) == BW_OK, "bw_attend");
    sequences.spoil();
    batch = sequences.batch();
    bw_attend(&room.record, &batch, queries.as<float>(), heads * group, 0.1f, window, output.as<float>(), 2);
    bw_write_pages(&room.record, &batch, keys.as<float>(), values.as<float>(), 1);
    bw_pages broken = room.record;
    switch (draw(0, 6)) {
        case 0: broken.page = 31; break;
        case 1: broken.count = 0; break;
        case 2: broken.dimension = draw(0, 1) ? 0 : 513; break;
        case 3: broken.key_code = draw(0, 1) ? -1 : 5; break;
        case 4: broken.heads = -1; break;
        case 5: broken.values = nullptr; break;
        default: broken.value_code = broken.key_code == BW_INT4 ? BW_INT8 : BW_INT4;
            broken.key_code = broken.key_code == BW_INT8 ? BW_FLOAT32 : broken.key_code;
    }
    require(bw_attend(&broken, &batch, queries.as<float>(), heads * group, 0.1f, 0, output.as<float>(), 1) == BW_BAD_ARGUMENT,
            "bw_attend on unsound pages");
    require(bw_attend(&room.record, &batch, queries.as<float>(), heads * group + (heads > 1), 0.1f, heads > 1 ? 0 : -1,
                      output.as<float>(), 1) == BW_BAD_ARGUMENT, "bw_attend of too many heads");
}

void decoder_round() {
    bool are_any = draw(0, 3) == 0;
    int64_t kv_heads = draw(1, 2), heads = kv_heads * draw(1, 3), dimension = 2 * draw(1, 20), hidden = draw(1, 80);
    int64_t wide = draw(1, 100), vocabulary = draw(1, 90), layers = draw(1, 2), places = 300;
    std::vector<std::unique_ptr<Layer>> kept;
    auto dense = [&](int64_t rows, int64_t columns) {
        kept.push_back(std::make_unique<Layer>(rows, columns, are_any));
        return kept.back()->dense;
    };
    Bytes norm = numbers(hidden, are_any), head_norm = numbers(dimension, are_any), angles = numbers(places * dimension / 2, false);
    std::vector<bw_layer> blocks;
    std::vector<Room> rooms;
    std::vector<bw_pages> pages;
    for (int64_t i = 0; i < layers; i++) {
        const float* turned = draw(0, 1) ? head_norm.as<float>() : nullptr;
        blocks.push_back({norm.as<float>(), norm.as<float>(), turned, turned, dense(heads * dimension, hidden),
                          dense(kv_heads * dimension, hidden), dense(kv_heads * dimension, hidden),
                          dense(hidden, heads * dimension), dense(wide, hidden), dense(wide, hidden), dense(hidden, wide),
                          draw(0, 1) * draw(1, 50)});
        rooms.push_back(i ? Room(rooms[0].record.count, rooms[0].record.page, kv_heads, dimension, BW_BFLOAT16, BW_BFLOAT16, false)
                          : draw_room(kv_heads, dimension));
    }
    for (Room& room : rooms) pages.push_back(room.record);
    Bytes rows = numbers(vocabulary * hidden, are_any);
    bw_dense head = dense(vocabulary, hidden);
    bw_decoder decoder{layers, hidden, wide, heads, kv_heads, dimension, vocabulary, 1e-6f, 0.3f, draw32(0, 1), BW_FLOAT32,
                       blocks.data(), draw(0, 1) ? head.weight : nullptr, rows.as<void>(), norm.as<float>(), head};
    Sequences sequences(pages[0].page, pages[0].count);
    Array<int64_t> ids;
    Array<int32_t> outputs;
    for (size_t i = 0; i < sequences.positions.size(); i++) {
        ids.push_back(draw(0, vocabulary - 1));
        if (draw(0, 1)) outputs.push_back(static_cast<int32_t>(i));
    }
    ids.shrink_to_fit();
    outputs.shrink_to_fit();
    Bytes logits(outputs.size() * static_cast<size_t>(vocabulary) * 4);
    bw_step step{sequences.batch(), ids.data(), outputs.data(), static_cast<int64_t>(outputs.size()), places,
                 angles.as<float>(), angles.as<float>(), pages.data()};
    require(bw_decode_step(&decoder, &step, logits.as<float>(), draw32(1, 3)) == BW_OK, "bw_decode_step");
    if (draw(0, 1)) sequences.spoil();
    else if (draw(0, 1)) ids[0] = draw(0, 1) ? -1 : vocabulary;
    else if (!outputs.empty()) outputs[0] = draw32(0, 1) ? -1 : INT32_MAX;
    step.batch = sequences.batch();
    bw_decode_step(&decoder, &step, logits.as<float>(), 2);
    switch (draw(0, 6)) {
        case 0: decoder.hidden++; break;
        case 1: decoder.heads = decoder.kv_heads + 1 + decoder.heads; break;
        case 2: decoder.vocabulary = INT64_MAX; break;
        case 3: decoder.dimension += 2; break;
        case 4: blocks[0].down.weight = nullptr; break;
        case 5: blocks[0].output.activation_group = 40; break;
        default: blocks[0].query.activation_bits = 9;
    }
    require(bw_decode_step(&decoder, &step, logits.as<float>(), 1) == BW_BAD_ARGUMENT, "bw_decode_step of an unsound model");
}

void sampling_round() {
    int64_t count = draw(1, 300), token = -1;
    bool are_any = draw(0, 2) == 0;
    Bytes logits = numbers(count, are_any);
    bw_sampling sampling{static_cast<float>(draw(0, 20)) / 10, static_cast<float>(draw(1, 10)) / 10,
                         static_cast<float>(draw(0, 10)) / 10, draw32(0, 2) ? draw32(0, 310) : 0};
    double uniform = std::uniform_real_distribution<double>(0, 1)(generator);
    int status = bw_sample(logits.as<float>(), count, &sampling, uniform, &token);
    require(status == BW_OK ? token >= 0 && token < count : are_any && status == BW_NOT_FINITE, "bw_sample");
    switch (draw(0, 4)) {
        case 0: sampling.temperature = draw(0, 1) ? -1.0f : NAN; break;
        case 1: sampling.top_p = draw(0, 1) ? 0.0f : NAN; break;
        case 2: sampling.top_k = -1; break;
        case 3: uniform = draw(0, 1) ? 1.0 : NAN; break;
        default: count = 0;
    }
    require(bw_sample(logits.as<float>(), count, &sampling, uniform, &token) == BW_BAD_ARGUMENT, "bw_sample of the impossible");
}
