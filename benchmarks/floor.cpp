/* What decoding a token costs at least: the matrix-vector products of a model over its bytes, and nothing else.
 *
 *     floor THREADS HEAD_ROWS HIDDEN BLOCKS SCHEME ROWS COLUMNS [ROWS COLUMNS ...]
 *
 * SCHEME is w4g32, w4g128 or w8; the head is w8. Weights are codes in panels of 64 rows with a float16 scale for each
 * group, in huge pages; the vector is int8. Each thread has its share of every matrix's panels; they meet once a token,
 * and sleep between the lines of the input. For each line, "tokens N", "read N" or "turns N", it prints the seconds that N
 * tokens took, N passes of a loop that only reads the same bytes, or N times a word that one core writes for the other to
 * answer: two ways between cores. Needs AVX-512 VNNI. */
#include <immintrin.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace {

/* Rows lie in panels of 64, and of those 16 to a vector: a word of 32 bits is four columns of one row, or eight of 4 bits.
 * [panel][32 columns][16 rows of the panel][vectors of 64 bytes]; scales are [panel][group][64]. */
struct Matrix {
    int64_t rows, columns;
    int bits, group; /* 0: one scale a row */
    uint8_t* codes;
    uint16_t* scale;
    int64_t panels() const { return (rows + 63) / 64; }
    int64_t panel_bytes() const { return 64 * columns * bits / 8; }
    int64_t panel_scales() const { return 64 * (group ? columns / group : 1); }
    int64_t bytes() const { return panels() * (panel_bytes() + panel_scales() * 2); }
};

uint8_t* memory_of(int64_t bytes) {
    int64_t size = (bytes + (2 << 20) - 1) / (2 << 20) * (2 << 20);
    uint8_t* p = static_cast<uint8_t*>(std::aligned_alloc(2 << 20, static_cast<size_t>(size)));
    if (!p) std::exit(2);
    madvise(p, static_cast<size_t>(size), MADV_HUGEPAGE);
    for (int64_t i = 0; i < size; i++) p[i] = static_cast<uint8_t>(i * 37 >> 3);
    return p;
}

constexpr int AHEAD = 4096; /* bytes that are asked for before they are read */

/* 32 columns of 16 rows: one chain of sums, as a group has it. */
template <int BITS> inline __m512i sum_block(__m512i sum, const uint8_t* codes, const int32_t* x) {
    const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 8
    for (int i = 0; i < BITS; i++) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + 64 * i + AHEAD), _MM_HINT_T0);
        __m512i v = _mm512_load_si512(codes + 64 * i);
        if constexpr (BITS == 8) sum = _mm512_dpbusd_epi32(sum, v, _mm512_set1_epi32(x[i]));
        else {
            sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(v, low), _mm512_set1_epi32(x[2 * i]));
            sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi32(v, 4), low), _mm512_set1_epi32(x[2 * i + 1]));
        }
    }
    return sum;
}

template <int BITS> void multiply_panels(const Matrix& m, int64_t first, int64_t last, const int32_t* words, float* y) {
    int64_t group = m.group ? m.group : m.columns;
    for (int64_t panel = first; panel < last; panel++) {
        const uint8_t* codes = m.codes + panel * m.panel_bytes();
        const uint16_t* scale = m.scale + panel * m.panel_scales();
        const int32_t* x = words;
        __m512 totals[4] = {};
        for (int64_t c = 0; c < m.columns; c += group, scale += 64) {
            __m512i sums[4] = {};
            for (int64_t block = 0; block < group; block += 32, x += 8)
#pragma GCC unroll 4
                for (int lane = 0; lane < 4; lane++, codes += 64 * BITS) sums[lane] = sum_block<BITS>(sums[lane], codes, x);
#pragma GCC unroll 4
            for (int lane = 0; lane < 4; lane++) {
                __m512 factor = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale + 16 * lane)));
                totals[lane] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[lane]), factor, totals[lane]);
            }
        }
        for (int lane = 0; lane < 4; lane++) _mm512_storeu_ps(y + 64 * panel + 16 * lane, totals[lane]);
    }
}

uint32_t read(const uint8_t* p, int64_t bytes) {
    __m512i sums[8] = {};
    for (int64_t at = 0; at + 512 <= bytes; at += 512)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            _mm_prefetch(reinterpret_cast<const char*>(p + at + 64 * i + AHEAD), _MM_HINT_T0);
            sums[i] = _mm512_or_si512(sums[i], _mm512_loadu_si512(p + at + 64 * i));
        }
    for (int i = 1; i < 8; i++) sums[0] = _mm512_or_si512(sums[0], sums[i]);
    return static_cast<uint32_t>(_mm512_reduce_or_epi32(sums[0]));
}

