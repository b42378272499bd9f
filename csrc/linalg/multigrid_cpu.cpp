// The cycle of multigrid.h on the CPU.
//
// On grids the stages of a pass (first colour, second colour, residual, restriction, ...) run as a wavefront over the
// planes: each stage does a plane as soon as the one before has done the next, out of rings of three planes that stay
// in the second-level cache. Each worker has a slab of planes and repeats the few planes around it that its stages
// need, so that results do not depend on the number of threads. Memory traffic per cell of the finest grid with float
// storage and double vectors, voxel links, red-black 1 + 1:
//   down   read r 8, cells 2, write x 4                 up   read x 4, r 8, cells 2, write z 8
// that is 36 bytes, 48 where a written line is fetched first, and a seventh of about 50 for all coarser levels.
#include <algorithm>
#include <array>
#include <vector>

#include "linalg/multigrid.h"
#include "linalg/multigrid_rows.h"

namespace kantor {
namespace {

using namespace multigrid;

// Workers pay on levels of at least this many unknowns.
constexpr int64_t parallel_from = 1 << 14;

enum class Stage {
  start,
  solve,
  red,
  black,
  scale,
  stencil,
  scaled_residual,
  stencil_add,
  residual,
  restriction,
  inject,
  correct
};

// Rings of three padded planes for each stage.
template <class S>
class Rings {
 public:
  static constexpr int64_t margin = 16;

  Rings(int64_t ny, int64_t nx, int64_t stages, S* memory)
      : ny_(ny), nx_(nx), pitch_((nx + 1 + 15) / 16 * 16), memory_(memory) {
    // Zero the plane outside, the rims of the others, and the alternating masks.
    std::fill_n(memory_, plane_size(), S(0));
    for (int64_t p = 0; p < 3 * stages; ++p) {
      S* plane = memory_ + (1 + p) * plane_size();
      std::fill_n(plane, margin + pitch_, S(0));
      std::fill_n(plane + margin + (ny_ + 1) * pitch_, pitch_ + margin, S(0));
      for (int64_t y = 1; y <= ny_; ++y) std::fill_n(plane + margin + y * pitch_ + nx_, pitch_ - nx_, S(0));
    }
    S* mask = memory_ + (1 + 3 * stages) * plane_size();
    for (int64_t i = 0; i < nx_ + 1; ++i) mask[i] = S(i % 2 == 0);
    even_ = mask;
  }

  static int64_t size(int64_t ny, int64_t nx, int64_t stages) {
    const int64_t pitch = (nx + 1 + 15) / 16 * 16;
    return (1 + 3 * stages) * ((ny + 2) * pitch + 2 * margin) + pitch + 16;
  }

  // Row y of plane z of a stage, or zeros outside the grid's planes 0..nz-1.
  S* row(int64_t stage, int64_t z, int64_t y) const {
    return memory_ + (1 + 3 * stage + z % 3) * plane_size() + margin + (y + 1) * pitch_;
  }
  const S* zeros(int64_t y) const { return memory_ + margin + (y + 1) * pitch_; }
  const S* row(int64_t stage, int64_t z, int64_t nz, int64_t y) const {
    return z < 0 || z >= nz ? zeros(y) : row(stage, z, y);
  }
  // 1, 0, 1, 0 ... or 0, 1, 0, 1 ...
  const S* mask(bool from_one) const { return even_ + (from_one ? 0 : 1); }

 private:
  int64_t plane_size() const { return (ny_ + 2) * pitch_ + 2 * margin; }

