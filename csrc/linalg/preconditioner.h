// Preconditioners z = M r as the CG family sees them. Encoded like operators (operator.h), plus
//   incomplete Cholesky  layout [5, n, levels_forward, levels_backward]
//     operands L: crow, col, values; L': crow, col, values; forward levels: pointers, rows; backward levels: pointers, rows
#pragma once
#include <functional>
#include <variant>

#include "linalg/operator.h"

namespace kantor {

// A triangular factor with its level schedule: rows of one level depend on earlier levels only.
template <class T>
struct TriangularFactor {
  const int32_t* crow;
  const int32_t* col;
  const T* values;
  int64_t levels;
  const int32_t* level_pointers;  // host or device memory, like the rest
  const int32_t* level_rows;
};

// M^-1 = L L' with the diagonal stored last in each row of L and first in each row of L'.
template <class T>
struct IncompleteCholesky {
  int64_t n;
  TriangularFactor<T> lower, upper;
};

// z = M r by calling back into Python: reads vector r, writes vector z.
using Callback = std::function<void()>;

// monostate: no preconditioner, z is r.
template <class T>
using Preconditioner = std::variant<std::monostate, Diagonal<T>, IncompleteCholesky<T>, Operator<T>, Callback>;

// z = (L L')^-1 r, level by level; L is read twice (nnz words and indices each), r, z: 4 words a row.
template <class T>
void solve_incomplete_cholesky_cpu(const Exec& exec, const IncompleteCholesky<T>& M, const T* r, T* z);
template <class T>
void solve_incomplete_cholesky_cuda(const Exec& exec, const IncompleteCholesky<T>& M, const T* r, T* z);

}  // namespace kantor
