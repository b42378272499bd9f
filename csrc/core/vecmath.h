// exp and log that the compiler can vectorise: no branch, no call, no table, and no multiply-add whose contraction
// would change the bits (compile with -ffp-contract=off), so every SIMD level gives the same result. Loops over arrays
// follow.
//
// exp(x)   within 1 ulp where the result is a normal number; 0 for x < -700 (double) or x < -87 (float), so that no
//          result is subnormal: those are 10 to 30 times slower to compute and to use. +inf above the largest finite
//          result, NaN for NaN.
// log(x)   within 1 ulp, subnormal x included; -inf for 0 and -0, NaN for x < 0 and NaN, +inf for +inf.
//
// Method: argument reduction by powers of two in the two-constant form of Cody and Waite (Software Manual for the
// Elementary Functions, 1980), then minimax polynomials (Remez exchange in 50-digit arithmetic; the errors are noted).
#pragma once
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/simd.h"

namespace kantor::vecmath {

namespace detail {

// c0 + c1 x + c2 x^2 + ..., Horner's rule in x^2 on pairs of terms: no more operations, half as long a chain of them.
template <class T>
KANTOR_ALWAYS_INLINE T polynomial(T, T, T c0) {
  return c0;
}
template <class T>
KANTOR_ALWAYS_INLINE T polynomial(T x, T, T c0, T c1) {
  return c1 * x + c0;
}
template <class T, class... Rest>
KANTOR_ALWAYS_INLINE T polynomial(T x, T square, T c0, T c1, Rest... rest) {
  return polynomial(x, square, rest...) * square + (c1 * x + c0);
}

template <class T>
struct Constants;

template <>
struct Constants<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Bits exponent_bias = 1023;
  static constexpr double exp_lowest = -700, exp_highest = 0x1.62e42fefa39efp+9;  // the log of the largest number
  static constexpr double log2_e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefa2p-1;  // 40 fraction bits: exact times any exponent
  static constexpr double ln2_low = 0x1.9ef35793c7673p-41;
  static constexpr double sqrt_half = 0x1.6a09e667f3bcdp-1;
  // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2; relative error of exp 2^-57.9.
  static KANTOR_ALWAYS_INLINE double exp_tail(double r, double square) {
    return polynomial(r, square, 0x1.000000000000ap-1, 0x1.55555555554fap-3, 0x1.555555555087dp-5, 0x1.1111111127be7p-7,
                      0x1.6c16c1842a0ffp-10, 0x1.a01a012a570b6p-13, 0x1.a0199a0c691c3p-16, 0x1.71df2553cf019p-19,
                      0x1.28ad72cc49578p-22, 0x1.ad7f6c633011bp-26);
  }
  // (log((1+s)/(1-s)) / s - 2) / z on z = s^2, |s| <= (sqrt(2)-1)/(sqrt(2)+1); relative error of log 2^-59.5.
  static KANTOR_ALWAYS_INLINE double log_tail(double z) {
    return polynomial(z, z * z, 0x1.5555555555592p-1, 0x1.999999997fe69p-2, 0x1.24924941e8671p-2, 0x1.c71c520fa8fddp-3,
                      0x1.74663dc59f195p-3, 0x1.39a1d43bf529ep-3, 0x1.2f04868d8d287p-3);
  }
};

template <>
struct Constants<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Bits exponent_bias = 127;
  static constexpr float exp_lowest = -87, exp_highest = 0x1.62e42ep+6f;
  static constexpr float log2_e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f;  // 15 fraction bits
  static constexpr float ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float sqrt_half = 0x1.6a09e6p-1f;
  // As above; relative errors 2^-28.3 and 2^-37.6.
  static KANTOR_ALWAYS_INLINE float exp_tail(float r, float square) {
    return polynomial(r, square, 0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2434p-10f);
  }
  static KANTOR_ALWAYS_INLINE float log_tail(float z) {
    return polynomial(z, z * z, 0x1.555554p-1f, 0x1.999a7ap-2f, 0x1.2438e8p-2f, 0x1.e2f452p-3f);
  }
};

template <class T>
using BitsOf = typename Constants<T>::Bits;

template <class T>
KANTOR_ALWAYS_INLINE BitsOf<T> to_bits(T x) {
  return std::bit_cast<BitsOf<T>>(x);
}
template <class T>
KANTOR_ALWAYS_INLINE T from_bits(BitsOf<T> bits) {
  return std::bit_cast<T>(bits);
}

