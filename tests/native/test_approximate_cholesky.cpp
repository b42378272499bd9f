// linalg/approximate_cholesky.h: exact where elimination makes no clique, right on average where it does, and a
// preconditioner that makes the iterations of conjugate gradients hardly depend on the graph.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "linalg/approximate_cholesky.h"

using namespace kantor;

namespace {

using Vector = std::vector<double>;

struct Graph {
  int64_t vertices = 0;
  std::vector<Edge> edges;
  Vector excess;

  explicit Graph(int64_t n, double excess_of_each = 0) : vertices(n), excess(n, excess_of_each) {}
  void add(int64_t from, int64_t to, double weight) {
    edges.push_back({static_cast<int32_t>(from), static_cast<int32_t>(to), weight});
  }
  ApproximateCholesky factor() const { return approximate_cholesky(vertices, edges, excess); }

  // y = L x
  Vector times(const Vector& x) const {
    Vector y(x.size());
    for (size_t v = 0; v < x.size(); ++v) y[v] = excess[v] * x[v];
    for (const Edge& e : edges) {
      const double flow = e.weight * (x[e.from] - x[e.to]);
      y[e.from] += flow;
      y[e.to] -= flow;
    }
    return y;
  }
  std::vector<Vector> dense() const {
    std::vector<Vector> matrix;
    for (int64_t v = 0; v < vertices; ++v) {
      Vector unit(vertices, 0.0);
      unit[v] = 1;
      matrix.push_back(times(unit));
    }
    return matrix;
  }
};

Vector normal(int64_t n, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> draw;
  Vector values(n);
  for (double& value : values) value = draw(generator);
  return values;
}

double norm(const Vector& x) { return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0)); }

double distance(const Vector& x, const Vector& y) {
  Vector difference(x);
  for (size_t i = 0; i < x.size(); ++i) difference[i] -= y[i];
  return norm(difference);
}

Vector solve(const ApproximateCholesky& factor, const Vector& r) {
  Vector z(r.size());
  approximate_cholesky_solve(factor, r.data(), z.data());
  return z;
}

// The matrix L diag(pivot) L' that a factor stands for, entry by entry.
std::vector<Vector> product_of(const ApproximateCholesky& factor) {
  const size_t n = factor.order.size();
  std::vector<Vector> matrix(n, Vector(n, 0.0));
  for (size_t k = 0; k < n; ++k) {
    Vector column(n, 0.0);
    column[factor.order[k]] = 1;
    for (int64_t e = factor.start[k]; e < factor.start[k + 1]; ++e) column[factor.row[e]] -= factor.share[e];
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j) matrix[i][j] += factor.pivot[k] * column[i] * column[j];
  }
  return matrix;
}

double largest_difference(const std::vector<Vector>& x, const std::vector<Vector>& y) {
  double largest = 0;
  for (size_t i = 0; i < x.size(); ++i)
    for (size_t j = 0; j < x.size(); ++j) largest = std::max(largest, std::abs(x[i][j] - y[i][j]));
  return largest;
}

// What every factor must be, exact or not: each vertex eliminated once, columns that lead to later ones, shares that
// add up to one, or less where the vertex had an excess.
void check_form(const Graph& graph, const ApproximateCholesky& factor) {
  const size_t n = static_cast<size_t>(graph.vertices);
  REQUIRE(factor.order.size() == n);
  REQUIRE(factor.pivot.size() == n);
  REQUIRE(factor.start.size() == n + 1);
  std::vector<int64_t> position(n, -1);
  for (size_t k = 0; k < n; ++k) {
    REQUIRE(position[factor.order[k]] == -1);
    position[factor.order[k]] = static_cast<int64_t>(k);
  }
  CHECK(factor.start[n] == static_cast<int64_t>(factor.row.size()));
  CHECK(factor.row.size() == factor.share.size());
  for (size_t k = 0; k < n; ++k) {
    CHECK(factor.pivot[k] >= 0);
    CHECK(std::isfinite(factor.pivot[k]));
    double total = 0;
    for (int64_t e = factor.start[k]; e < factor.start[k + 1]; ++e) {
      CHECK(position[factor.row[e]] > static_cast<int64_t>(k));
      CHECK(factor.share[e] > 0);
      total += factor.share[e];
    }
    CHECK(total <= 1 + 1e-12);
  }
}

