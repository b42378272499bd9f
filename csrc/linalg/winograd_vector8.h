// Vectors of eight float32 channels for linalg/winograd_kernels.h, for AVX2 and, with twice the registers, AVX-512.
#pragma once
#include <immintrin.h>

#include "linalg/winograd_kernels.h"

namespace kantor {
namespace {

struct Vector8 {
  using Element = float;
  using Vector = __m256;
  static constexpr int lanes = 8, pack = 1;
  KANTOR_INLINE static Vector zero() { return _mm256_setzero_ps(); }
  KANTOR_INLINE static Vector broadcast(float a) { return _mm256_set1_ps(a); }
  KANTOR_INLINE static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  KANTOR_INLINE static Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
  KANTOR_INLINE static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  KANTOR_INLINE static Vector relu(Vector a) { return _mm256_max_ps(zero(), a); }  // in this order a NaN stays
  KANTOR_INLINE static float sum(Vector a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  KANTOR_INLINE static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  KANTOR_INLINE static void store(float* p, Vector a) { _mm256_storeu_ps(p, a); }
  KANTOR_INLINE static Vector read(const float* p) { return load(p); }
  KANTOR_INLINE static void write(float* p, Vector a) { store(p, a); }
  KANTOR_INLINE static Vector weight(const float* p) { return load(p); }
  KANTOR_INLINE static Vector mac(Vector sum, const float* x, Vector w) { return fma(broadcast(*x), w, sum); }
};

}  // namespace
}  // namespace kantor
