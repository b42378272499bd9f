// Entropic transport to machine precision (method "newton"): Newton's method on the semi-dual F(g) of dual.h, inside a
// continuation in eps, with the plan made sparse under error control. After
//   Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao, Ying, "Accelerating Sinkhorn algorithm with sparse
//   Newton iterations" (ICLR 2024),
// made safe: every quantity in the log domain, no negative curvature whatever is left out (newton_system.h), a trust
// region in units of eps, in which F is quasi-self-concordant, and a line search on F.
#include <algorithm>
#include <cmath>

#include "transport/algorithm.h"
#include "transport/dual.h"
#include "transport/newton_system.h"

namespace kantor::transport {
namespace {

constexpr double level_tol = 0.05;      // of intermediate levels
constexpr double dropped_share = 1e-2;  // of the error: mass that the sparse plan may lack
constexpr double machine_floor = 1e-12;
constexpr double linear_share = 0.9;      // of the slope: F gained so much over a step that its curvature hardly shows
constexpr int64_t steps_of_a_level = 25;  // Newton steps after which a level is taken to have begun too far away
constexpr int most_tightened = 4;
constexpr int64_t patience = 40;                     // steps without progress before a level is given up
constexpr int64_t most_gathered = int64_t{1} << 24;  // entries of a plan that ranks send to each other, 256 MB

class Newton {
 public:
  Newton(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor)
      : passes_(passes),
        ranks_(passes.ranks),
        problem_(problem),
        options_(options),
        rows_(passes.ranks.place(passes.n)),
        dual_(passes, problem, outcome_),
        progress_(outcome_, monitor) {
    // What is left of the error between parts of the plan that drift apart is harder to mend the smaller eps is.
    if (problem.eps < 2e-4 * (problem.cost_high - problem.cost_low)) tol_of_levels_ = 0.2 * level_tol;
  }

  Outcome run(double* f, double* g) {
    std::vector<double> start(g, g + passes_.m);
    Dual::Point best;
    try {
      Status status = Status::running;
      current_ = start;
      Dual::Point p = first_point(std::move(start), status);
      if (!p.finite) status = Status::overflow;
      last_eps_ = dual_.eps();
      double shrink = 0.5;
      while (status == Status::running) {
        const bool last = dual_.eps() <= problem_.eps;
        const size_t before = outcome_.history.size();
        status = level(p, last ? options_.tol : tol_of_levels_);
        if (status == Status::stalled && p.error > rounding_level() && tightened_ < most_tightened &&
            dual_.eps() < highest()) {
          // Parts of the plan have drifted apart: back to where they are connected, and down again more exactly.
          ++tightened_;
          previous_end_.clear();
          tol_of_levels_ *= 0.03;
          dual_.set_eps(last_eps_ = std::min(highest(), 100 * dual_.eps()));
          shrink = 0.5;
          p = dual_.at(std::move(p.g));
          status = Status::running;
          continue;
        }
        if (last || (status != Status::stalled && status != Status::converged)) break;
        const size_t steps = outcome_.history.size() - before;
        if (steps > 8) shrink = std::min(std::sqrt(shrink), 0.9);
        if (steps <= 2) shrink = 0.5;
        const double next = dual_.eps() * shrink;
        const std::vector<double> before_start = dual_.cold_start();
        dual_.set_eps(next < problem_.eps * 1.2 ? problem_.eps : next);
        // Penalties see the potentials of the reference measure, which differ from ours by a multiple of eps log b.
        const std::vector<double> after_start = dual_.cold_start();
        for (size_t j = 0; j < p.g.size(); ++j) p.g[j] += after_start[j] - before_start[j];
        p = next_start(std::move(p));
        status = Status::running;
      }
      outcome_.status = status;
      best = std::move(p);
    } catch (const Interrupted& reason) {
      outcome_.status = reason.by_callback ? Status::stopped : Status::interrupted;
      dual_.set_eps(problem_.eps);
      passes_.interrupted = nullptr;
      best = dual_.at(current_);
    }
    if (dual_.eps() != problem_.eps) {
      dual_.set_eps(problem_.eps);
      best = dual_.at(std::move(best.g));
    }
    if (outcome_.status != Status::converged && least_error_ < best.error) {
      Dual::Point least = dual_.at(std::move(least_g_));
      if (least.error < best.error || !best.finite) best = std::move(least);
    }
    if (outcome_.status == Status::converged && !(best.error <= options_.tol)) outcome_.status = Status::stalled;
    std::copy(best.f.begin(), best.f.end(), f);
    std::copy(best.g.begin(), best.g.end(), g);
    outcome_.error = best.error;
    outcome_.dual = best.value;
    return outcome_;
  }

