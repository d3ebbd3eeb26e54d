/* Single rows of packed weights, as embeddings are looked up; and floats into the layout of weights. */
#include <cstring>

#include "isa_table.h"
#include "linear.h"
#include "threads.h"

namespace bitwright {
namespace {

float from_half(uint16_t half, int32_t dtype) {
    uint32_t bits = static_cast<uint32_t>(half) << 16;
    if (dtype == BW_FLOAT16) {
        uint32_t rest = half & 0x7fff;
        bits = rest >= 0x7c00 ? rest << 13 | 0x7f800000 : (rest << 13) + 0x38000000;
        if (rest < 0x400) {
            float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24: exact
            std::memcpy(&bits, &small, 4);
        }
        bits |= (half & 0x8000u) << 16;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float number_at(const void* p, int64_t index, int32_t dtype) {
    if (dtype == BW_FLOAT32) return static_cast<const float*>(p)[index];
    return from_half(static_cast<const uint16_t*>(p)[index], dtype);
}

/* The codes of a row's 32 slots, four bytes a quad, given the bytes of its lane in the vectors of their block. */
void read_codes(const uint8_t* block, int bits, uint32_t (&quads)[8]) {
    for (int q = 0; q < 8; q++) quads[q] = 0;
    if (bits == 8)
        for (int q = 0; q < 8; q++) std::memcpy(&quads[q], block + 64 * q, 4);
    for (int width = 4; width && bits < 8; width /= 2) {
        if (!(bits & width)) continue;
        uint32_t mask = ((1u << width) - 1) * 0x01010101u;
        for (int q = 0; q < 8; block += 64) {
            uint32_t word;
            std::memcpy(&word, block, 4);
            for (int part = 0; part < 8; part += width, q++) quads[q] = quads[q] << width | (word >> part & mask);
        }
    }
}

float float_at(const uint8_t* block, int bits, int slot) {
    float value;
    if (bits == 32) {
        std::memcpy(&value, block + 64 * slot, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, block + 64 * (slot / 4 * 2 + slot % 2) + slot % 4 / 2 * 2, 2);
    return from_half(half, BW_BFLOAT16);
}

struct Floats {
    const void* numbers;
    int32_t dtype, bits;
    int64_t rows, columns, slots;
    uint8_t* packed;
};

void pack_panels(void* context, int64_t first, int64_t last, int) {
    const Floats& f = *static_cast<Floats*>(context);
    int64_t blocks = f.slots / BW_BLOCK;
    for (int64_t row = first * BW_PANEL; row < last * BW_PANEL; row++)
        for (int64_t slot = 0; slot < f.slots; slot++) {
            bool exists = row < f.rows && slot < f.columns;
            float value = exists ? number_at(f.numbers, row * f.columns + slot, f.dtype) : 0.0f;
            int s = static_cast<int>(slot % BW_BLOCK);
            int64_t place = (row / BW_PANEL * blocks + slot / BW_BLOCK) * 4 + row % BW_PANEL / BW_LANES;
            uint8_t* block = f.packed + place * 64 * f.bits + row % BW_LANES * 4;
            uint32_t word;
            std::memcpy(&word, &value, 4);
            if (f.bits == 32) std::memcpy(block + 64 * s, &word, 4);
            else {
                uint16_t half = static_cast<uint16_t>(word >> 16);
                std::memcpy(block + 64 * (s / 4 * 2 + s % 2) + s % 4 / 2 * 2, &half, 2);
            }
        }
}

/* The 32 numbers of a block of a row, whose group's parameters are those number `at`. */
void read_block(const bw_weight& w, const uint8_t* block, int64_t at, float (&values)[BW_BLOCK]) {
    const float scale = number_at(w.scale, at, w.scale_dtype);
    if (w.bits > 8) {
        for (int s = 0; s < BW_BLOCK; s++) values[s] = float_at(block, w.bits, s) * scale;
        return;
    }
    uint32_t quads[8];
    uint8_t codes[BW_BLOCK];
    read_codes(block, w.bits, quads);
    std::memcpy(codes, quads, sizeof(quads));
    if (w.levels) {
        for (int s = 0; s < BW_BLOCK; s++) values[s] = w.levels[codes[s]] * scale;
        return;
    }
    const int zero = w.zero ? w.zero[at] : w.center;
    const float remainder = w.remainder ? w.remainder[at] : 0.0f;
    for (int s = 0; s < BW_BLOCK; s++) values[s] = (static_cast<float>(codes[s] - zero) - remainder) * scale;
}

struct LookUp {
    const bw_weight* weight;
    const int64_t* ids;
    float* y;
};

}  // namespace

void read_numbers(const void* numbers, int64_t first, int64_t count, int32_t dtype, float* y) {
    for (int64_t i = 0; i < count; i++) y[i] = number_at(numbers, first + i, dtype);
}

void look_up(const bw_weight& w, int64_t id, float* y) {
    int64_t blocks = w.slots / BW_BLOCK, groups = (w.slots + w.group - 1) / w.group, panel = id / BW_PANEL;
    int64_t lane = id % BW_PANEL / BW_LANES, column = id % BW_LANES;
    const uint8_t* codes = w.codes + (panel * blocks * 4 + lane) * 64 * w.bits + column * 4;
    if (w.order) std::memset(y, 0, static_cast<size_t>(w.columns) * sizeof(float));
    for (int64_t block = 0; block < blocks; block++, codes += 4 * 64 * w.bits) {
        int64_t first = block * BW_BLOCK, at = (panel * groups + first / w.group) * BW_PANEL + id % BW_PANEL;
        float values[BW_BLOCK];
        read_block(w, codes, at, values);
        if (w.order) {
            for (int64_t s = 0; s < BW_BLOCK; s++) {
                int64_t to = w.order[first + s];
                if (to >= 0 && to < w.columns) y[to] = values[s];
            }
        } else if (first < w.columns) {
            int64_t count = w.columns - first < BW_BLOCK ? w.columns - first : BW_BLOCK;
            std::memcpy(y + first, values, static_cast<size_t>(count) * sizeof(float));
        }
    }
}

}  // namespace bitwright

int bw_pack_floats(const void* numbers, int32_t dtype, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                   uint8_t* packed, int32_t threads) {
    using namespace bitwright;
    if (!numbers || !packed || !is_dtype(dtype) || threads < 1 || columns < 1 || slots < columns) return BW_BAD_ARGUMENT;
    if ((bits != 32 && (bits != 16 || dtype != BW_BFLOAT16)) || !bw_codes_bytes(rows, slots, bits)) return BW_BAD_ARGUMENT;
    Floats floats{numbers, dtype, bits, rows, columns, slots, packed};
    parallel(threads, (rows + BW_PANEL - 1) / BW_PANEL, 4, pack_panels, &floats);
    return BW_OK;
}

int bw_look_up(const bw_weight* weight, const int64_t* ids, int64_t count, float* y, int32_t threads) {
    using namespace bitwright;
    if (!weight || !is_sound(*weight) || count < 0 || threads < 1 || (count && (!ids || !y))) return BW_BAD_ARGUMENT;
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= weight->rows) return BW_BAD_ARGUMENT;
    LookUp job{weight, ids, y};
    parallel(threads, count, 4, [](void* context, int64_t first, int64_t last, int) {
        const LookUp& l = *static_cast<LookUp*>(context);
        for (int64_t i = first; i < last; i++) look_up(*l.weight, l.ids[i], l.y + i * l.weight->columns);
    }, &job);
    return BW_OK;
}
