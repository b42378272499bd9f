// The direction network on CUDA: the kernels that prepare weights and mask (direction_net_cuda.cu).
#pragma once
#include <cstdint>

#include "linalg/conv_sum_kernels.h"

namespace kantor {

// Weights of shape (out, in, taps) in the order of the sum, zero for channels that are only padding.
template <class Sum>
__global__ void order_weights_kernel(const float* from, int out, int in, int taps, typename Sum::Weight* to) {
  simt::grid_stride(Sum::weights, [&](int64_t i) {
    const WeightIndex index = Sum::weight_of(static_cast<int>(i));
    const bool padding = index.out >= out || index.in >= in;
    to[i] = Sum::weight(padding ? 0.0f : from[(int64_t{index.out} * in + index.in) * taps + index.tap]);
  });
}

// to[0..padded-1] = the `count` values of `from`, then zeros; zeros where `from` is null.
static __global__ void pad_kernel(const float* from, int count, int padded, float* to) {
  simt::grid_stride(padded, [&](int64_t i) { to[i] = from && i < count ? from[i] : 0.0f; });
}

// The mask in blocks of 4^d cells: whether any of them is fluid.
inline constexpr int block_edge = 4;

KANTOR_HD Grid blocks_of(const Grid& grid) {
  const auto blocks = [](int n) { return (n + block_edge - 1) / block_edge; };
  return {blocks(grid.nz), blocks(grid.ny), blocks(grid.nx)};
}

static __global__ void occupied_blocks_kernel(Grid grid, const uint8_t* mask, uint8_t* occupied) {
  const Grid blocks = blocks_of(grid);
  simt::grid_stride(blocks.cells(), [&](int64_t i) {
    const int x = static_cast<int>(i % blocks.nx), y = static_cast<int>(i / blocks.nx % blocks.ny);
    const int z = static_cast<int>(i / blocks.nx / blocks.ny);
    bool any = false;
    for (int k = 0; k < block_edge * block_edge * block_edge; ++k) {
      const int cell_z = z * block_edge + k / 16, cell_y = y * block_edge + k / 4 % 4, cell_x = x * block_edge + k % 4;
      any = any || (grid.has(cell_z, cell_y, cell_x) && mask[grid.cell(0, cell_z, cell_y, cell_x)] != 0);
    }
    occupied[i] = any;
  });
}

// Tiles, counted as in Convolution and of `tile` cells of the fine level, from which a fluid cell is at most `radius`
// away in each axis. Counting occupied blocks instead of fluid cells adds a few tiles.
static __global__ void needed_tiles_kernel(Grid blocks, const uint8_t* occupied, Grid tiles, Grid tile, int radius,
                                           uint8_t* needed) {
  simt::grid_stride(tiles.cells(), [&](int64_t i) {
    const auto first = [&](int64_t at, int size) {
      const int64_t cell = at * size - radius;
      return static_cast<int>(cell < 0 ? 0 : cell / block_edge);
    };
    const auto last = [&](int64_t at, int size, int count) {
      const int64_t block = (at * size + size - 1 + radius) / block_edge;
      return static_cast<int>(block < count ? block : count - 1);
    };
    const int64_t tile_x = i % tiles.nx, tile_y = i / tiles.nx % tiles.ny, tile_z = i / tiles.nx / tiles.ny;
    const int last_x = last(tile_x, tile.nx, blocks.nx), last_y = last(tile_y, tile.ny, blocks.ny);
    bool any = false;
    for (int z = first(tile_z, tile.nz); !any && z <= last(tile_z, tile.nz, blocks.nz); ++z)
      for (int y = first(tile_y, tile.ny); !any && y <= last_y; ++y)
        for (int x = first(tile_x, tile.nx); !any && x <= last_x; ++x) any = occupied[blocks.cell(0, z, y, x)] != 0;
    needed[i] = any;
  });
}

}  // namespace kantor
