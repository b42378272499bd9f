// Conjugate gradients for (A + shift_s I) x_s = b, all shifts with one sequence of products (Jegerlehner,
// hep-lat/9612014): the residuals of all shifts are parallel, r_s = zeta_s r, where r is that of the seed, the
// smallest.
//
// As in cg.h the scalar recurrences are here, shared by all backends, and the iteration over a `Space` that supplies
// the passes (multishift_cg_cpu.cpp, multishift_cg_cuda.cu).
#pragma once
#include <cmath>
#include <cstdint>
#include <functional>

#include "core/exec.h"
#include "core/hd.h"
#include "linalg/capped_cg.h"
#include "linalg/cg.h"
#include "linalg/operator.h"

namespace kantor {

// The seed's scalars; the array is (multishift_state_size) float64. Python reads and writes the first ones.
struct MultishiftState {
  double shift, target, max_iterations;  // settings: the smallest shift, bound on the residuals
  double status, iterations;             // CgStatus
  double rr, alpha, beta, alpha_before, beta_before;

  KANTOR_HD bool running() const { return status == double(CgStatus::running); }
  KANTOR_HD void finish(CgStatus s) { status = double(s); }
};
inline constexpr int64_t multishift_state_size = sizeof(MultishiftState) / sizeof(double);

// One array for each scalar of the shifts, (multishift_scalars, count) float64.
struct ShiftScalars {
  int64_t count;
  double *delta, *residual, *done;  // shift minus seed; zeta |r|; 0 runs, 1 takes its last step, 2 has converged
  double *zeta, *zeta_before, *a, *b;

  KANTOR_HD static ShiftScalars of(double* table, int64_t count) {
    return {count,
            table,
            table + count,
            table + 2 * count,
            table + 3 * count,
            table + 4 * count,
            table + 5 * count,
            table + 6 * count};
  }
};
inline constexpr int64_t multishift_scalars = 7;

KANTOR_HD void multishift_start(MultishiftState& s, const ShiftScalars& shifts, double rr) {
  s.status = s.iterations = s.beta_before = 0;
  s.rr = rr;
  s.alpha_before = 1;
  bool all = true;
  for (int64_t k = 0; k < shifts.count; ++k) {
    shifts.zeta[k] = shifts.zeta_before[k] = 1;
    shifts.residual[k] = std::sqrt(rr);
    shifts.done[k] = shifts.residual[k] <= s.target ? 2 : 0;
    all = all && shifts.done[k] > 0;
  }
  if (!std::isfinite(rr))
    s.finish(CgStatus::breakdown);
  else if (all)
    s.finish(CgStatus::converged);
  else if (s.max_iterations <= 0)
    s.finish(CgStatus::max_iterations);
}

// After q = (A + shift I) p with pq = p.q.
KANTOR_HD void multishift_after_product(MultishiftState& s, double pq) {
  if (!s.running()) return;
  if (!std::isfinite(pq)) return s.finish(CgStatus::breakdown);
  if (pq <= 0) return s.finish(CgStatus::negative_curvature);
  s.alpha = s.rr / pq;
}

// After r -= alpha q. Jegerlehner, (2.42) to (2.44), for x += alpha p, p = r + beta p.
KANTOR_HD void multishift_after_update(MultishiftState& s, const ShiftScalars& shifts, double rr) {
  if (!s.running()) return;
  s.iterations += 1;
  if (!std::isfinite(rr)) return s.finish(CgStatus::breakdown);
  s.beta = rr / s.rr;
  bool all = true;
  for (int64_t k = 0; k < shifts.count; ++k) {
    if (shifts.done[k] == 1) shifts.done[k] = 2;
    if (shifts.done[k] == 2) continue;
    const double zeta = shifts.zeta[k], before = shifts.zeta_before[k];
    const double next =
        zeta * before * s.alpha_before /
        (s.alpha_before * before * (1 + s.alpha * shifts.delta[k]) + s.alpha * s.beta_before * (before - zeta));
    const double ratio = next / zeta;
    shifts.a[k] = s.alpha * ratio;
    shifts.b[k] = s.beta * ratio * ratio;
    shifts.zeta_before[k] = zeta;
    shifts.zeta[k] = next;
    shifts.residual[k] = std::fabs(next) * std::sqrt(rr);
    if (shifts.residual[k] <= s.target) shifts.done[k] = 1;
    all = all && shifts.done[k] > 0;
  }
  s.alpha_before = s.alpha, s.beta_before = s.beta, s.rr = rr;
  if (all)
    s.finish(CgStatus::converged);
  else if (s.iterations >= s.max_iterations)
    s.finish(CgStatus::max_iterations);
}

template <class Space>
void multishift_conjugate_gradients(Space& space, const CgMonitor& monitor) {
  try {
    space.start();  // r = p = p_s = b, x_s = 0
    int64_t iteration = 0;
    while (space.any_running(iteration)) {
      space.product();                // q = (A + shift I) p, p.q               -> alpha, or negative curvature
      space.update();                 // r -= alpha q, r.r                      -> beta; a, b, zeta of every shift
      space.directions(++iteration);  // x_s += a p_s, p_s = zeta r + b p_s, p = r + beta p
      if (monitor(iteration, 0) != CgStatus::running) space.interrupt();
    }
  } catch (const CgInterrupted&) { space.interrupt(); }
}

template <class T>
struct MultishiftVectors {
  int64_t n;
  const T* b;
  T *r, *p, *q;
  T *x, *directions;  // (count, n)
  MultishiftState* state;
  ShiftScalars shifts;
  void* workspace;  // CUDA only: multishift_workspace_bytes() of device memory
  int64_t check_every;
};

// A null operator means the callback, which gets p.
template <class T>
void multishift_cg_cpu(const Exec& exec, const Operator<T>* A, const ProductCallback<T>& product,
                       const MultishiftVectors<T>& v, const CgMonitor& monitor);
template <class T>
void multishift_cg_cuda(const Exec& exec, const Operator<T>* A, const ProductCallback<T>& product,
                        const MultishiftVectors<T>& v, const CgMonitor& monitor);
int64_t multishift_workspace_bytes();

}  // namespace kantor
