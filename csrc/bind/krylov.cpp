// The conjugate gradient family.
#include <pybind11/stl.h>

#include <limits>

#include "bind/dispatch.h"
#include "bind/operator_args.h"
#include "bind/python_calls.h"
#include "bind/tensor_caster.h"
#include "core/parallel.h"
#include "linalg/capped_cg.h"
#include "linalg/cg.h"
#include "linalg/multishift_cg.h"

namespace py = pybind11;

namespace kantor {
namespace {

using Operands = std::vector<Tensor>;
using Layout = std::vector<int64_t>;
using Scales = std::vector<double>;

// `all_reduce(count)` sums the first `count` numbers of `sums` over the ranks (python/kantor/_ranks.py: RankSums); None
// for one process.
AllReduce read_all_reduce(const std::optional<Tensor>& sums, const py::object& all_reduce, const Tensor& like) {
  if (all_reduce.is_none()) return {};
  require(sums.has_value(), "all_reduce: expected the tensor of sums");
  require_same_device(*sums, like, "all_reduce: sums and vector");
  require(sums->size() >= 4 * like.shape[0] + rank_wishes, "all_reduce: expected 4 sums a system and 2 more");
  return {elements<double>(*sums, "sums").data(),
          [&all_reduce](int64_t count) { call_back([&] { all_reduce(count); }); }};
}

void bind_cg(const Operands& operands, const Layout& layout, const Scales& scales, const Operands& m_operands,
             const Layout& m_layout, const Scales& m_scales, const Tensor& b, const Tensor& x, const Operands& vectors,
             bool zero_start, const Tensor& info, const Tensor& history, const Tensor& workspace,
             const std::optional<Tensor>& projections, double rtol, double atol, int64_t max_iterations,
             const py::object& apply, const py::object& precondition, const py::object& user_monitor,
             const std::optional<Tensor>& sums, const py::object& all_reduce, int threads) {
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
    Operator<T> A = layout.empty() ? Operator<T>{} : read_operator<T>(a_args, b);
    require(layout.empty() || (A.rows == v.n && A.cols == v.n), "cg: the operator's shape does not match b");
    Preconditioner<T> M = read_preconditioner<T>(m_args, b);
    Projections work(projections, b);
    work.place(A, v.batch);
    if (auto* product = std::get_if<Operator<T>>(&M)) work.place(*product, v.batch);
    if (!precondition.is_none()) M = precondition_callback;
    const CgOptions options{rtol,
                            atol,
                            max_iterations,
                            double(std::numeric_limits<T>::epsilon()) / 2,
                            v.batch ? history.size() / v.batch : 2,
                            !user_monitor.is_none()};
    const Exec exec = exec_for(b, threads);
    const CgMonitor monitor = PythonMonitor(user_monitor, all_reduce);
    const AllReduce ranks = read_all_reduce(sums, all_reduce, b);
    py::gil_scoped_release nogil;
    for (const Tensor& t : vectors)
      if (!t.on_cuda()) advise_huge_pages(t.data, t.size() * sizeof(T));
    try {
      if constexpr (cuda_code_built)
        if (use_cuda_code(b))
          return cg_cuda(exec, layout.empty() ? nullptr : &A, apply_callback, M, v, options, monitor, ranks);
      (void)use_cuda_code(b);
      cg_cpu(exec, layout.empty() ? nullptr : &A, apply_callback, M, v, options, monitor, ranks);
    } catch (const CgInterrupted&) {
      py::gil_scoped_acquire gil;
      PyErr_SetNone(PyExc_KeyboardInterrupt);
      throw py::error_already_set();
    }
  });
}

// The product H z by a Python function, whose result is read where it lies. Made and destroyed with the GIL held.
template <class T>
class PythonProduct {
 public:
  PythonProduct(const py::object& function, const py::object& z, const Tensor& like)
      : function_(function), z_(z), like_(like) {}

