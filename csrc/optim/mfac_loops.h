// The inner loops over the rows of a window for one instruction set. The file that includes this defines KANTOR_TARGET,
// the target attribute of every function, and a struct with the vector operations:
//   Vector, lanes; rows: taken at once; load(const S*): widened to double, for all types; store, broadcast, add,
//   multiply(a, b), multiply_add(a, b, c)
// Traffic bounds these loops, so that a value costs one conversion and one multiply-add, and no more.
#pragma once
#include <cstdint>
#include <type_traits>

#include "optim/mfac_rows.h"

#define KANTOR_INLINE inline __attribute__((always_inline)) KANTOR_TARGET

namespace kantor {
namespace {

// Sums over columns have eight lanes, however many a register has. Columns that do not fill eight are summed apart.
constexpr int sum_lanes = 8;

// Rows are far apart, on other pages, which the processor does not foresee.
constexpr int64_t prefetch_bytes = 1024;

// Rows first..first + count - 1 from some column on. The last row of the window stands in for those behind it.
template <class S, int count>
struct Rows {
  const S* row[count];
  int64_t ahead;  // to the rows that are next

  KANTOR_INLINE Rows(const Window& w, const S* G, int64_t first, int64_t column)
      : ahead(first + 2 * count <= w.rows ? count * w.stride : 0) {
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) row[j] = G + (first + j < w.rows ? first + j : w.rows - 1) * w.stride + column;
  }
  // What comes `prefetch_bytes` after column i of n, on the rows that are next where these end. Once a line.
  KANTOR_INLINE void prefetch(int64_t i, int64_t n) const {
    if (i % (64 / int64_t(sizeof(S))) != 0) return;
    const int64_t later = i + prefetch_bytes / int64_t(sizeof(S)), offset = later < n ? later : ahead + later - n;
#pragma GCC unroll 8
    for (int j = 0; j < count; ++j) __builtin_prefetch(row[j] + offset);
  }
};

// a b + c. The product of two numbers of at most 24 bits is exact in double, so that it does not matter whether it is
// rounded: a fused operation gives the bits of two.
template <class S, class Isa>
KANTOR_INLINE typename Isa::Vector accumulate(typename Isa::Vector a, typename Isa::Vector b, typename Isa::Vector c) {
  if constexpr (std::is_same_v<S, double>) return Isa::add(c, Isa::multiply(a, b));
  return Isa::multiply_add(a, b, c);
}

template <class S, class Isa>
KANTOR_INLINE void dot_rows(int64_t n, const Rows<S, Isa::rows>& rows, const double* x, double* dots) {
  constexpr int vectors = sum_lanes / Isa::lanes;
  typename Isa::Vector sums[Isa::rows][vectors];
#pragma GCC unroll 8
  for (int j = 0; j < Isa::rows; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[j][v] = Isa::broadcast(0);
  int64_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    rows.prefetch(i, n);
    typename Isa::Vector part[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) part[v] = Isa::load(x + i + v * Isa::lanes);
#pragma GCC unroll 8
    for (int j = 0; j < Isa::rows; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        sums[j][v] = accumulate<S, Isa>(Isa::load(rows.row[j] + i + v * Isa::lanes), part[v], sums[j][v]);
  }
  for (int j = 0; j < Isa::rows; ++j) {
    alignas(64) double s[sum_lanes];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) Isa::store(s + v * Isa::lanes, sums[j][v]);
    double tail = 0;
    for (int64_t t = i; t < n; ++t) tail += widen(rows.row[j][t]) * x[t];
    dots[j] = (((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))) + tail;
  }
}

template <class Isa, class S>
KANTOR_TARGET void dot_pieces(const Stretch& stretch, const S* G, Range rows, const double* x, double* results) {
  const Window& w = stretch.window;
  for (int64_t i = rows.begin; i < rows.end; i += Isa::rows)
    for (int64_t q = stretch.pieces.begin; q < stretch.pieces.end; ++q) {
      const Piece piece = stretch.all.piece(q);
      double dots[Isa::rows];
      dot_rows<S, Isa>(piece.end - piece.begin, Rows<S, Isa::rows>(w, G, i, piece.begin),
                       x + (piece.begin - stretch.begin), dots);
      for (int64_t j = 0; j < Isa::rows && i + j < rows.end; ++j) results[q * w.rows + i + j] = dots[j];
    }
}

// Not fused: c takes all bits of a double. The sums of a column go through the rows one by one, so that it does not
// matter how many are taken at once.
template <class S, class Isa>
KANTOR_INLINE void add_rows(int64_t n, const Rows<S, Isa::rows>& rows, const double* c, double* sums) {
  typename Isa::Vector factors[Isa::rows];
#pragma GCC unroll 8
  for (int j = 0; j < Isa::rows; ++j) factors[j] = Isa::broadcast(c[j]);
  int64_t i = 0;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    rows.prefetch(i, n);
#pragma GCC unroll 8
    for (int64_t l = i; l < i + sum_lanes; l += Isa::lanes) {
      typename Isa::Vector sum = Isa::load(sums + l);
#pragma GCC unroll 8
      for (int j = 0; j < Isa::rows; ++j) sum = Isa::add(sum, Isa::multiply(Isa::load(rows.row[j] + l), factors[j]));
      Isa::store(sums + l, sum);
    }
  }
  for (; i < n; ++i)
    for (int j = 0; j < Isa::rows; ++j) sums[i] += widen(rows.row[j][i]) * c[j];
}

