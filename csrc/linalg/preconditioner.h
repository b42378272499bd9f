// Preconditioners z = M r as the CG family sees them. Encoded like operators (operator.h), plus
//   incomplete Cholesky  layout [5, n, levels]
//     operands  L: crow, col, values; L': crow, col, values; level pointers (levels + 1); rows (n)
//   multigrid            layout [8, n, width, smoother, sweeps, levels, levels x LevelLayout]
//     operands  arena (uint8), workspace (uint8); elements of the cycle have `width` bytes, 4 or 8
#pragma once
#include <functional>
#include <variant>

#include "linalg/multigrid.h"
#include "linalg/operator.h"

namespace kantor {

template <class T>
struct TriangularFactor {
  const int32_t* crow;
  const int32_t* col;
  const T* values;
};

// M^-1 = L L'. The rows are stored level by level: those of one level depend on earlier levels only (in L; on later
// ones in L'), so they are solved in parallel, and the factor is read in storage order. `rows` tells which row of the
// matrix each stored row is. The diagonal is stored as its inverse, last in each row of L and first in each row of L'.
template <class T>
struct IncompleteCholesky {
  int64_t n, levels;
  TriangularFactor<T> lower, upper;
  const int32_t* level_pointers;
  const int32_t* rows;
};

// z = M r by calling back into Python: reads vector r, writes vector z.
using Callback = std::function<void()>;

// monostate: no preconditioner, z is r.
// The hierarchy in the precision of the cycle, and its workspace.
struct Multigrid {
  std::variant<Hierarchy<float>, Hierarchy<double>> hierarchy;
  void* workspace;
  int64_t n() const {
    return std::visit([](const auto& M) { return M.n(); }, hierarchy);
  }
};

template <class T>
using Preconditioner =
    std::variant<std::monostate, Diagonal<T>, IncompleteCholesky<T>, Operator<T>, Callback, Multigrid>;

// z = M r for one vector.
template <class T>
void apply_multigrid_cpu(Team& team, const Multigrid& M, const T* r, T* z) {
  std::visit([&]<class S>(const Hierarchy<S>& h) { multigrid_cpu(team, h, r, static_cast<S*>(M.workspace), z); },
             M.hierarchy);
}
template <class T>
void apply_multigrid_cuda(const Exec& exec, const Multigrid& M, const T* r, T* z) {
  std::visit([&]<class S>(const Hierarchy<S>& h) { multigrid_cuda(exec, h, r, static_cast<S*>(M.workspace), z); },
             M.hierarchy);
}

// z = (L L')^-1 r, level by level; `work` holds n elements and may not overlap r or z. 6 words a row beside the factor,
// which is read twice (lower and upper half).
template <class T>
int threads_of(const IncompleteCholesky<T>& M, int threads);  // how many of `threads` pay
template <class T>
void solve_incomplete_cholesky_cpu(Team& team, const IncompleteCholesky<T>& M, const T* r, T* work, T* z);
template <class T>
void solve_incomplete_cholesky_cuda(const Exec& exec, const IncompleteCholesky<T>& M, const T* r, T* work, T* z);

}  // namespace kantor
