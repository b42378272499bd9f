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

template <class S>
struct RowLoops {
  // results[piece][i] = the product of row i, for i in `rows`, with x on the piece. x begins at stretch.begin.
  void (*dot)(const Stretch& stretch, const S* G, Range rows, const double* x, double* results);
  // sums += sum_i c[block][i] row_i, in the order of the rows. sums begin at stretch.begin.
  void (*add)(const Stretch& stretch, const S* G, const double* c, double* sums);
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

}  // namespace kantor
