// The leaf loops over one row of the plan, vectorised. A row is handled in blocks of `block` columns and padded to
// whole blocks with -inf. Its exponents go into a buffer of m doubles that stays in the first- or second-level cache:
//   logits      t_j = (g_j - C_ij) / eps, and the largest of each block        read C (or the points), write t
//   exponents   e_j = exp(t_j - largest), in blocks that matter                 t in place
//   what the pass is for: sums, products, entries above a threshold, over the blocks that matter
// At small eps nearly all blocks lie far below their row's largest entry; they cost the first loop only.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/simd.h"
#include "core/vecmath.h"
#include "transport/passes.h"

namespace kantor::transport {

inline constexpr int block = 16;
inline constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

inline int64_t blocks_of(int64_t m) { return (m + block - 1) / block; }

namespace detail {

KANTOR_ALWAYS_INLINE double block_largest(const double* t) {
  double largest[block];
  for (int j = 0; j < block; ++j) largest[j] = t[j];
  return vecmath::detail::tree_block<block>(largest, [](double a, double b) { return a > b ? a : b; });
}

// Costs of one block of columns j..j+15 against row i.
template <class T>
struct DenseBlock {
  const T* row;
  KANTOR_ALWAYS_INLINE double one(int64_t j) const { return static_cast<double>(row[j]); }
  KANTOR_ALWAYS_INLINE void whole(int64_t j, double* c) const {
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) c[k] = static_cast<double>(row[j + k]);
  }
};

enum class Norm { square, root, absolute, power, dot };

template <class T, Norm norm>
struct PointBlock {
  const T* x;
  const T* y_by_axis;
  int64_t m, d;
  double p;

  KANTOR_ALWAYS_INLINE static double term(double x, double y, double p) {
    if constexpr (norm == Norm::dot) return x * y;
    const double difference = x - y;
    if constexpr (norm == Norm::absolute) return difference < 0 ? -difference : difference;
    if constexpr (norm == Norm::power) {
      const double size = difference < 0 ? -difference : difference;
      return vecmath::exp(p * vecmath::log(size));
    }
    return difference * difference;
  }
  KANTOR_ALWAYS_INLINE static double finish(double sum) {
    if constexpr (norm == Norm::root) return __builtin_sqrt(sum);
    if constexpr (norm == Norm::dot) return 1 - sum;
    return sum;
  }
  KANTOR_ALWAYS_INLINE double one(int64_t j) const {
    double sum = 0;
    for (int64_t axis = 0; axis < d; ++axis) sum += term(double(x[axis]), double(y_by_axis[axis * m + j]), p);
    return finish(sum);
  }
  KANTOR_ALWAYS_INLINE void whole(int64_t j, double* c) const {
    double sum[block] = {};
    for (int64_t axis = 0; axis < d; ++axis) {
      const double at = static_cast<double>(x[axis]);
      const T* y = y_by_axis + axis * m + j;
#pragma GCC ivdep
      for (int k = 0; k < block; ++k) sum[k] += term(at, static_cast<double>(y[k]), p);
    }
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) c[k] = finish(sum[k]);
  }
};

template <class Costs>
KANTOR_ALWAYS_INLINE double logits(const Costs& costs, int64_t m, const double* g, double inverse_eps, double* t,
                                   double* block_largest_of) {
  double largest = minus_infinity;
  int64_t j = 0;
  for (; j + block <= m; j += block) {
    double c[block];
    costs.whole(j, c);
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) t[j + k] = (g[j + k] - c[k]) * inverse_eps;
    const double here = block_largest(t + j);
    block_largest_of[j / block] = here;
    if (here > largest) largest = here;
  }
  if (j < m) {
    for (int k = 0; k < block; ++k) t[j + k] = j + k < m ? (g[j + k] - costs.one(j + k)) * inverse_eps : minus_infinity;
    const double here = block_largest(t + j);
    block_largest_of[j / block] = here;
    if (here > largest) largest = here;
  }
  return largest;
}

}  // namespace detail

// --- one row's exponents, by kind of cost ---

