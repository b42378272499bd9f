// The elementwise passes of an optimiser that steps along linear minimisation oracles, over many tensors at once:
// momentum with the difference of two gradients, and the update. What a tensor contributes is a handful of sums, read
// and turned into rates by the caller, on the device: nothing here waits for it.
#pragma once
#include <cstdint>
#include <span>

#include "core/exec.h"

namespace kantor {

// One tensor of n elements, and what becomes of it:
//   B = beta B + (1 - beta) G, B = G while *accepted is 0;   input = B, or beta B + (1 - beta) G (nesterov)
//   difference = G - previous, while *accepted is 0: 0;       previous = G (keep, or *accepted is 0)
// all of it only where G is finite and not zero; otherwise nothing changes but difference and input, which are then 0.
template <class T>
struct MomentumItem {
  int64_t n;
  const T* grad;
  T* momentum;
  T* input;       // may be `momentum`
  T* previous;    // null: no differences
  T* difference;  // null: only its sums are wanted
  double beta;
  int flags;  // keep_gradient, nesterov, measure
};
inline constexpr int keep_gradient = 1, nesterov = 2;
inline constexpr int measure = 4;            // the sums of the difference are wanted
inline constexpr int previous_is_given = 8;  // is valid whatever `accepted`, and not written

// sums (items, 4): sum |G|, sum difference^2, sum |difference|, sum input^2.
// Reads G once for the first sum; then G, B, previous, and writes B and previous: 6 words an element, at most 8.
// `work` has the sum of momentum_work(n) doubles.
inline int64_t momentum_work(int64_t n) { return 3 * ((n + 4095) / 4096); }
template <class T>
void momentum_cpu(const Exec& exec, std::span<const MomentumItem<T>> items, const double* accepted, double* sums,
                  double* work);
template <class T>
void momentum_cuda(const Exec& exec, std::span<const MomentumItem<T>> items, const double* accepted, double* sums,
                   double* work);

// X = decay[k] X - rate[k] D, or of sign(D); nothing where rate[k] is 0. 3 words an element.
template <class T>
struct ApplyItem {
  int64_t n;
  T* X;
  const T* direction;
  bool sign;
};
template <class T>
void apply_cpu(const Exec& exec, std::span<const ApplyItem<T>> items, const double* rates, const double* decays);
template <class T>
void apply_cuda(const Exec& exec, std::span<const ApplyItem<T>> items, const double* rates, const double* decays);

}  // namespace kantor
