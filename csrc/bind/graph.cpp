// Diffusion on a graph (graph/propagate.h). Patterns are int32; their entries were checked when the graph was made.
#include <pybind11/stl.h>

#include "bind/dispatch.h"
#include "bind/signals.h"
#include "bind/tensor_caster.h"
#include "graph/propagate.h"

namespace py = pybind11;

namespace kantor {
namespace {

Pattern read_pattern(const Tensor& rowptr, const Tensor& col) {
  require(rowptr.size() > 0, "rowptr: expected n + 1 elements, got none");
  require_same_device(rowptr, col, "rowptr, col");
  (void)use_cuda_code(rowptr);  // an error in a build without CUDA code
  return {rowptr.size() - 1, col.size(), elements<const int32_t>(rowptr, "rowptr").data(),
          elements<const int32_t>(col, "col").data()};
}

// Pointer to `size` elements of a tensor that is on the pattern's device.
template <class T>
T* read(const Tensor& tensor, int64_t size, const Tensor& rowptr, const char* name) {
  require_same_device(tensor, rowptr, name);
  require(tensor.size() == size, std::string(name) + ": has another size than the graph or x");
  return elements<T>(tensor, name).data();
}

int64_t columns_of(const Tensor& x, const Pattern& pattern) {
  require(x.ndim == 2 && x.shape[0] == pattern.n, "x: expected shape (n, d) with the n nodes of the graph");
  return x.shape[1];
}

// run() without the GIL; false from it is Ctrl-C.
template <class Run>
void interruptible(Run&& run) {
  bool finished;
  {
    py::gil_scoped_release nogil;
    finished = run();
  }
  if (finished) return;
  PyErr_SetNone(PyExc_KeyboardInterrupt);
  throw py::error_already_set();
}

// (steps, teleport, dropout, seed, adjoint)
using Options = std::tuple<int64_t, double, double, int64_t, bool>;

template <class T>
Recurrence<T> read_recurrence(const Pattern& pattern, const Tensor& rowptr, const Tensor& edge, const Tensor& diagonal,
                              const Options& options) {
  const auto& [steps, teleport, dropout, seed, adjoint] = options;
  require(steps >= 0 && dropout >= 0 && dropout < 1, "propagate: expected steps >= 0 and dropout in [0, 1)");
  return {pattern,
          read<const T>(edge, pattern.nnz, rowptr, "edge"),
          read<const T>(diagonal, pattern.n, rowptr, "diagonal"),
          steps,
          teleport,
          dropout,
          static_cast<uint64_t>(seed),
          adjoint};
}

void bind_product(const Tensor& rowptr, const Tensor& col, const Tensor& weight, const Tensor& x, const Tensor& y,
                  int threads) {
  const Pattern pattern = read_pattern(rowptr, col);
  const int64_t d = columns_of(x, pattern);
  switch_float(x, "x", [&]<class T>(T) {
    const T *weights = read<const T>(weight, pattern.nnz, rowptr, "weight"),
            *xs = read<const T>(x, pattern.n * d, rowptr, "x");
    T* ys = read<T>(y, pattern.n * d, rowptr, "y");
    const Exec exec = exec_for(x, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(x)) return product_cuda(exec, pattern, weights, d, xs, ys);
    product_cpu(exec, pattern, weights, d, xs, ys);
  });
}

void bind_edge_dot(const Tensor& rowptr, const Tensor& col, const Tensor& a, const Tensor& b, const Tensor& out,
                   int threads) {
  const Pattern pattern = read_pattern(rowptr, col);
  const int64_t d = columns_of(a, pattern);
  switch_float(a, "a", [&]<class T>(T) {
    const T *as = read<const T>(a, pattern.n * d, rowptr, "a"), *bs = read<const T>(b, pattern.n * d, rowptr, "b");
    T* outs = read<T>(out, pattern.nnz, rowptr, "out");
    const Exec exec = exec_for(a, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(a)) return edge_dot_cuda(exec, pattern, d, as, bs, outs);
    edge_dot_cpu(exec, pattern, d, as, bs, outs);
  });
}

template <class T>
int64_t propagate_workspace(const Tensor& x, const Exec& exec, const Recurrence<T>& recurrence, int64_t d) {
  if constexpr (cuda_code_built)
    if (use_cuda_code(x)) return propagate_workspace_cuda(exec, recurrence, d);
  return propagate_workspace_cpu(exec, recurrence, d);
}

int64_t bind_propagate_workspace(const Tensor& rowptr, const Tensor& col, const Tensor& edge, const Tensor& diagonal,
                                 const Tensor& x, const Options& options, int threads) {
  const Pattern pattern = read_pattern(rowptr, col);
  return switch_float(x, "x", [&]<class T>(T) {
    const auto recurrence = read_recurrence<T>(pattern, rowptr, edge, diagonal, options);
    return propagate_workspace(x, exec_for(x, threads), recurrence, columns_of(x, pattern));
  });
}

void bind_propagate(const Tensor& rowptr, const Tensor& col, const Tensor& edge, const Tensor& diagonal,
                    const Tensor& x, const Tensor& y, const Tensor& workspace, const Options& options, int threads) {
  const Pattern pattern = read_pattern(rowptr, col);
  const int64_t d = columns_of(x, pattern);
  switch_float(x, "x", [&]<class T>(T) {
    const auto recurrence = read_recurrence<T>(pattern, rowptr, edge, diagonal, options);
    const T* xs = read<const T>(x, pattern.n * d, rowptr, "x");
    T* ys = read<T>(y, pattern.n * d, rowptr, "y");
    const Exec exec = exec_for(x, threads);
    T* work = read<T>(workspace, propagate_workspace(x, exec, recurrence, d), rowptr, "workspace");
    interruptible([&] {
      if constexpr (cuda_code_built)
        if (use_cuda_code(x)) return propagate_cuda(exec, recurrence, d, xs, ys, work), true;
      return propagate_cpu(exec, recurrence, d, xs, ys, work, SignalPoll());
    });
  });
}

template <class T>
int64_t propagate_gradients_workspace(const Tensor& x, const Exec& exec, const Recurrence<T>& recurrence, int64_t d) {
  if constexpr (cuda_code_built)
    if (use_cuda_code(x)) return propagate_gradients_workspace_cuda(exec, recurrence, d);
  return propagate_gradients_workspace_cpu(exec, recurrence, d);
}

int64_t bind_propagate_gradients_workspace(const Tensor& rowptr, const Tensor& col, const Tensor& edge,
                                           const Tensor& diagonal, const Tensor& x, const Options& options,
                                           int threads) {
  const Pattern pattern = read_pattern(rowptr, col);
  return switch_float(x, "x", [&]<class T>(T) {
    const auto recurrence = read_recurrence<T>(pattern, rowptr, edge, diagonal, options);
    return propagate_gradients_workspace(x, exec_for(x, threads), recurrence, columns_of(x, pattern));
  });
}

// `transposed` is (rowptr, col, edge) of E'; `results` are the gradients for edge, diagonal and x.
void bind_propagate_gradients(const Tensor& rowptr, const Tensor& col, const Tensor& edge, const Tensor& diagonal,
                              const std::array<Tensor, 3>& transposed, const Tensor& x, const Tensor& g,
                              const std::array<Tensor, 3>& results, const Tensor& workspace, const Options& options,
                              int threads) {
  const Pattern pattern = read_pattern(rowptr, col), transpose = read_pattern(transposed[0], transposed[1]);
  require(transpose.n == pattern.n && transpose.nnz == pattern.nnz, "propagate_gradients: not the graph's transpose");
  const int64_t d = columns_of(x, pattern);
  switch_float(x, "x", [&]<class T>(T) {
    const auto recurrence = read_recurrence<T>(pattern, rowptr, edge, diagonal, options);
    const T* t_edge = read<const T>(transposed[2], pattern.nnz, rowptr, "t_edge");
    const T *xs = read<const T>(x, pattern.n * d, rowptr, "x"), *gs = read<const T>(g, pattern.n * d, rowptr, "g");
    T *edges = read<T>(results[0], pattern.nnz, rowptr, "edge gradient"),
      *diagonals = read<T>(results[1], pattern.n, rowptr, "diagonal gradient"),
      *out = read<T>(results[2], pattern.n * d, rowptr, "x gradient");
    const Exec exec = exec_for(x, threads);
    T* work = read<T>(workspace, propagate_gradients_workspace(x, exec, recurrence, d), rowptr, "workspace");
    interruptible([&] {
      if constexpr (cuda_code_built)
        if (use_cuda_code(x)) {
          propagate_gradients_cuda(exec, recurrence, transpose, t_edge, d, xs, gs, edges, diagonals, out, work);
          return true;
        }
      return propagate_gradients_cpu(exec, recurrence, transpose, t_edge, d, xs, gs, edges, diagonals, out, work,
                                     SignalPoll());
    });
  });
}

void bind_dropout_mask(const Tensor& mask, int64_t step, double dropout, int64_t seed, int64_t first_row, int threads) {
  require(mask.ndim == 2, "dropout_mask: expected shape (n, d)");
  switch_float(mask, "mask", [&]<class T>(T) {
    T* data = elements<T>(mask, "mask").data();
    const Exec exec = exec_for(mask, threads);
    const int64_t n = mask.shape[0], d = mask.shape[1];
    const uint64_t key = static_cast<uint64_t>(seed);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(mask)) return dropout_mask_cuda(exec, first_row, n, d, step, dropout, key, data);
    (void)use_cuda_code(mask);
    dropout_mask_cpu(exec, first_row, n, d, step, dropout, key, data);
  });
}

}  // namespace

void bind_graph(py::module_& m) {
  m.def("product", &bind_product);
  m.def("edge_dot", &bind_edge_dot);
  m.def("propagate_workspace", &bind_propagate_workspace);
  m.def("propagate", &bind_propagate);
  m.def("propagate_gradients_workspace", &bind_propagate_gradients_workspace);
  m.def("propagate_gradients", &bind_propagate_gradients);
  m.def("dropout_mask", &bind_dropout_mask);
}

}  // namespace kantor
