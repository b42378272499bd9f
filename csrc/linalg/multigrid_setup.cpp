#include "linalg/multigrid_setup.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>

#include "linalg/approximate_cholesky.h"

namespace kantor {
namespace {

constexpr size_t alignment = 64;

class Arena {
 public:
  explicit Arena(std::vector<std::byte>& bytes) : bytes_(bytes) {}
  template <class E>
  int64_t add(const E* values, size_t count) {
    const size_t offset = (bytes_.size() + alignment - 1) / alignment * alignment;
    bytes_.resize(offset + count * sizeof(E));
    if (count) std::memcpy(bytes_.data() + offset, values, count * sizeof(E));
    return static_cast<int64_t>(offset);
  }
  template <class E>
  int64_t add(const std::vector<E>& values) {
    return add(values.data(), values.size());
  }

 private:
  std::vector<std::byte>& bytes_;
};

LevelLayout level_layout(LevelKind kind, int64_t nz, int64_t ny, int64_t nx) {
  LevelLayout layout{static_cast<int64_t>(kind), nz, ny, nx, 1, 0, {}};
  std::fill(std::begin(layout.offset), std::end(layout.offset), -1);
  return layout;
}

// --- the two forms of a grid, as coarsening sees them ---

struct VoxelGrid {
  int64_t nz, ny, nx;
  const uint16_t* cells;
  bool active(int64_t i) const { return cells[i] != 0; }
  double below(int64_t i) const { return cells[i] & 1; }
  double front(int64_t i) const { return cells[i] >> 2 & 1; }
  double left(int64_t i) const { return cells[i] >> 4 & 1; }
  double d(int64_t i) const { return (cells[i] >> 8) - std::popcount(static_cast<unsigned>(cells[i]) & 63u); }
  bool linked(int64_t i) const { return cells[i] & 63; }
};

template <class S>
struct FaceGrid {
  int64_t nz, ny, nx;
  FaceArrays<S> c;
  int64_t size() const { return nz * ny * nx; }
  double below(int64_t i) const { return c.below[i]; }
  double front(int64_t i) const { return c.front[i]; }
  double left(int64_t i) const { return c.left[i]; }
  double d(int64_t i) const { return c.d[i]; }
  bool linked(int64_t i) const {
    return c.below[i] + c.below[i + ny * nx] + c.front[i] + c.front[i + nx] + c.left[i] + c.left[i + 1] > 0;
  }
  bool active(int64_t i) const { return linked(i) || c.d[i] > 0; }
};

// The up to eight cells of a block and the connected part that each belongs to, numbered from 0; -1: no unknown.
struct Block {
  std::array<int64_t, 8> cell;
  std::array<int8_t, 8> part;
  int count = 0;  // of cells
  int parts = 0;
};

template <class Grid>
Block block_of(const Grid& grid, int64_t bz, int64_t by, int64_t bx) {
  const int64_t plane = grid.ny * grid.nx;
  Block block;
  std::array<uint8_t, 8> code{};  // position inside the block: z y x
  for (int64_t z = 2 * bz; z < std::min(2 * bz + 2, grid.nz); ++z)
    for (int64_t y = 2 * by; y < std::min(2 * by + 2, grid.ny); ++y)
      for (int64_t x = 2 * bx; x < std::min(2 * bx + 2, grid.nx); ++x) {
        code[block.count] = static_cast<uint8_t>((z & 1) << 2 | (y & 1) << 1 | (x & 1));
        block.cell[block.count++] = z * plane + y * grid.nx + x;
      }
  for (int i = 0; i < block.count; ++i) {
    block.part[i] = static_cast<int8_t>(grid.active(block.cell[i]) ? i : -1);
    const auto join = [&](int bit) {  // with the cell one back along that axis, which came before
      for (int j = 0; j < i; ++j)
        if (code[j] == (code[i] ^ bit)) {
          const int8_t a = std::min(block.part[i], block.part[j]), b = std::max(block.part[i], block.part[j]);
          for (int k = 0; k <= i; ++k)
            if (block.part[k] == b) block.part[k] = a;
        }
    };
    if (code[i] & 1 && grid.left(block.cell[i]) > 0) join(1);
    if (code[i] & 2 && grid.front(block.cell[i]) > 0) join(2);
    if (code[i] & 4 && grid.below(block.cell[i]) > 0) join(4);
  }
  std::array<int8_t, 8> number{};
  number.fill(-1);
  for (int i = 0; i < block.count; ++i) {
    if (block.part[i] < 0) continue;
    if (number[block.part[i]] < 0) number[block.part[i]] = static_cast<int8_t>(block.parts++);
    block.part[i] = number[block.part[i]];
  }
  return block;
}

// Whether a block is whole at a glance: eight voxels, all linked to each other.
bool is_whole(const VoxelGrid& grid, int64_t z, int64_t y, int64_t x) {
  if (z + 1 >= grid.nz || y + 1 >= grid.ny || x + 1 >= grid.nx) return false;
  const uint16_t* c = grid.cells + (z * grid.ny + y) * grid.nx + x;
  const int64_t nx = grid.nx, plane = grid.ny * grid.nx;
  // Each of the four pairs along x, the two links along y and the one along z that tie them together, and more than
  // needed: a block that fails is looked at closely.
  return c[1] & c[nx + 1] & c[plane + 1] & c[plane + nx + 1] & 16 && c[nx] & c[plane + nx] & 4 && c[plane] & 1;
}
template <class S>
bool is_whole(const FaceGrid<S>&, int64_t, int64_t, int64_t) {
  return false;
}

// body(z) for all planes of `cells` cells together; small levels are not worth a barrier.
template <class Body>
void for_planes(Team& team, int64_t planes, int64_t cells, Body&& body) {
  if (cells >= serial_below) return team.for_each(planes, body);
  for (int64_t z = 0; z < planes; ++z) body(z);
}

template <class Grid>
int64_t count_splits(const Grid& grid, Range planes, Team& team) {
  const int64_t by = (grid.ny + 1) / 2, bx = (grid.nx + 1) / 2;
  std::vector<int64_t> splits(static_cast<size_t>(planes.size()), 0);
  for_planes(team, planes.size(), grid.nz * grid.ny * grid.nx, [&](int64_t k) {
    const int64_t z = planes.begin + k;
    for (int64_t y = 0; y < by; ++y)
      for (int64_t x = 0; x < bx; ++x)
        if (!is_whole(grid, 2 * z, 2 * y, 2 * x)) splits[k] += std::max(block_of(grid, z, y, x).parts - 1, 0);
  });
  return std::accumulate(splits.begin(), splits.end(), int64_t{0});
}

template <class S>
GridCoefficients<S> empty_grid(int64_t nz, int64_t ny, int64_t nx) {
  const auto n = static_cast<size_t>(nz * ny * nx), plane = static_cast<size_t>(ny * nx);
  return {nz,
          ny,
          nx,
          std::vector<S>(n + plane),
          std::vector<S>(n + static_cast<size_t>(nx)),
          std::vector<S>(n + 1),
          std::vector<S>(n)};
}

template <class S, class Grid>
GridCoefficients<S> coarsen_grid(const Grid& fine, double factor, Team& team) {
  GridCoefficients<S> coarse = empty_grid<S>((fine.nz + 1) / 2, (fine.ny + 1) / 2, (fine.nx + 1) / 2);
  for_planes(team, coarse.nz, fine.nz * fine.ny * fine.nx, [&](int64_t bz) {
    for (int64_t z = 2 * bz; z < std::min(2 * bz + 2, fine.nz); ++z)
      for (int64_t y = 0; y < fine.ny; ++y) {
        const int64_t from = (z * fine.ny + y) * fine.nx, to = (bz * coarse.ny + y / 2) * coarse.nx;
        for (int64_t x = 0; x < fine.nx; ++x) {
          coarse.d[to + x / 2] += static_cast<S>(factor * fine.d(from + x));
          if (x % 2 == 0) coarse.left[to + x / 2] += static_cast<S>(fine.left(from + x) / 2);
        }
        if (z % 2 == 0)
          for (int64_t x = 0; x < fine.nx; ++x) coarse.below[to + x / 2] += static_cast<S>(fine.below(from + x) / 2);
        if (y % 2 == 0)
          for (int64_t x = 0; x < fine.nx; ++x) coarse.front[to + x / 2] += static_cast<S>(fine.front(from + x) / 2);
      }
  });
  return coarse;
}

template <class S>
std::vector<S> inverse_diagonal(const FaceGrid<S>& grid, Team& team) {
  const int64_t plane = grid.ny * grid.nx;
  const FaceArrays<S>& c = grid.c;
  std::vector<S> inverse(static_cast<size_t>(grid.size()));
  for_planes(team, grid.nz, grid.size(), [&](int64_t z) {
    for (int64_t i = z * plane; i < (z + 1) * plane; ++i) {
      const S diagonal = c.d[i] + (c.below[i] + c.below[i + plane]) + (c.front[i] + c.front[i + grid.nx]) +
                         (c.left[i] + c.left[i + 1]);
      inverse[i] = diagonal > 0 ? 1 / diagonal : S(0);
    }
  });
  return inverse;
}

// The graph whose nodes are the parts of a grid's blocks, and the node of each cell.
template <class S, class Grid>
GraphCoefficients<S> graph_of_parts(const Grid& grid, double factor, std::vector<int32_t>& labels,
                                    std::vector<int64_t>& first_nodes) {
  const int64_t plane = grid.ny * grid.nx, n = grid.nz * plane;
  const int64_t bz = (grid.nz + 1) / 2, by = (grid.ny + 1) / 2, bx = (grid.nx + 1) / 2;
  GraphCoefficients<S> graph;
  labels.assign(static_cast<size_t>(n), -1);
  first_nodes.clear();
  for (int64_t z = 0; z < bz; ++z) {
    first_nodes.push_back(static_cast<int64_t>(graph.position.size()));
    for (int64_t y = 0; y < by; ++y)
      for (int64_t x = 0; x < bx; ++x) {
        const Block block = block_of(grid, z, y, x);
        for (int part = 0; part < block.parts; ++part) {
          bool linked = false;
          for (int i = 0; i < block.count; ++i) linked |= block.part[i] == part && grid.linked(block.cell[i]);
          if (!linked) continue;
          S d = 0;
          for (int i = 0; i < block.count; ++i)
            if (block.part[i] == part) {
              labels[block.cell[i]] = static_cast<int32_t>(graph.position.size());
              d += static_cast<S>(factor * grid.d(block.cell[i]));
            }
          graph.position.push_back({static_cast<int32_t>(z), static_cast<int32_t>(y), static_cast<int32_t>(x)});
          graph.d.push_back(d);
        }
      }
  }
  first_nodes.push_back(static_cast<int64_t>(graph.position.size()));

  // edge(i, j, c) for every link across blocks, from the cell behind.
  const auto each_edge = [&](auto&& edge) {
    for (int64_t z = 0, i = 0; z < grid.nz; ++z)
      for (int64_t y = 0; y < grid.ny; ++y)
        for (int64_t x = 0; x < grid.nx; ++x, ++i) {
          if (z % 2 == 0 && grid.below(i) > 0) edge(i, i - plane, grid.below(i));
          if (y % 2 == 0 && grid.front(i) > 0) edge(i, i - grid.nx, grid.front(i));
          if (x % 2 == 0 && grid.left(i) > 0) edge(i, i - 1, grid.left(i));
        }
  };
  graph.crow.assign(graph.d.size() + 1, 0);
  each_edge([&](int64_t i, int64_t j, double) { ++graph.crow[labels[i] + 1], ++graph.crow[labels[j] + 1]; });
  std::partial_sum(graph.crow.begin(), graph.crow.end(), graph.crow.begin());
  graph.col.resize(static_cast<size_t>(graph.crow.back()));
  graph.values.resize(graph.col.size());
  std::vector<int32_t> next(graph.crow.begin(), graph.crow.end() - 1);
  each_edge([&](int64_t i, int64_t j, double c) {
    for (const auto& [from, to] : {std::pair(labels[i], labels[j]), std::pair(labels[j], labels[i])}) {
      const int32_t at = next[from]++;
      graph.col[at] = to, graph.values[at] = static_cast<S>(c / 2);
    }
  });
  merge_edges(graph.crow, graph.col, graph.values);
  return graph;
}

// A symmetric positive semidefinite generalised inverse of a small matrix (row-major, overwritten): L^-T D^+ L^-1.
std::vector<double> generalised_inverse(std::vector<double> A, int64_t n) {
  std::vector<double> inverse(static_cast<size_t>(n * n), 0.0), pivots(static_cast<size_t>(n), 0.0);
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, A[i * n + i]);
  for (int64_t i = 0; i < n; ++i) inverse[i * n + i] = 1;  // becomes L^-1
  for (int64_t k = 0; k < n; ++k) {
    const double pivot = A[k * n + k];
    pivots[k] = pivot > 1e-10 * largest ? 1 / pivot : 0;  // a pivot of rounding size: a component's last cell
    for (int64_t i = k + 1; i < n && pivots[k] > 0; ++i) {
      const double factor = A[i * n + k] * pivots[k];
      if (factor == 0) continue;
      for (int64_t j = k; j < n; ++j) A[i * n + j] -= factor * A[k * n + j];
      for (int64_t j = 0; j <= k; ++j) inverse[i * n + j] -= factor * inverse[k * n + j];
    }
  }
  std::vector<double> result(static_cast<size_t>(n * n), 0.0);
  for (int64_t k = 0; k < n; ++k)
    for (int64_t i = 0; i <= k; ++i)
      for (int64_t j = 0; j <= k; ++j) result[i * n + j] += inverse[k * n + i] * pivots[k] * inverse[k * n + j];
  return result;
}

template <class S>
class Builder {
 public:
  Builder(BuiltHierarchy& built, const SetupOptions& options, Team& team)
      : built_(built), arena_(built.arena), options_(options), team_(team) {}

