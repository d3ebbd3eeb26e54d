/* What decoding a token costs at least: the matrix-vector products of a model over its bytes, and nothing else.
 *
 *     floor THREADS HEAD_ROWS HIDDEN BLOCKS SCHEME ROWS COLUMNS [ROWS COLUMNS ...]
 *
 * SCHEME is w4g32, w4g128 or w8; the head is w8. Weights are codes a row after the other with a float16 scale for each
 * group, the vector is int8. Each thread has its share of every matrix's rows; they meet once a token. For each line of
 * its input, "tokens N" or "read N", it prints the seconds that N tokens, or N passes of a loop that only reads the same
 * bytes, took. Needs AVX-512 VNNI. */
#include <immintrin.h>

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

struct Matrix {
    int64_t rows, columns;
    int bits, group; /* 0: one scale a row */
    uint8_t* codes;
    uint16_t* scale;
    int64_t row_bytes() const { return columns * bits / 8; }
    int64_t scales() const { return group ? columns / group : 1; }
    int64_t bytes() const { return rows * (row_bytes() + scales() * 2); }
};

uint8_t* memory_of(int64_t bytes) {
    int64_t size = (bytes + (2 << 20) - 1) / (2 << 20) * (2 << 20);
    uint8_t* p = static_cast<uint8_t*>(std::aligned_alloc(2 << 20, static_cast<size_t>(size)));
    if (!p) std::exit(2);
    for (int64_t i = 0; i < size; i++) p[i] = static_cast<uint8_t>(i * 37 >> 3);
    return p;
}

float half(uint16_t value) { return _cvtsh_ss(value); }

float row_w8(const Matrix& m, int64_t row, const int8_t* x) {
    const uint8_t* codes = m.codes + row * m.columns;
    __m512i sums[4] = {};
    int64_t c = 0;
    for (; c + 256 <= m.columns; c += 256)
        for (int i = 0; i < 4; i++) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + c + 64 * i + 4096), _MM_HINT_T0);
            sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_loadu_si512(codes + c + 64 * i), _mm512_loadu_si512(x + c + 64 * i));
        }
    for (; c < m.columns; c += 64)
        sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_loadu_si512(codes + c), _mm512_loadu_si512(x + c));
    __m512i all = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
    return static_cast<float>(_mm512_reduce_add_epi32(all)) * half(m.scale[row]);
}

template <int GROUP> float row_w4(const Matrix& m, int64_t row, const int8_t* x) {
    const uint8_t* codes = m.codes + row * m.columns / 2;
    const uint16_t* scale = m.scale + row * m.scales();
    const __m512i low = _mm512_set1_epi8(15), spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 totals[2] = {};
    for (int64_t c = 0, turn = 0; c < m.columns; c += 128, codes += 64, turn ^= 1) {
        _mm_prefetch(reinterpret_cast<const char*>(codes + 4096), _MM_HINT_T0);
        __m512i v = _mm512_loadu_si512(codes), sum = _mm512_setzero_si512();
        sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(v, low), _mm512_loadu_si512(x + c));
        sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(v, 4), low), _mm512_loadu_si512(x + c + 64));
        __m512 factor;
        if constexpr (GROUP == 128) factor = _mm512_set1_ps(half(scale[c / 128]));
        else
            factor = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_cvtph_ps(
                                                       _mm_loadl_epi64(reinterpret_cast<const __m128i*>(scale + c / 32)))));
        totals[turn] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, totals[turn]);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(totals[0], totals[1]));
}

void multiply(const Matrix& m, int64_t first, int64_t last, const int8_t* x, float* y) {
    for (int64_t row = first; row < last; row++)
        y[row] = m.bits == 8 ? row_w8(m, row, x) : m.group == 32 ? row_w4<32>(m, row, x) : row_w4<128>(m, row, x);
}

uint32_t read(const uint8_t* p, int64_t bytes) {
    __m512i sums[4] = {};
    for (int64_t at = 0; at + 256 <= bytes; at += 256)
        for (int i = 0; i < 4; i++) sums[i] = _mm512_or_si512(sums[i], _mm512_loadu_si512(p + at + 64 * i));
    __m512i all = _mm512_or_si512(_mm512_or_si512(sums[0], sums[1]), _mm512_or_si512(sums[2], sums[3]));
    return static_cast<uint32_t>(_mm512_reduce_or_epi32(all));
}

struct Team {
    std::vector<Matrix> matrices;
    int threads = 1;
    bool only_reads = false;
    std::vector<int8_t> x;
    std::atomic<int> job{0}, done{0};
    std::atomic<uint32_t> sink{0};

    void share(int worker, std::vector<float>& y) {
        for (const Matrix& m : matrices) {
            int64_t first = m.rows * worker / threads, last = m.rows * (worker + 1) / threads;
            if (only_reads) sink |= read(m.codes + first * m.row_bytes(), (last - first) * m.row_bytes());
            else multiply(m, first, last, x.data(), y.data());
        }
    }
    void token(std::vector<float>& y) {
        done.store(0);
        job.fetch_add(1);
        share(0, y);
        while (done.load() < threads - 1) _mm_pause();
    }
    void serve(int worker, std::vector<float>& y) {
        for (int seen = 0;;) {
            while (job.load() == seen) _mm_pause();
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
    for (const Matrix& m : team.matrices) total += (m.bytes() + 127) / 64 * 64 + 64;
    uint8_t* memory = memory_of(total + 8192);
    for (Matrix& m : team.matrices) {
        m.codes = memory;
        memory += (m.rows * m.row_bytes() + 63) / 64 * 64;
        m.scale = reinterpret_cast<uint16_t*>(memory);
        std::memset(memory, 0x20, static_cast<size_t>(m.rows * m.scales() * 2)); /* small, and finite */
        memory += (m.rows * m.scales() * 2 + 63) / 64 * 64;
        most = m.columns > most ? m.columns : most;
        largest = m.rows > largest ? m.rows : largest;
    }
    for (int64_t i = 0; i < most + 256; i++) team.x.push_back(static_cast<int8_t>(i * 13));
    std::vector<float> y(static_cast<size_t>(largest));
    std::vector<std::thread> others;
    for (int worker = 1; worker < team.threads; worker++) others.emplace_back([&, worker] { team.serve(worker, y); });
    char word[16];
    for (long times; std::scanf("%15s %ld", word, &times) == 2;) {
        team.only_reads = !std::strcmp(word, "read");
        auto start = std::chrono::steady_clock::now();
        for (long i = 0; i < times; i++) team.token(y);
        std::printf("%.9f %lld\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
                    static_cast<long long>(total));
        std::fflush(stdout);
    }
    team.job.store(-1);
    for (auto& other : others) other.join();
}
