// Attributes for leaf loops that are compiled once per instruction set and chosen when the library is loaded.
#pragma once

// KANTOR_SIMD goes before a leaf loop, a function or a function template:
//     template <class T>
//     KANTOR_SIMD void scale(std::int64_t n, T a, T* x) { ... }
// It makes an SSE2, an AVX2 and an AVX-512 copy. Everything the loop calls must be inlined into it (KANTOR_HD or
// KANTOR_ALWAYS_INLINE), or the callee stays SSE2. The copies give the same bits as long as no multiply-add is
// contracted (-ffp-contract=off) and sums use a fixed number of accumulators.
// Needs GCC 12 and the GNU loader's indirect functions; elsewhere, and with KANTOR_NO_SIMD, it is empty.
#if !defined(KANTOR_NO_SIMD) && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(__CUDACC__)
#define KANTOR_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KANTOR_SIMD
#endif

#if defined(__GNUC__)
#define KANTOR_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define KANTOR_ALWAYS_INLINE inline
#endif
