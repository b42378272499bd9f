#include "transport/newton_system.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "core/parallel.h"
#include "core/reduce.h"

namespace kantor::transport {
namespace {

constexpr int64_t chunks = 16;  // of rows, each with its own column sums: the same bits for any number of threads

double norm1(const std::vector<double>& v) {
  std::vector<double> sizes(v.size());
  for (size_t i = 0; i < v.size(); ++i) sizes[i] = std::abs(v[i]);
  return tree_sum(sizes.data(), static_cast<int64_t>(sizes.size()));
}

double dot(const std::vector<double>& x, const std::vector<double>& y) {
  return lane_sum(
      static_cast<int64_t>(x.size()), [&](int64_t i) { return load8(&x[i]) * load8(&y[i]); },
      [&](int64_t i) { return x[i] * y[i]; });
}

// row_product(i) = what row i of M gives to the columns, from M's row times v.
// Traffic: 12 bytes an entry, once; both products of a row are taken while it is in cache.
class RowPasses {
 public:
  RowPasses(const SparsePlan& M, int threads)
      : M_(M), threads_(threads), sums_(M.nnz() < serial_below ? M.m : chunks * M.m) {}

  template <class Weight>
  void operator()(const double* v, double* out, Weight&& weight) {
    std::fill(sums_.begin(), sums_.end(), 0.0);
    const int64_t parts = chunks;
    const bool own = static_cast<int64_t>(sums_.size()) > M_.m;
    parallel_for(threads_, own ? parts : 1, [&](int64_t part) {
      const Range mine = own ? share(M_.n, static_cast<int>(part), static_cast<int>(parts)) : Range{0, M_.n};
      double* sums = sums_.data() + (own ? part * M_.m : 0);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t begin = M_.row_start[i], end = M_.row_start[i + 1];
        double product = 0;
        for (int64_t e = begin; e < end; ++e) product += M_.value[e] * v[M_.column[e]];
        const double share_of_row = weight(i, product);
        for (int64_t e = begin; e < end; ++e) sums[M_.column[e]] += M_.value[e] * share_of_row;
      }
    });
    for (int64_t j = 0; j < M_.m; ++j) {
      if (!own) {
        out[j] = sums_[j];
        continue;
      }
      double values[chunks];
      for (int64_t part = 0; part < parts; ++part) values[part] = sums_[part * M_.m + j];
      out[j] = tree_sum(values, parts);
    }
  }

 private:
  const SparsePlan& M_;
  int threads_;
  std::vector<double> sums_;
};

}  // namespace

GramProduct gram_of(const SparsePlan& M, const std::vector<double>& R, int threads) {
  auto passes = std::make_shared<RowPasses>(M, threads);
  return [passes, &R](const double* v, double* out) {
    (*passes)(v, out, [&](int64_t i, double product) { return product / R[i]; });
  };
}

CgReport solve_schur(const GramProduct& gram, const std::vector<double>& diagonal, const std::vector<double>& jacobi,
                     const std::vector<double>& v, const CgLimits& limits, std::vector<double>& zeta) {
  const size_t m = v.size();
  CgReport report;
  zeta.assign(m, 0.0);
  std::vector<double> r = v, z(m), p(m), q(m);
  const double target = limits.rtol * norm1(v);
  double rz = 0;
  for (;; ++report.iterations) {
    const double norm = norm1(r);
    report.relative_residual = target > 0 ? norm / (target / limits.rtol) : 0;
    report.met = norm <= target;
    if (report.met || report.iterations >= limits.max_iterations) return report;
    for (size_t j = 0; j < m; ++j) z[j] = r[j] / jacobi[j];
    const double rz_new = dot(r, z);
    const double beta = report.iterations == 0 ? 0 : rz_new / rz;
    rz = rz_new;
    for (size_t j = 0; j < m; ++j) p[j] = z[j] + beta * p[j];
    gram(p.data(), q.data());
    for (size_t j = 0; j < m; ++j) q[j] = diagonal[j] * p[j] - q[j];
    const double curvature = dot(p, q);
    if (!(curvature > 0)) {
      // A null direction, or one that rounding makes so: nothing is left to gain along it.
      std::vector<double> sizes(m);
      for (size_t j = 0; j < m; ++j) sizes[j] = diagonal[j] * p[j] * p[j];
      if (curvature < -1e-13 * tree_sum(sizes.data(), static_cast<int64_t>(m))) ++report.negative_curvature;
      return report;
    }
    const double alpha = rz / curvature;
    for (size_t j = 0; j < m; ++j) {
      zeta[j] += alpha * p[j];
      r[j] -= alpha * q[j];
    }
  }
}