Graph path(int64_t n, unsigned seed) {
  Graph graph(n);
  const Vector weights = normal(n, seed);
  for (int64_t v = 1; v < n; ++v) graph.add(v - 1, v, std::exp(weights[v]));
  return graph;
}

Graph random_tree(int64_t n, unsigned seed, double spread = 3) {
  Graph graph(n);
  std::mt19937_64 generator(seed);
  const Vector weights = normal(n, seed);
  std::vector<int64_t> names(n);
  std::iota(names.begin(), names.end(), 0);
  std::shuffle(names.begin(), names.end(), generator);
  for (int64_t v = 1; v < n; ++v)
    graph.add(names[v], names[generator() % static_cast<uint64_t>(v)], std::exp(spread * weights[v]));
  return graph;
}

Graph grid(int64_t side, unsigned seed, double spread) {
  Graph graph(side * side);
  const Vector weights = normal(2 * side * side, seed);
  for (int64_t y = 0; y < side; ++y)
    for (int64_t x = 0; x < side; ++x) {
      const int64_t v = y * side + x;
      if (x + 1 < side) graph.add(v, v + 1, std::exp(spread * weights[2 * v]));
      if (y + 1 < side) graph.add(v + side, v, std::exp(spread * weights[2 * v + 1]));
    }
  return graph;
}

Graph random_graph(int64_t n, int64_t degree, unsigned seed, double spread) {
  Graph graph = random_tree(n, seed, spread);
  std::mt19937_64 generator(seed + 1);
  std::normal_distribution<double> draw;
  for (int64_t e = 0; e < n * (degree - 2) / 2; ++e) {
    const int64_t from = static_cast<int64_t>(generator() % static_cast<uint64_t>(n));
    const int64_t to = static_cast<int64_t>(generator() % static_cast<uint64_t>(n));
    if (from != to) graph.add(from, to, std::exp(spread * draw(generator)));
  }
  return graph;
}

Graph complete(int64_t n, double excess) {
  Graph graph(n, excess);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i + 1; j < n; ++j) graph.add(i, j, 1.0 + 0.1 * static_cast<double>((i * 7 + j * 3) % 5));
  return graph;
}

// Iterations to a relative residual of 1e-8, whatever the size and the weights.
constexpr int most_on_grids = 70, most_on_random_graphs = 35;

struct Solve {
  int iterations = 0;
  double residual = 1;
  Vector x;
};

// Preconditioned conjugate gradients to a relative residual of rtol.
Solve pcg(const Graph& graph, const Vector& b, double rtol, int limit = 1000) {
  const ApproximateCholesky factor = graph.factor();
  const size_t n = b.size();
  const auto dot = [n](const Vector& x, const Vector& y) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sum += x[i] * y[i];
    return sum;
  };
  Solve result;
  result.x.assign(n, 0.0);
  Vector r(b), p(n, 0.0);
  double rz = 0;
  for (; result.iterations < limit; ++result.iterations) {
    result.residual = norm(r) / norm(b);
    if (result.residual <= rtol) break;
    const Vector z = solve(factor, r);
    const double rz_new = dot(r, z), beta = result.iterations ? rz_new / rz : 0;
    rz = rz_new;
    CHECK(rz > 0);
    for (size_t i = 0; i < n; ++i) p[i] = z[i] + beta * p[i];
    const Vector q = graph.times(p);
    const double alpha = rz / dot(p, q);
    for (size_t i = 0; i < n; ++i) {
      result.x[i] += alpha * p[i];
      r[i] -= alpha * q[i];
    }
  }
  return result;
}

// A right-hand side in the range of a Laplacian whose components are the given classes of vertices.
Vector balanced(Vector b, int64_t components) {
  const int64_t n = static_cast<int64_t>(b.size());
  for (int64_t c = 0; c < components; ++c) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t v = c; v < n; v += components) sum += b[v], ++count;
    for (int64_t v = c; v < n; v += components) b[v] -= sum / static_cast<double>(count);
  }
  return b;
}

}  // namespace