/* Two threads that answer each other through one cache line. */
void take_turns(long times) {
    alignas(64) static std::atomic<long> word;
    word.store(0);
    std::thread other([times] {
        for (long i = 0; i < times; i++) {
            while (word.load(std::memory_order_acquire) != 2 * i + 1) _mm_pause();
            word.store(2 * i + 2, std::memory_order_release);
        }
    });
    for (long i = 0; i < times; i++) {
        word.store(2 * i + 1, std::memory_order_release);
        while (word.load(std::memory_order_acquire) != 2 * i + 2) _mm_pause();
    }
    other.join();
}

struct Team {
    std::vector<Matrix> matrices;
    int threads = 1;
    bool only_reads = false;
    std::vector<int32_t> x; /* four numbers a word */
    std::atomic<int> job{0}, done{0};
    std::atomic<uint32_t> sink{0};

    void share(int worker, std::vector<float>& y) {
        for (const Matrix& m : matrices) {
            int64_t first = m.panels() * worker / threads, last = m.panels() * (worker + 1) / threads;
            if (only_reads) sink |= read(m.codes + first * m.panel_bytes(), (last - first) * m.panel_bytes());
            else if (m.bits == 8) multiply_panels<8>(m, first, last, x.data(), y.data());
            else multiply_panels<4>(m, first, last, x.data(), y.data());
        }
    }
    void token(std::vector<float>& y) {
        done.store(0);
        job.fetch_add(1);
        job.notify_all();
        share(0, y);
        while (done.load() < threads - 1) _mm_pause();
    }
    void serve(int worker, std::vector<float>& y) {
        for (int seen = 0;;) {
            for (int turn = 0; job.load() == seen; turn++) turn < 100000 ? _mm_pause() : job.wait(seen);
            seen = job.load();
            if (seen < 0) return;
            share(worker, y);
            done.fetch_add(1);
        }
    }
};

}  // namespace

int main(int count, char** arguments) {
    if (count < 8) return 2;
    Team team;
    team.threads = std::atoi(arguments[1]);
    int64_t head = std::atol(arguments[2]), hidden = std::atol(arguments[3]), blocks = std::atol(arguments[4]), most = hidden;
    std::string scheme = arguments[5];
    int bits = scheme == "w8" ? 8 : 4, group = scheme == "w4g32" ? 32 : scheme == "w4g128" ? 128 : 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int i = 6; i + 1 < count; i += 2)
            team.matrices.push_back({std::atol(arguments[i]), std::atol(arguments[i + 1]), bits, group, nullptr, nullptr});
    team.matrices.push_back({head, hidden, 8, 0, nullptr, nullptr});
    int64_t total = 0, largest = 0;
    for (const Matrix& m : team.matrices) total += m.bytes();
    uint8_t* memory = memory_of(total + 8192);
    for (Matrix& m : team.matrices) {
        m.codes = memory;
        memory += m.panels() * m.panel_bytes();
        m.scale = reinterpret_cast<uint16_t*>(memory);
        std::memset(memory, 0x20, static_cast<size_t>(m.panels() * m.panel_scales() * 2)); /* small, and finite */
        memory += m.panels() * m.panel_scales() * 2;
        most = m.columns > most ? m.columns : most;
        largest = m.panels() * 64 > largest ? m.panels() * 64 : largest;
    }
    for (int64_t i = 0; i < most / 4; i++) team.x.push_back(static_cast<int32_t>(i * 0x13579bd));
    std::vector<float> y(static_cast<size_t>(largest));
    std::vector<std::thread> others;
    for (int worker = 1; worker < team.threads; worker++) others.emplace_back([&, worker] { team.serve(worker, y); });
    char word[16];
    for (long times; std::scanf("%15s %ld", word, &times) == 2;) {
        team.only_reads = !std::strcmp(word, "read");
        auto start = std::chrono::steady_clock::now();
        if (!std::strcmp(word, "turns")) take_turns(times);
        else
            for (long i = 0; i < times; i++) team.token(y);
        std::printf("%.9f %lld\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
                    static_cast<long long>(total));
        std::fflush(stdout);
    }
    team.job.store(-1);
    team.job.notify_all();
    for (auto& other : others) other.join();
}
