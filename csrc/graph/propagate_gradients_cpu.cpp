// Derivatives of the recurrence for E and D. A tile of columns at a time: the states z_k = m_k x_k go forward, and
// every `length`-th is kept; then, one segment of steps after the other from the last, its states are computed once
// more, the gradients g_{k+1} are swept back beside them, and
//
//   dE_ij += <(g_{k+1,i})_k, (z_{k,j})_k>,   k in the segment,
//
// is one dot product for each entry: states and gradients lie row by row, the steps of a segment side by side.
#include <cmath>

#include "core/simd.h"
#include "graph/propagate_plan.h"
#include "graph/step_rows.h"

namespace kantor {
namespace {

// Tiles are cut into so many groups, each with sums of its own, whatever the number of threads: the same bits.
constexpr int64_t most_groups = 16;

struct Plan {
  Tiling tiling;
  int64_t groups;
  int64_t length, segments;  // ceil(sqrt(K)) steps a segment
  int64_t stride;            // of the rows of a segment's states, or gradients
  int64_t tile_size;         // elements of workspace: states, gradients and checkpoints of one tile
};

template <class T>
Plan plan_of(const Exec& exec, const Recurrence<T>& r, int64_t d) {
  constexpr int64_t line = line_bytes / sizeof(T);
  const int64_t n = r.pattern.n, nnz = r.pattern.nnz;
  Plan plan{};
  plan.length = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(r.steps))));
  plan.segments = (r.steps + plan.length - 1) / plan.length;
  // Two lines a row, less where a tile would take more than 2 n d numbers.
  const int64_t columns = 2 * plan.length + plan.segments - 1;
  int64_t widest = 2 * line;
  while (widest > 8 && widest * columns > 2 * d) widest /= 2;
  plan.tiling = tiling_of<T>(exec, r.pattern, 4 * r.steps, d, widest, false);
  const int64_t width = plan.tiling.width;
  plan.stride = plan.length * width;
  // An odd number of cache lines: otherwise the steps of a segment compete for a part of the cache's sets.
  if (plan.stride % (2 * line) == 0) plan.stride += line;
  plan.tile_size = n * (2 * plan.stride + (plan.segments - 1) * width);
  // Threads share one tile where each with its own would take too much.
  if (plan.tiling.crews * plan.tile_size > 2 * n * d) plan.tiling.share_tiles(r.pattern);
  const int64_t affordable = std::max<int64_t>(1, n * d / (2 * (nnz + n)));
  plan.groups = std::min({most_groups, plan.tiling.count(d), affordable});
  return plan;
}

template <class T>
void gradients_of_tile(Crew& crew, const Recurrence<T>& r, const Pattern& transpose, const T* t_edge, const Plan& plan,
                       int64_t d, int64_t first, const T* x, const T* g, T* edge_gradient, T* diagonal_gradient,
                       T* x_gradient, T* workspace) {
  const int64_t n = r.pattern.n, columns = std::min(plan.tiling.width, d - first), width = plan.tiling.width;
  const Dropout<T> dropout(r.dropout, r.seed), none;
  const Range rows = rows_of(r.pattern, crew.worker, crew.workers);
  T *const states = workspace, *const gradients = states + n * plan.stride, *const kept = gradients + n * plan.stride;
  // z_k, and g_{k+1}, of the present segment; z_k at the beginning of any but the first.
  const auto state = [&](int64_t k) { return Rows<T>{states + k % plan.length * width, plan.stride}; };
  const auto gradient = [&](int64_t k) { return Rows<T>{gradients + k % plan.length * width, plan.stride}; };
  const auto checkpoint = [&](int64_t k) { return Rows<T>{kept + (k / plan.length - 1) * n * width, width}; };
  const auto constant = [](Rows<T> view) { return Rows<const T>{view.data, view.stride}; };

  Step<T> ahead{r.pattern, r.edge, r.diagonal, width, columns, {}, {}, width, plan.tiling.fetch};
  ahead.dropout = dropout;
  ahead.first_column = first;
  ahead.teleport = static_cast<T>(r.teleport);
  Step<T> back = ahead;
  back.pattern = transpose;
  back.edge = t_edge;
  const Rows<T> result{x_gradient + first, d};
  if (r.teleport != 0) {
    ahead.start = {x + first, d};
    back.sum = result;
    for (int64_t i = rows.begin; i < rows.end; ++i)
      for (int64_t c = 0; c < columns; ++c) result.row(i)[c] = back.teleport * g[i * d + first + c];
  }
  const auto advance = [&](int64_t k, Rows<T> target) {  // z_k -> z_{k+1}
    ahead.source = constant(state(k));
    ahead.target = target;
    ahead.mask_step = k + 1;
    step_rows(ahead, rows);
  };
  const auto begin_segment = [&](int64_t k) {
    if (k == 0)
      pack_rows<T>({x + first, d}, columns, width, dropout, 0, first, state(0), rows);
    else
      pack_rows(constant(checkpoint(k)), width, width, none, 0, first, state(k), rows);
  };
  const auto retreat = [&](int64_t k, Rows<T> target) {  // g_{k+1} -> g_k
    back.source = constant(gradient(k));
    back.target = target;
    back.mask_step = k;
    step_rows(back, rows);
  };

  begin_segment(0);
  if (!crew.wait()) return;
  for (int64_t k = 0; k + 1 < r.steps; ++k) {
    if ((k + 1) % plan.length == 0) {
      advance(k, checkpoint(k + 1));
      begin_segment(k + 1);
    } else {
      advance(k, state(k + 1));
    }
    if (!crew.wait()) return;
  }
  pack_rows<T>({g + first, d}, columns, width, none, 0, first, gradient(r.steps - 1), rows);
  for (int64_t segment = plan.segments - 1; segment >= 0; --segment) {
    const int64_t begin = segment * plan.length, end = std::min(r.steps, begin + plan.length);
    if (segment + 1 < plan.segments) {
      begin_segment(begin);
      if (!crew.wait()) return;
      for (int64_t k = begin; k + 1 < end; ++k) {
        advance(k, state(k + 1));
        if (!crew.wait()) return;
      }
    } else if (!crew.wait()) {
      return;
    }
    for (int64_t k = end - 1; k > begin; --k) {
      retreat(k, gradient(k - 1));
      if (!crew.wait()) return;
    }
    dot_rows(r.pattern, (end - begin) * width, constant(gradient(begin)), constant(state(begin)), rows, true,
             edge_gradient, diagonal_gradient);
    if (!crew.wait()) return;
    back.last = begin == 0;
    back.stored = begin == 0 ? columns : width;
    retreat(begin, begin == 0 ? result : gradient(begin - 1));
    if (!crew.wait()) return;
  }
}

