// A tensor as the kernels' callers see it: a borrowed pointer with dtype, device, shape and strides. Torch owns the
// memory.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "core/dlpack.h"
#include "core/error.h"
#include "core/exec.h"

namespace kantor {

enum class Dtype : uint8_t { f32, f64, i32, i64, u8, i8, f16, bf16, other };

template <class T>
constexpr Dtype dtype_of();
template <>
constexpr Dtype dtype_of<float>() {
  return Dtype::f32;
}
template <>
constexpr Dtype dtype_of<double>() {
  return Dtype::f64;
}
template <>
constexpr Dtype dtype_of<int32_t>() {
  return Dtype::i32;
}
template <>
constexpr Dtype dtype_of<int64_t>() {
  return Dtype::i64;
}
template <>
constexpr Dtype dtype_of<uint8_t>() {
  return Dtype::u8;
}

inline const char* name_of(Dtype dtype) {
  constexpr const char* names[] = {
      "float32", "float64", "int32", "int64", "uint8", "int8", "float16", "bfloat16", "an unsupported dtype"};
  return names[static_cast<int>(dtype)];
}

inline Dtype dtype_from(dlpack::DataType type) {
  // The code is compared as well as the width: float16 and bfloat16 share widths with integers, float8 with uint8.
  if (type.lanes != 1) return Dtype::other;
  if (type.code == dlpack::kFloat && type.bits == 32) return Dtype::f32;
  if (type.code == dlpack::kFloat && type.bits == 64) return Dtype::f64;
  if (type.code == dlpack::kInt && type.bits == 32) return Dtype::i32;
  if (type.code == dlpack::kInt && type.bits == 64) return Dtype::i64;
  if (type.code == dlpack::kUInt && type.bits == 8) return Dtype::u8;
  if (type.code == dlpack::kInt && type.bits == 8) return Dtype::i8;
  if (type.code == dlpack::kFloat && type.bits == 16) return Dtype::f16;
  if (type.code == dlpack::kBfloat && type.bits == 16) return Dtype::bf16;
  return Dtype::other;
}

struct Tensor {
  static constexpr int max_dims = 8;
  void* data = nullptr;
  Dtype dtype = Dtype::other;
  dlpack::Device device{dlpack::kCpu, 0};
  int ndim = 0;
  // Copies: the arrays behind a DLTensor may go once the GIL is released.
  std::array<int64_t, max_dims> shape{};
  std::array<int64_t, max_dims> strides{};
  const dlpack::ExchangeApi* api = nullptr;

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return size() == 0;
      expected *= shape[i];
    }
    return true;
  }

  bool on_cuda() const { return device.type == dlpack::kCuda; }
};

// The elements of a contiguous tensor, or an error naming the argument.
template <class T>
std::span<T> elements(const Tensor& tensor, const char* argument) {
  if (tensor.dtype != dtype_of<std::remove_const_t<T>>())
    throw TypeMismatch(std::string(argument) + ": expected " + name_of(dtype_of<std::remove_const_t<T>>()) + ", got " +
                       name_of(tensor.dtype));
  require(tensor.contiguous(), std::string(argument) + ": expected a contiguous tensor; call .contiguous()");
  return {static_cast<T*>(tensor.data), static_cast<size_t>(tensor.size())};
}

inline void require_same_device(const Tensor& a, const Tensor& b, const char* what) {
  require(a.device.type == b.device.type && a.device.id == b.device.id,
          std::string(what) + ": all tensors must be on one device");
}

// Threads for the CPU, or the device and torch's current stream for CUDA.
inline Exec exec_for(const Tensor& tensor, int threads) {
  Exec exec{threads < 1 ? 1 : threads, tensor.device.id, nullptr};
  if (tensor.on_cuda() && tensor.api->current_work_stream(dlpack::kCuda, tensor.device.id, &exec.stream) != 0)
    throw std::runtime_error("could not read torch's current CUDA stream");
  return exec;
}

}  // namespace kantor
