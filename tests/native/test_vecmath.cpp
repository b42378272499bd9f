// exp, log and the array loops of core/vecmath.h against the extended-precision functions of the C library.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "core/vecmath.h"

using namespace kantor;

namespace {

template <class T>
using Limits = std::numeric_limits<T>;

// |computed - exact| in units of the spacing of T at the exact value (of the smallest normal number, below it).
template <class T>
double ulp_error(T computed, long double exact) {
  int exponent = 0;
  std::frexp(exact, &exponent);
  exponent = std::max(exponent, Limits<T>::min_exponent);
  return static_cast<double>(std::fabs(static_cast<long double>(computed) - exact) /
                             std::ldexp(1.0L, exponent - Limits<T>::digits));
}

template <class T>
struct Worst {
  double error = 0;
  T at = 0;
  void see(T x, T computed, long double exact) {
    const double e = ulp_error(computed, exact);
    if (!(e <= error)) error = e, at = x;
  }
};

template <class T>
constexpr T exp_lowest = sizeof(T) == 8 ? -700 : -87;
template <class T>
constexpr T exp_highest = sizeof(T) == 8 ? T(0x1.62e42fefa39efp+9) : T(0x1.62e42ep+6);

template <class T>
T next(T x, int steps) {
  for (; steps > 0; --steps) x = std::nextafter(x, Limits<T>::infinity());
  for (; steps < 0; ++steps) x = std::nextafter(x, -Limits<T>::infinity());
  return x;
}

template <class T>
std::vector<T> exp_arguments() {
  std::mt19937_64 generator(1);
  std::vector<T> x;
  std::uniform_real_distribution<T> whole(exp_lowest<T>, exp_highest<T>), near(-2, 2);
  for (int i = 0; i < 400000; ++i) x.push_back(whole(generator)), x.push_back(near(generator));
  for (int k = -1010; k < 1024; ++k) {  // both sides of each switch to the next power of two
    const T edge = static_cast<T>((k + 0.5L) * 0.693147180559945309417L);
    if (edge < exp_lowest<T> || edge > exp_highest<T>) continue;
    for (int step = -3; step <= 3; ++step) x.push_back(next(edge, step));
  }
  for (int e = Limits<T>::min_exponent - Limits<T>::digits; e < 0; ++e) {
    x.push_back(std::ldexp(T(1), e)), x.push_back(-std::ldexp(T(1), e));
  }
  for (int step = 0; step < 100; ++step) {
    x.push_back(next(exp_lowest<T>, step)), x.push_back(next(exp_highest<T>, -step));
  }
  return x;
}

template <class T>
std::vector<T> log_arguments() {
  using Bits = vecmath::detail::BitsOf<T>;
  std::mt19937_64 generator(2);
  const Bits largest = std::bit_cast<Bits>(Limits<T>::max());
  std::vector<T> x;
  std::uniform_real_distribution<T> near(T(0.5), 2);
  for (int i = 0; i < 400000; ++i) {  // every binary exponent alike, then around 1
    x.push_back(std::bit_cast<T>(static_cast<Bits>(generator() % largest + 1)));
    x.push_back(near(generator));
  }
  const T edges[] = {T(1), T(0.70710678118654752440L), T(1.41421356237309504880L), Limits<T>::min(), T(2), T(0.5)};
  for (T edge : edges) {
    for (int step = -1000; step <= 1000; ++step) x.push_back(next(edge, step));
  }
  for (int step = 0; step < 100; ++step) {
    x.push_back(next(Limits<T>::denorm_min(), step)), x.push_back(next(Limits<T>::max(), -step));
  }
  return x;
}

template <class T>
bool same_bits(T a, T b) {
  return vecmath::detail::to_bits(a) == vecmath::detail::to_bits(b);
}

}  // namespace

TEST_CASE_TEMPLATE("exp is within 1 ulp over its whole range", T, float, double) {
  Worst<T> worst, worst_nonpositive;
  for (T x : exp_arguments<T>()) {
    const long double exact = std::exp(static_cast<long double>(x));
    worst.see(x, vecmath::exp(x), exact);
    if (x <= 0) worst_nonpositive.see(x, vecmath::exp_nonpositive(x), exact);
  }
  MESSAGE("exp: ", worst.error, " ulp at ", worst.at, ", exp_nonpositive: ", worst_nonpositive.error, " ulp at ",
          worst_nonpositive.at);
  CHECK(worst.error <= 1);
  CHECK(worst_nonpositive.error <= 1);
}

TEST_CASE_TEMPLATE("log is within 1 ulp over its whole range", T, float, double) {
  Worst<T> worst;
  for (T x : log_arguments<T>()) worst.see(x, vecmath::log(x), std::log(static_cast<long double>(x)));
  MESSAGE("log: ", worst.error, " ulp at ", worst.at);
  CHECK(worst.error <= 1);
}

TEST_CASE("exp and log of float, every 97th number") {
  Worst<float> exp_worst, log_worst;
  for (std::uint32_t bits = 0; bits < 0x7f800000u; bits += 97) {
    const auto x = std::bit_cast<float>(bits);
    const auto wide = static_cast<double>(x);  // double is exact enough to judge float
    if (x > 0) log_worst.see(x, vecmath::log(x), std::log(wide));
    if (x <= exp_highest<float>) exp_worst.see(x, vecmath::exp(x), std::exp(wide));
    if (-x >= exp_lowest<float>) exp_worst.see(-x, vecmath::exp(-x), std::exp(-wide));
  }
  MESSAGE("float: exp ", exp_worst.error, " ulp at ", exp_worst.at, ", log ", log_worst.error, " ulp at ",
          log_worst.at);
  CHECK(exp_worst.error <= 1);
  CHECK(log_worst.error <= 1);
}

