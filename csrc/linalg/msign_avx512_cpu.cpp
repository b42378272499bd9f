// The polar iteration of small matrices in AVX-512: sixteen of the 32 registers accumulate.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns falsely inside its own intrinsics
#define KANTOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#include <immintrin.h>

#include <algorithm>

#include "linalg/msign_tile.h"

namespace kantor {
namespace {

struct Floats {
  using Element = float;
  using Vector = __m512;
  static constexpr int lanes = 16, rows = 8;
  KANTOR_INLINE static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  KANTOR_INLINE static void store(float* p, Vector a) { _mm512_storeu_ps(p, a); }
  KANTOR_INLINE static Vector broadcast(float a) { return _mm512_set1_ps(a); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Doubles {
  using Element = double;
  using Vector = __m512d;
  static constexpr int lanes = 8, rows = 8;
  KANTOR_INLINE static Vector load(const double* p) { return _mm512_loadu_pd(p); }
  KANTOR_INLINE static void store(double* p, Vector a) { _mm512_storeu_pd(p, a); }
  KANTOR_INLINE static Vector broadcast(double a) { return _mm512_set1_pd(a); }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_pd(a, b, c); }
};

}  // namespace

template <>
MsignFunction<float> msign_avx512<float>() {
  return &msign_one<Floats>;
}
template <>
MsignFunction<double> msign_avx512<double>() {
  return &msign_one<Doubles>;
}

}  // namespace kantor
#endif