template <class T>
KANTOR_SIMD double dense_logits(int64_t m, const T* row, const double* g, double inverse_eps, double* t,
                                double* largest) {
  return detail::logits(detail::DenseBlock<T>{row}, m, g, inverse_eps, t, largest);
}

#define KANTOR_POINT_LOGITS(name, norm)                                                                          \
  template <class T>                                                                                             \
  KANTOR_SIMD double name(int64_t m, int64_t d, double p, const T* x, const T* y, const double* g,               \
                          double inverse_eps, double* t, double* largest) {                                      \
    return detail::logits(detail::PointBlock<T, norm>{x, y, m, d, p}, m, g, inverse_eps, t, largest);            \
  }
KANTOR_POINT_LOGITS(sqeuclidean_logits, detail::Norm::square)
KANTOR_POINT_LOGITS(euclidean_logits, detail::Norm::root)
KANTOR_POINT_LOGITS(l1_logits, detail::Norm::absolute)
KANTOR_POINT_LOGITS(lp_logits, detail::Norm::power)
KANTOR_POINT_LOGITS(cosine_logits, detail::Norm::dot)
#undef KANTOR_POINT_LOGITS

// --- what is done with them ---

// e_j = exp(t_j - shift) in place, in blocks whose largest reaches `lowest`; their numbers go to `active`.
// Returns the sum of all e; *count is the number of active blocks.
inline KANTOR_SIMD double exponentials(int64_t blocks, double shift, double lowest, const double* largest, double* t,
                                       int32_t* active, int64_t* count) {
  double sums[block] = {};
  int64_t used = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(largest[b] >= lowest)) continue;
    active[used++] = static_cast<int32_t>(b);
    double* e = t + b * block;
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) {
      e[k] = vecmath::exp_nonpositive(e[k] - shift);
      sums[k] += e[k];
    }
  }
  *count = used;
  return vecmath::detail::tree_block<block>(sums, [](double a, double b) { return a + b; });
}

// The same without a bound on the exponents: +inf where they overflow.
inline KANTOR_SIMD double unbounded_exponentials(int64_t blocks, double shift, double lowest, const double* largest,
                                                 double* t, int32_t* active, int64_t* count) {
  double sums[block] = {};
  int64_t used = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(largest[b] >= lowest)) continue;
    active[used++] = static_cast<int32_t>(b);
    double* e = t + b * block;
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) {
      e[k] = vecmath::exp(e[k] - shift);
      sums[k] += e[k];
    }
  }
  *count = used;
  return vecmath::detail::tree_block<block>(sums, [](double a, double b) { return a + b; });
}

// sums_j += weight e_j
inline KANTOR_SIMD void add_row(int64_t count, const int32_t* active, const double* e, double weight, double* sums) {
  for (int64_t a = 0; a < count; ++a) {
    const int64_t j = int64_t(active[a]) * block;
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) sums[j + k] += weight * e[j + k];
  }
}

// sum_j e_j v_j
inline KANTOR_SIMD double dot_row(int64_t count, const int32_t* active, const double* e, const double* v) {
  double sums[block] = {};
  for (int64_t a = 0; a < count; ++a) {
    const int64_t j = int64_t(active[a]) * block;
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) sums[k] += e[j + k] * v[j + k];
  }
  return vecmath::detail::tree_block<block>(sums, [](double a, double b) { return a + b; });
}

// largest_j = max(largest_j, t_j + shift) over a padded row.
inline KANTOR_SIMD void column_maxima(int64_t padded, const double* t, double shift, double* largest) {
#pragma GCC ivdep
  for (int64_t j = 0; j < padded; ++j) largest[j] = t[j] + shift > largest[j] ? t[j] + shift : largest[j];
}

// sums_j += exp(t_j + shift - largest_j): at most 1 each, since largest_j is the maximum over rows.
inline KANTOR_SIMD void column_exponentials(int64_t padded, const double* t, double shift, const double* largest,
                                            double* sums) {
#pragma GCC ivdep
  for (int64_t j = 0; j < padded; ++j) {
    const double exponent = t[j] + shift - largest[j];
    sums[j] += vecmath::exp_nonpositive(exponent <= 0 ? exponent : 0.0);
  }
}

}  // namespace kantor::transport
