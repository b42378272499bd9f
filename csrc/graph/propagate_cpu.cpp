// The K steps of the recurrence, tile by tile: a tile of columns takes all its steps before the next one begins. Two
// packed tiles stay in the second-level cache where the graph is small enough; threads then take tiles. Otherwise all
// threads share the rows of one tile and meet after every step.
#include "graph/propagate_plan.h"
#include "graph/step_rows.h"

namespace kantor {
namespace {

// Whether a tile alternates between a buffer and its columns of y, and not between two buffers: where rows are read
// from memory anyway, or y is no wider than a tile. An adjoint with teleport keeps its sum in y.
template <class T>
bool goes_through_result(const Recurrence<T>& r, const Tiling& tiling, int64_t d, int64_t columns, int64_t width) {
  const bool summing = r.adjoint && r.teleport != 0;
  return !summing && columns == width && (!tiling.cached || d == width);
}

// All steps of a tile of columns, from `first` on, by one crew.
template <class T>
void propagate_tile(Crew& crew, const Recurrence<T>& r, const Tiling& tiling, int64_t d, int64_t first, const T* x,
                    T* y, T* workspace) {
  const int64_t n = r.pattern.n, columns = std::min(tiling.width, d - first), width = width_for<T>(columns);
  const Dropout<T> dropout(r.dropout, r.seed), none;
  const Range rows = rows_of(r.pattern, crew.worker, crew.workers);
  const Rows<const T> source{x + first, d};
  const Rows<T> result{y + first, d}, a{workspace, width};
  const bool through_result = goes_through_result(r, tiling, d, columns, width);
  const Rows<T> b = through_result ? result : Rows<T>{workspace + n * width, width};

  Step<T> step{r.pattern, r.edge, r.diagonal, width, columns, source, {}, width};
  step.fetch = tiling.fetch;
  step.dropout = dropout;
  step.first_column = first;
  step.teleport = static_cast<T>(r.teleport);
  if (r.teleport != 0 && !r.adjoint) step.start = source;
  if (r.teleport != 0 && r.adjoint) {  // g_K is the first term of the sum, which is kept in y
    step.sum = result;
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t c = 0; c < columns; ++c) result.row(i)[c] = step.teleport * source.row(i)[c];
  }
  // The last step writes into y; those before it alternate, and b may be y.
  const auto target_of = [&](int64_t k) { return (r.steps - 1 - k) % 2 == 0 ? b : a; };
  const bool apart = tiling.cached && d != width && r.steps > 1;  // rows of x are, those of a tile that stays are not
  if (apart || columns < width || (dropout.active() && !r.adjoint)) {
    const Rows<T> packed = target_of(1);
    pack_rows(source, columns, width, r.adjoint ? none : dropout, 0, first, packed, rows);
    step.source = {packed.data, packed.stride};
    if (!crew.wait()) return;
  }
  for (int64_t k = 0; k < r.steps; ++k) {
    step.last = k + 1 == r.steps;
    step.target = step.last ? result : target_of(k);
    step.stored = step.last ? columns : width;
    step.mask_step = r.adjoint ? r.steps - 1 - k : k + 1;
    if (step.last && !r.adjoint) step.dropout = none;
    step_rows(step, rows);
    if (!crew.wait()) return;
    step.source = {step.target.data, step.target.stride};
  }
}

}  // namespace

template <class T>
int64_t propagate_workspace_cpu(const Exec& exec, const Recurrence<T>& r, int64_t d) {
  if (r.pattern.n == 0 || d == 0 || r.steps == 0) return 0;
  const Tiling tiling = tiling_of<T>(exec, r.pattern, r.steps, d, max_width<T>, true);
  int64_t widest = 0;  // over the first and the last tile
  for (const int64_t columns : {std::min(d, tiling.width), (d - 1) % tiling.width + 1}) {
    const int64_t width = width_for<T>(columns);
    widest = std::max(widest, goes_through_result(r, tiling, d, columns, width) ? width : 2 * width);
  }
  return tiling.crews * r.pattern.n * widest;
}

template <class T>
bool propagate_cpu(const Exec& exec, const Recurrence<T>& r, int64_t d, const T* x, T* y, T* workspace,
                   const std::function<bool()>& interrupted) {
  const int64_t n = r.pattern.n;
  if (n == 0 || d == 0 || r.steps == 0) {
    std::copy_n(x, n * d, y);
    return true;
  }
  const Tiling tiling = tiling_of<T>(exec, r.pattern, r.steps, d, max_width<T>, true);
  const int64_t size = propagate_workspace_cpu(exec, r, d);
  advise_huge_pages(y, static_cast<size_t>(n * d) * sizeof(T));
  advise_huge_pages(workspace, static_cast<size_t>(size) * sizeof(T));
  return for_each_item(tiling, tiling.count(d), interrupted, [&](Crew& crew, int index, int64_t tile) {
    propagate_tile(crew, r, tiling, d, tile * tiling.width, x, y, workspace + index * (size / tiling.crews));
  });
}

#define KANTOR_INSTANTIATE(T)                                                               \
  template int64_t propagate_workspace_cpu(const Exec&, const Recurrence<T>&, int64_t);     \
  template bool propagate_cpu(const Exec&, const Recurrence<T>&, int64_t, const T*, T*, T*, \
                              const std::function<bool()>&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
