// The leaf loops over one row of the plan, vectorised. A row is handled in blocks of `block` columns and padded to
// whole blocks with -inf. Its exponents go into a buffer of m doubles that stays in the first- or second-level cache:
//   logits      t_j = (g_j - C_ij) / eps, and the largest of each block        read C (or the points), write t
//   exponents   e_j = exp(t_j - largest), in blocks that matter                 t in place
//   what the pass is for: sums, products, entries above a threshold, over the blocks that matter
// At small eps nearly all blocks lie far below their row's largest entry; they cost the first loop only.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/reduce.h"
#include "core/simd.h"
#include "core/vecmath.h"
#include "transport/passes.h"

namespace kantor::transport {

inline constexpr int block = 16;
inline constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

inline int64_t blocks_of(int64_t m) { return (m + block - 1) / block; }

namespace detail {

KANTOR_ALWAYS_INLINE Double8 splat(double x) { return Double8{x, x, x, x, x, x, x, x}; }
KANTOR_ALWAYS_INLINE void store8(double* target, Double8 values) { std::memcpy(target, &values, sizeof values); }
KANTOR_ALWAYS_INLINE Double8 larger8(Double8 a, Double8 b) { return a > b ? a : b; }

KANTOR_ALWAYS_INLINE double largest_of(Double8 v) {
  typedef int64_t Index __attribute__((vector_size(64)));
  v = larger8(v, __builtin_shuffle(v, Index{4, 5, 6, 7, 0, 1, 2, 3}));
  v = larger8(v, __builtin_shuffle(v, Index{2, 3, 0, 1, 6, 7, 4, 5}));
  v = larger8(v, __builtin_shuffle(v, Index{1, 0, 3, 2, 5, 4, 7, 6}));
  return v[0];
}

// Costs against row i: of eight columns from j on, and of one.
template <class T>
struct DenseCosts {
  const T* row;
  KANTOR_ALWAYS_INLINE double one(int64_t j) const { return static_cast<double>(row[j]); }
  KANTOR_ALWAYS_INLINE Double8 eight(int64_t j) const { return load8(row + j); }
};

enum class Norm { square, root, absolute, power, dot };

// `dims` is d where the compiler may know it, or 0.
template <class T, Norm norm, int dims>
struct PointCosts {
  const T* x;
  const T* y_by_axis;
  int64_t m, d;
  double p;
  Double8 at[dims ? dims : 1];  // x where d is known: kept in registers