  const T* operator()() {
    const T* data = nullptr;
    call_back([&] {
      ++calls;
      result_ = function_(z_);
      Tensor product = result_.cast<Tensor>();
      if (!product.contiguous()) {
        result_ = result_.attr("contiguous")();
        product = result_.cast<Tensor>();
      }
      require(product.size() == like_.size(), "capped_cg: the product has another size than the vector");
      require_same_device(product, like_, "capped_cg: product and vector");
      data = elements<const T>(product, "capped_cg: product").data();
    });
    return data;
  }

  int64_t calls = 0;

 private:
  const py::object &function_, &z_;
  Tensor like_;
  py::object result_;
};

// Returns how often `product` was called. `vectors` are y, Hy, r, p, Hp, z, q; `z` is handed to `product`.
int64_t bind_capped_cg(const Operands& operands, const Layout& layout, const Scales& scales, const Operands& m_operands,
                       const Layout& m_layout, const Scales& m_scales, const Tensor& g, const Operands& vectors,
                       const Tensor& states, const Tensor& arrays, const Tensor& workspace,
                       const std::optional<Tensor>& projections, int rule, int64_t check_every, bool resume,
                       const py::object& product, const py::object& z, const py::object& precondition,
                       const std::optional<Tensor>& sums, const py::object& all_reduce, int threads) {
  require(g.ndim == 2 && vectors.size() == 7, "capped_cg: g must be (batch, n), vectors must be y, Hy, r, p, Hp, z, q");
  const OperatorArgs h_args{operands, layout, scales}, m_args{m_operands, m_layout, m_scales};
  const Callback precondition_callback = [&precondition] { call_back([&] { precondition(); }); };
  return switch_float(g, "g", [&]<class T>(T) {
    CappedVectors<T> v{};
    v.n = g.shape[1], v.batch = g.shape[0], v.g = elements<const T>(g, "g").data(), v.check_every = check_every;
    T** targets[] = {&v.y, &v.Hy, &v.r, &v.p, &v.Hp, &v.z, &v.q};
    for (size_t i = 0; i < vectors.size(); ++i) {
      *targets[i] = elements<T>(vectors[i], "vectors").data();
      require(vectors[i].size() == g.size() || (i == 6 && !product.is_none()), "capped_cg: sizes differ");
    }
    v.states = reinterpret_cast<CappedState*>(elements<double>(states, "states").data());
    v.arrays = elements<double>(arrays, "arrays").data();
    v.workspace = elements<uint8_t>(workspace, "workspace").data();
    require(states.size() == v.batch * capped_state_size, "capped_cg: states must be (batch, capped_state_size)");
    Operator<T> H = layout.empty() ? Operator<T>{} : read_operator<T>(h_args, g);
    require(layout.empty() || (H.rows == v.n && H.cols == v.n), "capped_cg: the operator's shape does not match g");
    Preconditioner<T> M = read_preconditioner<T>(m_args, g);
    Projections work(projections, g);
    work.place(H, v.batch);
    if (auto* inverse = std::get_if<Operator<T>>(&M)) work.place(*inverse, v.batch);
    if (!precondition.is_none()) M = precondition_callback;
    const CappedOptions options{static_cast<CappedRule>(rule), v.batch ? arrays.size() / (4 * v.batch) : 0,
                                !std::holds_alternative<std::monostate>(M)};
    const Exec exec = exec_for(g, threads);
    const CgMonitor monitor = PythonMonitor(py::none(), all_reduce);
    const AllReduce ranks = read_all_reduce(sums, all_reduce, g);
    PythonProduct<T> call(product, z, vectors[5]);
    const ProductCallback<T> product_callback = std::ref(call);
    {
      py::gil_scoped_release nogil;
      if constexpr (cuda_code_built)
        if (use_cuda_code(g)) {
          capped_cg_cuda(exec, layout.empty() ? nullptr : &H, product_callback, M, v, options, resume, monitor, ranks);
          return call.calls;
        }
      (void)use_cuda_code(g);
      capped_cg_cpu(exec, layout.empty() ? nullptr : &H, product_callback, M, v, options, resume, monitor, ranks);
    }
    return call.calls;
  });
}

