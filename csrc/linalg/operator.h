// Linear operators as kernels see them: y = sum_t scale_t * A_t x, each A_t one of the forms below. Borrowed pointers
// only.
//
// One encoding carries an operator through torch (python/kantor/linalg/_operator.py writes it, bind/linalg.cpp reads
// it): `layout`, a list of integers, `scales`, one double a term, and `operands`, the tensors. Per term:
//   dense     layout [0, rows, cols]                    operands A (rows, cols)
//   csr       layout [1, rows, cols, halo]              operands crow (rows+1), col (nnz), values (nnz)
//   stencil   layout [2, nz, ny, nx, bz, by, bx]        operands weights (shift, wz, wy, wx); b*: 0 Dirichlet, 1
//   Neumann faces     layout [3, nz, ny, nx, dims]              operands shift (1), fz, [fy when dims = 3,] fx diagonal
//   layout [4, n]                             operands d (n)
//   low rank  layout [6, n, rank]                       operands factors (rank, n), weights (rank): F' diag(w) F
//   poisson   layout [7, nz, ny, nx]                    operands cells (n, 2), uint8: links, diagonal
// A two-dimensional grid (ny, nx) is passed as (nz, ny, nx) = (ny, 1, nx).
#pragma once
#include <algorithm>
#include <cstdint>
#include <variant>
#include <vector>

#include "core/exec.h"
#include "core/hd.h"
#include "core/parallel.h"
#include "linalg/low_rank.h"

namespace kantor {

enum class OperatorKind : int64_t {
  dense = 0,
  csr = 1,
  stencil = 2,
  faces = 3,
  diagonal = 4,
  incomplete_cholesky = 5,
  low_rank = 6,
  poisson = 7,
  multigrid = 8,
};

template <class T>
struct Dense {
  int64_t rows, cols;
  const T* values;
};

// Rows are sorted by column; `halo` is the bandwidth max |i - j| (used only to order the work, see cg_cpu.cpp).
template <class T, class Index>
struct Csr {
  int64_t rows, cols, nnz, halo;
  const Index* crow;
  const Index* col;
  const T* values;
};

// (A u)_i = shift u_i + sum_axis w_axis (2 u_i - u_left - u_right). Outside the grid u is zero (Dirichlet) or continues
// with the border value (Neumann), which makes that difference vanish.
template <class T>
struct Stencil {
  int64_t nz, ny, nx;
  bool neumann_z, neumann_y, neumann_x;
  const T* weights;  // shift, wz, wy, wx
};

// (A u)_i = shift u_i + sum over the faces of cell i of f (u_i - u_neighbour), with u = 0 outside the grid: a positive
// border face is a Dirichlet boundary, a zero one a Neumann boundary.
template <class T>
struct FaceStencil {
  int64_t nz, ny, nx;
  const T* shift;
  const T* fz;  // (nz+1, ny, nx)
  const T* fy;  // (nz, ny+1, nx), or null on a two-dimensional grid
  const T* fx;  // (nz, ny, nx+1)
};

// The Laplacian of a voxel grid with solids and free surfaces: (A u)_i = diagonal_i u_i - sum of u over the linked
// neighbours. A cell is two bytes. The low one has a bit for each linked neighbour (those below, above, in front,
// behind, left, right, from the lowest bit) and the bit 64, which says that the cell is an unknown; the high one is the
// diagonal. Cells that are no unknowns are zero: their rows are empty, and no cell links to them.
template <class T>
struct Poisson {
  int64_t nz, ny, nx;
  const uint16_t* cells;
};

template <class T>
struct Diagonal {
  int64_t n;
  const T* values;
};

template <class T>
using OperatorForm = std::variant<Dense<T>, Csr<T, int32_t>, Csr<T, int64_t>, Stencil<T>, FaceStencil<T>, Diagonal<T>,
                                  LowRank<T>, Poisson<T>>;

template <class T>
struct OperatorTerm {
  double scale;
  OperatorForm<T> form;
};

template <class T>
struct Operator {
  int64_t rows = 0, cols = 0;
  std::vector<OperatorTerm<T>> terms;
};

// Row i of the product needs x in [i - halo, i + halo].
template <class T>
int64_t halo_of(const Operator<T>& A);

// Words of matrix data read per row: decides whether q = A p is cheaper to recompute than to store (cg_cpu.cpp).
template <class T>
double words_per_row(const Operator<T>& A);

// The fixed partition of the rows into units of work and of reduction: chunk_size rows, fewer where a row is long.
template <class T>
Chunks chunks_of(const Operator<T>& A);

// Work of one product with `batch` vectors, in simple elements (a matrix entry is streamed and counts less): decides
// whether threads pay.
template <class T>
int64_t work_of(const Operator<T>& A, int64_t batch);

// Doubles of workspace that the low-rank terms of A need for one vector (low_rank.h); 0 without such terms.
template <class T>
int64_t projections_size(const Operator<T>& A);

// Hands them that of `batch` vectors.
template <class T>
void place_projections(Operator<T>& A, int64_t batch, double* projections);

// CPU: the projections of the vectors k of a batch that `active` selects, for any rows of A x.
template <class T, class Active>
void project(Team& team, const Operator<T>& A, int64_t batch, const T* x, Active&& active) {
  for (const OperatorTerm<T>& term : A.terms) {
    const auto* low = std::get_if<LowRank<T>>(&term.form);
    if (!low) continue;
    // All vectors of the batch before the next part of the factors, which is then read once for all of them.
    team.for_each(projection_items(*low) * batch, [&](int64_t item) {
      if (const int64_t k = item % batch; active(k)) project_item(*low, k, x + k * A.cols, item / batch);
    });
    const Chunks values{low->values(), 512};
    team.for_each(values.count() * batch, [&](int64_t item) {
      if (const int64_t k = item % batch; active(k)) sum_projections(*low, k, values.range(item / batch));
    });
  }
}

// CPU: y[0..rows.size()) = rows `rows` of A x, where x is vector k of a batch; its projections were formed before.
// Out = double computes in double whatever T is.
template <class T, class Out>
void apply_rows(const Operator<T>& A, int64_t k, const T* x, Out* y, Range rows);

// y = A x for `batch` vectors, contiguous one after another. 2 words a row beyond the operator's own.
template <class T>
void matvec_cpu(const Exec& exec, const Operator<T>& A, int64_t batch, const T* x, T* y);
template <class T>
void matvec_cuda(const Exec& exec, const Operator<T>& A, int64_t batch, const T* x, T* y);

}  // namespace kantor