 private:
  // Where sweeps at the final eps converge quickly they are all that is needed. Otherwise the largest eps from which
  // Newton's method goes down safely: for a good start that is the final one.
  Dual::Point first_point(std::vector<double> g, Status& status) {
    const bool cold = std::all_of(g.begin(), g.end(), [](double value) { return value == 0; });
    const double range = problem_.cost_high - problem_.cost_low;
    dual_.set_eps(problem_.eps);
    if (cold) g = dual_.cold_start();
    Dual::Point p = dual_.at(g);
    current_ = p.g;
    if (dual_.contraction() < 0.7) return p;
    if (options_.sinkhorn_first && problem_.eps >= 2e-3 * range) {
      opening_sweeps(p, status);
      if (status != Status::running) return p;
      g = p.g;
    }
    if (problem_.eps >= highest() || p.error <= (cold ? level_tol : 10 * level_tol)) return p;
    dual_.set_eps(highest());
    return dual_.at(cold && outcome_.history.empty() ? dual_.cold_start() : std::move(g));
  }

  // Sweeps at the final eps, over-relaxed (sinkhorn_cpu.cpp) once their rate is known, as long as they promise to be
  // done soon.
  void opening_sweeps(Dual::Point& p, Status& status) {
    const bool hard = std::isinf(problem_.rho_a) && std::isinf(problem_.rho_b);
    const int64_t most = std::min<int64_t>(50, options_.max_iter);
    std::vector<double> errors{p.error};
    double relaxation = 1;
    Dual::Point begun_at;
    for (int64_t sweep = 1; sweep <= most && p.finite && p.error > options_.tol; ++sweep) {
      std::vector<double> g = dual_.sinkhorn_step(p, relaxation);
      p = relaxation == 1 ? dual_.at(std::move(g)) : dual_.relaxed_at(std::move(g), p.f, relaxation);
      if (relaxation > 1 && p.error <= options_.tol) p = dual_.at(std::move(p.g));
      current_ = p.g;
      status = progress_.note(dual_.eps(), p.error, Step::sinkhorn);
      if (status != Status::running) return;
      if (relaxation > 1) {
        if (p.error < 10 * begun_at.error) continue;
        p = std::move(begun_at);
        return;
      }
      errors.push_back(p.error);
      if (sweep < 6) continue;
      const double rate = std::pow(errors[sweep] / errors[sweep - 4], 0.25);
      if (!(rate < 1)) return;
      const double digits = std::log(options_.tol / p.error);
      if (digits / std::log(rate) <= 12) continue;
      const double best = 2 / (1 + std::sqrt(1 - rate));
      if (hard && 1.5 * digits / std::log(best - 1) + 5 <= 25) {
        relaxation = best;
        begun_at = p;
      } else if (digits / std::log(rate) > 30) {
        return;
      }
    }
    if (relaxation > 1 && p.error > options_.tol) p = dual_.at(std::move(p.g));
  }

  // At the next eps: the end of the last level, or the line through the ends of the last two, whichever is higher.
  Dual::Point next_start(Dual::Point end) {
    const double eps = dual_.eps();
    std::vector<double> line;
    if (!previous_end_.empty() && previous_eps_ > last_eps_) {
      const double t = (eps - last_eps_) / (last_eps_ - previous_eps_);
      line = end.g;
      for (size_t j = 0; j < line.size(); ++j) line[j] += t * (end.g[j] - previous_end_[j]);
    }
    previous_end_ = end.g;
    previous_eps_ = last_eps_;
    last_eps_ = eps;
    Dual::Point start = dual_.at(std::move(end.g));
    if (line.empty()) return start;
    Dual::Point ahead = dual_.at(std::move(line));
    return ahead.finite && ahead.value > start.value ? ahead : start;
  }

  // An error below it may be all that the digits of (f + g - C) / eps allow.
  double rounding_level() const {
    return std::max(1e-8, 2e-15 * std::max(std::abs(problem_.cost_high), std::abs(problem_.cost_low)) / dual_.eps());
  }

  double highest() const {
    return options_.first_eps > 0 ? options_.first_eps : 0.1 * (problem_.cost_high - problem_.cost_low);
  }

