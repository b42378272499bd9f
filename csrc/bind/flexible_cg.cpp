// Flexible conjugate gradients.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "bind/dispatch.h"
#include "bind/operator_args.h"
#include "bind/python_calls.h"
#include "bind/tensor_caster.h"
#include "core/parallel.h"
#include "linalg/flexible_cg.h"

namespace py = pybind11;

namespace kantor {
namespace {

// An operator as Python passes it: operands, layout, scales.
using Encoded = std::tuple<std::vector<Tensor>, std::vector<int64_t>, std::vector<double>>;

OperatorArgs args_of(const Encoded& encoded) {
  return {std::get<0>(encoded), std::get<1>(encoded), std::get<2>(encoded)};
}

template <class T>
DirectionMap<T> read_map(const OperatorArgs& args, const py::object& function, const Tensor& like, int64_t batch,
                         Projections& work) {
  DirectionMap<T> map{read_preconditioner<T>(args, like), {}};
  if (auto* product = std::get_if<Operator<T>>(&map.native)) work.place(*product, batch);
  if (!function.is_none()) map.callback = [&function](int64_t slot) { call_back([&] { function(slot); }); };
  return map;
}

// `vectors` are x, r, ring, direction; `tables` are states, directions, history. Numbers are window, notay, normalised,
// refresh_every, patience,
// stall_after.
void bind_solve(const Encoded& A_encoded, const Encoded& f_encoded, const Encoded& fallback_encoded, const Tensor& b,
                const std::vector<Tensor>& vectors, bool zero_start, const std::vector<Tensor>& tables,
                const Tensor& workspace, const std::optional<Tensor>& projections, double rtol, double atol,
                int64_t max_iterations, const std::vector<int64_t>& numbers, const py::object& product,
                const py::object& f, const py::object& fallback, const py::object& user_monitor, int threads) {
  require(b.ndim == 2 && vectors.size() == 4, "flexible_cg: b must be (batch, n), vectors x, r, ring, direction");
  require(tables.size() == 3 && numbers.size() == 6, "flexible_cg: expected three tables and six numbers");
  const OperatorArgs a_args = args_of(A_encoded), f_args = args_of(f_encoded), m_args = args_of(fallback_encoded);
  const SlotProduct product_callback = [&](bool of_x, int64_t slot) { call_back([&] { product(of_x, slot); }); };
  switch_float(b, "b", [&]<class T>(T) {
    FlexibleVectors<T> v{};
    v.n = b.shape[1], v.batch = b.shape[0], v.b = elements<const T>(b, "b").data(), v.zero_start = zero_start;
    T** targets[] = {&v.x, &v.r, &v.ring, &v.direction};
    for (size_t i = 0; i < vectors.size(); ++i) *targets[i] = elements<T>(vectors[i], "vectors").data();
    v.states = reinterpret_cast<FlexibleState*>(elements<double>(tables[0], "states").data());
    v.directions = reinterpret_cast<DirectionScalars*>(elements<double>(tables[1], "directions").data());
    v.history = elements<double>(tables[2], "history").data();
    v.workspace = elements<uint8_t>(workspace, "workspace").data();
    const int64_t slots = tables[1].size() / (direction_scalars * std::max<int64_t>(v.batch, 1));
    for (size_t i : {0, 1, 3}) require(vectors[i].size() == b.size(), "flexible_cg: sizes differ");
    require(vectors[2].size() == 2 * slots * b.size(), "flexible_cg: ring must be (slots, 2, batch, n)");
    require(tables[0].size() == v.batch * flexible_state_size, "flexible_cg: states must be (batch, state size)");
    require(0 <= numbers[0] && numbers[0] < slots && slots > 1, "flexible_cg: window must be below the slots");
    Operator<T> A = a_args.layout.empty() ? Operator<T>{} : read_operator<T>(a_args, b);
    require(a_args.layout.empty() || (A.rows == v.n && A.cols == v.n), "flexible_cg: A does not match b");
    Projections work(projections, b);
    work.place(A, v.batch);
    const auto map = read_map<T>(f_args, f, b, v.batch, work), other = read_map<T>(m_args, fallback, b, v.batch, work);
    const CgOptions cg{rtol,
                       atol,
                       max_iterations,
                       double(std::numeric_limits<T>::epsilon()) / 2,
                       v.batch ? tables[2].size() / v.batch : 2,
                       !user_monitor.is_none()};
    const FlexibleOptions options{cg,         slots,      numbers[0], numbers[1] != 0, numbers[2] != 0,
                                  numbers[3], numbers[4], numbers[5]};
    const Exec exec = exec_for(b, threads);
    const CgMonitor monitor = PythonMonitor(user_monitor);
    const Operator<T>* native = a_args.layout.empty() ? nullptr : &A;
    py::gil_scoped_release nogil;
    for (const Tensor& t : vectors)
      if (!t.on_cuda()) advise_huge_pages(t.data, t.size() * sizeof(T));
    try {
      if constexpr (cuda_code_built)
        if (use_cuda_code(b)) return flexible_cg_cuda(exec, native, product_callback, map, other, v, options, monitor);
      (void)use_cuda_code(b);
      flexible_cg_cpu(exec, native, product_callback, map, other, v, options, monitor);
    } catch (const CgInterrupted&) {
      py::gil_scoped_acquire gil;
      PyErr_SetNone(PyExc_KeyboardInterrupt);
      throw py::error_already_set();
    }
  });
}

}  // namespace

void bind_flexible_cg(py::module_& m) {
  m.def("flexible_cg", &bind_solve);
  m.attr("flexible_state_size") = flexible_state_size;
  m.attr("direction_scalars") = direction_scalars;
  if constexpr (cuda_code_built)
    m.def("flexible_workspace_bytes", &flexible_workspace_bytes);
  else
    m.def("flexible_workspace_bytes", [](int64_t) { return int64_t{0}; });
}

}  // namespace kantor