  // The finest grid and all below it.
  template <class Grid>
  void build(const Grid& finest) {
    std::vector<GridCoefficients<S>> coarse;
    bool walls = options_.walls && has_walls(finest);
    for (int64_t l = level(); !walls; ++l) {
      const bool first = coarse.empty();
      const int64_t n = first ? cells_of(finest) : cells_of(coarse.back());
      if (n <= dense_limit) break;
      coarse.push_back(first ? coarsen_grid<S>(finest, dirichlet_factor(l), team_)
                             : coarsen_grid<S>(view(coarse.back()), dirichlet_factor(l), team_));
      walls = options_.walls && has_walls(view(coarse.back()));
    }
    if (walls) {
      std::vector<int32_t> labels;
      std::vector<int64_t> first_nodes;
      const GraphCoefficients<S> parts = graph_of_parts<S>(finest, dirichlet_factor(level()), labels, first_nodes);
      LevelLayout layout = grid_layout(finest);
      layout.offset[GridArrays::labels] = arena_.add(labels);
      layout.offset[GridArrays::first_nodes] = arena_.add(first_nodes);
      built_.levels.push_back(layout);
      return graph(parts, parts.n(), 1);
    }
    add_grid(finest);
    for (const GridCoefficients<S>& c : coarse) add_grid(view(c));
  }

