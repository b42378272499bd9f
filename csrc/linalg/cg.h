// Preconditioned conjugate gradients for A x = b, A symmetric positive definite (Hestenes & Stiefel 1952; notation of
// Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., algorithm 9.1), for a batch of right-hand sides.
//
// The algorithm is this file: the scalar recurrences, shared by all backends, and the iteration over a `Space` that
// supplies the vector passes (cg_cpu.cpp, cg_cuda.cu). A system that has finished is latched: later passes leave it
// alone.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>

#include "core/all_reduce.h"
#include "core/exec.h"
#include "core/hd.h"
#include "linalg/operator.h"
#include "linalg/preconditioner.h"

namespace kantor {

// Values shared with python/kantor/linalg/cg.py.
enum class CgStatus : int32_t {
  running = 0,
  converged = 1,
  max_iterations = 2,
  negative_curvature = 3,
  singular = 4,
  stagnated = 5,
  breakdown = 6,
  interrupted = 7,
  stopped = 8,
  indefinite_preconditioner = 9,
  bad_scale = 10,
};

struct CgOptions {
  double rtol, atol;
  int64_t max_iterations;
  double epsilon;          // unit roundoff of the storage type
  int64_t history_length;  // residual norms kept per system; when full, every second one is dropped
  bool watched;            // the monitor wants to see every iteration, not just now and then
};

// One system's scalars. All doubles: the array is the op's `info` output, (batch, cg_state_size) float64.
struct CgState {
  double status, iterations, residual_norm, b_norm, curvature, history_stride, history_count, restarts;
  double target_squared, rr, rz, alpha, beta, lambda_max, verified_rr, verified, pmp;

