// Flexible conjugate gradients for A x = b, A symmetric positive definite: any map f from residuals to directions, with
// an exact line search. Notay, SIAM J. Sci. Comput. 22 (2000), algorithm FCG(m); with f a network that is fed r / |r|,
// the deep conjugate direction method of Kaneda et al., ICML 2023, algorithm 1.
//
//     repeat
//   1   q = f(r)                                       or f(r / |r|)
//   2   p = q - sum_j (q.Ap_j / p_j.Ap_j) p_j          over the newest directions that are kept
//   3   beta = p.r / p.Ap
//   4   x = x + beta p,   r = r - beta Ap              |error|_A^2 falls by (p.r)^2 / p.Ap, whatever f returned
//
// The sum of step 2 is classical Gram-Schmidt: all q.Ap_j in one pass. The directions that are kept are A-orthogonal to
// each other, so it is the sequential form but for rounding. Where little is left of q (below a tenth of it, in the
// norm of A), a second sum takes out what rounding left in; A p is corrected along, without a product.
//
// A direction that cannot be used costs its round; the next one takes the fallback's direction and an empty history.
// One that can, but gains less than a tenth of what steepest descent is sure of (|r|^2 / |A|) and does not halve the
// residual, is slow; after `patience` slow steps the fallback makes one. When f was found wanting `patience` times
// without a good step between, or when the residual did not halve for `stall_after` iterations, it is given up:
// conjugate gradients go on, preconditioned by the fallback.
#pragma once
#include <functional>

#include "linalg/cg.h"

namespace kantor {

// Whose direction a system takes in the next round.
enum class DirectionSource : int32_t { map = 0, fallback = 1, fallback_for_good = 2 };

// Why a direction cannot be used. Values shared with python/kantor/linalg/flexible_cg.py.
enum class Rejection : int32_t {
  none = 0,
  not_finite = 1,
  zero = 2,
  dependent = 3,     // a combination of the directions kept: nothing but rounding is left
  orthogonal = 4,    // to the residual
  no_curvature = 5,  // p.Ap is not positive
  slow = 6,          // too many steps that gained next to nothing
  stalled = 7,       // the residual did not halve for too long
};

struct FlexibleOptions {
  CgOptions cg;
  int64_t slots;          // places for directions: one for the new one, the others are the history
  int64_t window;         // how many of the history step 2 uses, at most slots - 1
  bool notay;             // max(1, i mod (window + 1)) of them in iteration i, else all
  bool normalised;        // f gets r / |r|
  int64_t refresh_every;  // rounds between two true residuals; 0: only at the end
  int64_t patience;       // with f: slow steps, and times that it was found wanting
  int64_t stall_after;    // iterations without halving the residual after which f is given up; 0: never
};

// One system's scalars; (batch, flexible_state_size) float64. The first columns are those of cg.
struct FlexibleState {
  CgState cg;  // lambda_max: the largest |Ap| / |p|
  double fallbacks, rejection, given_up_at, source;
  double wanting;             // times that f was found wanting since its last good step
  double slow_steps, slow;    // since then, or since the fallback stepped in; whether this step may be one
  double kept;                // directions in the history
  double age;                 // iterations since the history was empty
  double scale, size;         // of q: the power of two that brings its length to one, what step 2 added up
  double removed;             // sum_j of step 2 in the norm of A, squared
  double target_squared;      // of the true residual; the recurrence's, in `cg`, may be lower
  double milestone;           // the residual when it had last halved, squared
  double milestone_at;        // and the iteration
  double p_squared, step;     // p.p and beta
  double skips, again;        // no (further) step in this round; step 2 is to be repeated
  double stopped_in, stalls;  // round in which curvature ended it; true residuals in a row that rounding holds up

