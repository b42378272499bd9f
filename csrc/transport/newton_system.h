// The linear systems of Newton's method on the dual,
//     [ diag(R)  M       ] [xi  ]   [u]
//     [ M'       diag(C) ] [zeta] = [v],
// with M the plan without its small entries and R, C at least its row and column sums. With the sign of xi turned it is
// a diagonally dominant M-matrix: the Laplacian of the bipartite graph of the plan plus a nonnegative diagonal. It
// stays semidefinite whatever entries are left out, so conjugate gradients cannot meet negative curvature; the monitor
// counts.
//
// Two solvers. Where the plan is dense, CG on the Schur complement of the columns, S = diag(C) - M' diag(1/R) M, with a
// diagonal preconditioner: few iterations, one pass over M each. Where it is sparse and close to a forest, CG on the
// whole system with an approximate Cholesky factor of it.
#pragma once
#include <functional>
#include <vector>

#include "core/exec.h"
#include "linalg/approximate_cholesky.h"
#include "transport/passes.h"

namespace kantor::transport {

struct CgReport {
  int64_t iterations = 0;
  double relative_residual = 0;  // in the L1 norm
  bool met = false;
  int64_t negative_curvature = 0;
};

struct CgLimits {
  double rtol = 1e-2;
  int64_t max_iterations = 150;
};

// product(v, out): out = M' diag(1/R) M v.
using GramProduct = std::function<void(const double* v, double* out)>;

GramProduct gram_of(const SparsePlan& M, const std::vector<double>& R, int threads);

// zeta of S zeta = v; `diagonal` is C, `jacobi` what to precondition with.
CgReport solve_schur(const GramProduct& gram, const std::vector<double>& diagonal, const std::vector<double>& jacobi,
                     const std::vector<double>& v, const CgLimits& limits, std::vector<double>& zeta);

// The factor of the whole system, rows first.
ApproximateCholesky factor_plan(const SparsePlan& M, const std::vector<double>& R, const std::vector<double>& C);

// (xi, zeta) of the whole system; both hold the start.
CgReport solve_whole(const SparsePlan& M, const std::vector<double>& R, const std::vector<double>& C,
                     const ApproximateCholesky& factor, const std::vector<double>& u, const std::vector<double>& v,
                     const CgLimits& limits, int threads, std::vector<double>& xi, std::vector<double>& zeta);

// One step of the block iteration, zeta = (v - M' xi) / C, then xi = (u - M zeta) / R. The residual of CG is a sum over
// all points; this makes the unknowns of light ones exact too.
void block_step(const SparsePlan& M, const std::vector<double>& R, const std::vector<double>& C,
                const std::vector<double>& u, const std::vector<double>& v, std::vector<double>& xi,
                std::vector<double>& zeta);

}  // namespace kantor::transport
