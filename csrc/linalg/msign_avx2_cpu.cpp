// The polar iteration of small matrices in AVX2: eight of the 16 registers accumulate.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns falsely inside its own intrinsics
#define KANTOR_TARGET __attribute__((target("avx2,fma")))
#include <immintrin.h>

#include <algorithm>

#include "linalg/msign_tile.h"

namespace kantor {
namespace {

struct Floats {
  using Element = float;
  using Vector = __m256;
  static constexpr int lanes = 8, rows = 4;
  KANTOR_INLINE static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  KANTOR_INLINE static void store(float* p, Vector a) { _mm256_storeu_ps(p, a); }
  KANTOR_INLINE static Vector broadcast(float a) { return _mm256_set1_ps(a); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
};

struct Doubles {
  using Element = double;
  using Vector = __m256d;
  static constexpr int lanes = 4, rows = 4;
  KANTOR_INLINE static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  KANTOR_INLINE static void store(double* p, Vector a) { _mm256_storeu_pd(p, a); }
  KANTOR_INLINE static Vector broadcast(double a) { return _mm256_set1_pd(a); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
};

}  // namespace

template <>
MsignFunction<float> msign_avx2<float>() {
  return &msign_one<Floats>;
}
template <>
MsignFunction<double> msign_avx2<double>() {
  return &msign_one<Doubles>;
}

}  // namespace kantor
#endif