  int64_t ny_, nx_, pitch_;
  S* memory_;
  const S* even_ = nullptr;
};

template <class S>
struct CoarseVector {  // of the next level: a grid's or a graph's
  S* values;
  int64_t ny, nx;
};

std::vector<Stage> down_stages(GridSmoother smoother, int64_t sweeps) {
  std::vector<Stage> stages;
  if (smoother == GridSmoother::red_black) {
    stages = {Stage::start, Stage::solve};
    for (int64_t k = 1; k < sweeps; ++k) stages.insert(stages.end(), {Stage::red, Stage::black});
  } else {
    stages = {Stage::scale, Stage::stencil};
    for (int64_t k = 1; k < sweeps; ++k) stages.insert(stages.end(), {Stage::scaled_residual, Stage::stencil_add});
  }
  stages.insert(stages.end(), {Stage::residual, Stage::restriction});
  return stages;
}

std::vector<Stage> up_stages(GridSmoother smoother, int64_t sweeps) {
  std::vector<Stage> stages{Stage::inject, Stage::correct};
  for (int64_t k = 0; k < sweeps; ++k)
    if (smoother == GridSmoother::red_black)
      stages.insert(stages.end(), {Stage::black, Stage::red});
    else
      stages.insert(stages.end(), {Stage::scaled_residual, Stage::stencil_add});
  return stages;
}

// One worker's pass over a grid level. B is the type of the right-hand side, Out that of what the pass up writes.
template <class S, class B, class Out>
struct GridPass {
  const GridLevel<S>& grid;
  const B* b;
  S* x;                    // written on the way down, read on the way up
  Out* out;                // written on the way up
  CoarseVector<S> coarse;  // b of the next level on the way down, e on the way up
  const std::vector<Stage>& stages;
  Rings<S> rings;
  Range own;  // planes

  void run() const {
    const auto last = static_cast<int64_t>(stages.size()) - 1;
    // Stage s does the planes that stage s + 1 needs: one more on either side.
    const auto planes = [&](int64_t s) {
      return Range{std::max<int64_t>(0, own.begin - (last - s)), std::min(grid.nz, own.end + (last - s))};
    };
    for (int64_t t = planes(0).begin; t < own.end + last; ++t)
      for (int64_t s = 0; s <= last; ++s)
        if (const int64_t z = t - s; z >= planes(s).begin && z < planes(s).end) plane(s, z);
  }

  void plane(int64_t s, int64_t z) const {
    if (grid.cells)
      plane_with(s, z, [&](int64_t at) { return VoxelLinks<S>{grid.cells + at}; });
    else
      plane_with(s, z, [&](int64_t at) {
        return FaceLinks<S>{grid.below + at, grid.below + at + grid.plane(), grid.front + at, grid.front + at + grid.nx,
                            grid.left + at,  grid.inverse_diagonal + at};
      });
  }

  Neighbours<S> neighbours(int64_t s, int64_t z, int64_t y) const {
    return {rings.row(s, z, y), rings.row(s, z - 1, grid.nz, y), rings.row(s, z + 1, grid.nz, y),
            rings.row(s, z, y - 1), rings.row(s, z, y + 1)};
  }

  template <class LinksAt>
  void plane_with(int64_t s, int64_t z, LinksAt links_at) const {
    const bool owned = z >= own.begin && z < own.end;
    const bool last_smoothing = s + 3 == static_cast<int64_t>(stages.size()) && stages.back() == Stage::restriction;
    for (int64_t y = 0; y < grid.ny; ++y) {
      const int64_t at = (z * grid.ny + y) * grid.nx;
      row(s, z, y, at, links_at(at));
      if (last_smoothing && owned) std::copy_n(rings.row(s, z, y), grid.nx, x + at);
    }
  }

