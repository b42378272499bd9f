#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <chrono>

#include "bind/dispatch.h"
#include "bind/operator_args.h"
#include "bind/tensor_caster.h"
#include "core/parallel.h"
#include "linalg/cg.h"
#include "linalg/csr.h"
#include "linalg/ic0.h"
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
                 int threads) {
  require_same_device(x, y, "matvec");
  const OperatorArgs args{operands, layout, scales};
  switch_float(x, "x", [&]<class T>(T) {
    const Operator<T> A = read_operator<T>(args, x);
    const auto xs = elements<const T>(x, "x");
    const auto ys = elements<T>(y, "y");
    const int64_t batch = A.cols > 0 ? x.size() / A.cols : A.rows > 0 ? y.size() / A.rows : 0;
    require(x.size() == batch * A.cols && y.size() == batch * A.rows,
            "matvec: x or y does not match the operator's shape");
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

// Between iterations: every 10 ms let Python handle signals; at every iteration call the user's monitor, when there is
// one.
class PythonMonitor {
 public:
  explicit PythonMonitor(py::object user) : user_(std::move(user)) {}
  CgStatus operator()(int64_t iteration, double residual_norm) {
    const auto now = std::chrono::steady_clock::now();
    if (user_.is_none() && now - last_ < std::chrono::milliseconds(10)) return CgStatus::running;
    py::gil_scoped_acquire gil;
    last_ = now;
    if (PyErr_CheckSignals() != 0) {
      if (!PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) throw py::error_already_set();
      PyErr_Clear();
      return CgStatus::interrupted;
    }
    try {
      if (!user_.is_none() && user_(iteration, residual_norm).cast<bool>()) return CgStatus::stopped;
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_KeyboardInterrupt)) throw;
      return CgStatus::interrupted;
    }
    return CgStatus::running;
  }

 private:
  py::object user_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Runs Python code inside an iteration; Ctrl-C that lands there ends the iteration like one that lands in native code.
template <class Call>
void call_back(Call&& call) {
  py::gil_scoped_acquire gil;
  try {
    call();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_KeyboardInterrupt)) throw;
    throw CgInterrupted{};
  }
}

void bind_cg(const Operands& operands, const Layout& layout, const Scales& scales, const Operands& m_operands,
             const Layout& m_layout, const Scales& m_scales, const Tensor& b, const Tensor& x, const Operands& vectors,
             bool zero_start, const Tensor& info, const Tensor& history, const Tensor& workspace, double rtol,
             double atol, int64_t max_iterations, const py::object& apply, const py::object& precondition,
             const py::object& user_monitor, int threads) {
  require(b.ndim == 2 && vectors.size() == 4, "cg: b must be (batch, n), vectors must be r, p, q, z");
  const OperatorArgs a_args{operands, layout, scales}, m_args{m_operands, m_layout, m_scales};
  const ApplyCallback apply_callback = [&apply](bool to_x) { call_back([&] { apply(to_x); }); };
  const Callback precondition_callback = [&precondition] { call_back([&] { precondition(); }); };
  switch_float(b, "b", [&]<class T>(T) {
    CgVectors<T> v{b.shape[1],
                   b.shape[0],
                   elements<const T>(b, "b").data(),
                   elements<T>(x, "x").data(),
                   elements<T>(vectors[0], "r").data(),
                   elements<T>(vectors[1], "p").data(),
                   elements<T>(vectors[2], "q").data(),
                   elements<T>(vectors[3], "z").data(),
                   zero_start,
                   reinterpret_cast<CgState*>(elements<double>(info, "info").data()),
                   elements<double>(history, "history").data(),
                   elements<uint8_t>(workspace, "workspace").data()};
    for (const Tensor* t : {&x, &vectors[0], &vectors[1], &vectors[3]})
      require(t->size() == b.size(), "cg: sizes differ");
    require(info.size() == v.batch * cg_state_size, "cg: info must be (batch, cg_state_size)");
    const Operator<T> A = layout.empty() ? Operator<T>{} : read_operator<T>(a_args, b);
    require(layout.empty() || (A.rows == v.n && A.cols == v.n), "cg: the operator's shape does not match b");
    Preconditioner<T> M = read_preconditioner<T>(m_args, b);
    if (!precondition.is_none()) M = precondition_callback;
    const CgOptions options{rtol,
                            atol,
                            max_iterations,
                            double(std::numeric_limits<T>::epsilon()) / 2,
                            v.batch ? history.size() / v.batch : 2,
                            !user_monitor.is_none()};
    const Exec exec = exec_for(b, threads);
    const CgMonitor monitor = PythonMonitor(user_monitor);
    py::gil_scoped_release nogil;
    for (const Tensor& t : vectors)
      if (!t.on_cuda()) advise_huge_pages(t.data, t.size() * sizeof(T));
    try {
      if constexpr (cuda_code_built)
        if (use_cuda_code(b))
          return cg_cuda(exec, layout.empty() ? nullptr : &A, apply_callback, M, v, options, monitor);
      (void)use_cuda_code(b);
      cg_cpu(exec, layout.empty() ? nullptr : &A, apply_callback, M, v, options, monitor);
    } catch (const CgInterrupted&) {
      py::gil_scoped_acquire gil;
      PyErr_SetNone(PyExc_KeyboardInterrupt);
      throw py::error_already_set();
    }
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

}  // namespace

void bind_linalg(py::module_& m) {
  m.def("multiply_add", &bind_multiply_add);
  m.def("zero_fill", &bind_zero_fill);
  m.def("matvec", &bind_matvec);
  m.def("cg", &bind_cg);
  m.attr("cg_state_size") = cg_state_size;
  if constexpr (cuda_code_built)
    m.def("cg_workspace_bytes", &cg_workspace_bytes);
  else
    m.def("cg_workspace_bytes", [](int64_t) { return int64_t{0}; });
  m.def("csr_check", &bind_csr_check);
  m.def("csr_transpose", &bind_csr_transpose);
  m.def("csr_asymmetry", &bind_csr_asymmetry);
  m.def("ic0_factor", &bind_ic0_factor);
  m.def("level_schedule", &bind_level_schedule);
  m.def("ic0_solve", &bind_ic0_solve);
}

}  // namespace kantor