template <class Isa, class S>
KANTOR_TARGET void add_pieces(const Stretch& stretch, const S* G, const double* c, double* sums) {
  const Window& w = stretch.window;
  for (int64_t i = 0; i < w.rows; i += Isa::rows)
    for (int64_t q = stretch.pieces.begin; q < stretch.pieces.end; ++q) {
      const Piece piece = stretch.all.piece(q);
      double factors[Isa::rows];
      for (int64_t j = 0; j < Isa::rows; ++j) factors[j] = i + j < w.rows ? c[piece.block * w.rows + i + j] : 0.0;
      add_rows<S, Isa>(piece.end - piece.begin, Rows<S, Isa::rows>(w, G, i, piece.begin), factors,
                       sums + (piece.begin - stretch.begin));
    }
}

// As many rows and bands of a tile as registers hold the sums of.
template <class S, class Isa, int rows, int bands>
KANTOR_INLINE void add_tile(int64_t n, const double* a, const double* b, double* out, int64_t stride) {
  constexpr int vectors = bands * band_rows / Isa::lanes;
  typename Isa::Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[i][v] = Isa::broadcast(0);
  for (int64_t k = 0; k < n; ++k) {
    typename Isa::Vector part[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const int column = v * Isa::lanes;
      part[v] = Isa::load(b + (column / band_rows * n + k) * band_rows + column % band_rows);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const typename Isa::Vector factor = Isa::broadcast(a[k * band_rows + i]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[i][v] = accumulate<S, Isa>(factor, part[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      double* target = out + i * stride + v * Isa::lanes;
      Isa::store(target, Isa::add(Isa::load(target), sums[i][v]));
    }
}

template <class Isa, class S>
KANTOR_TARGET void tile_of_bands(int64_t n, const double* a, const double* b, double* out, int64_t stride) {
  constexpr int bands = Isa::lanes == band_rows ? tile_bands : 1;
  for (int q = 0; q < tile_bands; q += bands)
    for (int i = 0; i < band_rows; i += Isa::rows)
      add_tile<S, Isa, Isa::rows, bands>(n, a + i, b + q * n * band_rows, out + i * stride + q * band_rows, stride);
}

template <class Isa, class S>
RowLoops<S> row_loops() {
  return {&dot_pieces<Isa, S>, &add_pieces<Isa, S>, &tile_of_bands<Isa, S>};
}

}  // namespace
}  // namespace kantor

// Defines row_loops_<isa> for all storage types.
#define KANTOR_ROW_LOOPS(name, Isa)             \
  template <class S>                            \
  RowLoops<S> name() {                          \
    return row_loops<Isa, S>();                 \
  }                                             \
  template RowLoops<float> name<float>();       \
  template RowLoops<double> name<double>();     \
  template RowLoops<Bfloat16> name<Bfloat16>(); \
  template RowLoops<Half> name<Half>();         \
  template RowLoops<int8_t> name<int8_t>();
