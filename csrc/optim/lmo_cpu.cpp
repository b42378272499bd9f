#include "optim/lmo.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "core/reduce.h"

namespace kantor {
namespace {

constexpr int sum_count = 3;  // of the second pass

template <class T>
KANTOR_ALWAYS_INLINE void store8(Double8 values, T* target) {
  typedef T T8 __attribute__((vector_size(8 * sizeof(T))));
  const T8 narrow = __builtin_convertvector(values, T8);
  std::memcpy(target, &narrow, sizeof narrow);
}
KANTOR_ALWAYS_INLINE Double8 magnitude(Double8 v) { return v < 0.0 ? -v : v; }
KANTOR_ALWAYS_INLINE double magnitude(double v) { return std::fabs(v); }
KANTOR_ALWAYS_INLINE Double8 sign_of(Double8 v) {
  return (v > 0.0 ? Double8{} + 1.0 : Double8{}) - (v < 0.0 ? Double8{} + 1.0 : Double8{});
}
KANTOR_ALWAYS_INLINE double sign_of(double v) { return (v > 0) - (v < 0); }

// Not finite exactly when an element is not.
template <class T>
KANTOR_SIMD double absolute_sum(int64_t n, const T* x) {
  return lane_sum(
      n, [&](int64_t i) KANTOR_INLINE_LAMBDA { return magnitude(load8(x + i)); },
      [&](int64_t i) KANTOR_INLINE_LAMBDA { return magnitude(double(x[i])); });
}

// The eight elements at i, or one: the same arithmetic for both.
template <class V>
KANTOR_ALWAYS_INLINE V load(const float* p) {
  if constexpr (sizeof(V) == sizeof(double))
    return *p;
  else
    return load8(p);
}
template <class V>
KANTOR_ALWAYS_INLINE V load(const double* p) {
  if constexpr (sizeof(V) == sizeof(double))
    return *p;
  else
    return load8(p);
}
template <class T>
KANTOR_ALWAYS_INLINE void store(double v, T* p) {
  *p = static_cast<T>(v);
}
template <class T>
KANTOR_ALWAYS_INLINE void store(Double8 v, T* p) {
  store8(v, p);
}

template <class V, class T>
KANTOR_ALWAYS_INLINE void momentum_at(const MomentumItem<T>& item, int64_t i, double beta, double lead, bool difference,
                                      bool keep, V* sums) {
  const V g = load<V>(item.grad + i);
  V b = beta * load<V>(item.momentum + i) + (1 - beta) * g;
  store(b, item.momentum + i);
  b = load<V>(item.momentum + i);  // as rounded
  if (item.input != item.momentum) {
    b = lead * b + (1 - lead) * g;
    store(b, item.input + i);
  }
  sums[2] += b * b;
  if (difference) {
    const V d = g - load<V>(item.previous + i);
    if (item.difference) store(d, item.difference + i);
    sums[0] += d * d;
    sums[1] += magnitude(d);
  }
  if (keep) store(g, item.previous + i);
}

template <class T>
KANTOR_SIMD void momentum_chunk(const MomentumItem<T>& item, bool first, Range range, double* sums) {
  const double beta = first ? 0.0 : item.beta;
  const double lead = item.flags & nesterov ? item.beta : 1.0;
  const bool given = item.flags & previous_is_given;
  const bool difference = item.previous && (item.flags & measure) && (given || !first);
  const bool keep = item.previous && !given && (first || (item.flags & keep_gradient));
  Double8 lanes[sum_count] = {};
  double tail[sum_count] = {};
  int64_t i = range.begin;
  for (; i + 8 <= range.end; i += 8) momentum_at(item, i, beta, lead, difference, keep, lanes);
  for (; i < range.end; ++i) momentum_at(item, i, beta, lead, difference, keep, tail);
  const Double8 none{};
  for (int s = 0; s < sum_count; ++s) sums[s] = horizontal_sum(lanes[s], none, none, none) + tail[s];
  if (!difference && item.difference)
    for (i = range.begin; i < range.end; ++i) item.difference[i] = 0;
}

template <class T>
KANTOR_SIMD void apply_chunk(const ApplyItem<T>& item, Range range, double rate, double decay) {
  int64_t i = range.begin;
  if (item.sign) {
    for (; i + 8 <= range.end; i += 8)
      store8(decay * load8(item.X + i) - rate * sign_of(load8(item.direction + i)), item.X + i);
    for (; i < range.end; ++i)
      item.X[i] = static_cast<T>(decay * double(item.X[i]) - rate * sign_of(double(item.direction[i])));
    return;
  }
  for (; i + 8 <= range.end; i += 8) store8(decay * load8(item.X + i) - rate * load8(item.direction + i), item.X + i);
  for (; i < range.end; ++i) item.X[i] = static_cast<T>(decay * double(item.X[i]) - rate * double(item.direction[i]));
}

// The chunks of all tensors, one after the other.
struct Piece {
  int64_t item, chunk;
};
template <class Item>
std::vector<Piece> pieces_of(std::span<const Item> items) {
  std::vector<Piece> pieces;
  for (size_t k = 0; k < items.size(); ++k)
    for (int64_t chunk = 0; chunk < Chunks{items[k].n}.count(); ++chunk)
      pieces.push_back({static_cast<int64_t>(k), chunk});
  return pieces;
}
int threads_of(const Exec& exec, const std::vector<Piece>& pieces) {
  return threads_for(exec.threads, static_cast<int64_t>(pieces.size()) * chunk_size);
}

// column of sums[k] = the sum over the chunks of item k of partial[piece * stride].
template <class T>
void add_up(std::span<const MomentumItem<T>> items, const double* partial, int64_t columns, int64_t first_column,
            double* sums) {
  std::vector<double> values;
  int64_t at = 0;
  for (size_t k = 0; k < items.size(); ++k) {
    const int64_t count = Chunks{items[k].n}.count();
    values.resize(static_cast<size_t>(count));
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = partial[(at + i) * columns + c];
      sums[4 * k + static_cast<size_t>(first_column + c)] = tree_sum(values.data(), count);
    }
    at += count;
  }
}

}  // namespace

