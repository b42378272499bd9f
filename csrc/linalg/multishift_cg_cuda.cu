// The passes of multi-shift conjugate gradients on CUDA: the product, one kernel for its dot product, one for the
// residual, one for all directions. The scalars live on the device; the host looks every check_every iterations.
#include <algorithm>

#include "linalg/krylov_kernels.h"
#include "linalg/multishift_cg.h"

namespace kantor {
namespace {

template <class T>
struct MultishiftShared {
  MultishiftVectors<T> v;
  Reduction reduction;
};

template <class T>
__global__ void multishift_start_kernel(MultishiftShared<T> shared) {
  const MultishiftVectors<T>& v = shared.v;
  double sums[1] = {0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const T b = v.b[i];
    v.r[i] = v.p[i] = b;
    for (int64_t k = 0; k < v.shifts.count; ++k) {
      v.directions[k * v.n + i] = b;
      v.x[k * v.n + i] = 0;
    }
    sums[0] += double(b) * double(b);
  });
  reduce(shared.reduction, 0, sums, [&](double (&total)[1]) { multishift_start(*v.state, v.shifts, total[0]); });
}

// q = product + shift p, p.q.
template <class T>
__global__ void multishift_product_kernel(MultishiftShared<T> shared, const T* product) {
  const MultishiftVectors<T>& v = shared.v;
  if (!v.state->running()) return;
  const T shift = static_cast<T>(v.state->shift);
  double sums[1] = {0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const T q = product[i] + shift * v.p[i];
    v.q[i] = q;
    sums[0] += double(v.p[i]) * double(q);
  });
  reduce(shared.reduction, 0, sums, [&](double (&total)[1]) { multishift_after_product(*v.state, total[0]); });
}

template <class T>
__global__ void multishift_update_kernel(MultishiftShared<T> shared) {
  const MultishiftVectors<T>& v = shared.v;
  if (!v.state->running()) return;
  const T alpha = static_cast<T>(v.state->alpha);
  double sums[1] = {0};
  simt::grid_stride(v.n, [&](int64_t i) {
    const T r = v.r[i] - alpha * v.q[i];
    v.r[i] = r;
    sums[0] += double(r) * double(r);
  });
  reduce(shared.reduction, 0, sums, [&](double (&total)[1]) { multishift_after_update(*v.state, v.shifts, total[0]); });
}

// Row blockIdx.y of the grid is a shift; the row after the last one is the seed's own direction.
template <class T>
__global__ void multishift_directions_kernel(MultishiftShared<T> shared, double iteration) {
  const MultishiftVectors<T>& v = shared.v;
  if (v.state->iterations != iteration) return;  // it ended before this step
  const int64_t k = blockIdx.y;
  if (k == v.shifts.count) {
    const T beta = static_cast<T>(v.state->beta);
    simt::grid_stride(v.n, [&](int64_t i) { v.p[i] = v.r[i] + beta * v.p[i]; });
    return;
  }
  if (v.shifts.done[k] == 2) return;
  const T a = static_cast<T>(v.shifts.a[k]), b = static_cast<T>(v.shifts.b[k]), zeta = static_cast<T>(v.shifts.zeta[k]);
  T *direction = v.directions + k * v.n, *x = v.x + k * v.n;
  simt::grid_stride(v.n, [&](int64_t i) {
    x[i] += a * direction[i];
    direction[i] = zeta * v.r[i] + b * direction[i];
  });
}

template <class T>
class MultishiftCudaSpace {
 public:
  MultishiftCudaSpace(const Exec& exec, const Operator<T>* A, const ProductCallback<T>& product,
                      const MultishiftVectors<T>& v)
      : exec_(exec), A_(A), product_(product), shared_{v, make_reduction(v.workspace, 1, exec.stream)} {
    blocks_ = std::max(1u, blocks_per_vector(exec, v.n, 1));
  }

  bool any_running(int64_t iteration) {
    if (iteration % shared_.v.check_every != 0) return running_;
    simt::copy_to_host(&host_, shared_.v.state, sizeof host_, exec_.stream);
    return running_ = host_.running();
  }

  void start() { launch(&multishift_start_kernel<T>); }

  void product() {
    const MultishiftVectors<T>& v = shared_.v;
    const T* product = v.q;
    if (A_)
      launch_apply(exec_, *A_, 1, blocks_, v.p, v.q, AcceptAll{}, ConsumeNothing{});
    else
      product = product_();
    SIMT_LAUNCH(multishift_product_kernel<T>, dim3(blocks_), threads_per_block, 0, exec_.stream, shared_, product);
  }

  void update() { launch(&multishift_update_kernel<T>); }

  void directions(int64_t iteration) {
    const dim3 grid(blocks_, static_cast<unsigned>(shared_.v.shifts.count + 1));
    SIMT_LAUNCH(multishift_directions_kernel<T>, grid, threads_per_block, 0, exec_.stream, shared_, double(iteration));
  }

  void interrupt() {
    running_ = false;
    simt::copy_to_host(&host_, shared_.v.state, sizeof host_, exec_.stream);
    if (!host_.running()) return;
    host_.finish(CgStatus::interrupted);
    simt::copy_to_device(shared_.v.state, &host_, sizeof host_, exec_.stream);
  }

 private:
  template <class Kernel>
  void launch(Kernel kernel) {
    SIMT_LAUNCH(kernel, dim3(blocks_), threads_per_block, 0, exec_.stream, shared_);
  }

  Exec exec_;
  const Operator<T>* A_;
  const ProductCallback<T>& product_;
  MultishiftShared<T> shared_;
  MultishiftState host_{};
  unsigned blocks_ = 1;
  bool running_ = true;
};

}  // namespace

int64_t multishift_workspace_bytes() { return reduction_bytes(1, 1); }

template <class T>
void multishift_cg_cuda(const Exec& exec, const Operator<T>* A, const ProductCallback<T>& product,
                        const MultishiftVectors<T>& v, const CgMonitor& monitor) {
  if (v.shifts.count > 65534) throw std::invalid_argument("multishift_cg: shifts: expected at most 65534 on a GPU");
  const simt::DeviceGuard guard(exec.device);
  MultishiftCudaSpace<T> space(exec, A, product, v);
  multishift_conjugate_gradients(space, monitor);
}

#define KANTOR_INSTANTIATE(T)                                                                  \
  template void multishift_cg_cuda(const Exec&, const Operator<T>*, const ProductCallback<T>&, \
                                   const MultishiftVectors<T>&, const CgMonitor&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
