// The part of the DLPack 1.x ABI that Kantor reads: tensors and the C exchange API that torch >= 2.11 publishes as
// `torch.Tensor.__dlpack_c_exchange_api__`. Our own declaration of a stable ABI: no third-party header is needed to
// build. Layout reference: the DLPack specification, version 1.3. The sizes are checked at the end.
#pragma once
#include <cstdint>

namespace kantor::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means C-contiguous
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* previous;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  // Owned tensors in and out: unused here, so left untyped.
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object)();
  void (*managed_tensor_to_py_object)();
  // A borrowed view of the tensor behind a PyObject*; shape and strides live as long as the object. 0 on success.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  // The framework's current work stream on a device. 0 on success.
  int (*current_work_stream)(DeviceType type, int32_t device_id, void** stream);
};

static_assert(sizeof(Tensor) == 48, "DLTensor layout");
static_assert(sizeof(ExchangeApiHeader) == 16 && sizeof(ExchangeApi) == 56, "DLPackExchangeAPI layout");

}  // namespace kantor::dlpack
