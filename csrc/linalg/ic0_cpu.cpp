#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "linalg/ic0.h"
#include "linalg/preconditioner.h"

namespace kantor {
namespace {

// Sum of products of rows i and j of L over the columns below `bound`: both rows sorted, merged.
template <class T>
double row_product(const int32_t* col, const T* factor, int32_t i, int32_t i_end, int32_t j, int32_t j_end,
                   int32_t bound) {
  double sum = 0;
  while (i < i_end && j < j_end && col[i] < bound && col[j] < bound) {
    if (col[i] == col[j])
      sum += double(factor[i++]) * double(factor[j++]);
    else if (col[i] < col[j])
      ++i;
    else
      ++j;
  }
  return sum;
}

// Row i of the triangular solve; the diagonal is the last entry of a lower row, the first of an upper one.
template <class T, bool upper>
inline void solve_row(const TriangularFactor<T>& L, const T* right, T* z, int64_t i) {
  const int32_t begin = L.crow[i] + upper, end = L.crow[i + 1] - !upper;
  double sum = right[i];
  for (int32_t k = begin; k < end; ++k) sum -= double(L.values[k]) * double(z[L.col[k]]);
  z[i] = static_cast<T>(sum / double(L.values[upper ? begin - 1 : end]));
}

template <class T, bool upper>
void solve_triangular(int threads, int64_t n, const TriangularFactor<T>& L, const T* right, T* z) {
  if (threads <= 1) {
    if (upper)
      for (int64_t i = n - 1; i >= 0; --i) solve_row<T, upper>(L, right, z, i);
    else
      for (int64_t i = 0; i < n; ++i) solve_row<T, upper>(L, right, z, i);
    return;
  }
  parallel_region(threads, [&](int worker, int workers) {
    for (int64_t level = 0; level < L.levels; ++level) {
      const int32_t first = L.level_pointers[level];
      const Range mine = share(L.level_pointers[level + 1] - first, worker, workers);
      for (int64_t k = mine.begin; k < mine.end; ++k) solve_row<T, upper>(L, right, z, L.level_rows[first + k]);
      barrier();
    }
  });
}

}  // namespace

template <class T>
int64_t ic0_factor(int64_t n, const int32_t* crow, const int32_t* col, const T* values, double shift, T* factor) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t diagonal = crow[i + 1] - 1;
    if (diagonal < crow[i] || col[diagonal] != i) return i;
    for (int32_t k = crow[i]; k < diagonal; ++k) {
      const int32_t j = col[k];
      const double sum = row_product(col, factor, crow[i], k, crow[j], crow[j + 1] - 1, j);
      factor[k] = static_cast<T>((double(values[k]) - sum) / double(factor[crow[j + 1] - 1]));
    }
    double pivot = double(values[diagonal]) * (1 + shift);
    for (int32_t k = crow[i]; k < diagonal; ++k) pivot -= double(factor[k]) * double(factor[k]);
    if (!(pivot > 0) || !std::isfinite(pivot)) return i;
    factor[diagonal] = static_cast<T>(std::sqrt(pivot));
  }
  return -1;
}

int64_t level_schedule(int64_t n, const int32_t* crow, const int32_t* col, bool upper, int32_t* pointers,
                       int32_t* rows) {
  std::vector<int32_t> level(static_cast<size_t>(n));
  int32_t levels = 0;
  for (int64_t step = 0; step < n; ++step) {
    const int64_t i = upper ? n - 1 - step : step;
    int32_t mine = 0;
    for (int32_t k = crow[i]; k < crow[i + 1]; ++k)
      if (col[k] != i) mine = std::max(mine, level[static_cast<size_t>(col[k])] + 1);
    level[static_cast<size_t>(i)] = mine;
    levels = std::max(levels, mine + 1);
  }
  std::fill(pointers, pointers + n + 1, 0);
  for (int32_t l : level) ++pointers[l + 1];
  for (int64_t l = 0; l < n; ++l) pointers[l + 1] += pointers[l];
  std::vector<int32_t> next(pointers, pointers + n);
  for (int64_t i = 0; i < n; ++i) rows[next[static_cast<size_t>(level[static_cast<size_t>(i)])]++] = static_cast<int32_t>(i);
  return levels;
}

template <class T>
void solve_incomplete_cholesky_cpu(const Exec& exec, const IncompleteCholesky<T>& M, const T* r, T* z) {
  // A level must be worth a barrier: with fewer than 2048 rows a level on average, one thread in natural order is faster.
  const int64_t levels = std::max<int64_t>(1, std::max(M.lower.levels, M.upper.levels));
  const int threads = M.n / levels < 2048 ? 1 : threads_for(exec.threads, M.n);
  solve_triangular<T, false>(threads, M.n, M.lower, r, z);
  solve_triangular<T, true>(threads, M.n, M.upper, z, z);
}

template int64_t ic0_factor(int64_t, const int32_t*, const int32_t*, const float*, double, float*);
template int64_t ic0_factor(int64_t, const int32_t*, const int32_t*, const double*, double, double*);
template void solve_incomplete_cholesky_cpu(const Exec&, const IncompleteCholesky<float>&, const float*, float*);
template void solve_incomplete_cholesky_cpu(const Exec&, const IncompleteCholesky<double>&, const double*, double*);

}  // namespace kantor
