// The vector passes of conjugate gradients on CUDA. Nothing waits for the device between two polls: the scalars of
// every system live there, the last block of a reduction runs the recurrence of cg.h, and a finished system's blocks
// leave at once. Words of memory traffic per unknown and iteration, beside the operator's own:
//   direction   read z, p, write p                       (z = r without, d r with a diagonal preconditioner)
//   apply       read p (its neighbours from cache), write q; p.q and q.q from registers
//   update      read x, r, p, q, write x, r; r.r and, for a diagonal preconditioner, r.z from registers
// 11 in all; sums of operators read and write q once more per term.
#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/cg.h"
#include "linalg/krylov_kernels.h"
#include "linalg/operator_sum_kernels.h"

namespace kantor {
namespace {

constexpr int64_t poll_every = 8;

struct Shared {
  CgState* states;
  double* history;
  CgOptions options;
  Reduction reduction;
  double* rank_sums;  // null where this process is alone

  __device__ __forceinline__ double* history_of(int64_t k) const { return history + k * options.history_length; }
};

// --- precondition: r.z ---

struct AfterPrecondition {
  static constexpr int count = 1;
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    cg_after_precondition(shared.states[k], total[0]);
  }
};

template <class T>
__global__ void residual_product_kernel(Shared shared, int64_t n, const T* r, const T* z) {
  const int64_t k = blockIdx.y;
  if (!shared.states[k].running()) return;
  double sums[1] = {0};
  simt::grid_stride(n, [&](int64_t i) { sums[0] += double(r[k * n + i]) * double(z[k * n + i]); });
  reduce(shared.reduction, k, sums, [&](double (&total)[1]) { conclude<AfterPrecondition>(shared, k, total); });
}

// --- direction: p = z + beta p ---

template <class T, bool scaled>
__global__ void direction_kernel(const CgState* states, int64_t n, const T* d, const T* z, T* p) {
  const int64_t k = blockIdx.y;
  if (!states[k].running()) return;
  const T beta = static_cast<T>(states[k].beta);
  z += k * n;
  p += k * n;
  simt::grid_stride(n, [&](int64_t i) {
    const T step = scaled ? d[i] * z[i] : z[i];
    p[i] = beta == 0 ? step : step + beta * p[i];  // p may be uninitialised in the first iteration
  });
}

// --- apply: q = A p, then p.q and q.q ---

struct AfterApply {
  static constexpr int count = 2;
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    cg_after_apply(shared.states[k], shared.options, total[0], total[1]);
  }
};

template <class T>
struct Products {
  Shared shared;
  const T* p;
  int64_t n;
  double sums[2];

  __device__ __forceinline__ void row(int64_t k, int64_t i, T q) {
    sums[0] += double(p[k * n + i]) * double(q);
    sums[1] += double(q) * double(q);
  }
  __device__ __forceinline__ void done(int64_t k) {
    reduce(shared.reduction, k, sums, [&](double (&total)[2]) { conclude<AfterApply>(shared, k, total); });
  }
};

template <class T>
__global__ void products_kernel(Products<T> products, const T* q) {
  const int64_t k = blockIdx.y, n = products.n;
  if (!products.shared.states[k].running()) return;
  simt::grid_stride(n, [&](int64_t i) { products.row(k, i, q[k * n + i]); });
  products.done(k);
}

// --- update: x += alpha p, r -= alpha q, r.r; and r.z where z is r or d r ---

enum class Scaling { stored, identity, diagonal };

template <Scaling scaling>
struct AfterUpdate {
  static constexpr int count = 2;
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    CgState& s = shared.states[k];
    cg_after_update(s, shared.options, total[0], shared.history_of(k));
    if constexpr (scaling == Scaling::identity) cg_after_precondition(s, total[0]);
    if constexpr (scaling == Scaling::diagonal) cg_after_precondition(s, total[1]);
  }
};

