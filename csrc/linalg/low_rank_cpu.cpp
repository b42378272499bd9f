#include "linalg/low_rank.h"

#include <cstring>

#include "core/reduce.h"
#include "core/simd.h"

namespace kantor {
namespace {

constexpr int64_t group = 8;  // factors of one item where the columns are cut

KANTOR_ALWAYS_INLINE void store8(Double8 values, double* target) { std::memcpy(target, &values, sizeof values); }

// Rows are often short, so that the entries behind the last eight count. Where a row has eight or more, they are taken
// by one more load that ends with the row and overlaps the load before: times a vector that is zero there, or added to
// a sum of their own.
template <class T>
KANTOR_ALWAYS_INLINE Double8 tail_of(int64_t n, const T* x) {
  Double8 tail{};
  for (int64_t i = n < 8 ? n : n - n % 8; i < n; ++i) tail[i - (n - 8)] = double(x[i]);
  return tail;
}
KANTOR_ALWAYS_INLINE void add_tail(int64_t n, Double8 tail, double* y) {
  for (int64_t i = n < 8 ? n : n - n % 8; i < n; ++i) y[i] += tail[i - (n - 8)];
}

// out[j] = row_j . x for four rows at once: x is loaded once for all, and four sums hide the latency of the additions.
template <class T>
KANTOR_ALWAYS_INLINE void four_dots(int64_t n, const T* const (&row)[4], const T* x, Double8 tail, double* out) {
  Double8 a{}, b{}, c{}, d{};
  const auto add = [&](int64_t i, Double8 v) KANTOR_INLINE_LAMBDA {
    a += load8(row[0] + i) * v;
    b += load8(row[1] + i) * v;
    c += load8(row[2] + i) * v;
    d += load8(row[3] + i) * v;
  };
  for (int64_t i = 0; i + 8 <= n; i += 8) add(i, load8(x + i));
  if (n >= 8 && n % 8 != 0) add(n - 8, tail);
  const Double8 zero{};
  out[0] = horizontal_sum(a, zero, zero, zero);
  out[1] = horizontal_sum(b, zero, zero, zero);
  out[2] = horizontal_sum(c, zero, zero, zero);
  out[3] = horizontal_sum(d, zero, zero, zero);
  if (n < 8)
    for (int64_t i = 0; i < n; ++i)
      for (int j = 0; j < 4; ++j) out[j] += double(row[j][i]) * double(x[i]);
}

// y += sum_j c_j row_j, except for the entries behind the last eight, whose sum is in `tail`.
template <class T>
KANTOR_ALWAYS_INLINE void four_axpys(int64_t n, const double* c, const T* const (&row)[4], double* y, Double8& tail) {
  const auto sum = [&](int64_t i) KANTOR_INLINE_LAMBDA {
    return (load8(row[0] + i) * c[0] + load8(row[1] + i) * c[1]) +
           (load8(row[2] + i) * c[2] + load8(row[3] + i) * c[3]);
  };
  for (int64_t i = 0; i + 8 <= n; i += 8) store8(load8(y + i) + sum(i), y + i);
  if (n >= 8 && n % 8 != 0) tail += sum(n - 8);
  if (n < 8)
    for (int64_t i = 0; i < n; ++i)
      y[i] +=
          (double(row[0][i]) * c[0] + double(row[1][i]) * c[1]) + (double(row[2][i]) * c[2] + double(row[3][i]) * c[3]);
}

// Rows first..first+3 of F from column `column` on. Beyond `end` the last row stands in, for a coefficient of zero.
template <class T>
struct FourRows {
  const T* row[4];
  KANTOR_ALWAYS_INLINE FourRows(const LowRank<T>& A, int64_t first, int64_t end, int64_t column) {
    for (int j = 0; j < 4; ++j) row[j] = A.factors + std::min(first + j, end - 1) * A.n + column;
  }
};

// Few columns: y = sum over the factors of a piece of w_j (f_j . x) f_j.
template <class T>
KANTOR_SIMD void product_of_factors(const LowRank<T>& A, const T* x, Range factors, double* y) {
  for (int64_t i = 0; i < A.n; ++i) y[i] = 0;
  const Double8 tail_x = tail_of(A.n, x);
  Double8 tail_y{};
  for (int64_t j = factors.begin; j < factors.end; j += 4) {
    const FourRows<T> rows(A, j, factors.end, 0);
    double c[4];
    four_dots<T>(A.n, rows.row, x, tail_x, c);
    for (int64_t i = 0; i < 4; ++i) c[i] = j + i < factors.end ? c[i] * double(A.weights[j + i]) : 0.0;
    four_axpys<T>(A.n, c, rows.row, y, tail_y);
  }
  add_tail(A.n, tail_y, y);
}

// Many columns: partial[j] = f_j . x over a piece of the columns.
template <class T>
KANTOR_SIMD void partial_dots(const LowRank<T>& A, const T* x, Range factors, Range columns, double* partial) {
  for (int64_t j = factors.begin; j < factors.end; j += 4) {
    if (factors.end - j < 4) {  // no row more than needed: one factor is the usual case
      for (int64_t i = j; i < factors.end; ++i) {
        const T *row = A.factors + i * A.n + columns.begin, *v = x + columns.begin;
        partial[i] = lane_sum(
            columns.size(), [=](int64_t m) KANTOR_INLINE_LAMBDA { return load8(row + m) * load8(v + m); },
            [=](int64_t m) KANTOR_INLINE_LAMBDA { return double(row[m]) * double(v[m]); });
      }
      return;
    }
    const FourRows<T> rows(A, j, factors.end, columns.begin);
    const T* part = x + columns.begin;
    four_dots<T>(columns.size(), rows.row, part, tail_of(columns.size(), part), partial + j);
  }
}

// y (+)= scale * sum_j c_j f_j over some columns, at most `most` at a time in double.
template <class T, class Out>
KANTOR_SIMD void combination(const LowRank<T>& A, double scale, const double* c, Range columns, Out* __restrict y,
                             bool accumulate) {
  constexpr int64_t most = 1024;
  double sums[most];
  for (int64_t begin = columns.begin; begin < columns.end; begin += most) {
    const int64_t count = std::min(most, columns.end - begin);
    Out* __restrict target = y + (begin - columns.begin);
    const T* first = A.factors + begin;
    if (A.rank == 1) {
      const Out factor = static_cast<Out>(scale * c[0]);
      if (accumulate)
        for (int64_t i = 0; i < count; ++i) target[i] += factor * Out(first[i]);
      else
        for (int64_t i = 0; i < count; ++i) target[i] = factor * Out(first[i]);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) sums[i] = 0;
    Double8 tail{};
    for (int64_t j = 0; j < A.rank; j += 4) {
      const FourRows<T> rows(A, j, A.rank, begin);
      double four[4];
      for (int64_t m = 0; m < 4; ++m) four[m] = j + m < A.rank ? c[j + m] : 0.0;
      four_axpys<T>(count, four, rows.row, sums, tail);
    }
    add_tail(count, tail, sums);
    if (accumulate)
      for (int64_t i = 0; i < count; ++i) target[i] += static_cast<Out>(scale * sums[i]);
    else
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<Out>(scale * sums[i]);
  }
}

template <class Out>
KANTOR_SIMD void scaled_values(int64_t n, double scale, const double* __restrict values, Out* __restrict y,
                               bool accumulate) {
  if (accumulate)
    for (int64_t i = 0; i < n; ++i) y[i] += static_cast<Out>(scale * values[i]);
  else
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<Out>(scale * values[i]);
}

// values = weights * sum over the pieces, or without weights.
template <class T>
KANTOR_SIMD void add_pieces(int64_t n, int64_t pieces, int64_t stride, const double* __restrict partial,
                            const T* weights, double* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = 0;
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t i = 0; i < n; ++i) values[i] += partial[piece * stride + i];
  if (weights)
    for (int64_t i = 0; i < n; ++i) values[i] *= double(weights[i]);
}

}  // namespace

