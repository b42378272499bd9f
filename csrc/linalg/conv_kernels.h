// A 3^d convolution on CUDA, part 3: what becomes of the sums, and the kernel. See conv_tile_kernels.h for the layout.
#pragma once
#include <algorithm>
#include <cstdint>

#include "linalg/conv_sum_kernels.h"

namespace kantor {

// Eight channels of a cell, the unit of the work after the sums. `number` says which eight.
struct Eight {
  float at[8];
};

template <class Element>
__device__ __forceinline__ Eight read_eight(const Element* from) {
  Eight y;
  if constexpr (sizeof(Element) == 2) {
    const auto words = *reinterpret_cast<const Words<4>*>(from);
    KANTOR_UNROLL
    for (int i = 0; i < 4; ++i)
      y.at[2 * i] = from_bf16(words.at[i] & 0xffffu), y.at[2 * i + 1] = from_bf16(words.at[i] >> 16);
  } else {
    KANTOR_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      y.at[i] = four.x, y.at[i + 1] = four.y, y.at[i + 2] = four.z, y.at[i + 3] = four.w;
    }
  }
  return y;
}

template <class Element>
__device__ __forceinline__ void write_eight(const Eight& y, Element* to) {
  if constexpr (sizeof(Element) == 2) {
    Words<4> words;
    KANTOR_UNROLL
    for (int i = 0; i < 4; ++i) words.at[i] = to_bf16(y.at[2 * i]) | uint32_t{to_bf16(y.at[2 * i + 1])} << 16;
    *reinterpret_cast<Words<4>*>(to) = words;
  } else {
    KANTOR_UNROLL
    for (int i = 0; i < 8; i += 4)
      *reinterpret_cast<float4*>(to + i) = make_float4(y.at[i], y.at[i + 1], y.at[i + 2], y.at[i + 3]);
  }
}

__device__ __forceinline__ void add(Eight& to, const Eight& y) {
  KANTOR_UNROLL
  for (int i = 0; i < 8; ++i) to.at[i] += y.at[i];
}

// y = relu(sums + bias) + residual of cell (z, y, x) of the tile.
template <class Tile, class Element>
__device__ __forceinline__ Eight finished(const Convolution& a, const float* sums, int z, int y, int x, int64_t cell,
                                          int number) {
  const int local = (z * Tile::rows + y) * Tile::columns + x;
  Eight out;
  KANTOR_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float4 four =
        *reinterpret_cast<const float4*>(sums + chunk_place<Tile::channels / 4>(local, 2 * number + i) * 4);
    out.at[4 * i] = four.x, out.at[4 * i + 1] = four.y, out.at[4 * i + 2] = four.z, out.at[4 * i + 3] = four.w;
  }
  if (a.bias) add(out, read_eight(a.bias + 8 * number));
  if (a.relu) {
    KANTOR_UNROLL
    for (int i = 0; i < 8; ++i) out.at[i] = out.at[i] < 0 ? 0 : out.at[i];  // NaN stays
  }
  if (a.residual) add(out, read_eight(static_cast<const Element*>(a.residual) + cell * Tile::channels + 8 * number));
  return out;
}

// f(z, y, x, number) for all eights of the tile's cells, or of its blocks of 2^d cells; neighbouring threads get
// neighbouring addresses.
template <class Tile, int step, class F>
__device__ __forceinline__ void for_each_eight(F&& f) {
  constexpr int numbers = Tile::channels / 8, columns = Tile::columns / step;
  constexpr int rows = Tile::middle_taps == 3 ? Tile::rows / step : Tile::rows, planes = Tile::planes / step;
  for (int i = static_cast<int>(threadIdx.x); i < planes * rows * columns * numbers; i += Tile::threads) {
    const int cell = i / numbers;
    f(cell / columns / rows, cell / columns % rows, cell % columns, i % numbers);
  }
}

// f(z, y, x) for the cells of block (z, y, x) of the grid of half the size.
template <class Tile, class F>
__device__ __forceinline__ void for_each_child(int z, int y, int x, F&& f) {
  constexpr int in_y = Tile::middle_taps == 3 ? 2 : 1;
  KANTOR_UNROLL
  for (int i = 0; i < 4 * in_y; ++i) f(2 * z + i / (2 * in_y), in_y * y + i / 2 % in_y, 2 * x + i % 2);
}

