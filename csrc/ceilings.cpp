/* The machine's ceilings, measured beside the kernels so that their figures can be given as shares. */
#include <atomic>

#include "isa_table.h"
#include "threads.h"

namespace {

struct Reading {
    const char* memory;
    std::atomic<uint32_t> sum{0};
};

struct Multiplying {
    bw_route route;
    int64_t rounds;
    std::atomic<uint32_t> sum{0};
};

constexpr int64_t PIECE = int64_t{1} << 20;

}  // namespace

uint32_t bw_read_memory(const void* memory, int64_t bytes, int32_t threads) {
    if (!memory || bytes < PIECE || threads < 1) return 0;
    Reading reading{static_cast<const char*>(memory)};
    bitwright::parallel(threads, bytes / PIECE, 1, [](void* context, int64_t first, int64_t last, int) {
        Reading& r = *static_cast<Reading*>(context);
        r.sum |= bw_isa()->read_memory(r.memory + first * PIECE, (last - first) * PIECE);
    }, &reading);
    return reading.sum;
}

uint32_t bw_multiply(int32_t route, int64_t rounds, int32_t threads) {
    if (route < BW_ROUTE_INTEGER || route > BW_ROUTE_FLOAT32 || rounds < 0 || threads < 1) return 0;
    Multiplying multiplying{static_cast<bw_route>(route), rounds};
    bitwright::parallel(threads, threads, 1, [](void* context, int64_t first, int64_t last, int) {
        Multiplying& m = *static_cast<Multiplying*>(context);
        for (int64_t i = first; i < last; i++) m.sum |= bw_isa()->multiply(m.route, m.rounds);
    }, &multiplying);
    return multiplying.sum;
}
