#include <algorithm>

#include "core/parallel.h"
#include "core/simd.h"
#include "optim/mfac_rows.h"

namespace kantor {
namespace {

constexpr int64_t combination_columns = 4096;  // of a piece: its sums stay in the first-level cache
constexpr int64_t row_group = 128;             // rows of one item of work

// --- products ---

// wide = what a row will hold of x, which is scaled; the row is written unless it is null.
template <class S>
KANTOR_SIMD void round_part(int64_t n, const Wide<S>* __restrict x, Wide<S> inverse_scale, double* __restrict wide,
                            S* __restrict row) {
  for (int64_t i = 0; i < n; ++i) wide[i] = widen(narrow<S>(x[i] * inverse_scale));
  if (row)
    for (int64_t i = 0; i < n; ++i) row[i] = narrow<S>(x[i] * inverse_scale);
}
template <class T>
KANTOR_SIMD void widen_part(int64_t n, const T* x, double* wide) {
  for (int64_t i = 0; i < n; ++i) wide[i] = double(x[i]);
}

// Pieces of small blocks go together, so that rows are read in long stretches.
Chunks groups_of(const Pieces& pieces) { return {pieces.count(), std::max<int64_t>(1, pieces.most / pieces.length())}; }
Stretch stretch_of(const Pieces& pieces, Range group) {
  return {pieces.window, pieces, group, pieces.piece(group.begin).begin};
}
int64_t columns_of(const Stretch& stretch) { return stretch.all.piece(stretch.pieces.end - 1).end - stretch.begin; }

}  // namespace

template <class S>
void mfac_products_cpu(const Exec& exec, const Products<S>& p, int widest) {
  const Window& w = p.window;
  const Pieces pieces{w, product_columns};
  const Chunks groups = groups_of(pieces), row_groups{w.rows, row_group};
  const RowLoops<S> loops = row_loops_for<S>(widest);
  const int threads = threads_for(exec.threads, w.rows * w.d);
  for (int64_t k = 0; k < p.count; ++k) {
    const Wide<S>* x = p.x + k * w.d;
    double* out = p.out + k * w.blocks() * w.rows;
    double* results = pieces.per_block() > 1 ? p.partial : out;
    parallel_for(threads, groups.count() * row_groups.count(), [&](int64_t item) {
      const Stretch stretch = stretch_of(pieces, groups.range(item / row_groups.count()));
      const Range rows = row_groups.range(item % row_groups.count());
      const int64_t n = columns_of(stretch);
      alignas(64) double part[product_columns];
      S* row = p.slot >= rows.begin && p.slot < rows.end ? p.G + p.slot * w.stride + stretch.begin : nullptr;
      if (p.slot >= 0)
        round_part<S>(n, x + stretch.begin, static_cast<Wide<S>>(p.inverse_scale), part, row);
      else
        widen_part(n, x + stretch.begin, part);
      loops.dot(stretch, p.G, rows, part, results);
    });
    if (pieces.per_block() == 1) continue;
    for (int64_t b = 0; b < w.blocks(); ++b)
      for (int64_t i = 0; i < w.rows; ++i) {
        double sum = 0;
        for (int64_t q = b * pieces.per_block(); q < (b + 1) * pieces.per_block(); ++q) sum += results[q * w.rows + i];
        out[b * w.rows + i] = sum;
      }
  }
}

// --- combinations ---

namespace {

// sums = scale x, or zero.
template <class T>
KANTOR_SIMD void start_part(int64_t n, double scale, const T* x, double* sums) {
  if (x)
    for (int64_t i = 0; i < n; ++i) sums[i] = scale * double(x[i]);
  else
    for (int64_t i = 0; i < n; ++i) sums[i] = 0;
}
template <class T>
KANTOR_SIMD void narrow_part(int64_t n, const double* sums, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = static_cast<T>(sums[i]);
}

}  // namespace

template <class S>
void mfac_combine_cpu(const Exec& exec, const Combination<S>& p, int widest) {
  const Window& w = p.window;
  const Pieces pieces{w, combination_columns};
  const Chunks groups = groups_of(pieces);
  const RowLoops<S> loops = row_loops_for<S>(widest);
  const int threads = threads_for(exec.threads, w.rows * w.d);
  parallel_for(threads, p.count * groups.count(), [&](int64_t item) {
    const int64_t k = item / groups.count();
    const Stretch stretch = stretch_of(pieces, groups.range(item % groups.count()));
    const int64_t n = columns_of(stretch), first = k * w.d + stretch.begin;
    alignas(64) double sums[combination_columns];
    start_part(n, p.scale, p.x ? p.x + first : nullptr, sums);
    loops.add(stretch, p.G, p.c + k * w.blocks() * w.rows, sums);
    narrow_part(n, sums, p.y + first);
  });
}

#define KANTOR_INSTANTIATE(S)                                               \
  template void mfac_products_cpu<S>(const Exec&, const Products<S>&, int); \
  template void mfac_combine_cpu<S>(const Exec&, const Combination<S>&, int);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
KANTOR_INSTANTIATE(Bfloat16)
KANTOR_INSTANTIATE(Half)
KANTOR_INSTANTIATE(int8_t)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
