// The inner loops over the rows of a window, compiled once per instruction set. All of them give the same bits.
#pragma once
#include "core/parallel.h"
#include "optim/mfac.h"

namespace kantor {

// Some columns of the window: pieces pieces.begin..end-1 of those of `all`, which begin at column `begin`.
struct Stretch {
  Window window;
  Pieces all;
  Range pieces;
  int64_t begin;
};

// Rows are interleaved in bands of 8: element (i, k) of a band is at 8 k + i. A tile is a band times up to
// `tile_bands`.
inline constexpr int band_rows = 8, tile_bands = 3;

template <class S>
struct RowLoops {
  // results[piece][i] = the product of row i, for i in `rows`, with x on the piece. x begins at stretch.begin.
  void (*dot)(const Stretch& stretch, const S* G, Range rows, const double* x, double* results);
  // sums += sum_i c[block][i] row_i, in the order of the rows. sums begin at stretch.begin.
  void (*add)(const Stretch& stretch, const S* G, const double* c, double* sums);
  // out[i][8 q + j] += the product over n columns of row i of band `a` and row j of band b + q, for tile_bands of them.
  void (*tile)(int64_t n, const double* a, const double* b, double* out, int64_t stride);
};

// By instruction set; only to be called where the processor has it.
template <class S>
RowLoops<S> row_loops_plain();
#if defined(__x86_64__)
template <class S>
RowLoops<S> row_loops_avx2();
template <class S>
RowLoops<S> row_loops_avx512();
#endif

template <class S>
RowLoops<S> row_loops_for([[maybe_unused]] int widest) {
#if defined(__x86_64__) && !defined(KANTOR_NO_SIMD)
  if (widest >= 512 && __builtin_cpu_supports("x86-64-v4")) return row_loops_avx512<S>();
  if (widest >= 256 && __builtin_cpu_supports("x86-64-v3")) return row_loops_avx2<S>();
#endif
  return row_loops_plain<S>();
}

}  // namespace kantor