  void build_from(const GridCoefficients<S>& finest) { build(view(finest)); }

 private:
  int64_t level() const { return options_.first_level + static_cast<int64_t>(built_.levels.size()); }

  static FaceGrid<S> view(const GridCoefficients<S>& c) { return {c.nz, c.ny, c.nx, c.arrays()}; }
  template <class Grid>
  static int64_t cells_of(const Grid& grid) {
    return grid.nz * grid.ny * grid.nx;
  }
  template <class Grid>
  bool has_walls(const Grid& grid) const {
    return cells_of(grid) > dense_limit &&
           walls_matter(count_splits(grid, {0, (grid.nz + 1) / 2}, team_), grid.nz, grid.ny, grid.nx);
  }

  LevelLayout grid_layout(const VoxelGrid& grid) {
    LevelLayout layout = level_layout(LevelKind::voxels, grid.nz, grid.ny, grid.nx);
    layout.offset[GridArrays::cells] = arena_.add(grid.cells, static_cast<size_t>(cells_of(grid)));
    return smoothing(layout);
  }

  LevelLayout grid_layout(const FaceGrid<S>& grid) {
    LevelLayout layout = level_layout(LevelKind::faces, grid.nz, grid.ny, grid.nx);
    const auto n = static_cast<size_t>(grid.size());
    layout.offset[GridArrays::below] = arena_.add(grid.c.below, n + static_cast<size_t>(grid.ny * grid.nx));
    layout.offset[GridArrays::front] = arena_.add(grid.c.front, n + static_cast<size_t>(grid.nx));
    layout.offset[GridArrays::left] = arena_.add(grid.c.left, n + 1);
    layout.offset[GridArrays::inverse_diagonal] = arena_.add(inverse_diagonal(grid, team_));
    return smoothing(layout);
  }