  template <class Links>
  void row(int64_t s, int64_t z, int64_t y, int64_t at, Links links) const {
    const int64_t n = grid.nx;
    const bool is_last = s + 1 == static_cast<int64_t>(stages.size());
    S* target = rings.row(s, z, y);
    const S* red = rings.mask((z + y) % 2 == 0);
    const S* black = rings.mask((z + y) % 2 != 0);
    const Sides sides{z % 2 != 0, y % 2 != 0};
    switch (stages[static_cast<size_t>(s)]) {
      case Stage::start:
        return start_row<S, B>(links, n, red, b + at, target);
      case Stage::solve:
        return solve_row<S, B>(links, n, neighbours(s - 1, z, y), b + at, target);
      case Stage::red:
      case Stage::black: {
        const S* mask = stages[static_cast<size_t>(s)] == Stage::red ? red : black;
        if (is_last) return half_sweep_row<S, B>(links, n, mask, neighbours(s - 1, z, y), b + at, out + at);
        return half_sweep_row<S, B>(links, n, mask, neighbours(s - 1, z, y), b + at, target);
      }
      case Stage::scale:
        return scaled_row<S, B>(links, n, b + at, target);
      case Stage::scaled_residual:
        return scaled_residual_row<S, B>(links, n, neighbours(s - 1, z, y), b + at, target);
      case Stage::stencil:
      case Stage::stencil_add: {
        std::array<const S*, 9> rows{};
        for (int64_t dz = -1; dz <= 1; ++dz)
          for (int64_t dy = -1; dy <= 1; ++dy)
            rows[static_cast<size_t>(3 * dz + dy + 4)] = rings.row(s - 1, z + dz, grid.nz, y + dy);
        // After the correction the transposed stencil.
        const bool going_up = stages.front() == Stage::inject;
        std::array<S, 27> k;
        for (size_t i = 0; i < 27; ++i) k[i] = grid.stencil[going_up ? 26 - i : i];
        const S* from = stages[static_cast<size_t>(s)] == Stage::stencil ? nullptr : rings.row(s - 2, z, y);
        if (is_last) return stencil_row<S>(links, n, rows.data(), k.data(), from, out + at);
        return stencil_row<S>(links, n, rows.data(), k.data(), from, target);
      }
      case Stage::residual:
        return residual_row<S, B>(links, n, neighbours(s - 1, z, y), b + at, target);
      case Stage::restriction:
        partners_row<S>(links, sides, n, neighbours(s - 1, z, y), rings.mask(true), target);
        return restrict_row(z, y, at, target);
      case Stage::inject:
        return inject_row(z, y, at, target);
      case Stage::correct:
        return correct_row<S>(links, sides, n, neighbours(s - 1, z, y), rings.mask(true), *grid.scale, x + at, target);
    }
  }

  void restrict_row(int64_t z, int64_t y, int64_t at, const S* values) const {
    if (!grid.labels)
      return add_pairs(coarse.nx, values, z % 2 != 0 || y % 2 != 0,
                       coarse.values + (z / 2 * coarse.ny + y / 2) * coarse.nx);
    if (z % 2 == 0 && y == 0)
      std::fill(coarse.values + grid.first_nodes[z / 2], coarse.values + grid.first_nodes[z / 2 + 1], S(0));
    for (int64_t i = 0; i < grid.nx; ++i)
      if (const int32_t node = grid.labels[at + i]; node >= 0) coarse.values[node] += values[i];
  }

  void inject_row(int64_t z, int64_t y, int64_t at, S* target) const {
    if (!grid.labels) return repeat_pairs(grid.nx, coarse.values + (z / 2 * coarse.ny + y / 2) * coarse.nx, target);
    for (int64_t i = 0; i < grid.nx; ++i) {
      const int32_t node = grid.labels[at + i];
      target[i] = node >= 0 ? coarse.values[node] : S(0);
    }
  }
};

template <class S, class T>
class CpuPasses {
 public:
  CpuPasses(Team& team, const Hierarchy<S>& M, const T* r, S* work, T* z)
      : team_(team),
        M_(M),
        r_(r),
        z_(z),
        down_(down_stages(M.smoother, M.sweeps)),
        up_(up_stages(M.smoother, M.sweeps)) {
    x0_ = work;
    work += M.n();
    vectors_.resize(M.levels.size());
    for (size_t l = 1; l < M.levels.size(); ++l) {
      const int64_t n = M.levels[l].n;
      vectors_[l] = {work, work + n, work + 2 * n, work + 3 * n};
      work += 4 * n;
    }
    rings_ = work;
  }

  int64_t visits(size_t l) const { return M_.levels[l].visits; }

  void down(size_t l) {
    if (M_.levels[l].kind == LevelKind::graph) return graph_down(l);
    if (l == 0) return grid_pass<T, S>(l, down_, r_, x0_, nullptr, vectors_[1].b);
    grid_pass<S, S>(l, down_, vectors_[l].b, vectors_[l].x, nullptr, vectors_[l + 1].b);
  }

  void up(size_t l) {
    if (M_.levels[l].kind == LevelKind::graph) return graph_up(l);
    if (l == 0) return grid_pass<T, T>(l, up_, r_, x0_, z_, vectors_[1].e);
    grid_pass<S, S>(l, up_, vectors_[l].b, vectors_[l].x, vectors_[l].e, vectors_[l + 1].e);
  }

