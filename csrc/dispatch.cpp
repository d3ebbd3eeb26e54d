/* Which instruction sets this build has, which of them this processor has, and which is in use. */
#include <cstring>

#include "isa_table.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

struct Entry {
    const bw_isa_table* table;
    bool (*is_supported)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bfloat16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(__aarch64__) && !defined(BITWRIGHT_FEW_ISAS)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return true; /* every processor of Apple's computers */
#endif
}
#endif

constexpr Entry ENTRIES[] = {
    {&bw_scalar_table, always},
#if defined(__x86_64__)
#if !defined(BITWRIGHT_FEW_ISAS)
    {&bw_avx2_table, has_avx2},
    {&bw_avx512_table, has_avx512},
    {&bw_avx512_vnni_table, has_vnni},
#endif
    {&bw_avx512_bf16_table, has_bfloat16},
#elif defined(__aarch64__) && !defined(BITWRIGHT_FEW_ISAS)
    {&bw_neon_table, always},
    {&bw_neon_dotprod_table, has_dotprod},
#endif
};
constexpr int COUNT = sizeof ENTRIES / sizeof *ENTRIES;

const bw_isa_table* selected = nullptr;

}  // namespace

const bw_isa_table* bw_isa(void) {
    if (!selected) bw_isa_select(nullptr);
    return selected;
}

int bw_isa_count(void) { return COUNT; }

const char* bw_isa_name(int index) { return index >= 0 && index < COUNT ? ENTRIES[index].table->name : nullptr; }

int bw_isa_is_supported(int index) { return index >= 0 && index < COUNT && ENTRIES[index].is_supported(); }

int bw_isa_select(const char* name) {
    for (int i = COUNT - 1; i >= 0; i--)
        if ((!name || !std::strcmp(name, ENTRIES[i].table->name)) && ENTRIES[i].is_supported()) {
            selected = ENTRIES[i].table;
            return BW_OK;
        }
    return BW_BAD_ARGUMENT;
}

const char* bw_isa_selected(void) { return bw_isa()->name; }
