// The passes of capped conjugate gradients on CUDA: two fused kernels and one product an iteration, beside the
// preconditioner. Scalars, test 4's arrays and the latch of every system live on the device; the host looks every
// check_every iterations. Words of memory traffic per unknown and iteration, beside the product's own:
//   update      read p, Hp, y, Hy, r, write y, Hy, r         8;  rr, yy, y.Hy, Hy.Hy from registers
//   direction   read z, q, p, Hp, write p, Hp                6;  pp, p.Hp, Hp.Hp, Hz.Hz from registers
#include <algorithm>
#include <vector>

#include "linalg/capped_cg.h"
#include "linalg/krylov_kernels.h"

namespace kantor {
namespace {

template <class T>
struct CappedShared {
  CappedVectors<T> v;
  CappedOptions options;
  Reduction reduction;
  double* rank_sums;  // null where this process is alone
};

struct AfterStart {
  static constexpr int count = 1;
  template <class Shared>
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    capped_start(shared.v.states[k], total[0]);
    if (!shared.options.preconditioned) capped_after_precondition(shared.v.states[k], total[0], total[0]);
  }
};

struct AfterPrecondition {
  static constexpr int count = 2;
  template <class Shared>
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    capped_after_precondition(shared.v.states[k], total[0], total[1]);
  }
};

struct AfterDirection {
  static constexpr int count = 4;
  template <class Shared>
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    capped_after_direction(shared.v.states[k], shared.options, shared.v.arrays_of(k, shared.options.capacity), total[0],
                           total[1], total[2], total[3]);
  }
};

struct AfterUpdate {
  static constexpr int count = 4;
  template <class Shared>
  static __device__ __forceinline__ void apply(const Shared& shared, int64_t k, const double* total) {
    CappedState& s = shared.v.states[k];
    if (!s.running()) return;
    capped_after_update(s, shared.options, total[0], total[1], total[2], total[3]);
    if (!shared.options.preconditioned) capped_after_precondition(s, total[0], total[0]);
  }
};

template <class T>
__global__ void capped_start_kernel(CappedShared<T> shared) {
  const CappedVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  double sums[1] = {0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const int64_t at = k * v.n + i;
    v.y[at] = v.Hy[at] = 0;
    v.r[at] = v.g[at];
    sums[0] += double(v.g[at]) * double(v.g[at]);
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[1]) { conclude<AfterStart>(shared, k, total); });
}

// z = d r for a diagonal preconditioner; r.z and z.z for any.
template <class T>
__global__ void capped_precondition_kernel(CappedShared<T> shared, const T* d) {
  const CappedVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  if (!v.states[k].running()) return;
  double sums[2] = {0, 0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const int64_t at = k * v.n + i;
    if (d) v.z[at] = d[i] * v.r[at];
    const double z = v.z[at];
    sums[0] += double(v.r[at]) * z;
    sums[1] += z * z;
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[2]) { conclude<AfterPrecondition>(shared, k, total); });
}

template <class T>
__global__ void capped_direction_kernel(CappedShared<T> shared, const T* q) {
  const CappedVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  if (!v.states[k].running()) return;
  const T beta = static_cast<T>(v.states[k].beta);
  double sums[4] = {0, 0, 0, 0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const int64_t at = k * v.n + i;
    const T Hz = q[at];
    const T p = beta == 0 ? -v.z[at] : beta * v.p[at] - v.z[at];  // p may be uninitialised in the first iteration
    const T Hp = beta == 0 ? -Hz : beta * v.Hp[at] - Hz;
    v.p[at] = p;
    v.Hp[at] = Hp;
    sums[0] += double(p) * double(p);
    sums[1] += double(p) * double(Hp);
    sums[2] += double(Hp) * double(Hp);
    sums[3] += double(Hz) * double(Hz);
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[4]) { conclude<AfterDirection>(shared, k, total); });
}

template <class T>
__global__ void capped_update_kernel(CappedShared<T> shared) {
  const CappedVectors<T>& v = shared.v;
  const int64_t k = blockIdx.y;
  if (!v.states[k].running()) return;
  const T alpha = static_cast<T>(v.states[k].alpha), shift = static_cast<T>(2 * v.states[k].damping);
  double sums[4] = {0, 0, 0, 0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const int64_t at = k * v.n + i;
    const T p = v.p[at], Hp = v.Hp[at];
    const T y = v.y[at] + alpha * p, Hy = v.Hy[at] + alpha * Hp, r = v.r[at] + alpha * (Hp + shift * p);
    v.y[at] = y;
    v.Hy[at] = Hy;
    v.r[at] = r;
    sums[0] += double(r) * double(r);
    sums[1] += double(y) * double(y);
    sums[2] += double(y) * double(Hy);
    sums[3] += double(Hy) * double(Hy);
  });
  reduce(shared.reduction, k, sums, [&](double (&total)[4]) { conclude<AfterUpdate>(shared, k, total); });
}

