// AdaHessian on CUDA: a launch for each pass, and a block of threads for each chunk of the table, which lies in device
// memory. Nothing waits for the device.
#include "core/simt.h"
#include "optim/adahessian.h"

namespace kantor {
namespace {

constexpr unsigned threads_per_block = 256;
constexpr int64_t short_block = 32, long_block = 1024;  // a thread, a warp, or all threads add up a block of elements

template <class T>
__global__ void rademacher_kernel(TensorTable table, uint64_t seed) {
  constexpr int calls = chunk_size / probes_per_call;
  SIMT_SHARED(uint32_t, words, 4 * calls);
  const TableRow& row = table.row_of(blockIdx.x);
  const Chunk chunk = chunk_of(row, blockIdx.x);
  if (threadIdx.x < calls) {
    const Philox bits = probe_bits(seed, row, chunk.begin / probes_per_call + threadIdx.x);
    KANTOR_UNROLL for (int lane = 0; lane < 4; ++lane) words[4 * threadIdx.x + lane] = bits.lane[lane];
  }
  __syncthreads();
  T* const z = row.list<T>(0) + chunk.begin;
  for (int64_t i = threadIdx.x; i < chunk.size; i += blockDim.x) z[i] = (words[i / 32] >> (i % 32)) & 1u ? T(-1) : T(1);
}

// The sums are formed in double, in the same order in every run.
template <class T>
__global__ void average_curvature_kernel(TensorTable table) {
  const TableRow& row = table.row_of(blockIdx.x);
  const Chunk chunk = chunk_of(row, blockIdx.x);
  const T* const u = row.list<const T>(0) + chunk.begin;
  T* const v = row.list<T>(1) + chunk.begin / row.block;
  const T beta2 = static_cast<T>(row.number[0]), rest = static_cast<T>(row.number[1]);
  const double scale = row.number[2] / static_cast<double>(row.block);
  const int64_t blocks = chunk.size / row.block;
  const auto store = [&](int64_t q, double sum) {
    const T mean = static_cast<T>(sum * scale);
    v[q] = beta2 * v[q] + rest * mean * mean;
  };
  const auto sum_of = [&](int64_t q, int64_t first, int64_t stride) {
    double sum = 0;
    for (int64_t j = first; j < row.block; j += stride) sum += std::abs(static_cast<double>(u[q * row.block + j]));
    return sum;
  };
  if (row.block <= short_block) {
    for (int64_t q = threadIdx.x; q < blocks; q += blockDim.x) store(q, sum_of(q, 0, 1));
  } else if (row.block <= long_block) {
    for (int64_t q = simt::warp_index(); q < blocks; q += blockDim.x / 32) {
      const double sum = simt::warp_sum(sum_of(q, simt::lane_index(), 32));
      if (simt::lane_index() == 0) store(q, sum);
    }
  } else {
    for (int64_t q = 0; q < blocks; ++q) {
      const double sum = simt::block_sum(sum_of(q, threadIdx.x, blockDim.x));
      if (threadIdx.x == 0) store(q, sum);
    }
  }
}

template <class T>
__global__ void step_kernel(TensorTable table) {
  const TableRow& row = table.row_of(blockIdx.x);
  const Chunk chunk = chunk_of(row, blockIdx.x);
  const Step<T> step(row.number);
  const T *const g = row.list<const T>(1), *const v = row.list<const T>(3);
  T *const theta = row.list<T>(0), *const m = row.list<T>(2);
  for (int64_t i = chunk.begin + threadIdx.x; i < chunk.begin + chunk.size; i += blockDim.x) {
    T moment = m[i], value = theta[i];
    step.move(step.denominator(v[row.block == 1 ? i : i / row.block]), g[i], moment, value);
    m[i] = moment;
    theta[i] = value;
  }
}

}  // namespace

template <class T>
void rademacher_cuda(const Exec& exec, const TensorTable& table, uint64_t seed) {
  const simt::DeviceGuard guard(exec.device);
  SIMT_LAUNCH(rademacher_kernel<T>, static_cast<unsigned>(table.chunks), threads_per_block, 0, exec.stream, table,
              seed);
}

template <class T>
void average_curvature_cuda(const Exec& exec, const TensorTable& table) {
  const simt::DeviceGuard guard(exec.device);
  SIMT_LAUNCH(average_curvature_kernel<T>, static_cast<unsigned>(table.chunks), threads_per_block, 0, exec.stream,
              table);
}

template <class T>
void adahessian_step_cuda(const Exec& exec, const TensorTable& table) {
  const simt::DeviceGuard guard(exec.device);
  SIMT_LAUNCH(step_kernel<T>, static_cast<unsigned>(table.chunks), threads_per_block, 0, exec.stream, table);
}

#define KANTOR_INSTANTIATE(T)                                                  \
  template void rademacher_cuda<T>(const Exec&, const TensorTable&, uint64_t); \
  template void average_curvature_cuda<T>(const Exec&, const TensorTable&);    \
  template void adahessian_step_cuda<T>(const Exec&, const TensorTable&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