template <class Tile, class Element>
__device__ __forceinline__ void finish_tile(const Convolution& a, const typename Tile::Origin& o, const float* sums) {
  constexpr int channels = Tile::channels, in_y = Tile::middle_taps == 3 ? 2 : 1;
  auto* output = static_cast<Element*>(a.output);
  auto* other = static_cast<Element*>(a.other);
  if (a.finish == Finish::pool) {
    const Grid coarse{a.grid.nz / 2, a.grid.ny / in_y, a.grid.nx / 2};
    for_each_eight<Tile, 2>([&](int z, int y, int x, int number) {
      const int above_z = o.z / 2 + z, above_y = o.y / in_y + y, above_x = o.x / 2 + x;
      if (!coarse.has(above_z, above_y, above_x)) return;
      Eight mean{};
      for_each_child<Tile>(z, y, x, [&](int child_z, int child_y, int child_x) {
        const int64_t cell = a.grid.cell(o.batch, o.z + child_z, o.y + child_y, o.x + child_x);
        const Eight value = finished<Tile, Element>(a, sums, child_z, child_y, child_x, cell, number);
        write_eight(value, output + cell * channels + 8 * number);
        add(mean, value);
      });
      KANTOR_UNROLL
      for (float& value : mean.at) value *= 1.0f / (4 * in_y);
      write_eight(mean, other + coarse.cell(o.batch, above_z, above_y, above_x) * channels + 8 * number);
    });
    return;
  }
  const Grid fine{a.grid.nz * 2, a.grid.ny * in_y, a.grid.nx * 2};
  for_each_eight<Tile, 1>([&](int z, int y, int x, int number) {
    if (!a.grid.has(o.z + z, o.y + y, o.x + x)) return;
    const int64_t cell = a.grid.cell(o.batch, o.z + z, o.y + y, o.x + x);
    const Eight value = finished<Tile, Element>(a, sums, z, y, x, cell, number);
    if (a.finish == Finish::store) {
      write_eight(value, output + cell * channels + 8 * number);
      return;
    }
    for_each_child<Tile>(o.z + z, o.y + y, o.x + x, [&](int child_z, int child_y, int child_x) {
      Element* to = other + fine.cell(o.batch, child_z, child_y, child_x) * channels + 8 * number;
      Eight sum = read_eight(to);
      add(sum, value);
      write_eight(sum, to);
    });
  });
}

// q of the tile's cells; zero where the tile is not `needed`, which is off the mask.
template <class Tile, class Element>
__device__ __forceinline__ void finish_head(const Convolution& a, const typename Tile::Origin& o, const float* sums,
                                            bool needed) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::cells; i += Tile::threads) {
    const int x = i % Tile::columns, line = i / Tile::columns, y = line % Tile::rows, z = line / Tile::rows;
    if (!a.outside.has(o.z + z, o.y + y, o.x + x)) continue;
    float q = 0;
    if (needed && (!a.mask || a.mask[a.outside.cell(0, o.z + z, o.y + y, o.x + x)] != 0)) {
      const int64_t cell = a.grid.cell(o.batch, o.z + z, o.y + y, o.x + x);
      KANTOR_UNROLL
      for (int number = 0; number < Tile::channels / 8; ++number) {
        const Eight value = finished<Tile, Element>(a, sums, z, y, x, cell, number);
        const Eight head = read_eight(a.head + 8 * number);
        KANTOR_UNROLL
        for (int c = 0; c < 8; ++c) q += head.at[c] * value.at[c];
      }
      q += a.head[Tile::channels];
    }
    a.q[a.outside.cell(o.batch, o.z + z, o.y + y, o.x + x)] = q;
  }
}

// One block for each tile of each grid of the batch. Global memory beside the caches: reads the input once, and the
// residual; writes the output. Weights stay in the first-level cache from block to block.
template <class Sum, class Tile>
__global__ void __launch_bounds__(Tile::threads, 512 / Tile::threads) conv_kernel(Convolution a) {
  SIMT_DYNAMIC_SHARED(unsigned char, shared);
  auto* sums = reinterpret_cast<float*>(shared);
  const typename Tile::Origin o = Tile::origin(a);
  const bool needed = !a.needed || a.needed[o.tile] != 0;
  if (needed) {
    Sum::load(a, o, shared);
    __syncthreads();
    typename Sum::Accumulator accumulator;
    Sum::sum(a, shared, accumulator);
    __syncthreads();  // the input's place is taken by
    Sum::stage(accumulator, sums);
    __syncthreads();
  }
  if (a.finish == Finish::head) {
    finish_head<Tile, typename Sum::Element>(a, o, sums, needed);
  } else if (needed) {
    finish_tile<Tile, typename Sum::Element>(a, o, sums);
  }
}

template <class Sum, class Tile>
void launch_convolution(simt::Stream stream, int64_t batch, const Convolution& a) {
  constexpr int shared_bytes = std::max(Sum::halo_bytes, Tile::cells * Tile::channels * 4);
  SIMT_LAUNCH((conv_kernel<Sum, Tile>), static_cast<unsigned>(batch * a.tiles()), Tile::threads, shared_bytes, stream,
              a);
}

}  // namespace kantor
