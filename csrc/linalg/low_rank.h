// The operator form F' diag(w) F = sum_j w_j f_j f_j' of linalg/operator.h. No row of a product with it is known before
// all of x has been read; what has to be known are its `projections`, `values()` doubles a vector, formed in two stages
// of independent items whose number depends on the shape alone, so that the bits do not depend on the threads:
//   few columns   y = F' diag(w) F x itself, with F read once: while the block of factors whose products with x were
//                 formed is in cache it is added up. Partial sums over pieces of the factors.
//   many columns  c = diag(w) F x. Partial sums over pieces of the columns. The rows of F' c then read F again.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/hd.h"
#include "core/parallel.h"

namespace kantor {

template <class T>
struct LowRank {
  int64_t n, rank;
  const T* factors;            // (rank, n)
  const T* weights;            // (rank)
  double* projections;         // workspace of a batch of vectors, (batch, projections_stride)
  int64_t projections_stride;  // projections_size()

  // Columns that a block of factors may have: 32 KiB of partial sums in the first-level cache, or in shared memory.
  static constexpr int64_t few_columns = 4096;
  static constexpr int64_t most_pieces = 128;

  KANTOR_HD bool reads_once() const { return n <= few_columns; }
  KANTOR_HD int64_t values() const { return reads_once() ? n : rank; }
  // The pieces: some 16,384 entries of F or more each.
  Chunks pieces() const {
    const int64_t length = reads_once() ? (16384 + n) / (n + 1) : 4 * chunk_size;
    const int64_t total = reads_once() ? rank : n;
    return {total, std::max(length, (total + most_pieces - 1) / most_pieces)};
  }
  int64_t projections_size() const { return values() * (1 + pieces().count()); }

  // The projections of vector k of the batch, and behind them those of the pieces.
  KANTOR_HD double* projections_of(int64_t k) const { return projections + k * projections_stride; }
  KANTOR_HD double* partial_of(int64_t k, int64_t piece) const { return projections_of(k) + (1 + piece) * values(); }
};

// CPU, stage 1: item 0..projection_items()-1 of vector k, which is x.
template <class T>
int64_t projection_items(const LowRank<T>& A);
template <class T>
void project_item(const LowRank<T>& A, int64_t k, const T* x, int64_t item);

// CPU, stage 2: adds up the partial sums of some of the values.
template <class T>
void sum_projections(const LowRank<T>& A, int64_t k, Range values);

// CPU: y[0..rows.size()) (+)= scale * rows of the product with vector k, whose projections are there.
template <class T, class Out>
void low_rank_rows(const LowRank<T>& A, double scale, int64_t k, Out* y, Range rows, bool accumulate);

}  // namespace kantor
