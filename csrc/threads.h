/* A small pool: workers spin briefly for the next job, then sleep. */
#pragma once

#include <cstdint>

namespace bitwright {

/* Calls body(context, first, last, worker) over [0, count) in pieces of `grain`, on up to `threads` threads, worker in
 * [0, threads). Each worker begins with its own part of the whole. Where another thread is using the pool, or in a nested call, everything runs on the calling thread. */
void parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t, int), void* context);

constexpr int MAX_THREADS = 256;

}  // namespace bitwright
