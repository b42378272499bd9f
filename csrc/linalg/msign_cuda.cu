// One block a matrix, all of it in shared memory: reads B once, writes the result once.
#include "core/simt.h"
#include "linalg/msign.h"

namespace kantor {
namespace {

constexpr int side = 16, threads = side * side;  // a block, as a square of threads
constexpr int tile = 4;                          // a thread's share of a product is tile x tile, `side` apart

struct Steps {
  Quintic step[msign_most_steps];
  int count;
};

// C = beta D + alpha A op(B), rows x columns, inner length k; op(B) is B (k, columns), or B' of B (columns, k).
// Leading dimensions are odd, so that neither a row nor a column of a tile meets a bank twice.
template <bool transposed, class T>
__device__ void product(int rows, int columns, int k, const T* A, int lda, const T* B, int ldb, T alpha, T beta,
                        const T* D, T* C, int ldc) {
  const int ti = static_cast<int>(threadIdx.x) / side, tj = static_cast<int>(threadIdx.x) % side;
  KANTOR_KEEP_LOOP
  for (int i0 = ti; i0 < rows; i0 += tile * side) {
    KANTOR_KEEP_LOOP
    for (int j0 = tj; j0 < columns; j0 += tile * side) {
      T sum[tile][tile] = {};
      KANTOR_KEEP_LOOP
      for (int p = 0; p < k; ++p) {
        T a[tile], b[tile];
        KANTOR_UNROLL
        for (int q = 0; q < tile; ++q) {
          const int i = i0 + q * side, j = j0 + q * side;
          a[q] = i < rows ? A[i * lda + p] : T(0);
          b[q] = j < columns ? (transposed ? B[j * ldb + p] : B[p * ldb + j]) : T(0);
        }
        KANTOR_UNROLL
        for (int r = 0; r < tile; ++r) {
          KANTOR_UNROLL
          for (int c = 0; c < tile; ++c) sum[r][c] += a[r] * b[c];
        }
      }
      KANTOR_UNROLL
      for (int r = 0; r < tile; ++r) {
        KANTOR_UNROLL
        for (int c = 0; c < tile; ++c) {
          const int i = i0 + r * side, j = j0 + c * side;
          if (i < rows && j < columns) C[i * ldc + j] = (D ? beta * D[i * ldc + j] : T(0)) + alpha * sum[r][c];
        }
      }
    }
  }
}

template <class T>
__global__ void msign_kernel(int rows, int columns, const T* B, double safety, Steps steps, T* out) {
  SIMT_DYNAMIC_SHARED(T, shared);
  const int ld = columns | 1, lda = rows | 1, size = rows * columns;
  T* X = shared;
  T* next = X + rows * ld;
  T* A = next + rows * ld;
  T* P = A + rows * lda;
  B += static_cast<int64_t>(blockIdx.x) * size;
  out += static_cast<int64_t>(blockIdx.x) * size;
  double square = 0;
  for (int e = static_cast<int>(threadIdx.x); e < size; e += threads) {
    const T value = B[e];
    X[e / columns * ld + e % columns] = value;
    square += double(value) * double(value);
  }
  square = simt::block_sum(square);
  const double scale = square > 0 ? 1 / (safety * sqrt(square)) : 0.0;
  for (int e = static_cast<int>(threadIdx.x); e < size; e += threads) {
    T& x = X[e / columns * ld + e % columns];
    x = static_cast<T>(scale * double(x));
  }
  __syncthreads();
  KANTOR_KEEP_LOOP
  for (int s = 0; s < steps.count; ++s) {
    const T a = static_cast<T>(steps.step[s].a), b = static_cast<T>(steps.step[s].b);
    const T c = static_cast<T>(steps.step[s].c);
    product<true, T>(rows, rows, columns, X, ld, X, ld, T(1), T(0), nullptr, A, lda);
    __syncthreads();
    product<false, T>(rows, rows, rows, A, lda, A, lda, c, b, A, P, lda);
    __syncthreads();
    product<false, T>(rows, columns, rows, P, lda, X, ld, T(1), a, X, next, ld);
    __syncthreads();
    T* const last = X;
    X = next;
    next = last;
  }
  for (int e = static_cast<int>(threadIdx.x); e < size; e += threads) out[e] = X[e / columns * ld + e % columns];
}

}  // namespace

template <class T>
void msign_cuda(const Exec& exec, int64_t count, int64_t rows, int64_t columns, const T* B, double safety,
                std::span<const Quintic> steps, T* out) {
  const simt::DeviceGuard guard(exec.device);
  Steps by_value{};
  by_value.count = static_cast<int>(steps.size());
  for (size_t s = 0; s < steps.size(); ++s) by_value.step[s] = steps[s];
  const int64_t elements = 2 * rows * ((columns | 1) + (rows | 1));
  SIMT_LAUNCH(msign_kernel<T>, static_cast<unsigned>(count), threads, static_cast<size_t>(elements) * sizeof(T),
              exec.stream, static_cast<int>(rows), static_cast<int>(columns), B, safety, by_value, out);
}

template void msign_cuda(const Exec&, int64_t, int64_t, int64_t, const float*, double, std::span<const Quintic>,
                         float*);
template void msign_cuda(const Exec&, int64_t, int64_t, int64_t, const double*, double, std::span<const Quintic>,
                         double*);

}  // namespace kantor
