// The recurrence on CUDA: one launch per step, from one buffer to another, or all steps in one launch where the graph
// is so small that a tile of columns fits into shared memory.
#include <algorithm>
#include <bit>

#include "graph/propagate_kernels.h"
#include "graph/resident_kernel.h"

namespace kantor {
namespace {

constexpr unsigned threads_per_block = 256;
// From so many lanes on a block takes many neighbouring rows, which find each other's rows of x in the first-level
// cache where the order of the nodes is local.
constexpr int64_t many_lanes = int64_t{1} << 20;
constexpr unsigned threads_of_large_block = 512;
constexpr int turns_of_large_block = 8;
// In one launch a tile is one block's. That pays where there are tiles enough to keep the device busy, or so few
// entries that launching would take longer.
constexpr int64_t enough_tiles = 64, few_entries = int64_t{1} << 15;
constexpr size_t resident_bytes = 200 << 10;
constexpr int64_t most_steps = int64_t{1} << 30;

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The least power of two, up to 32, that is not below `count`.
int lane_bits_for(int64_t count) {
  return std::min(5, static_cast<int>(std::bit_width(static_cast<uint64_t>(count - 1))));
}

// Whether 16-byte loads are possible.
template <class T>
bool is_aligned(Rows<T> rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * sizeof(T) % 16 == 0;
}

template <int width, int pieces, class T>
void launch_step_of(const Exec& exec, Step<T> s) {
  s.lane_bits = lane_bits_for(quotient_up(s.columns, width * pieces));
  s.column_blocks = quotient_up(s.columns, int64_t{width * pieces} << s.lane_bits);
  const int64_t items = s.pattern.n * s.column_blocks;
  const bool large = items << s.lane_bits >= many_lanes;
  const unsigned threads = large ? threads_of_large_block : threads_per_block;
  s.turns = large ? turns_of_large_block : 1;
  const unsigned grid = simt::blocks_for(items, (threads >> s.lane_bits) * static_cast<unsigned>(s.turns));
  if (s.mask_step >= 0)
    SIMT_LAUNCH((step_kernel<T, width, pieces, true>), grid, threads, 0, exec.stream, s);
  else
    SIMT_LAUNCH((step_kernel<T, width, pieces, false>), grid, threads, 0, exec.stream, s);
}

// The pieces of a tile of columns of which two states fit into shared memory, as a power of two; -1: launch step by
// step.
template <class T>
int resident_piece_bits(const Exec& exec, const Recurrence<T>& r, int64_t d) {
  const int64_t steps = r.steps, multiprocessors = simt::sm_count(exec.device);
  if (steps < 2 || steps > most_steps) return -1;
  const size_t limit = std::min(resident_bytes, simt::shared_bytes_limit(exec.device));
  int best = -1;
  int64_t least = 0;
  for (int bits = 0; bits <= 2; ++bits) {
    if (2 * 16 * (static_cast<uint64_t>(r.pattern.n) << bits) > limit) break;
    const int64_t tiles = quotient_up(d, int64_t{resident_width<T>} << bits);
    if (tiles < enough_tiles && (bits > 0 || r.pattern.nnz > few_entries)) break;
    // A tile reads the entries once and gathers its pieces; a multiprocessor has room for one.
    const int64_t time = quotient_up(tiles, multiprocessors) * (1 + (1 << bits));
    if (best < 0 || time < least) best = bits, least = time;
  }
  return best;
}

template <class T>
void launch_resident(const Exec& exec, const Recurrence<T>& r, int piece_bits, int64_t d, const T* x, T* y) {
  const Dropout<T> dropout(r.dropout, r.seed);
  const Resident<T> s{r, dropout, d, piece_bits, x, y};
  const auto tiles = static_cast<unsigned>(quotient_up(d, int64_t{resident_width<T>} << piece_bits));
  const int64_t items = r.pattern.n << piece_bits;
  const auto threads = static_cast<unsigned>(std::min<int64_t>(1024, quotient_up(items, 32) * 32));
  const size_t shared = 2 * 16 * static_cast<size_t>(items);
  if (dropout.active())
    SIMT_LAUNCH((resident_kernel<T, true>), tiles, threads, shared, exec.stream, s);
  else
    SIMT_LAUNCH((resident_kernel<T, false>), tiles, threads, shared, exec.stream, s);
}

}  // namespace

template <class T>
void launch_step(const Exec& exec, const Step<T>& s) {
  constexpr int width = 16 / sizeof(T);
  const bool aligned = s.columns % width == 0 && is_aligned(s.in) && is_aligned(s.out) && is_aligned(s.start) &&
                       is_aligned(s.earlier) && is_aligned(s.later);
  if (aligned) return launch_step_of<width, 1>(exec, s);
  if (s.columns <= 32) return launch_step_of<1, 1>(exec, s);
  launch_step_of<1, 4>(exec, s);
}

template <class T>
void launch_edge_dot(const Exec& exec, EdgeDot<T> s) {
  constexpr int width = 16 / sizeof(T);
  const bool aligned = s.columns % width == 0 && is_aligned(s.a) && is_aligned(s.b);
  // Few lanes an entry, each with several columns: fewer exchanges at the end.
  s.lane_bits = lane_bits_for(std::max<int64_t>(1, quotient_up(s.columns, 4 * (aligned ? width : 1))));
  const unsigned grid = simt::blocks_for(s.pattern.n * 32, threads_per_block);
  if (aligned)
    SIMT_LAUNCH((edge_dot_kernel<T, width>), grid, threads_per_block, 0, exec.stream, s);
  else
    SIMT_LAUNCH((edge_dot_kernel<T, 1>), grid, threads_per_block, 0, exec.stream, s);
}

template <class T>
void launch_drop(const Exec& exec, int64_t n, int64_t columns, int64_t first_column, const Dropout<T>& dropout,
                 int64_t step, Rows<const T> in, Rows<T> out) {
  const unsigned grid = simt::blocks_for(n * quotient_up(columns, 4), threads_per_block, 1u << 16);
  SIMT_LAUNCH(drop_kernel<T>, grid, threads_per_block, 0, exec.stream, n, columns, first_column, dropout, step, in,
              out);
}

template <class T>
void product_cuda(const Exec& exec, const Pattern& pattern, const T* weight, int64_t d, const T* x, T* y) {
  if (pattern.n * d == 0) return;
  const simt::DeviceGuard guard(exec.device);
  Step<T> s;
  s.pattern = pattern, s.edge = weight, s.columns = d;
  s.in = {x, d}, s.out = {y, d};
  launch_step(exec, s);
}

template <class T>
void edge_dot_cuda(const Exec& exec, const Pattern& pattern, int64_t d, const T* a, const T* b, T* out) {
  if (pattern.nnz == 0) return;
  const simt::DeviceGuard guard(exec.device);
  EdgeDot<T> s;
  s.pattern = pattern, s.columns = d;
  s.a = {a, d}, s.b = {b, d}, s.edge = out;
  launch_edge_dot(exec, s);
}

// One buffer to go to and fro between it and y, one for the adjoint's sum.
template <class T>
int64_t propagate_workspace_cuda(const Exec&, const Recurrence<T>& r, int64_t d) {
  const bool states = r.steps >= 2 || (r.steps == 1 && r.dropout > 0 && !r.adjoint);
  const bool sum = r.steps >= 2 && r.teleport != 0 && r.adjoint;
  return r.pattern.n * d * (int64_t{states} + int64_t{sum});
}

template <class T>
void propagate_cuda(const Exec& exec, const Recurrence<T>& r, int64_t d, const T* x, T* y, T* workspace) {
  const int64_t n = r.pattern.n, steps = r.steps;
  if (n * d == 0) return;
  const simt::DeviceGuard guard(exec.device);
  const Dropout<T> dropout(r.dropout, r.seed);
  if (steps == 0) return launch_drop<T>(exec, n, d, 0, {}, 0, {x, d}, {y, d});
  const int piece_bits = resident_piece_bits(exec, r, d);
  if (piece_bits >= 0) return launch_resident(exec, r, piece_bits, d, x, y);

  T* const buffers[2] = {y, workspace};  // the last launch writes y
  Step<T> s = make_step(r, dropout, d);
  s.in = {x, d};
  s.start = {x, d};
  if (dropout.active() && !r.adjoint) {
    launch_drop<T>(exec, n, d, 0, dropout, 0, {x, d}, {buffers[steps % 2], d});
    s.in = {buffers[steps % 2], d};
  }
  for (int64_t t = 0; t < steps; ++t) {
    const bool first = t == 0, last = t + 1 == steps;
    s.out = {buffers[(steps - 1 - t) % 2], d};
    s.mask_step = !dropout.active() || (last && !r.adjoint) ? -1 : r.adjoint ? steps - 1 - t : t + 1;
    if (r.adjoint && s.teleport != 0) {
      T* const sum = steps >= 2 ? workspace + n * d : nullptr;
      s.earlier = {first ? nullptr : sum, d};
      s.later = {last ? nullptr : sum, d};
    }
    launch_step(exec, s);
    s.in = {s.out.data, d};
  }
}

template <class T>
void dropout_mask_cuda(const Exec& exec, int64_t first_row, int64_t n, int64_t d, int64_t step, double p, uint64_t seed,
                       T* mask) {
  if (n * d == 0) return;
  const simt::DeviceGuard guard(exec.device);
  launch_drop<T>(exec, n, d, 0, Dropout<T>(p, seed, first_row), step, {}, {mask, d});
}

#define KANTOR_INSTANTIATE(T)                                                                                  \
  template void launch_step(const Exec&, const Step<T>&);                                                      \
  template void launch_edge_dot(const Exec&, EdgeDot<T>);                                                      \
  template void launch_drop(const Exec&, int64_t, int64_t, int64_t, const Dropout<T>&, int64_t, Rows<const T>, \
                            Rows<T>);                                                                          \
  template void product_cuda(const Exec&, const Pattern&, const T*, int64_t, const T*, T*);                    \
  template void edge_dot_cuda(const Exec&, const Pattern&, int64_t, const T*, const T*, T*);                   \
  template int64_t propagate_workspace_cuda(const Exec&, const Recurrence<T>&, int64_t);                       \
  template void propagate_cuda(const Exec&, const Recurrence<T>&, int64_t, const T*, T*, T*);                  \
  template void dropout_mask_cuda(const Exec&, int64_t, int64_t, int64_t, int64_t, double, uint64_t, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
