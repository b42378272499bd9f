// The fused loops of linalg/vector.h against plain ones, and the accuracy of core/reduce.h's sums.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "core/reduce.h"
#include "linalg/vector.h"

using namespace kantor;

namespace {

constexpr double guard = -12345.0;

// n numbers, and one behind them that no loop may touch. `shift` moves the first off the alignment of the allocation.
template <class T>
class Vector {
 public:
  Vector(int64_t n, unsigned seed, int64_t shift = 0)
      : n_(n), shift_(shift), values_(static_cast<size_t>(n + shift + 1)) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    for (T& value : values_) value = static_cast<T>(normal(generator));
    values_.back() = static_cast<T>(guard);
  }
  T* data() { return values_.data() + shift_; }
  T operator[](int64_t i) const { return values_[static_cast<size_t>(shift_ + i)]; }
  void set(int64_t i, T value) { values_[static_cast<size_t>(shift_ + i)] = value; }
  int64_t size() const { return n_; }
  bool intact() const { return values_.back() == static_cast<T>(guard); }

 private:
  int64_t n_, shift_;
  std::vector<T> values_;
};

// sum_i term(i) in extended precision, and the sum of the terms' sizes.
struct Exact {
  long double sum = 0, size = 0;
  template <class Term>
  Exact(int64_t n, Term&& term) {
    for (int64_t i = 0; i < n; ++i) {
      const long double t = term(i);
      sum += t;
      size += std::fabs(t);
    }
  }
  // A few roundings of double on the way: products of doubles are rounded themselves, those of floats are exact.
  bool matches(double value) const {
    return std::fabs(static_cast<long double>(value) - sum) <= 8e-16L * size + 1e-300L;
  }
};

template <class F>
void for_each_length(F&& f) {
  for (int64_t n = 0; n <= 100; ++n)
    for (int64_t shift : {0, 1}) f(n, shift);
  f(4096, 0);
  f(4097, 1);
}

}  // namespace

TEST_CASE_TEMPLATE("dot, weighted square, largest entry", T, float, double) {
  for_each_length([](int64_t n, int64_t shift) {
    Vector<T> x(n, 1, shift), y(n, 2, shift), d(n, 3);
    CAPTURE(n);
    CHECK(
        Exact(n, [&](int64_t i) { return static_cast<long double>(x[i]) * y[i]; }).matches(dot(n, x.data(), y.data())));
    CHECK(Exact(n, [&](int64_t i) {
            return static_cast<long double>(d[i]) * x[i] * x[i];
          }).matches(weighted_square(n, d.data(), x.data())));
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(double(x[i])));
    CHECK(max_abs(n, x.data()) == largest);
  });
}

TEST_CASE_TEMPLATE("sums tell of NaN and infinity; the largest entry ignores NaN", T, float, double) {
  for (T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    for (int64_t at : {0, 7, 31, 32, 44}) {
      Vector<T> x(45, 1), ones(45, 2);
      for (int64_t i = 0; i < 45; ++i) ones.set(i, 1);
      x.set(at, bad);
      CHECK(!std::isfinite(dot(45, x.data(), ones.data())));
      CHECK(!std::isfinite(weighted_square(45, ones.data(), x.data())));
      CHECK(std::isinf(max_abs(45, x.data())) == std::isinf(bad));
    }
  }
}

