/* What the rounds of entry_points.cpp and decoder_rounds.cpp share. */
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/kernels.h"

inline std::mt19937_64 generator;

inline int64_t draw(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }

/* Exactly `size` bytes of anything. */
struct Bytes {
    std::vector<unsigned char> values;
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
