// The cycle of multigrid.h on CUDA, a kernel for each stage: nothing waits for the device, nothing is allocated.
// Memory traffic per cell of the finest grid with float storage and double vectors, voxel links, red-black 1 + 1:
//   start        read r 8, cells 2, write x 4            correction   read x 4, cells 2, write x 4
//   residual     read x 4, r 8, cells 2, write 4         black        read x 4, r 8, cells 2, write x 4
//   restriction  read 4, cells 2                         red          read x 4, r 8, cells 2, write z 8
// that is 88 bytes, and a seventh of about 150 (with coefficients) for all coarser levels; on small grids the launches
// count.
#include <vector>

#include "core/error.h"
#include "linalg/multigrid_kernels.h"

namespace kantor {
namespace {

using namespace multigrid;

constexpr unsigned threads_per_block = 256;

template <class S, class T>
class CudaPasses {
 public:
  CudaPasses(const Exec& exec, const Hierarchy<S>& M, const T* r, S* work, T* z)
      : exec_(exec), M_(M), r_(r), z_(z), vectors_(M.levels.size()) {
    // On the finest grid r and z are b and e; the residual has a place of its own.
    vectors_[0] = {nullptr, work, nullptr, work + M.n()};
    work += 2 * M.n();
    for (size_t l = 1; l < M.levels.size(); ++l) {
      const int64_t n = M.levels[l].n;
      vectors_[l] = {work, work + n, work + 2 * n, work + 3 * n};
      work += 4 * n;
    }
  }

  int64_t visits(size_t l) const { return M_.levels[l].visits; }

  void down(size_t l) {
    if (M_.levels[l].kind == LevelKind::graph) return graph_down(l);
    if (l == 0) return grid_down(l, r_);
    grid_down(l, vectors_[l].b);
  }

  void up(size_t l) {
    if (M_.levels[l].kind == LevelKind::graph) return graph_up(l);
    if (l == 0) return grid_up(l, r_, z_);
    grid_up(l, vectors_[l].b, vectors_[l].e);
  }

  void solve_last() {
    const auto& level = M_.levels.back();
    const Vectors& v = vectors_.back();
    if (level.kind == LevelKind::dense) return launch(level.n, dense_kernel<S, S, S>, level.n, level.dense, v.b, v.e);
    const int64_t kept = level.n <= factor_shared_limit<S> ? level.n : 0;
    SIMT_LAUNCH(factor_kernel<S>, dim3(1), threads_per_block, static_cast<size_t>(kept) * sizeof(S), exec_.stream,
                level.factor, v.b, v.e);
  }

  void correct(size_t l) {
    const Vectors& v = vectors_[l];
    launch(M_.levels[l].n, graph_residual_kernel<S>, M_.levels[l].graph, v.b, v.e, v.b, v.saved);
  }

  void add(size_t l) { launch(M_.levels[l].n, add_kernel<S>, M_.levels[l].n, vectors_[l].saved, vectors_[l].e); }

 private:
  struct Vectors {
    S *b, *x, *e, *saved;
  };

  // A thread for each of n.
  template <class... Parameters>
  void launch(int64_t n, void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
    SIMT_LAUNCH(kernel, dim3(simt::blocks_for(n, threads_per_block)), threads_per_block, 0, exec_.stream, arguments...);
  }

  template <class B>
  void half_sweep(const GridLevel<S>& grid, Colour colour, const B* b, S* x) {
    launch(grid.nz * grid.ny * ((grid.nx + 1) / 2), grid_half_sweep_kernel<S, B>, grid, colour, b, x);
  }

  // One sweep with the stencil on x (from zero, if that is null), through the scaled residual in `scratch`.
  template <class B, class Out>
  void stencil_sweep(const GridLevel<S>& grid, bool flipped, const B* b, const S* x, S* scratch, Out* out) {
    launch(grid.size(), grid_residual_kernel<S, B, true>, grid, b, x, scratch);
    launch(grid.size(), grid_stencil_kernel<S, Out>, grid, flipped, scratch, x, out);
  }

