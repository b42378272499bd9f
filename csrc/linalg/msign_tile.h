// The polar iteration of one small matrix for one instruction set. The file that includes this defines KANTOR_TARGET,
// the target attribute of every function, and a struct with the vector operations:
//   Element, Vector, lanes; load, store, broadcast, fma(a, b, c)
#pragma once
#include <cstring>
#include <utility>

#include "linalg/msign.h"

#define KANTOR_INLINE inline __attribute__((always_inline)) KANTOR_TARGET

namespace kantor {
namespace {

// R rows and V vectors of C = beta D + alpha A B, where A has k columns. Row-major, `lda` and `ld` elements a row.
template <class Isa, int R, int V>
KANTOR_INLINE void product_tile(int64_t k, const typename Isa::Element* A, int64_t lda, const typename Isa::Element* B,
                                typename Isa::Element alpha, typename Isa::Element beta, const typename Isa::Element* D,
                                typename Isa::Element* C, int64_t ld) {
  typename Isa::Vector sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = Isa::broadcast(0);
  for (int64_t p = 0; p < k; ++p, ++A, B += ld) {
    typename Isa::Vector b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = Isa::load(B + v * Isa::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto a = Isa::broadcast(A[r * lda]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = Isa::fma(a, b[v], sum[r][v]);
    }
  }
  const auto outer = Isa::broadcast(alpha), own = Isa::broadcast(beta);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const int64_t at = r * ld + v * Isa::lanes;
      sum[r][v] = outer * sum[r][v];
      Isa::store(C + at, D ? Isa::fma(own, Isa::load(D + at), sum[r][v]) : sum[r][v]);
    }
}

// C = beta D + alpha A B of `rows` rows and `ld` columns, a multiple of the lanes. Of a symmetric C what lies left of
// the tiles on the diagonal is mirrored.
template <class Isa, int V>
KANTOR_INLINE void product_columns(int64_t rows, int64_t k, const typename Isa::Element* A, int64_t lda,
                                   const typename Isa::Element* B, typename Isa::Element alpha,
                                   typename Isa::Element beta, const typename Isa::Element* D, typename Isa::Element* C,
                                   int64_t ld) {
  int64_t i = 0;
  for (; i + Isa::rows <= rows; i += Isa::rows)
    product_tile<Isa, Isa::rows, V>(k, A + i * lda, lda, B, alpha, beta, D ? D + i * ld : D, C + i * ld, ld);
  for (; i < rows; ++i)
    product_tile<Isa, 1, V>(k, A + i * lda, lda, B, alpha, beta, D ? D + i * ld : D, C + i * ld, ld);
}

template <class Isa, bool symmetric>
KANTOR_TARGET void product(int64_t rows, int64_t k, const typename Isa::Element* A, int64_t lda,
                           const typename Isa::Element* B, typename Isa::Element alpha, typename Isa::Element beta,
                           const typename Isa::Element* D, typename Isa::Element* C, int64_t ld) {
  constexpr int64_t wide = 2 * Isa::lanes;
  int64_t j = 0;
  for (; j < ld; j += wide) {
    const bool two = j + wide <= ld;
    const int64_t height = symmetric ? std::min<int64_t>(rows, j + wide) : rows;
    if (two)
      product_columns<Isa, 2>(height, k, A, lda, B + j, alpha, beta, D ? D + j : D, C + j, ld);
    else
      product_columns<Isa, 1>(height, k, A, lda, B + j, alpha, beta, D ? D + j : D, C + j, ld);
  }
  if constexpr (symmetric)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < i / wide * wide; ++c) C[i * ld + c] = C[c * ld + i];
}

template <class Isa>
KANTOR_TARGET void msign_one(int64_t rows, int64_t columns, const typename Isa::Element* B, double scale,
                             std::span<const Quintic> steps, typename Isa::Element* work, typename Isa::Element* out) {
  using T = typename Isa::Element;
  const int64_t ld = (columns + Isa::lanes - 1) / Isa::lanes * Isa::lanes;
  const int64_t lda = (rows + Isa::lanes - 1) / Isa::lanes * Isa::lanes;
  T* X = work;
  T* next = X + rows * ld;
  T* transposed = next + rows * ld;  // (columns, lda)
  T* A = transposed + columns * lda;
  T* P = A + rows * lda;
  std::memset(work, 0, sizeof(T) * static_cast<size_t>(2 * rows * ld + columns * lda + 2 * rows * lda));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) X[i * ld + j] = static_cast<T>(scale * double(B[i * columns + j]));
  for (const Quintic& q : steps) {
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) transposed[j * lda + i] = X[i * ld + j];
    product<Isa, true>(rows, columns, X, ld, transposed, T(1), T(0), nullptr, A, lda);
    product<Isa, true>(rows, rows, A, lda, A, T(q.c), T(q.b), A, P, lda);
    product<Isa, false>(rows, rows, P, lda, X, T(1), T(q.a), X, next, ld);
    std::swap(X, next);
  }
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(out + i * columns, X + i * ld, sizeof(T) * static_cast<size_t>(columns));
}

}  // namespace
}  // namespace kantor