TEST_CASE("exact on trees without and with a ground") {
  for (unsigned seed = 0; seed < 20; ++seed) {
    for (const int64_t n : {2, 3, 10, 60}) {
      for (Graph graph : {path(n, seed), random_tree(n, seed)}) {
        CAPTURE(n);
        ApproximateCholesky factor = graph.factor();
        check_form(graph, factor);
        double scale = 0;
        for (const Edge& e : graph.edges) scale = std::max(scale, e.weight);
        CHECK(largest_difference(product_of(factor), graph.dense()) < 1e-12 * scale * double(n));
        // One vertex, or all of them, held by an excess: L z = r has one solution.
        graph.excess[n / 2] = 0.7;
        if (seed % 2) std::fill(graph.excess.begin(), graph.excess.end(), 0.3);
        factor = graph.factor();
        check_form(graph, factor);
        CHECK(largest_difference(product_of(factor), graph.dense()) < 1e-12 * scale * double(n));
        const Vector x = normal(n, seed + 100), r = graph.times(x);
        CHECK(distance(graph.times(solve(factor, r)), r) < 1e-11 * norm(r) + 1e-13 * scale * norm(x));
      }
    }
  }
}

TEST_CASE("a star is exact: its leaves go first") {
  Graph graph(50, 0.0);
  for (int64_t leaf = 1; leaf < 50; ++leaf) graph.add(leaf % 2 ? leaf : 0, leaf % 2 ? 0 : leaf, double(leaf));
  const ApproximateCholesky factor = graph.factor();
  check_form(graph, factor);
  for (int64_t k = 0; k < 48; ++k) CHECK(factor.order[k] != 0);
  CHECK(largest_difference(product_of(factor), graph.dense()) < 1e-11);
}

TEST_CASE("a diagonal matrix, one vertex, and none at all") {
  Graph graph(7);
  graph.excess = {1, 2, 3, 4, 5, 6, 7};
  const Vector r = normal(7, 1), z = solve(graph.factor(), r);
  for (size_t v = 0; v < 7; ++v) CHECK(z[v] == doctest::Approx(r[v] / graph.excess[v]).epsilon(1e-15));
  Graph one(1, 4.0);
  CHECK(solve(one.factor(), {2.0})[0] == 0.5);
  Graph free_one(1, 0.0);
  CHECK(solve(free_one.factor(), {2.0})[0] == 0);
  const ApproximateCholesky nothing = Graph(0).factor();
  CHECK(nothing.order.empty());
  approximate_cholesky_solve(nothing, nullptr, nullptr);
}

TEST_CASE("forests: every component for itself") {
  for (unsigned seed = 0; seed < 10; ++seed) {
    // Three trees, interlaced: vertex v belongs to tree v % 3.
    Graph forest(60);
    for (int64_t c = 0; c < 3; ++c)
      for (const Edge& e : random_tree(20, seed + 10 * static_cast<unsigned>(c), 1).edges)
        forest.add(3 * e.from + c, 3 * e.to + c, e.weight);
    ApproximateCholesky factor = forest.factor();
    check_form(forest, factor);
    CHECK(std::count(factor.pivot.begin(), factor.pivot.end(), 0.0) <= 3);
    CHECK(largest_difference(product_of(factor), forest.dense()) < 1e-9);
    const Vector r = balanced(normal(60, seed), 3);
    const Vector z = solve(factor, r);
    CHECK(distance(forest.times(z), r) < 1e-9 * norm(r));
    // Two of the three grounded.
    forest.excess[1] = 2;
    forest.excess[5] = 0.1;
    factor = forest.factor();
    Vector x = normal(60, seed + 1);
    const Vector b = forest.times(x);
    CHECK(distance(forest.times(solve(factor, b)), b) < 1e-9 * norm(b));
  }
}

