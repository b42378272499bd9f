// The polar factors of batches of small matrices: B and out (count, rows, columns), rows <= columns.
#include <pybind11/stl.h>

#include "bind/dispatch.h"
#include "bind/tensor_caster.h"
#include "linalg/msign.h"

namespace py = pybind11;

namespace kantor {
namespace {

// The limit is that of the code which would run: CUDA's in the test module, which emulates it.
bool bind_msign_is_small(const Tensor& B) {
  const bool cuda = B.on_cuda() || (cuda_code_built && use_cuda_code(B));
  return B.ndim == 3 && B.shape[1] <= B.shape[2] && msign_is_small(B.shape[1], B.shape[2], cuda);
}

void bind_msign_small(const Tensor& B, const std::vector<std::array<double, 3>>& coefficients, double safety,
                      const Tensor& out, int threads) {
  require(bind_msign_is_small(B) && B.shape == out.shape,
          "msign: B: expected shape (count, rows, columns), small, rows <= columns, and out of the same shape");
  require(coefficients.size() <= msign_most_steps, "msign: expected at most 32 steps");
  require_same_device(B, out, "msign");
  std::vector<Quintic> steps;
  for (const auto& [a, b, c] : coefficients) steps.push_back({a, b, c});
  switch_float(B, "msign: B", [&]<class T>(T) {
    const T* in = elements<const T>(B, "msign: B").data();
    T* result = elements<T>(out, "msign: out").data();
    const Exec exec = exec_for(B, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(B)) return msign_cuda<T>(exec, B.shape[0], B.shape[1], B.shape[2], in, safety, steps, result);
    (void)use_cuda_code(B);
    msign_cpu<T>(exec, B.shape[0], B.shape[1], B.shape[2], in, safety, steps, result);
  });
}

}  // namespace

void bind_msign(py::module_& m) {
  m.def("msign_is_small", &bind_msign_is_small);
  m.def("msign_small", &bind_msign_small);
}

}  // namespace kantor
