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

// body(i) for the stored rows of every level in turn, with a barrier between levels.
template <bool backwards, class Body>
void for_each_level(int worker, int workers, Team& team, int64_t levels, const int32_t* pointers, Body&& body) {
  for (int64_t step = 0; step < levels; ++step) {
    const int64_t level = backwards ? levels - 1 - step : step;
    const int32_t first = pointers[level];
    const Range mine = share(pointers[level + 1] - first, worker, workers);
    for (int64_t i = first + mine.begin; i < first + mine.end; ++i) body(i);
    team.barrier(workers);
  }
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

int64_t level_schedule(int64_t n, const int32_t* crow, const int32_t* col, int32_t* pointers, int32_t* rows) {
  std::vector<int32_t> level(static_cast<size_t>(n));
  int32_t levels = 0;
  for (int64_t i = 0; i < n; ++i) {
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
  for (int64_t i = 0; i < n; ++i)
    rows[next[static_cast<size_t>(level[static_cast<size_t>(i)])]++] = static_cast<int32_t>(i);
  return levels;
}

// A level must be worth a barrier: with fewer than 1024 rows a level on average, one thread is faster.
template <class T>
int threads_of(const IncompleteCholesky<T>& M, int threads) {
  return M.n < 1024 * M.levels ? 1 : threads_for(threads, M.n);
}

template <class T>
void solve_incomplete_cholesky_cpu(Team& team, const IncompleteCholesky<T>& M, const T* r, T* work, T* z) {
  const TriangularFactor<T>&L = M.lower, &U = M.upper;
  // The rows of a level lie far apart in r and z, in a pattern the hardware does not foresee.
  constexpr int64_t ahead = 16;
  const auto later = [&](int64_t i) { return M.rows[std::min(i + ahead, M.n - 1)]; };
  const int useful = threads_of(M, team.threads());
  team.pass([&](int worker, int workers) {
    workers = std::min(workers, useful);
    if (worker >= workers) return;
    for_each_level<false>(worker, workers, team, M.levels, M.level_pointers, [&](int64_t i) {
      __builtin_prefetch(r + later(i));
      const int32_t diagonal = L.crow[i + 1] - 1;
      double sum = r[M.rows[i]];
      for (int32_t k = L.crow[i]; k < diagonal; ++k) sum -= double(L.values[k]) * double(work[L.col[k]]);
      work[i] = static_cast<T>(sum * double(L.values[diagonal]));
    });
    for_each_level<true>(worker, workers, team, M.levels, M.level_pointers, [&](int64_t i) {
      __builtin_prefetch(z + later(i), 1);
      const int32_t diagonal = U.crow[i];
      double sum = work[i];
      for (int32_t k = diagonal + 1; k < U.crow[i + 1]; ++k) sum -= double(U.values[k]) * double(work[U.col[k]]);
      work[i] = static_cast<T>(sum * double(U.values[diagonal]));
      z[M.rows[i]] = work[i];
    });
  });
}

template int64_t ic0_factor(int64_t, const int32_t*, const int32_t*, const float*, double, float*);
template int64_t ic0_factor(int64_t, const int32_t*, const int32_t*, const double*, double, double*);
template int threads_of(const IncompleteCholesky<float>&, int);
template int threads_of(const IncompleteCholesky<double>&, int);
template void solve_incomplete_cholesky_cpu(Team&, const IncompleteCholesky<float>&, const float*, float*, float*);
template void solve_incomplete_cholesky_cpu(Team&, const IncompleteCholesky<double>&, const double*, double*, double*);

}  // namespace kantor
