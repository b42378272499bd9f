// What the conjugate gradient family (cg_cuda.cu, capped_cg_cuda.cu) shares on CUDA: reductions whose last block runs
// the scalar recurrence, so that nothing waits for the device between two polls, and the preconditioner.
#pragma once
#include <vector>

#include "core/all_reduce.h"
#include "linalg/cg.h"
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

// What follows a reduction: `Recurrence`, a struct with a number `count` of totals and a function
// apply(shared, k, totals). At once where this process is alone; else the totals go to `shared.rank_sums`, and the
// recurrence runs in a kernel of its own behind the sum over the ranks.
template <class Recurrence, class Shared, int count>
__device__ __forceinline__ void conclude(const Shared& shared, int64_t k, double (&totals)[count]) {
  static_assert(count == Recurrence::count);
  if (!shared.rank_sums) return Recurrence::apply(shared, k, totals);
  for (int c = 0; c < count; ++c) shared.rank_sums[c * shared.reduction.batch + k] = totals[c];
}

template <class Recurrence, class Shared>
__global__ void recurrence_kernel(Shared shared) {
  simt::grid_stride(shared.reduction.batch, [&](int64_t k) {
    double totals[Recurrence::count];
    for (int c = 0; c < Recurrence::count; ++c) totals[c] = shared.rank_sums[c * shared.reduction.batch + k];
    Recurrence::apply(shared, k, totals);
  });
}

// Behind a kernel that concludes with `Recurrence`.
template <class Recurrence, class Shared>
void share_totals(const Exec& exec, const AllReduce& all_reduce, const Shared& shared) {
  if (!all_reduce) return;
  all_reduce.call(Recurrence::count * shared.reduction.batch);
  const dim3 grid(simt::blocks_for(shared.reduction.batch, threads_per_block));
  SIMT_LAUNCH((recurrence_kernel<Recurrence, Shared>), grid, threads_per_block, 0, exec.stream, shared);
}

// What any rank asks for; all ranks look at the same iterations.
inline CgStatus wish_of_ranks(const Exec& exec, const AllReduce& all_reduce, CgStatus mine) {
  if (!all_reduce) return mine;
  double wishes[rank_wishes] = {double(mine == CgStatus::interrupted), double(mine == CgStatus::stopped)};
  simt::copy_to_device(all_reduce.sums, wishes, sizeof(wishes), exec.stream);
  all_reduce.call(rank_wishes);
  simt::copy_to_host(wishes, all_reduce.sums, sizeof(wishes), exec.stream);
  return wishes[0] > 0 ? CgStatus::interrupted : wishes[1] > 0 ? CgStatus::stopped : CgStatus::running;
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
