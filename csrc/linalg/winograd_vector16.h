// Vectors of sixteen float32 channels for linalg/winograd_kernels.h.
#pragma once
#include <immintrin.h>

#include "linalg/winograd_kernels.h"

namespace kantor {
namespace {

struct Vector16 {
  using Element = float;
  using Vector = __m512;
  static constexpr int lanes = 16, pack = 1;
  KANTOR_INLINE static Vector zero() { return _mm512_setzero_ps(); }
  KANTOR_INLINE static Vector broadcast(float a) { return _mm512_set1_ps(a); }
  KANTOR_INLINE static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  KANTOR_INLINE static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  KANTOR_INLINE static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  KANTOR_INLINE static Vector relu(Vector a) { return _mm512_max_ps(zero(), a); }  // in this order a NaN stays
  KANTOR_INLINE static float sum(Vector a) { return _mm512_reduce_add_ps(a); }
  KANTOR_INLINE static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  KANTOR_INLINE static void store(float* p, Vector a) { _mm512_storeu_ps(p, a); }
  KANTOR_INLINE static Vector read(const float* p) { return load(p); }
  KANTOR_INLINE static void write(float* p, Vector a) { store(p, a); }
  KANTOR_INLINE static Vector weight(const float* p) { return load(p); }
  KANTOR_INLINE static Vector mac(Vector sum, const float* x, Vector w) { return fma(broadcast(*x), w, sum); }
};

}  // namespace
}  // namespace kantor
