#include <algorithm>
#include <cmath>
#include <cstring>

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
KANTOR_SIMD void multiply_add_in_place(int64_t n, T a, const T* __restrict x, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

template <class T>
KANTOR_SIMD void combine(int64_t n, T a, const T* __restrict x, T b, T* __restrict y) {
  for (int64_t i = 0; i < n; ++i) y[i] = a * x[i] + b * y[i];
}

template <class T>
KANTOR_SIMD void scale_in_place(int64_t n, T a, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] *= a;
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

namespace {

// Eight elements of T, as a vector that arithmetic works on.
template <class T>
struct Eight {
  typedef T Vector __attribute__((vector_size(8 * sizeof(T))));
  Vector v;
  static KANTOR_ALWAYS_INLINE Eight load(const T* source) {
    Eight e;
    std::memcpy(&e.v, source, sizeof e.v);
    return e;
  }
  KANTOR_ALWAYS_INLINE void store(T* target) const { std::memcpy(target, &v, sizeof v); }
  KANTOR_ALWAYS_INLINE Double8 wide() const { return __builtin_convertvector(v, Double8); }
};

// Four sums in one sweep, each in two interleaved lanes of eight: terms8(i, a, b, c, d) adds the terms of eight
// elements from i on, terms(i, sums) those of one.
template <class Terms8, class Terms>
KANTOR_ALWAYS_INLINE FourSums four_sums(int64_t n, Terms8 terms8, Terms terms) {
  Double8 a0{}, b0{}, c0{}, d0{}, a1{}, b1{}, c1{}, d1{};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    terms8(i, a0, b0, c0, d0);
    terms8(i + 8, a1, b1, c1, d1);
  }
  for (; i + 8 <= n; i += 8) terms8(i, a0, b0, c0, d0);
  FourSums tail{};
  for (; i < n; ++i) terms(i, tail);
  const Double8 zero{};
  return {horizontal_sum(a0, a1, zero, zero) + tail[0], horizontal_sum(b0, b1, zero, zero) + tail[1],
          horizontal_sum(c0, c1, zero, zero) + tail[2], horizontal_sum(d0, d1, zero, zero) + tail[3]};
}

}  // namespace

template <class T>
KANTOR_SIMD FourSums update_with_product(int64_t n, T alpha, T shift, const T* __restrict p, const T* __restrict Hp,
                                         T* __restrict y, T* __restrict Hy, T* __restrict r) {
  using E = Eight<T>;
  return four_sums(
      n,
      [=](int64_t i, Double8& rr, Double8& yy, Double8& y_Hy, Double8& Hy_Hy) KANTOR_INLINE_LAMBDA {
        const E p8 = E::load(p + i), Hp8 = E::load(Hp + i);
        const E y8{E::load(y + i).v + alpha * p8.v}, Hy8{E::load(Hy + i).v + alpha * Hp8.v};
        const E r8{E::load(r + i).v + alpha * (Hp8.v + shift * p8.v)};
        y8.store(y + i), Hy8.store(Hy + i), r8.store(r + i);
        const Double8 yd = y8.wide(), Hyd = Hy8.wide(), rd = r8.wide();
        rr += rd * rd, yy += yd * yd, y_Hy += yd * Hyd, Hy_Hy += Hyd * Hyd;
      },
      [=](int64_t i, FourSums& sums) KANTOR_INLINE_LAMBDA {
        y[i] += alpha * p[i];
        Hy[i] += alpha * Hp[i];
        r[i] += alpha * (Hp[i] + shift * p[i]);
        const double yd = y[i], Hyd = Hy[i], rd = r[i];
        sums[0] += rd * rd, sums[1] += yd * yd, sums[2] += yd * Hyd, sums[3] += Hyd * Hyd;
      });
}

template <class T>
KANTOR_SIMD FourSums advance_with_product(int64_t n, T beta, const T* __restrict z, const T* __restrict Hz,
                                          T* __restrict p, T* __restrict Hp) {
  using E = Eight<T>;
  if (beta == 0)  // p and Hp may hold anything
    for (int64_t i = 0; i < n; ++i) p[i] = Hp[i] = 0;
  return four_sums(
      n,
      [=](int64_t i, Double8& pp, Double8& p_Hp, Double8& Hp_Hp, Double8& Hz_Hz) KANTOR_INLINE_LAMBDA {
        const E Hz8 = E::load(Hz + i);
        const E p8{beta * E::load(p + i).v - E::load(z + i).v}, Hp8{beta * E::load(Hp + i).v - Hz8.v};
        p8.store(p + i), Hp8.store(Hp + i);
        const Double8 pd = p8.wide(), Hpd = Hp8.wide(), Hzd = Hz8.wide();
        pp += pd * pd, p_Hp += pd * Hpd, Hp_Hp += Hpd * Hpd, Hz_Hz += Hzd * Hzd;
      },
      [=](int64_t i, FourSums& sums) KANTOR_INLINE_LAMBDA {
        p[i] = beta * p[i] - z[i];
        Hp[i] = beta * Hp[i] - Hz[i];
        const double pd = p[i], Hpd = Hp[i], Hzd = Hz[i];
        sums[0] += pd * pd, sums[1] += pd * Hpd, sums[2] += Hpd * Hpd, sums[3] += Hzd * Hzd;
      });
}

template <class T>
KANTOR_SIMD FourSums direction_sums(int64_t n, const T* p, const T* q, const T* r) {
  return four_sums(
      n,
      [=](int64_t i, Double8& pq, Double8& pr, Double8& pp, Double8& qq) KANTOR_INLINE_LAMBDA {
        const Double8 pd = load8(p + i), qd = load8(q + i), rd = load8(r + i);
        pq += pd * qd, pr += pd * rd, pp += pd * pd, qq += qd * qd;
      },
      [=](int64_t i, FourSums& sums) KANTOR_INLINE_LAMBDA {
        const double pd = p[i], qd = q[i], rd = r[i];
        sums[0] += pd * qd, sums[1] += pd * rd, sums[2] += pd * pd, sums[3] += qd * qd;
      });
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

#define KANTOR_INSTANTIATE(T)                                                           \
  template void multiply_add_in_place(int64_t, T, const T*, T*);                        \
  template void combine(int64_t, T, const T*, T, T*);                                   \
  template FourSums update_with_product(int64_t, T, T, const T*, const T*, T*, T*, T*); \
  template FourSums advance_with_product(int64_t, T, const T*, const T*, T*, T*);       \
  template double dot(int64_t, const T*, const T*);                                     \
  template double weighted_square(int64_t, const T*, const T*);                         \
  template double max_abs(int64_t, const T*);                                           \
  template void multiply_add(int64_t, T, const T*, T, const T*, T*);                    \
  template void scale_in_place(int64_t, T, T*);                                         \
  template FourSums direction_sums(int64_t, const T*, const T*, const T*);              \
  template void update_direction(int64_t, T, const T*, T*);                             \
  template void update_direction_scaled(int64_t, T, const T*, const T*, T*);            \
  template double update_iterate(int64_t, T, const T*, const T*, T*, T*);               \
  template double subtract(int64_t, const T*, const double*, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

template void scale(int64_t, double, const float*, float*, bool);
template void scale(int64_t, double, const float*, double*, bool);
template void scale(int64_t, double, const double*, double*, bool);

}  // namespace kantor
