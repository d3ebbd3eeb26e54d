/* Codes of a weight into the layout that the kernels read, and back; see csrc/ops/unpack.h. */
#include <cstring>
#include <initializer_list>

#include "kernels.h"
#include "threads.h"

namespace {

struct Packing {
    const uint8_t* codes;
    uint8_t* out;
    int64_t rows, columns, slots;
    int32_t bits;
    const int32_t* order;
    uint8_t* packed;
};

constexpr int BLOCK_CODES = BW_LANES * BW_BLOCK;

/* Calls f(plane width, vector at which it begins, bits below it) for each plane of a width. */
template <class F> void for_planes(int bits, F f) {
    if (bits == 8) return f(8, 0, 0);
    int vector = 0, below = bits;
    for (int width : {4, 2, 1})
        if (bits & width) {
            below -= width;
            f(width, vector, below);
            vector += width;
        }
}

/* Sixteen rows by 32 slots, from codes [16][32]. */
void pack_block(const uint8_t* codes, int bits, uint8_t* out) {
    std::memset(out, 0, static_cast<size_t>(64 * bits));
    for_planes(bits, [&](int width, int vector, int below) {
        int per_vector = 8 / width, mask = (1 << width) - 1;
        for (int quad = 0; quad < 8; quad++)
            for (int lane = 0; lane < BW_LANES; lane++)
                for (int byte = 0; byte < 4; byte++) {
                    int part = codes[lane * BW_BLOCK + quad * 4 + byte] >> below & mask;
                    uint8_t* to = out + 64 * (vector + quad / per_vector) + lane * 4 + byte;
                    *to = static_cast<uint8_t>(*to | part << quad % per_vector * width);
                }
    });
}

void unpack_block(const uint8_t* packed, int bits, uint8_t* codes) {
    std::memset(codes, 0, BLOCK_CODES);
    for_planes(bits, [&](int width, int vector, int below) {
        int per_vector = 8 / width, mask = (1 << width) - 1;
        for (int quad = 0; quad < 8; quad++)
            for (int lane = 0; lane < BW_LANES; lane++)
                for (int byte = 0; byte < 4; byte++) {
                    int from = packed[64 * (vector + quad / per_vector) + lane * 4 + byte];
                    uint8_t* to = codes + lane * BW_BLOCK + quad * 4 + byte;
                    *to = static_cast<uint8_t>(*to | (from >> quad % per_vector * width & mask) << below);
                }
    });
}

/* The column of a slot, or -1 where there is none. */
int64_t column_of(const Packing& p, int64_t slot) {
    int64_t column = p.order ? p.order[slot] : slot;
    return column < p.columns ? column : -1;
}

template <class F> void for_blocks(const Packing& p, int64_t first_panel, int64_t last_panel, F f) {
    int64_t blocks = p.slots / BW_BLOCK;
    for (int64_t part = first_panel * 4; part < last_panel * 4; part++)
        for (int64_t block = 0; block < blocks; block++)
            f(part * BW_LANES, block * BW_BLOCK, p.packed + (part / 4 * blocks * 4 + block * 4 + part % 4) * 64 * p.bits);
}

void pack_panels(void* context, int64_t first, int64_t last, int) {
    const Packing& p = *static_cast<const Packing*>(context);
    for_blocks(p, first, last, [&](int64_t row, int64_t slot, uint8_t* packed) {
        uint8_t codes[BLOCK_CODES] = {};
        for (int lane = 0; lane < BW_LANES && row + lane < p.rows; lane++) {
            const uint8_t* from = p.codes + (row + lane) * p.columns;
            for (int s = 0; s < BW_BLOCK; s++) {
                int64_t column = column_of(p, slot + s);
                if (column >= 0) codes[lane * BW_BLOCK + s] = from[column];
            }
        }
        pack_block(codes, p.bits, packed);
    });
}

void unpack_panels(void* context, int64_t first, int64_t last, int) {
    const Packing& p = *static_cast<const Packing*>(context);
    for_blocks(p, first, last, [&](int64_t row, int64_t slot, uint8_t* packed) {
        uint8_t codes[BLOCK_CODES];
        unpack_block(packed, p.bits, codes);
        for (int lane = 0; lane < BW_LANES && row + lane < p.rows; lane++)
            for (int s = 0; s < BW_BLOCK; s++) {
                int64_t column = column_of(p, slot + s);
                if (column >= 0) p.out[(row + lane) * p.columns + column] = codes[lane * BW_BLOCK + s];
            }
    });
}

int run(Packing p, void (*body)(void*, int64_t, int64_t, int), int32_t threads) {
    bool has_codes = p.codes || p.out;
    if (!has_codes || !p.packed || threads < 1 || p.bits > 8 || !bw_codes_bytes(p.rows, p.slots, p.bits)) return BW_BAD_ARGUMENT;
    if (p.columns < 1 || (!p.order && p.slots < p.columns)) return BW_BAD_ARGUMENT;
    bitwright::parallel(threads, (p.rows + BW_PANEL - 1) / BW_PANEL, 4, body, &p);
    return BW_OK;
}

}  // namespace

size_t bw_codes_bytes(int64_t rows, int64_t slots, int32_t bits) {
    constexpr int64_t most = int64_t{1} << 40;
    if (rows < 1 || slots < 1 || slots % BW_BLOCK || bits < 2 || (bits > 8 && bits != 16 && bits != 32) || rows > most || slots > most / rows) return 0;
    return static_cast<size_t>((rows + BW_PANEL - 1) / BW_PANEL * BW_PANEL * slots / 8 * bits);
}

int bw_pack_codes(const uint8_t* codes, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                  const int32_t* order, uint8_t* packed, int32_t threads) {
    return run({codes, nullptr, rows, columns, slots, bits, order, packed}, pack_panels, threads);
}

int bw_unpack_codes(const uint8_t* packed, int64_t rows, int64_t columns, int64_t slots, int32_t bits,
                    const int32_t* order, uint8_t* codes, int32_t threads) {
    uint8_t* from = const_cast<uint8_t*>(packed);  // only read
    return run({nullptr, codes, rows, columns, slots, bits, order, from}, unpack_panels, threads);
}