TEST_CASE("parallel edges add up") {
  Graph single(4, 0.1), split(4, 0.1);
  for (int64_t v = 1; v < 4; ++v) {
    single.add(0, v, 6.0 * double(v));
    split.add(0, v, 1.0 * double(v));
    split.add(v, 0, 2.0 * double(v));
    split.add(0, v, 3.0 * double(v));
  }
  const Vector r = normal(4, 3);
  CHECK(distance(solve(single.factor(), r), solve(split.factor(), r)) < 1e-14);
  CHECK(largest_difference(product_of(split.factor()), single.dense()) < 1e-13);
  // Cycles made of parallel edges only are still trees.
  Graph tree = random_tree(30, 5, 1);
  Graph doubled = tree;
  for (const Edge& e : tree.edges) doubled.add(e.to, e.from, e.weight);
  for (Edge& e : tree.edges) e.weight *= 2;
  CHECK(largest_difference(product_of(doubled.factor()), tree.dense()) < 1e-11);
}

TEST_CASE("the sampled cliques are right on average") {
  // Many copies of one small graph, each with choices of its own: L D L' is the matrix in expectation, whatever the
  // order of elimination.
  constexpr int64_t size = 6, copies = 40'000;
  Graph small(size);
  small.excess = {0.5, 0.0, 2.0, 0.0, 0.1, 0.0};
  const Vector weights = {1.0, 5.0, 0.2, 3.0, 0.7, 2.0, 1.5, 0.4, 4.0, 0.9, 2.5, 1.2};
  size_t next = 0;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = i + 1; j < size; ++j)
      if ((i + j) % 5 != 4) small.add(i, j, weights[next++]);
  REQUIRE(next == weights.size());
  Graph graph(size * copies);
  for (int64_t c = 0; c < copies; ++c) {
    for (const Edge& e : small.edges) graph.add(size * c + e.from, size * c + e.to, e.weight);
    for (int64_t v = 0; v < size; ++v) graph.excess[size * c + v] = small.excess[v];
  }
  const ApproximateCholesky factor = graph.factor();
  std::vector<std::vector<Vector>> products(copies, std::vector<Vector>(size, Vector(size, 0.0)));
  for (int64_t k = 0; k < graph.vertices; ++k) {
    const int64_t copy = factor.order[k] / size;
    Vector column(size, 0.0);
    column[factor.order[k] % size] = 1;
    for (int64_t e = factor.start[k]; e < factor.start[k + 1]; ++e) {
      REQUIRE(factor.row[e] / size == copy);
      column[factor.row[e] % size] -= factor.share[e];
    }
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = 0; j < size; ++j) products[copy][i][j] += factor.pivot[k] * column[i] * column[j];
  }
  const std::vector<Vector> exact = small.dense();
  double most_spread = 0;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) {
      double mean = 0, square = 0;
      for (const auto& product : products) mean += product[i][j] / copies;
      for (const auto& product : products) square += (product[i][j] - mean) * (product[i][j] - mean) / copies;
      CAPTURE(i);
      CAPTURE(j);
      CHECK(std::abs(mean - exact[i][j]) <= 4.5 * std::sqrt(square / copies) + 1e-10);
      most_spread = std::max(most_spread, std::sqrt(square));
    }
  CHECK(most_spread > 0.1);  // otherwise nothing was sampled
}

TEST_CASE("little fill-in, one factor for one matrix, and a symmetric positive solve") {
  for (const Graph& graph : {grid(20, 1, 2), random_graph(300, 8, 2, 3), complete(25, 0.01)}) {
    const ApproximateCholesky factor = graph.factor(), again = graph.factor();
    check_form(graph, factor);
    // Each step adds fewer edges than it removes; what is stored are those removed.
    CHECK(factor.row.size() <= 4 * graph.edges.size());
    CHECK(factor.order == again.order);
    CHECK(factor.pivot == again.pivot);
    CHECK(factor.row == again.row);
    CHECK(factor.share == again.share);
    const Vector x = balanced(normal(graph.vertices, 1), 1), y = balanced(normal(graph.vertices, 2), 1);
    const Vector zx = solve(factor, x), zy = solve(factor, y);
    const double xy = std::inner_product(y.begin(), y.end(), zx.begin(), 0.0);
    const double yx = std::inner_product(x.begin(), x.end(), zy.begin(), 0.0);
    CHECK(xy == doctest::Approx(yx).epsilon(1e-9));
    CHECK(std::inner_product(x.begin(), x.end(), zx.begin(), 0.0) > 0);
    Vector in_place(x);
    approximate_cholesky_solve(factor, in_place.data(), in_place.data());
    CHECK(in_place == zx);
    // What L D L' z gives back is r.
    Vector back(x.size(), 0.0);
    const std::vector<Vector> matrix = product_of(factor);
    for (size_t i = 0; i < x.size(); ++i)
      for (size_t j = 0; j < x.size(); ++j) back[i] += matrix[i][j] * zx[j];
    CHECK(distance(back, x) < 1e-8 * norm(x));
  }
}