  KANTOR_ALWAYS_INLINE PointCosts(const T* x_, const T* y_, int64_t m_, int64_t d_, double p_)
      : x(x_), y_by_axis(y_), m(m_), d(d_), p(p_) {
    for (int axis = 0; axis < dims; ++axis) at[axis] = splat(static_cast<double>(x[axis]));
  }
  KANTOR_ALWAYS_INLINE static double power(double size, double p) { return vecmath::exp(p * vecmath::log(size)); }
  KANTOR_ALWAYS_INLINE static Double8 power(Double8 sizes, double p) {
    double lanes[8];
    store8(lanes, sizes);
#pragma GCC ivdep
    for (int k = 0; k < 8; ++k) lanes[k] = power(lanes[k], p);
    return load8(lanes);
  }
  KANTOR_ALWAYS_INLINE static double root(double sum) { return __builtin_sqrt(sum); }
  KANTOR_ALWAYS_INLINE static Double8 root(Double8 sums) {
    double lanes[8];
    store8(lanes, sums);
    for (int k = 0; k < 8; ++k) lanes[k] = __builtin_sqrt(lanes[k]);
    return load8(lanes);
  }
  template <class V>
  KANTOR_ALWAYS_INLINE static V term(V x, V y, double p) {
    if constexpr (norm == Norm::dot) return x * y;
    const V difference = x - y;
    if constexpr (norm == Norm::absolute || norm == Norm::power) {
      const V size = difference < 0 ? -difference : difference;
      if constexpr (norm == Norm::absolute) return size;
      if constexpr (norm == Norm::power) return power(size, p);
    }
    return difference * difference;
  }
  template <class V>
  KANTOR_ALWAYS_INLINE static V finish(V sum) {
    if constexpr (norm == Norm::dot) return 1 - sum;
    if constexpr (norm == Norm::root) return root(sum);
    return sum;
  }
  KANTOR_ALWAYS_INLINE double one(int64_t j) const {
    double sum = 0;
    for (int64_t axis = 0; axis < d; ++axis) sum += term<double>(x[axis], y_by_axis[axis * m + j], p);
    return finish(sum);
  }
  KANTOR_ALWAYS_INLINE Double8 eight(int64_t j) const {
    Double8 sum{};
    if constexpr (dims > 0) {
      for (int axis = 0; axis < dims; ++axis) sum += term<Double8>(at[axis], load8(y_by_axis + axis * m + j), p);
    } else {
      for (int64_t axis = 0; axis < d; ++axis)
        sum += term<Double8>(splat(static_cast<double>(x[axis])), load8(y_by_axis + axis * m + j), p);
    }
    return finish(sum);
  }
};

template <class Costs>
KANTOR_ALWAYS_INLINE double logits(const Costs& costs, int64_t m, const double* g, double inverse_eps, double* t,
                                   double* block_largest) {
  double largest = minus_infinity;
  int64_t j = 0;
  for (; j + block <= m; j += block) {
    const Double8 low = (load8(g + j) - costs.eight(j)) * inverse_eps;
    const Double8 high = (load8(g + j + 8) - costs.eight(j + 8)) * inverse_eps;
    store8(t + j, low);
    store8(t + j + 8, high);
    const double here = largest_of(larger8(low, high));
    block_largest[j / block] = here;
    largest = here > largest ? here : largest;
  }
  if (j < m) {
    double here = minus_infinity;
    for (int k = 0; k < block; ++k) {
      t[j + k] = j + k < m ? (g[j + k] - costs.one(j + k)) * inverse_eps : minus_infinity;
      here = t[j + k] > here ? t[j + k] : here;
    }
    block_largest[j / block] = here;
    largest = here > largest ? here : largest;
  }
  return largest;
}

}  // namespace detail

// --- one row's exponents, by kind of cost ---

template <class T>
KANTOR_SIMD double dense_logits(int64_t m, const T* row, const double* g, double inverse_eps, double* t,
                                double* largest) {
  return detail::logits(detail::DenseCosts<T>{row}, m, g, inverse_eps, t, largest);
}

#define KANTOR_POINT_LOGITS(name, norm)                                                                                \
  template <class T, int dims>                                                                                         \
  KANTOR_SIMD double name(int64_t m, int64_t d, double p, const T* x, const T* y, const double* g, double inverse_eps, \
                          double* t, double* largest) {                                                                \
    return detail::logits(detail::PointCosts<T, norm, dims>(x, y, m, d, p), m, g, inverse_eps, t, largest);            \
  }
KANTOR_POINT_LOGITS(sqeuclidean_logits, detail::Norm::square)
KANTOR_POINT_LOGITS(euclidean_logits, detail::Norm::root)
KANTOR_POINT_LOGITS(l1_logits, detail::Norm::absolute)
KANTOR_POINT_LOGITS(lp_logits, detail::Norm::power)
KANTOR_POINT_LOGITS(cosine_logits, detail::Norm::dot)
#undef KANTOR_POINT_LOGITS

// --- what is done with them ---

// e_j = exp(t_j - shift) in place, in blocks whose largest reaches `lowest`; their numbers go to `active`. Returns the
// sum of all e; *count is the number of active blocks. `bounded`: no exponent is positive; else e is +inf where it
// overflows.
template <bool bounded>
KANTOR_SIMD double exponentials(int64_t blocks, double shift, double lowest, const double* largest, double* t,
                                int32_t* active, int64_t* count) {
  double sums[block] = {};
  int64_t used = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    if (!(largest[b] >= lowest)) continue;
    active[used++] = static_cast<int32_t>(b);
    double* e = t + b * block;
#pragma GCC ivdep
    for (int k = 0; k < block; ++k) {
      e[k] = bounded ? vecmath::exp_nonpositive(e[k] - shift) : vecmath::exp(e[k] - shift);
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
    detail::store8(sums + j, load8(sums + j) + weight * load8(e + j));
    detail::store8(sums + j + 8, load8(sums + j + 8) + weight * load8(e + j + 8));
  }
}

// sum_j e_j v_j
inline KANTOR_SIMD double dot_row(int64_t count, const int32_t* active, const double* e, const double* v) {
  Double8 low{}, high{};
  for (int64_t a = 0; a < count; ++a) {
    const int64_t j = int64_t(active[a]) * block;
    low += load8(e + j) * load8(v + j);
    high += load8(e + j + 8) * load8(v + j + 8);
  }
  return horizontal_sum(low, high, Double8{}, Double8{});
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
