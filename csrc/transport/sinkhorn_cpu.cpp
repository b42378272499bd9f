// Sinkhorn's iteration in the log domain (method "sinkhorn"). Both half-steps are one sweep over the plan (passes.h).
// Over-relaxation after Thibault, Chizat, Dossal and Papadakis (2021): with t the rate of the plain iteration, both
// half-steps lengthened by w = 2 / (1 + sqrt(1 - t)) converge at the rate w - 1. t is measured; where the error does
// not fall as promised the iteration goes back to w = 1 and measures again.
#include <algorithm>
#include <cmath>

#include "transport/algorithm.h"
#include "transport/dual.h"

namespace kantor::transport {
namespace {

constexpr int measured = 20;  // plain sweeps before a rate is believed

class Sinkhorn {
 public:
  Sinkhorn(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor)
      : passes_(passes), problem_(problem), options_(options), progress_(outcome_, monitor) {
    hard_ = std::isinf(problem.rho_a) && std::isinf(problem.rho_b);
  }

  Outcome run(double* f, double* g) {
    Dual dual(passes_, problem_, outcome_);
    double eps = problem_.eps;
    if (options_.scaling) eps = std::max(eps, 0.1 * (problem_.cost_high - problem_.cost_low));
    std::vector<double> start(g, g + passes_.m);
    Dual::Point p;
    try {
      for (;;) {
        dual.set_eps(eps);
        const bool last = last_level(dual);
        const bool cold = std::all_of(start.begin(), start.end(), [](double value) { return value == 0; });
        p = dual.at(cold ? dual.cold_start() : std::move(start));
        outcome_.status = level(dual, p, last ? options_.tol : 0.05);
        if (last || (outcome_.status != Status::converged && outcome_.status != Status::stalled)) break;
        start = std::move(p.g);
        eps = eps * 0.5 < problem_.eps * 1.2 ? problem_.eps : eps * 0.5;
      }
      if (!last_level(dual)) {
        dual.set_eps(problem_.eps);
        p = dual.at(std::move(p.g));
      }
    } catch (const Interrupted& reason) {
      outcome_.status = reason.by_callback ? Status::stopped : Status::interrupted;
    }
    if (!p.g.empty()) {
      std::copy(p.f.begin(), p.f.end(), f);
      std::copy(p.g.begin(), p.g.end(), g);
    }
    if (!p.column_sums.empty()) outcome_.error = p.error;
    outcome_.dual = p.value;
    return outcome_;
  }

 private:
  bool last_level(const Dual& dual) const { return dual.eps() <= problem_.eps; }

  // Ends with the point of least error.
  Status level(Dual& dual, Dual::Point& p, double tol) {
    least_ = p;
    const Status status = sweep_until(dual, p, tol);
    if (status != Status::converged && (least_.error < p.error || !p.finite)) p = least_;
    return status;
  }

  Status sweep_until(Dual& dual, Dual::Point& p, double tol) {
    // An error below it may be all that the digits of (f + g - C) / eps allow.
    const double rounding = 2e-15 * std::max(std::abs(problem_.cost_high), std::abs(problem_.cost_low)) / dual.eps();
    int64_t since_least = 0;
    std::vector<double> errors;
    double relaxation = options_.relaxation > 0 && hard_ ? options_.relaxation : 1;
    int plain = 0, relaxed = 0;  // sweeps since the last change of the relaxation
    double best = p.error;
    int64_t since_best = 0;
    const auto relax = [&](double by) {  // errors of different relaxations are not compared
      relaxation = by;
      plain = relaxed = 0;
      best = p.error;
      since_best = 0;
    };
    Dual::Point begun_at;  // where the relaxation was raised
    double courage = 1;    // what is left of the best relaxation after it failed
    for (;;) {
      if (!p.finite) return Status::overflow;
      if (p.error <= tol && relaxation != 1) {  // rows or columns should be exact, not both nearly
        p = dual.at(std::move(p.g));
        if (p.error > tol) relax(1);
      }
      if (p.error <= tol) return Status::converged;
      if (relaxation == 1 && proves_infeasible(problem_, p.value)) return Status::infeasible;
      if (static_cast<int64_t>(outcome_.history.size()) >= options_.max_iter) return Status::max_iter;
      if (p.error < least_.error) {
        least_ = p;
        since_least = 0;
      } else if (++since_least > 100 && p.error < rounding) {
        return Status::stalled;
      }
      if (p.error < best) {
        best = p.error;
        since_best = 0;
      } else if (++since_best > (p.error < 1e-12 ? 10 : 1000)) {
        return Status::stalled;
      }
      std::vector<double> g = dual.sinkhorn_step(p, relaxation);
      p = relaxation == 1 ? dual.at(std::move(g)) : dual.relaxed_at(std::move(g), p.f, relaxation);
      errors.push_back(p.error);
      const Status answer = progress_.note(dual.eps(), p.error, Step::sinkhorn);
      if (answer != Status::running) return answer;
      if (!hard_ || options_.relaxation > 0) continue;

      // What follows only chooses the relaxation.
      const size_t k = errors.size();
      if (relaxation > 1 && !(p.error < 1e3 * begun_at.error)) {  // it does not converge from here: take it back
        courage *= 0.7;
        p = begun_at;
        relax(1);
        continue;
      }
      if (relaxation == 1) {
        if (++plain < measured) continue;
        const double late = errors[k - 1] / errors[k - 6], early = errors[k - 6] / errors[k - 11];
        const bool steady = late > 0 && late < 1 && std::abs(std::log(late) - std::log(early)) < 0.1 * -std::log(late);
        if (!steady && plain < 10 * measured) continue;
        const double rate = std::clamp(std::pow(late, 0.2), 0.0, 0.99999);
        if (rate > 0.3) {
          relax(1 + courage * (2 / (1 + std::sqrt(1 - rate)) - 1));
          begun_at = p;
        }
        plain = 0;
      } else {
        // The error first rises, for a time that grows like 1 / (2 - w), before it falls.
        const int window = 10 + static_cast<int>(2 / (2 - relaxation));
        if (++relaxed < 4 * window || relaxed % window != 0) continue;
        const double promised = std::pow(relaxation - 1, window), seen = errors[k - 1] / errors[k - 1 - window];
        if (seen > std::sqrt(promised)) {
          p = dual.at(std::move(p.g));
          relax(1);
        }
      }
    }
  }

  Passes& passes_;
  const Problem& problem_;
  const Options& options_;
  Outcome outcome_;
  Progress progress_;
  bool hard_ = true;
  Dual::Point least_;
};

}  // namespace

Outcome sinkhorn(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor, double* f,
                 double* g) {
  return Sinkhorn(passes, problem, options, monitor).run(f, g);
}

}  // namespace kantor::transport
