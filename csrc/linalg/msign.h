// The orthogonal factor of a polar decomposition, msign(B) = U V' of B = U S V', for batches of small matrices: an odd
// quintic polynomial of the singular values, several times (Jordan et al. 2024; Amsel et al., arXiv 2505.16932):
//   X_0 = B / (safety |B|_F),   A = X X',   X <- a X + (b A + c A^2) X
// with rows <= columns. A step is 2 r^2 c (half of it, by symmetry, is not needed), r^2 r (likewise) and 2 r^2 c
// operations on data that stays in the cache of one core, or in the shared memory of one block.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "core/exec.h"

namespace kantor {

struct Quintic {
  double a, b, c;
};

inline constexpr int64_t msign_most_rows = 64, msign_most_steps = 32;
// Of two copies of X, A and a polynomial of it: the shared memory of one block, and on the CPU the cache of one core,
// within which one thread is faster than a library's products (64 x 256, float32: 3.7 times).
inline constexpr int64_t msign_most_elements_cuda = 24576, msign_most_elements_cpu = 65536;

// Whether a matrix of r <= c is small enough.
inline bool msign_is_small(int64_t rows, int64_t columns, bool cuda) {
  const int64_t most = cuda ? msign_most_elements_cuda : msign_most_elements_cpu;
  return rows <= msign_most_rows && 2 * rows * (columns + rows) <= most;
}

// out[k] = msign(B[k]) for `count` matrices (rows, columns), rows <= columns; out may be B. A zero matrix stays zero.
template <class T>
void msign_cpu(const Exec& exec, int64_t count, int64_t rows, int64_t columns, const T* B, double safety,
               std::span<const Quintic> steps, T* out);
template <class T>
void msign_cuda(const Exec& exec, int64_t count, int64_t rows, int64_t columns, const T* B, double safety,
                std::span<const Quintic> steps, T* out);

// One matrix, in the instruction set of the file that defines it; `work` has msign_work() elements, aligned.
template <class T>
using MsignFunction = void (*)(int64_t rows, int64_t columns, const T* B, double scale, std::span<const Quintic> steps,
                               T* work, T* out);
template <class T>
MsignFunction<T> msign_plain();
template <class T>
MsignFunction<T> msign_avx2();
template <class T>
MsignFunction<T> msign_avx512();

}  // namespace kantor
