// What the conjugate gradient family (cg_cuda.cu, capped_cg_cuda.cu) shares on CUDA: reductions whose last block runs
// the scalar recurrence, so that nothing waits for the device between two polls, and the preconditioner.
#pragma once
#include <vector>

#include "linalg/operator_kernels.h"
#include "linalg/preconditioner.h"

namespace kantor {

inline constexpr int64_t most_block_sums = 8192;  // 8 blocks for each multiprocessor of any GPU

// Device memory for reductions: one ticket a system, `sums` partial results a block.
struct Reduction {
  unsigned* tickets;
  double* partials;
  int64_t batch;

  __device__ __forceinline__ double* partial(int which, int64_t k) const {
    return partials + (which * batch + k) * gridDim.x;
  }
};

// Bytes of device memory behind a Reduction of `count` values of `batch` vectors.
inline int64_t reduction_bytes(int count, int64_t batch) {
  return (batch + 2) * int64_t(sizeof(unsigned)) + count * (batch + most_block_sums) * int64_t(sizeof(double));
}

inline Reduction make_reduction(void* workspace, int64_t batch, simt::Stream stream) {
  auto* tickets = static_cast<unsigned*>(workspace);
  simt::memset_async(tickets, 0, static_cast<size_t>(batch) * sizeof(unsigned), stream);
  return {tickets, reinterpret_cast<double*>(tickets + (batch + 1) / 2 * 2), batch};
}

// Sums values[] over the blocks of system k; then one thread calls finish(totals). The last value is a maximum if
// asked.
template <int count, bool last_is_maximum = false, class Finish>
__device__ __forceinline__ void reduce(const Reduction& reduction, int64_t k, double (&values)[count],
                                       Finish&& finish) {
  for (int c = 0; c < count; ++c) {
    const bool maximum = last_is_maximum && c == count - 1;
    values[c] = maximum ? simt::block_max(values[c]) : simt::block_sum(values[c]);
    if (threadIdx.x == 0) reduction.partial(c, k)[blockIdx.x] = values[c];
  }
  if (!simt::is_last_block(&reduction.tickets[k], gridDim.x)) return;
  for (int c = 0; c < count; ++c) {
    const bool maximum = last_is_maximum && c == count - 1;
    double value = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
      const double other = reduction.partial(c, k)[i];
      value = !maximum ? value + other : (other > value || other != other) ? other : value;
    }
    values[c] = maximum ? simt::block_max(value) : simt::block_sum(value);
  }
  if (threadIdx.x == 0) finish(values);
}

// A system takes part as long as it runs.
template <class State>
struct AcceptRunning {
  const State* states;
  __device__ __forceinline__ bool operator()(int64_t k) const { return states[k].running(); }
};

// --- incomplete Cholesky ---

// The rows of one level of L work = r, or (upper) of L' z = work, in place.
template <class State, class T, bool upper>
__global__ void triangular_level_kernel(const State* states, IncompleteCholesky<T> M, int32_t first, int32_t count,
                                        const T* r, T* work, T* z) {
  const int64_t k = blockIdx.y;
  if (states && !states[k].running()) return;
  const TriangularFactor<T> L = upper ? M.upper : M.lower;
  work += k * M.n;
  simt::grid_stride(count, [&](int64_t index) {
    const int64_t i = first + index;
    const int32_t begin = L.crow[i] + upper, end = L.crow[i + 1] - !upper;
    double sum = upper ? work[i] : r[k * M.n + M.rows[i]];
    for (int32_t entry = begin; entry < end; ++entry) sum -= double(L.values[entry]) * double(work[L.col[entry]]);
    const T value = static_cast<T>(sum * double(L.values[upper ? begin - 1 : end]));
    work[i] = value;
    if (upper) z[k * M.n + M.rows[i]] = value;
  });
}

template <class T>
std::vector<int32_t> host_levels(const Exec& exec, const IncompleteCholesky<T>& M) {
  std::vector<int32_t> pointers(static_cast<size_t>(M.levels + 1));
  simt::copy_to_host(pointers.data(), M.level_pointers, pointers.size() * sizeof(int32_t), exec.stream);
  return pointers;
}

// `levels`: the level pointers on the host.
template <class State, class T>
void launch_incomplete_cholesky(const Exec& exec, const State* states, const IncompleteCholesky<T>& M,
                                const std::vector<int32_t>& levels, int64_t batch, const T* r, T* work, T* z) {
  const auto launch = [&](auto kernel, int64_t level) {
    const int32_t first = levels[static_cast<size_t>(level)], count = levels[static_cast<size_t>(level + 1)] - first;
    const dim3 grid(simt::blocks_for(count, threads_per_block), static_cast<unsigned>(batch));
    SIMT_LAUNCH(kernel, grid, threads_per_block, 0, exec.stream, states, M, first, count, r, work, z);
  };
  for (int64_t level = 0; level < M.levels; ++level) launch(&triangular_level_kernel<State, T, false>, level);
  for (int64_t level = M.levels - 1; level >= 0; --level) launch(&triangular_level_kernel<State, T, true>, level);
}

}  // namespace kantor
