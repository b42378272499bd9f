// The kernels of flexible conjugate gradients. The scalars of every system live on the device: the last block of a
// reduction runs the recurrence of flexible_cg.h, and a finished system's blocks leave at once.
#pragma once
#include <cmath>

#include "linalg/flexible_cg.h"
#include "linalg/krylov_kernels.h"
#include "linalg/operator_sum_kernels.h"

namespace kantor {

inline constexpr int64_t directions_at_once = 8;

template <class T>
struct FlexibleShared {
  FlexibleVectors<T> v;
  FlexibleOptions options;
  Reduction reduction;

  __device__ __forceinline__ FlexibleState& state(int64_t k) const { return v.states[k]; }
  __device__ __forceinline__ DirectionScalars* directions(int64_t k) const { return v.directions + k * options.slots; }
  __device__ __forceinline__ double* history(int64_t k) const { return v.history + k * options.cg.history_length; }
};

// The systems that take their direction from the map, or from the fallback.
struct TakesFromMap : FlexibleState {
  KANTOR_HD bool running() const { return takes(true); }
};
struct TakesFromFallback : FlexibleState {
  KANTOR_HD bool running() const { return takes(false); }
};
struct AcceptSearching {
  const FlexibleState* states;
  __device__ __forceinline__ bool operator()(int64_t k) const { return states[k].searches(); }
};

// --- direction ---

// The input of f, for all systems: r / |r|.
template <class T>
__global__ void flexible_input_kernel(FlexibleShared<T> shared, int64_t slot) {
  const FlexibleVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  const double rr = shared.state(k).cg.rr;
  const T factor = static_cast<T>(!shared.options.normalised || rr == 0 ? 1 : 1 / std::sqrt(rr));
  const T* r = v.r + k * v.n;
  T* input = v.q(slot, k);
  simt::grid_stride(v.n, [&](int64_t i) { input[i] = factor * r[i]; });
}

// q = d r, or r without d; or what the fallback left in the second half of the slot.
template <class View, class T>
__global__ void flexible_take_kernel(const View* states, FlexibleVectors<T> v, int64_t slot, const T* d,
                                     bool from_slot) {
  const int64_t k = blockIdx.y;
  if (!states[k].running()) return;
  const T* source = from_slot ? v.q(slot, k) : v.r + k * v.n;
  T* q = v.p(slot, k);
  simt::grid_stride(v.n, [&](int64_t i) { q[i] = d ? d[i] * source[i] : source[i]; });
}

// --- project: q.q and q.Ap_j for `directions_at_once` of the history from `first` on ---

template <class T>
__global__ void flexible_project_kernel(FlexibleShared<T> shared, int64_t round, int64_t first, bool last, bool again) {
  constexpr int most = int(directions_at_once);
  const FlexibleVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  const FlexibleState& s = shared.state(k);
  if (again ? !s.repeats() : !s.running()) return;
  const int64_t left = flexible_used(s, shared.options) - first + 1;
  const int count = left > most ? most : left > 0 ? int(left) : 0;
  if (count == 0 && !last) return;
  const T* q = v.p(slot_of(shared.options, round), k);
  double sums[most + 1] = {};
  simt::grid_stride(v.n, [&](int64_t i) {
    const double value = q[i];
    sums[most] += value * value;
    for (int c = 0; c < most; ++c)
      if (c < count) sums[c] += value * double(v.q(slot_of(shared.options, round, first + c), k)[i]);
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[most + 1]) {
    FlexibleState& state = shared.state(k);
    DirectionScalars* directions = shared.directions(k);
    for (int c = 0; c < count; ++c) directions[slot_of(shared.options, round, first + c)].coefficient = total[c];
    if (!last) return;
    if (again)
      flexible_after_second_project(state, shared.options, directions, round);
    else
      flexible_after_project(state, shared.options, directions, round, total[most]);
  });
}

// --- orthogonalise: p = scale q - sum_j c_j p_j ---

template <class T>
__global__ void flexible_orthogonalise_kernel(FlexibleShared<T> shared, int64_t round) {
  const FlexibleVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  const FlexibleState& s = shared.state(k);
  if (!s.searches()) return;
  const DirectionScalars* directions = shared.directions(k);
  const int64_t used = flexible_used(s, shared.options);
  const T scale = static_cast<T>(s.scale);
  T* p = v.p(slot_of(shared.options, round), k);
  simt::grid_stride(v.n, [&](int64_t i) {
    T value = scale * p[i];
    for (int64_t age = 1; age <= used; ++age) {
      const int64_t slot = slot_of(shared.options, round, age);
      value -= static_cast<T>(directions[slot].coefficient) * v.p(slot, k)[i];
    }
    p[i] = value;
  });
}

// --- products: p.Ap, p.r, p.p, Ap.Ap ---

template <class T>
struct DirectionProducts {
  FlexibleShared<T> shared;
  int64_t round, slot;
  double sums[4];