// condition ? yes : no, on bit patterns: a plain conditional invites the compiler to move the computation of either
// side under a branch, and the loop is no longer vectorised.
template <class T>
KANTOR_ALWAYS_INLINE T select(bool condition, T yes, T no) {
  const BitsOf<T> mask = BitsOf<T>{0} - static_cast<BitsOf<T>>(condition);
  return from_bits<T>((to_bits(yes) & mask) | (to_bits(no) & ~mask));
}

}  // namespace detail

namespace detail {

// exp(x) = mantissa 2^k with mantissa in [0.7, 1.5). Adding the shifter rounds x log2(e) to the integer k, which is
// left in the low bits of the sum, together with `offset`.
template <class T>
struct ExpParts {
  T mantissa;
  BitsOf<T> shifted;
};
template <class T>
KANTOR_ALWAYS_INLINE ExpParts<T> exp_parts(T x, BitsOf<T> offset) {
  using C = Constants<T>;
  const T shifter = static_cast<T>((BitsOf<T>{3} << (C::mantissa_bits - 1)) + offset);
  const T shifted = x * C::log2_e + shifter;
  const T k = shifted - shifter;
  const T r = (x - k * C::ln2_high) - k * C::ln2_low;
  const T square = r * r;
  return {T(1) + (r + square * C::exp_tail(r, square)), to_bits(shifted)};
}

}  // namespace detail

template <class T>
KANTOR_ALWAYS_INLINE T exp(T x) {
  using C = detail::Constants<T>;
  const auto [mantissa, shifted] = detail::exp_parts(x, 0);
  const T scaled = detail::from_bits<T>(detail::to_bits(mantissa) + (shifted << C::mantissa_bits));
  const T bounded = detail::select(x <= C::exp_highest, scaled, x + std::numeric_limits<T>::infinity());
  return detail::select(x < C::exp_lowest, T(0), bounded);
}

// exp(x) for x <= 0 and NaN: a tenth cheaper. What softmax and log-sum-exp need, with the maximum taken out.
template <class T>
KANTOR_ALWAYS_INLINE T exp_nonpositive(T x) {
  using C = detail::Constants<T>;
  const auto [mantissa, shifted] = detail::exp_parts(x, C::exponent_bias);
  const T scale = detail::from_bits<T>(shifted << C::mantissa_bits);
  return detail::select(x < C::exp_lowest, T(0), mantissa * scale);
}

template <class T>
KANTOR_ALWAYS_INLINE T log(T x) {
  using C = detail::Constants<T>;
  using Bits = typename C::Bits;
  using Limits = std::numeric_limits<T>;
  constexpr Bits one = C::exponent_bias << C::mantissa_bits;
  constexpr Bits fraction = (Bits{1} << C::mantissa_bits) - 1;
  constexpr T upscale = T(Bits{1} << C::mantissa_bits);
  const Bits root = detail::to_bits(C::sqrt_half);

  // x = 2^k m with m in [sqrt(1/2), sqrt(2)); subnormal numbers are made normal first.
  const bool subnormal = x < Limits::min();
  const Bits bits = detail::to_bits(x * detail::select(subnormal, upscale, T(1))) + (one - root);
  const T m = detail::from_bits<T>((bits & fraction) + root);
  // An integer in the low bits of 2^mantissa_bits, minus that power: a conversion that every SIMD level has.
  const T biased = detail::from_bits<T>((bits >> C::mantissa_bits) | detail::to_bits(upscale));
  const T k = (biased - (upscale + T(C::exponent_bias))) - detail::select(subnormal, T(C::mantissa_bits), T(0));

  // log(1+f) = f - f^2/2 + s (f^2/2 + R(s^2)), s = f/(2+f): the leading terms are exact or nearly so.
  const T f = m - T(1);
  const T s = f / (T(2) + f);
  const T z = s * s;
  const T half_square = T(0.5) * f * f;
  const T small = s * (half_square + z * C::log_tail(z)) + k * C::ln2_low;
  const T finite = k * C::ln2_high - ((half_square - small) - f);

  const T at_most_zero = detail::select(x == T(0), -Limits::infinity(), Limits::quiet_NaN());
  return detail::select(x == Limits::infinity(), x, detail::select(x > T(0), finite, at_most_zero));
}

