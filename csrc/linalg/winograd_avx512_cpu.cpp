// The convolution kernels in AVX-512: vectors of 16 channels, and of 8 for networks that have no more.
#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns falsely inside its own intrinsics
#define KANTOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#include "linalg/winograd_vector16.h"
#include "linalg/winograd_vector8.h"

namespace kantor {
namespace {

struct Wide : Vector16 {
  static constexpr int most_tiles = 16;
};

struct Narrow : Vector8 {
  static constexpr int most_tiles = 16;
};

}  // namespace

const WinogradKernels& winograd_avx512(int channels) {
  static constexpr WinogradKernels wide = kernels_of<Wide>(), narrow = kernels_of<Narrow>();
  return channels > 8 ? wide : narrow;
}

}  // namespace kantor
#endif
