// From a tensor to the right instantiation: dtype switch and CPU / CUDA choice.
#pragma once
#include "core/tensor.h"

namespace kantor {

#if defined(KANTOR_EMULATE)
// The test module _emu: every call runs the CUDA code on the fiber emulator, whatever the tensor's device.
inline constexpr bool cuda_code_built = true;
inline bool use_cuda_code(const Tensor&) { return true; }
#elif defined(KANTOR_WITH_CUDA)
inline constexpr bool cuda_code_built = true;
inline bool use_cuda_code(const Tensor& tensor) { return tensor.on_cuda(); }
#else
inline constexpr bool cuda_code_built = false;
inline bool use_cuda_code(const Tensor& tensor) {
  if (tensor.on_cuda())
    throw BackendUnavailable(
        "this build of Kantor has no CUDA code; rebuild with -C cmake.define.KANTOR_CUDA=ON and nvcc");
  return false;
}
#endif

// body(T{}) for the floating-point type of `tensor`.
template <class Body>
decltype(auto) switch_float(const Tensor& tensor, const char* argument, Body&& body) {
  if (tensor.dtype == Dtype::f32) return body(float{});
  if (tensor.dtype == Dtype::f64) return body(double{});
  throw TypeMismatch(std::string(argument) + ": expected float32 or float64, got " + name_of(tensor.dtype));
}

// body(Index{}) for the integer type of `tensor`.
template <class Body>
decltype(auto) switch_index(const Tensor& tensor, const char* argument, Body&& body) {
  if (tensor.dtype == Dtype::i32) return body(int32_t{});
  if (tensor.dtype == Dtype::i64) return body(int64_t{});
  throw TypeMismatch(std::string(argument) + ": expected int32 or int64, got " + name_of(tensor.dtype));
}

inline void require_host(const Tensor& tensor, const char* argument) {
  require(!tensor.on_cuda(), std::string(argument) + ": expected a CPU tensor; call .cpu()");
}

}  // namespace kantor