template <class T>
class CappedCudaSpace {
 public:
  CappedCudaSpace(const Exec& exec, const Operator<T>* H, const ProductCallback<T>& product, const Preconditioner<T>& M,
                  const CappedVectors<T>& v, const CappedOptions& options, const AllReduce& all_reduce)
      : exec_(exec), H_(H), product_(product), M_(M), all_reduce_(all_reduce), host_(static_cast<size_t>(v.batch)) {
    blocks_ = std::max(1u, blocks_per_vector(exec, v.n, v.batch));
    grid_ = dim3(blocks_, static_cast<unsigned>(v.batch));
    shared_ = {v, options, make_reduction(v.workspace, v.batch, exec.stream), all_reduce ? all_reduce.sums : nullptr};
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M)) levels_ = host_levels(exec, *factor);
  }

  // Looks at the device every few iterations only; between two looks finished systems are latched and cost next to
  // nothing.
  bool any_running(int64_t iteration) {
    const int64_t every = shared_.v.check_every;
    if (every > 1 && (iteration % every != 0 || iteration == looked_at_)) return running_;
    looked_at_ = iteration;
    return running_ = look();
  }

  void start() {
    SIMT_LAUNCH(capped_start_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_);
    share_totals<AfterStart>(exec_, all_reduce_, shared_);
  }

  void precondition() {
    const CappedVectors<T>& v = shared_.v;
    if (!shared_.options.preconditioned) return;  // the pass that made r went on to it
    const T* d = nullptr;
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M_))
      launch_incomplete_cholesky<CappedState, T>(exec_, v.states, *factor, levels_, v.batch, v.r, v.q, v.z);
    else if (const auto* multigrid = std::get_if<Multigrid>(&M_))
      for (int64_t at = 0; at < v.batch * v.n; at += v.n) apply_multigrid_cuda(exec_, *multigrid, v.r + at, v.z + at);
    else if (const auto* callback = std::get_if<Callback>(&M_))
      (*callback)();
    else if (const auto* diagonal = std::get_if<Diagonal<T>>(&M_))
      d = diagonal->values;
    else
      launch_apply(exec_, std::get<Operator<T>>(M_), v.batch, blocks_, v.r, v.z, AcceptRunning<CappedState>{v.states},
                   ConsumeNothing{});
    SIMT_LAUNCH(capped_precondition_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_, d);
    share_totals<AfterPrecondition>(exec_, all_reduce_, shared_);
  }

  void direction() {
    const CappedVectors<T>& v = shared_.v;
    const T* q = v.q;
    if (H_)
      launch_apply(exec_, *H_, v.batch, blocks_, v.z, v.q, AcceptRunning<CappedState>{v.states}, ConsumeNothing{});
    else
      q = product_();
    SIMT_LAUNCH(capped_direction_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_, q);
    share_totals<AfterDirection>(exec_, all_reduce_, shared_);
  }

  void update() {
    SIMT_LAUNCH(capped_update_kernel<T>, grid_, threads_per_block, 0, exec_.stream, shared_);
    share_totals<AfterUpdate>(exec_, all_reduce_, shared_);
  }

  // Ranks can agree on an end only where all look.
  void watch(int64_t iteration, const CgMonitor& monitor) {
    CgStatus status = monitor(iteration, 0);
    if (all_reduce_) {
      if (status != CgStatus::running) wish_ = status;
      if (iteration % shared_.v.check_every != 0) return;
      status = wish_of_ranks(exec_, all_reduce_, wish_);
    }
    if (status != CgStatus::running) finish_running(CappedStatus::interrupted);
  }

  void finish_running(CappedStatus status) {
    running_ = false;
    if (!look()) return;
    for (CappedState& s : host_)
      if (s.running()) s.finish(status);
    simt::copy_to_device(shared_.v.states, host_.data(), host_.size() * sizeof(CappedState), exec_.stream);
  }

 private:
  bool look() {
    simt::copy_to_host(host_.data(), shared_.v.states, host_.size() * sizeof(CappedState), exec_.stream);
    return std::any_of(host_.begin(), host_.end(), [](const CappedState& s) { return s.running(); });
  }

  Exec exec_;
  const Operator<T>* H_;
  const ProductCallback<T>& product_;
  const Preconditioner<T>& M_;
  const AllReduce& all_reduce_;
  std::vector<CappedState> host_;  // the states as last read
  CappedShared<T> shared_{};
  unsigned blocks_ = 1;
  dim3 grid_;
  std::vector<int32_t> levels_;
  int64_t looked_at_ = -1;
  CgStatus wish_ = CgStatus::running;
  bool running_ = true;
};

}  // namespace

int64_t capped_workspace_bytes(int64_t batch) { return reduction_bytes(4, batch); }

template <class T>
void capped_cg_cuda(const Exec& exec, const Operator<T>* H, const ProductCallback<T>& product,
                    const Preconditioner<T>& M, const CappedVectors<T>& v, const CappedOptions& options, bool resume,
                    const CgMonitor& monitor, const AllReduce& all_reduce) {
  if (v.batch > 65535) throw std::invalid_argument("capped_cg: g: expected at most 65535 systems on a GPU; pass parts");
  const simt::DeviceGuard guard(exec.device);
  CappedCudaSpace<T> space(exec, H, product, M, v, options, all_reduce);
  capped_conjugate_gradients(space, resume, monitor);
}

#define KANTOR_INSTANTIATE(T)                                                                                        \
  template void capped_cg_cuda(const Exec&, const Operator<T>*, const ProductCallback<T>&, const Preconditioner<T>&, \
                               const CappedVectors<T>&, const CappedOptions&, bool, const CgMonitor&,                \
                               const AllReduce&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