  void solve_last() {
    const size_t l = M_.levels.size() - 1;
    const auto& level = M_.levels[l];
    if (level.kind == LevelKind::dense) {
      for (int64_t i = 0; i < level.n; ++i) {
        S sum = 0;
        for (int64_t j = 0; j < level.n; ++j) sum += level.dense[i * level.n + j] * vectors_[l].b[j];
        vectors_[l].e[i] = sum;
      }
    } else {
      solve_factor(level.factor, vectors_[l].b, vectors_[l].e);
    }
  }

  void correct(size_t l) {
    const Vectors& v = vectors_[l];
    std::copy_n(v.e, M_.levels[l].n, v.saved);
    graph_residual(M_.levels[l].graph, v, v.x);
    std::copy_n(v.x, M_.levels[l].n, v.b);
  }

  void add(size_t l) {
    const Vectors& v = vectors_[l];
    for (int64_t i = 0; i < M_.levels[l].n; ++i) v.e[i] += v.saved[i];
  }

 private:
  struct Vectors {
    S *b, *x, *e, *saved;
  };

  // body(worker, workers) on all threads where the level is large, else here.
  template <class Body>
  void pass(int64_t n, Body&& body) {
    if (n >= parallel_from)
      team_.pass(body);
    else
      body(0, 1);
  }
  template <class Body>
  void for_each(int64_t n, Body&& body) {
    pass(n, [&](int worker, int workers) {
      const Range mine = share(n, worker, workers);
      for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
    });
  }

  template <class B, class Out>
  void grid_pass(size_t l, const std::vector<Stage>& stages, const B* b, S* x, Out* out, S* coarse) {
    const GridLevel<S>& grid = M_.levels[l].grid;
    const GridLevel<S>& fine = M_.levels[0].grid;
    const int64_t most = static_cast<int64_t>(std::max(down_.size(), up_.size()));
    const int64_t ring_size = Rings<S>::size(fine.ny, fine.nx, most);
    pass(grid.size(), [&](int worker, int team) {
      const int workers = std::min(team, M_.workers);
      if (worker >= workers) return;
      const Range blocks = share(grid.coarse(grid.nz), worker, workers);
      const Range own{2 * blocks.begin, std::min(2 * blocks.end, grid.nz)};
      if (own.begin >= own.end) return;
      const Rings<S> rings(grid.ny, grid.nx, static_cast<int64_t>(stages.size()), rings_ + worker * ring_size);
      GridPass<S, B, Out>{grid, b, x, out, {coarse, grid.coarse(grid.ny), grid.coarse(grid.nx)}, stages, rings, own}
          .run();
    });
  }

  static void solve_factor(const Factor<S>& L, const S* b, S* e) {
    std::copy_n(b, L.n, e);
    for (int64_t k = 0; k < L.n; ++k) {
      const S value = e[L.order[k]];
      for (int32_t t = L.start[k]; t < L.start[k + 1]; ++t) e[L.row[t]] += L.share[t] * value;
    }
    for (int64_t k = L.n - 1; k >= 0; --k) {
      S value = L.inverse_pivot[k] * e[L.order[k]];
      for (int32_t t = L.start[k]; t < L.start[k + 1]; ++t) value += L.share[t] * e[L.row[t]];
      e[L.order[k]] = value;
    }
  }

  S graph_row(const GraphLevel<S>& graph, int32_t i, const S* e) const {
    S sum = 0;
    for (int32_t k = graph.links.crow[i]; k < graph.links.crow[i + 1]; ++k)
      sum += graph.links.values[k] * e[graph.links.col[k]];
    return sum;
  }

  // e = one sweep from zero: red, then black.
  void graph_start(const GraphLevel<S>& graph, const Vectors& v) {
    for_each(graph.red_count, [&](int64_t k) {
      const int32_t i = graph.red[k];
      v.e[i] = v.b[i] * graph.inverse_diagonal[i];
    });
    half_sweep(graph, graph.black, graph.n - graph.red_count, v);
  }
  void half_sweep(const GraphLevel<S>& graph, const int32_t* nodes, int64_t count, const Vectors& v) {
    for_each(count, [&](int64_t k) {
      const int32_t i = nodes[k];
      v.e[i] = (v.b[i] + graph_row(graph, i, v.e)) * graph.inverse_diagonal[i];
    });
  }
  void graph_sweep(const GraphLevel<S>& graph, const Vectors& v, bool reverse) {
    const int64_t black_count = graph.n - graph.red_count;
    if (!reverse) half_sweep(graph, graph.red, graph.red_count, v);
    half_sweep(graph, graph.black, black_count, v);
    if (reverse) half_sweep(graph, graph.red, graph.red_count, v);
  }