TEST_CASE_TEMPLATE("special values", T, float, double) {
  constexpr T infinity = Limits<T>::infinity(), nan = Limits<T>::quiet_NaN();
  using Bits = vecmath::detail::BitsOf<T>;
  const T nan_with_payload = std::bit_cast<T>(static_cast<Bits>(std::bit_cast<Bits>(nan) | Bits{0x1f1}));
  for (T x : {-infinity, Limits<T>::lowest(), T(-1e30), next(exp_lowest<T>, -1)}) {
    CHECK(same_bits(vecmath::exp(x), T(0)));
    CHECK(same_bits(vecmath::exp_nonpositive(x), T(0)));
  }
  CHECK(vecmath::exp(exp_lowest<T>) >= Limits<T>::min());  // nothing subnormal
  CHECK(std::isfinite(vecmath::exp(exp_highest<T>)));
  for (T x : {next(exp_highest<T>, 1), T(1000), Limits<T>::max(), infinity}) CHECK(vecmath::exp(x) == infinity);
  for (T x : {nan, -nan, nan_with_payload}) {
    CHECK(std::isnan(vecmath::exp(x)));
    CHECK(std::isnan(vecmath::exp_nonpositive(x)));
    CHECK(std::isnan(vecmath::log(x)));
  }
  CHECK(vecmath::exp(T(0)) == 1);
  CHECK(vecmath::exp(-T(0)) == 1);
  CHECK(vecmath::exp_nonpositive(T(0)) == 1);
  CHECK(same_bits(vecmath::log(T(1)), T(0)));
  CHECK(vecmath::log(T(0)) == -infinity);
  CHECK(vecmath::log(-T(0)) == -infinity);
  CHECK(vecmath::log(infinity) == infinity);
  for (T x : {T(-1), -Limits<T>::denorm_min(), Limits<T>::lowest(), -infinity}) CHECK(std::isnan(vecmath::log(x)));
}

TEST_CASE_TEMPLATE("exp_array gives the bits of exp at every length, also in place", T, float, double) {
  auto x = exp_arguments<T>();
  for (T special : {Limits<T>::infinity(), -Limits<T>::infinity(), T(-1e9)}) x.insert(x.begin() + 5, special);
  std::vector<T> expected(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) expected[i] = vecmath::exp(x[i]);
  for (std::size_t n : {0, 1, 2, 31, 32, 33, 63, 64, 100, 5000}) {
    CAPTURE(n);
    std::vector<T> y(n + 1, T(-7)), in_place(x.begin(), x.begin() + static_cast<std::ptrdiff_t>(n));
    vecmath::exp_array<T>(static_cast<std::int64_t>(n), x.data(), y.data());
    vecmath::exp_array<T>(static_cast<std::int64_t>(n), in_place.data(), in_place.data());
    for (std::size_t i = 0; i < n; ++i) {
      REQUIRE(same_bits(y[i], expected[i]));
      REQUIRE(same_bits(in_place[i], expected[i]));
    }
    CHECK(y[n] == T(-7));
  }
}

TEST_CASE_TEMPLATE("log_sum_exp of rows of every length and offset", T, float, double) {
  std::mt19937 generator(3);
  std::normal_distribution<double> normal(0, 20);
  for (double offset : {0.0, 1e4, -1e4}) {
    for (std::size_t n : {1, 2, 31, 32, 33, 1000, 2047, 2048, 2049, 4097, 10000}) {
      CAPTURE(offset);
      CAPTURE(n);
      std::vector<T> x(n);
      for (T& v : x) v = static_cast<T>(offset + normal(generator));
      long double sum = 0;
      for (T v : x) sum += std::exp(static_cast<long double>(v) - static_cast<long double>(offset));
      const long double exact = static_cast<long double>(offset) + std::log(sum);
      const T computed = vecmath::log_sum_exp<T>(static_cast<std::int64_t>(n), x.data());
      // Rounding x_i - max costs up to half an ulp of the difference, that is eps |x_i - max| relative to exp of it.
      const double tolerance = (60 + std::fabs(offset)) * static_cast<double>(Limits<T>::epsilon());
      CHECK(static_cast<double>(std::fabs(static_cast<long double>(computed) - exact)) <= tolerance);
    }
  }
}

TEST_CASE_TEMPLATE("log_sum_exp at the edges", T, float, double) {
  constexpr T infinity = Limits<T>::infinity(), nan = Limits<T>::quiet_NaN();
  const auto of = [](std::vector<T> x) {
    return vecmath::log_sum_exp<T>(static_cast<std::int64_t>(x.size()), x.data());
  };
  CHECK(of({}) == -infinity);
  CHECK(of({-infinity}) == -infinity);
  CHECK(of(std::vector<T>(50, -infinity)) == -infinity);
  CHECK(of({1, infinity, 2}) == infinity);
  CHECK(of({-infinity, infinity}) == infinity);
  for (std::size_t where : {0, 31, 32, 40}) {
    std::vector<T> x(41, T(1));
    x[where] = nan;
    CHECK(std::isnan(of(x)));
    x[(where + 7) % 41] = infinity;
    CHECK(std::isnan(of(x)));
    x[(where + 7) % 41] = -infinity;
    CHECK(std::isnan(of(x)));
  }
  CHECK(of({5, -infinity}) == 5);
  CHECK(of({5, T(-1e30)}) == 5);
  CHECK(of({Limits<T>::max(), 0}) == Limits<T>::max());
  CHECK(of({Limits<T>::lowest()}) == Limits<T>::lowest());
  CHECK(of(std::vector<T>(64, T(0))) == doctest::Approx(std::log(64.0)).epsilon(1e-7));
}
