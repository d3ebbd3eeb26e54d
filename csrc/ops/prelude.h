/* What every file in csrc/isa includes first, outside any namespace: declarations and macros, no code. */
#pragma once

#include <string.h>

#include <utility> /* std::integer_sequence, a name without functions */

#include "../isa_table.h"

/* Sums live in registers only if everything between them is inlined and unrolled. Plain C++, and whatever is compiled to be
 * checked, gains nothing from it but minutes of compilation. */
#if defined(BW_PLAIN)
#define INLINE inline
#define INLINE_LAMBDA
#define UNROLL
#else
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif
/* A function that is compiled by itself, once. */
#if defined(__clang__)
#define APART __attribute__((noinline))
#else
#define APART __attribute__((noinline, noclone))
#endif
/* Nothing that touches memory is moved across. */
#define IN_ORDER __asm__ volatile("" ::: "memory")
