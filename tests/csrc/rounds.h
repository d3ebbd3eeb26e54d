/* What the rounds of entry_points.cpp, decoder_rounds.cpp and grid_rounds.cpp share. */
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include <sys/mman.h>

#include <new>

#include "../../csrc/kernels.h"

inline std::mt19937_64 generator;

inline int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }
inline int32_t draw32(int64_t least, int64_t most) { return static_cast<int32_t>(draw(least, most)); }

/* Memory between pages that nobody may touch: it ends where the second one begins, or, sometimes, begins where the first
 * ends. One byte too far ends the program, however the kernel was compiled. What is smaller than a vector is so found where
 * the address sanitizer checks nothing: in kernels that were compiled as they are shipped. */
template <class T> struct Guarded {
    using value_type = T;
    static constexpr size_t PAGE = 4096;

    static size_t whole(size_t count) { return (count * sizeof(T) + PAGE - 1) / PAGE * PAGE; }
    T* allocate(size_t count) {
        size_t size = whole(count);
        void* all = mmap(nullptr, size + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED) throw std::bad_alloc();
        char* first = static_cast<char*>(all) + PAGE;
        if (mprotect(first, size, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
        return reinterpret_cast<T*>(first + (generator() % 4 ? size - count * sizeof(T) : 0));
    }
    void deallocate(T* memory, size_t count) {
        char* first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(memory) / PAGE * PAGE);
        munmap(first - PAGE, whole(count) + 2 * PAGE);
    }
    bool operator==(const Guarded&) const { return true; }
};

#if defined(__SANITIZE_ADDRESS__)
template <class T> using Array = std::vector<T>;
#else
template <class T> using Array = std::vector<T, Guarded<T>>;
#endif

/* Exactly `size` bytes of anything. */
struct Bytes {
    Array<unsigned char> values;
    explicit Bytes(size_t size) : values(size) {
        for (auto& value : values) value = static_cast<unsigned char>(generator());
        values.shrink_to_fit();
    }
    template <class T> T* as() { return values.empty() ? nullptr : reinterpret_cast<T*>(values.data()); }
};

inline void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

void rows_round();     /* packed floats, and rows looked up */
void pages_round();    /* keys and values in pages, and attention */
void decoder_round();  /* whole steps */
void sampling_round(); /* tokens from logits */
void grid_round();     /* numbers to codes, and back */
void scaling_round();  /* scaled weights, and their gradients */