  __device__ __forceinline__ void row(int64_t k, int64_t i, T product) {
    const double p = shared.v.p(slot, k)[i], r = shared.v.r[k * shared.v.n + i], q = product;
    sums[0] += p * q;
    sums[1] += p * r;
    sums[2] += p * p;
    sums[3] += q * q;
  }
  __device__ __forceinline__ void done(int64_t k) {
    reduce(shared.reduction, k, sums, [&](double (&total)[4]) {
      flexible_after_product(shared.state(k), shared.options, shared.directions(k), round, total[0], total[1], total[2],
                             total[3]);
    });
  }
};

template <class T>
__global__ void flexible_products_kernel(DirectionProducts<T> products) {
  const FlexibleVectors<T>& v = products.shared.v;
  const int64_t k = blockIdx.y;
  if (!products.shared.state(k).searches()) return;
  const T* q = v.q(products.slot, k);
  simt::grid_stride(v.n, [&](int64_t i) { products.row(k, i, q[i]); });
  products.done(k);
}

// --- again: p -= sum_j c_j p_j and Ap -= sum_j c_j Ap_j ---

template <class T>
__global__ void flexible_again_kernel(DirectionProducts<T> products) {
  const FlexibleShared<T>& shared = products.shared;
  const FlexibleVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  const FlexibleState& s = shared.state(k);
  if (!s.repeats()) return;
  const DirectionScalars* directions = shared.directions(k);
  const int64_t used = flexible_used(s, shared.options);
  T *p = v.p(products.slot, k), *q = v.q(products.slot, k);
  simt::grid_stride(v.n, [&](int64_t i) {
    T value = p[i], product = q[i];
    for (int64_t age = 1; age <= used; ++age) {
      const int64_t slot = slot_of(shared.options, products.round, age);
      const T c = static_cast<T>(directions[slot].coefficient);
      value -= c * v.p(slot, k)[i];
      product -= c * v.q(slot, k)[i];
    }
    p[i] = value;
    q[i] = product;
    products.row(k, i, product);
  });
  products.done(k);
}

// --- update: x += beta p, r -= beta Ap, r.r ---

template <class T>
__global__ void flexible_update_kernel(FlexibleShared<T> shared, int64_t round) {
  const FlexibleVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y, first = k * v.n;
  const FlexibleState& s = shared.state(k);
  const int64_t slot = slot_of(shared.options, round);
  const T *p = v.p(slot, k), *q = v.q(slot, k);
  if (s.stopped_by_curvature(round)) simt::grid_stride(v.n, [&](int64_t i) { v.direction[first + i] = p[i]; });
  if (!s.searches()) return;
  const T step = static_cast<T>(s.step);
  double sums[1] = {0};
  simt::grid_stride(v.n, [&](int64_t i) {
    v.x[first + i] += step * p[i];
    const T residual = v.r[first + i] - step * q[i];
    v.r[first + i] = residual;
    sums[0] += double(residual) * double(residual);
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[1]) {
    flexible_after_update(shared.state(k), shared.options, total[0], shared.history(k));
  });
}

// --- start, refresh and verify: r = b - A x in double ---

enum class ResidualFor { start, refresh, verify };

// r = from - (terms) x, or from - product. The last launch of a residual reduces.
template <class T>
__global__ void flexible_residual_kernel(FlexibleShared<T> shared, ResidualFor moment, DeviceTerms<T> A,
                                         const T* product, const T* from, bool last) {
  const FlexibleVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y, first = k * v.n;
  const FlexibleState& state = shared.state(k);
  if (moment == ResidualFor::refresh && !state.running()) return;
  if (moment == ResidualFor::verify && (state.running() || state.cg.verified != 0)) return;
  double sums[3] = {0, 0, 0};  // r.r, b.b, max |b|
  simt::grid_stride(v.n, [&](int64_t i) {
    double value = from[first + i];
    if (product) value -= double(product[first + i]);
    value -= row_product(A, k, v.x + first, i);
    v.r[first + i] = static_cast<T>(value);
    if (!last) return;
    sums[0] += value * value;
    const double b = v.b[first + i];
    sums[1] += b * b;
    const double size = b < 0 ? -b : b;
    if (size > sums[2] || size != size) sums[2] = size;
  });
  if (!last) return;
  reduce<3, true>(shared.reduction, k, sums, [&](double (&total)[3]) {
    FlexibleState& s = shared.state(k);
    if (moment == ResidualFor::start)
      flexible_start(s, shared.options, total[1], total[2], total[0], shared.history(k));
    else if (moment == ResidualFor::refresh)
      flexible_after_refresh(s, total[0]);
    else
      flexible_after_verify(s, shared.options, total[0]);
  });
}

}  // namespace kantor
