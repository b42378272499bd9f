// Device side of the linear operators: rows of products, and kernels that apply an operator to a batch of vectors.
// Included by the .cu files; compiled by nvcc, and by the host compiler for the emulator.
#pragma once
#include <algorithm>
#include <type_traits>

#include "core/simt.h"
#include "linalg/low_rank_kernels.h"
#include "linalg/operator.h"

namespace kantor {

inline constexpr unsigned threads_per_block = 256;

// --- row i of A x, computed in Out, by one thread ---

template <class Out, class T>
__device__ __forceinline__ Out row_product(const Dense<T>& A, const T* x, int64_t i) {
  Out sum = 0;
  for (int64_t j = 0; j < A.cols; ++j) sum += Out(A.values[i * A.cols + j]) * Out(x[j]);
  return sum;
}

template <class Out, class T, class Index>
__device__ __forceinline__ Out row_product(const Csr<T, Index>& A, const T* x, int64_t i) {
  Out sum = 0;
  for (Index k = A.crow[i]; k < A.crow[i + 1]; ++k) sum += Out(A.values[k]) * Out(x[A.col[k]]);
  return sum;
}

// The difference towards the neighbour `offset` away, for one side of one axis.
template <class Out, class T>
__device__ __forceinline__ Out difference(const T* x, int64_t i, int64_t offset, bool inside, bool neumann) {
  const Out here = x[i];
  return here - (inside ? Out(x[i + offset]) : neumann ? here : Out(0));
}

template <class Out, class T>
__device__ __forceinline__ Out row_product(const Stencil<T>& A, const T* x, int64_t i) {
  const int64_t line = i / A.nx, ix = i - line * A.nx, iz = line / A.ny, iy = line - iz * A.ny, plane = A.ny * A.nx;
  const Out dz =
      difference<Out>(x, i, -plane, iz > 0, A.neumann_z) + difference<Out>(x, i, plane, iz + 1 < A.nz, A.neumann_z);
  const Out dy =
      difference<Out>(x, i, -A.nx, iy > 0, A.neumann_y) + difference<Out>(x, i, A.nx, iy + 1 < A.ny, A.neumann_y);
  const Out dx = difference<Out>(x, i, -1, ix > 0, A.neumann_x) + difference<Out>(x, i, 1, ix + 1 < A.nx, A.neumann_x);
  return Out(A.weights[0]) * Out(x[i]) + Out(A.weights[1]) * dz + Out(A.weights[2]) * dy + Out(A.weights[3]) * dx;
}

template <class Out, class T>
__device__ __forceinline__ Out row_product(const FaceStencil<T>& A, const T* x, int64_t i) {
  const int64_t line = i / A.nx, ix = i - line * A.nx, iz = line / A.ny, iy = line - iz * A.ny, plane = A.ny * A.nx;
  const T* fz = A.fz + i;
  const T* fx = A.fx + line * (A.nx + 1) + ix;
  Out sum = Out(*A.shift) * Out(x[i]);
  sum += Out(fz[0]) * difference<Out>(x, i, -plane, iz > 0, false);
  sum += Out(fz[plane]) * difference<Out>(x, i, plane, iz + 1 < A.nz, false);
  if (A.fy) {
    const T* fy = A.fy + (iz * (A.ny + 1) + iy) * A.nx + ix;
    sum += Out(fy[0]) * difference<Out>(x, i, -A.nx, iy > 0, false);
    sum += Out(fy[A.nx]) * difference<Out>(x, i, A.nx, iy + 1 < A.ny, false);
  }
  sum += Out(fx[0]) * difference<Out>(x, i, -1, ix > 0, false);
  sum += Out(fx[1]) * difference<Out>(x, i, 1, ix + 1 < A.nx, false);
  return sum;
}

template <class Out, class T>
__device__ __forceinline__ Out row_product(const Poisson<T>& A, const T* x, int64_t i) {
  const int64_t plane = A.ny * A.nx;
  const unsigned cell = A.cells[i];
  const auto linked = [&](unsigned bit, int64_t offset) { return cell & bit ? Out(x[i + offset]) : Out(0); };
  const Out sum_z = linked(1, -plane) + linked(2, plane);
  const Out sum_y = linked(4, -A.nx) + linked(8, A.nx);
  const Out sum_x = linked(16, -1) + linked(32, 1);
  return (cell >> 8 ? Out(int(cell >> 8)) * Out(x[i]) : Out(0)) - (sum_x + (sum_y + sum_z));
}

template <class Out, class T>
__device__ __forceinline__ Out row_product(const Diagonal<T>& A, const T* x, int64_t i) {
  return Out(A.values[i]) * Out(x[i]);
}

// --- row i of A x by `lanes` neighbouring threads, for long rows; all of them get the sum ---

template <unsigned lanes, class T>
__device__ __forceinline__ T lanes_sum(T value) {
  for (unsigned distance = lanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(simt::full_warp, value, distance);
  return value;
}

template <unsigned lanes, class T>
__device__ __forceinline__ T shared_row_product(const Dense<T>& A, const T* x, int64_t i, unsigned lane) {
  T sum = 0;
  if (i < A.rows)
    for (int64_t j = lane; j < A.cols; j += lanes) sum += A.values[i * A.cols + j] * x[j];
  return lanes_sum<lanes>(sum);
}

template <unsigned lanes, class T, class Index>
__device__ __forceinline__ T shared_row_product(const Csr<T, Index>& A, const T* x, int64_t i, unsigned lane) {
  T sum = 0;
  if (i < A.rows)
    for (Index k = A.crow[i] + static_cast<Index>(lane); k < A.crow[i + 1]; k += lanes)
      sum += A.values[k] * x[A.col[k]];
  return lanes_sum<lanes>(sum);
}

// y (+)= scale A x for vector blockIdx.y of the batch. `Accept` says whether that vector takes part; `Consume` gets
// (row, value) from the one thread that owns a row, e.g. to form dot products, and runs once more per thread at the
// end.
template <unsigned lanes, class Form, class T, class Accept, class Consume>
__global__ void apply_kernel(Form A, double scale, const T* x, T* y, int64_t rows, int64_t cols, bool accumulate,
                             Accept accept, Consume consume) {
  const int64_t k = blockIdx.y;
  if (!accept(k)) return;
  x += k * cols;
  y += k * rows;
  A = form_for_vector(A, k);
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
  const unsigned lane = threadIdx.x % lanes;
  const auto finish_row = [&](int64_t i, T product) {
    const T value = static_cast<T>(scale) * product + (accumulate ? y[i] : T(0));
    y[i] = value;
    consume.row(k, i, value);
  };
  if constexpr (lanes == 1) {
    for (int64_t i = simt::global_thread_index(); i < rows; i += threads) finish_row(i, row_product<T>(A, x, i));
  } else {
    // Every thread of a warp goes through the same number of steps: the shuffles need all lanes.
    const int64_t groups = threads / lanes, steps = (rows + groups - 1) / groups;
    int64_t i = simt::global_thread_index() / lanes;
    for (int64_t step = 0; step < steps; ++step, i += groups) {
      const T product = shared_row_product<lanes>(A, x, i, lane);
      if (lane == 0 && i < rows) finish_row(i, product);
    }
  }
  consume.done(k);
}

struct AcceptAll {
  __device__ __forceinline__ bool operator()(int64_t) const { return true; }
};
struct ConsumeNothing {
  template <class T>
  __device__ __forceinline__ void row(int64_t, int64_t, T) {}
  __device__ __forceinline__ void done(int64_t) {}
};

// Blocks for n elements of each of `batch` vectors: enough to fill the device, few enough that partial sums stay short.
inline unsigned blocks_per_vector(const Exec& exec, int64_t n, int64_t batch) {
  const int64_t wanted = 8 * int64_t(simt::sm_count(exec.device));
  const int64_t most = std::clamp<int64_t>((wanted + batch - 1) / std::max<int64_t>(batch, 1), 1, 1024);
  return simt::blocks_for(n, threads_per_block, static_cast<unsigned>(most));
}

// Batches go through blockIdx.y, which CUDA limits to 65535: f(first, count) for every slice of the batch.
template <class F>
void for_each_slice(int64_t batch, F&& f) {
  constexpr int64_t slice = 65535;
  for (int64_t first = 0; first < batch; first += slice) f(first, std::min(slice, batch - first));
}

// One term; the number of threads that share a row grows with its length.
template <class Form, class T, class Accept, class Consume>
void launch_term(const Exec& exec, const Form& A, double scale, int64_t rows, int64_t cols, int64_t batch,
                 unsigned blocks, const T* x, T* y, bool accumulate, Accept accept, Consume consume) {
  const dim3 grid(blocks, static_cast<unsigned>(batch));
  double entries = 1;
  if constexpr (std::is_same_v<Form, Dense<T>>) entries = double(cols);
  if constexpr (requires { A.nnz; }) entries = double(A.nnz) / double(std::max<int64_t>(rows, 1));
  if constexpr (std::is_same_v<Form, Dense<T>> || requires { A.nnz; }) {
    if (entries > 16)
      return SIMT_LAUNCH((apply_kernel<32, Form, T, Accept, Consume>), grid, threads_per_block, 0, exec.stream, A,
                         scale, x, y, rows, cols, accumulate, accept, consume);
    if (entries > 3)
      return SIMT_LAUNCH((apply_kernel<4, Form, T, Accept, Consume>), grid, threads_per_block, 0, exec.stream, A, scale,
                         x, y, rows, cols, accumulate, accept, consume);
  }
  SIMT_LAUNCH((apply_kernel<1, Form, T, Accept, Consume>), grid, threads_per_block, 0, exec.stream, A, scale, x, y,
              rows, cols, accumulate, accept, consume);
}

// What the low-rank terms need of x, before any row; at most 65535 vectors.
template <class T, class Accept>
void launch_projections(const Exec& exec, const Operator<T>& A, int64_t batch, const T* x, Accept accept) {
  for (const OperatorTerm<T>& term : A.terms)
    if (const auto* low = std::get_if<LowRank<T>>(&term.form)) launch_projections(exec.stream, *low, batch, x, accept);
}

// y = A x, at most 65535 vectors; `consume` sees the finished values of y.
template <class T, class Accept, class Consume>
void launch_apply(const Exec& exec, const Operator<T>& A, int64_t batch, unsigned blocks, const T* x, T* y,
                  Accept accept, Consume consume) {
  launch_projections(exec, A, batch, x, accept);
  for (size_t t = 0; t < A.terms.size(); ++t) {
    const OperatorTerm<T>& term = A.terms[t];
    std::visit(
        [&](const auto& form) {
          if (t + 1 < A.terms.size())
            launch_term(exec, form, term.scale, A.rows, A.cols, batch, blocks, x, y, t > 0, accept, ConsumeNothing{});
          else
            launch_term(exec, form, term.scale, A.rows, A.cols, batch, blocks, x, y, t > 0, accept, consume);
        },
        term.form);
  }
}

}  // namespace kantor
