// A 3^d convolution on CUDA, part 2: the sums over taps and channels, in four ways. Each has
//   Element     of input and output activations
//   Accumulator what a thread holds of its warp's 16 columns, `planes` planes and `group` channels
//   load()      brings the input into shared memory; halo_bytes is what that takes
//   sum()       adds up, then stage() writes the sums to shared memory as float32 activations of the tile
//   Weight, weight_of(), weight()   the type of the weights, which of them is number i in the order in which sum()
//               reads them, and a float as such
// Every sum runs over (middle tap, tap in x, channels of a step, tap in z) in this order, whatever the tile.
#pragma once
#include <cstdint>

#include "linalg/conv_tile_kernels.h"

namespace kantor {

// An index into weights of shape (out, in, taps).
struct WeightIndex {
  int out, in, tap;
};

// --- tensor cores: a line of 16 cells times 8 output channels is one product ---

template <class Tile, TensorCore kind>
struct TensorCoreSum {
  static constexpr bool bf16 = kind != TensorCore::tf32_k8;
  using Element = std::conditional_t<bf16, uint16_t, float>;
  static constexpr int words = fragment_words(kind), elements = words * 4 / int{sizeof(Element)};  // of a lane
  static constexpr int depth = 4 * elements, steps = Tile::channels / depth, slices = Tile::group / 8;
  static constexpr int cell_bytes = Tile::channels * int{sizeof(Element)}, chunks = cell_bytes / 16;
  static constexpr int halo_bytes = Tile::halo_planes * Tile::plane_stride * cell_bytes;
  static constexpr int weights = Tile::taps * Tile::channels * Tile::channels;

  struct Accumulator {
    float at[Tile::planes][slices][4];
  };

  static __device__ __forceinline__ void load(const Convolution& a, const typename Tile::Origin& o, void* shared) {
    load_activation<Tile, Element>(a, o, shared);
  }

  using Weight = std::conditional_t<bf16, uint16_t, uint32_t>;
  static __device__ __forceinline__ Weight weight(float value) {
    if constexpr (bf16) return to_bf16(value);
    return static_cast<Weight>(to_tf32(static_cast<uint32_t>(__float_as_int(value))));
  }
  // A step's weights lie as its lanes hold them: (tap, group, step, lane, slice, element).
  static __device__ __forceinline__ WeightIndex weight_of(int i) {
    const int element = i % elements, slice = i / elements % slices, lane = i / (elements * slices) % 32;
    const int rest = i / (elements * slices * 32), step = rest % steps, group = rest / steps % Tile::groups;
    return {group * Tile::group + slice * 8 + lane / 4, step * depth + lane % 4 * elements + element,
            rest / steps / Tile::groups};
  }

