// Derivatives of the recurrence on CUDA. States z_k = m_k x_k are computed anew, from a checkpoint every ~sqrt(K)
// steps, and on their way back meet the gradients g_{k+1}, one tile of columns after the other. A step goes forward
// twice and backward once, and reads two rows for each entry once more for the products.
#include <algorithm>
#include <cmath>

#include "graph/propagate_kernels.h"

namespace kantor {
namespace {

// Where the states of a tile of `columns` columns are. The tile is so wide that all of it takes 3 n d elements, as long
// as that leaves four columns.
template <class T>
struct Checkpoints {
  int64_t n, steps, length, segments, buffers, columns;

  Checkpoints(const Recurrence<T>& r, int64_t d) : n(r.pattern.n), steps(r.steps) {
    length = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(steps)))));
    segments = (steps + length - 1) / length;
    buffers = segments + length - 1 + 2 + (r.teleport != 0 ? 1 : 0);
    columns = std::min(d, 3 * d / buffers);
    columns = columns >= 8 ? columns / 8 * 8 : std::min<int64_t>(d, 4);
  }
  int64_t elements() const { return n * columns * buffers; }
  Rows<T> buffer(T* workspace, int64_t number) const { return {workspace + number * n * columns, columns}; }
  Rows<T> state(T* workspace, int64_t k) const {
    return buffer(workspace, k % length == 0 ? k / length : segments + k % length - 1);
  }
  Rows<T> gradient(T* workspace, int64_t k) const { return buffer(workspace, segments + length - 1 + k % 2); }
  Rows<T> sum(T* workspace) const { return buffer(workspace, segments + length + 1); }
};

template <class T>
Rows<const T> reading(Rows<T> rows) {
  return {rows.data, rows.stride};
}

}  // namespace

template <class T>
int64_t propagate_gradients_workspace_cuda(const Exec&, const Recurrence<T>& r, int64_t d) {
  return r.steps == 0 ? 0 : Checkpoints<T>(r, d).elements();
}

template <class T>
void propagate_gradients_cuda(const Exec& exec, const Recurrence<T>& r, const Pattern& transpose, const T* t_edge,
                              int64_t d, const T* x, const T* g, T* edge_gradient, T* diagonal_gradient, T* x_gradient,
                              T* workspace) {
  const int64_t n = r.pattern.n, steps = r.steps;
  const simt::DeviceGuard guard(exec.device);
  if (n * d == 0 || steps == 0) {
    simt::memset_async(edge_gradient, 0, static_cast<size_t>(r.pattern.nnz) * sizeof(T), exec.stream);
    simt::memset_async(diagonal_gradient, 0, static_cast<size_t>(n) * sizeof(T), exec.stream);
    if (n * d > 0) launch_drop<T>(exec, n, d, 0, {}, 0, {g, d}, {x_gradient, d});
    return;
  }
  const Checkpoints<T> at(r, d);
  const Dropout<T> dropout(r.dropout, r.seed);
  const auto state = [&](int64_t k) { return at.state(workspace, k); };
  for (int64_t column = 0; column < d; column += at.columns) {
    const int64_t columns = std::min(at.columns, d - column);
    Step<T> forward = make_step(r, dropout, columns), backward = forward;
    forward.first_column = backward.first_column = column;
    forward.start = {x + column, d};
    backward.adjoint = true;
    backward.pattern = transpose, backward.edge = t_edge;
    EdgeDot<T> dots;
    dots.pattern = r.pattern, dots.columns = columns;
    dots.edge = edge_gradient, dots.diagonal = diagonal_gradient;

    // z_{k+1} from z_k
    const auto advance = [&](int64_t k) {
      forward.in = reading(state(k)), forward.out = state(k + 1);
      forward.mask_step = dropout.active() ? k + 1 : -1;
      launch_step(exec, forward);
    };
    launch_drop<T>(exec, n, columns, column, dropout, 0, {x + column, d}, state(0));
    for (int64_t k = 0; k < (at.segments - 1) * at.length; ++k) advance(k);

    Rows<const T> gradient{g + column, d};
    for (int64_t segment = at.segments - 1; segment >= 0; --segment) {
      const int64_t first = segment * at.length, last = std::min(first + at.length, steps) - 1;
      for (int64_t k = first; k < last; ++k) advance(k);
      for (int64_t k = last; k >= first; --k) {
        dots.a = gradient, dots.b = reading(state(k));
        dots.add = column > 0 || k + 1 < steps;
        launch_edge_dot(exec, dots);
        backward.in = gradient;
        backward.out = k == 0 ? Rows<T>{x_gradient + column, d} : at.gradient(workspace, k);
        backward.mask_step = dropout.active() ? k : -1;
        if (r.teleport != 0) {
          backward.earlier = k + 1 < steps ? reading(at.sum(workspace)) : Rows<const T>{};
          backward.later = k > 0 ? at.sum(workspace) : Rows<T>{};
        }
        launch_step(exec, backward);
        gradient = reading(backward.out);
      }
    }
  }
}

#define KANTOR_INSTANTIATE(T)                                                                                  \
  template int64_t propagate_gradients_workspace_cuda(const Exec&, const Recurrence<T>&, int64_t);             \
  template void propagate_gradients_cuda(const Exec&, const Recurrence<T>&, const Pattern&, const T*, int64_t, \
                                         const T*, const T*, T*, T*, T*, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