  LevelLayout smoothing(LevelLayout layout) {
    const int64_t use = std::min(level(), options_.stencil_levels - 1);
    if (options_.stencils) {
      std::array<S, 27> k;
      for (size_t i = 0; i < 27; ++i) k[i] = static_cast<S>(options_.stencils[27 * use + static_cast<int64_t>(i)]);
      layout.offset[GridArrays::stencil] = arena_.add(k.data(), k.size());
    }
    const S scale = options_.scales ? static_cast<S>(options_.scales[use]) : S(1);
    layout.offset[GridArrays::scale] = arena_.add(&scale, 1);
    return layout;
  }

  template <class Grid>
  void add_grid(const Grid& grid) {
    if (cells_of(grid) <= dense_limit) return dense(grid);
    const LevelLayout layout = grid_layout(grid);
    built_.levels.push_back(layout);
  }

  // `visited` is how often a cycle comes to the level above. A second visit doubles that for all levels below; it is
  // made as long as no level costs more than a few passes over the first graph.
  void graph(const GraphCoefficients<S>& c, int64_t first_size, int64_t visited) {
    const int64_t n = c.n();
    const int64_t visits = 4 * visited * n <= 5 * first_size ? 2 : 1;
    if (n <= dense_limit) return dense(c);
    const auto edges = static_cast<int64_t>(c.col.size()) / 2;
    if (4 * edges <= 5 * n && factor(c, 8 * n)) return;  // all but a forest
    Interpolation<S> P;
    const GraphCoefficients<S> coarse = coarsen_graph(c, dirichlet_factor(level()), P);
    // Blocks that leave nothing to coarsen, or swallow large pieces whole.
    if (10 * coarse.n() > 9 * n || 32 * coarse.n() < n) {
      if (!factor(c, std::max<int64_t>(64 * n, 1 << 22))) approximate_factor(c);
      return;
    }
    LevelLayout layout = level_layout(LevelKind::graph, 1, 1, n);
    layout.visits = visits;
    layout.offset[GraphArrays::crow] = arena_.add(c.crow);
    layout.offset[GraphArrays::col] = arena_.add(c.col);
    layout.offset[GraphArrays::values] = arena_.add(c.values);
    std::vector<S> inverse(static_cast<size_t>(n));
    std::vector<int32_t> red, black;
    for (int32_t i = 0; i < n; ++i) {
      S diagonal = c.d[i];
      for (int32_t k = c.crow[i]; k < c.crow[i + 1]; ++k) diagonal += c.values[k];
      inverse[i] = diagonal > 0 ? 1 / diagonal : S(0);
      const auto& p = c.position[i];
      ((p.z + p.y + p.x) % 2 == 0 ? red : black).push_back(i);
    }
    layout.red = static_cast<int64_t>(red.size());
    layout.offset[GraphArrays::inverse_diagonal] = arena_.add(inverse);
    layout.offset[GraphArrays::red] = arena_.add(red);
    layout.offset[GraphArrays::black] = arena_.add(black);
    layout.offset[GraphArrays::p_crow] = arena_.add(P.p_crow);
    layout.offset[GraphArrays::p_col] = arena_.add(P.p_col);
    layout.offset[GraphArrays::p_values] = arena_.add(P.p_values);
    layout.offset[GraphArrays::r_crow] = arena_.add(P.r_crow);
    layout.offset[GraphArrays::r_col] = arena_.add(P.r_col);
    layout.offset[GraphArrays::r_values] = arena_.add(P.r_values);
    built_.levels.push_back(layout);
    graph(coarse, first_size, visited * visits);
  }

