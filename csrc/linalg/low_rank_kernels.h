// Device side of low_rank.h: the projections of a batch of vectors, the same partial sums as on the CPU, and the rows
// that they give. Included by operator_kernels.h.
#pragma once
#include <algorithm>

#include "core/simt.h"
#include "linalg/low_rank.h"

namespace kantor {

inline constexpr unsigned low_rank_threads = 256;  // eight warps

// The view of vector k: its projections first. Other forms have nothing of their own for each vector.
template <class Form>
__device__ __forceinline__ Form form_for_vector(const Form& A, int64_t) {
  return A;
}
template <class T>
__device__ __forceinline__ LowRank<T> form_for_vector(LowRank<T> A, int64_t k) {
  A.projections = A.projections_of(k);
  return A;
}

// Row i, computed in double whatever Out is, by one thread.
template <class Out, class T>
__device__ __forceinline__ Out row_product(const LowRank<T>& A, const T*, int64_t i) {
  if (A.reads_once()) return static_cast<Out>(A.projections[i]);
  double sum = 0;
  for (int64_t j = 0; j < A.rank; ++j) sum += A.projections[j] * double(A.factors[j * A.n + i]);
  return static_cast<Out>(sum);
}

// Few columns. Block (piece, k): y = sum over the factors of the piece of w_j (f_j . x) f_j, eight at a time: a warp
// forms one product f_j . x, then each thread adds up its columns, from cache.
template <class T, class Accept>
__global__ void product_of_factors_kernel(LowRank<T> A, int64_t length, const T* x, Accept accept) {
  constexpr int warps = low_rank_threads / 32;
  SIMT_SHARED(double, c, warps);
  SIMT_DYNAMIC_SHARED(double, y);
  const int64_t k = blockIdx.y, n = A.n, begin = blockIdx.x * length;
  const int64_t end = begin + length < A.rank ? begin + length : A.rank;
  if (!accept(k)) return;
  x += k * n;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) y[i] = 0;
  for (int64_t first = begin; first < end; first += warps) {
    const int64_t j = first + simt::warp_index();
    double sum = 0;
    if (j < end)
      for (int64_t i = simt::lane_index(); i < n; i += 32) sum += double(A.factors[j * n + i]) * double(x[i]);
    sum = simt::warp_sum(sum);
    if (simt::lane_index() == 0) c[simt::warp_index()] = j < end ? double(A.weights[j]) * sum : 0.0;
    __syncthreads();
    const int64_t count = end - first < warps ? end - first : warps;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      double value = y[i];
      for (int64_t m = 0; m < count; ++m) value += c[m] * double(A.factors[(first + m) * n + i]);
      y[i] = value;
    }
    __syncthreads();
  }
  double* partial = A.partial_of(k, blockIdx.x);
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) partial[i] = y[i];
}

// Many columns. Block (piece, k, j): f_j . x over the piece.
template <class T, class Accept>
__global__ void partial_dots_kernel(LowRank<T> A, int64_t length, const T* x, Accept accept) {
  const int64_t k = blockIdx.y, n = A.n, begin = blockIdx.x * length;
  const int64_t end = begin + length < n ? begin + length : n;
  if (!accept(k)) return;
  x += k * n;
  double* partial = A.partial_of(k, blockIdx.x);
  for (int64_t j = blockIdx.z; j < A.rank; j += gridDim.z) {
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) sum += double(A.factors[j * n + i]) * double(x[i]);
    sum = simt::block_sum(sum);
    if (threadIdx.x == 0) partial[j] = sum;
  }
}

// The sum over the pieces, and the weights where they are still missing.
template <class T, class Accept>
__global__ void sum_projections_kernel(LowRank<T> A, int64_t pieces, Accept accept) {
  const int64_t k = blockIdx.y, count = A.values();
  if (!accept(k)) return;
  double* values = A.projections_of(k);
  simt::grid_stride(count, [&](int64_t i) {
    double sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += values[(1 + piece) * count + i];
    values[i] = A.reads_once() ? sum : sum * double(A.weights[i]);
  });
}

// At most 65535 vectors.
template <class T, class Accept>
void launch_projections(simt::Stream stream, const LowRank<T>& A, int64_t batch, const T* x, Accept accept) {
  const Chunks pieces = A.pieces();
  const auto vectors = static_cast<unsigned>(batch), parts = static_cast<unsigned>(pieces.count());
  if (A.reads_once()) {
    SIMT_LAUNCH((product_of_factors_kernel<T, Accept>), dim3(parts, vectors), low_rank_threads,
                static_cast<size_t>(A.n) * sizeof(double), stream, A, pieces.length, x, accept);
  } else {
    const auto factors = static_cast<unsigned>(std::min<int64_t>(A.rank, 65535));
    SIMT_LAUNCH((partial_dots_kernel<T, Accept>), dim3(parts, vectors, factors), low_rank_threads, 0, stream, A,
                pieces.length, x, accept);
  }
  SIMT_LAUNCH((sum_projections_kernel<T, Accept>), dim3(simt::blocks_for(A.values(), low_rank_threads, 1024), vectors),
              low_rank_threads, 0, stream, A, pieces.count(), accept);
}

}  // namespace kantor
