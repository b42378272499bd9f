// Multigrid cycles for Poisson problems on voxel grids, as a preconditioner.
//
// The levels. A cell's block is (z/2, y/2, x/2); along each axis its partner is the neighbour across the block's
// border. With Q the injection from blocks to cells and L the graph Laplacian, unit weights, of the links between
// partners,
//
//     P = S Q,   S = I - L / 4,   R = P' = Q' S
//
// which is (1, 3, 3, 1) / 4 along each axis, and constant across a missing link whatever lies behind it. Coarse
// operators are rediscretised, not Galerkin products: c' = sum c / 2 over the faces that coincide, d' = sum d times the
// ratio of the distances to the free surface.
//
// Where a block holds parts that are not linked inside it (a wall one cell thick), one value cannot stand for both. The
// next level then has one node for each connected part of each block, and is a graph, as are all levels below it. Nodes
// of one block are never linked, so that every edge joins blocks that share a face: the two colours of a chess board
// colour every level, and a sweep of red-black Gauss-Seidel is two parallel half sweeps.
//
// On grids the smoother is red-black Gauss-Seidel, or a stencil k applied to the scaled residual,
//     x += D^-1/2 (k * (D^-1/2 (b - A x))),
// whose transpose (k flipped) is used after the correction. k = omega at the centre is damped Jacobi. On graphs it is
// Gauss-Seidel, and the levels below are visited twice while that is cheap (a W-cycle). The last level is solved
// exactly. The cycle is symmetric and positive definite as long as every smoother contracts in the A-norm.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/exec.h"
#include "core/hd.h"
#include "core/parallel.h"

namespace kantor {

enum class LevelKind : int64_t { voxels = 0, faces = 1, graph = 2, dense = 3, factor = 4 };
enum class GridSmoother : int64_t { red_black = 0, stencil = 1 };

// As it travels in the encoding of the preconditioner (preconditioner.h): `offset` counts bytes into the arena, -1
// where there is no such array.
struct LevelLayout {
  static constexpr int arrays = 12;
  int64_t kind, nz, ny, nx;  // a graph has (1, 1, number of nodes)
  int64_t visits;            // how often the level above visits this one: once or twice
  int64_t red;               // graphs: how many nodes are red
  int64_t offset[arrays];
};
inline constexpr int64_t level_layout_size = sizeof(LevelLayout) / sizeof(int64_t);

// The arrays of a level in the order of `offset`.
struct GridArrays {
  enum : int { cells, below, front, left, inverse_diagonal, labels, first_nodes, stencil, scale };
};
struct GraphArrays {
  enum : int { crow, col, values, inverse_diagonal, red, black, p_crow, p_col, p_values, r_crow, r_col, r_values };
};

struct FactorArrays {
  enum : int { order, inverse_pivot, start, row, share };
};

// A grid. S is the precision of the cycle, float unless asked otherwise. Either `cells` (operator.h) or coefficients:
// those of the faces below, in front and to the left of each cell; the faces above, behind and to the right are those
// of the next cells, zero on the rim, so the arrays go one plane, row and element on.
template <class S>
struct GridLevel {
  int64_t nz, ny, nx;
  const uint16_t* cells;
  const S *below, *front, *left, *inverse_diagonal;
  const int32_t* labels;       // the graph node that each cell belongs to, -1 for none; null above a grid
  const int64_t* first_nodes;  // per plane of blocks, the first graph node of it (and at the end the number of nodes)
  const S* stencil;            // 27 values, or null
  const S* scale;              // of the correction

  KANTOR_HD int64_t plane() const { return ny * nx; }
  KANTOR_HD int64_t size() const { return nz * ny * nx; }
  KANTOR_HD int64_t coarse(int64_t n) const { return (n + 1) / 2; }
};

template <class S>
struct Rows {
  const int32_t *crow, *col;
  const S* values;
};

// A graph: row i of A is diagonal_i u_i - sum of values * u[col].
template <class S>
struct GraphLevel {
  int64_t n, red_count;
  Rows<S> links, prolongation, restriction;
  const S* inverse_diagonal;
  const int32_t *red, *black;
};

// L D L' of the last graph: of ApproximateCholesky, pivots inverted (0 stays 0).
template <class S>
struct Factor {
  int64_t n;
  const int32_t *order, *start, *row;
  const S *inverse_pivot, *share;
};

// The hierarchy as kernels see it; borrowed pointers.
template <class S>
struct Hierarchy {
  struct Level {
    LevelKind kind;
    int64_t n, visits;
    GridLevel<S> grid;
    GraphLevel<S> graph;
    const S* dense;
    Factor<S> factor;
  };
  std::vector<Level> levels;
  GridSmoother smoother;
  int64_t sweeps;   // of the smoother on grids, before and after the correction each
  int workers = 1;  // on the CPU: how many the workspace has room for

