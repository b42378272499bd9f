#include "linalg/operator_kernels.h"

namespace kantor {

template <class T>
void matvec_cuda(const Exec& exec, const Operator<T>& A, int64_t batch, const T* x, T* y) {
  if (A.rows == 0) return;
  const simt::DeviceGuard guard(exec.device);
  const unsigned blocks = simt::blocks_for(A.rows, threads_per_block, 1u << 20);
  for_each_slice(batch, [&](int64_t first, int64_t count) {
    launch_apply(exec, A, count, blocks, x + first * A.cols, y + first * A.rows, AcceptAll{}, ConsumeNothing{});
  });
}

template void matvec_cuda(const Exec&, const Operator<float>&, int64_t, const float*, float*);
template void matvec_cuda(const Exec&, const Operator<double>&, int64_t, const double*, double*);

}  // namespace kantor
