// The dual of entropic transport as a function of g alone. For given g the best f is known in closed form, so with
//     F(g) = max_f  A(f) + B(g) - eps sum_ij P_ij,     P_ij = exp((f_i + g_j - C_ij) / eps),
// A(f) = a.f, or -rho_a sum_i a_i (exp(-f_i / rho_a) - 1) where the marginal is penalised, and B alike, one sweep over
// the plan gives F, its gradient B'(g) - P'1, and a step of Sinkhorn's iteration.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "core/reduce.h"
#include "transport/algorithm.h"

namespace kantor::transport {

inline double sum_of(const std::vector<double>& values) {
  return tree_sum(values.data(), static_cast<int64_t>(values.size()));
}

class Dual {
 public:
  // A point g with everything one sweep tells about it.
  struct Point {
    std::vector<double> g, f, log_sums, column_sums, target, gradient;
    double value = 0, scale = 0;  // F, and the size of what cancels in it
    double mass = 1;              // of the plan, or of what it should be where that is larger
    double error = 0;             // sum |gradient| / mass
    double chi2 = 0;              // sum gradient^2 / column_sums / mass
    bool finite = true;
  };

  Dual(Passes& passes, const Problem& problem, Outcome& outcome)
      : passes_(passes),
        ranks_(passes.ranks),
        problem_(problem),
        outcome_(outcome),
        work_(std::max(passes.n, passes.m)) {
    n_ = passes.n;
    m_ = passes.m;
    log_a_.resize(n_);
    log_b_.resize(m_);
    for (int64_t i = 0; i < n_; ++i) log_a_[i] = std::log(problem.a[i]);
    for (int64_t j = 0; j < m_; ++j) log_b_[j] = std::log(problem.b[j]);
    const auto [low, high] = std::minmax_element(log_b_.begin(), log_b_.end());
    double high_a = -unlimited, minus_low_a = -unlimited;
    for (const double value : log_a_) {
      high_a = std::max(high_a, value);
      minus_low_a = std::max(minus_low_a, -value);
    }
    ranks_.largest({{&high_a, 1}, {&minus_low_a, 1}});
    const double rows = static_cast<double>(ranks_.place(n_).total);
    // What a row leaves out must not matter to any column.
    cutoff_ = std::min(700.0, 45 + std::max(high_a - std::min(*low, -minus_low_a), *high - *low) + std::log(rows));
    set_eps(problem.eps);
  }

  void set_eps(double eps) {
    eps_ = eps;
    slope_a_ = std::isinf(problem_.rho_a) ? 1 : problem_.rho_a / (problem_.rho_a + eps);
    slope_b_ = std::isinf(problem_.rho_b) ? 1 : problem_.rho_b / (problem_.rho_b + eps);
    // With KL(P | a x b) the potentials of P = exp((f + g - C) / eps) are f + eps log a, g + eps log b of those of the
    // reference; a penalty on the former sees weights a^(1 + eps / rho).
    power_a_ = problem_.relative && !std::isinf(problem_.rho_a) ? 1 + eps / problem_.rho_a : 1;
    power_b_ = problem_.relative && !std::isinf(problem_.rho_b) ? 1 + eps / problem_.rho_b : 1;
    offset_.resize(n_);
    for (int64_t i = 0; i < n_; ++i) offset_[i] = slope_a_ * eps * power_a_ * log_a_[i];
  }

  double eps() const { return eps_; }
  // Of Sinkhorn's iteration, in the largest change of a potential: below one where marginals are penalised.
  double contraction() const { return slope_a_ * slope_b_; }
  double cutoff() const { return cutoff_; }

  // The point g or, with penalised marginals, the best of its translates (f + s, g - s): they have the same plan, and
  // along them F is next to flat where the penalties are strong.
  Point at(std::vector<double> g) {
    Point p = evaluate(std::move(g));
    if (std::isinf(problem_.rho_a) && std::isinf(problem_.rho_b)) return p;
    for (int repeat = 0; repeat < 3 && p.finite; ++repeat) {
      const double s = translation(p);
      if (!(std::abs(s) > 1e-3 * eps_)) break;
      for (double& value : p.g) value -= s;
      p = evaluate(std::move(p.g));
    }
    return p;
  }

