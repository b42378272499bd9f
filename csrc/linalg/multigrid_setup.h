// Builds the levels of multigrid.h, on the host.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "linalg/multigrid.h"

namespace kantor {

// All arrays of a hierarchy, each aligned to 64 bytes, and where they are.
struct BuiltHierarchy {
  std::vector<LevelLayout> levels;
  std::vector<std::byte> arena;
};

// The finest level: cells, or faces and the Dirichlet diagonal (FaceStencil's arrays; fy null in two dimensions).
template <class T>
struct FinestGrid {
  int64_t nz, ny, nx;
  const uint16_t* cells;
  const T *fz, *fy, *fx, *d;
};

struct SetupOptions {
  bool walls = true;                 // go over to graphs where blocks fall apart
  const double* stencils = nullptr;  // (levels, 27): of level l, the last one for all below; null: no stencils
  const double* scales = nullptr;    // (levels)
  int64_t stencil_levels = 0;
  int64_t first_level = 0;  // that the finest grid is: a coarse one, if processes that share it coarsened it before
  int threads = 1;
};

template <class S, class T>
BuiltHierarchy build_hierarchy(const FinestGrid<T>& finest, const SetupOptions& options);

// --- parts of it ---

// The coefficients of a grid: arrays as in GridLevel, and d, the Dirichlet diagonal.
template <class S>
struct FaceArrays {
  const S *below, *front, *left, *d;
};
// While it is being coarsened.
template <class S>
struct GridCoefficients {
  int64_t nz, ny, nx;
  std::vector<S> below, front, left, d;
  FaceArrays<S> arrays() const { return {below.data(), front.data(), left.data(), d.data()}; }
};

// A graph while it is being coarsened. Edges of node i: col[crow[i]..crow[i+1]) with their weights; `position` is the
// block (z, y, x) that the node lies in.
template <class S>
struct GraphCoefficients {
  struct Position {
    int32_t z, y, x;
    bool operator==(const Position&) const = default;
  };
  std::vector<int32_t> crow, col;
  std::vector<S> values, d;
  std::vector<Position> position;
  int64_t n() const { return static_cast<int64_t>(d.size()); }
};

// Whether blocks fall apart at more than a tenth of the grid's cross section: fewer the iteration makes up for.
bool walls_matter(int64_t splits, int64_t nz, int64_t ny, int64_t nx);

// The next level of the planes that one process holds of a grid, the first of them even; the grid has cells or faces.
// `splits` becomes how often the blocks of planes `counted` (of blocks) fall apart.
template <class S>
GridCoefficients<S> coarsen_slab(int64_t nz, int64_t ny, int64_t nx, const uint16_t* cells, FaceArrays<S> faces,
                                 int64_t level, Range counted, int threads, int64_t& splits);

// The interpolation between two graphs.
template <class S>
struct Interpolation {
  std::vector<int32_t> p_crow, p_col, r_crow, r_col;
  std::vector<S> p_values, r_values;
};

// Coarsens a graph: the nodes of the next one are the connected parts of its blocks.
template <class S>
GraphCoefficients<S> coarsen_graph(const GraphCoefficients<S>& fine, double dirichlet_factor,
                                   Interpolation<S>& interpolation);

// Merges a list of edges (from, to, weight), grouped by `from` in crow, into rows without duplicates.
template <class S>
void merge_edges(std::vector<int32_t>& crow, std::vector<int32_t>& col, std::vector<S>& values);

// d' = dirichlet_factor(l) * sum d from level l to level l + 1: the distance from a cell's centre to the free surface
// is one fine cell on level 0, and grows by half a block less than the cells do.
inline double dirichlet_factor(int64_t level) {
  if (level == 0) return 1 / 1.5;
  const double cell = static_cast<double>(int64_t{1} << (level < 60 ? level : 60));
  return (cell / 2 + 0.5) / (cell + 0.5);
}

}  // namespace kantor