template <class T>
int64_t projection_items(const LowRank<T>& A) {
  const int64_t pieces = A.pieces().count();
  return A.reads_once() ? pieces : pieces * ((A.rank + group - 1) / group);
}

template <class T>
void project_item(const LowRank<T>& A, int64_t k, const T* x, int64_t item) {
  const Chunks pieces = A.pieces();
  if (A.reads_once()) return product_of_factors(A, x, pieces.range(item), A.partial_of(k, item));
  // The factors of one piece of x after another: it stays in cache.
  const int64_t groups = (A.rank + group - 1) / group, piece = item / groups, first = item % groups * group;
  partial_dots(A, x, {first, std::min(first + group, A.rank)}, pieces.range(piece), A.partial_of(k, piece));
}

template <class T>
void sum_projections(const LowRank<T>& A, int64_t k, Range values) {
  const T* weights = A.reads_once() ? nullptr : A.weights + values.begin;
  add_pieces(values.size(), A.pieces().count(), A.values(), A.partial_of(k, 0) + values.begin, weights,
             A.projections_of(k) + values.begin);
}

template <class T, class Out>
void low_rank_rows(const LowRank<T>& A, double scale, int64_t k, Out* y, Range rows, bool accumulate) {
  const double* values = A.projections_of(k);
  if (A.reads_once())
    scaled_values(rows.size(), scale, values + rows.begin, y, accumulate);
  else
    combination(A, scale, values, rows, y, accumulate);
}

#define KANTOR_INSTANTIATE(T)                                                \
  template int64_t projection_items(const LowRank<T>&);                      \
  template void project_item(const LowRank<T>&, int64_t, const T*, int64_t); \
  template void sum_projections(const LowRank<T>&, int64_t, Range);          \
  template void low_rank_rows(const LowRank<T>&, double, int64_t, T*, Range, bool);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE
template void low_rank_rows(const LowRank<float>&, double, int64_t, double*, Range, bool);

}  // namespace kantor
