// Exact nearest neighbours: x (n, d), results index (n, k) int32 and distance (n, k).
#include "graph/knn.h"

#include "bind/dispatch.h"
#include "bind/signals.h"
#include "bind/tensor_caster.h"

namespace py = pybind11;

namespace kantor {
namespace {

void check(const Tensor& x, int64_t k) {
  require(x.ndim == 2 && x.shape[1] >= 1 && x.shape[1] <= knn_largest_d,
          "knn: x: expected shape (n, d), d from 1 to " + std::to_string(knn_largest_d));
  require(x.shape[0] < INT32_MAX - 64, "knn: x: expected fewer than 2^31 rows");
  require(k >= 1 && k < x.shape[0],
          "knn: k: expected 1 to n - 1 = " + std::to_string(x.shape[0] - 1) + ", got " + std::to_string(k));
  require(!use_cuda_code(x) || k <= knn_largest_k, "knn: k: expected at most " + std::to_string(knn_largest_k) +
                                                       " on CUDA, got " + std::to_string(k) +
                                                       "; search on the CPU, x.cpu()");
}

int64_t bind_workspace_bytes(const Tensor& x, int64_t k, int threads) {
  check(x, k);
  return switch_float(x, "knn: x", [&]<class T>(T) {
    if constexpr (cuda_code_built)
      if (use_cuda_code(x)) return knn_workspace_bytes_cuda<T>(x.shape[0], x.shape[1], k);
    return knn_workspace_bytes_cpu<T>(x.shape[0], x.shape[1], k, threads);
  });
}

void bind_search(const Tensor& x, const Tensor& index, const Tensor& distance, const Tensor& workspace, int threads) {
  require(index.ndim == 2 && index.shape[0] == x.shape[0] && distance.size() == index.size(),
          "knn: index and distance: expected shape (n, k)");
  const int64_t k = index.shape[1];
  for (const Tensor* t : {&index, &distance, &workspace}) require_same_device(x, *t, "knn");
  require(workspace.size() >= bind_workspace_bytes(x, k, threads), "knn: workspace: expected more bytes");
  switch_float(x, "knn: x", [&]<class T>(T) {
    const T* points = elements<const T>(x, "knn: x").data();
    int32_t* index_out = elements<int32_t>(index, "knn: index").data();
    T* distance_out = elements<T>(distance, "knn: distance").data();
    void* memory = elements<uint8_t>(workspace, "knn: workspace").data();
    const Exec exec = exec_for(x, threads);
    bool finished;
    {
      py::gil_scoped_release nogil;
      if constexpr (cuda_code_built)
        if (use_cuda_code(x)) return knn_cuda(exec, x.shape[0], x.shape[1], points, k, index_out, distance_out, memory);
      finished = knn_cpu(exec, x.shape[0], x.shape[1], points, k, index_out, distance_out, memory, SignalPoll());
    }
    if (finished) return;
    PyErr_SetNone(PyExc_KeyboardInterrupt);
    throw py::error_already_set();
  });
}

}  // namespace

void bind_knn(py::module_& m) {
  m.attr("knn_largest_k") = knn_largest_k;
  m.def("knn_workspace_bytes", &bind_workspace_bytes);
  m.def("knn", &bind_search);
}

}  // namespace kantor
