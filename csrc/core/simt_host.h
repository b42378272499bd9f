// Host emulation of the part of CUDA that the kernels use (tests only). Kernels include simt.h, never this file.
//
// Each CUDA thread runs in a fiber, the blocks one after another on the calling OS thread. A thread runs until it has
// to wait, so a kernel without barriers costs a plain loop. What is checked that a GPU does not check:
//   - shared memory is filled with 0xFF (static) or 0xCD (dynamic) at the start of every block;
//   - threads and blocks run forward, in reverse, or in one of two shuffled orders (emulator::set_schedule), so that a
//     missing barrier or a dependence between blocks changes the result;
//   - emulator::LaunchError is thrown for a barrier that only a part of the block reaches, a shuffle from a lane that
//     has returned or is not in the mask, and a launch beyond the limits of the device;
//   - with -fsanitize=address every access outside a tensor or a shared array is found.
// Not modelled: weak memory order (a missing __threadfence goes unnoticed) and blocks that wait for each other.
#pragma once

#include <math.h>
#include <atomic>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/simt_scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::kantor::simt::emulator::active->current->index)
#define blockIdx (::kantor::simt::emulator::active->block_index)
#define blockDim (::kantor::simt::emulator::active->block)
#define gridDim (::kantor::simt::emulator::active->grid)

#define SIMT_SHARED(T, name, n)                                             \
  static thread_local ::kantor::simt::emulator::SharedBuffer name##_buffer; \
  T(&name)[n] = ::kantor::simt::emulator::static_shared<T, n>(name##_buffer)
#define SIMT_DYNAMIC_SHARED(T, name) T* name = ::kantor::simt::emulator::dynamic_shared<T>()

// The vector types that give 8- and 16-byte loads; misaligned use is found by -fsanitize=undefined.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace kantor::simt::emulator {

template <class T, std::size_t n>
using Array = T[n];

// A reference to an array, so that -fsanitize=undefined checks the index and sizeof is that of the array, as on CUDA.
template <class T, std::size_t n>
Array<T, n>& static_shared(SharedBuffer& buffer) {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16, "shared memory holds plain values");
  return *reinterpret_cast<Array<T, n>*>(active->static_shared(buffer, n * sizeof(T)));
}

template <class T>
T* dynamic_shared() {
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= 16, "shared memory holds plain values");
  return reinterpret_cast<T*>(active->dynamic_shared());
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 16, "a lane sends up to 16 bytes");
  Thread& self = *active->current;
  self.mask = mask;
  self.source = source;
  std::memcpy(self.sent, &value, sizeof(T));
  active->wait(Wait::shuffle, place);
  std::memcpy(&value, self.received, sizeof(T));
  return value;
}

inline Ballot vote(unsigned mask, bool yes, Place place) {
  Thread& self = *active->current;
  self.mask = mask;
  self.sent[0] = std::byte{yes};
  active->wait(Wait::vote, place);
  Ballot ballot;
  std::memcpy(&ballot, self.received, sizeof ballot);
  return ballot;
}

inline unsigned lane() { return active->current->rank % 32; }

// The last offset in a segment of `width` lanes.
inline unsigned last_offset(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    throw LaunchError("a shuffle's width is " + std::to_string(width) + ", expected a power of two up to 32");
  }
  return static_cast<unsigned>(width) - 1;
}

template <class T, class... Allowed>
concept one_of = (std::is_same_v<T, Allowed> || ...);

}  // namespace kantor::simt::emulator

// What device code sees without a qualifier. The compiler fills in `place`.
namespace kantor::simt::emulator::device {

// --- barriers and warp operations ---

inline void __syncthreads(Place place = Place::current()) { active->wait(Wait::barrier, place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, Place place = Place::current()) {
  active->current->mask = mask;
  active->wait(Wait::warp_sync, place);
}

// A warp is cut into segments of `width` lanes (a power of two); a source outside the own segment gives the own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Place place = Place::current()) {
  const unsigned last = last_offset(width);
  return shuffle(mask, value, (lane() & ~last) | (static_cast<unsigned>(source) & last), place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, Place place = Place::current()) {
  const unsigned offset = lane() & last_offset(width);
  return shuffle(mask, value, offset < delta ? lane() : lane() - delta, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, Place place = Place::current()) {
  const unsigned last = last_offset(width), offset = lane() & last;
  return shuffle(mask, value, delta <= last - offset ? lane() + delta : lane(), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, Place place = Place::current()) {
  const unsigned source = lane() ^ static_cast<unsigned>(lane_mask);
  const bool later = source > (lane() | last_offset(width));  // an earlier segment may be read, a later one not
  return shuffle(mask, value, later ? lane() : source, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Place place = Place::current()) {
  return vote(mask, predicate != 0, place).yes;
}
inline int __any_sync(unsigned mask, int predicate, Place place = Place::current()) {
  return vote(mask, predicate != 0, place).yes != 0;
}
inline int __all_sync(unsigned mask, int predicate, Place place = Place::current()) {
  const auto ballot = vote(mask, predicate != 0, place);
  return ballot.yes == ballot.voters;
}

// --- memory: only one fiber runs at a time, so plain accesses are atomic; the types are those CUDA has ---

template <one_of<int, unsigned, unsigned long long, float, double> T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  if constexpr (std::is_same_v<T, int>) {
    *address = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));  // wraps on the device
  } else {
    *address = old + value;
  }
  return old;
}
template <one_of<int, unsigned, long long, unsigned long long> T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old > value ? old : value;
  return old;
}
template <one_of<int, unsigned, long long, unsigned long long> T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old < value ? old : value;
  return old;
}
template <one_of<int, unsigned, unsigned long long> T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  const T old = *address;
  if (old == expected) *address = desired;
  return old;
}
template <one_of<int, unsigned, unsigned long long, float> T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
// Counts up to `last`, then starts again at zero.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* address) {
  return *address;
}

// --- arithmetic ---

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
using std::max;
using std::min;

}  // namespace kantor::simt::emulator::device

using namespace kantor::simt::emulator::device;

// --- host side: the same names as under CUDA; everything has happened when the call returns ---

namespace kantor::simt {

template <class... Parameters>
void launch(const char* call, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream,
            std::type_identity_t<Parameters>... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  auto run = [&] { kernel(arguments...); };
  try {
    emulator::machine().launch(
        grid, block, shared_bytes, [](void* body) { (*static_cast<decltype(run)*>(body))(); }, &run);
  } catch (const emulator::LaunchError& error) { throw emulator::LaunchError(std::string(call) + ": " + error.what()); }
}

namespace emulator {
// Copies to the host so far: each would make the host wait for a GPU.
inline std::atomic<long> host_copies{0};
}  // namespace emulator

inline void copy_to_host(void* to, const void* from, std::size_t bytes, Stream) {
  ++emulator::host_copies;
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void copy_to_device(void* to, const void* from, std::size_t bytes, Stream) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}
inline void memset_async(void* to, int value, std::size_t bytes, Stream) {
  if (bytes > 0) std::memset(to, value, bytes);
}
inline void synchronize(Stream) {}
inline int device_count() { return 1; }
inline int sm_count(int) { return 4; }
inline std::size_t shared_bytes_limit(int) { return emulator::max_shared_bytes; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

}  // namespace kantor::simt
