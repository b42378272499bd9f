// Capped conjugate gradients for (H + 2 eps I) d = -g with H symmetric but of any definiteness: a solution, or proof of
// curvature below -eps (Royer, O'Neill & Wright, Math. Prog. 180, 2020, algorithm 1: "RON"), for a batch of systems.
//
// The algorithm is this file, as in cg.h: the scalar recurrences, shared by all backends, and the iteration over a
// `Space` that supplies the passes (capped_cg_cpu.cpp, capped_cg_cuda.cu). Beside y, r and p the products Hy, Hp are
// carried along by the same recurrences; the one product of an iteration is Hz, z = r or its preconditioned form, so
// that every quantity of the tests comes from two fused passes. Hb stands for H + 2 eps I.
#pragma once
#include <cmath>
#include <cstdint>
#include <functional>

#include "core/exec.h"
#include "core/hd.h"
#include "linalg/cg.h"
#include "linalg/operator.h"
#include "linalg/preconditioner.h"

namespace kantor {

// Values shared with python/kantor/linalg/capped_cg.py.
enum class CappedStatus : int32_t {
  running = 0,
  solution = 1,            // y
  negative_curvature = 2,  // y or p
  max_iterations = 3,      // y
  breakdown = 4,           // NaN or infinity
  interrupted = 5,
  suspect = 6,  // test 4: y+ - y_i seems to have negative curvature; the caller looks at it
  indefinite_preconditioner = 7,
};

// When |r| is small enough.
enum class CappedRule : int32_t {
  residual = 0,   // |r| <= zeta / (3 kappa) |g|          RON; kappa grows with the estimate of |H|
  step = 1,       // |r| <= eps zeta / 2 |y|              the property that RON's theory uses
  truncated = 2,  // |r| <= min(1/2, sqrt|g|) |g|         superlinear locally, no complexity bound
};

struct CappedOptions {
  CappedRule rule;
  int64_t capacity;  // of the arrays of test 4; beyond it the test is off
  bool preconditioned;
};

// One system's scalars, all doubles: the array is (batch, capped_state_size) float64. The first ones are read and
// written by Python.
struct CappedState {
  // Settings: eps, zeta, bound on |r|, limit of iterations, estimate of |H|; the last one is for tests of test 4.
  double damping, rtol, atol, limit, h_norm, log_T_shift;
  double status, iterations, products, residual_norm, curvature, along_p, suspect_index, test4_off;
  double gg, rr, rz, zz, yy, y_Hy, pp, p_Hp, alpha, beta;