TEST_CASE_TEMPLATE("elementwise updates give the bits of the plain loop", T, float, double) {
  const T alpha = T(0.37), beta = T(-1.25);
  for_each_length([&](int64_t n, int64_t shift) {
    CAPTURE(n);
    const Vector<T> z(n, 1, shift), p0(n, 2, shift), d(n, 3, shift);
    Vector<T> z_(z), d_(d), p(p0), out(n, 4, shift);

    multiply_add(n, alpha, z_.data(), beta, d_.data(), out.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(out[i] == alpha * z[i] + beta * d[i]);

    update_direction(n, beta, z_.data(), p.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(p[i] == z[i] + beta * p0[i]);

    p = p0;
    update_direction_scaled(n, beta, d_.data(), z_.data(), p.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(p[i] == d[i] * z[i] + beta * p0[i]);

    p = p0;
    scale_in_place(n, alpha, p.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(p[i] == alpha * p0[i]);
    CHECK((p.intact() && out.intact()));
  });
}

TEST_CASE_TEMPLATE("the four sums of a direction", T, float, double) {
  for_each_length([](int64_t n, int64_t shift) {
    CAPTURE(n);
    Vector<T> p(n, 1, shift), q(n, 2, shift), r(n, 3, shift);
    const FourSums sums = direction_sums(n, p.data(), q.data(), r.data());
    // Half as many lanes as a dot has: a few more roundings.
    const auto close = [n](const Vector<T>& a, const Vector<T>& b, double value) {
      const Exact exact(n, [&](int64_t i) { return static_cast<long double>(a[i]) * b[i]; });
      return std::fabs(value - exact.sum) <= 4e-15L * exact.size;
    };
    CHECK(close(p, q, sums[0]));
    CHECK(close(p, r, sums[1]));
    CHECK(close(p, p, sums[2]));
    CHECK(close(q, q, sums[3]));
  });
}

TEST_CASE_TEMPLATE("the first direction does not read what is not there yet", T, float, double) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for_each_length([&](int64_t n, int64_t shift) {
    Vector<T> z(n, 1, shift), d(n, 2, shift), p(n, 3, shift);
    for (int64_t i = 0; i < n; ++i) p.set(i, nan);
    update_direction(n, T(0), z.data(), p.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(p[i] == z[i]);
    for (int64_t i = 0; i < n; ++i) p.set(i, nan);
    update_direction_scaled(n, T(0), d.data(), z.data(), p.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(p[i] == d[i] * z[i]);
  });
}

TEST_CASE_TEMPLATE("update of the iterate and the residual, with the residual's square", T, float, double) {
  const T alpha = T(0.73);
  for_each_length([&](int64_t n, int64_t shift) {
    CAPTURE(n);
    const Vector<T> x0(n, 1, shift), r0(n, 2, shift);
    Vector<T> x(x0), r(r0), p(n, 3, shift), q(n, 4, shift);
    const double rr = update_iterate(n, alpha, p.data(), q.data(), x.data(), r.data());
    for (int64_t i = 0; i < n; ++i) {
      REQUIRE(x[i] == x0[i] + alpha * p[i]);
      REQUIRE(r[i] == r0[i] - alpha * q[i]);
    }
    CHECK(rr == dot(n, r.data(), r.data()));
    CHECK((x.intact() && r.intact()));
  });
}

TEST_CASE_TEMPLATE("true residual: the difference and its square are formed in double", T, float, double) {
  for_each_length([&](int64_t n, int64_t shift) {
    CAPTURE(n);
    Vector<T> b(n, 1, shift), r(n, 3, shift);
    Vector<double> ax(n, 2, shift);
    // Differences far below the spacing of float.
    for (int64_t i = 0; i < n; ++i) ax.set(i, double(b[i]) * (1 + 1e-12 * double(ax[i])));
    const double rr = subtract(n, b.data(), ax.data(), r.data());
    for (int64_t i = 0; i < n; ++i) REQUIRE(r[i] == static_cast<T>(double(b[i]) - ax[i]));
    CHECK(Exact(n, [&](int64_t i) {
            const long double difference = double(b[i]) - ax[i];
            return difference * difference;
          }).matches(rr));
    CHECK(r.intact());
  });
}

TEST_CASE_TEMPLATE("scaling, into either precision", T, float, double) {
  const double a = -0.61;
  for_each_length([&](int64_t n, int64_t shift) {
    Vector<T> x(n, 1, shift), y(n, 2, shift);
    const Vector<T> y0(y);
    scale(n, a, x.data(), y.data(), false);
    for (int64_t i = 0; i < n; ++i) REQUIRE(y[i] == static_cast<T>(a) * x[i]);
    y = y0;
    scale(n, a, x.data(), y.data(), true);
    for (int64_t i = 0; i < n; ++i) REQUIRE(y[i] == y0[i] + static_cast<T>(a) * x[i]);
    Vector<double> wide(n, 3, shift);
    const Vector<double> wide0(wide);
    scale(n, a, x.data(), wide.data(), true);
    for (int64_t i = 0; i < n; ++i) REQUIRE(wide[i] == wide0[i] + a * double(x[i]));
    CHECK((y.intact() && wide.intact()));
  });
}

TEST_CASE("tree sums: exact on integers, few roundings on the rest") {
  for (int64_t n = 0; n <= 300; ++n) {
    std::vector<double> values(static_cast<size_t>(n));
    std::iota(values.begin(), values.end(), 1.0);
    CHECK(tree_sum(values.data(), n) == double(n) * double(n + 1) / 2);
  }
  // A plain loop loses up to n roundings, a tree log2 n of them.
  for (const int64_t n : {1000, 65'537, 1'000'000}) {
    std::mt19937_64 generator(7);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    std::vector<double> values(static_cast<size_t>(n));
    for (double& value : values) value = uniform(generator);
    const Exact exact(n, [&](int64_t i) { return static_cast<long double>(values[static_cast<size_t>(i)]); });
    const long double error = std::fabs(static_cast<long double>(tree_sum(values.data(), n)) - exact.sum);
    CHECK(error <= 1.2e-16L * std::log2(double(n)) * exact.size);
    CHECK(error <= 4e-16L * exact.size);
  }
}

TEST_CASE("tree sums keep what cancels out of the largest terms") {
  // Powers of two are added exactly, whatever their order in the tree.
  std::vector<double> values;
  for (int k = 0; k < 40; ++k)
    for (const double sign : {1.0, -1.0}) values.push_back(sign * std::ldexp(1.0, k));
  values.push_back(1.0);
  CHECK(tree_sum(values.data(), static_cast<int64_t>(values.size())) == 1.0);
}

TEST_CASE_TEMPLATE("eight values at a time are the values", T, float, double) {
  Vector<T> x(8, 1, 1);
  const Double8 eight = load8(x.data());
  for (int64_t i = 0; i < 8; ++i) CHECK(eight[i] == double(x[i]));
}

TEST_CASE_TEMPLATE("a sum of lanes does not depend on where the memory begins", T, float, double) {
  for (const int64_t n : {1, 31, 100, 4096}) {
    Vector<T> aligned(n, 1), moved(n, 1, 3);
    for (int64_t i = 0; i < n; ++i) moved.set(i, aligned[i]);
    CHECK(dot(n, aligned.data(), aligned.data()) == dot(n, moved.data(), moved.data()));
  }
}
