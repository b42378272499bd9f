// Sinkhorn-Newton-Sparse as published (method "sns"): Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying,
// "Accelerating Sinkhorn algorithm with sparse Newton iterations" (ICLR 2024), algorithm 1. In our units the dual is
//     D(f, g) = a.f + b.g - eps sum_ij P_ij,
// its gradient (a - P1, b - P'1), its negative Hessian [diag(P1) P; P' diag(P'1)] / eps.
#include <algorithm>
#include <cmath>

#include "transport/algorithm.h"
#include "transport/dual.h"
#include "transport/newton_system.h"

namespace kantor::transport {
namespace {

constexpr double armijo = 1e-4;
constexpr CgLimits cg_limits{1e-6, 500};

class Sns {
 public:
  Sns(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor)
      : passes_(passes),
        problem_(problem),
        options_(options),
        progress_(outcome_, monitor),
        n_(passes.n),
        m_(passes.m) {}

  Outcome run(double* f, double* g) {
    try {
      Dual dual(passes_, problem_, outcome_);
      Dual::Point p = dual.at(std::vector<double>(g, g + m_));
      for (int64_t k = 0; k < options_.warm_up && p.error > options_.tol && outcome_.status == Status::running; ++k) {
        keep(p);
        p = dual.at(dual.sinkhorn_step(p));
        outcome_.status = progress_.note(problem_.eps, p.error, Step::sinkhorn);
      }
      keep(p);
      evaluate(f_, g_, here_);
      while (outcome_.status == Status::running) outcome_.status = newton_step();
    } catch (const Interrupted&) { outcome_.status = Status::interrupted; }
    if (!f_.empty()) {
      std::copy(f_.begin(), f_.end(), f);
      std::copy(g_.begin(), g_.end(), g);
    }
    return outcome_;
  }

 private:
  void keep(const Dual::Point& p) {
    f_ = p.f;
    g_ = p.g;
    outcome_.error = p.error;
    outcome_.dual = p.value;
  }

  struct Values {
    std::vector<double> row_sums, column_sums, u, v;  // marginals of P, and what they lack
    double dual = 0, error = 0;
  };

  void evaluate(const std::vector<double>& f, const std::vector<double>& g, Values& at) {
    at.row_sums.resize(n_);
    at.column_sums.resize(m_);
    at.u.resize(n_);
    at.v.resize(m_);
    passes_.sums(problem_.eps, f.data(), g.data(), at.row_sums.data(), at.column_sums.data());
    ++outcome_.passes;
    std::vector<double> terms(n_ + m_);
    for (int64_t i = 0; i < n_; ++i) terms[i] = problem_.a[i] * f[i];
    for (int64_t j = 0; j < m_; ++j) terms[n_ + j] = problem_.b[j] * g[j];
    at.dual = sum_of(terms) - problem_.eps * sum_of(at.column_sums);
    for (int64_t i = 0; i < n_; ++i) terms[i] = std::abs(at.u[i] = problem_.a[i] - at.row_sums[i]);
    for (int64_t j = 0; j < m_; ++j) terms[n_ + j] = std::abs(at.v[j] = problem_.b[j] - at.column_sums[j]);
    at.error = sum_of(terms) / tree_sum(problem_.b, m_);
  }

  // The ceil(density n m) largest entries of P.
  SparsePlan largest_entries() {
    const double density = options_.density > 0 ? options_.density : 2.0 / n_;
    const int64_t count = static_cast<int64_t>(std::ceil(std::min(density, 1.0) * n_ * m_));
    SparsePlan M;
    // The mass bounds the count-th largest entry from above; few entries lie between it and the threshold that is
    // right.
    for (double threshold = sum_of(here_.column_sums) / count * 1e-3;; threshold *= 1e-6) {
      passes_.extract(problem_.eps, f_.data(), g_.data(), threshold, n_ * m_, M);
      ++outcome_.passes;
      if (M.nnz() >= count || threshold < 1e-290) break;
    }
    if (M.nnz() <= count) return M;
    std::vector<double> values(M.value);
    std::nth_element(values.begin(), values.begin() + (count - 1), values.end(), std::greater<>());
    const double least = values[count - 1];
    SparsePlan kept;
    kept.n = n_;
    kept.m = m_;
    kept.row_start.assign(1, 0);
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) {
        if (M.value[e] < least) continue;
        kept.column.push_back(M.column[e]);
        kept.value.push_back(M.value[e]);
      }
      kept.row_start.push_back(kept.nnz());
    }
    return kept;
  }

  Status newton_step() {
    if (!std::isfinite(here_.error)) return Status::overflow;
    outcome_.error = here_.error;
    outcome_.dual = here_.dual;
    if (here_.error <= options_.tol) return Status::converged;
    if (outcome_.newton_steps >= options_.max_iter) return Status::max_iter;
    ++outcome_.newton_steps;
    ++outcome_.solves;
    const SparsePlan M = largest_entries();
    outcome_.most_entries = std::max(outcome_.most_entries, M.nnz());
    // The paper solves for both potentials by CG; the elimination of f is exact and halves the system.
    std::vector<double> R(here_.row_sums), C(here_.column_sums), v(here_.v), zeta;
    for (double& r : R) r = std::max(r, 1e-300);
    std::vector<double> scaled(n_);
    for (int64_t i = 0; i < n_; ++i) scaled[i] = here_.u[i] / R[i];
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) v[M.column[e]] -= M.value[e] * scaled[i];
    std::vector<double> jacobi(C);
    for (double& c : jacobi) c = std::max(c, 1e-300);
    const CgReport report = solve_schur(gram_of(M, R, options_.threads), C, jacobi, v, cg_limits, zeta);
    outcome_.cg_iterations += report.iterations;
    outcome_.negative_curvature += report.negative_curvature;
    std::vector<double> xi(n_);
    for (int64_t i = 0; i < n_; ++i) {
      double product = 0;
      for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) product += M.value[e] * zeta[M.column[e]];
      xi[i] = (here_.u[i] - product) / R[i];
    }

    const double eps = problem_.eps;
    double slope = 0, size = 0;
    for (int64_t i = 0; i < n_; ++i) slope += here_.u[i] * eps * xi[i];
    for (int64_t j = 0; j < m_; ++j) slope += here_.v[j] * eps * zeta[j];
    for (int64_t i = 0; i < n_; ++i) size += std::abs(problem_.a[i] * f_[i]);
    for (int64_t j = 0; j < m_; ++j) size += std::abs(problem_.b[j] * g_[j]);
    Values next;
    std::vector<double> f(n_), g(m_);
    for (double t = 1; t > 1e-12; t *= 0.5) {
      for (int64_t i = 0; i < n_; ++i) f[i] = f_[i] + t * eps * xi[i];
      for (int64_t j = 0; j < m_; ++j) g[j] = g_[j] + t * eps * zeta[j];
      evaluate(f, g, next);
      // Below the rounding of the dual its gradient decides.
      if (!(next.dual >= here_.dual + armijo * t * slope) &&
          !(next.error < here_.error && next.dual >= here_.dual - 1e-15 * size))
        continue;
      f_.swap(f);
      g_.swap(g);
      here_ = std::move(next);
      return progress_.note(eps, here_.error, Step::newton);
    }
    return Status::stalled;
  }

  Passes& passes_;
  const Problem& problem_;
  const Options& options_;
  Outcome outcome_;
  Progress progress_;
  int64_t n_, m_;
  std::vector<double> f_, g_;
  Values here_;
};

}  // namespace

Outcome sns(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor, double* f,
            double* g) {
  return Sns(passes, problem, options, monitor).run(f, g);
}

}  // namespace kantor::transport