  static std::vector<Edge> edges_of(const GraphCoefficients<S>& c) {
    std::vector<Edge> edges;
    for (int32_t i = 0; i < c.n(); ++i)
      for (int32_t k = c.crow[i]; k < c.crow[i + 1]; ++k)
        if (c.col[k] < i) edges.push_back({i, c.col[k], double(c.values[k])});
    return edges;
  }

  // The last level by an exact factor, unless that fills in too much.
  bool factor(const GraphCoefficients<S>& c, int64_t most_entries) {
    const auto L = exact_cholesky(c.n(), edges_of(c), std::vector<double>(c.d.begin(), c.d.end()), most_entries);
    if (L) factor_level(*L);
    return L.has_value();
  }

  // By an approximate one otherwise. It may be far above the inverse, and a second visit of a level above would then
  // turn the cycle indefinite: no level is visited twice.
  void approximate_factor(const GraphCoefficients<S>& c) {
    factor_level(approximate_cholesky(c.n(), edges_of(c), std::vector<double>(c.d.begin(), c.d.end())));
    for (LevelLayout& layout : built_.levels) layout.visits = 1;
  }

  void factor_level(const ApproximateCholesky& L) {
    LevelLayout layout = level_layout(LevelKind::factor, 1, 1, static_cast<int64_t>(L.order.size()));
    std::vector<S> inverse(L.pivot.size());
    for (size_t k = 0; k < inverse.size(); ++k) inverse[k] = L.pivot[k] > 0 ? static_cast<S>(1 / L.pivot[k]) : S(0);
    layout.offset[FactorArrays::order] = arena_.add(L.order);
    layout.offset[FactorArrays::start] = arena_.add(std::vector<int32_t>(L.start.begin(), L.start.end()));
    layout.offset[FactorArrays::row] = arena_.add(L.row);
    layout.offset[FactorArrays::inverse_pivot] = arena_.add(inverse);
    layout.offset[FactorArrays::share] = arena_.add(std::vector<S>(L.share.begin(), L.share.end()));
    built_.levels.push_back(layout);
  }

