#include <algorithm>
#include <cmath>

#include "core/reduce.h"
#include "core/simd.h"
#include "linalg/vector.h"

namespace kantor {

template <class T>
KANTOR_SIMD double dot(int64_t n, const T* x, const T* y) {
  return lane_sum(
      n, [=](int64_t i) KANTOR_INLINE_LAMBDA { return load8(x + i) * load8(y + i); },
      [=](int64_t i) KANTOR_INLINE_LAMBDA { return double(x[i]) * double(y[i]); });
}

template <class T>
KANTOR_SIMD double weighted_square(int64_t n, const T* d, const T* x) {
  return lane_sum(
      n, [=](int64_t i) KANTOR_INLINE_LAMBDA { return load8(d + i) * load8(x + i) * load8(x + i); },
      [=](int64_t i) KANTOR_INLINE_LAMBDA { return double(d[i]) * double(x[i]) * double(x[i]); });
}

template <class T>
double max_abs(int64_t n, const T* x) {
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(double(x[i])));
  return largest;
}

template <class T>
KANTOR_SIMD void multiply_add(int64_t n, T a, const T* __restrict x, T b, const T* __restrict y, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] + b * y[i];
}

template <class T>
KANTOR_SIMD void update_direction(int64_t n, T beta, const T* __restrict z, T* __restrict p) {
  if (beta == 0)
    for (int64_t i = 0; i < n; ++i) p[i] = z[i];
  else
    for (int64_t i = 0; i < n; ++i) p[i] = z[i] + beta * p[i];
}

template <class T>
KANTOR_SIMD void update_direction_scaled(int64_t n, T beta, const T* __restrict d, const T* __restrict z,
                                         T* __restrict p) {
  if (beta == 0)
    for (int64_t i = 0; i < n; ++i) p[i] = d[i] * z[i];
  else
    for (int64_t i = 0; i < n; ++i) p[i] = d[i] * z[i] + beta * p[i];
}

// Two sweeps over a block that is in the first-level cache: the elementwise one vectorises as T, the sum as doubles.
template <class T>
KANTOR_SIMD double update_iterate(int64_t n, T alpha, const T* __restrict p, const T* __restrict q, T* __restrict x,
                                  T* __restrict r) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] += alpha * p[i];
    r[i] -= alpha * q[i];
  }
  return lane_sum(
      n, [=](int64_t i) KANTOR_INLINE_LAMBDA { return load8(r + i) * load8(r + i); },
      [=](int64_t i) KANTOR_INLINE_LAMBDA { return double(r[i]) * double(r[i]); });
}

template <class T>
KANTOR_SIMD double subtract(int64_t n, const T* __restrict b, const double* __restrict ax, T* __restrict r) {
  for (int64_t i = 0; i < n; ++i) r[i] = static_cast<T>(double(b[i]) - ax[i]);
  return lane_sum(
      n,
      [=](int64_t i) KANTOR_INLINE_LAMBDA {
        const Double8 difference = load8(b + i) - load8(ax + i);
        return difference * difference;
      },
      [=](int64_t i) KANTOR_INLINE_LAMBDA { return (double(b[i]) - ax[i]) * (double(b[i]) - ax[i]); });
}

template <class T, class Out>
KANTOR_SIMD void scale(int64_t n, double a, const T* __restrict x, Out* __restrict y, bool accumulate) {
  const Out factor = static_cast<Out>(a);
  if (accumulate)
    for (int64_t i = 0; i < n; ++i) y[i] += factor * Out(x[i]);
  else
    for (int64_t i = 0; i < n; ++i) y[i] = factor * Out(x[i]);
}

#define KANTOR_INSTANTIATE(T)                                                \
  template double dot(int64_t, const T*, const T*);                          \
  template double weighted_square(int64_t, const T*, const T*);              \
  template double max_abs(int64_t, const T*);                                \
  template void multiply_add(int64_t, T, const T*, T, const T*, T*);         \
  template void update_direction(int64_t, T, const T*, T*);                  \
  template void update_direction_scaled(int64_t, T, const T*, const T*, T*); \
  template double update_iterate(int64_t, T, const T*, const T*, T*, T*);    \
  template double subtract(int64_t, const T*, const double*, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

template void scale(int64_t, double, const float*, float*, bool);
template void scale(int64_t, double, const float*, double*, bool);
template void scale(int64_t, double, const double*, double*, bool);

}  // namespace kantor