  static __device__ __forceinline__ void sum(const Convolution& a, const void* shared, Accumulator& c) {
    using Slices = Words<words * slices>;
    const typename Tile::Place at = Tile::place();
    const int lane = static_cast<int>(simt::lane_index()), g = lane / 4, t = lane % 4;
    const auto* w = static_cast<const Slices*>(a.weights) + at.group * steps * 32 + lane;
    for (auto& plane : c.at)
      for (auto& slice : plane)
        for (float& value : slice) value = 0;
    KANTOR_KEEP_LOOP
    for (int side = 0; side < Tile::middle_taps * 3; ++side) {  // (middle tap, tap in x)
      const int cell = Tile::halo_cell(0, at.row + side / 3, at.column + side % 3 + g);
      KANTOR_UNROLL
      for (int step = 0; step < steps; ++step) {
        Slices b[3];
        KANTOR_UNROLL
        for (int dz = 0; dz < 3; ++dz)
          b[dz] = w[((dz * Tile::middle_taps * 3 + side) * Tile::groups * steps + step) * 32];
        // Cell + 8, the other row of a fragment, and the other planes have the same order of chunks.
        const int byte = (step * depth + t * elements) * int{sizeof(Element)};
        const auto* line =
            static_cast<const unsigned char*>(shared) + chunk_place<chunks>(cell, byte / 16) * 16 + byte % 16;
        KANTOR_UNROLL
        for (int plane = 0; plane < Tile::halo_planes; ++plane) {
          Fragment<kind> fragment[2];
          KANTOR_UNROLL
          for (int half = 0; half < 2; ++half) {
            fragment[half] =
                *reinterpret_cast<const Fragment<kind>*>(line + (plane * Tile::plane_stride + half * 8) * cell_bytes);
            if constexpr (!bf16)
              for (uint32_t& word : fragment[half].at) word = to_tf32(word);
          }
          KANTOR_UNROLL
          for (int dz = 0; dz < 3; ++dz) {
            const int out = plane - dz;
            if (out < 0 || out >= Tile::planes) continue;
            KANTOR_UNROLL
            for (int slice = 0; slice < slices; ++slice) {
              Fragment<kind> weight;
              KANTOR_UNROLL
              for (int word = 0; word < words; ++word) weight.at[word] = b[dz].at[slice * words + word];
              multiply_add<kind>(c.at[out][slice], fragment, weight);
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void stage(const Accumulator& c, float* shared) {
    const typename Tile::Place at = Tile::place();
    const int lane = static_cast<int>(simt::lane_index()), g = lane / 4, t = lane % 4;
    KANTOR_UNROLL
    for (int plane = 0; plane < Tile::planes; ++plane) {
      KANTOR_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int cell = (plane * Tile::rows + at.row) * Tile::columns + at.column + half * 8 + g;
        KANTOR_UNROLL
        for (int slice = 0; slice < slices; ++slice) {
          const int channel = at.group * Tile::group + slice * 8 + 2 * t;
          float* to = shared + chunk_place<Tile::channels / 4>(cell, channel / 4) * 4 + channel % 4;
          *reinterpret_cast<float2*>(to) = make_float2(c.at[plane][slice][2 * half], c.at[plane][slice][2 * half + 1]);
        }
      }
    }
  }
};

// --- float32 arithmetic: lane l has cell l % 16 of the line and half of the group's channels ---

template <class Tile>
struct PlainAccumulator {
  static constexpr int channels = Tile::group / 2;
  float at[Tile::planes][channels];

  __device__ __forceinline__ void clear() {
    for (auto& plane : at)
      for (float& value : plane) value = 0;
  }
  static __device__ __forceinline__ int first_channel(const typename Tile::Place& place) {
    return place.group * Tile::group + static_cast<int>(simt::lane_index()) / 16 * channels;
  }
  // The channels' weights, `channels` adjacent floats.
  static __device__ __forceinline__ void read(const float* from, float (&w)[channels]) {
    KANTOR_UNROLL
    for (int i = 0; i < channels; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      w[i] = four.x, w[i + 1] = four.y, w[i + 2] = four.z, w[i + 3] = four.w;
    }
  }
  __device__ __forceinline__ void stage(float* shared) const {
    const typename Tile::Place place = Tile::place();
    const int lane = static_cast<int>(simt::lane_index()), first = first_channel(place);
    KANTOR_UNROLL
    for (int plane = 0; plane < Tile::planes; ++plane) {
      const int cell = (plane * Tile::rows + place.row) * Tile::columns + place.column + lane % 16;
      KANTOR_UNROLL
      for (int i = 0; i < channels; i += 4) {
        float* to = shared + chunk_place<Tile::channels / 4>(cell, (first + i) / 4) * 4;
        *reinterpret_cast<float4*>(to) =
            make_float4(at[plane][i], at[plane][i + 1], at[plane][i + 2], at[plane][i + 3]);
      }
    }
  }
};

template <class Tile>
struct FloatSum {
  using Element = float;
  using Accumulator = PlainAccumulator<Tile>;
  static constexpr int chunks = Tile::channels / 4;
  static constexpr int halo_bytes = Tile::halo_planes * Tile::plane_stride * Tile::channels * 4;
  static constexpr int weights = Tile::taps * Tile::channels * Tile::channels;

  static __device__ __forceinline__ void load(const Convolution& a, const typename Tile::Origin& o, void* shared) {
    load_activation<Tile, float>(a, o, shared);
  }

  using Weight = float;
  static __device__ __forceinline__ Weight weight(float value) { return value; }
  static __device__ __forceinline__ WeightIndex weight_of(int i) {  // (tap, in, out)
    return {i % Tile::channels, i / Tile::channels % Tile::channels, i / (Tile::channels * Tile::channels)};
  }

  static __device__ __forceinline__ void sum(const Convolution& a, const void* shared, Accumulator& c) {
    const typename Tile::Place at = Tile::place();
    const auto* weights = static_cast<const float*>(a.weights) + Accumulator::first_channel(at);
    const auto* input = static_cast<const float4*>(shared);
    c.clear();
    KANTOR_KEEP_LOOP
    for (int side = 0; side < Tile::middle_taps * 3; ++side) {
      const int column = at.column + side % 3 + static_cast<int>(simt::lane_index()) % 16;
      const int cell = Tile::halo_cell(0, at.row + side / 3, column);
      KANTOR_KEEP_LOOP
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const float4* line = input + chunk_place<chunks>(cell, chunk);
        KANTOR_KEEP_LOOP
        for (int dz = 0; dz < 3; ++dz) {
          const float* from =
              weights + ((dz * Tile::middle_taps * 3 + side) * Tile::channels + 4 * chunk) * Tile::channels;
          float w[4][Accumulator::channels];
          KANTOR_UNROLL
          for (int in = 0; in < 4; ++in) Accumulator::read(from + in * Tile::channels, w[in]);
          KANTOR_UNROLL
          for (int plane = 0; plane < Tile::planes; ++plane) {
            const float4 x = line[(plane + dz) * Tile::plane_stride * chunks];
            KANTOR_UNROLL
            for (int i = 0; i < Accumulator::channels; ++i) {
              float value = c.at[plane][i];
              value += x.x * w[0][i];
              value += x.y * w[1][i];
              value += x.z * w[2][i];
              value += x.w * w[3][i];
              c.at[plane][i] = value;
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void stage(const Accumulator& c, float* shared) { c.stage(shared); }
};

// --- the first convolution, 1 -> channels ---

template <class Tile, class Element_>
struct FirstSum {
  using Element = Element_;
  using Accumulator = PlainAccumulator<Tile>;
  static constexpr int halo_bytes = Tile::halo_planes * Tile::plane_stride * 4;
  static constexpr int weights = Tile::taps * Tile::channels;

  static __device__ __forceinline__ void load(const Convolution& a, const typename Tile::Origin& o, void* shared) {
    load_residual<Tile>(a, o, static_cast<float*>(shared));
  }

  using Weight = float;
  static __device__ __forceinline__ Weight weight(float value) { return value; }
  static __device__ __forceinline__ WeightIndex weight_of(int i) { return {i % Tile::channels, 0, i / Tile::channels}; }

  static __device__ __forceinline__ void sum(const Convolution& a, const void* shared, Accumulator& c) {
    const typename Tile::Place at = Tile::place();
    const auto* weights = static_cast<const float*>(a.weights) + Accumulator::first_channel(at);
    c.clear();
    KANTOR_KEEP_LOOP
    for (int side = 0; side < Tile::middle_taps * 3; ++side) {
      const int column = at.column + side % 3 + static_cast<int>(simt::lane_index()) % 16;
      const float* line = static_cast<const float*>(shared) + Tile::halo_cell(0, at.row + side / 3, column);
      KANTOR_UNROLL
      for (int dz = 0; dz < 3; ++dz) {
        float w[Accumulator::channels];
        Accumulator::read(weights + (dz * Tile::middle_taps * 3 + side) * Tile::channels, w);
        KANTOR_UNROLL
        for (int plane = 0; plane < Tile::planes; ++plane) {
          const float x = line[(plane + dz) * Tile::plane_stride];
          KANTOR_UNROLL
          for (int i = 0; i < Accumulator::channels; ++i) c.at[plane][i] += x * w[i];
        }
      }
    }
  }

  static __device__ __forceinline__ void stage(const Accumulator& c, float* shared) { c.stage(shared); }
};

}  // namespace kantor
