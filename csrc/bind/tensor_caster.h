// Reads a torch.Tensor argument through the DLPack C exchange API: no copy, no capsule, no torch headers.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "core/tensor.h"

namespace kantor {

// The exchange API of a tensor type, or null. The first type met is remembered: calls nearly always pass torch.Tensor.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known_type = nullptr;
  static const dlpack::ExchangeApi* known_api = nullptr;
  if (type == known_type) return known_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!api) {
    PyErr_Clear();
    return nullptr;
  }
  if (api->header.version.major != 1 || !api->tensor_from_py_object || !api->current_work_stream) return nullptr;
  if (!known_type) {
    Py_INCREF(type);  // so that its address is not reused for another type
    known_type = type;
    known_api = api;
  }
  return api;
}

inline Tensor read_tensor(pybind11::handle source, const dlpack::ExchangeApi* api) {
  dlpack::Tensor view;
  if (api->tensor_from_py_object(source.ptr(), &view) != 0) throw pybind11::error_already_set();
  require(view.ndim <= Tensor::max_dims, "a tensor with more than 8 dimensions");
  require(view.device.type == dlpack::kCpu || view.device.type == dlpack::kCuda,
          "expected a CPU or CUDA tensor; move it with .to('cpu') or .to('cuda')");
  Tensor tensor;
  tensor.data = static_cast<char*>(view.data) + view.byte_offset;
  tensor.dtype = dtype_from(view.dtype);
  tensor.device = view.device;
  tensor.ndim = view.ndim;
  tensor.api = api;
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    tensor.shape[i] = view.shape[i];
    tensor.strides[i] = view.strides ? view.strides[i] : stride;
    stride *= view.shape[i];
  }
  // FakeTensors, functional and meta tensors have a shape but no memory.
  require(view.data || tensor.size() == 0,
          "the tensor has no memory behind it (a fake, meta or functional tensor); call the torch operator instead");
  return tensor;
}

}  // namespace kantor

namespace pybind11::detail {

template <>
struct type_caster<kantor::Tensor> {
  PYBIND11_TYPE_CASTER(kantor::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    const kantor::dlpack::ExchangeApi* api = kantor::exchange_api(Py_TYPE(source.ptr()));
    if (!api) return false;
    value = kantor::read_tensor(source, api);
    return true;
  }
};

}  // namespace pybind11::detail