ApproximateCholesky factor_plan(const SparsePlan& M, const std::vector<double>& R, const std::vector<double>& C) {
  std::vector<Edge> edges;
  edges.reserve(M.nnz());
  std::vector<double> sums(M.n + M.m, 0.0);
  for (int64_t i = 0; i < M.n; ++i)
    for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) {
      edges.push_back({static_cast<int32_t>(i), static_cast<int32_t>(M.n + M.column[e]), M.value[e]});
      sums[i] += M.value[e];
      sums[M.n + M.column[e]] += M.value[e];
    }
  // An excess at the level of rounding would hold a component that nothing holds, by a pivot of noise.
  const auto beyond_rounding = [](double diagonal, double sum) {
    return diagonal - sum > 1e-13 * diagonal ? diagonal - sum : 0.0;
  };
  std::vector<double> excess(M.n + M.m);
  for (int64_t i = 0; i < M.n; ++i) excess[i] = beyond_rounding(R[i], sums[i]);
  for (int64_t j = 0; j < M.m; ++j) excess[M.n + j] = beyond_rounding(C[j], sums[M.n + j]);
  return approximate_cholesky(M.n + M.m, edges, excess);
}

void block_step(const SparsePlan& M, const std::vector<double>& R, const std::vector<double>& C,
                const std::vector<double>& u, const std::vector<double>& v, std::vector<double>& xi,
                std::vector<double>& zeta) {
  zeta = v;
  for (int64_t i = 0; i < M.n; ++i)
    for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) zeta[M.column[e]] -= M.value[e] * xi[i];
  for (int64_t j = 0; j < M.m; ++j) zeta[j] /= C[j];
  for (int64_t i = 0; i < M.n; ++i) {
    double product = 0;
    for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) product += M.value[e] * zeta[M.column[e]];
    xi[i] = (u[i] - product) / R[i];
  }
}

CgReport solve_whole(const SparsePlan& M, const std::vector<double>& R, const std::vector<double>& C,
                     const ApproximateCholesky& factor, const std::vector<double>& u, const std::vector<double>& v,
                     const CgLimits& limits, int threads, std::vector<double>& xi, std::vector<double>& zeta) {
  const int64_t n = M.n, m = M.m, size = n + m;
  CgReport report;
  RowPasses rows(M, threads);
  // Unknowns (-xi, zeta): the matrix is the Laplacian.
  std::vector<double> x(size, 0.0), r(size), z(size), p(size), q(size);
  for (int64_t i = 0; i < n; ++i) r[i] = -u[i];
  std::copy(v.begin(), v.end(), r.begin() + n);
  const double norm = norm1(r), target = limits.rtol * norm;
  double rz = 0;
  for (;; ++report.iterations) {
    const double now = norm1(r);
    report.relative_residual = norm > 0 ? now / norm : 0;
    report.met = now <= target;
    if (report.met || report.iterations >= limits.max_iterations) break;
    approximate_cholesky_solve(factor, r.data(), z.data());
    const double rz_new = dot(r, z);
    const double beta = report.iterations == 0 ? 0 : rz_new / rz;
    rz = rz_new;
    for (int64_t i = 0; i < size; ++i) p[i] = z[i] + beta * p[i];
    rows(p.data() + n, q.data() + n, [&](int64_t i, double product) {
      q[i] = R[i] * p[i] - product;
      return p[i];
    });
    for (int64_t j = 0; j < m; ++j) q[n + j] = C[j] * p[n + j] - q[n + j];
    const double curvature = dot(p, q);
    if (!(curvature > 0)) {
      double size_of = 0;
      for (int64_t i = 0; i < n; ++i) size_of += R[i] * p[i] * p[i];
      for (int64_t j = 0; j < m; ++j) size_of += C[j] * p[n + j] * p[n + j];
      if (curvature < -1e-13 * size_of) ++report.negative_curvature;
      break;
    }
    const double alpha = rz / curvature;
    for (int64_t i = 0; i < size; ++i) {
      x[i] += alpha * p[i];
      r[i] -= alpha * q[i];
    }
  }
  xi.resize(n);
  for (int64_t i = 0; i < n; ++i) xi[i] = -x[i];
  zeta.assign(x.begin() + n, x.end());
  return report;
}

}  // namespace kantor::transport