  Point evaluate(std::vector<double> g) {
    Point p;
    p.g = std::move(g);
    p.f.resize(n_);
    p.log_sums.resize(n_);
    p.column_sums.resize(m_);
    ranks_.own([&] {
      passes_.sweep(eps_, cutoff_, p.g.data(), offset_.data(), slope_a_, p.log_sums.data(), p.f.data(),
                    p.column_sums.data());
    });
    ++outcome_.passes;
    double row_error = 0;
    finish(p, row_error);
    return p;
  }

  // The same with f moved from `f_before` by `relaxation` times what would make the rows exact (hard marginals only);
  // the error then counts rows too.
  Point relaxed_at(std::vector<double> g, const std::vector<double>& f_before, double relaxation) {
    std::vector<double> offset(n_);
    for (int64_t i = 0; i < n_; ++i) offset[i] = (1 - relaxation) * f_before[i] + relaxation * offset_[i];
    Point p;
    p.g = std::move(g);
    p.f.resize(n_);
    p.log_sums.resize(n_);
    p.column_sums.resize(m_);
    ranks_.own([&] {
      passes_.sweep(eps_, cutoff_, p.g.data(), offset.data(), relaxation, p.log_sums.data(), p.f.data(),
                    p.column_sums.data());
    });
    ++outcome_.passes;
    for (int64_t i = 0; i < n_; ++i) work_[i] = std::abs(std::exp(p.f[i] / eps_ + p.log_sums[i]) - problem_.a[i]);
    double row_error = tree_sum(work_.data(), n_);
    finish(p, row_error);
    p.error += row_error / p.mass;
    return p;
  }

  // Where Sinkhorn's iteration begins: the columns' share of the reference measure.
  std::vector<double> cold_start() const {
    std::vector<double> g(m_, 0.0);
    if (!std::isinf(problem_.rho_b))
      for (int64_t j = 0; j < m_; ++j) g[j] = slope_b_ * eps_ * power_b_ * log_b_[j];
    return g;
  }

  // Diagonals of the negative Hessian times eps: R of the rows, C of the columns.
  std::vector<double> row_diagonal(const Point& p) const {
    std::vector<double> R(n_);
    for (int64_t i = 0; i < n_; ++i)
      R[i] = std::exp(p.f[i] / eps_ + p.log_sums[i]) * (std::isinf(problem_.rho_a) ? 1 : 1 + eps_ / problem_.rho_a);
    return R;
  }
  std::vector<double> column_diagonal(const Point& p) const {
    std::vector<double> C(p.column_sums);
    if (!std::isinf(problem_.rho_b))
      for (int64_t j = 0; j < m_; ++j) C[j] += eps_ / problem_.rho_b * p.target[j];
    return C;
  }

  // Sinkhorn's update of g, from the column sums of the sweep, or anew where those are too small to be exact.
  std::vector<double> sinkhorn_step(const Point& p, double relaxation = 1) {
    std::vector<double> log_t(m_), g(m_);
    bool exact = true;
    for (int64_t j = 0; j < m_; ++j) {
      exact = exact && p.column_sums[j] > 1e-12 * p.target[j] && p.column_sums[j] < 1e300;
      log_t[j] = std::log(p.column_sums[j]) - p.g[j] / eps_;
    }
    if (!exact) {
      ranks_.own([&] { passes_.column_log_sums(eps_, p.f.data(), log_t.data()); });
      ranks_.log_sum(log_t.data(), m_);
      ++outcome_.passes;
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double best = slope_b_ * eps_ * (power_b_ * log_b_[j] - log_t[j]);
      g[j] = p.g[j] + relaxation * (best - p.g[j]);
    }
    return g;
  }

 private:
  // s that maximises A(f + s) + B(g - s): the masses that both penalties ask for agree.
  double translation(const Point& p) const {
    RowRanks columns;  // which all have
    const auto log_mass = [](RowRanks& ranks, int64_t count, double power, const std::vector<double>& log_w,
                             const std::vector<double>& potential, double rho) {
      double largest = -unlimited, sum = 0;
      const auto exponent = [&](int64_t i) {
        return std::isinf(rho) ? log_w[i] : power * log_w[i] - potential[i] / rho;
      };
      for (int64_t i = 0; i < count; ++i) largest = std::max(largest, exponent(i));
      ranks.largest({{&largest, 1}});
      for (int64_t i = 0; i < count; ++i) sum += std::exp(exponent(i) - largest);
      ranks.sum({{&sum, 1}});
      return largest + std::log(sum);
    };
    const double gap = log_mass(ranks_, n_, power_a_, log_a_, p.f, problem_.rho_a) -
                       log_mass(columns, m_, power_b_, log_b_, p.g, problem_.rho_b);
    return gap / (1 / problem_.rho_a + 1 / problem_.rho_b);
  }

