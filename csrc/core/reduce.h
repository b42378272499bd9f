// Deterministic reductions: every sum is accumulated in double, chunk by chunk (parallel.h), each chunk in 32
// interleaved lanes, and the chunk sums are added in a fixed binary tree. Same bits for any number of threads and any
// SIMD level.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/simd.h"

namespace kantor {

// Pairwise sum of partial sums: O(log n) roundings instead of O(n).
inline double tree_sum(const double* values, int64_t n) {
  if (n <= 8) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
  }
  const int64_t half = n / 2;
  return tree_sum(values, half) + tree_sum(values + half, n - half);
}

// Eight doubles; the compiler lowers it to whatever registers the SIMD clone has.
using Double8 = double __attribute__((vector_size(64)));

template <class T>
KANTOR_ALWAYS_INLINE Double8 load8(const T* source) {
  typedef T T8 __attribute__((vector_size(8 * sizeof(T))));  // `using` drops the attribute of a dependent type
  T8 values;
  std::memcpy(&values, source, sizeof values);
  return __builtin_convertvector(values, Double8);
}

KANTOR_ALWAYS_INLINE double horizontal_sum(Double8 a, Double8 b, Double8 c, Double8 d) {
  const Double8 s = (a + b) + (c + d);
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// Attribute of a lambda used inside a KANTOR_SIMD loop: outside the clone it would be compiled for SSE2.
#define KANTOR_INLINE_LAMBDA __attribute__((always_inline))

// sum_i term(i), where term8(i) gives eight consecutive terms at once.
template <class Term8, class Term>
KANTOR_ALWAYS_INLINE double lane_sum(int64_t n, Term8 term8, Term term) {
  Double8 a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    a += term8(i);
    b += term8(i + 8);
    c += term8(i + 16);
    d += term8(i + 24);
  }
  for (; i + 8 <= n; i += 8) a += term8(i);
  double tail = 0;
  for (; i < n; ++i) tail += term(i);
  return horizontal_sum(a, b, c, d) + tail;
}

}  // namespace kantor
