// The passes of flexible conjugate gradients on CUDA. The scalars of every system live on the device, the last block of
// a reduction runs the recurrence of flexible_cg.h, and a finished system's blocks leave at once. Without Python code in
// the loop the host looks at the device every eighth round only. Words of memory traffic per unknown and iteration, with
// j directions in the history, beside the operator's own:
//   project        read q, the Ap_j                    1 + j    (q once more for every further eight)
//   orthogonalise  read q, the p_j, write p            2 + j
//   apply          read p, r, write Ap                 3        p.Ap, p.r, p.p, Ap.Ap from registers
//   update         read x, r, p, Ap, write x, r        6        r.r
// 12 + 2 j in all.
#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/flexible_cg.h"
#include "linalg/krylov_kernels.h"
#include "linalg/operator_sum_kernels.h"

namespace kantor {
namespace {

constexpr int64_t poll_every = 8;
constexpr int64_t directions_at_once = 8;

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

template <class T>
class FlexibleCudaSpace {
 public:
  FlexibleCudaSpace(const Exec& exec, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                    const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options)
      : exec_(exec),
        A_(A),
        product_(product),
        f_(f),
        fallback_(fallback),
        host_(static_cast<size_t>(v.batch)) {
    blocks_ = std::max(1u, blocks_per_vector(exec, v.n, v.batch));
    grid_ = dim3(blocks_, static_cast<unsigned>(v.batch));
    shared_ = {v, options, make_reduction(v.workspace, v.batch, exec.stream)};
    // A map in Python costs more than a look; and whether it is to be called has to be known.
    poll_every_ = options.cg.watched || f.callback || fallback.callback ? 1 : poll_every;
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&f.native)) levels_ = host_levels(exec, *factor);
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&fallback.native))
      fallback_levels_ = host_levels(exec, *factor);
  }

  bool any_running() {
    simt::copy_to_host(host_.data(), shared_.v.states, host_.size() * sizeof(FlexibleState), exec_.stream);
    return any([](const FlexibleState& s) { return s.running(); });
  }

  void start() { residual(ResidualFor::start, !shared_.v.zero_start, 0); }

  void direction(int64_t round) {
    const int64_t slot = slot_of(shared_.options, round);
    const bool known = poll_every_ == 1;
    if (!known || any([](const FlexibleState& s) { return s.takes(true); })) {
      if (f_.callback) {
        SIMT_LAUNCH(flexible_input_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_, slot);
        f_.callback(slot);
      } else {
        apply_native<TakesFromMap>(f_.native, levels_, slot);
      }
    }
    if (!known || any([](const FlexibleState& s) { return s.takes(false); })) {
      if (fallback_.callback) {
        fallback_.callback(slot);
        take<TakesFromFallback>(slot, nullptr, true);
      } else {
        apply_native<TakesFromFallback>(fallback_.native, fallback_levels_, slot);
      }
    }
  }

  void project(int64_t round) { project(round, false); }

  void orthogonalise_and_apply(int64_t round) {
    launch(flexible_orthogonalise_kernel<T>, round);
    const DirectionProducts<T> products = products_of(round);
    const FlexibleVectors<T>& v = shared_.v;
    if (A_) {
      launch_apply(exec_, *A_, v.batch, blocks_, v.p(products.slot, 0), v.q(products.slot, 0),
                   AcceptSearching{v.states}, products);
    } else {
      product_(false, products.slot);
      SIMT_LAUNCH(flexible_products_kernel<T>, grid_, threads_per_block, 0, exec_.stream, products);
    }
  }

  void orthogonalise_again(int64_t round) {
    if (shared_.options.slots == 1) return;
    project(round, true);
    SIMT_LAUNCH(flexible_again_kernel<T>, grid_, threads_per_block, 0, exec_.stream, products_of(round));
  }

  void update(int64_t round) { launch(flexible_update_kernel<T>, round); }

  void refresh(int64_t round) {
    const int64_t every = shared_.options.refresh_every;
    if (every == 0 || (round + 1) % every != 0) return;
    residual(ResidualFor::refresh, true, slot_of(shared_.options, round + 1));
  }

  // Whether any system may still run, after the monitor had its say. It does not hear of rounds in which no one moved.
  bool proceed(int64_t round, const CgMonitor& monitor) {
    if (round % poll_every_ != 0) return true;
    const bool running = any_running();
    double largest = 0, iterations = 0;
    for (const FlexibleState& s : host_) {
      largest = std::fmax(largest, s.cg.rr);
      iterations = std::fmax(iterations, s.cg.iterations);
    }
    const bool moved = iterations > reported_;
    reported_ = iterations;
    const CgStatus status =
        moved ? monitor(static_cast<int64_t>(iterations), std::sqrt(largest)) : CgStatus::running;
    if (status == CgStatus::running) return running;
    finish_running(status);
    return false;
  }

  void finish_running(CgStatus status) {
    if (!any_running()) return;
    for (FlexibleState& s : host_)
      if (s.running()) s.cg.finish(status);
    simt::copy_to_device(shared_.v.states, host_.data(), host_.size() * sizeof(FlexibleState), exec_.stream);
  }

  void verify(int64_t round) { residual(ResidualFor::verify, true, slot_of(shared_.options, round)); }

 private:
  template <class Predicate>
  bool any(Predicate&& predicate) const {
    return std::any_of(host_.begin(), host_.end(), predicate);
  }

  void launch(void (*kernel)(FlexibleShared<T>, int64_t), int64_t round) {
    SIMT_LAUNCH(kernel, grid_, threads_per_block, 0, exec_.stream, shared_, round);
  }

  DirectionProducts<T> products_of(int64_t round) const {
    return {shared_, round, slot_of(shared_.options, round), {0, 0, 0, 0}};
  }

  void project(int64_t round, bool again) {
    const int64_t most = std::max<int64_t>(1, shared_.options.slots - 1);
    for (int64_t first = 1; first <= most; first += directions_at_once) {
      const bool last = first + directions_at_once > most;
      SIMT_LAUNCH(flexible_project_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_, round, first, last,
                  again);
    }
  }

  template <class View>
  void take(int64_t slot, const T* d, bool from_slot) {
    SIMT_LAUNCH((flexible_take_kernel<View, T>), grid_, threads_per_block, 0, exec_.stream,
                static_cast<const View*>(shared_.v.states), shared_.v, slot, d, from_slot);
  }

  template <class View>
  void apply_native(const Preconditioner<T>& M, const std::vector<int32_t>& levels, int64_t slot) {
    const FlexibleVectors<T>& v = shared_.v;
    const auto* states = static_cast<const View*>(v.states);
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M))
      launch_incomplete_cholesky(exec_, states, *factor, levels, v.batch, v.r, v.q(slot, 0), v.p(slot, 0));
    else if (const auto* A = std::get_if<Operator<T>>(&M))
      launch_apply(exec_, *A, v.batch, blocks_, v.r, v.p(slot, 0), AcceptRunning<View>{states}, ConsumeNothing{});
    else if (const auto* diagonal = std::get_if<Diagonal<T>>(&M))
      take<View>(slot, diagonal->values, false);
    else
      take<View>(slot, nullptr, false);
  }

  // r = b - A x; the product is left out when x is zero. That of Python code goes through `slot`.
  void residual(ResidualFor moment, bool with_product, int64_t slot) {
    const FlexibleVectors<T>& v = shared_.v;
    const std::vector<DeviceTerms<T>> groups = device_terms(with_product ? A_ : nullptr);
    if (with_product && A_) launch_projections(exec_, *A_, v.batch, static_cast<const T*>(v.x), AcceptAll{});
    const T* product = nullptr;
    if (with_product && !A_) product_(true, slot), product = v.q(slot, 0);
    for (size_t g = 0; g < groups.size(); ++g)
      SIMT_LAUNCH(flexible_residual_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_, moment, groups[g],
                  product, g == 0 ? v.b : v.r, g + 1 == groups.size());
  }

  Exec exec_;
  const Operator<T>* A_;
  const SlotProduct& product_;
  const DirectionMap<T>& f_;
  const DirectionMap<T>& fallback_;
  std::vector<FlexibleState> host_;  // the states as last read
  FlexibleShared<T> shared_{};
  unsigned blocks_ = 1;
  dim3 grid_;
  int64_t poll_every_ = 1;
  std::vector<int32_t> levels_, fallback_levels_;
  double reported_ = 0;  // iterations, to the monitor
};

}  // namespace

int64_t flexible_workspace_bytes(int64_t batch) { return reduction_bytes(int(directions_at_once) + 1, batch); }

template <class T>
void flexible_cg_cuda(const Exec& exec, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                      const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options,
                      const CgMonitor& monitor) {
  if (v.batch > 65535)
    throw std::invalid_argument("flexible_cg: b: expected at most 65535 systems on a GPU; pass parts");
  const simt::DeviceGuard guard(exec.device);
  FlexibleCudaSpace<T> space(exec, A, product, f, fallback, v, options);
  flexible_conjugate_gradients(space, monitor);
}

#define KANTOR_INSTANTIATE(T)                                                                                       \
  template void flexible_cg_cuda(const Exec&, const Operator<T>*, const SlotProduct&, const DirectionMap<T>&,       \
                                 const DirectionMap<T>&, const FlexibleVectors<T>&, const FlexibleOptions&,         \
                                 const CgMonitor&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