  // Newton's method at one eps, from p, to an error of tol.
  Status level(Dual::Point& p, double tol) {
    bool sweeps_help = true;
    double best_error = p.error, best_value = p.value;
    int64_t since_best = 0, level_sweeps = 0;
    const bool last = dual_.eps() <= problem_.eps;
    bool quick = true;
    const int64_t steps_before = outcome_.newton_steps;
    prefer_factor_ = false;
    for (;;) {
      current_ = p.g;
      if (!p.finite) return Status::overflow;
      if (last && p.error < least_error_) {
        least_error_ = p.error;
        least_g_ = p.g;
      }
      if (p.error <= tol) return Status::converged;
      if (proves_infeasible(problem_, p.value)) return Status::infeasible;
      if (outcome_.newton_steps >= options_.max_iter ||
          static_cast<int64_t>(outcome_.history.size()) >= 20 * options_.max_iter)
        return Status::max_iter;
      if (p.error < 0.9 * best_error || p.value > best_value + 1e-10 * p.scale) {
        best_error = std::min(p.error, best_error);
        best_value = std::max(p.value, best_value);
        since_best = 0;
      } else if (++since_best > (p.error < machine_floor ? 3 : patience)) {
        return Status::stalled;
      }
      if (p.error > rounding_level() && tightened_ < most_tightened && dual_.eps() < highest() &&
          outcome_.newton_steps - steps_before > steps_of_a_level)
        return Status::stalled;
      const double before = p.error;
      Step step = Step::sinkhorn;
      const bool cheap = !last && dense_plan_ && quick && level_sweeps < 12;  // beside a system with a dense plan
      const bool contracting = dual_.contraction() < 0.7;
      if (starved(p) || cheap || contracting || (p.chi2 > 1 && sweeps_help)) {
        ++level_sweeps;
        p = dual_.at(dual_.sinkhorn_step(p));
        sweeps_help = p.error < 0.9 * before;
        quick = p.error < 0.7 * before;
      } else if (newton_step(p)) {
        step = Step::newton;
        sweeps_help = true;
      } else {
        p = dual_.at(dual_.sinkhorn_step(p));
      }
      const Status answer = progress_.note(dual_.eps(), p.error, step);
      if (answer != Status::running) return answer;
    }
  }

  // A column that next to nothing reaches: the quadratic model says nothing about it, Sinkhorn's update does.
  static bool starved(const Dual::Point& p, size_t j) { return !(p.column_sums[j] > 1e-12 * p.target[j]); }
  // Whether such columns matter.
  bool starved(const Dual::Point& p) const {
    double mass = 0;
    for (size_t j = 0; j < p.target.size(); ++j)
      if (starved(p, j)) mass += p.target[j];
    return mass > 1e-3 * options_.tol * p.mass;
  }

  // False when no step along Newton's direction is acceptable.
  bool newton_step(Dual::Point& p) {
    ++outcome_.newton_steps;
    const double eps = dual_.eps();
    std::vector<double> R = dual_.row_diagonal(p), C = dual_.column_diagonal(p);
    for (size_t j = 0; j < C.size(); ++j) {
      // Stays where it is, or goes with its neighbours; whatever it needs must not hold up the others.
      if (starved(p, j) || std::max(p.target[j], p.column_sums[j]) < 1e-3 * options_.tol * p.mass / double(C.size()))
        C[j] = std::max(C[j], p.target[j]), p.gradient[j] = 0;
    }
    SparsePlan M;
    const double threshold = (eps > problem_.eps ? 10 : 1) * dropped_share * std::min(p.error, 0.1) * p.mass /
                             (double(rows_.total) * passes_.m);
    const bool sparse = sparse_plan(p, threshold, M, R, C);
    dense_plan_ = !sparse || entries_ > double(rows_.total) * passes_.m / 20;
    if (sparse) outcome_.most_entries = std::max(outcome_.most_entries, entries_);

    std::vector<double> direction;
    double longest = 0;
    for (int attempt = 0; attempt < 12; ++attempt) {
      direction = solve(p, R, C, sparse ? &M : nullptr);
      if (std::isinf(problem_.rho_a) && std::isinf(problem_.rho_b)) centre(direction);
      longest = 0;
      for (const double d : direction) longest = std::max(longest, std::abs(d));
      if (!(longest > radius_)) break;
      if (!sparse) {  // a shorter step costs nothing, another solve dozens of sweeps
        for (double& d : direction) d *= radius_ / longest;
        longest = radius_;
        break;
      }
      // Where the ridge rules, the step is inversely proportional to it.
      ridge_ = std::max(ridge_ * std::clamp(1.5 * longest / radius_, 2.0, 1e3), 1e-7);
    }
    if (!std::isfinite(longest)) return false;

    std::vector<double> products(direction.size());
    for (size_t j = 0; j < products.size(); ++j) products[j] = p.gradient[j] * eps * direction[j];
    const double slope = sum_of(products);
    if (!(slope > 0)) return false;
    double t = 1;
    for (int trial = 0; trial < 6; ++trial, t *= 0.35) {
      std::vector<double> g(p.g);
      for (size_t j = 0; j < g.size(); ++j) g[j] += t * eps * direction[j];
      Dual::Point next = dual_.at(std::move(g));
      const double gain = next.value - p.value;
      const bool better = next.finite && (gain >= 1e-3 * t * slope - 1e-15 * p.scale || next.error < 0.5 * p.error);
      if (!better) continue;
      if (t == 1) {
        const double ratio = gain / (slope * 0.5);
        if (ratio > 0.75 || next.error < 0.5 * p.error) {
          ridge_ = std::max(ridge_ / 10, 1e-11);
          if (longest > 0.5 * radius_) radius_ = std::min(2 * radius_, 60.0);
        }
        if (gain > linear_share * slope) stretch(p, direction, slope, next);
      } else {
        radius_ = std::max(radius_ / 2, 2.0);
        ridge_ = std::min(3 * ridge_, 1e3);
      }
      p = std::move(next);
      return true;
    }
    radius_ = std::max(radius_ / 2, 2.0);
    ridge_ = std::min(10 * ridge_, 1e3);
    return false;
  }