  // Grids are visited once, so that `saved` is free for residuals.
  template <class B>
  void grid_down(size_t l, const B* b) {
    const GridLevel<S>& grid = M_.levels[l].grid;
    S *x = vectors_[l].x, *scratch = vectors_[l].saved;
    if (M_.smoother == GridSmoother::red_black) {
      launch(grid.size(), grid_start_kernel<S, B>, grid, b, x);
      for (int64_t k = 1; k < M_.sweeps; ++k)
        half_sweep(grid, Colour::red, b, x), half_sweep(grid, Colour::black, b, x);
    } else {
      for (int64_t k = 0; k < M_.sweeps; ++k) stencil_sweep(grid, false, b, k == 0 ? nullptr : x, scratch, x);
    }
    launch(grid.size(), grid_residual_kernel<S, B, false>, grid, b, x, scratch);
    const int64_t blocks = grid.coarse(grid.nz) * grid.coarse(grid.ny) * grid.coarse(grid.nx);
    launch(blocks, grid_restriction_kernel<S>, grid, scratch, vectors_[l + 1].b);
  }

  template <class B, class Out>
  void grid_up(size_t l, const B* b, Out* out) {
    const GridLevel<S>& grid = M_.levels[l].grid;
    S *x = vectors_[l].x, *scratch = vectors_[l].saved;
    launch(grid.size(), grid_correction_kernel<S>, grid, vectors_[l + 1].e, x);
    for (int64_t k = 0; k < M_.sweeps; ++k) {
      const bool last = k + 1 == M_.sweeps;
      if (M_.smoother == GridSmoother::red_black) {
        half_sweep(grid, Colour::black, b, x);
        if (last)
          launch(grid.size(), grid_last_half_sweep_kernel<S, B, Out>, grid, Colour::red, b, x, out);
        else
          half_sweep(grid, Colour::red, b, x);
      } else if (last) {
        stencil_sweep(grid, true, b, x, scratch, out);
      } else {
        stencil_sweep(grid, true, b, x, scratch, x);
      }
    }
  }

  void graph_half_sweep(const GraphLevel<S>& graph, Colour colour, const Vectors& v) {
    const int64_t count = colour == Colour::red ? graph.red_count : graph.n - graph.red_count;
    launch(count, graph_half_sweep_kernel<S>, graph, colour, v.b, v.e);
  }

  void graph_down(size_t l) {
    const GraphLevel<S>& graph = M_.levels[l].graph;
    const Vectors& v = vectors_[l];
    launch(graph.n, graph_start_kernel<S>, graph, v.b, v.e);
    for (int64_t k = 1; k < graph_sweeps; ++k)
      graph_half_sweep(graph, Colour::red, v), graph_half_sweep(graph, Colour::black, v);
    launch(graph.n, graph_residual_kernel<S>, graph, v.b, v.e, v.x, nullptr);
    const int64_t coarse_n = M_.levels[l + 1].n;
    launch(coarse_n, rows_kernel<S>, coarse_n, graph.restriction, false, v.x, vectors_[l + 1].b);
  }

  void graph_up(size_t l) {
    const GraphLevel<S>& graph = M_.levels[l].graph;
    const Vectors& v = vectors_[l];
    launch(graph.n, rows_kernel<S>, graph.n, graph.prolongation, true, vectors_[l + 1].e, v.e);
    for (int64_t k = 0; k < graph_sweeps; ++k)
      graph_half_sweep(graph, Colour::black, v), graph_half_sweep(graph, Colour::red, v);
  }

  Exec exec_;
  const Hierarchy<S>& M_;
  const T* r_;
  T* z_;
  std::vector<Vectors> vectors_;
};

}  // namespace

template <class S, class T>
void multigrid_cuda(const Exec& exec, const Hierarchy<S>& M, const T* r, S* work, T* z) {
  const simt::DeviceGuard guard(exec.device);
  require(!M.begins_with_graph(), "multigrid: a hierarchy that begins with a graph is for the CPU");
  if (M.levels.size() == 1) {  // a grid so small that it is solved exactly
    SIMT_LAUNCH((dense_kernel<S, T, T>), dim3(1), threads_per_block, 0, exec.stream, M.n(), M.levels[0].dense, r, z);
    return;
  }
  CudaPasses<S, T> passes(exec, M, r, work, z);
  cycle(passes, 0, M.levels.size());
}

template void multigrid_cuda(const Exec&, const Hierarchy<float>&, const float*, float*, float*);
template void multigrid_cuda(const Exec&, const Hierarchy<float>&, const double*, float*, double*);
template void multigrid_cuda(const Exec&, const Hierarchy<double>&, const float*, double*, float*);
template void multigrid_cuda(const Exec&, const Hierarchy<double>&, const double*, double*, double*);

}  // namespace kantor
