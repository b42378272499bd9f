// The CPU's leaf loops of the diffusion recurrence (propagate.h): one step for some rows and one tile of columns. The
// width of a tile is fixed at compile time, so that a row's sums live in registers while its entries are walked.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdint>

#include "core/parallel.h"
#include "core/philox.h"
#include "graph/propagate.h"

namespace kantor {

// Rows of a tile in memory: either packed, or columns of a larger matrix.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;
  T* row(int64_t i) const { return data + i * stride; }
};

// Tiles have 1, 2, 4, ... columns, at most 256 bytes: four AVX-512 registers.
template <class T>
inline constexpr int64_t max_width = 256 / sizeof(T);

template <class T>
int64_t width_for(int64_t columns) {
  return std::min(max_width<T>, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(columns))));
}

// Source rows that come from memory, and not from cache, are asked for before they are needed. In an order that the
// processor cannot guess that is worth a factor of two to three.
struct Fetch {
  enum Mode : uint8_t { none, near, far } mode = none;
  int64_t ahead = 0;    // near: rows are reached in about their order, the farthest so many rows ahead
  bool stream = false;  // targets are far larger than any cache: written past it, without being read first
};

// What suits rows of `bytes` in the order of this pattern, by a sample of its rows.
Fetch fetch_for(const Pattern& pattern, int64_t bytes);

// target = D source + E source, and what belongs to the recurrence around it. In a tile of `width` columns only the
// first `columns` exist in the arrays x and y; packed tiles hold zeros behind them.
template <class T>
struct Step {
  Pattern pattern;
  const T* edge;
  const T* diagonal;  // null: none
  int64_t width, columns;
  Rows<const T> source;  // `width` columns are read
  Rows<T> target;        // `stored` columns are written
  int64_t stored = 0;
  Fetch fetch{};

  // Forward, before the mask: + teleport * start. Adjoint, after the mask: sum += teleport * value, or at the last step
  // value += sum. Null: neither.
  T teleport = 0;
  Rows<const T> start{};
  Rows<T> sum{};
  bool last = false;
  // The mask of step `mask_step` for columns from `first_column` on.
  Dropout<T> dropout{};
  int64_t mask_step = 0, first_column = 0;
};

template <class T>
void step_rows(const Step<T>& step, Range rows);

// A packed tile from columns first..first+columns-1 of x, times the mask of step `mask_step`, zeros behind them.
template <class T>
void pack_rows(Rows<const T> x, int64_t columns, int64_t width, const Dropout<T>& dropout, int64_t mask_step,
               int64_t first_column, Rows<T> tile, Range rows);

// The mask itself: `columns` columns from first_column on.
template <class T>
void mask_rows(const Dropout<T>& dropout, int64_t mask_step, int64_t first_column, int64_t width, Rows<T> mask,
               int64_t columns, Range rows);

// out_e (+)= <a_i, b_j> over `length` columns, for the entries of these rows; and diagonal_i += <a_i, b_i> unless null.
template <class T>
void dot_rows(const Pattern& pattern, int64_t length, Rows<const T> a, Rows<const T> b, Range rows, bool accumulate,
              T* out, T* diagonal);

// The rows of one worker, of about equal work in each.
Range rows_of(const Pattern& pattern, int worker, int workers);

}  // namespace kantor
