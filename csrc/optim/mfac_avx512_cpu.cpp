// M-FAC's inner loops in AVX-512: eight rows at once, a register of sums for each.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns falsely inside its own intrinsics
#define KANTOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#include <immintrin.h>

#include "optim/mfac_loops.h"

namespace kantor {
namespace {

struct Avx512 {
  using Vector = __m512d;
  static constexpr int lanes = 8, rows = 8;
  KANTOR_INLINE static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  KANTOR_INLINE static Vector load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
  KANTOR_INLINE static Vector load(const Bfloat16* p) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed(p)), 16)));
  }
  KANTOR_INLINE static Vector load(const Half* p) { return _mm512_cvtps_pd(_mm256_cvtph_ps(packed(p))); }
  KANTOR_INLINE static Vector load(const int8_t* p) {
    return _mm512_cvtepi32_pd(_mm256_cvtepi8_epi32(_mm_loadu_si64(p)));
  }
  KANTOR_INLINE static void store(double* p, Vector a) { _mm512_storeu_pd(p, a); }
  KANTOR_INLINE static Vector broadcast(double a) { return _mm512_set1_pd(a); }
  KANTOR_INLINE static Vector add(Vector a, Vector b) { return _mm512_add_pd(a, b); }
  KANTOR_INLINE static Vector multiply(Vector a, Vector b) { return _mm512_mul_pd(a, b); }
  KANTOR_INLINE static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }

 private:
  KANTOR_INLINE static __m128i packed(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
};

}  // namespace

KANTOR_ROW_LOOPS(row_loops_avx512, Avx512)

}  // namespace kantor
#endif