  // Parts of the plan that no mass connects yet may lie thousands of eps apart, and F rises in a straight line until
  // they meet: go on along the direction as long as it does.
  void stretch(const Dual::Point& from, const std::vector<double>& direction, double slope, Dual::Point& reached) {
    for (double t = 2; t <= 1e6; t *= 2) {
      std::vector<double> g(from.g);
      for (size_t j = 0; j < g.size(); ++j) g[j] += t * dual_.eps() * direction[j];
      Dual::Point next = dual_.at(std::move(g));
      const double gain = next.value - from.value;
      if (!next.finite || !(next.value - reached.value > 1e-15 * from.scale) || !(gain > 0.5 * t * slope)) return;
      reached = std::move(next);
      if (!(gain > linear_share * t * slope)) return;
    }
  }

  // The entries of the plan above the threshold; false when there are more than entry_limit. The sums R and C come from
  // the sweep, the entries from the potentials: with exponents of a million they differ by 1e-10, and the matrix of the
  // system is semidefinite only if no diagonal is less than its row.
  bool sparse_plan(const Dual::Point& p, double threshold, SparsePlan& M, std::vector<double>& R,
                   std::vector<double>& C) {
    bool fits = false;
    ranks_.own(
        [&] { fits = passes_.extract(dual_.eps(), p.f.data(), p.g.data(), threshold, options_.entry_limit, M); });
    ++outcome_.passes;
    std::vector<double> column_sums(C.size(), 0.0);
    double entries = fits ? double(M.nnz()) : unlimited;
    for (int64_t i = 0; fits && i < M.n; ++i) {
      double row_sum = 0;
      for (int64_t e = M.row_start[i]; e < M.row_start[i + 1]; ++e) {
        row_sum += M.value[e];
        column_sums[M.column[e]] += M.value[e];
      }
      R[i] = std::max(R[i], row_sum);
    }
    ranks_.sum({{column_sums.data(), passes_.m}, {&entries, 1}});
    if (!(entries <= double(options_.entry_limit))) return false;
    for (size_t j = 0; j < C.size(); ++j) C[j] = std::max(C[j], column_sums[j]);
    entries_ = static_cast<int64_t>(entries);
    return true;
  }