template <class T, Scaling scaling>
__global__ void update_kernel(Shared shared, int64_t n, const T* d, const T* p, const T* q, T* x, T* r) {
  const int64_t k = blockIdx.y;
  if (!shared.states[k].running()) return;
  const T alpha = static_cast<T>(shared.states[k].alpha);
  double sums[2] = {0, 0};
  simt::grid_stride(n, [&](int64_t i) {
    const int64_t at = k * n + i;
    x[at] += alpha * p[at];
    const T residual = r[at] - alpha * q[at];
    r[at] = residual;
    sums[0] += double(residual) * double(residual);
    if constexpr (scaling == Scaling::diagonal) sums[1] += double(d[i]) * double(residual) * double(residual);
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[2]) { conclude<AfterUpdate<scaling>>(shared, k, total); });
}

// --- start and verify: r = b - A x in double ---

enum class Moment { start, verify };

// Whether the residual of this moment is formed for a system.
template <Moment moment>
__device__ __forceinline__ bool forms_residual(const CgState& state) {
  return moment == Moment::start || !(state.running() || state.verified != 0);
}

template <Moment moment, Scaling scaling>
struct AfterResidual {
  static constexpr int count = 4;
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    CgState& s = shared.states[k];
    if (!forms_residual<moment>(s)) return;
    if (moment == Moment::start) {
      cg_start(s, shared.options, total[2], total[3], total[0], shared.history_of(k));
    } else {
      cg_after_verify(s, shared.options, total[0], total[2]);
      s.verified = s.running() ? 0 : 1;
    }
    if constexpr (scaling == Scaling::identity) cg_after_precondition(s, total[0]);
    if constexpr (scaling == Scaling::diagonal) cg_after_precondition(s, total[1]);
  }
};

// r = from - (terms) x, or from - product when the operator is a callback. The last launch of a residual reduces.
template <class T, Moment moment, Scaling scaling>
__global__ void residual_kernel(Shared shared, int64_t n, DeviceTerms<T> A, const T* product, const T* x, const T* b,
                                const T* from, const T* p, const T* d, T* r, bool last) {
  const int64_t k = blockIdx.y;
  if (!forms_residual<moment>(shared.states[k])) return;
  double sums[4] = {0, 0, 0, 0};  // r.r, r.z, and b.b or p.p, max |b|
  const int64_t first = k * n;
  simt::grid_stride(n, [&](int64_t i) {
    double value = from[first + i];
    if (product) value -= double(product[first + i]);
    value -= row_product(A, k, x + first, i);
    r[first + i] = static_cast<T>(value);
    if (!last) return;
    sums[0] += value * value;
    if constexpr (scaling == Scaling::diagonal) sums[1] += double(d[i]) * value * value;
    const double other = moment == Moment::start ? b[first + i] : p[first + i];
    sums[2] += other * other;
    const double size = other < 0 ? -other : other;
    if (size > sums[3] || size != size) sums[3] = size;
  });
  if (!last) return;
  reduce<4, true>(shared.reduction, k, sums, [&](double (&total)[4]) {
    total[3] = cg_kind_of_size(total[3]);
    conclude<AfterResidual<moment, scaling>>(shared, k, total);
  });
}

