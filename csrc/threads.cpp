#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace bitwright {
namespace {

constexpr auto SPIN = std::chrono::microseconds(50);  // longer than the gap between two layers, short beside a token
constexpr uint64_t OPEN = 1 << 16;                    // a job may be entered; below it, how many are inside
constexpr uint64_t EPOCH = OPEN << 1;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Job {
    void (*body)(void*, int64_t, int64_t, int);
    void* context;
    int64_t count, grain;
    int threads;
};

/* What is left of one worker's part of a job. */
struct alignas(64) Part {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

struct Pool {
    // Which job, whether it is open, and how many workers are inside: one word, so that a worker that wakes late can
    // neither hold up the caller nor enter a job that has ended.
    alignas(64) std::atomic<uint64_t> state{0};
    Part parts[MAX_THREADS];
    alignas(64) std::atomic<int> sleepers{0};
    Job job{};
    std::mutex sleep_mutex, use_mutex;
    std::condition_variable awake;
    int workers = 0;
};

std::atomic<Pool*> pool{nullptr};
thread_local bool inside = false;

/* A worker does its own part from first to last, so that memory is read in one stream, and then what others have left. */
void work(Pool& p, int worker) {
    const Job job = p.job;
    for (int i = 0; i < job.threads; i++) {
        Part& part = p.parts[(worker + i) % job.threads];
        for (;;) {
            if (part.next.load(std::memory_order_relaxed) >= part.end) break;
            int64_t first = part.next.fetch_add(job.grain, std::memory_order_relaxed);
            if (first >= part.end) break;
            job.body(job.context, first, first + job.grain < part.end ? first + job.grain : part.end, worker);
        }
    }
}

uint64_t wait_for_job(Pool& p, uint64_t seen) {
    const auto start = std::chrono::steady_clock::now();
    for (int turn = 1;; turn++) {
        uint64_t state = p.state.load(std::memory_order_acquire);
        if (state / EPOCH != seen) return state;
        pause();
        if (turn % 64 == 0 && std::chrono::steady_clock::now() - start > SPIN) break;
    }
    std::unique_lock lock(p.sleep_mutex);
    p.sleepers.fetch_add(1);
    p.awake.wait(lock, [&] { return p.state.load() / EPOCH != seen; });
    p.sleepers.fetch_sub(1);
    return p.state.load(std::memory_order_acquire);
}

void serve(Pool* p, int worker) {
    inside = true;
    uint64_t seen = 0;
    for (;;) {
        uint64_t state = wait_for_job(*p, seen);
        seen = state / EPOCH;
        bool entered = false;
        while (state / EPOCH == seen && (state & OPEN) && !entered)
            entered = p->state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel);
        if (!entered) continue;
        if (worker < p->job.threads) work(*p, worker);
        p->state.fetch_sub(1, std::memory_order_release);
    }
}

void forget_pool() { pool.store(nullptr); }  // a forked child has none of its parent's threads

Pool* the_pool() {
    Pool* found = pool.load(std::memory_order_acquire);
    if (found) return found;
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    Pool* made = new (std::nothrow) Pool;  // never freed: threads may outlive static destructors
    if (made && !pool.compare_exchange_strong(found, made)) {
        delete made;
        return found;
    }
    return made;
}

void grow(Pool& p, int workers) {
    while (p.workers < workers) {
        try {
            std::thread(serve, &p, p.workers + 1).detach();
        } catch (...) {
            return;  // fewer threads give the same result
        }
        p.workers++;
    }
}

}  // namespace

void parallel(int threads, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t, int), void* context) {
    if (grain < 1) grain = 1;
    int64_t pieces = (count + grain - 1) / grain;
    if (threads > pieces) threads = static_cast<int>(pieces);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    Pool* p = threads > 1 && !inside ? the_pool() : nullptr;
    if (!p || !p->use_mutex.try_lock()) {
        if (count > 0) body(context, 0, count, 0);
        return;
    }
    grow(*p, threads - 1);
    p->job = Job{body, context, count, grain, threads};
    for (int64_t i = 0; i < threads; i++) { /* parts are made of whole pieces */
        p->parts[i].next.store(pieces * i / threads * grain, std::memory_order_relaxed);
        int64_t end = pieces * (i + 1) / threads * grain;
        p->parts[i].end = end < count ? end : count;
    }
    p->state.store((p->state.load(std::memory_order_relaxed) / EPOCH + 1) * EPOCH + OPEN);
    if (p->sleepers.load()) {
        std::lock_guard lock(p->sleep_mutex);
        p->awake.notify_all();
    }
    inside = true;
    work(*p, 0);
    inside = false;
    p->state.fetch_and(~OPEN, std::memory_order_acq_rel);
    for (int turn = 0; p->state.load(std::memory_order_acquire) & (OPEN - 1); turn++)
        turn < 4096 ? pause() : std::this_thread::yield();  // a worker may have lost its core
    p->use_mutex.unlock();
}

}  // namespace bitwright
