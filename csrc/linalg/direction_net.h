// Inference of the direction network of "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems"
// (Kaneda, Akar, Chen, Kala, Hyde, Teran 2023), section 4. Every convolution has 3^d taps, stride 1 and zero padding:
//
//   a = relu(conv_1(conv_0(r)))                 conv_0: 1 -> C channels, no relu between the two
//   pre  times:  a = relu(conv(relu(conv(a)))) + a
//   b = relu(conv(a));  u = 2^d average pooling of b
//   mid  times:  u = relu(conv(relu(conv(u)))) + u
//   u = b + (u repeated 2^d times)
//   post times:  u = relu(conv(relu(conv(u)))) + u
//   q = head . u                                one weight a channel
//
// With a mask, r counts as zero and q is zero where the mask is zero. Sizes are extended to even ones by cells where r
// is zero (in 2-D not z), which q then leaves out.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "core/exec.h"

namespace kantor {

// tf32 is for CUDA's tensor cores (operands rounded to 10 bits of mantissa); the CPU then computes in float32.
enum class NetPrecision : int { f32, bf16, tf32 };

struct DirectionNet {
  int dims = 3;                           // 2: nz = 1, and taps in y and x only
  int channels = 16;                      // a multiple of 4
  int pre = 1, mid = 3, post = 2;         // residual pairs; mid and post at least 1
  std::array<int64_t, 3> grid{};          // nz, ny, nx of r, q and mask: any sizes of at least 1
  const float* const* weights = nullptr;  // of each convolution in the order above, contiguous (out, in, kz, ky, kx);
  const float* const* biases = nullptr;   // the head's (1, C). A null array or a null entry: no bias
  const uint8_t* mask = nullptr;          // grid, nonzero on fluid cells; null: everywhere
  NetPrecision precision = NetPrecision::f32;
  int widest = 512;  // bits of the vectors that the CPU may use: 512, 256 or 128

  int64_t cells() const { return grid[0] * grid[1] * grid[2]; }
  int taps() const { return dims == 3 ? 27 : 9; }
  // conv_0, conv_1, pre pairs, conv b, mid pairs, post pairs, head
  int convolutions() const { return 4 + 2 * (pre + mid + post); }
  // Sizes of the fine level: even, and of the coarse one.
  std::array<int64_t, 3> fine() const {
    const auto even = [](int64_t n) { return n + n % 2; };
    return {dims == 3 ? even(grid[0]) : 1, even(grid[1]), even(grid[2])};
  }
  std::array<int64_t, 3> coarse() const {
    const auto n = fine();
    return {dims == 3 ? n[0] / 2 : 1, n[1] / 2, n[2] / 2};
  }
};

// Preparation happens once for weights and mask: `prepared` holds the weights in the order in which the kernels read
// them, and which blocks of cells each convolution needs. Afterwards weights and biases are not read again. Bytes are
// rounded up to 64; memory is expected at multiples of 64 bytes (CUDA: 256).
size_t direction_net_prepared_bytes_cpu(const DirectionNet& net);
void prepare_direction_net_cpu(const Exec& exec, const DirectionNet& net, void* prepared);
size_t direction_net_prepared_bytes_cuda(const DirectionNet& net);
void prepare_direction_net_cuda(const Exec& exec, const DirectionNet& net, void* prepared);  // all pointers on device

// q = net(r), both (batch, grid) and float32. Nothing is allocated; the workspace holds two activations of the fine
// level and two of the coarse one and need not be set to anything. CPU: the same bits for any number of threads;
// `interrupted` is asked between layers whether to stop, upon which the result is false and q unfinished.
size_t direction_net_workspace_cpu(const Exec& exec, const DirectionNet& net, int64_t batch);
bool direction_net_cpu(const Exec& exec, const DirectionNet& net, const void* prepared, int64_t batch, const float* r,
                       float* q, void* workspace, const std::function<bool()>& interrupted = {});
size_t direction_net_workspace_cuda(const DirectionNet& net, int64_t batch);
void direction_net_cuda(const Exec& exec, const DirectionNet& net, const void* prepared, int64_t batch, const float* r,
                        float* q, void* workspace);  // on exec.stream: no allocation, no synchronisation, capturable

}  // namespace kantor