  KANTOR_HD bool running() const { return status == double(CgStatus::running); }
  KANTOR_HD void finish(CgStatus s) { status = double(s); }
};
inline constexpr int64_t cg_state_size = sizeof(CgState) / sizeof(double);

// Residual norms of a whole run in a fixed number of slots: when they are full, every second one goes.
KANTOR_HD void cg_record(CgState& s, const CgOptions& options, double* history) {
  while (static_cast<int64_t>(s.iterations) % static_cast<int64_t>(s.history_stride) == 0) {
    const int64_t count = static_cast<int64_t>(s.history_count);
    if (count < options.history_length) {
      history[count] = std::sqrt(s.rr);
      s.history_count += 1;
      return;
    }
    for (int64_t i = 0; 2 * i < count; ++i) history[i] = history[2 * i];
    s.history_count = double((count + 1) / 2);
    s.history_stride *= 2;
  }
}

// What matters of max |b|, and can be summed over ranks: 0 for zero, 1 for finite, else not finite.
KANTOR_HD double cg_kind_of_size(double b_max) { return std::isfinite(b_max) ? double(b_max > 0) : b_max; }

// bb = b.b, b_size = cg_kind_of_size(max |b|), rr = r.r for the starting residual.
KANTOR_HD void cg_start(CgState& s, const CgOptions& options, double bb, double b_size, double rr, double* history) {
  s = CgState{};
  s.history_stride = 1;
  s.rr = rr;
  s.verified_rr = rr;
  s.residual_norm = std::sqrt(rr);
  s.b_norm = std::sqrt(bb);
  const double target = std::fmax(options.rtol * s.b_norm, options.atol);
  s.target_squared = target * target;
  // Outside this range squares, or the iterates in the storage type, under- or overflow: the caller rescales b.
  const bool single = options.epsilon > 1e-10;
  const bool representable = bb > (single ? 1e-40 : 1e-200) && bb < (single ? 1e60 : 1e280);
  if (!std::isfinite(b_size) || std::isnan(bb))
    s.finish(CgStatus::breakdown);
  else if (std::isfinite(rr) && options.atol * options.atol > 0 && rr <= options.atol * options.atol)
    s.finish(CgStatus::converged);  // however small b is
  else if ((b_size > 0 && !representable) || !std::isfinite(rr))
    s.finish(CgStatus::bad_scale);
  else if (rr <= s.target_squared)
    s.finish(CgStatus::converged);
  else if (options.max_iterations == 0)
    s.finish(CgStatus::max_iterations);
  cg_record(s, options, history);
}

// After z = M r with rz = r.z. Step 7: beta = rz_new / rz_old.
KANTOR_HD void cg_after_precondition(CgState& s, double rz) {
  if (!s.running()) return;
  if (!std::isfinite(rz)) return s.finish(CgStatus::breakdown);
  if (rz <= 0) return s.finish(CgStatus::indefinite_preconditioner);
  s.beta = s.rz > 0 ? rz / s.rz : 0;
  s.rz = rz;
  s.pmp = rz + s.beta * s.beta * s.pmp;  // p'M^-1 p, because r is orthogonal to the previous direction
}

// What rounding alone can make of p'Ap. A value within it has no sign: the curvature is zero to working precision. In
// the first iteration nothing is known about A, and the sign is taken as it is.
KANTOR_HD double cg_curvature_noise(const CgState& s, const CgOptions& options) {
  return 8 * options.epsilon * s.lambda_max * s.pmp;
}

// After q = A p with pq = p.q and qq = q.q, which is read only where pq is within rounding. Step 3: alpha = rz / pq.
KANTOR_HD void cg_after_apply(CgState& s, const CgOptions& options, double pq, double qq) {
  if (!s.running()) return;
  const double previous_alpha = s.alpha;
  s.alpha = 0;  // a latched system takes no step
  if (!std::isfinite(pq)) return s.finish(CgStatus::breakdown);
  s.curvature = pq;
  const double noise = cg_curvature_noise(s, options);
  if (pq < -noise) return s.finish(CgStatus::negative_curvature);
  if (pq <= 0) return s.finish(CgStatus::singular);
  const double alpha = s.rz / pq;
  // Diagonal of the Lanczos matrix: a lower bound of the largest eigenvalue of M A, for free.
  s.lambda_max = std::fmax(s.lambda_max, 1 / alpha + (previous_alpha > 0 ? s.beta / previous_alpha : 0));
  // Curvature zero to rounding AND a product that does not lie along p, without M |p| |q| > 4 p.q: q is rounding too, A
  // is singular and b not in its range. The size of the curvature alone proves nothing: a badly scaled but solvable
  // system has tiny ones too, but then p is an eigenvector.
  if (pq <= noise && alpha * alpha * qq * s.pmp > 16 * s.rz * s.rr) return s.finish(CgStatus::singular);
  s.alpha = alpha;
}

// After x += alpha p, r -= alpha q with rr = r.r. Steps 4-6.
KANTOR_HD void cg_after_update(CgState& s, const CgOptions& options, double rr, double* history) {
  if (!s.running()) return;
  s.iterations += 1;
  s.rr = rr;
  // Without a tolerance the recurrence goes on far below rounding. It ends before the products of its vectors
  // underflow.
  const double vanished = options.epsilon > 1e-10 ? 1e-70 : 1e-290;
  if (!std::isfinite(rr))
    s.finish(CgStatus::breakdown);
  else if (rr <= std::fmax(s.target_squared, vanished))
    s.finish(CgStatus::converged);
  else if (s.iterations >= double(options.max_iterations))
    s.finish(CgStatus::max_iterations);
  cg_record(s, options, history);
}

// After the true residual r = b - A x was formed in double (rr = r.r) for a system that has stopped; pp = p.p. A
// recurrence that claims convergence too early is replaced by the true residual and goes on (van der Vorst & Ye 2000);
// when a whole leg did not halve the true residual, rounding has the last word.
KANTOR_HD void cg_after_verify(CgState& s, const CgOptions& options, double rr, double pp) {
  s.residual_norm = std::sqrt(rr);
  const bool no_step = s.status == double(CgStatus::negative_curvature) || s.status == double(CgStatus::singular);
  s.curvature = no_step && pp > 0 ? s.curvature / pp : 0;
  if (rr <= s.target_squared && s.status == double(CgStatus::max_iterations)) s.finish(CgStatus::converged);
  if (s.status != double(CgStatus::converged) || rr <= s.target_squared) return;
  if (s.iterations >= double(options.max_iterations)) return s.finish(CgStatus::max_iterations);
  if (s.restarts > 0 && rr > 0.25 * s.verified_rr) return s.finish(CgStatus::stagnated);
  s.restarts += 1;
  s.verified_rr = rr;
  s.rr = rr;
  if (rr > 4 * s.target_squared) s.rz = 0;  // far off: conjugacy to the old directions is lost, start afresh
  s.finish(CgStatus::running);
}

// Called between iterations with the number of the iteration and the largest residual norm. Returns running to go on,
// or the status (interrupted, stopped) that ends every running system.
using CgMonitor = std::function<CgStatus(int64_t iteration, double residual_norm)>;

// Thrown by a callback that Ctrl-C broke off. Leaves conjugate_gradients only when there is no iterate yet, or at the
// second.
struct CgInterrupted {};

template <class Space>
void conjugate_gradients(Space& space, const CgMonitor& monitor) {
  space.start();  // r = b - A x, b.b, r.r
  int64_t iteration = 0;
  while (space.any_running()) {
    try {
      do {
        space.precondition();         // z = M r, r.z                             -> beta
        space.direction_and_apply();  // p = z + beta p, q = A p, p.q             -> alpha, or negative curvature
        space.update();               // x += alpha p, r -= alpha q, r.r          -> converged?
      } while (space.proceed(++iteration, monitor));
    } catch (const CgInterrupted&) { space.finish_running(CgStatus::interrupted); }
    try {
      space.verify();                 // r = b - A x of the systems that stopped; those that drifted run again
    } catch (const CgInterrupted&) {  // x stands; only its residual is missing
      space.finish_running(CgStatus::interrupted);
      space.verify();
    }
  }
}

// All vectors are (batch, n), contiguous. q and z are scratch, z may alias r when there is no preconditioner. On return
// p holds the last direction (of negative or zero curvature, when that was the status) and r the true residual.
template <class T>
struct CgVectors {
  int64_t n, batch;
  const T* b;
  T *x, *r, *p, *q, *z;
  bool zero_start;  // x is zero: r = b without a product
  CgState* states;  // (batch)
  double* history;  // (batch, history_length)
  void* workspace;  // CUDA only: cg_workspace_bytes(batch) of device memory
};

// The product as a call back into Python: q = A x when `to_x`, else q = A p.
using ApplyCallback = std::function<void(bool to_x)>;

// A null operator means the callback. With `all_reduce` each rank has its rows of all vectors, and its own number of
// them; `sums` there holds 4 batch + rank_wishes numbers.
template <class T>
void cg_cpu(const Exec& exec, const Operator<T>* A, const ApplyCallback& apply, const Preconditioner<T>& M,
            const CgVectors<T>& v, const CgOptions& options, const CgMonitor& monitor,
            const AllReduce& all_reduce = {});
template <class T>
void cg_cuda(const Exec& exec, const Operator<T>* A, const ApplyCallback& apply, const Preconditioner<T>& M,
             const CgVectors<T>& v, const CgOptions& options, const CgMonitor& monitor,
             const AllReduce& all_reduce = {});
int64_t cg_workspace_bytes(int64_t batch);

}  // namespace kantor
