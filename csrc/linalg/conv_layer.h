// One convolution of a network on the CPU, over a whole grid, with what follows it (linalg/winograd.h).
//
// A thread takes a strip of two rows and goes through its planes in z: V of three planes, 0.1 MB for 64 tiles of 16
// channels, stays in the second-level cache, and every input row is read twice, the second time from the third level.
// The rows that come next are fetched while products are formed. Thus an operation costs the same on 32^3, 64^3 and
// 128^3 cells: to keep two convolutions of a residual pair together plane by plane would save reading and writing that
// nobody waits for, and form V of whole planes, four times as large as an activation.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "core/parallel.h"
#include "linalg/winograd.h"

namespace kantor {

// The blocks of a level: (z, strip of two rows, block of tiles in x), which is also the order of a map of needed ones.
struct Level {
  int dims;
  std::array<int64_t, 3> grid;  // nz, ny, nx
  int most_tiles;

  int64_t cells() const { return grid[0] * grid[1] * grid[2]; }
  int64_t strips() const { return (grid[1] + 1) / 2; }
  int64_t tiles() const { return (grid[2] + 1) / 2; }  // of a strip
  int64_t blocks() const { return (tiles() + most_tiles - 1) / most_tiles; }
  Range tiles_of(int64_t block) const { return share(tiles(), static_cast<int>(block), static_cast<int>(blocks())); }
  int64_t map_size() const { return grid[0] * strips() * blocks(); }
};

struct ConvLayer {
  const WinogradKernels* kernels;
  Level level;
  int terms;     // channels that there are, a multiple of 4
  int channels;  // padded
  const void* u;
  const float* bias;      // null: none
  const uint8_t* needed;  // map of the level; null: everything
  const void* zeros;      // a row of activations
  const void* in;
  void* out;  // of Tail::store and Tail::pool; with a residual, the activation to add, which Tail::store replaces
  bool residual = false;
  Tail tail = Tail::store;
  void* other = nullptr;  // Tail::pool: the coarser activation. Tail::upsample: the finer one
  std::array<int64_t, 3> other_grid{};
  // Tail::head
  const float* head = nullptr;  // a weight for each channel, and the bias
  float* q = nullptr;
  const uint8_t* mask = nullptr;
  std::array<int64_t, 3> q_grid{};
};

// Bytes of scratch memory that each thread needs for layers of this level.
size_t conv_scratch_bytes(const WinogradKernels& kernels, const Level& level, int channels);

// Runs the layer on the team; worker w uses scratch + w * scratch_stride. The bits do not depend on the threads.
void convolve(Team& team, const ConvLayer& layer, char* scratch, size_t scratch_stride);

}  // namespace kantor