TEST_CASE("conjugate gradients: few iterations, hardly more for larger graphs and wilder weights") {
  for (const double spread : {0.0, 2.0, 5.0}) {
    CAPTURE(spread);
    for (const int64_t side : {10, 30, 100}) {
      CAPTURE(side);
      const Graph singular = grid(side, 3, spread);
      Solve result = pcg(singular, balanced(normal(singular.vertices, 4), 1), 1e-8);
      CHECK(result.residual <= 1e-8);
      CHECK(result.iterations <= most_on_grids);
      Graph grounded = singular;
      grounded.excess[side] = 1e-3;
      result = pcg(grounded, normal(grounded.vertices, 4), 1e-8);
      CHECK(result.iterations <= most_on_grids);
      std::fill(grounded.excess.begin(), grounded.excess.end(), 1.0);
      result = pcg(grounded, normal(grounded.vertices, 4), 1e-8);
      CHECK(result.iterations <= most_on_grids);
    }
    for (const int64_t n : {100, 1000, 10'000}) {
      for (const int64_t degree : {3, 6, 20}) {
        CAPTURE(n);
        CAPTURE(degree);
        const Graph graph = random_graph(n, degree, 5, spread);
        const Solve result = pcg(graph, balanced(normal(n, 6), 1), 1e-8);
        CHECK(result.residual <= 1e-8);
        CHECK(result.iterations <= most_on_random_graphs);
      }
    }
  }
  const Graph dense = complete(200, 0.01);
  CHECK(pcg(dense, normal(200, 7), 1e-8).iterations <= most_on_random_graphs);
}

TEST_CASE("conjugate gradients on several components, without a ground") {
  Graph graph(3 * 400);
  for (int64_t c = 0; c < 3; ++c)
    for (const Edge& e : grid(20, static_cast<unsigned>(c), 2).edges)
      graph.add(3 * e.from + c, 3 * e.to + c, e.weight * std::pow(1e-4, double(c)));
  const Vector b = balanced(normal(graph.vertices, 8), 3);
  const Solve result = pcg(graph, b, 1e-10);
  CHECK(result.residual <= 1e-10);
  CHECK(result.iterations <= 2 * most_on_grids);
  CHECK(distance(graph.times(result.x), b) < 1e-9 * norm(b));
  // Isolated vertices beside them change nothing.
  Graph wider = graph;
  wider.vertices += 5;
  wider.excess.resize(wider.vertices, 0.0);
  const ApproximateCholesky factor = wider.factor();
  Vector r(b);
  r.resize(wider.vertices, 0.0);
  const Vector z = solve(factor, r);
  for (int64_t v = graph.vertices; v < wider.vertices; ++v) CHECK(z[v] == 0);
}

TEST_CASE("weights of every size") {
  // Plans hold masses from 1e-300 to 1: nothing may overflow or become NaN.
  Graph graph(200);
  std::mt19937_64 generator(9);
  std::uniform_real_distribution<double> exponent(-300, 0);
  for (int64_t e = 0; e < 2000; ++e) {
    const int64_t from = static_cast<int64_t>(generator() % 200), to = static_cast<int64_t>(generator() % 200);
    if (from != to) graph.add(from, to, std::pow(10.0, exponent(generator)));
  }
  for (const double excess : {0.0, 1e-300, 1.0}) {
    std::fill(graph.excess.begin(), graph.excess.end(), excess);
    const ApproximateCholesky factor = graph.factor();
    check_form(graph, factor);
    for (const double value : solve(factor, balanced(normal(200, 10), 1))) CHECK_FALSE(std::isnan(value));
  }
  // And where they span twenty decades the solve still converges.
  Graph wild = random_graph(500, 6, 11, 8);
  const Vector x = normal(500, 12), b = wild.times(x);
  CHECK(pcg(wild, b, 1e-8).residual <= 1e-8);
}
