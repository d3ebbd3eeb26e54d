/* Everything that an instruction set's file compiles, inside its own anonymous namespace; see csrc/isa. */

#include "routes.h"
#include "output.h"
#include "layers.h"
#include "tokens.h"
#include "linear.h"
#include "integer.h"
#include "ceilings.h"
#include "pages_search.h"
#include "pages.h"
#include "attention.h"
#include "sampling.h"
#include "grid.h"
#include "scaling.h"

template <class R, int BITS> void run_panels(const bw_linear_job* job, int64_t first, int64_t last) {
    constexpr bool IS_COMMON = BITS >= 8 || BITS <= 4; /* worth a way of its own for one and two tokens */
    constexpr bool IS_DIRECT = R::STEPS == 1 && (BITS == 8 || BITS == 4); /* for any number of tokens */
    const bool has_scales = job->tokens.scale_group != 0; /* for parts of a token: in their own ways where others are direct */
    alignas(64) float totals[BW_TOKENS * BW_PANEL];
    alignas(64) uint32_t carried[BW_TOKENS * BW_PANEL];
    const bw_weight& w = *job->weight;
    const Levels levels = make_levels(w);
    const int64_t size = job->tokens.group, groups = (w.slots + size - 1) / size, tokens = job->tokens.count;
    const int64_t weight_groups = (w.slots + w.group - 1) / w.group;
    for (int64_t panel = first; panel < last; panel++) {
        PanelPlace at{*job, panel, groups, weight_groups, w.codes + panel * (w.slots / BW_BLOCK) * 4 * 64 * BITS};
        if constexpr (IS_DIRECT) {
            if (has_scales) {
                sum_packed_tiles<BITS, true>(at, totals);
                write_panel(*job, panel, totals);
                continue;
            }
        }
        if constexpr (R::STEPS == 1 && BITS < 4) {
            if (has_scales && tokens <= 2) {
                sum_few<BITS>(at, totals);
                write_panel(*job, panel, totals);
                continue;
            }
        }
        if constexpr (IS_COMMON) {
            if (tokens <= 2 && !has_scales) {
                if (tokens == 1) sum_whole_panel<R, BITS, 1>(at, levels, totals);
                else sum_whole_panel<R, BITS, 2>(at, levels, totals);
                write_panel(*job, panel, totals);
                continue;
            }
        }
        if constexpr (IS_DIRECT) {
            sum_packed_tiles<BITS, false>(at, totals);
            write_panel(*job, panel, totals);
            continue;
        }
        memset(totals, 0, sizeof(float) * (size_t)(tokens * BW_PANEL));
        for (int64_t group = 0; group < groups; group++) {
            int64_t whole = w.slots / size - group, small = R::SMALL / size < whole ? R::SMALL / size : whole;
            if (small < 2) sum_in_chunks<R, BITS>(at, group, levels, carried, totals);
            else {
                sum_small_groups<R, BITS>(at, group, small, levels, totals);
                group += small - 1;
            }
        }
        write_panel(*job, panel, totals);
    }
}

template <class R> void run_route(const bw_linear_job* job, int64_t first, int64_t last) {
    switch (job->weight->bits) {
        case 2: return run_panels<R, 2>(job, first, last);
        case 3: return run_panels<R, 3>(job, first, last);
        case 4: return run_panels<R, 4>(job, first, last);
        case 5: return run_panels<R, 5>(job, first, last);
        case 6: return run_panels<R, 6>(job, first, last);
        case 7: return run_panels<R, 7>(job, first, last);
        case 16:
            if constexpr (R::STEPS > 1) return run_panels<R, 16>(job, first, last);
            return;
        case 32:
            if constexpr (R::STEPS == 4) return run_panels<R, 32>(job, first, last);
            return;
        default: return run_panels<R, 8>(job, first, last);
    }
}

void run_linear(const bw_linear_job* job, int64_t first, int64_t last) {
    if (job->tokens.route == BW_ROUTE_INTEGER || job->tokens.route == BW_ROUTE_WIDE)
        return run_route<Integer>(job, first, last);
#if defined(BW_PAIRS)
    if (job->tokens.route == BW_ROUTE_BFLOAT16) return run_route<Bfloat16>(job, first, last);
#endif
    run_route<Float32>(job, first, last);
}

#if defined(BW_PAIRS)
#define BW_HAS_BFLOAT16 1
#else
#define BW_HAS_BFLOAT16 0
#endif
#define BW_TABLE(symbol, name) \
    extern "C" const bw_isa_table symbol = {name,     BW_HAS_BFLOAT16, prepare_token, run_linear, rms_norm, silu_multiply, \
                                            rotate, write_token,     attend,        largest,    weigh_numbers, find_ranges, \
                                            encode_rows, decode_rows, step_rows, scale_rows, pull_back, read_memory, multiply}
