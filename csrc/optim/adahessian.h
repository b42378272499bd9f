// AdaHessian's three passes over its parameters (Z. Yao, A. Gholami, S. Shen, M. Mustafa, K. Keutzer, M. Mahoney,
// "ADAHESSIAN: An adaptive second order optimizer for machine learning", AAAI 2021, section 3):
//
//   z = +-1                                                    (probes)
//   v = b2 v + (1 - b2) D^2, D = mean of |z * H z| in a block   (curvature; eq. 8 to 10)
//   m = b1 m + (1 - b1) g,  theta -= lr (m' / (sqrt(v')^k + eps) + decay theta)    (step; eq. 11)
//
// with m' and v' corrected for their start at zero. A block is a run of consecutive elements, and v has one entry for
// each: it is the same for all elements of a block.
#pragma once
#include <cmath>

#include "core/exec.h"
#include "core/hd.h"
#include "core/philox.h"
#include "optim/tensor_table.h"

namespace kantor {

// Lists: z. Numbers: position of the parameter, draw, sample. Element i is bit i % 32 of lane (i % 128) / 32 of the
// call i / 128 of philox: 1, or -1 where the bit is set. Writes z.
template <class T>
void rademacher_cpu(const Exec& exec, const TensorTable& table, uint64_t seed);
template <class T>
void rademacher_cuda(const Exec& exec, const TensorTable& table, uint64_t seed);

inline constexpr int64_t probes_per_call = 128;

KANTOR_HD Philox probe_bits(uint64_t seed, const TableRow& row, int64_t call) {
  return philox(seed, static_cast<uint32_t>(call), static_cast<uint32_t>(row.number[0]),
                static_cast<uint32_t>(row.number[1]), static_cast<uint32_t>(row.number[2]));
}

// Lists: u = z * H z, v. Numbers: b2, 1 - b2, factor of u. A chunk is whole blocks. Traffic: reads u, reads and writes
// v. For one probe u and H z have the same absolute value, and H z may be given: z is not needed twice.
template <class T>
void average_curvature_cpu(const Exec& exec, const TensorTable& table);
template <class T>
void average_curvature_cuda(const Exec& exec, const TensorTable& table);

// Lists: theta, g, m, v. Numbers: those of Step. Traffic: reads g and v, reads and writes theta and m; 6 words.
template <class T>
void adahessian_step_cpu(const Exec& exec, const TensorTable& table);
template <class T>
void adahessian_step_cuda(const Exec& exec, const TensorTable& table);

template <class T>
struct Step {
  T beta1, weight;  // m = beta1 m + weight g
  T correction;     // of sqrt(v): 1 / sqrt(1 - b2^refreshes)
  T eps, power;
  T rate, decay;  // lr / (1 - b1^steps), lr * weight_decay
  T limit;        // of |m / denominator|

  KANTOR_HD explicit Step(const double* n)
      : beta1(static_cast<T>(n[0])),
        weight(static_cast<T>(n[1])),
        correction(static_cast<T>(n[2])),
        eps(static_cast<T>(n[3])),
        power(static_cast<T>(n[4])),
        rate(static_cast<T>(n[5])),
        decay(static_cast<T>(n[6])),
        limit(static_cast<T>(n[7])) {}

  KANTOR_HD T denominator(T v) const {
    const T root = std::sqrt(v) * correction;
    if (power == T(1)) return root + eps;
    if (power == T(0.5)) return std::sqrt(root) + eps;
    return std::pow(root, power) + eps;
  }

  // Without curvature and without eps an element stands still. NaN stays NaN.
  KANTOR_HD void move(T denominator, T g, T& m, T& theta) const {
    m = beta1 * m + weight * g;
    T step = denominator == T(0) ? T(0) : m / denominator;
    step = step > limit ? limit : step;
    step = step < -limit ? -limit : step;
    theta -= rate * step + decay * theta;
  }
};

}  // namespace kantor
