// The cycle of multigrid.h on the CPU.
//
// Memory traffic per cell of the finest grid with float storage and double vectors, voxel links, red-black 1 + 1:
//   down   read r 8, cells 2, write x 4                 up   read x 4, r 8, cells 2, write z 8
// that is 36 bytes, 48 where a written line is fetched first, and a seventh of about 50 for all coarser levels.
#include <algorithm>
#include <vector>

#include "linalg/multigrid.h"
#include "linalg/multigrid_grid_pass.h"

namespace kantor {
namespace {

using namespace multigrid;

// Workers pay on levels of at least this many unknowns.
constexpr int64_t parallel_from = 1 << 14;

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
    if (!M.begins_with_graph()) work += M.n();
    vectors_.resize(M.levels.size());
    for (size_t l = M.begins_with_graph() ? 0 : 1; l < M.levels.size(); ++l) {
      const int64_t n = M.levels[l].n;
      vectors_[l] = {work, work + n, work + 2 * n, work + 3 * n};
      work += 4 * n;
    }
    rings_ = work;
  }

  int64_t visits(size_t l) const { return M_.levels[l].visits; }

  void run() {
    if (!M_.begins_with_graph()) return cycle(*this, 0, M_.levels.size());
    std::copy_n(r_, M_.n(), vectors_[0].b);
    visit(*this, 0, M_.levels.size());
    std::copy_n(vectors_[0].e, M_.n(), z_);
  }

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
      const Slab mine = Slab{{0, grid.nz}, {0, grid.nz}}.part(worker, workers);
      if (mine.own.begin >= mine.own.end) return;
      const Rings<S> rings(grid.ny, grid.nx, static_cast<int64_t>(stages.size()), rings_ + worker * ring_size);
      GridPass<S, B, Out>{grid, b, x, out, {coarse, grid.coarse(grid.ny), grid.coarse(grid.nx)}, stages, rings, mine}
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
  if (M.levels.front().kind == LevelKind::dense) {  // so small that it is solved exactly
    for (int64_t i = 0; i < M.n(); ++i) {
      S sum = 0;
      for (int64_t j = 0; j < M.n(); ++j) sum += M.levels[0].dense[i * M.n() + j] * S(r[j]);
      z[i] = static_cast<T>(sum);
    }
    return;
  }
  CpuPasses<S, T>(team, M, r, work, z).run();
}

template <class S>
int64_t slab_pass_workspace(int64_t ny, int64_t nx, int64_t sweeps, int threads) {
  return std::max(1, threads) * Rings<S>::size(ny, nx, 2 * sweeps + 2);
}

template <class S>
void slab_pass_cpu(Team& team, const SlabPass<S>& p, S* work) {
  const std::vector<Stage> stages = p.up ? up_stages(p.smoother, p.sweeps) : down_stages(p.smoother, p.sweeps);
  const GridLevel<S>& grid = p.grid;
  const int64_t ring_size = slab_pass_workspace<S>(grid.ny, grid.nx, p.sweeps, 1);
  // Where the way up begins, it reads x as far out as its sweeps reach, which is as far as the last smoothing goes
  // here.
  const Slab all{p.own, {std::max<int64_t>(0, p.own.begin - 2), std::min(grid.nz, p.own.end + 2)}};
  team.pass([&](int worker, int workers) {
    const Slab mine = all.part(worker, workers);
    if (mine.own.begin >= mine.own.end) return;
    const Rings<S> rings(grid.ny, grid.nx, static_cast<int64_t>(stages.size()), work + worker * ring_size);
    const CoarseVector<S> coarse{p.coarse, grid.coarse(grid.ny), grid.coarse(grid.nx), p.first_coarse};
    GridPass<S, S, S>{grid, p.b, p.x, p.out, coarse, stages, rings, mine}.run();
  });
}

template int workers_for(const Hierarchy<float>&, int64_t);
template int workers_for(const Hierarchy<double>&, int64_t);
template int64_t multigrid_workspace_cpu(const Hierarchy<float>&, int);
template int64_t multigrid_workspace_cpu(const Hierarchy<double>&, int);
template int64_t slab_pass_workspace<float>(int64_t, int64_t, int64_t, int);
template int64_t slab_pass_workspace<double>(int64_t, int64_t, int64_t, int);
template void slab_pass_cpu(Team&, const SlabPass<float>&, float*);
template void slab_pass_cpu(Team&, const SlabPass<double>&, double*);
template void multigrid_cpu(Team&, const Hierarchy<float>&, const float*, float*, float*);
template void multigrid_cpu(Team&, const Hierarchy<float>&, const double*, float*, double*);
template void multigrid_cpu(Team&, const Hierarchy<double>&, const float*, double*, float*);
template void multigrid_cpu(Team&, const Hierarchy<double>&, const double*, double*, double*);

}  // namespace kantor
