// A 3^d convolution on CUDA, part 1: the tile of cells that a block of threads computes, and its way into shared
// memory. Parts 2 and 3 are conv_sum_kernels.h and conv_kernels.h.
//
// Activations are channels last: (batch, z, y, x, channels), float32 or bfloat16. A 2-D grid (ny, nx) is treated as the
// planes (ny, 1, nx) with a single tap in the middle axis, so that the rest is the same for both.
#pragma once
#include <cstdint>

#include "linalg/tensor_core.h"

namespace kantor {

// The last thing that a convolution's block does with its results y.
enum class Finish : int {
  store,   // output = y
  pool,    // output = y, and `other`, of half the size, = the averages of y
  spread,  // `other`, of twice the size, += y repeated
  head     // q = head . y on the mask
};

struct Grid {
  int nz, ny, nx;  // 2-D: ny is 1

  KANTOR_HD int64_t cell(int64_t batch, int z, int y, int x) const {
    return ((batch * nz + z) * ny + y) * int64_t{nx} + x;
  }
  KANTOR_HD bool has(int z, int y, int x) const { return 0 <= z && z < nz && 0 <= y && y < ny && 0 <= x && x < nx; }
  KANTOR_HD int64_t cells() const { return int64_t{nz} * ny * nx; }
};

// A convolution with what follows it: y = relu(conv(input) + bias) + residual. Null: no bias, no residual.
struct Convolution {
  Grid grid;
  int tiles_z, tiles_y, tiles_x;
  const uint8_t* needed;  // of each tile whether something that counts depends on it; null: all
  const void* input;      // an activation, or r
  const void* weights;    // in the order of the sum's own (conv_sum_kernels.h)
  const float* bias;
  const void* residual;
  void* output;  // may be `residual`: each cell is read before it is written, by the same thread
  bool relu;
  Finish finish;
  void* other;
  // r, q and the mask are not extended to even sizes
  Grid outside;
  const uint8_t* mask;
  const float* head;  // a weight for each channel, then the bias
  float* q;

  KANTOR_HD int tiles() const { return tiles_z * tiles_y * tiles_x; }
};

// planes x rows x columns cells by `threads` threads. A warp sums `group` channels of a column of `planes` lines of 16
// cells in x: the planes are in its registers, so that it reads its input once for three taps in z.
template <int channels_, int dims, int planes_>
struct ConvTile {
  static constexpr int channels = channels_, planes = planes_;
  static constexpr int middle_taps = dims == 3 ? 3 : 1, taps = 9 * middle_taps;
  static constexpr int rows = dims == 3 ? (channels <= 16 ? 8 : 4) : 1, strips = dims == 3 ? 1 : 4;
  static constexpr int columns = 16 * strips, cells = planes * rows * columns;
  static constexpr int group = channels < 16 ? channels : 16, groups = channels / group;
  static constexpr int threads = 32 * rows * strips * groups;

  // With the neighbours. Planes are a multiple of 8 cells apart, so that the order of chunks below is the same in all.
  static constexpr int halo_planes = planes + 2, halo_rows = rows + middle_taps - 1, halo_columns = columns + 2;
  static constexpr int plane_stride = (halo_rows * halo_columns + 7) / 8 * 8;

  struct Origin {
    int64_t batch;
    int tile, z, y, x;
  };
  static __device__ __forceinline__ Origin origin(const Convolution& a) {
    const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(a.tiles()));
    const int64_t batch = blockIdx.x / static_cast<unsigned>(a.tiles());
    return {batch, tile, tile / (a.tiles_y * a.tiles_x) * planes, tile / a.tiles_x % a.tiles_y * rows,
            tile % a.tiles_x * columns};
  }

  struct Place {
    int row, column, group;  // of a warp in the tile
  };
  static __device__ __forceinline__ Place place() {
    const int warp = static_cast<int>(simt::warp_index());
    return {warp / groups % rows, warp / groups / rows * 16, warp % groups};
  }
  // The number of a cell in the halo, for plane 0 of the tile's own planes plus `dz`, and so on.
  static __device__ __forceinline__ int halo_cell(int dz, int row, int column) {
    return dz * plane_stride + row * halo_columns + column;
  }
};

// Where in shared memory the 16-byte chunk `chunk` of a cell is, counted in chunks, when a cell has `of` of them. The
// plain place is cell * of + chunk, but then lanes that read the same chunk of cells side by side would share memory
// banks. Exchanging chunks inside a cell avoids that for the 8 lanes of a 16-byte access and for the 16 lanes of an
// 8-byte access that covers two adjacent chunks of 4 cells.
template <int of>
__device__ __forceinline__ int chunk_place(int cell, int chunk) {
  const int line = cell * of / 8;  // of 128 bytes, all the banks
  int exchange = 0;                // the bits of `line`, in reverse
  if constexpr (of == 2) exchange = line & 1;
  if constexpr (of == 4) exchange = (line & 1) << 1 | (line >> 1 & 1);
  if constexpr (of == 8) exchange = (line & 1) << 2 | (line & 2) | (line >> 2 & 1);
  return cell * of + (chunk ^ exchange);
}

// The tile's input with its neighbours, zero outside the grid. A cell of `Element`s is `bytes` / 16 chunks.
template <class Tile, class Element>
__device__ __forceinline__ void load_activation(const Convolution& a, const typename Tile::Origin& o, void* shared) {
  constexpr int chunks = Tile::channels * static_cast<int>(sizeof(Element)) / 16;
  constexpr int items = Tile::halo_planes * Tile::halo_rows * Tile::halo_columns * chunks;
  const auto* input = static_cast<const Words<4>*>(a.input);
  auto* to = static_cast<Words<4>*>(shared);
  for (int i = static_cast<int>(threadIdx.x); i < items; i += Tile::threads) {
    const int chunk = i % chunks, column = i / chunks % Tile::halo_columns, line = i / chunks / Tile::halo_columns;
    const int row = line % Tile::halo_rows, plane = line / Tile::halo_rows;
    const int z = o.z + plane - 1, y = o.y + row - Tile::middle_taps / 2, x = o.x + column - 1;
    const bool inside = a.grid.has(z, y, x);
    const int64_t from = inside ? a.grid.cell(o.batch, z, y, x) * chunks + chunk : 0;
    copy_16_async(to + chunk_place<chunks>(Tile::halo_cell(plane, row, column), chunk), input + from, inside);
  }
  wait_for_copies();
}

// The same for r, a number a cell, zero off the mask.
template <class Tile>
__device__ __forceinline__ void load_residual(const Convolution& a, const typename Tile::Origin& o, float* shared) {
  constexpr int items = Tile::halo_planes * Tile::halo_rows * Tile::halo_columns;
  const auto* r = static_cast<const float*>(a.input);
  for (int i = static_cast<int>(threadIdx.x); i < items; i += Tile::threads) {
    const int column = i % Tile::halo_columns, line = i / Tile::halo_columns;
    const int row = line % Tile::halo_rows, plane = line / Tile::halo_rows;
    const int z = o.z + plane - 1, y = o.y + row - Tile::middle_taps / 2, x = o.x + column - 1;
    float value = 0;
    if (a.outside.has(z, y, x) && (!a.mask || a.mask[a.outside.cell(0, z, y, x)] != 0))
      value = r[a.outside.cell(o.batch, z, y, x)];
    shared[Tile::halo_cell(plane, row, column)] = value;
  }
}

}  // namespace kantor
