// Set-up and application of the multigrid preconditioner.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bind/dispatch.h"
#include "bind/operator_args.h"
#include "bind/tensor_caster.h"
#include "linalg/multigrid_setup.h"

namespace py = pybind11;

namespace kantor {
namespace {

// Returns the arena as a NumPy array and the levels' layout as integers. `operands` are a PoissonGrid's: cells, or
// shift, faces and Dirichlet diagonal. `stencils` (levels, 27) and `scales` (levels) may be absent.
py::tuple bind_multigrid_setup(const std::vector<Tensor>& operands, int64_t nz, int64_t ny, int64_t nx,
                               bool single_precision, bool walls, const std::optional<Tensor>& stencils,
                               const std::optional<Tensor>& scales, int64_t first_level, int threads) {
  const bool voxels = operands.size() == 1;
  require(voxels || operands.size() == 4 || operands.size() == 5, "multigrid_setup: expected a PoissonGrid's operands");
  for (const Tensor& t : operands) require_host(t, "multigrid_setup");
  SetupOptions options;
  options.walls = walls, options.first_level = first_level, options.threads = threads;
  if (stencils) {
    options.stencils = elements<const double>(*stencils, "stencils").data();
    options.stencil_levels = stencils->shape[0];
    require(stencils->size() == 27 * options.stencil_levels, "multigrid_setup: stencils must be (levels, 27)");
  }
  if (scales) {
    options.scales = elements<const double>(*scales, "scales").data();
    if (!stencils) options.stencil_levels = scales->size();
    require(scales->size() == options.stencil_levels, "multigrid_setup: one scale for each level of stencils");
  }
  const auto build = [&]<class T>(T) {
    FinestGrid<T> grid{nz, ny, nx, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (voxels) {
      const auto cells = elements<const uint8_t>(operands[0], "cells");
      require(operands[0].size() == 2 * nz * ny * nx, "multigrid_setup: cells must hold two bytes a cell");
      grid.cells = reinterpret_cast<const uint16_t*>(cells.data());
    } else {
      const bool three = operands.size() == 5;
      grid.fz = elements<const T>(operands[1], "fz").data();
      grid.fy = three ? elements<const T>(operands[2], "fy").data() : nullptr;
      grid.fx = elements<const T>(operands[three ? 3 : 2], "fx").data();
      grid.d = elements<const T>(operands[three ? 4 : 3], "d").data();
    }
    py::gil_scoped_release nogil;
    return single_precision ? build_hierarchy<float>(grid, options) : build_hierarchy<double>(grid, options);
  };
  auto* built = new BuiltHierarchy(!voxels && operands[0].dtype == Dtype::f32 ? build(float{}) : build(double{}));
  const py::capsule owner(built, [](void* p) { delete static_cast<BuiltHierarchy*>(p); });
  const auto* layout = reinterpret_cast<const int64_t*>(built->levels.data());
  return py::make_tuple(
      py::array_t<uint8_t>({built->arena.size()}, {1}, reinterpret_cast<const uint8_t*>(built->arena.data()), owner),
      std::vector<int64_t>(layout, layout + level_layout_size * static_cast<int64_t>(built->levels.size())));
}

// Bytes of workspace, enough for the CPU and for CUDA, for the encoding [8, n, width, ...] of a hierarchy; the arena is
// not looked at.
int64_t bind_multigrid_workspace(const std::vector<int64_t>& layout, int threads) {
  Tensor nothing;
  nothing.dtype = Dtype::u8, nothing.ndim = 1, nothing.strides[0] = 1;
  const OperatorArgs args{{nothing, nothing}, layout, {1.0}};
  const Multigrid M = OperatorReader(args, nothing).multigrid();
  return std::visit(
      [&]<class S>(const Hierarchy<S>& h) {
        return int64_t(sizeof(S)) * std::max(multigrid_workspace_cpu(h, threads), multigrid_workspace_cuda(h));
      },
      M.hierarchy);
}

void bind_multigrid_apply(const std::vector<Tensor>& operands, const std::vector<int64_t>& layout, const Tensor& r,
                          const Tensor& z, int threads) {
  const OperatorArgs args{operands, layout, {1.0}};
  switch_float(r, "r", [&]<class T>(T) {
    const Multigrid M = OperatorReader(args, r).multigrid();
    const T* rs = elements<const T>(r, "r").data();
    T* zs = elements<T>(z, "z").data();
    const int64_t n = M.n();
    require(std::visit([](const auto& h) { return h.workers; }, M.hierarchy) > 0, "multigrid: too little workspace");
    require(n > 0 && r.size() % n == 0 && z.size() == r.size(), "multigrid: r and z must be (batch, n)");
    const Exec exec = exec_for(r, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(r)) {
        for (int64_t k = 0; k < r.size() / n; ++k) apply_multigrid_cuda(exec, M, rs + k * n, zs + k * n);
        return;
      }
    (void)use_cuda_code(r);
    Team::run(threads_for(exec.threads, n), true, [&](Team& team) {
      for (int64_t k = 0; k < r.size() / n; ++k) apply_multigrid_cpu(team, M, rs + k * n, zs + k * n);
    });
  });
}

// --- the parts of a grid that several processes share ---

template <class S>
const S* operand(const std::vector<Tensor>& operands, size_t which, int64_t size) {
  const auto values = elements<const S>(operands.at(which), "grid");
  require(static_cast<int64_t>(values.size()) == size, "grid: an array has the wrong number of elements");
  return values.data();
}

const uint16_t* cells_of(const std::vector<Tensor>& operands, int64_t n) {
  return reinterpret_cast<const uint16_t*>(operand<uint8_t>(operands, 0, 2 * n));
}

// `grid` is cells (uint8), or below, front, left and Dirichlet diagonal; the last four become those of the next level.
// Returns how often the blocks of planes [begin, end) fall apart.
int64_t bind_multigrid_coarsen(const std::vector<Tensor>& grid, int64_t nz, int64_t ny, int64_t nx, int64_t level,
                               int64_t begin, int64_t end, const std::vector<Tensor>& coarse, int threads) {
  require(coarse.size() == 4 && (grid.size() == 1 || grid.size() == 4), "multigrid_coarsen: expected four arrays");
  require(0 <= begin && begin <= end && end <= (nz + 1) / 2, "multigrid_coarsen: planes out of range");
  for (const Tensor& t : grid) require_host(t, "multigrid_coarsen");
  for (const Tensor& t : coarse) require_host(t, "multigrid_coarsen");
  return switch_float(coarse[0], "coarse", [&]<class S>(S) {
    const int64_t plane = ny * nx, n = nz * plane;
    const uint16_t* cells = grid.size() == 1 ? cells_of(grid, n) : nullptr;
    FaceArrays<S> faces{};
    if (!cells)
      faces = {operand<S>(grid, 0, n + plane), operand<S>(grid, 1, n + nx), operand<S>(grid, 2, n + 1),
               operand<S>(grid, 3, n)};
    int64_t splits = 0;
    GridCoefficients<S> c;
    {
      py::gil_scoped_release nogil;
      c = coarsen_slab<S>(nz, ny, nx, cells, faces, level, {begin, end}, threads, splits);
    }
    const std::vector<S>* from[] = {&c.below, &c.front, &c.left, &c.d};
    for (size_t i = 0; i < 4; ++i) {
      const auto to = elements<S>(coarse[i], "coarse");
      require(to.size() == from[i]->size(), "multigrid_coarsen: an array has the wrong number of elements");
      std::copy(from[i]->begin(), from[i]->end(), to.begin());
    }
    return splits;
  });
}

// A pass over planes [begin, end) of a grid: csrc/linalg/multigrid.h, SlabPass. `grid` is cells (uint8), or below,
// front, left and inverse diagonal; `nodes` is empty, or the graph node of each cell and the first node of each plane
// of blocks; `place` is nz, ny, nx, begin, end, first coarse plane.
void bind_multigrid_pass(const std::vector<Tensor>& grid, const std::vector<Tensor>& nodes,
                         const std::optional<Tensor>& stencil, double scale, const std::vector<int64_t>& place,
                         int64_t sweeps, bool up, const Tensor& b, const Tensor& x, const Tensor& out,
                         const Tensor& coarse, const Tensor& workspace, int threads) {
  for (const Tensor* t : {&b, &x, &out, &coarse, &workspace}) require_host(*t, "multigrid_pass");
  require(place.size() == 6 && place[3] >= 0 && place[3] <= place[4] && place[4] <= place[0], "multigrid_pass: place");
  switch_float(b, "b", [&]<class S>(S) {
    const int64_t nz = place[0], ny = place[1], nx = place[2], plane = ny * nx, n = nz * plane;
    GridLevel<S> level{};
    level.nz = nz, level.ny = ny, level.nx = nx;
    if (grid.size() == 1) {
      level.cells = cells_of(grid, n);
    } else {
      level.below = operand<S>(grid, 0, n + plane), level.front = operand<S>(grid, 1, n + nx);
      level.left = operand<S>(grid, 2, n + 1), level.inverse_diagonal = operand<S>(grid, 3, n);
    }
    if (!nodes.empty()) {
      level.labels = operand<int32_t>(nodes, 0, n);
      level.first_nodes = operand<int64_t>(nodes, 1, (nz + 1) / 2 + 1);
    }
    if (stencil) level.stencil = elements<const S>(*stencil, "stencil").data();
    const S factor = static_cast<S>(scale);
    level.scale = &factor;
    require(b.size() == n && x.size() == n && out.size() == n,
            "multigrid_pass: b, x and out must have the grid's size");
    const int64_t first_block = place[3] / 2 + place[5], last_block = (place[4] + 1) / 2 + place[5];
    require(!nodes.empty() || (first_block >= 0 && last_block * level.coarse(ny) * level.coarse(nx) <= coarse.size()),
            "multigrid_pass: coarse is too small");
    const auto work = elements<uint8_t>(workspace, "workspace");
    const int team_size = threads_for(threads, (place[4] - place[3]) * plane);
    require(static_cast<int64_t>(work.size()) >= int64_t(sizeof(S)) * slab_pass_workspace<S>(ny, nx, sweeps, team_size),
            "multigrid_pass: too little workspace");
    const SlabPass<S> pass{level,
                           stencil ? GridSmoother::stencil : GridSmoother::red_black,
                           sweeps,
                           up,
                           {place[3], place[4]},
                           elements<const S>(b, "b").data(),
                           elements<S>(x, "x").data(),
                           elements<S>(out, "out").data(),
                           elements<S>(coarse, "coarse").data(),
                           place[5]};
    py::gil_scoped_release nogil;
    Team::run(team_size, false, [&](Team& team) { slab_pass_cpu(team, pass, reinterpret_cast<S*>(work.data())); });
  });
}

// Bytes.
int64_t bind_multigrid_pass_workspace(int64_t ny, int64_t nx, int64_t sweeps, int64_t width, int threads) {
  return width * slab_pass_workspace<float>(ny, nx, sweeps, threads);
}

}  // namespace

void bind_multigrid(py::module_& m) {
  m.attr("level_layout_size") = level_layout_size;
  m.def("multigrid_setup", &bind_multigrid_setup);
  m.def("multigrid_workspace", &bind_multigrid_workspace);
  m.def("multigrid_apply", &bind_multigrid_apply);
  m.attr("multigrid_dense_limit") = dense_limit;
  m.def("multigrid_coarsen", &bind_multigrid_coarsen);
  m.def("multigrid_walls_matter", &walls_matter);
  m.def("multigrid_pass", &bind_multigrid_pass);
  m.def("multigrid_pass_workspace", &bind_multigrid_pass_workspace);
}

}  // namespace kantor