  int64_t n() const { return levels.front().n; }
  // What processes that share a grid with thin walls have below it; on the CPU only.
  bool begins_with_graph() const {
    return levels.front().kind == LevelKind::graph || levels.front().kind == LevelKind::factor;
  }
};

inline constexpr int64_t graph_sweeps = 2;  // of Gauss-Seidel on graphs, before and after
inline constexpr int64_t dense_limit = 64;  // unknowns of a last level that is

// The arrays of the arena behind the layouts of the levels.
template <class S>
Hierarchy<S> hierarchy_view(const std::vector<LevelLayout>& layouts, const std::byte* arena, GridSmoother smoother,
                            int64_t sweeps) {
  Hierarchy<S> M{{}, smoother, sweeps, 1};
  for (const LevelLayout& layout : layouts) {
    const auto array = [&]<class E>(int which, E) {
      return layout.offset[which] < 0 ? nullptr : reinterpret_cast<const E*>(arena + layout.offset[which]);
    };
    const auto rows = [&](int first) { return Rows<S>{array(first, 0), array(first + 1, 0), array(first + 2, S{})}; };
    typename Hierarchy<S>::Level level{};
    level.kind = static_cast<LevelKind>(layout.kind);
    level.visits = layout.visits;
    level.n = layout.nz * layout.ny * layout.nx;
    if (level.kind == LevelKind::graph) {
      level.graph = {layout.nx,
                     layout.red,
                     rows(GraphArrays::crow),
                     rows(GraphArrays::p_crow),
                     rows(GraphArrays::r_crow),
                     array(GraphArrays::inverse_diagonal, S{}),
                     array(GraphArrays::red, 0),
                     array(GraphArrays::black, 0)};
    } else if (level.kind == LevelKind::factor) {
      level.factor = {layout.nx,
                      array(FactorArrays::order, 0),
                      array(FactorArrays::start, 0),
                      array(FactorArrays::row, 0),
                      array(FactorArrays::inverse_pivot, S{}),
                      array(FactorArrays::share, S{})};
    } else {
      level.grid = {layout.nz,
                    layout.ny,
                    layout.nx,
                    array(GridArrays::cells, uint16_t{}),
                    array(GridArrays::below, S{}),
                    array(GridArrays::front, S{}),
                    array(GridArrays::left, S{}),
                    array(GridArrays::inverse_diagonal, S{}),
                    array(GridArrays::labels, int32_t{}),
                    array(GridArrays::first_nodes, int64_t{}),
                    array(GridArrays::stencil, S{}),
                    array(GridArrays::scale, S{})};
      level.dense = array(0, S{});
      if (level.kind != LevelKind::voxels) level.grid.cells = nullptr;
      if (level.kind != LevelKind::dense) level.dense = nullptr;
    }
    M.levels.push_back(level);
  }
  return M;
}

// Elements of S of workspace for one cycle: b, x and e of the levels below the first, x of the first (all, on a graph).
template <class S>
int64_t cycle_workspace(const Hierarchy<S>& M) {
  int64_t size = M.begins_with_graph() ? 4 * M.n() : M.n();
  for (size_t l = 1; l < M.levels.size(); ++l) size += 4 * M.levels[l].n;
  return size;
}

// The cycle, on passes that the backend supplies:
//   down(l)        x_l = smooth from zero for b_l; b_{l+1} = R (b_l - A x_l)
//   up(l)          e_l = smooth from x_l + scale P e_{l+1}, in the reverse order
//   solve_last()   e of the last level
//   correct(l)     between the two visits of level l: saves e_l, b_l := b_l - A e_l
//   add(l)         after the second: e_l += what was saved
template <class Passes>
void visit(Passes& passes, size_t level, size_t levels);
template <class Passes>
void cycle(Passes& passes, size_t level, size_t levels) {
  if (level + 1 == levels) return passes.solve_last();
  passes.down(level);
  visit(passes, level + 1, levels);
  passes.up(level);
}
template <class Passes>
void visit(Passes& passes, size_t level, size_t levels) {
  cycle(passes, level, levels);
  if (passes.visits(level) != 2) return;
  passes.correct(level);
  cycle(passes, level, levels);
  passes.add(level);
}

// z = M r for one vector. `work` holds multigrid_workspace elements of S; it needs no particular contents. On CUDA it
// has room for a residual of the first level beside the vectors.
template <class S>
int64_t multigrid_workspace_cpu(const Hierarchy<S>& M, int threads);
template <class S>
int workers_for(const Hierarchy<S>& M, int64_t workspace_bytes);  // 0: not even for one
template <class S>
int64_t multigrid_workspace_cuda(const Hierarchy<S>& M) {
  return cycle_workspace(M) + M.n();
}
template <class S, class T>
void multigrid_cpu(Team& team, const Hierarchy<S>& M, const T* r, S* work, T* z);
template <class S, class T>
void multigrid_cuda(const Exec& exec, const Hierarchy<S>& M, const T* r, S* work, T* z);

// One pass, down(l) or up(l), over planes `own` of a grid of which one process holds a part. The planes around them are
// ghosts, data from other processes, as many as the stages reach (python/kantor/distributed/multigrid.py counts them);
// the array starts with an even plane, so that blocks and colours are those of the whole. The way down writes x two
// planes beyond `own`, and `coarse` for the blocks of `own`, which begins with a block; the way up writes `out`.
template <class S>
struct SlabPass {
  GridLevel<S> grid;
  GridSmoother smoother;
  int64_t sweeps;
  bool up;
  Range own;
  const S* b;
  S *x, *out;
  S* coarse;
  int64_t first_coarse;  // in `coarse`, the plane of the grid's first blocks; may be negative
};
template <class S>
int64_t slab_pass_workspace(int64_t ny, int64_t nx, int64_t sweeps, int threads);  // elements
template <class S>
void slab_pass_cpu(Team& team, const SlabPass<S>& pass, S* work);

}  // namespace kantor
