// The passes of flexible conjugate gradients on CUDA, with the kernels of flexible_cg_kernels.h. Without Python code in
// the loop the host looks at the device every eighth round only. Words of memory traffic per unknown and iteration,
// with j directions in the history, beside the operator's own:
//   project        read q, the Ap_j                    1 + j    (q once more for every further eight)
//   orthogonalise  read q, the p_j, write p            2 + j
//   apply          read p, r, write Ap                 3        p.Ap, p.r, p.p, Ap.Ap from registers
//   update         read x, r, p, Ap, write x, r        6        r.r
// 12 + 2 j in all.
#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/flexible_cg_kernels.h"

namespace kantor {
namespace {

constexpr int64_t poll_every = 8;

template <class T>
class FlexibleCudaSpace {
 public:
  FlexibleCudaSpace(const Exec& exec, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                    const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options)
      : exec_(exec), A_(A), product_(product), f_(f), fallback_(fallback), host_(static_cast<size_t>(v.batch)) {
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
    const CgStatus status = moved ? monitor(static_cast<int64_t>(iterations), std::sqrt(largest)) : CgStatus::running;
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
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M)) {
      launch_incomplete_cholesky(exec_, states, *factor, levels, v.batch, v.r, v.q(slot, 0), v.p(slot, 0));
    } else if (const auto* multigrid = std::get_if<Multigrid>(&M)) {
      // For all systems, by way of a vector that those with another direction do not need.
      for (int64_t at = 0; at < v.batch * v.n; at += v.n)
        apply_multigrid_cuda(exec_, *multigrid, v.r + at, v.q(slot, 0) + at);
      take<View>(slot, nullptr, true);
    } else if (const auto* A = std::get_if<Operator<T>>(&M)) {
      launch_apply(exec_, *A, v.batch, blocks_, v.r, v.p(slot, 0), AcceptRunning<View>{states}, ConsumeNothing{});
    } else if (const auto* diagonal = std::get_if<Diagonal<T>>(&M)) {
      take<View>(slot, diagonal->values, false);
    } else {
      take<View>(slot, nullptr, false);
    }
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

#define KANTOR_INSTANTIATE(T)                                                                                 \
  template void flexible_cg_cuda(const Exec&, const Operator<T>*, const SlotProduct&, const DirectionMap<T>&, \
                                 const DirectionMap<T>&, const FlexibleVectors<T>&, const FlexibleOptions&,   \
                                 const CgMonitor&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
