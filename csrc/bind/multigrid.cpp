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
                               const std::optional<Tensor>& scales, int threads) {
  const bool voxels = operands.size() == 1;
  require(voxels || operands.size() == 4 || operands.size() == 5, "multigrid_setup: expected a PoissonGrid's operands");
  for (const Tensor& t : operands) require_host(t, "multigrid_setup");
  SetupOptions options;
  options.walls = walls, options.threads = threads;
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

}  // namespace

void bind_multigrid(py::module_& m) {
  m.attr("level_layout_size") = level_layout_size;
  m.def("multigrid_setup", &bind_multigrid_setup);
  m.def("multigrid_workspace", &bind_multigrid_workspace);
  m.def("multigrid_apply", &bind_multigrid_apply);
}

}  // namespace kantor
