// The convolution kernels in AVX2: vectors of 8 channels, 12 of the 16 registers accumulate.
#if defined(__x86_64__)
#define KANTOR_TARGET __attribute__((target("avx2,fma")))
#include "linalg/winograd_vector8.h"

namespace kantor {
namespace {

struct Avx2 : Vector8 {
  static constexpr int most_tiles = 12;
};

}  // namespace

const WinogradKernels& winograd_avx2() {
  static constexpr WinogradKernels kernels = kernels_of<Avx2>();
  return kernels;
}

}  // namespace kantor
#endif
