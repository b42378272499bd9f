#include <omp.h>
#include <pybind11/pybind11.h>

#include "core/cuda_info.h"
#include "core/error.h"
#if defined(KANTOR_EMULATE)
#include "core/simt.h"
#endif

namespace py = pybind11;

namespace kantor {

void bind_linalg(py::module_& m);
void bind_krylov(py::module_& m);
void bind_multigrid(py::module_& m);
void bind_direction_net(py::module_& m);
void bind_flexible_cg(py::module_& m);
void bind_transport(py::module_& m);
void bind_graph(py::module_& m);
void bind_knn(py::module_& m);
void bind_msign(py::module_& m);
void bind_lmo(py::module_& m);
void bind_adahessian(py::module_& m);
void bind_mfac(py::module_& m);

namespace {

const char* simd_level() {
#if defined(KANTOR_NO_SIMD) || !defined(__x86_64__)
  return "baseline";
#else
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "baseline (SSE2)";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = KANTOR_VERSION;
  info["compiler"] = KANTOR_COMPILER;
  info["simd"] = simd_level();
  info["openmp"] = _OPENMP;
#if defined(KANTOR_WITH_CUDA)
  info["cuda_built"] = true;
  info["cuda_architectures"] = KANTOR_CUDA_ARCHITECTURES;
  info["cuda_runtime"] = cuda_runtime_version();
#else
  info["cuda_built"] = false;
  info["cuda_architectures"] = "";
  info["cuda_runtime"] = 0;
#endif
  return info;
}

// The Python class of a native exception, from kantor._errors.
void set_python_error(const char* name, const char* message) {
  PyErr_SetString(py::module_::import("kantor._errors").attr(name).ptr(), message);
}

}  // namespace

PYBIND11_MODULE(KANTOR_MODULE, m) {
  m.doc() = "Kantor's native kernels. Private: use the functions of the kantor package.";
  m.attr("__version__") = KANTOR_VERSION;
  m.def("build_info", &build_info);
#if defined(KANTOR_EMULATE)
  m.attr("schedule_count") = simt::emulator::schedule_count;
  m.def("set_schedule", &simt::emulator::set_schedule);
  m.def("host_copies", [] { return simt::emulator::host_copies.load(); });
#endif
#if defined(KANTOR_WITH_CUDA)
  m.def("cuda_device_count", &cuda_device_count);
#else
  m.def("cuda_device_count", [] { return 0; });
#endif
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const TypeMismatch& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    } catch (const BackendUnavailable& e) { set_python_error("BackendUnavailable", e.what()); }
  });
  bind_linalg(m);
  bind_krylov(m);
  bind_multigrid(m);
  bind_direction_net(m);
  bind_flexible_cg(m);
  bind_transport(m);
  bind_graph(m);
  bind_knn(m);
  bind_msign(m);
  bind_lmo(m);
  bind_adahessian(m);
  bind_mfac(m);
}

}  // namespace kantor
