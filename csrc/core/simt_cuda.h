// What simt.h adds to CUDA itself: launching, and the host-side calls that simt_host.h provides under the same names.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#define SIMT_SHARED(T, name, n) __shared__ T name[n]
#define SIMT_DYNAMIC_SHARED(T, name)                                  \
  extern __shared__ __align__(16) unsigned char simt_dynamic_bytes[]; \
  T* const name = reinterpret_cast<T*>(simt_dynamic_bytes)

namespace kantor::simt {

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

template <class... Parameters>
void launch(const char* call, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Stream stream, std::type_identity_t<Parameters>... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // CUDA calls an empty grid an error
  // CUDA grants 48 KiB without being asked, the kernel's static arrays included.
  if (shared_bytes > (16u << 10)) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          call);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), call);
}

// Waits until the bytes are there.
inline void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)), "copy_to_host");
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "copy_to_host");
}
// `from` may be changed when the call returns, unless it is page-locked memory.
inline void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)), "copy_to_device");
}
inline void memset_async(void* to, int value, std::size_t bytes, Stream stream) {
  check(cudaMemsetAsync(to, value, bytes, static_cast<cudaStream_t>(stream)), "memset_async");
}
inline void synchronize(Stream stream) {
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "synchronize");
}

// 0 without a driver.
inline int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // forgets the error, which is no one's
  return 0;
}
inline int sm_count(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "sm_count");
  return count;
}
// Of one block, dynamic and static together.
inline std::size_t shared_bytes_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared_bytes_limit");
  return static_cast<std::size_t>(bytes);
}

// Makes `device` current for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "DeviceGuard");
    if (device == previous_) return;
    check(cudaSetDevice(device), "DeviceGuard");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace kantor::simt
