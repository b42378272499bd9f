#include <algorithm>
#include <cmath>
#include <vector>

#include "linalg/csr.h"

namespace kantor {

template <class T, class Index>
CsrReport csr_check(int64_t rows, int64_t cols, int64_t nnz, const Index* crow, const Index* col, const T* values) {
  CsrReport report;
  if (crow[0] != 0 || crow[rows] != nnz) report.bad_row = crow[0] != 0 ? 0 : rows;
  for (int64_t i = 0; i < rows && report.bad_row < 0; ++i)
    if (crow[i + 1] < crow[i] || crow[i + 1] > nnz) report.bad_row = i;
  if (report.bad_row >= 0) return report;  // the columns cannot be walked
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = crow[i]; k < crow[i + 1]; ++k) {
      const int64_t j = col[k];
      if (j < 0 || j >= cols) {
        report.bad_entry = k;
        return report;
      }
      if (k > crow[i] && j <= col[k - 1]) report.sorted = false;
      report.halo = std::max(report.halo, std::abs(i - j));
      if (report.nonfinite_entry < 0 && !std::isfinite(values[k])) report.nonfinite_entry = k;
    }
  }
  return report;
}

template <class Index>
void csr_transpose(int64_t rows, int64_t cols, const Index* crow, const Index* col, Index* t_crow, Index* t_col,
                   Index* permutation) {
  std::fill(t_crow, t_crow + cols + 1, Index(0));
  for (Index k = 0; k < crow[rows]; ++k) ++t_crow[col[k] + 1];
  for (int64_t j = 0; j < cols; ++j) t_crow[j + 1] += t_crow[j];
  std::vector<Index> next(t_crow, t_crow + cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (Index k = crow[i]; k < crow[i + 1]; ++k) {
      const Index slot = next[static_cast<size_t>(col[k])]++;
      t_col[slot] = static_cast<Index>(i);
      permutation[slot] = k;
    }
  }
}

template <class T, class Index>
Asymmetry csr_asymmetry(int64_t n, const Index* crow, const Index* col, const T* values) {
  Asymmetry worst;
  for (int64_t i = 0; i < n; ++i) {
    for (Index k = crow[i]; k < crow[i + 1]; ++k) {
      const int64_t j = col[k];
      const Index *begin = col + crow[j], *end = col + crow[j + 1];
      const Index* mirror = std::lower_bound(begin, end, static_cast<Index>(i));
      const bool found = mirror != end && *mirror == i;
      const double difference = std::abs(double(values[k]) - (found ? double(values[mirror - col]) : 0.0));
      if (difference > worst.difference) worst = {difference, i, j};
    }
  }
  return worst;
}

#define KANTOR_INSTANTIATE(T, Index)                                                             \
  template CsrReport csr_check(int64_t, int64_t, int64_t, const Index*, const Index*, const T*); \
  template Asymmetry csr_asymmetry(int64_t, const Index*, const Index*, const T*);
KANTOR_INSTANTIATE(float, int32_t)
KANTOR_INSTANTIATE(float, int64_t)
KANTOR_INSTANTIATE(double, int32_t)
KANTOR_INSTANTIATE(double, int64_t)
#undef KANTOR_INSTANTIATE
template void csr_transpose(int64_t, int64_t, const int32_t*, const int32_t*, int32_t*, int32_t*, int32_t*);
template void csr_transpose(int64_t, int64_t, const int64_t*, const int64_t*, int64_t*, int64_t*, int64_t*);

}  // namespace kantor