  void graph_residual(const GraphLevel<S>& graph, const Vectors& v, S* r) {
    for_each(graph.n, [&](int64_t i) {
      const S inverse = graph.inverse_diagonal[i];
      r[i] = inverse > 0 ? v.b[i] - v.e[i] / inverse + graph_row(graph, static_cast<int32_t>(i), v.e) : S(0);
    });
  }

  void graph_down(size_t l) {
    const GraphLevel<S>& graph = M_.levels[l].graph;
    const Vectors& v = vectors_[l];
    graph_start(graph, v);
    for (int64_t k = 1; k < graph_sweeps; ++k) graph_sweep(graph, v, false);
    graph_residual(graph, v, v.x);
    S* coarse = vectors_[l + 1].b;
    const Rows<S>& R = graph.restriction;
    for_each(M_.levels[l + 1].n, [&](int64_t i) {
      S sum = 0;
      for (int32_t k = R.crow[i]; k < R.crow[i + 1]; ++k) sum += R.values[k] * v.x[R.col[k]];
      coarse[i] = sum;
    });
  }

  void graph_up(size_t l) {
    const GraphLevel<S>& graph = M_.levels[l].graph;
    const Vectors& v = vectors_[l];
    const S* coarse = vectors_[l + 1].e;
    const Rows<S>& P = graph.prolongation;
    for_each(graph.n, [&](int64_t i) {
      S sum = v.e[i];
      for (int32_t k = P.crow[i]; k < P.crow[i + 1]; ++k) sum += P.values[k] * coarse[P.col[k]];
      v.e[i] = sum;
    });
    for (int64_t k = 0; k < graph_sweeps; ++k) graph_sweep(graph, v, true);
  }

  Team& team_;
  const Hierarchy<S>& M_;
  const T* r_;
  T* z_;
  std::vector<Stage> down_, up_;
  S *x0_ = nullptr, *rings_ = nullptr;
  std::vector<Vectors> vectors_;
};

}  // namespace

template <class S>
int64_t ring_size(const Hierarchy<S>& M) {
  const GridLevel<S>& grid = M.levels.front().grid;
  return Rings<S>::size(grid.ny, grid.nx, 2 * M.sweeps + 2);
}

template <class S>
int64_t multigrid_workspace_cpu(const Hierarchy<S>& M, int threads) {
  return cycle_workspace(M) + std::max(1, threads) * ring_size(M);
}

template <class S>
int workers_for(const Hierarchy<S>& M, int64_t workspace_bytes) {
  const int64_t left = workspace_bytes / int64_t(sizeof(S)) - cycle_workspace(M);
  return static_cast<int>(std::clamp<int64_t>(left / ring_size(M), 0, 1 << 20));
}

template <class S, class T>
void multigrid_cpu(Team& team, const Hierarchy<S>& M, const T* r, S* work, T* z) {
  if (M.levels.size() == 1) {  // a grid so small that it is solved exactly
    for (int64_t i = 0; i < M.n(); ++i) {
      S sum = 0;
      for (int64_t j = 0; j < M.n(); ++j) sum += M.levels[0].dense[i * M.n() + j] * S(r[j]);
      z[i] = static_cast<T>(sum);
    }
    return;
  }
  CpuPasses<S, T> passes(team, M, r, work, z);
  cycle(passes, 0, M.levels.size());
}

template int workers_for(const Hierarchy<float>&, int64_t);
template int workers_for(const Hierarchy<double>&, int64_t);
template int64_t multigrid_workspace_cpu(const Hierarchy<float>&, int);
template int64_t multigrid_workspace_cpu(const Hierarchy<double>&, int);
template void multigrid_cpu(Team&, const Hierarchy<float>&, const float*, float*, float*);
template void multigrid_cpu(Team&, const Hierarchy<float>&, const double*, float*, double*);
template void multigrid_cpu(Team&, const Hierarchy<double>&, const float*, double*, float*);
template void multigrid_cpu(Team&, const Hierarchy<double>&, const double*, double*, double*);

}  // namespace kantor