  // Everything that is a sum over rows, `row_error` too, becomes one over all ranks here.
  void finish(Point& p, double& row_error) {
    p.target.resize(m_);
    p.gradient.resize(m_);
    double* w = work_.data();
    const bool hard_a = std::isinf(problem_.rho_a), hard_b = std::isinf(problem_.rho_b);
    for (int64_t i = 0; i < n_; ++i)
      w[i] = hard_a ? problem_.a[i] * p.f[i]
                    : -problem_.rho_a *
                          (std::exp(power_a_ * log_a_[i] - p.f[i] / problem_.rho_a) - std::exp(power_a_ * log_a_[i]));
    p.value = tree_sum(w, n_);
    for (int64_t i = 0; i < n_; ++i) w[i] = std::abs(w[i]);
    p.scale = tree_sum(w, n_);
    ranks_.sum({{p.column_sums.data(), m_}, {&p.value, 1}, {&p.scale, 1}, {&row_error, 1}});
    for (int64_t j = 0; j < m_; ++j)
      p.target[j] = hard_b ? problem_.b[j] : std::exp(power_b_ * log_b_[j] - p.g[j] / problem_.rho_b);
    for (int64_t j = 0; j < m_; ++j)
      w[j] = hard_b ? problem_.b[j] * p.g[j] : -problem_.rho_b * (p.target[j] - std::exp(power_b_ * log_b_[j]));
    p.value += tree_sum(w, m_);
    for (int64_t j = 0; j < m_; ++j) w[j] = std::abs(w[j]);
    p.scale += tree_sum(w, m_);
    const double total = tree_sum(p.column_sums.data(), m_);
    p.mass = tree_sum(p.target.data(), m_);
    if (!hard_b) p.mass = std::max(p.mass, total);
    if (!hard_a) {  // with hard rows the mass of P is fixed
      p.value -= eps_ * total;
      p.scale += eps_ * total;
    }
    for (int64_t j = 0; j < m_; ++j) p.gradient[j] = p.target[j] - p.column_sums[j];
    for (int64_t j = 0; j < m_; ++j) w[j] = std::abs(p.gradient[j]);
    p.error = p.mass > 0 ? tree_sum(w, m_) / p.mass : 0;  // a plan too small for a double is zero, and right
    for (int64_t j = 0; j < m_; ++j) w[j] = p.gradient[j] == 0 ? 0 : p.gradient[j] * p.gradient[j] / p.column_sums[j];
    p.chi2 = p.mass > 0 ? tree_sum(w, m_) / p.mass : 0;
    p.finite = std::isfinite(p.value) && std::isfinite(p.error);
  }

  Passes& passes_;
  RowRanks& ranks_;
  const Problem& problem_;
  Outcome& outcome_;
  int64_t n_, m_;
  double eps_ = 0, slope_a_ = 1, slope_b_ = 1, power_a_ = 1, power_b_ = 1, cutoff_ = 45;
  std::vector<double> log_a_, log_b_, offset_, work_;
};

// Notes steps, asks the monitor, and keeps the clock.
class Progress {
 public:
  Progress(Outcome& outcome, const Monitor& monitor) : outcome_(outcome), monitor_(monitor) {}

  Status note(double eps, double error, Step step) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin_;
    outcome_.history.push_back({elapsed.count(), eps, error, step});
    return monitor_ ? monitor_(static_cast<int64_t>(outcome_.history.size()), eps, error) : Status::running;
  }

 private:
  Outcome& outcome_;
  const Monitor& monitor_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// The dual never exceeds <P, C> + eps sum P log P of a feasible plan; that is at most cost_high for a plan of mass 1,
// whose entries are at most 1: a larger value proves that there is none.
inline bool proves_infeasible(const Problem& problem, double value) {
  return problem.forbidden && std::isinf(problem.rho_a) && std::isinf(problem.rho_b) &&
         value > problem.cost_high + 1e-9 * (problem.cost_high - problem.cost_low);
}

}  // namespace kantor::transport
