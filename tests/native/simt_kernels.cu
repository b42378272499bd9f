// Compiled by nvcc only: the kernels and launches that test_simt.cpp runs in the emulator are CUDA as well.
#include "simt_kernels.h"

namespace kantor::simt_test {

template __global__ void shuffle_values<int>(const int*, int*, int, int);
template __global__ void shuffle_values<float>(const float*, float*, int, int);
template __global__ void shuffle_values<double>(const double*, double*, int, int);
template __global__ void shuffle_values<long long>(const long long*, long long*, int, int);
template __global__ void transpose_tiles<float>(int, int, const float*, float*);
template __global__ void transpose_tiles<double>(int, int, const double*, double*);
template __global__ void reverse_blocks<float>(const float*, float*);
template __global__ void reverse_blocks<double>(const double*, double*);
template __global__ void reduce_values<int>(const int*, int*);
template __global__ void reduce_values<float>(const float*, float*);
template __global__ void reduce_values<double>(const double*, double*);
template __global__ void csr_product<float>(int, const int*, const int*, const float*, const float*, float*);
template __global__ void csr_product<double>(int, const int*, const int*, const double*, const double*, double*);
template __global__ void log_sum_exp_rows<float>(int, const float*, float*);
template __global__ void log_sum_exp_rows<double>(int, const double*, double*);
template __global__ void plant_global_overrun<double>(std::int64_t, double*);

// The host side of a reduction, as an area's .cu file writes it.
template <class T>
T dot_on_device(int device, std::int64_t n, const T* x, const T* y, T* partial, unsigned* ticket, T* result,
                simt::Stream stream) {
  const simt::DeviceGuard guard(device);
  simt::memset_async(ticket, 0, sizeof(unsigned), stream);
  const unsigned blocks = simt::blocks_for(n, 256, static_cast<unsigned>(2 * simt::sm_count(device)));
  SIMT_LAUNCH(dot<T>, blocks, 256, 0, stream, n, x, y, partial, ticket, result);
  T value = 0;
  simt::copy_to_host(&value, result, sizeof value, stream);
  return value;
}
template float dot_on_device(int, std::int64_t, const float*, const float*, float*, unsigned*, float*, simt::Stream);
template double dot_on_device(int, std::int64_t, const double*, const double*, double*, unsigned*, double*,
                              simt::Stream);

}  // namespace kantor::simt_test