// Returns how often `product` was called, with p. `vectors` are r, p, q (n) and x, directions (count, n).
int64_t bind_multishift_cg(const Operands& operands, const Layout& layout, const Scales& scales, const Tensor& b,
                           const Operands& vectors, const Tensor& state, const Tensor& shifts, const Tensor& workspace,
                           const std::optional<Tensor>& projections, int64_t check_every, const py::object& product,
                           const py::object& p, int threads) {
  require(b.ndim == 1 && vectors.size() == 5, "multishift_cg: b must be (n), vectors must be r, p, q, x, directions");
  const OperatorArgs a_args{operands, layout, scales};
  return switch_float(b, "b", [&]<class T>(T) {
    MultishiftVectors<T> v{};
    v.n = b.size(), v.b = elements<const T>(b, "b").data(), v.check_every = check_every;
    const int64_t count = shifts.size() / multishift_scalars;
    T** targets[] = {&v.r, &v.p, &v.q, &v.x, &v.directions};
    for (size_t i = 0; i < vectors.size(); ++i) {
      *targets[i] = elements<T>(vectors[i], "vectors").data();
      require(vectors[i].size() == (i < 3 ? v.n : count * v.n), "multishift_cg: sizes differ");
    }
    v.state = reinterpret_cast<MultishiftState*>(elements<double>(state, "state").data());
    v.shifts = ShiftScalars::of(elements<double>(shifts, "shifts").data(), count);
    v.workspace = elements<uint8_t>(workspace, "workspace").data();
    Operator<T> A = layout.empty() ? Operator<T>{} : read_operator<T>(a_args, b);
    Projections(projections, b).place(A, 1);
    require(layout.empty() || (A.rows == v.n && A.cols == v.n), "multishift_cg: the operator's shape does not match b");
    const Exec exec = exec_for(b, threads);
    const CgMonitor monitor = PythonMonitor(py::none());
    PythonProduct<T> call(product, p, b);
    const ProductCallback<T> product_callback = std::ref(call);
    {
      py::gil_scoped_release nogil;
      if constexpr (cuda_code_built)
        if (use_cuda_code(b)) {
          multishift_cg_cuda(exec, layout.empty() ? nullptr : &A, product_callback, v, monitor);
          return call.calls;
        }
      (void)use_cuda_code(b);
      multishift_cg_cpu(exec, layout.empty() ? nullptr : &A, product_callback, v, monitor);
    }
    return call.calls;
  });
}

// Test 4's scan over (4, capacity) arrays, for the tests: the smallest ratio and its index.
py::tuple bind_capped_scan(const Tensor& arrays, int64_t j) {
  require_host(arrays, "capped_scan");
  double* first = elements<double>(arrays, "arrays").data();
  const int64_t capacity = arrays.size() / 4;
  require(j >= 0 && j < capacity, "capped_scan: j is out of range");
  int64_t index = -1;
  const double ratio = capped_scan({first, first + capacity, first + 2 * capacity, first + 3 * capacity}, j, &index);
  return py::make_tuple(ratio, index);
}

}  // namespace

void bind_krylov(py::module_& m) {
  m.def("cg", &bind_cg);
  m.attr("cg_state_size") = cg_state_size;
  m.def("capped_cg", &bind_capped_cg);
  m.def("capped_scan", &bind_capped_scan);
  m.attr("capped_state_size") = capped_state_size;
  m.def("multishift_cg", &bind_multishift_cg);
  m.attr("multishift_state_size") = multishift_state_size;
  m.attr("multishift_scalars") = multishift_scalars;
  if constexpr (cuda_code_built) {
    m.def("cg_workspace_bytes", &cg_workspace_bytes);
    m.def("capped_workspace_bytes", &capped_workspace_bytes);
    m.def("multishift_workspace_bytes", &multishift_workspace_bytes);
  } else {
    for (const char* name : {"cg_workspace_bytes", "capped_workspace_bytes"})
      m.def(name, [](int64_t) { return int64_t{0}; });
    m.def("multishift_workspace_bytes", [] { return int64_t{0}; });
  }
}

}  // namespace kantor