template <class T>
class CudaSpace {
 public:
  CudaSpace(const Exec& exec, const Operator<T>* A, const ApplyCallback& apply, const Preconditioner<T>& M,
            const CgVectors<T>& v, const CgOptions& options, const AllReduce& all_reduce)
      : exec_(exec), A_(A), apply_(apply), M_(M), v_(v), all_reduce_(all_reduce), host_(static_cast<size_t>(v.batch)) {
    blocks_ = std::max(1u, blocks_per_vector(exec, v.n, v.batch));
    grid_ = dim3(blocks_, static_cast<unsigned>(v.batch));
    shared_ = {v.states, v.history, options, make_reduction(v.workspace, v.batch, exec.stream),
               all_reduce ? all_reduce.sums : nullptr};
    if (const auto* diagonal = std::get_if<Diagonal<T>>(&M)) scaling_ = Scaling::diagonal, d_ = diagonal->values;
    if (std::holds_alternative<std::monostate>(M)) scaling_ = Scaling::identity;
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M)) levels_ = host_levels(exec, *factor);
  }

  bool any_running() {
    simt::copy_to_host(host_.data(), v_.states, host_.size() * sizeof(CgState), exec_.stream);
    return std::any_of(host_.begin(), host_.end(), [](const CgState& s) { return s.running(); });
  }

  void start() { residual<Moment::start>(!v_.zero_start); }

  void precondition() {
    if (scaling_ != Scaling::stored) return;  // r.z came with the update
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M_)) {
      launch_incomplete_cholesky(exec_, v_.states, *factor, levels_, v_.batch, v_.r, v_.q, v_.z);
    } else if (const auto* multigrid = std::get_if<Multigrid>(&M_)) {
      // Finished systems too: which ones run is known on the device only.
      for (int64_t at = 0; at < v_.batch * v_.n; at += v_.n)
        apply_multigrid_cuda(exec_, *multigrid, v_.r + at, v_.z + at);
    } else if (const auto* callback = std::get_if<Callback>(&M_)) {
      (*callback)();
    } else {
      launch_apply(exec_, std::get<Operator<T>>(M_), v_.batch, blocks_, v_.r, v_.z, AcceptRunning<CgState>{v_.states},
                   ConsumeNothing{});
    }
    SIMT_LAUNCH((residual_product_kernel<T>), grid_, threads_per_block, 0, exec_.stream, shared_, v_.n, v_.r, v_.z);
    share_totals<AfterPrecondition>(exec_, all_reduce_, shared_);
  }

  void direction_and_apply() {
    if (scaling_ == Scaling::diagonal)
      SIMT_LAUNCH((direction_kernel<T, true>), grid_, threads_per_block, 0, exec_.stream, v_.states, v_.n, d_, v_.r,
                  v_.p);
    else
      SIMT_LAUNCH((direction_kernel<T, false>), grid_, threads_per_block, 0, exec_.stream, v_.states, v_.n, d_, v_.z,
                  v_.p);
    const Products<T> products{shared_, v_.p, v_.n, {0, 0}};
    if (A_) {
      launch_apply(exec_, *A_, v_.batch, blocks_, v_.p, v_.q, AcceptRunning<CgState>{v_.states}, products);
    } else {
      apply_(false);
      SIMT_LAUNCH((products_kernel<T>), grid_, threads_per_block, 0, exec_.stream, products, v_.q);
    }
    share_totals<AfterApply>(exec_, all_reduce_, shared_);
  }

  void update() {
    const auto launch = [&]<Scaling scaling>() {
      SIMT_LAUNCH((update_kernel<T, scaling>), grid_, threads_per_block, 0, exec_.stream, shared_, v_.n, d_, v_.p, v_.q,
                  v_.x, v_.r);
      share_totals<AfterUpdate<scaling>>(exec_, all_reduce_, shared_);
    };
    if (scaling_ == Scaling::identity) launch.template operator()<Scaling::identity>();
    if (scaling_ == Scaling::diagonal) launch.template operator()<Scaling::diagonal>();
    if (scaling_ == Scaling::stored) launch.template operator()<Scaling::stored>();
  }

  // Looks at the device every few iterations only; between two looks finished systems are latched and cost next to
  // nothing.
  bool proceed(int64_t iteration, const CgMonitor& monitor) {
    if (!shared_.options.watched && iteration % poll_every != 0) return true;
    const bool running = any_running();
    double largest = 0;
    for (const CgState& s : host_) largest = std::fmax(largest, s.rr);
    const CgStatus status = wish_of_ranks(exec_, all_reduce_, monitor(iteration, std::sqrt(largest)));
    if (status == CgStatus::running) return running;
    finish_running(status);
    return false;
  }

  void finish_running(CgStatus status) {
    if (!any_running()) return;
    for (CgState& s : host_)
      if (s.running()) s.finish(status);
    simt::copy_to_device(v_.states, host_.data(), host_.size() * sizeof(CgState), exec_.stream);
  }

  void verify() { residual<Moment::verify>(true); }

 private:
  // r = b - A x; the product is left out when x is zero.
  template <Moment moment>
  void residual(bool with_product) {
    const std::vector<DeviceTerms<T>> groups = device_terms(with_product ? A_ : nullptr);
    if (with_product && A_) launch_projections(exec_, *A_, v_.batch, v_.x, AcceptAll{});
    const T* product = nullptr;
    if (with_product && !A_) apply_(true), product = v_.q;
    for (size_t g = 0; g < groups.size(); ++g) {
      const bool last = g + 1 == groups.size();
      const T* from = g == 0 ? v_.b : v_.r;
      const auto launch = [&]<Scaling scaling>() {
        SIMT_LAUNCH((residual_kernel<T, moment, scaling>), grid_, threads_per_block, 0, exec_.stream, shared_, v_.n,
                    groups[g], product, v_.x, v_.b, from, v_.p, d_, v_.r, last);
        if (last) share_totals<AfterResidual<moment, scaling>>(exec_, all_reduce_, shared_);
      };
      if (scaling_ == Scaling::identity) launch.template operator()<Scaling::identity>();
      if (scaling_ == Scaling::diagonal) launch.template operator()<Scaling::diagonal>();
      if (scaling_ == Scaling::stored) launch.template operator()<Scaling::stored>();
    }
  }

  Exec exec_;
  const Operator<T>* A_;
  const ApplyCallback& apply_;
  const Preconditioner<T>& M_;
  CgVectors<T> v_;
  const AllReduce& all_reduce_;
  std::vector<CgState> host_;  // the states as last read
  Shared shared_{};
  unsigned blocks_ = 1;
  dim3 grid_;
  Scaling scaling_ = Scaling::stored;
  const T* d_ = nullptr;
  std::vector<int32_t> levels_;
};

}  // namespace

