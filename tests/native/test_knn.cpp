// Nearest neighbours by every instruction set there is: the same bits. Points for which the margin of the selection
// matters: equal ones, lattices, clusters far apart, coordinates of any scale.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "graph/knn.h"

using namespace kantor;

namespace {

template <class T>
struct Neighbours {
  std::vector<int32_t> index;
  std::vector<T> distance;
};

template <class T>
Neighbours<T> search(const std::vector<T>& x, int64_t d, int64_t k, int threads, int widest) {
  const int64_t n = static_cast<int64_t>(x.size()) / d;
  std::vector<double> workspace(knn_workspace_bytes_cpu<T>(n, d, k, threads) / sizeof(double) + 1);
  Neighbours<T> result{std::vector<int32_t>(n * k), std::vector<T>(n * k)};
  Exec exec;
  exec.threads = threads;
  const std::function<bool()> never = [] { return false; };
  REQUIRE(
      knn_cpu(exec, n, d, x.data(), k, result.index.data(), result.distance.data(), workspace.data(), never, widest));
  return result;
}

template <class T>
Neighbours<T> plainly(const std::vector<T>& x, int64_t d, int64_t k) {
  const int64_t n = static_cast<int64_t>(x.size()) / d;
  Neighbours<T> result;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<std::pair<double, int32_t>> others;
    for (int64_t j = 0; j < n; ++j)
      if (j != i) others.emplace_back(squared_distance(d, &x[i * d], &x[j * d]), static_cast<int32_t>(j));
    std::sort(others.begin(), others.end());
    for (int64_t m = 0; m < k; ++m) {
      result.index.push_back(others[m].second);
      result.distance.push_back(static_cast<T>(std::sqrt(others[m].first)));
    }
  }
  return result;
}

// n points of which point(i, c, normal variate) is coordinate c of i.
template <class T, class Point>
std::vector<T> points(int64_t n, int64_t d, Point&& point) {
  std::mt19937_64 generator(7);
  std::normal_distribution<double> normal;
  std::vector<T> x;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < d; ++c) x.push_back(static_cast<T>(point(i, c, normal(generator))));
  return x;
}

template <class T>
void check(const std::vector<T>& x, int64_t d, int64_t k) {
  CAPTURE(d);
  CAPTURE(k);
  const Neighbours<T> expected = plainly(x, d, k);
  for (const int widest : {128, 256, 512})
    for (const int threads : {1, 3}) {
      CAPTURE(widest);
      const Neighbours<T> result = search(x, d, k, threads, widest);
      CHECK(result.index == expected.index);
      CHECK(result.distance == expected.distance);
    }
}

}  // namespace

TEST_CASE_TEMPLATE("random points", T, float, double) {
  for (const int64_t d : {1, 3, 16, 33, 300})
    for (const int64_t n : {2, 31, 33, 500})
      for (const int64_t k : {int64_t{1}, int64_t{7}, n - 1})
        if (k < n) check(points<T>(n, d, [](int64_t, int64_t, double z) { return z; }), d, k);
}

TEST_CASE_TEMPLATE("equal points, and a lattice", T, float, double) {
  check(points<T>(400, 3, [](int64_t, int64_t, double) { return 2.0; }), 3, 5);
  check(points<T>(400, 5, [](int64_t i, int64_t, double z) { return i % 3 ? 0.0 : z; }), 5, 9);
  check(points<T>(600, 3, [](int64_t, int64_t, double z) { return std::round(z); }), 3, 20);
}

TEST_CASE_TEMPLATE("clusters whose distance hides their size", T, float, double) {
  const double far = std::is_same_v<T, float> ? 1e5 : 1e14;
  check(points<T>(500, 6, [=](int64_t i, int64_t, double z) { return i % 2 * far + z; }), 6, 11);
  check(points<T>(300, 4, [=](int64_t i, int64_t, double z) { return i == 17 ? far * far : z; }), 4, 6);
}

TEST_CASE_TEMPLATE("far from the origin, and any scale", T, float, double) {
  check(points<T>(300, 9, [](int64_t, int64_t, double z) { return 1e4 + z; }), 9, 8);
  for (const double scale : {1e-30, 1e30})
    check(points<T>(300, 9, [=](int64_t, int64_t, double z) { return scale * z; }), 9, 8);
}

TEST_CASE_TEMPLATE("a point that is not finite has no neighbours and is none", T, float, double) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const auto x = points<T>(200, 4, [=](int64_t i, int64_t c, double z) { return i == 199 && c == 2 ? bad : z; });
    for (const int widest : {128, 256, 512}) {
      const Neighbours<T> result = search(x, 4, 3, 2, widest),
                          others = search(std::vector<T>(x.begin(), x.end() - 4), 4, 3, 1, 512);
      for (int64_t m = 0; m < 199 * 3; ++m) {
        CHECK(result.index[m] == others.index[m]);
        CHECK(result.distance[m] == others.distance[m]);
      }
      for (int64_t m = 199 * 3; m < 200 * 3; ++m) {
        CHECK(result.index[m] == -1);
        CHECK(std::isnan(result.distance[m]));
      }
    }
  }
}
