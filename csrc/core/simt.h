// The only header that kernels include. Under nvcc it is CUDA; under a C++ compiler with KANTOR_EMULATE defined each
// CUDA thread is a fiber (simt_host.h), so that the kernels are tested without a GPU.
//
// A kernel is written as usual, except for shared memory and the launch:
//
//     template <class T>
//     __global__ void row_sums(int n, const T* a, T* sums) {
//       SIMT_SHARED(T, scratch, 32);        // __shared__ T scratch[32];   T without a comma: name such a type first
//       SIMT_DYNAMIC_SHARED(T, row);        // extern __shared__, 16-byte aligned; at most one in a kernel
//       ...
//     }
//     SIMT_LAUNCH(row_sums<T>, grid, block, shared_bytes, stream, n, a, sums);
//
// Dynamic shared memory is one block of bytes: a kernel that needs several arrays there cuts them out of it by hand.
// A launch converts its arguments to the kernel's parameter types, does nothing when the grid is empty, asks for more
// than 48 KiB of dynamic shared memory where needed, and throws std::runtime_error when the launch fails. It does not
// wait for the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/hd.h"

namespace kantor::simt {

// A CUDA stream (null: the default one), without CUDA's headers.
using Stream = void*;

}  // namespace kantor::simt

// Before a loop: its copies side by side, so that what it indexes can be in registers, or one copy only. The host
// compiler decides for itself.
#if defined(__CUDACC__)
#define KANTOR_UNROLL _Pragma("unroll")
#define KANTOR_KEEP_LOOP _Pragma("unroll 1")
#else
#define KANTOR_UNROLL
#define KANTOR_KEEP_LOOP
#endif

#define SIMT_LAUNCH(...) ::kantor::simt::launch("SIMT_LAUNCH(" #__VA_ARGS__ ")", __VA_ARGS__)

#if defined(__CUDACC__)
#include "core/simt_cuda.h"
#elif defined(KANTOR_EMULATE)
#include "core/simt_host.h"
#else
#error "simt.h: compile with nvcc, or define KANTOR_EMULATE"
#endif

namespace kantor::simt {

inline constexpr unsigned full_warp = 0xffffffffu;

// Blocks of `block_size` threads that give each of n elements a thread, at most `most` (a grid-stride loop does the
// rest). 0 when n is 0.
inline unsigned blocks_for(std::int64_t n, unsigned block_size, unsigned most = 0x7fffffffu) {
  const std::int64_t blocks = (n + block_size - 1) / block_size;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// --- where am I ---

__device__ __forceinline__ unsigned thread_rank() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ __forceinline__ unsigned block_size() { return blockDim.x * blockDim.y * blockDim.z; }
__device__ __forceinline__ unsigned lane_index() { return thread_rank() % 32; }
__device__ __forceinline__ unsigned warp_index() { return thread_rank() / 32; }

// Of a one-dimensional grid.
__device__ __forceinline__ std::int64_t global_thread_index() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

// f(i) for i in 0..n-1, shared by all threads of a one-dimensional grid; neighbouring threads get neighbouring i.
template <class F>
__device__ __forceinline__ void grid_stride(std::int64_t n, F&& f) {
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = global_thread_index(); i < n; i += stride) f(i);
}

// --- reductions: fixed trees, so the same bits in every run; every participant gets the result ---

namespace detail {

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Larger {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>) {
      return a > b || a != a ? a : b;  // NaN wins, on whichever side it is
    } else {
      return a > b ? a : b;
    }
  }
};

// A butterfly: at each step both partners combine the same two values, so that all lanes agree bit for bit.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(full_warp, value, distance));
  }
  return value;
}

// `padding` stands in for the warps that a block of less than 1024 threads lacks.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T padding, Combine combine) {
  SIMT_SHARED(T, scratch, 32);
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  // Every warp combines the warps' results itself: cheaper than handing one warp's answer out behind a third barrier.
  value = warp_reduce(lane_index() < block_size() / 32 ? scratch[lane_index()] : padding, combine);
  __syncthreads();  // scratch is free for the next reduction
  return value;
}

}  // namespace detail

// Over the 32 lanes of a warp, all of which must take part.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  return detail::warp_reduce(value, detail::Add{});
}
template <class T>
__device__ __forceinline__ T warp_max(T value) {
  return detail::warp_reduce(value, detail::Larger{});
}

// Over a block of a multiple of 32 threads, up to 1024, all of which must take part. Two barriers.
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  return detail::block_reduce(warp_sum(value), T(0), detail::Add{});
}
template <class T>
__device__ __forceinline__ T block_max(T value) {
  value = warp_max(value);
  return detail::block_reduce(value, value, detail::Larger{});
}

// Lets one kernel finish a reduction over its grid: true in every thread of exactly one of `blocks` blocks, the one
// that gets here last and therefore sees what the threads of all of them wrote before. *ticket must be zero at the
// launch and is zero again afterwards. All threads of these blocks must call it, once in a launch for each ticket.
///
//     partial[blockIdx.x] = ...;                        // by one thread of each block
//     if (!is_last_block(ticket, gridDim.x)) return;
//     ... combine partial[0..gridDim.x-1] in a fixed order, whichever block this is ...
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  SIMT_SHARED(bool, last, 1);
  __threadfence();  // my writes become visible before my block takes its ticket
  __syncthreads();
  if (thread_rank() == 0) last[0] = atomicInc(ticket, blocks - 1) == blocks - 1;  // wraps to zero
  __syncthreads();
  __threadfence();  // and what the others wrote before theirs is read afresh
  return last[0];
}
// Over the whole grid.
__device__ __forceinline__ bool is_last_block(unsigned* ticket) {
  return is_last_block(ticket, gridDim.x * gridDim.y * gridDim.z);
}

}  // namespace kantor::simt