int64_t cg_workspace_bytes(int64_t batch) { return reduction_bytes(4, batch); }

template <class T>
void cg_cuda(const Exec& exec, const Operator<T>* A, const ApplyCallback& apply, const Preconditioner<T>& M,
             const CgVectors<T>& v, const CgOptions& options, const CgMonitor& monitor, const AllReduce& all_reduce) {
  const simt::DeviceGuard guard(exec.device);
  for_each_slice(v.batch, [&](int64_t first, int64_t count) {
    CgVectors<T> slice = v;
    slice.batch = count;
    slice.b += first * v.n;
    for (T** vector : {&slice.x, &slice.r, &slice.p, &slice.q, &slice.z}) *vector += first * v.n;
    slice.states += first;
    slice.history += first * options.history_length;
    CudaSpace<T> space(exec, A, apply, M, slice, options, all_reduce);
    conjugate_gradients(space, monitor);
  });
}

template <class T>
void solve_incomplete_cholesky_cuda(const Exec& exec, const IncompleteCholesky<T>& M, const T* r, T* work, T* z) {
  const simt::DeviceGuard guard(exec.device);
  launch_incomplete_cholesky<CgState, T>(exec, nullptr, M, host_levels(exec, M), 1, r, work, z);
}

#define KANTOR_INSTANTIATE(T)                                                                            \
  template void cg_cuda(const Exec&, const Operator<T>*, const ApplyCallback&, const Preconditioner<T>&, \
                        const CgVectors<T>&, const CgOptions&, const CgMonitor&, const AllReduce&);      \
  template void solve_incomplete_cholesky_cuda(const Exec&, const IncompleteCholesky<T>&, const T*, T*, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
