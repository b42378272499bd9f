#include <pybind11/stl.h>

#include "bind/dispatch.h"
#include "bind/operator_args.h"
#include "bind/tensor_caster.h"
#include "core/parallel.h"
#include "linalg/csr.h"
#include "linalg/ic0.h"
#include "linalg/poisson_components.h"
#include "linalg/vector.h"

namespace py = pybind11;

namespace kantor {
namespace {

using Operands = std::vector<Tensor>;
using Layout = std::vector<int64_t>;
using Scales = std::vector<double>;

// out = a x + b y: the reference op of the boundary tests and of the call-overhead measurement.
void bind_multiply_add(const Tensor& x, const Tensor& y, const Tensor& out, double a, double b, int threads) {
  require(x.size() == y.size() && x.size() == out.size(), "multiply_add: x, y and out must have the same size");
  require_host(x, "multiply_add"), require_same_device(x, y, "multiply_add"),
      require_same_device(x, out, "multiply_add");
  switch_float(x, "x", [&]<class T>(T) {
    const auto xs = elements<const T>(x, "x"), ys = elements<const T>(y, "y");
    const auto outs = elements<T>(out, "out");
    py::gil_scoped_release nogil;
    const Chunks chunks{x.size()};
    parallel_for(threads_for(threads, chunks.n), chunks.count(), [&](int64_t chunk) {
      const Range r = chunks.range(chunk);
      multiply_add(r.size(), T(a), xs.data() + r.begin, T(b), ys.data() + r.begin, outs.data() + r.begin);
    });
  });
}

void bind_matvec(const Operands& operands, const Layout& layout, const Scales& scales, const Tensor& x, const Tensor& y,
                 const std::optional<Tensor>& projections, int threads) {
  require_same_device(x, y, "matvec");
  const OperatorArgs args{operands, layout, scales};
  switch_float(x, "x", [&]<class T>(T) {
    Operator<T> A = read_operator<T>(args, x);
    const auto xs = elements<const T>(x, "x");
    const auto ys = elements<T>(y, "y");
    const int64_t batch = A.cols > 0 ? x.size() / A.cols : A.rows > 0 ? y.size() / A.rows : 0;
    require(x.size() == batch * A.cols && y.size() == batch * A.rows,
            "matvec: x or y does not match the operator's shape");
    Projections(projections, x).place(A, batch);
    const Exec exec = exec_for(x, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(x)) return matvec_cuda(exec, A, batch, xs.data(), ys.data());
    (void)use_cuda_code(x);
    matvec_cpu(exec, A, batch, xs.data(), ys.data());
  });
}

// A host tensor to zero, on huge pages where it is large: every later pass over it has fewer page faults and TLB
// misses.
void bind_zero_fill(const Tensor& out, int threads) {
  require_host(out, "zero_fill");
  switch_float(out, "out", [&]<class T>(T) {
    T* data = elements<T>(out, "out").data();
    py::gil_scoped_release nogil;
    const Chunks chunks{out.size()};
    advise_huge_pages(data, static_cast<size_t>(out.size()) * sizeof(T));
    parallel_for(threads_for(threads, chunks.n), chunks.count(), [&](int64_t chunk) {
      const Range range = chunks.range(chunk);
      std::fill(data + range.begin, data + range.end, T(0));
    });
  });
}

py::dict bind_csr_check(const Tensor& crow, const Tensor& col, const Tensor& values, int64_t cols) {
  for (const Tensor* t : {&crow, &col, &values}) require_host(*t, "csr_check");
  return switch_index(crow, "crow", [&]<class Index>(Index) {
    return switch_float(values, "values", [&]<class T>(T) {
      require(col.size() == values.size(), "csr_check: col and values must have the same length");
      const CsrReport report =
          csr_check(crow.size() - 1, cols, col.size(), elements<const Index>(crow, "crow").data(),
                    elements<const Index>(col, "col").data(), elements<const T>(values, "values").data());
      return py::dict(py::arg("bad_row") = report.bad_row, py::arg("bad_entry") = report.bad_entry,
                      py::arg("nonfinite_entry") = report.nonfinite_entry, py::arg("sorted") = report.sorted,
                      py::arg("halo") = report.halo);
    });
  });
}

void bind_csr_transpose(const Tensor& crow, const Tensor& col, const Tensor& t_crow, const Tensor& t_col,
                        const Tensor& permutation) {
  for (const Tensor* t : {&crow, &col, &t_crow, &t_col, &permutation}) require_host(*t, "csr_transpose");
  require(t_col.size() == col.size() && permutation.size() == col.size(), "csr_transpose: sizes differ");
  switch_index(crow, "crow", [&]<class Index>(Index) {
    csr_transpose(crow.size() - 1, t_crow.size() - 1, elements<const Index>(crow, "crow").data(),
                  elements<const Index>(col, "col").data(), elements<Index>(t_crow, "t_crow").data(),
                  elements<Index>(t_col, "t_col").data(), elements<Index>(permutation, "permutation").data());
  });
}

py::tuple bind_csr_asymmetry(const Tensor& crow, const Tensor& col, const Tensor& values) {
  for (const Tensor* t : {&crow, &col, &values}) require_host(*t, "csr_asymmetry");
  return switch_index(crow, "crow", [&]<class Index>(Index) {
    return switch_float(values, "values", [&]<class T>(T) {
      const Asymmetry worst =
          csr_asymmetry(crow.size() - 1, elements<const Index>(crow, "crow").data(),
                        elements<const Index>(col, "col").data(), elements<const T>(values, "values").data());
      return py::make_tuple(worst.difference, worst.i, worst.j);
    });
  });
}

int64_t bind_ic0_factor(const Tensor& crow, const Tensor& col, const Tensor& values, double shift,
                        const Tensor& factor) {
  for (const Tensor* t : {&crow, &col, &values, &factor}) require_host(*t, "ic0_factor");
  require(col.size() == values.size() && factor.size() == values.size(), "ic0_factor: sizes differ");
  return switch_float(values, "values", [&]<class T>(T) {
    const auto *rows = elements<const int32_t>(crow, "crow").data(), *cols = elements<const int32_t>(col, "col").data();
    const T* a = elements<const T>(values, "values").data();
    T* l = elements<T>(factor, "factor").data();
    py::gil_scoped_release nogil;
    return ic0_factor(crow.size() - 1, rows, cols, a, shift, l);
  });
}

int64_t bind_level_schedule(const Tensor& crow, const Tensor& col, const Tensor& pointers, const Tensor& rows) {
  for (const Tensor* t : {&crow, &col, &pointers, &rows}) require_host(*t, "level_schedule");
  const int64_t n = crow.size() - 1;
  require(pointers.size() == n + 1 && rows.size() == n, "level_schedule: sizes differ");
  return level_schedule(n, elements<const int32_t>(crow, "crow").data(), elements<const int32_t>(col, "col").data(),
                        elements<int32_t>(pointers, "pointers").data(), elements<int32_t>(rows, "rows").data());
}

void bind_ic0_solve(const Operands& operands, const Layout& layout, const Tensor& r, const Tensor& work,
                    const Tensor& z, int threads) {
  const OperatorArgs args{operands, layout, {1.0}};
  switch_float(r, "r", [&]<class T>(T) {
    const auto M = OperatorReader(args, r).incomplete_cholesky<T>();
    const T* rs = elements<const T>(r, "r").data();
    T *works = elements<T>(work, "work").data(), *zs = elements<T>(z, "z").data();
    require(M.n > 0 && r.size() % M.n == 0 && z.size() == r.size(), "ic0_solve: r and z must be (batch, n)");
    require(work.size() == M.n, "ic0_solve: work must have n elements");
    const Exec exec = exec_for(r, threads);
    py::gil_scoped_release nogil;
    for (int64_t k = 0; k < r.size() / M.n; ++k, rs += M.n, zs += M.n) {
      if constexpr (cuda_code_built)
        if (use_cuda_code(r)) {
          solve_incomplete_cholesky_cuda(exec, M, rs, works, zs);
          continue;
        }
      (void)use_cuda_code(r);
      Team::run(threads_of(M, exec.threads), false,
                [&](Team& team) { solve_incomplete_cholesky_cpu(team, M, rs, works, zs); });
    }
  });
}

int64_t bind_closed_components(const Tensor& cells, const Tensor& labels, int64_t nz, int64_t ny, int64_t nx) {
  for (const Tensor* t : {&cells, &labels}) require_host(*t, "closed_components");
  const auto codes = elements<const uint8_t>(cells, "cells");
  const auto numbers = elements<int32_t>(labels, "labels");
  require(cells.size() == 2 * nz * ny * nx && labels.size() == nz * ny * nx, "closed_components: sizes differ");
  py::gil_scoped_release nogil;
  return closed_components_cpu(nz, ny, nx, reinterpret_cast<const uint16_t*>(codes.data()), numbers.data());
}

}  // namespace

void bind_linalg(py::module_& m) {
  m.def("multiply_add", &bind_multiply_add);
  m.def("zero_fill", &bind_zero_fill);
  m.def("matvec", &bind_matvec);
  m.def("projections_size", &projections_size_of);
  m.def("csr_check", &bind_csr_check);
  m.def("csr_transpose", &bind_csr_transpose);
  m.def("csr_asymmetry", &bind_csr_asymmetry);
  m.def("ic0_factor", &bind_ic0_factor);
  m.def("level_schedule", &bind_level_schedule);
  m.def("ic0_solve", &bind_ic0_solve);
  m.def("closed_components", &bind_closed_components);
}

}  // namespace kantor
