// Structure of compressed sparse row matrices: validation, transpose, symmetry. One pass each, on the host.
#pragma once
#include <cstdint>

namespace kantor {

struct CsrReport {
  int64_t bad_row = -1;          // first row whose crow decreases or leaves 0..nnz, or -1
  int64_t bad_entry = -1;        // first entry whose column is outside 0..cols-1, or -1
  int64_t nonfinite_entry = -1;  // first NaN or infinite value, or -1
  bool sorted = true;            // columns strictly ascending in every row: sorted, no duplicates
  int64_t halo = 0;              // max |i - j|
};

template <class T, class Index>
CsrReport csr_check(int64_t rows, int64_t cols, int64_t nnz, const Index* crow, const Index* col, const T* values);

// Pattern of the transpose: entry k of A' is entry permutation[k] of A. Columns come out sorted.
template <class Index>
void csr_transpose(int64_t rows, int64_t cols, const Index* crow, const Index* col, Index* t_crow, Index* t_col,
                   Index* permutation);

struct Asymmetry {
  double difference = 0;  // max |a_ij - a_ji|, a missing entry counting as zero
  int64_t i = 0, j = 0;   // where
};

// A square with sorted rows. O(nnz log(row length)).
template <class T, class Index>
Asymmetry csr_asymmetry(int64_t n, const Index* crow, const Index* col, const T* values);

}  // namespace kantor
