// The convolution kernels for any processor: vectors of 8 channels that the compiler splits into what there is.
#include <cstring>

#define KANTOR_TARGET
#include "linalg/winograd_kernels.h"

namespace kantor {
namespace {

struct Plain {
  using Element = float;
  typedef float Vector __attribute__((vector_size(32)));
  static constexpr int lanes = 8, pack = 1, most_tiles = 6;
  KANTOR_INLINE static Vector broadcast(float a) { return Vector{a, a, a, a, a, a, a, a}; }
  KANTOR_INLINE static Vector zero() { return broadcast(0.0f); }
  KANTOR_INLINE static Vector add(Vector a, Vector b) { return a + b; }
  KANTOR_INLINE static Vector sub(Vector a, Vector b) { return a - b; }
  KANTOR_INLINE static Vector mul(Vector a, Vector b) { return a * b; }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  KANTOR_INLINE static Vector relu(Vector a) { return a < zero() ? zero() : a; }
  KANTOR_INLINE static float sum(Vector a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }
  KANTOR_INLINE static Vector load(const float* p) {
    Vector a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  KANTOR_INLINE static void store(float* p, Vector a) { std::memcpy(p, &a, sizeof a); }
  KANTOR_INLINE static Vector read(const float* p) { return load(p); }
  KANTOR_INLINE static void write(float* p, Vector a) { store(p, a); }
  KANTOR_INLINE static Vector weight(const float* p) { return load(p); }
  KANTOR_INLINE static Vector mac(Vector sum, const float* x, Vector w) { return fma(broadcast(*x), w, sum); }
};

}  // namespace

const WinogradKernels& winograd_plain() {
  static constexpr WinogradKernels kernels = kernels_of<Plain>();
  return kernels;
}

}  // namespace kantor