// out = the sum of the groups' parts.
template <class T>
KANTOR_SIMD void add_parts(int64_t groups, int64_t size, const T* __restrict parts, Range range, T* __restrict out) {
  for (int64_t e = range.begin; e < range.end; ++e) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group) sum += double(parts[group * size + e]);
    out[e] = static_cast<T>(sum);
  }
}

}  // namespace

template <class T>
int64_t propagate_gradients_workspace_cpu(const Exec& exec, const Recurrence<T>& r, int64_t d) {
  if (r.pattern.n == 0 || d == 0 || r.steps == 0) return 0;
  const Plan plan = plan_of(exec, r, d);
  return plan.tiling.crews * plan.tile_size + plan.groups * (r.pattern.nnz + r.pattern.n);
}

template <class T>
bool propagate_gradients_cpu(const Exec& exec, const Recurrence<T>& r, const Pattern& transpose, const T* t_edge,
                             int64_t d, const T* x, const T* g, T* edge_gradient, T* diagonal_gradient, T* x_gradient,
                             T* workspace, const std::function<bool()>& interrupted) {
  const int64_t n = r.pattern.n, nnz = r.pattern.nnz;
  if (n == 0 || d == 0 || r.steps == 0) {
    std::copy_n(g, n * d, x_gradient);
    std::fill_n(edge_gradient, nnz, T(0));
    std::fill_n(diagonal_gradient, n, T(0));
    return true;
  }
  const Plan plan = plan_of(exec, r, d);
  const int64_t size = propagate_gradients_workspace_cpu(exec, r, d), tiles = plan.tiling.count(d);
  advise_huge_pages(workspace, static_cast<size_t>(size) * sizeof(T));
  advise_huge_pages(x_gradient, static_cast<size_t>(n * d) * sizeof(T));
  T* const edge_parts = workspace + plan.tiling.crews * plan.tile_size;
  T* const diagonal_parts = edge_parts + plan.groups * nnz;
  const bool finished = for_each_item(plan.tiling, plan.groups, interrupted, [&](Crew& crew, int index, int64_t group) {
    T *const edge_part = edge_parts + group * nnz, *const diagonal_part = diagonal_parts + group * n;
    const Range rows = rows_of(r.pattern, crew.worker, crew.workers);
    std::fill(edge_part + r.pattern.rowptr[rows.begin], edge_part + r.pattern.rowptr[rows.end], T(0));
    std::fill(diagonal_part + rows.begin, diagonal_part + rows.end, T(0));
    const Range mine = share(tiles, static_cast<int>(group), static_cast<int>(plan.groups));
    for (int64_t tile = mine.begin; tile < mine.end; ++tile)
      gradients_of_tile(crew, r, transpose, t_edge, plan, d, tile * plan.tiling.width, x, g, edge_part, diagonal_part,
                        x_gradient, workspace + index * plan.tile_size);
  });
  if (!finished) return false;
  const auto reduce = [&](int64_t count, const T* parts, T* out) {
    const Chunks chunks{count};
    parallel_for(threads_for(exec.threads, count * plan.groups), chunks.count(),
                 [&](int64_t chunk) { add_parts(plan.groups, count, parts, chunks.range(chunk), out); });
  };
  reduce(nnz, edge_parts, edge_gradient);
  reduce(n, diagonal_parts, diagonal_gradient);
  return true;
}

#define KANTOR_INSTANTIATE(T)                                                                                 \
  template int64_t propagate_gradients_workspace_cpu(const Exec&, const Recurrence<T>&, int64_t);             \
  template bool propagate_gradients_cpu(const Exec&, const Recurrence<T>&, const Pattern&, const T*, int64_t, \
                                        const T*, const T*, T*, T*, T*, T*, const std::function<bool()>&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