  KANTOR_HD bool running() const { return status == double(CappedStatus::running); }
  KANTOR_HD void finish(CappedStatus s) { status = double(s); }
  // d'Hb d < eps |d|^2
  KANTOR_HD bool curves_down(double d_Hd, double dd) const { return d_Hd + 2 * damping * dd < damping * dd; }
  KANTOR_HD void finish_downward(double d_Hd, double dd, bool along) {
    curvature = d_Hd / dd;
    along_p = along;
    finish(CappedStatus::negative_curvature);
  }
  KANTOR_HD void finish_at_limit() {
    curvature = yy > 0 ? y_Hy / yy : 0;
    finish(CappedStatus::max_iterations);
  }
};
inline constexpr int64_t capped_state_size = sizeof(CappedState) / sizeof(double);

// alpha_k, rho_k = |r_k|^2 and scratch for two sums, k = 0..capacity-1, of one system.
struct CappedArrays {
  double *alpha, *rho, *suffix, *tail;
};

// Test 4 without stored iterates. With S_m = sum_{k=m..j} alpha_k rho_k, for y+ = y_j + alpha_j p_j and every i < j:
//   (y+ - y_i)' Hb (y+ - y_i) = S_i,   |y+ - y_i|^2 = S_i^2 sum_{l<i} 1 / rho_l + sum_{l=i..j} S_l^2 / rho_l
// because p_k = -rho_k sum_{l<=k} r_l / rho_l with orthogonal residuals. The smallest ratio of the two, and its i.
KANTOR_HD double capped_scan(const CappedArrays& arrays, int64_t j, int64_t* index) {
  double S = 0, after = 0, before = 0, smallest = HUGE_VAL;
  for (int64_t m = j; m >= 0; --m) {  // only sums of positive terms: nothing cancels
    arrays.suffix[m] = S += arrays.alpha[m] * arrays.rho[m];
    arrays.tail[m] = after += S * (S / arrays.rho[m]);
  }
  *index = -1;
  for (int64_t i = 0; i < j; ++i) {
    const double S_i = arrays.suffix[i], ratio = S_i / (S_i * S_i * before + arrays.tail[i]);
    if (ratio < smallest) smallest = ratio, *index = i;
    before += 1 / arrays.rho[i];
  }
  return smallest;
}

// r = g was set: rr = |g|^2 and the sums of z.
KANTOR_HD void capped_start(CappedState& s, double rr) {
  s.status = s.iterations = s.products = s.curvature = s.along_p = s.suspect_index = s.test4_off = 0;
  s.yy = s.y_Hy = s.alpha = s.beta = s.rz = 0;
  s.gg = s.rr = s.zz = rr;
  s.residual_norm = std::sqrt(rr);
  if (!std::isfinite(rr))
    s.finish(CappedStatus::breakdown);
  else if (rr == 0)
    s.finish(CappedStatus::solution);  // d = 0: a system that is left out
}

// After z = M r: beta = rz_new / rz_old.
KANTOR_HD void capped_after_precondition(CappedState& s, double rz, double zz) {
  if (!s.running()) return;
  if (!std::isfinite(rz)) return s.finish(CappedStatus::breakdown);
  if (rz <= 0) return s.finish(CappedStatus::indefinite_preconditioner);
  s.beta = s.rz > 0 ? rz / s.rz : 0;
  s.rz = rz;
  s.zz = zz;
}

// Tests 1 and 2: RON's order. False when neither ended the system.
KANTOR_HD bool capped_test_iterate(CappedState& s, CappedRule rule) {
  if (s.curves_down(s.y_Hy, s.yy)) {
    s.finish_downward(s.y_Hy, s.yy, false);
    return true;
  }
  const double g_norm = std::sqrt(s.gg);
  double bound = 0;
  if (rule == CappedRule::residual)
    bound = s.rtol / (3 * ((s.h_norm + 2 * s.damping) / s.damping)) * g_norm;
  else if (rule == CappedRule::step)
    bound = 0.5 * s.damping * s.rtol * std::sqrt(s.yy);
  else
    bound = std::fmin(0.5, std::sqrt(g_norm)) * g_norm;
  if (s.rr > 0 && !(s.residual_norm <= bound && s.residual_norm < s.atol)) return false;
  s.curvature = s.y_Hy / s.yy;
  s.finish(CappedStatus::solution);
  return true;
}

// After y += alpha p, Hy += alpha Hp, r += alpha (Hp + 2 eps p). A rule that does not look at |H| is tested here,
// before the product that only the next iteration needs.
KANTOR_HD void capped_after_update(CappedState& s, const CappedOptions& options, double rr, double yy, double y_Hy,
                                   double Hy_Hy) {
  if (!s.running()) return;
  s.iterations += 1;
  s.rr = rr, s.yy = yy, s.y_Hy = y_Hy;
  s.residual_norm = std::sqrt(rr);
  if (!std::isfinite(rr) || !std::isfinite(yy) || !std::isfinite(y_Hy)) return s.finish(CappedStatus::breakdown);
  if (yy > 0) s.h_norm = std::fmax(s.h_norm, std::sqrt(Hy_Hy / yy));
  if (options.rule == CappedRule::residual && rr > 0) return;
  if (!capped_test_iterate(s, options.rule) && s.iterations >= s.limit) s.finish_at_limit();
}

// ln of sqrt(T) tau^(j/2), the fastest that |r| / |g| can stay above when Hb has no curvature below eps.
KANTOR_HD double capped_log_decay(const CappedState& s, int64_t j) {
  const double kappa = (s.h_norm + 2 * s.damping) / s.damping;
  const double log_tau = -std::log1p(1 / std::sqrt(kappa));
  const double log_T = std::log(4.0) + 4 * std::log(kappa) - 2 * std::log(-std::expm1(0.5 * log_tau));
  return 0.5 * (log_T + s.log_T_shift) + 0.5 * double(j) * log_tau;
}

// After p = -z + beta p, Hp = -Hz + beta Hp: the tests of iteration j, and alpha of the next update.
KANTOR_HD void capped_after_direction(CappedState& s, const CappedOptions& options, const CappedArrays& arrays,
                                      double pp, double p_Hp, double Hp_Hp, double Hz_Hz) {
  if (!s.running()) return;
  s.products += 1;
  s.pp = pp, s.p_Hp = p_Hp;
  if (!std::isfinite(p_Hp) || !std::isfinite(Hz_Hz)) return s.finish(CappedStatus::breakdown);
  if (pp > 0) s.h_norm = std::fmax(s.h_norm, std::sqrt(Hp_Hp / pp));
  if (s.zz > 0) s.h_norm = std::fmax(s.h_norm, std::sqrt(Hz_Hz / s.zz));
  const int64_t j = static_cast<int64_t>(s.iterations);
  if (j > 0 && options.rule == CappedRule::residual && capped_test_iterate(s, options.rule)) return;
  if (s.curves_down(p_Hp, pp)) return s.finish_downward(p_Hp, pp, true);  // test 3
  s.alpha = s.rz / (p_Hp + 2 * s.damping * pp);
  if (j < options.capacity) {
    arrays.alpha[j] = s.alpha;
    arrays.rho[j] = s.rr;
  }
  const bool test4 = !options.preconditioned && s.test4_off == 0 && j > 0 && j < options.capacity;
  if (test4 && 0.5 * std::log(s.rr / s.gg) > capped_log_decay(s, j)) {
    int64_t index = -1;
    if (capped_scan(arrays, j, &index) < s.damping) {
      s.suspect_index = double(index);
      return s.finish(CappedStatus::suspect);
    }
  }
  if (s.iterations >= s.limit) s.finish_at_limit();
}

template <class Space>
void capped_conjugate_gradients(Space& space, bool resume, const CgMonitor& monitor) {
  try {
    if (!resume) {
      space.start();         // y = Hy = 0, r = g
      space.precondition();  // z = M r, r.z, z.z
      space.direction();     // q = H z, p = -z, Hp = -q                            -> negative curvature along g?
    }
    int64_t iteration = 0;
    while (space.any_running(iteration)) {
      space.update();  // y += alpha p, Hy += alpha Hp, r += alpha (Hp + 2 eps p)   -> tests 1 and 2
      if (!space.any_running(iteration)) break;
      space.precondition();  // z = M r, r.z, z.z                                   -> beta
      space.direction();     // q = H z, p = -z + beta p, Hp = -q + beta Hp         -> tests 1 to 4, alpha
      space.watch(++iteration, monitor);
    }
  } catch (const CgInterrupted&) { space.finish_running(CappedStatus::interrupted); }
}

// All vectors are (batch, n), contiguous. z may be r when there is no preconditioner. q is scratch, and the product
// where the operator is native. On return the direction is p where the state says along_p, else y.
template <class T>
struct CappedVectors {
  int64_t n, batch;
  const T* g;
  T *y, *Hy, *r, *p, *Hp, *z, *q;
  CappedState* states;  // (batch)
  double* arrays;       // (batch, 4, capacity)
  void* workspace;      // CUDA only: capped_workspace_bytes(batch) of device memory
  int64_t check_every;  // iterations between two looks at the device

  KANTOR_HD CappedArrays arrays_of(int64_t k, int64_t capacity) const {
    double* first = arrays + 4 * k * capacity;
    return {first, first + capacity, first + 2 * capacity, first + 3 * capacity};
  }
};

// The product H z as a call back into Python; the memory stays valid until the next call.
template <class T>
using ProductCallback = std::function<const T*()>;

// A null operator means the callback. With `all_reduce` as in cg.h.
template <class T>
void capped_cg_cpu(const Exec& exec, const Operator<T>* H, const ProductCallback<T>& product,
                   const Preconditioner<T>& M, const CappedVectors<T>& v, const CappedOptions& options, bool resume,
                   const CgMonitor& monitor, const AllReduce& all_reduce = {});
template <class T>
void capped_cg_cuda(const Exec& exec, const Operator<T>* H, const ProductCallback<T>& product,
                    const Preconditioner<T>& M, const CappedVectors<T>& v, const CappedOptions& options, bool resume,
                    const CgMonitor& monitor, const AllReduce& all_reduce = {});
int64_t capped_workspace_bytes(int64_t batch);

}  // namespace kantor
