// The nearest neighbours' inner loop in AVX2: two points at once, 8 of the 16 registers accumulate.
#if defined(__x86_64__)
#define KANTOR_TARGET __attribute__((target("avx2,fma")))
#include <immintrin.h>

#include "graph/knn_tile.h"

namespace kantor {
namespace {

struct Floats {
  using Element = float;
  using Vector = __m256;
  static constexpr int lanes = 8, rows = 2;
  KANTOR_INLINE static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  KANTOR_INLINE static void store(float* p, Vector a) { _mm256_storeu_ps(p, a); }
  KANTOR_INLINE static Vector broadcast(float a) { return _mm256_set1_ps(a); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  KANTOR_INLINE static uint32_t reaches(Vector score, Vector threshold) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(score, threshold, _CMP_GE_OQ)));
  }
};

struct Doubles {
  using Element = double;
  using Vector = __m256d;
  static constexpr int lanes = 4, rows = 2;
  KANTOR_INLINE static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  KANTOR_INLINE static void store(double* p, Vector a) { _mm256_storeu_pd(p, a); }
  KANTOR_INLINE static Vector broadcast(double a) { return _mm256_set1_pd(a); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
  KANTOR_INLINE static uint32_t reaches(Vector score, Vector threshold) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(score, threshold, _CMP_GE_OQ)));
  }
};

}  // namespace

template <>
KnnScanFunction<float> knn_scan_avx2<float>() {
  return &scan_panel<Floats>;
}
template <>
KnnScanFunction<double> knn_scan_avx2<double>() {
  return &scan_panel<Doubles>;
}

}  // namespace kantor
#endif