  // Newton's direction in units of eps.
  std::vector<double> solve(const Dual::Point& p, std::vector<double> R, std::vector<double> C, const SparsePlan* M) {
    ++outcome_.solves;
    for (double& r : R) r *= 1 + ridge_;
    std::vector<double> jacobi(C);
    for (double& c : C) c *= 1 + ridge_;
    std::vector<double> zeta, xi;
    CgLimits limits{std::min(1e-2, std::max(p.error, 1e-8)), 150};
    if (!M) limits.rtol = std::min(0.1, std::max(p.error, 0.3 * options_.tol / p.error));  // each product is a sweep
    const bool factorable = M && (ranks_.alone() || entries_ <= most_gathered);
    if (!factorable || (entries_ > 8 * (rows_.total + passes_.m) && !prefer_factor_)) {
      GramProduct gram;
      std::vector<double> scale;
      if (M) {
        gram = gram_of(*M, R, options_.threads);
        // diag(S), as far as it is known to be positive; the first rank brings in the part of the columns
        if (!ranks_.first()) std::fill(jacobi.begin(), jacobi.end(), 0.0);
        for (int64_t i = 0; i < M->n; ++i)
          for (int64_t e = M->row_start[i]; e < M->row_start[i + 1]; ++e)
            jacobi[M->column[e]] -= M->value[e] * M->value[e] / R[i];
        ranks_.sum({{jacobi.data(), passes_.m}});
        for (size_t j = 0; j < jacobi.size(); ++j) jacobi[j] = std::max(jacobi[j], 1e-3 * C[j]);
      } else {
        for (const double r : R) scale.push_back(1 / r);
        gram = [&](const double* v, double* out) {
          passes_.gram_product(dual_.eps(), dual_.cutoff(), p.f.data(), p.g.data(), scale.data(), v, out);
          ++outcome_.passes;
        };
      }
      const auto product = [&](const double* v, double* out) {
        ranks_.own([&] { gram(v, out); });
        ranks_.sum({{out, passes_.m}});
      };
      const CgReport report = solve_schur(product, C, jacobi, p.gradient, limits, zeta);
      note(report);
      if (report.met || !factorable || report.negative_curvature) return zeta;
      prefer_factor_ = true;
    }
    SparsePlan gathered;
    if (!ranks_.alone()) {
      gathered = gather(*M);
      R = ranks_.gather(R, rows_);
      M = &gathered;
    }
    const ApproximateCholesky factor = factor_plan(*M, R, C);
    ++outcome_.factorisations;
    limits.max_iterations = 500;
    const std::vector<double> zero(rows_.total, 0.0);
    note(solve_whole(*M, R, C, factor, zero, p.gradient, limits, options_.threads, xi, zeta));
    return zeta;
  }

  // The rows of all ranks. A factor of the whole system is not to be had from some of them, and where one is wanted the
  // plan is sparse: every rank factors it for itself.
  SparsePlan gather(const SparsePlan& M) {
    const RowRanks::Place entries = ranks_.place(M.nnz());
    SparsePlan all;
    all.n = rows_.total;
    all.m = M.m;
    std::vector<int64_t> lengths(M.n);
    for (int64_t i = 0; i < M.n; ++i) lengths[i] = M.row_start[i + 1] - M.row_start[i];
    lengths = ranks_.gather(lengths, rows_);
    all.row_start.assign(1, 0);
    for (const int64_t length : lengths) all.row_start.push_back(all.row_start.back() + length);
    all.column = ranks_.gather(M.column, entries);
    all.value = ranks_.gather(M.value, entries);
    return all;
  }

  void note(const CgReport& report) {
    outcome_.cg_iterations += report.iterations;
    if (report.negative_curvature) {
      outcome_.negative_curvature += report.negative_curvature;
      ridge_ = std::min(10 * ridge_, 1e3);
    }
  }

  // A constant in g changes nothing; the one with mean zero is shortest.
  void centre(std::vector<double>& direction) const {
    std::vector<double> weighted(direction.size());
    for (size_t j = 0; j < direction.size(); ++j) weighted[j] = problem_.b[j] * direction[j];
    const double mean = sum_of(weighted) / tree_sum(problem_.b, passes_.m);
    for (double& d : direction) d -= mean;
  }

  Passes& passes_;
  RowRanks& ranks_;
  const Problem& problem_;
  const Options& options_;
  RowRanks::Place rows_;
  Outcome outcome_;
  Dual dual_;
  Progress progress_;
  std::vector<double> current_;  // for an interrupt in the middle of a pass
  std::vector<double> previous_end_;
  double previous_eps_ = 0, last_eps_ = 0;
  std::vector<double> least_g_;  // the point of least error at the final eps
  double least_error_ = unlimited;
  int tightened_ = 0;  // how often the levels were begun again
  double radius_ = 8, ridge_ = 1e-9, tol_of_levels_ = level_tol;
  int64_t entries_ = 0;  // of the sparse plan, on all ranks
  bool prefer_factor_ = false;
  bool dense_plan_ = true;  // at the last step
};

}  // namespace

Outcome newton(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor, double* f,
               double* g) {
  return Newton(passes, problem, options, monitor).run(f, g);
}

}  // namespace kantor::transport