  template <class Grid>
  void dense(const Grid& grid) {
    const int64_t plane = grid.ny * grid.nx, n = grid.nz * plane;
    std::vector<double> A(static_cast<size_t>(n * n), 0.0);
    const auto link = [&](int64_t i, int64_t j, double c) {
      if (c <= 0) return;
      A[i * n + i] += c, A[j * n + j] += c, A[i * n + j] -= c, A[j * n + i] -= c;
    };
    for (int64_t i = 0; i < n; ++i) {
      A[i * n + i] += grid.d(i);
      link(i, i - plane, grid.below(i)), link(i, i - grid.nx, grid.front(i)), link(i, i - 1, grid.left(i));
    }
    dense_level(std::move(A), grid.nz, grid.ny, grid.nx);
  }

  void dense(const GraphCoefficients<S>& c) {
    const int64_t n = c.n();
    std::vector<double> A(static_cast<size_t>(n * n), 0.0);
    for (int32_t i = 0; i < n; ++i) {
      A[i * n + i] += double(c.d[i]);
      for (int32_t k = c.crow[i]; k < c.crow[i + 1]; ++k)
        A[i * n + i] += double(c.values[k]), A[i * n + c.col[k]] -= double(c.values[k]);
    }
    dense_level(std::move(A), 1, 1, n);
  }