namespace detail {

// Elements handled together: a loop of this constant length becomes straight SIMD code at every optimisation level and
// register width, and sums with this many accumulators have the same bits everywhere.
inline constexpr int block_length = 32;

template <class T>
KANTOR_ALWAYS_INLINE void exp_block(const T* x, T* y) {
#pragma GCC ivdep
  for (int j = 0; j < block_length; ++j) y[j] = vecmath::exp(x[j]);
}

template <class T>
KANTOR_ALWAYS_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
KANTOR_ALWAYS_INLINE void max_block(const T* x, T* largest) {
#pragma GCC ivdep
  for (int j = 0; j < block_length; ++j) largest[j] = larger(x[j], largest[j]);
}

template <class T>
KANTOR_ALWAYS_INLINE void exp_sum_block(const T* x, T shift, T* sums) {
#pragma GCC ivdep
  for (int j = 0; j < block_length; ++j) sums[j] += exp_nonpositive(x[j] - shift);
}

// Combines the block's elements in a binary tree; overwrites them.
template <int length = block_length, class T, class Combine>
KANTOR_ALWAYS_INLINE T tree_block(T* values, Combine combine) {
  if constexpr (length == 1) {
    return values[0];
  } else {
    for (int j = 0; j < length / 2; ++j) values[j] = combine(values[j], values[j + length / 2]);
    return tree_block<length / 2>(values, combine);
  }
}

// The last, incomplete block, filled up.
template <class T>
KANTOR_ALWAYS_INLINE void padded_copy(const T* x, std::int64_t count, T padding, T* block) {
  for (int j = 0; j < block_length; ++j) block[j] = j < count ? x[j] : padding;
}

// The sum of numbers among which is +inf: that, or NaN when it is there too.
template <class T>
KANTOR_ALWAYS_INLINE T infinite_sum(std::int64_t n, const T* x) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (x[i] != x[i]) return x[i];
  }
  return std::numeric_limits<T>::infinity();
}

}  // namespace detail

// y_i = exp(x_i); y may be x. Traffic: 2n words.
template <class T>
KANTOR_SIMD void exp_array(std::int64_t n, const T* x, T* y) {
  constexpr int length = detail::block_length;
  std::int64_t i = 0;
  for (; i + length <= n; i += length) detail::exp_block(x + i, y + i);
  if (i == n) return;
  T block[length];
  detail::padded_copy(x + i, n - i, T(0), block);
  detail::exp_block(block, block);
  for (int j = 0; i + j < n; ++j) y[i + j] = block[j];
}

// log(sum_i exp(x_i)), the largest x_i taken out of the sum. -inf when n is 0 or all x_i are; NaN when one is.
// Traffic: n words, read twice (rows up to a few thousand elements stay in the first-level cache in between).
template <class T>
KANTOR_SIMD T log_sum_exp(std::int64_t n, const T* x) {
  constexpr int length = detail::block_length;
  constexpr std::int64_t chunk = 64 * length;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  const std::int64_t whole = n / length * length;
  const bool ragged = whole < n;
  T block[length];
  if (ragged) detail::padded_copy(x + whole, n - whole, lowest, block);

  T largest[length];
  for (int j = 0; j < length; ++j) largest[j] = lowest;
  for (std::int64_t i = 0; i < whole; i += length) detail::max_block(x + i, largest);
  if (ragged) detail::max_block(block, largest);
  T shift = detail::tree_block(largest, [](T a, T b) { return detail::larger(a, b); });
  if (shift == -lowest) return detail::infinite_sum(n, x);
  if (shift == lowest) shift = 0;  // the sum is 0, or NaN

  double total = 0;
  for (std::int64_t begin = 0; begin < n; begin += chunk) {
    T sums[length] = {};
    const std::int64_t end = begin + chunk < whole ? begin + chunk : whole;
    for (std::int64_t i = begin; i < end; i += length) detail::exp_sum_block(x + i, shift, sums);
    if (ragged && begin + chunk > whole) detail::exp_sum_block(block, shift, sums);
    double wide[length];
    for (int j = 0; j < length; ++j) wide[j] = static_cast<double>(sums[j]);
    total += detail::tree_block(wide, [](double a, double b) { return a + b; });
  }
  return shift + static_cast<T>(vecmath::log(total));
}

}  // namespace kantor::vecmath
