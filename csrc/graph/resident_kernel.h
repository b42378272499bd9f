// All steps of propagate.h in one launch, for graphs so small that a tile of columns of all nodes fits into shared
// memory.
#pragma once
#include "graph/propagate_kernels.h"

namespace kantor {

template <class T>
inline constexpr int resident_width = 16 / sizeof(T);

template <class T>
struct Resident {
  Recurrence<T> recurrence;
  Dropout<T> dropout;
  int64_t columns;  // of the matrix
  int piece_bits;   // a tile is 2^piece_bits pieces of resident_width columns
  const T* x;
  T* y;
};

// A block's tile, twice: the state of this step and of the next. 8 bytes an entry and step from the second-level cache,
// x and y once. Teleport reads x again in each step; the adjoint adds up in y.
template <class T, bool masked>
__global__ void __launch_bounds__(1024, 1) resident_kernel(Resident<T> s) {
  constexpr int width = resident_width<T>;
  using Piece = Columns<T, width>;
  SIMT_DYNAMIC_SHARED(Piece, states);
  const Recurrence<T>& r = s.recurrence;
  const int pieces = 1 << s.piece_bits, steps = static_cast<int>(r.steps);
  const int items = static_cast<int>(r.pattern.n) << s.piece_bits;
  const int64_t tile_column = static_cast<int64_t>(blockIdx.x) * pieces * width;
  const auto teleport = static_cast<T>(r.teleport);

  const auto column_of = [&](int item) { return tile_column + (item & (pieces - 1)) * width; };
  const auto read = [&](const T* from, int item) {
    Piece piece{};
    const int64_t row = item >> s.piece_bits, column = column_of(item);
    KANTOR_UNROLL for (int v = 0; v < width; ++v) if (column + v < s.columns) piece.at[v] =
        from[row * s.columns + column + v];
    return piece;
  };
  const auto write = [&](T* to, int item, const Piece& piece) {
    const int64_t row = item >> s.piece_bits, column = column_of(item);
    KANTOR_UNROLL for (int v = 0; v < width; ++v) if (column + v < s.columns) to[row * s.columns + column + v] =
        piece.at[v];
  };

  Piece *now = states, *next = states + items;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
    Piece piece = read(s.x, item);
    if constexpr (masked)
      if (!r.adjoint) drop(piece, s.dropout, column_of(item), item >> s.piece_bits, 0);
    now[item] = piece;
  }
  __syncthreads();
  for (int t = 0; t < steps; ++t) {
    const bool last = t + 1 == steps;
    for (int item = static_cast<int>(threadIdx.x); item < items; item += static_cast<int>(blockDim.x)) {
      const int row = item >> s.piece_bits, part = item & (pieces - 1);
      const Piece own = now[item];
      Piece sum{};
      add_scaled(sum, r.diagonal[row], own);
      const int32_t end = r.pattern.rowptr[row + 1];
      int32_t e = r.pattern.rowptr[row];
      for (; e + 4 <= end; e += 4) {
        KANTOR_UNROLL for (int i = 0; i < 4; ++i)
            add_scaled(sum, r.edge[e + i], now[(r.pattern.col[e + i] << s.piece_bits) + part]);
      }
      for (; e < end; ++e) add_scaled(sum, r.edge[e], now[(r.pattern.col[e] << s.piece_bits) + part]);
      if (teleport != 0 && !r.adjoint) add_scaled(sum, teleport, read(s.x, item));
      if constexpr (masked)
        if (r.adjoint || !last) drop(sum, s.dropout, column_of(item), row, r.adjoint ? steps - 1 - t : t + 1);
      if (teleport != 0 && r.adjoint) {  // every item stays with its thread, so y needs no barrier
        Piece total{};
        if (t > 0) total = read(s.y, item);
        add_scaled(total, teleport, own);
        if (last)
          add_scaled(sum, T(1), total);
        else
          write(s.y, item, total);
      }
      if (last)
        write(s.y, item, sum);
      else
        next[item] = sum;
    }
    __syncthreads();
    Piece* const other = now;
    now = next;
    next = other;
  }
}

}  // namespace kantor