  void dense_level(std::vector<double> A, int64_t nz, int64_t ny, int64_t nx) {
    LevelLayout layout = level_layout(LevelKind::dense, nz, ny, nx);
    const std::vector<double> inverse = generalised_inverse(std::move(A), nz * ny * nx);
    layout.offset[0] = arena_.add(std::vector<S>(inverse.begin(), inverse.end()));
    built_.levels.push_back(layout);
  }

  BuiltHierarchy& built_;
  Arena arena_;
  const SetupOptions& options_;
  Team& team_;
};

// FaceStencil's arrays as those of a level; faces on the rim join nothing.
template <class S, class T>
GridCoefficients<S> grid_from_faces(const FinestGrid<T>& g) {
  GridCoefficients<S> c = empty_grid<S>(g.nz, g.ny, g.nx);
  for (int64_t z = 0, i = 0; z < g.nz; ++z)
    for (int64_t y = 0; y < g.ny; ++y)
      for (int64_t x = 0; x < g.nx; ++x, ++i) {
        c.d[i] = static_cast<S>(g.d[i]);
        if (z > 0) c.below[i] = static_cast<S>(g.fz[i]);
        if (y > 0 && g.fy) c.front[i] = static_cast<S>(g.fy[(z * (g.ny + 1) + y) * g.nx + x]);
        if (x > 0) c.left[i] = static_cast<S>(g.fx[(z * g.ny + y) * (g.nx + 1) + x]);
      }
  return c;
}

}  // namespace

bool walls_matter(int64_t splits, int64_t nz, int64_t ny, int64_t nx) {
  const int dims = (nz > 1) + (ny > 1) + (nx > 1);
  const double blocks = double((nz + 1) / 2) * double((ny + 1) / 2) * double((nx + 1) / 2);
  return double(splits) > std::max(6.0, 0.1 * std::pow(blocks, dims > 1 ? double(dims - 1) / dims : 0.0));
}

template <class S>
GridCoefficients<S> coarsen_slab(int64_t nz, int64_t ny, int64_t nx, const uint16_t* cells, FaceArrays<S> faces,
                                 int64_t level, Range counted, int threads, int64_t& splits) {
  GridCoefficients<S> coarse;
  Team::run(threads_for(threads, nz * ny * nx), true, [&](Team& team) {
    const auto coarsen = [&](const auto& grid) {
      splits = count_splits(grid, counted, team);
      coarse = coarsen_grid<S>(grid, dirichlet_factor(level), team);
    };
    if (cells)
      coarsen(VoxelGrid{nz, ny, nx, cells});
    else
      coarsen(FaceGrid<S>{nz, ny, nx, faces});
  });
  return coarse;
}

template <class S, class T>
BuiltHierarchy build_hierarchy(const FinestGrid<T>& finest, const SetupOptions& options) {
  BuiltHierarchy built;
  // One team for all of it: many short regions would each wait for a thread that others may keep from running.
  Team::run(threads_for(options.threads, finest.nz * finest.ny * finest.nx), true, [&](Team& team) {
    Builder<S> builder(built, options, team);
    if (finest.cells)
      builder.build(VoxelGrid{finest.nz, finest.ny, finest.nx, finest.cells});
    else
      builder.build_from(grid_from_faces<S>(finest));
  });
  return built;
}

template GridCoefficients<float> coarsen_slab(int64_t, int64_t, int64_t, const uint16_t*, FaceArrays<float>, int64_t,
                                              Range, int, int64_t&);
template GridCoefficients<double> coarsen_slab(int64_t, int64_t, int64_t, const uint16_t*, FaceArrays<double>, int64_t,
                                               Range, int, int64_t&);
template BuiltHierarchy build_hierarchy<float>(const FinestGrid<float>&, const SetupOptions&);
template BuiltHierarchy build_hierarchy<float>(const FinestGrid<double>&, const SetupOptions&);
template BuiltHierarchy build_hierarchy<double>(const FinestGrid<float>&, const SetupOptions&);
template BuiltHierarchy build_hierarchy<double>(const FinestGrid<double>&, const SetupOptions&);

}  // namespace kantor