template <class T>
void momentum_cpu(const Exec& exec, std::span<const MomentumItem<T>> items, const double* accepted, double* sums,
                  double* work) {
  const std::vector<Piece> pieces = pieces_of(items);
  const int threads = threads_of(exec, pieces);
  const int64_t count = static_cast<int64_t>(pieces.size());
  parallel_for(threads, count, [&](int64_t p) {
    const auto& item = items[static_cast<size_t>(pieces[static_cast<size_t>(p)].item)];
    const Range range = Chunks{item.n}.range(pieces[static_cast<size_t>(p)].chunk);
    work[p] = absolute_sum(range.size(), item.grad + range.begin);
  });
  add_up(items, work, 1, 0, sums);
  parallel_for(threads, count, [&](int64_t p) {
    const Piece piece = pieces[static_cast<size_t>(p)];
    const auto& item = items[static_cast<size_t>(piece.item)];
    const Range range = Chunks{item.n}.range(piece.chunk);
    double* const mine = work + sum_count * p;
    mine[0] = mine[1] = mine[2] = 0;
    if (const double mark = sums[4 * piece.item]; std::isfinite(mark) && mark > 0) {
      momentum_chunk(item, accepted[piece.item] == 0, range, mine);
      return;
    }
    if (item.difference) std::fill(item.difference + range.begin, item.difference + range.end, T(0));
    if (item.input != item.momentum) std::fill(item.input + range.begin, item.input + range.end, T(0));
  });
  add_up(items, work, sum_count, 1, sums);
}

template <class T>
void apply_cpu(const Exec& exec, std::span<const ApplyItem<T>> items, const double* rates, const double* decays) {
  const std::vector<Piece> pieces = pieces_of(items);
  parallel_for(threads_of(exec, pieces), static_cast<int64_t>(pieces.size()), [&](int64_t p) {
    const Piece piece = pieces[static_cast<size_t>(p)];
    const auto& item = items[static_cast<size_t>(piece.item)];
    if (rates[piece.item] != 0)
      apply_chunk(item, Chunks{item.n}.range(piece.chunk), rates[piece.item], decays[piece.item]);
  });
}

#define KANTOR_INSTANTIATE(T)                                                                                 \
  template void momentum_cpu(const Exec&, std::span<const MomentumItem<T>>, const double*, double*, double*); \
  template void apply_cpu(const Exec&, std::span<const ApplyItem<T>>, const double*, const double*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
