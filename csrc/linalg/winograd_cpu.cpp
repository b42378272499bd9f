// What does not depend on the instruction set: the transformed weights, and the choice of the kernels.
#include <cstring>

#include "linalg/winograd.h"

namespace kantor {
namespace {

// Round to nearest, ties to even; weights are finite.
uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// G g G' of nine weights.
void transform_weights(const float* g, double (&u)[frequencies]) {
  double rows[4][3];
  for (int j = 0; j < 3; ++j) {
    const double g0 = g[j], g1 = g[3 + j], g2 = g[6 + j];
    rows[0][j] = g0;
    rows[1][j] = (g0 + g1 + g2) / 2;
    rows[2][j] = (g0 - g1 + g2) / 2;
    rows[3][j] = g2;
  }
  for (int i = 0; i < 4; ++i) {
    u[4 * i + 0] = rows[i][0];
    u[4 * i + 1] = (rows[i][0] + rows[i][1] + rows[i][2]) / 2;
    u[4 * i + 2] = (rows[i][0] - rows[i][1] + rows[i][2]) / 2;
    u[4 * i + 3] = rows[i][2];
  }
}

}  // namespace

size_t winograd_weight_bytes(const WinogradKernels& kernels, int channels, int planes) {
  const size_t padded = padded_channels(kernels, channels);
  return padded * channels * frequencies * planes * kernels.element;
}

void winograd_weights(const WinogradKernels& kernels, int channels, int planes, const float* weights, void* u) {
  const int64_t lanes = kernels.lanes, pack = kernels.pack;
  std::memset(u, 0, winograd_weight_bytes(kernels, channels, planes));
  for (int64_t out = 0; out < channels; ++out)
    for (int64_t in = 0; in < channels; ++in)
      for (int64_t plane = 0; plane < planes; ++plane) {
        double transformed[frequencies];
        transform_weights(weights + ((out * channels + in) * planes + plane) * 9, transformed);
        for (int64_t k = 0; k < frequencies; ++k) {
          const int64_t position = ((out / lanes * frequencies + k) * planes + plane) * channels * lanes +
                                   (in / pack * lanes + out % lanes) * pack + in % pack;
          if (kernels.element == 2)
            static_cast<uint16_t*>(u)[position] = to_bf16(static_cast<float>(transformed[k]));
          else
            static_cast<float*>(u)[position] = static_cast<float>(transformed[k]);
        }
      }
}

const WinogradKernels& winograd_kernels([[maybe_unused]] int channels, [[maybe_unused]] bool bf16,
                                        [[maybe_unused]] int widest) {
#if defined(__x86_64__) && !defined(KANTOR_NO_SIMD)
  if (widest >= 512 && __builtin_cpu_supports("x86-64-v4")) {
    if (bf16 && __builtin_cpu_supports("avx512bf16")) return winograd_avx512_bf16(channels);
    return winograd_avx512(channels);
  }
  if (widest >= 256 && __builtin_cpu_supports("x86-64-v3")) return winograd_avx2();
#endif
  return winograd_plain();
}

}  // namespace kantor
