// Passes over a window of gradients, the rows of G, for products with the inverse of the empirical Fisher matrix
// F = damping I + G'G / m (Frantar, Kurtic, Alistarh: M-FAC, arXiv 2107.03356).
//
// The columns are cut into blocks of `block` each (the last may be shorter), on which F is block-diagonal; one block of
// all d columns is the full matrix. What couples the passes are the products of rows within a block, in double.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>

#include "core/exec.h"
#include "core/hd.h"
#include "optim/mfac_storage.h"

namespace kantor {

// Rows begin `stride` elements apart. Entries from d to stride are zero, and a multiple of 64 bytes.
struct Window {
  int64_t rows, d, stride, block;

  KANTOR_HD int64_t blocks() const { return (d + block - 1) / block; }
};

// A block is cut into pieces of at most `most` columns, or is one piece, so that the work and the order of the sums
// depend on the shape alone.
struct Piece {
  int64_t block, begin, end;  // columns begin..end-1; none in the pieces that a short last block lacks
};
struct Pieces {
  Window window;
  int64_t most;

  KANTOR_HD int64_t length() const { return window.block < most ? window.block : most; }
  KANTOR_HD int64_t per_block() const { return (window.block + most - 1) / most; }
  KANTOR_HD int64_t count() const { return window.blocks() * per_block(); }
  KANTOR_HD Piece piece(int64_t index) const {
    const int64_t b = index / per_block(), block_end = least((b + 1) * window.block, window.d);
    const int64_t begin = least(b * window.block + index % per_block() * length(), block_end);
    return {b, begin, least(begin + length(), block_end)};
  }

 private:
  KANTOR_HD static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

inline constexpr int64_t product_columns = 4096;  // of a piece: its part of x stays in the first-level cache

// Partial sums of the products: the workspace, in doubles, for one vector.
inline int64_t products_workspace(const Window& w) {
  const Pieces pieces{w, product_columns};
  return pieces.per_block() > 1 ? pieces.count() * w.rows : 0;
}

// out[k][b][i] = the product of row i with x[k] over block b, for `count` vectors x of d elements, as sums in double.
// With 0 <= slot < rows (and count 1): row slot <- x / scale first, rounded; its product is then that with the others'
// scale, x being taken as the rounded row.
// Traffic: G once for every vector.
template <class S>
struct Products {
  Window window;
  S* G;
  int64_t slot;  // or -1
  double inverse_scale;
  int64_t count;
  const Wide<S>* x;  // (count, d)
  double* out;       // (count, blocks, rows)
  double* partial;   // products_workspace()
};

// On the CPU vectors have at most `widest` bits, which changes no bit of the result.
template <class S>
void mfac_products_cpu(const Exec& exec, const Products<S>& p, int widest = 512);
template <class S>
void mfac_products_cuda(const Exec& exec, const Products<S>& p);

// y[k] = scale x[k] + sum_i c[k][b][i] row_i on block b, summed in double and rounded once. x may be null.
// Traffic: G once for every vector.
template <class S>
struct Combination {
  Window window;
  const S* G;
  int64_t count;
  const double* c;  // (count, blocks, rows)
  double scale;
  const Wide<S>* x;  // (count, d)
  Wide<S>* y;        // (count, d)
};

template <class S>
void mfac_combine_cpu(const Exec& exec, const Combination<S>& p, int widest = 512);
template <class S>
void mfac_combine_cuda(const Exec& exec, const Combination<S>& p);

// out[b][i][j] = the product of rows i and j over block b, as sums in double, on the CPU. Arithmetic bounds it, m^2 d
// multiply-adds: a panel of columns of all rows is widened once, 8 rows interleaved, and taken by tiles of the lower
// triangle from the second-level cache.
template <class S>
struct Gram {
  Window window;
  const S* G;
  double* out;        // (blocks, rows, rows)
  double* workspace;  // gram_workspace()
};

int64_t gram_workspace(const Window& window);  // in doubles
// False where `interrupted`, which is asked once a panel, says so.
template <class S>
bool mfac_gram_cpu(const Exec& exec, const Gram<S>& p, const std::function<bool()>& interrupted, int widest = 512);

// L <- the Cholesky factor after row and column r of L L' become s, in O(m^2). L is (m, m) by columns, s is
// overwritten, `work` has m doubles. False where the new matrix is not positive definite to working precision; L is
// then worthless.
bool replace_in_cholesky(int64_t m, int64_t r, double* s, double* L, double* work);

}  // namespace kantor