  KANTOR_HD bool running() const { return cg.running(); }
  KANTOR_HD bool takes(bool from_map) const { return running() && (source == 0) == from_map; }
  KANTOR_HD bool searches() const { return running() && skips == 0; }
  KANTOR_HD bool repeats() const { return searches() && again != 0; }
  KANTOR_HD bool stopped_by_curvature(int64_t round) const { return stopped_in == double(round); }
};
inline constexpr int64_t flexible_state_size = sizeof(FlexibleState) / sizeof(double);

// What is known of one direction: p.Ap and p.p; and q.Ap of step 2, then its coefficient.
struct DirectionScalars {
  double curvature, square, coefficient;
};
inline constexpr int64_t direction_scalars = sizeof(DirectionScalars) / sizeof(double);

// Directions lie in a ring: that of round i in slot i mod slots, the one `age` rounds older before it.
KANTOR_HD int64_t slot_of(const FlexibleOptions& options, int64_t round, int64_t age = 0) {
  return (round - age + options.slots) % options.slots;
}

// How many of the history step 2 uses.
KANTOR_HD int64_t flexible_used(const FlexibleState& s, const FlexibleOptions& options) {
  const int64_t kept = static_cast<int64_t>(s.kept);
  if (s.source == double(DirectionSource::fallback_for_good)) return kept < 1 ? kept : 1;
  int64_t most = options.window;
  if (options.notay && most > 1) {
    const int64_t turn = static_cast<int64_t>(s.age) % (options.window + 1);
    most = turn > 1 ? turn : 1;
  }
  return kept < most ? kept : most;
}

KANTOR_HD void flexible_start(FlexibleState& s, const FlexibleOptions& options, double bb, double b_max, double rr,
                              double* history) {
  s = FlexibleState{};
  s.given_up_at = s.stopped_in = -1;
  cg_start(s.cg, options.cg, bb, b_max, rr, history);
  s.target_squared = s.cg.target_squared;
  s.milestone = rr;
  s.cg.verified_rr = DBL_MAX;
  if (options.patience == 0) s.source = double(DirectionSource::fallback_for_good);
}

KANTOR_HD void flexible_finish(FlexibleState& s, CgStatus status, int64_t round) {
  s.cg.finish(status);
  if (status == CgStatus::negative_curvature || status == CgStatus::singular) s.stopped_in = double(round);
}

// The next direction is the fallback's, and perhaps all that follow.
KANTOR_HD void flexible_fall_back(FlexibleState& s, const FlexibleOptions& options, Rejection why) {
  s.rejection = double(why);
  s.fallbacks += 1;
  s.wanting += 1;
  s.slow_steps = 0;
  s.source = double(DirectionSource::fallback);
  if (s.wanting < double(options.patience) && why != Rejection::stalled) return;
  s.source = double(DirectionSource::fallback_for_good);
  s.given_up_at = s.cg.iterations;
}

// No step in this round. What f did wrong the fallback puts right; its own failures end the iteration.
KANTOR_HD void flexible_reject(FlexibleState& s, const FlexibleOptions& options, Rejection why) {
  s.skips = 1;
  if (s.source != double(DirectionSource::map)) {
    if (s.kept > 0)
      s.kept = s.age = 0;  // once more, without history
    else
      s.cg.finish(why == Rejection::not_finite ? CgStatus::breakdown : CgStatus::indefinite_preconditioner);
    return;
  }
  s.kept = s.age = 0;
  flexible_fall_back(s, options, why);
}

// After q and the q.Ap_j, left in the coefficients; qq = q.q. Step 2: the coefficients.
KANTOR_HD void flexible_after_project(FlexibleState& s, const FlexibleOptions& options, DirectionScalars* directions,
                                      int64_t round, double qq) {
  if (!s.running()) return;
  s.skips = s.again = 0;
  if (!std::isfinite(qq)) return flexible_reject(s, options, Rejection::not_finite);
  if (qq < 1e-290) return flexible_reject(s, options, Rejection::zero);
  const double length = std::sqrt(qq);
  const int most = options.cg.epsilon > 1e-10 ? 120 : 480;
  const int exponent = -std::ilogb(length);
  s.scale = std::ldexp(1.0, exponent > most ? most : exponent < -most ? -most : exponent);
  s.size = s.scale * length;
  s.removed = 0;
  const int64_t used = flexible_used(s, options);
  for (int64_t age = 1; age <= used; ++age) {
    DirectionScalars& d = directions[slot_of(options, round, age)];
    d.coefficient = s.scale * (d.coefficient / d.curvature);
    s.size += std::fabs(d.coefficient) * std::sqrt(d.square);
    s.removed += d.coefficient * d.coefficient * d.curvature;
  }
  if (!std::isfinite(s.size) || !std::isfinite(s.removed)) flexible_reject(s, options, Rejection::not_finite);
}

// After p.Ap, p.r, p.p and Ap.Ap. Step 3, and whether p can be used.
KANTOR_HD void flexible_after_product(FlexibleState& s, const FlexibleOptions& options, DirectionScalars* directions,
                                      int64_t round, double curvature, double pr, double pp, double product_squared) {
  if (!s.searches()) return;
  const bool repeated = s.again != 0;
  const bool from_map = s.source == double(DirectionSource::map);
  s.again = 0;
  if (!std::isfinite(curvature) || !std::isfinite(pr) || !std::isfinite(pp))
    return flexible_reject(s, options, Rejection::not_finite);
  const double rounding = 8 * options.cg.epsilon * s.size;
  if (pp <= rounding * rounding) return flexible_reject(s, options, Rejection::dependent);
  // Once only: twice is enough.
  if (!repeated && s.removed > 0 && curvature < 0.01 * s.removed) {
    s.again = 1;
    return;
  }
  // As in cg.h: within rounding a curvature has no sign, unless the product lies along p.
  const double noise = 8 * options.cg.epsilon * s.cg.lambda_max * pp;
  const bool vanishes = curvature <= noise && product_squared * pp > 16 * curvature * curvature;
  s.cg.curvature = curvature;
  s.p_squared = pp;
  if (from_map) {
    const double useless = options.cg.epsilon > 1e-12 ? options.cg.epsilon : 1e-12;
    if (!(curvature > 0) || vanishes) return flexible_reject(s, options, Rejection::no_curvature);
    if (std::fabs(pr) < useless * std::sqrt(pp) * std::sqrt(s.cg.rr))
      return flexible_reject(s, options, Rejection::orthogonal);
  } else {
    if (curvature < -noise) return flexible_finish(s, CgStatus::negative_curvature, round);
    if (curvature <= 0 || vanishes) return flexible_finish(s, CgStatus::singular, round);
    if (!(pr > 0)) return flexible_reject(s, options, Rejection::orthogonal);
  }
  if (std::isfinite(product_squared)) s.cg.lambda_max = std::fmax(s.cg.lambda_max, std::sqrt(product_squared / pp));
  DirectionScalars& d = directions[slot_of(options, round)];
  d.curvature = curvature;
  d.square = pp;
  s.step = pr / curvature;
  s.slow = s.step * pr * s.cg.lambda_max < 0.1 * s.cg.rr;
}

// Where step 2 is to be repeated, after the p.Ap_j, left in the coefficients.
KANTOR_HD void flexible_after_second_project(FlexibleState& s, const FlexibleOptions& options,
                                             DirectionScalars* directions, int64_t round) {
  if (!s.repeats()) return;
  const int64_t used = flexible_used(s, options);
  for (int64_t age = 1; age <= used; ++age) {
    DirectionScalars& d = directions[slot_of(options, round, age)];
    d.coefficient /= d.curvature;
  }
}

// After step 4, with rr = r.r.
KANTOR_HD void flexible_after_update(FlexibleState& s, const FlexibleOptions& options, double rr, double* history) {
  if (!s.searches()) return;
  const bool slow = s.slow != 0 && rr > 0.25 * s.cg.rr;
  cg_after_update(s.cg, options.cg, rr, history);
  if (s.kept < double(options.slots - 1)) s.kept += 1;
  s.age += 1;
  if (rr < 0.25 * s.milestone) s.milestone = rr, s.milestone_at = s.cg.iterations;
  if (s.source == double(DirectionSource::fallback)) {
    s.source = double(DirectionSource::map);
  } else if (s.source == double(DirectionSource::map)) {
    if (!slow) s.wanting = s.slow_steps = 0;
    if (slow) s.slow_steps += 1;
    if (options.stall_after > 0 && s.cg.iterations - s.milestone_at >= double(options.stall_after))
      flexible_fall_back(s, options, Rejection::stalled);
    else if (s.slow_steps >= double(options.patience))
      flexible_fall_back(s, options, Rejection::slow);
  }
}

// After the true residual took the place of the recurrence's in the middle of the iteration. One that stays where it
// is, while the recurrence's falls, has reached the level of rounding.
KANTOR_HD void flexible_after_refresh(FlexibleState& s, double rr) {
  if (!s.running()) return;
  const bool held_up = s.cg.target_squared > 0 && rr > 4 * s.cg.rr && rr > 0.25 * s.cg.verified_rr;
  s.stalls = held_up ? s.stalls + 1 : 0;
  s.cg.verified_rr = std::fmin(s.cg.verified_rr, rr);
  s.cg.rr = rr;
  if (!std::isfinite(rr))
    s.cg.finish(CgStatus::breakdown);
  else if (rr <= s.target_squared)
    s.cg.finish(CgStatus::converged);
  else if (s.stalls >= 2)
    s.cg.finish(CgStatus::stagnated);
}

// After the true residual of a system that stopped. One that runs on starts a new history, since its slots are out of
// step, and has to bring the recurrence down to half of what it claimed: a slow method would claim again at once.
KANTOR_HD void flexible_after_verify(FlexibleState& s, const FlexibleOptions& options, double rr) {
  const double claimed = s.cg.target_squared;
  s.cg.target_squared = s.target_squared;
  cg_after_verify(s.cg, options.cg, rr, s.p_squared);
  s.cg.target_squared = 0.25 * claimed;
  s.kept = s.age = 0;
  s.cg.verified = s.running() ? 0 : 1;
}

template <class Space>
void flexible_conjugate_gradients(Space& space, const CgMonitor& monitor) {
  space.start();  // r = b - A x, b.b, r.r
  int64_t round = 0;
  while (space.any_running()) {
    try {
      do {
        space.direction(round);                // q = f(r / |r|), or M r of the fallback
        space.project(round);                  // q.q, all q.Ap_j
        space.orthogonalise_and_apply(round);  // p = q - sum, A p; p.Ap, p.r, p.p, Ap.Ap       -> beta, or rejected
        space.orthogonalise_again(round);      // where rounding made too much of p
        space.update(round);                   // x += beta p, r -= beta Ap, r.r                -> converged?
        space.refresh(round);                  // r = b - A x now and then
      } while (space.proceed(++round, monitor));
    } catch (const CgInterrupted&) { space.finish_running(CgStatus::interrupted); }
    try {
      space.verify(round);
    } catch (const CgInterrupted&) {  // x stands; only its residual is missing
      space.finish_running(CgStatus::interrupted);
      space.verify(round);
    }
  }
}

// All vectors are (batch, n), contiguous.
template <class T>
struct FlexibleVectors {
  int64_t n, batch;
  const T* b;
  T *x, *r;
  T* ring;       // (slots, 2, batch, n): every p and its Ap
  T* direction;  // of negative or zero curvature, when that was the status
  bool zero_start;
  FlexibleState* states;         // (batch)
  DirectionScalars* directions;  // (batch, slots)
  double* history;               // (batch, history_length)
  void* workspace;               // CUDA only: flexible_workspace_bytes(batch) of device memory

  KANTOR_HD T* p(int64_t slot, int64_t k) const { return ring + (2 * slot * batch + k) * n; }
  KANTOR_HD T* q(int64_t slot, int64_t k) const { return ring + ((2 * slot + 1) * batch + k) * n; }
};

// Calls back into Python with the number of a slot. The product with p (or x, when `of_x`) is left in its second half;
// f reads its input there and leaves the direction in the first half; the fallback reads r and writes the second half.
using SlotProduct = std::function<void(bool of_x, int64_t slot)>;
using SlotCallback = std::function<void(int64_t slot)>;

// Where directions come from: Python code when `callback` is set, else a native form.
template <class T>
struct DirectionMap {
  Preconditioner<T> native;
  SlotCallback callback;
};

// A null operator means the product by Python code.
template <class T>
void flexible_cg_cpu(const Exec& exec, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                     const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options,
                     const CgMonitor& monitor);
template <class T>
void flexible_cg_cuda(const Exec& exec, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                      const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options,
                      const CgMonitor& monitor);
int64_t flexible_workspace_bytes(int64_t batch);

}  // namespace kantor
