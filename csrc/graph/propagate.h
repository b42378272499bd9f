// Diffusion on a graph, forward, adjoint and derivatives, as one linear recurrence on a sparse n x n matrix E and a
// diagonal D:
//
//   x_{k+1} = D m_k x_k + E m_k x_k + a x_0,   k = 0..K-1,                                           (forward)
//   g_k = m_k (D g_{k+1} + E' g_{k+1}),        k = K-1..0;   result g_0 + a (g_1 + ... + g_K),       (adjoint)
//
// with teleport a and dropout masks m_k (core/philox.h). The explicit diffusion block x <- x - step (deg x - W x) is
// E = step W, D = 1 - step deg, a = 0 (T. Wang, Z. Dou, C. Bao, Z. Shi, "Diffusion mechanism in residual neural
// network", 2024); personalised PageRank propagation has a > 0. The derivatives are
//
//   dE_ij = sum_k <g_{k+1,i}, (m_k x_k)_j>,    dD_i = sum_k <g_{k+1,i}, (m_k x_k)_i>.
//
// x, y and g are (n, d), row-major and contiguous. Columns are independent of one another, and every sum is formed in
// one order, that of the row: the same bits for any number of threads.
#pragma once
#include <cstdint>
#include <functional>

#include "core/exec.h"

namespace kantor {

// A sparse n x n matrix by rows, without its values: row i has the entries rowptr[i]..rowptr[i+1]-1, in columns col[].
struct Pattern {
  int64_t n, nnz;
  const int32_t* rowptr;
  const int32_t* col;
};

template <class T>
struct Recurrence {
  Pattern pattern;    // of E; where `adjoint` is set, of E'
  const T* edge;      // (nnz) the values
  const T* diagonal;  // (n)
  int64_t steps;
  double teleport = 0, dropout = 0;
  uint64_t seed = 0;
  bool adjoint = false;
};

// y = W x. Traffic: 8 bytes an entry, x once where its rows stay in cache (else nnz d words), y once.
template <class T>
void product_cpu(const Exec& exec, const Pattern& pattern, const T* weight, int64_t d, const T* x, T* y);
template <class T>
void product_cuda(const Exec& exec, const Pattern& pattern, const T* weight, int64_t d, const T* x, T* y);

// out_e = <a_i, b_j> for every entry e = (i, j). Reads a once, b like x above, writes nnz words.
template <class T>
void edge_dot_cpu(const Exec& exec, const Pattern& pattern, int64_t d, const T* a, const T* b, T* out);
template <class T>
void edge_dot_cuda(const Exec& exec, const Pattern& pattern, int64_t d, const T* a, const T* b, T* out);

// y = the recurrence's result for x; K = 0 copies. The workspace has propagate_workspace_*(...) elements of T: for each
// thread, or for all together, two tiles of columns, 2 n d at most (narrow ones are padded to a power of two). On the
// CPU the calling thread asks `interrupted` about every step; where that says so, the result is false. Traffic: x and y
// once, and per step 8 bytes an entry for each tile of columns and 2 n d words, which come from the second-level cache
// where two tiles fit into it.
template <class T>
int64_t propagate_workspace_cpu(const Exec& exec, const Recurrence<T>& recurrence, int64_t d);
template <class T>
bool propagate_cpu(const Exec& exec, const Recurrence<T>& recurrence, int64_t d, const T* x, T* y, T* workspace,
                   const std::function<bool()>& interrupted);
template <class T>
int64_t propagate_workspace_cuda(const Exec& exec, const Recurrence<T>& recurrence, int64_t d);
template <class T>
void propagate_cuda(const Exec& exec, const Recurrence<T>& recurrence, int64_t d, const T* x, T* y, T* workspace);

// Given x and g = g_K: edge_gradient (nnz), diagonal_gradient (n), and x_gradient (n, d), the adjoint's result.
// `recurrence` is the forward one (adjoint = false); `transpose` and `t_edge` are E'. States are computed anew from
// about sqrt(K) checkpoints, one tile of columns at a time: O(n tile sqrt(K)) memory, with tiles as narrow as keeps it
// near 2 n d, but 8 columns at least. Three sweeps of K steps, and as many dot products as edge_dot takes for K d
// columns.
template <class T>
int64_t propagate_gradients_workspace_cpu(const Exec& exec, const Recurrence<T>& recurrence, int64_t d);
template <class T>
bool propagate_gradients_cpu(const Exec& exec, const Recurrence<T>& recurrence, const Pattern& transpose,
                             const T* t_edge, int64_t d, const T* x, const T* g, T* edge_gradient, T* diagonal_gradient,
                             T* x_gradient, T* workspace, const std::function<bool()>& interrupted);
template <class T>
int64_t propagate_gradients_workspace_cuda(const Exec& exec, const Recurrence<T>& recurrence, int64_t d);
template <class T>
void propagate_gradients_cuda(const Exec& exec, const Recurrence<T>& recurrence, const Pattern& transpose,
                              const T* t_edge, int64_t d, const T* x, const T* g, T* edge_gradient,
                              T* diagonal_gradient, T* x_gradient, T* workspace);

// The mask m_k itself, (n, d), for step k.
template <class T>
void dropout_mask_cpu(const Exec& exec, int64_t first_row, int64_t n, int64_t d, int64_t step, double dropout,
                      uint64_t seed, T* mask);
template <class T>
void dropout_mask_cuda(const Exec& exec, int64_t first_row, int64_t n, int64_t d, int64_t step, double dropout,
                       uint64_t seed, T* mask);

}  // namespace kantor
