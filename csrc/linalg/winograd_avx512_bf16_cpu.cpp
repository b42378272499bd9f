// The convolution kernels in AVX512-BF16: activations, transformed inputs and transformed weights are bfloat16, sums
// float32. One instruction multiplies two channels in.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns falsely inside its own intrinsics
#define KANTOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))
#include <cstring>

#include "linalg/winograd_vector16.h"
#include "linalg/winograd_vector8.h"

namespace kantor {
namespace {

KANTOR_INLINE int pair_of(const uint16_t* x) {
  int pair;
  std::memcpy(&pair, x, sizeof pair);
  return pair;
}

struct Wide : Vector16 {
  using Element = uint16_t;
  static constexpr int pack = 2, most_tiles = 16;
  KANTOR_INLINE static Vector read(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  KANTOR_INLINE static void write(uint16_t* p, Vector a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a));
  }
  KANTOR_INLINE static __m512bh weight(const uint16_t* p) {
    return (__m512bh)_mm512_loadu_si512(reinterpret_cast<const __m512i*>(p));
  }
  KANTOR_INLINE static Vector mac(Vector sum, const uint16_t* x, __m512bh w) {
    return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_set1_epi32(pair_of(x)));
  }
};

struct Narrow : Vector8 {
  using Element = uint16_t;
  static constexpr int pack = 2, most_tiles = 16;
  KANTOR_INLINE static Vector read(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  KANTOR_INLINE static void write(uint16_t* p, Vector a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), (__m128i)_mm256_cvtneps_pbh(a));
  }
  KANTOR_INLINE static __m256bh weight(const uint16_t* p) {
    return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  KANTOR_INLINE static Vector mac(Vector sum, const uint16_t* x, __m256bh w) {
    return _mm256_dpbf16_ps(sum, w, (__m256bh)_mm256_set1_epi32(pair_of(x)));
  }
};

}  // namespace

const WinogradKernels& winograd_avx512_bf16(int channels) {
  static constexpr WinogradKernels wide = kernels_of<Wide>(), narrow = kernels_of<Narrow>();
  return channels > 8 ? wide : narrow;
}

}  // namespace kantor
#endif
