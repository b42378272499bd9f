// 3^d convolutions with as many channels out as in, on the CPU, by Winograd's F(2x2, 3x3) in y and x (Lavin and Gray
// 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1): a tile of 2 x 2 outputs takes 16 products
// instead of 36. The taps in z are summed as they are. One tile, four by four inputs d and three by three weights g:
//   V = B' d B,   U = G g G',   M_k = sum over channels in and taps in z of U_k V_k  (k = 0..15),   Y = A' M A
//        | 1  0 -1  0 |        |  1    0    0  |
//   B' = | 0  1  1  0 |    G = | 1/2  1/2  1/2 |    A' = | 1  1  1  0 |
//        | 0 -1  1  0 |        | 1/2 -1/2  1/2 |         | 0  1 -1 -1 |
//        | 0  1  0 -1 |        |  0    0    1  |
// No output depends on an input outside of its 3^d neighbourhood, not even by rounding: the terms are absent. The
// rounding errors are those of the direct sum or a little smaller: sums are shorter.
//
// Layout: activations are channels-last, (z, y, x, channel), without padding; channels are padded to whole vectors of
// `lanes`. Two rows of outputs are a strip, a strip is cut into blocks of up to `most_tiles` tiles:
//   V of a block and plane   (k, group of lanes, tile, lane)
//   U of a convolution       (group of lanes out, k, tap in z, channel in / pack, lane, pack), no padding in
//   M of a block             (group of lanes out, k, tile, lane), float
#pragma once
#include <cstddef>
#include <cstdint>

namespace kantor {

inline constexpr int frequencies = 16;

// What becomes of the outputs y = relu(conv + bias) (+ residual).
enum class Tail {
  store,     // written
  pool,      // written, and averaged over 2^d cells
  upsample,  // added to the 2^d cells of the finer level, not written
  head,      // q = weights . y, not written
};

// V of one block in one plane.
struct InputBlock {
  const void* rows[4];  // rows 2s-1 .. 2s+2 of strip s; a row of zeros where there is none
  int64_t nx;           // cells of a row
  int64_t first_tile;
  int tiles;
  int channels;
  void* v;
};

// M = U V of one block, all frequencies and channels.
struct Product {
  const void* v[3];  // V in each plane that there is
  int planes;
  int skipped;   // taps in z before the first of them
  int all_taps;  // in z: 3, or 1
  int tiles;
  int terms;   // channels in, without padding: a multiple of 4
  int groups;  // of channels, in and out
  const void* u;
  float* m;
  // Rows that are wanted next, brought closer meanwhile; null: none.
  const void* ahead[6];
  int64_t ahead_bytes;  // of each
};

// Y of one block in one plane.
struct OutputBlock {
  const float* m;
  int64_t nx;
  int64_t first_tile;
  int tiles;
  int channels;
  const float* bias;
  Tail tail;
  int rows;      // 1 where the strip's second row lies outside
  void* out[2];  // store, pool: the rows written; with a residual, the rows to add
  bool residual;
  // pool: a row of sums in float; begun in the first plane of two, closed in the second
  float* sums;
  bool opens, closes;
  float average;  // 1 / 2^d
  void* pooled;   // row of the coarser level
  // upsample: the rows of the finer level below row 0 and row 1, `fine_rows` each
  void* fine[2][4];
  int fine_rows;
  // head
  const float* weights;  // a channel each, and behind them the bias
  float* q[2];
  const uint8_t* mask[2];  // null: all
  int64_t nq;              // cells of a row of q
};

// The first convolution, one channel in: 8 cells of a row at a time.
struct FirstRow {
  const float* r;          // cell 0, tap 0, in a grid with a border of zeros
  const int64_t* offsets;  // of each tap from there
  int taps;
  int64_t nx;
  int channels;
  const float* weights;  // (tap, channel)
  const float* bias;
  void* out;
};

struct WinogradKernels {
  int lanes;       // channels of a vector
  int pack;        // channels that are multiplied and added at once
  int element;     // bytes of an activation or weight: 4, or 2 for bfloat16
  int most_tiles;  // of a block: as many accumulators as there are registers for
  void (*transform)(const InputBlock&);
  void (*multiply)(const Product&);
  void (*output)(const OutputBlock&);
  void (*first)(const FirstRow&);
};

// The kernels for this many channels: what the processor has, with vectors of at most `widest` bits. bfloat16 needs
// AVX512-BF16; elsewhere the float32 ones come back, which are slower and more accurate.
const WinogradKernels& winograd_kernels(int channels, bool bf16, int widest);

// By instruction set; only to be called where the processor has it.
const WinogradKernels& winograd_plain();
#if defined(__x86_64__)
const WinogradKernels& winograd_avx2();
const WinogradKernels& winograd_avx512(int channels);
const WinogradKernels& winograd_avx512_bf16(int channels);
#endif

// U of one convolution: weights (channels, channels, planes, 3, 3) to the layout above, all channels beyond zero.
size_t winograd_weight_bytes(const WinogradKernels& kernels, int channels, int planes);
void winograd_weights(const WinogradKernels& kernels, int channels, int planes, const float* weights, void* u);

// Channels padded to whole vectors.
inline int padded_channels(const WinogradKernels& kernels, int channels) {
  return (channels + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
}

}  // namespace kantor
