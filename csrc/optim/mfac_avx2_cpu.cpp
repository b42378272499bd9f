// M-FAC's inner loops in AVX2: four rows at once, 8 of the 16 registers accumulate.
#if defined(__x86_64__)
#define KANTOR_TARGET __attribute__((target("avx2,fma,f16c")))
#include <immintrin.h>

#include "optim/mfac_loops.h"

namespace kantor {
namespace {

struct Avx2 {
  using Vector = __m256d;
  static constexpr int lanes = 4, rows = 4;
  KANTOR_INLINE static Vector load(const double* p) { return _mm256_loadu_pd(p); }
  KANTOR_INLINE static Vector load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
  KANTOR_INLINE static Vector load(const Bfloat16* p) {
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadu_si64(p)), 16)));
  }
  KANTOR_INLINE static Vector load(const Half* p) { return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadu_si64(p))); }
  KANTOR_INLINE static Vector load(const int8_t* p) { return _mm256_cvtepi32_pd(_mm_cvtepi8_epi32(_mm_loadu_si32(p))); }
  KANTOR_INLINE static void store(double* p, Vector a) { _mm256_storeu_pd(p, a); }
  KANTOR_INLINE static Vector broadcast(double a) { return _mm256_set1_pd(a); }
  KANTOR_INLINE static Vector add(Vector a, Vector b) { return _mm256_add_pd(a, b); }
  KANTOR_INLINE static Vector multiply(Vector a, Vector b) { return _mm256_mul_pd(a, b); }
  KANTOR_INLINE static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_pd(a, b, c); }
};

}  // namespace

KANTOR_ROW_LOOPS(row_loops_avx2, Avx2)

}  // namespace kantor
#endif
