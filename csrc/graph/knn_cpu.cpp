// Exact nearest neighbours on the CPU: scores of all pairs as a blocked matrix product whose tiles never leave the
// registers, a running threshold for each point, and a last word in double precision.
//
// Points are moved by their mean, scaled by a power of two to at most about 1, and packed; p_i are the packed points,
// s_i = |p_i|^2. In exact arithmetic |p_i - p_j|^2 = s_i - 2 (p_i . p_j - s_j / 2): the larger the score, the nearer.
// Selecting by computed scores must lose nobody. With u the unit roundoff of T and g = m u / (1 - m u), m = 3 d + 16,
// the score S_ij = s_j (g - 1/2) + p_i . p_j, as computed in any order, with or without fused operations, has
//     S_ij >= t_ij - e_i   and   S_ij - 2 g s_j <= t_ij + e_i,   e_i = g s_i + tiny,
// where t_ij = (s_i - D_ij) / 2 and D_ij is the scaled squared_distance of the points as they were given. In units of u
// s_j: d + 1 for the product (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1, with
// |p_i| |p_j| <= (s_i + s_j) / 2), d / 2 for s_j, 2 for what rounding p_i and p_j changed, d + 3 for rounding in D_ij,
// and some more for the roundings of this file; `tiny` is for underflow. Hence: if k candidates have S_ij - 2 g s_j >=
// t, then no point with S_ij < t - 2 e_i is among the k nearest.
#include "graph/knn.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "core/simd.h"
#include "graph/knn_scan.h"
#include "graph/knn_selection.h"

namespace kantor {
namespace {

// Sizes. Nothing of the result depends on them.
template <class T>
struct Plan {
  int64_t n, d, k;
  int workers;
  int64_t panels, panel_stride;  // a panel is (d, width): coordinates of `width` points
  int64_t block;                 // points that share a pass over all panels
  int64_t columns;               // taken at once, so that a piece of a panel stays in the first-level cache
  int64_t limit;                 // candidates a list holds before it is shortened
  static constexpr int width = knn_panel_width<T>;

  Plan(int64_t n, int64_t d, int64_t k, int threads) : n(n), d(d), k(k) {
    const auto whole = [](int64_t rows) { return std::max<int64_t>(width, rows / width * width); };
    panels = (n + width - 1) / width;
    panel_stride = d * width;
    limit = k + std::max<int64_t>(k, 32);
    const int64_t cached = std::min<int64_t>((512 << 10) / (d * sizeof(T)), (256 << 10) / (capacity() * 8));
    block = whole(std::min({int64_t{256}, cached, n / (4 * std::max(threads, 1))}));
    workers = static_cast<int>(std::min<int64_t>(threads_for(threads, n * n), blocks()));
    const int64_t pieces = (d + 255) / 256;
    columns = (d + pieces - 1) / pieces;
  }
  int64_t blocks() const { return (n + block - 1) / block; }
  int64_t capacity() const { return (limit + width + 15) / 16 * 16; }
};

// What a worker keeps of its block of points.
template <class T>
struct Lists {
  T *partial, *threshold, *score, *lower;
  int32_t *count, *index;
  Ranked<T>* ranked;
};

// The workspace, cut up; from address 0, how much it takes.
template <class T>
struct Workspace {
  uintptr_t begin = 0;
  int64_t used = 0;

  template <class Element>
  Element* take(int64_t count) {
    Element* address = reinterpret_cast<Element*>(begin + used);
    used += (count * sizeof(Element) + 63) / 64 * 64;
    return address;
  }
  T* take_packed(const Plan<T>& plan) { return take<T>(plan.panels * plan.panel_stride); }
  T* take_starts(const Plan<T>& plan) { return take<T>(plan.panels * plan.width); }
  // Of each worker: the sums of its coordinates, and the largest magnitude.
  double* take_sums(const Plan<T>& plan) { return take<double>(plan.workers * (plan.d + 1)); }
  Lists<T> take_lists(const Plan<T>& plan) {
    const int64_t rows = plan.block, places = plan.capacity();
    Lists<T> lists;
    lists.partial = take<T>(rows * plan.width);
    lists.threshold = take<T>(rows);
    lists.count = take<int32_t>(rows);
    lists.score = take<T>(rows * places);
    lists.index = take<int32_t>(rows * places);
    lists.lower = take<T>(places);
    lists.ranked = take<Ranked<T>>(places);
    return lists;
  }
};

// sums += rows, largest = max |x|, of what is finite.
template <class T>
KANTOR_SIMD void add_rows(int64_t rows, int64_t d, const T* x, double* sums, double* largest) {
  for (int64_t i = 0; i < rows; ++i, x += d) {
    T most = 0;
    for (int64_t c = 0; c < d; ++c) {
      const T value = std::abs(x[c]) <= std::numeric_limits<T>::max() ? x[c] : T(0);
      sums[c] += static_cast<double>(value);
      most = std::abs(value) > most ? std::abs(value) : most;
    }
    *largest = std::max(*largest, static_cast<double>(most));
  }
}

template <class T>
class Search {
 public:
  Search(const Plan<T>& plan, const T* x, int32_t* index, T* distance, Workspace<T>& workspace)
      : plan_(plan),
        x_(x),
        index_(index),
        distance_(distance),
        packed_(workspace.take_packed(plan)),
        starts_(workspace.take_starts(plan)) {
    const double m = 3.0 * plan.d + 16, u = std::numeric_limits<T>::epsilon() / 2;
    g_ = m * u / (1 - m * u);
    tiny_ = (plan.d + 2) * static_cast<double>(std::numeric_limits<T>::min());
    advise_huge_pages(packed_, plan.panels * plan.panel_stride * sizeof(T));
  }

  // Reads x twice, writes the packed copy. `sums` as Workspace::take_sums.
  void pack(double* sums) {
    const int64_t d = plan_.d;
    std::fill(sums, sums + plan_.workers * (d + 1), 0.0);
    parallel_region(plan_.workers, [&](int worker, int workers) {
      const Range rows = share(plan_.n, worker, workers);
      double* mine = sums + worker * (d + 1);
      add_rows(rows.size(), d, x_ + rows.begin * d, mine, mine + d);
    });
    for (int worker = 1; worker < plan_.workers; ++worker) {
      const double* other = sums + worker * (d + 1);
      for (int64_t c = 0; c < d; ++c) sums[c] += other[c];
      sums[d] = std::max(sums[d], other[d]);
    }
    int exponent = 0;
    (void)std::frexp(sums[d], &exponent);
    scale_ = std::ldexp(1.0, std::min(-exponent, 1000));
    for (int64_t c = 0; c < d; ++c) sums[c] = sums[c] / static_cast<double>(plan_.n) * scale_;
    parallel_for(plan_.workers, plan_.panels, [&](int64_t panel) { pack_panel(panel, sums); });
  }

  // The neighbours of one block of points; `stop` is asked between panels.
  template <class Stop>
  void search(int64_t block, KnnScanFunction<T> scan_columns, const Lists<T>& lists, Stop&& stop) {
    constexpr int width = plan_.width;
    const int64_t first = block * plan_.block, rows = std::min(plan_.block, plan_.n - first);
    KnnScan<T> scan{};
    scan.panel_stride = plan_.panel_stride;
    scan.rows = (rows + width - 1) / width * width;
    scan.partial = lists.partial;
    scan.threshold = lists.threshold, scan.count = lists.count;
    scan.score = lists.score, scan.index = lists.index, scan.capacity = plan_.capacity();
    scan.limit = static_cast<int32_t>(plan_.limit);
    std::fill(lists.count, lists.count + scan.rows, 0);
    std::fill(lists.threshold, lists.threshold + rows, std::numeric_limits<T>::lowest());
    std::fill(lists.threshold + rows, lists.threshold + scan.rows, std::numeric_limits<T>::infinity());
    const int64_t own = first / width;
    for (int64_t step = 0; step < plan_.panels; ++step) {
      if (step % 64 == 0 && stop()) return;
      const int64_t panel = (own + step) % plan_.panels;  // where points are sorted, the near ones come first
      if (panel == 0) reopen(first, rows, lists);
      scan.first_candidate = static_cast<int32_t>(panel * width);
      scan.start = starts_ + panel * width;
      bool some_long = false;
      for (int64_t c = 0; c < plan_.d; c += scan.columns) {
        scan.columns = std::min(plan_.columns, plan_.d - c);
        scan.first = c == 0, scan.last = c + scan.columns == plan_.d;
        scan.points = packed_ + own * plan_.panel_stride + c * width;
        scan.panel = packed_ + panel * plan_.panel_stride + c * width;
        some_long = scan_columns(scan);
      }
      for (int64_t row = 0; some_long && row < rows; ++row)
        if (lists.count[row] > plan_.limit) shorten(first + row, row, lists, scan.first_candidate + width);
    }
    reopen(first, rows, lists);
    for (int64_t row = 0; row < rows; ++row) finish(first + row, row, lists);
  }

 private:
  // A missing point has the score -infinity.
  void pack_panel(int64_t panel, const double* mean) {
    constexpr int width = plan_.width;
    T* coordinates = packed_ + panel * plan_.panel_stride;
    for (int lane = 0; lane < width; ++lane) {
      const int64_t i = panel * width + lane;
      double square = 0;
      for (int64_t c = 0; c < plan_.d; ++c) {
        const T coordinate =
            i < plan_.n ? static_cast<T>(static_cast<double>(x_[i * plan_.d + c]) * scale_ - mean[c]) : T(0);
        coordinates[c * width + lane] = coordinate;
        square += static_cast<double>(coordinate) * static_cast<double>(coordinate);
      }
      starts_[i] = i < plan_.n ? static_cast<T>((g_ - 0.5) * square) : -std::numeric_limits<T>::infinity();
    }
  }

  double square(int64_t i) const { return starts_[i] / (g_ - 0.5); }

  // The largest T below `value`, and at least the lowest: a missing point is never reached.
  static T below(double value) {
    const double rounded = std::nextafter(static_cast<T>(value), -std::numeric_limits<T>::infinity());
    return static_cast<T>(std::max<double>(std::numeric_limits<T>::lowest(), rounded));
  }

  // The threshold of point i while its k-th nearest is so far away, or nearer.
  T threshold_for(int64_t i, double distance) const {
    const double slack = 2 * (g_ * square(i) + tiny_);
    return below((square(i) - distance * distance * (1 + 1e-15)) / 2 - slack);
  }

  // Rows that were closed by `shorten`.
  void reopen(int64_t first, int64_t rows, const Lists<T>& lists) {
    for (int64_t row = 0; row < rows; ++row)
      if (lists.threshold[row] == closed) lists.threshold[row] = threshold_for(first + row, 0);
  }

  // Drops those that cannot be among the k nearest; where too many remain, rounding hides who is nearer, and all but
  // the k nearest by squared_distance go. Where these are duplicates of the point, with smaller indices than all to
  // come before the next `reopen`, from `upcoming` on, nobody else is wanted: of many duplicates few are ranked.
  void shorten(int64_t i, int64_t row, const Lists<T>& lists, int64_t upcoming) {
    T* score = lists.score + row * plan_.capacity();
    int32_t* index = lists.index + row * plan_.capacity();
    const int64_t count = lists.count[row];
    const double slack = 2 * (g_ * square(i) + tiny_);
    T& threshold = lists.threshold[row];
    lower_scores(count, score, index, starts_, static_cast<T>(2 * g_ / (0.5 - g_)), i, lists.lower);
    threshold = std::max(threshold, below(low_threshold(count, lists.lower, plan_.k) - slack));
    lists.count[row] = drop_below(count, threshold, i, score, index);
    if (lists.count[row] <= plan_.limit) return;
    rank(plan_.d, x_, i, lists.count[row], index, score, lists.ranked);
    std::nth_element(lists.ranked, lists.ranked + plan_.k - 1, lists.ranked + lists.count[row]);
    for (int64_t m = 0; m < plan_.k; ++m) index[m] = lists.ranked[m].index, score[m] = lists.ranked[m].score;
    lists.count[row] = static_cast<int32_t>(plan_.k);
    const Ranked<T>& worst = lists.ranked[plan_.k - 1];
    threshold = std::max(threshold, threshold_for(i, std::sqrt(worst.squared_distance) * scale_));
    if (worst.squared_distance == 0 && worst.index < upcoming) threshold = closed;
  }

  void finish(int64_t i, int64_t row, const Lists<T>& lists) {
    shorten(i, row, lists, 0);
    const int64_t count = lists.count[row];
    Ranked<T>* ranked = lists.ranked;
    const int64_t at = row * plan_.capacity();
    rank(plan_.d, x_, i, count, lists.index + at, lists.score + at, ranked);
    sort(ranked, ranked + count);
    int64_t found = 0;
    while (found < std::min(count, plan_.k) && ranked[found].squared_distance <= std::numeric_limits<double>::max())
      ++found;
    for (int64_t m = 0; m < plan_.k; ++m) {
      index_[i * plan_.k + m] = m < found ? ranked[m].index : -1;
      distance_[i * plan_.k + m] =
          m < found ? static_cast<T>(std::sqrt(ranked[m].squared_distance)) : std::numeric_limits<T>::quiet_NaN();
    }
  }

  static constexpr T closed = std::numeric_limits<T>::infinity();  // a threshold that no score reaches

  const Plan<T>& plan_;
  const T* x_;
  int32_t* index_;
  T* distance_;
  T *packed_, *starts_;  // starts_: s_j (g - 1/2)
  double g_, tiny_, scale_ = 1;
};

template <class T>
KnnScanFunction<T> scan_function([[maybe_unused]] int widest) {
#if defined(__x86_64__) && !defined(KANTOR_NO_SIMD)
  if (widest >= 512 && __builtin_cpu_supports("x86-64-v4")) return knn_scan_avx512<T>();
  if (widest >= 256 && __builtin_cpu_supports("x86-64-v3")) return knn_scan_avx2<T>();
#endif
  return knn_scan_plain<T>();
}

}  // namespace

template <class T>
int64_t knn_workspace_bytes_cpu(int64_t n, int64_t d, int64_t k, int threads) {
  const Plan<T> plan(n, d, k, threads);
  Workspace<T> workspace;
  workspace.take_packed(plan);
  workspace.take_starts(plan);
  workspace.take_sums(plan);
  for (int worker = 0; worker < plan.workers; ++worker) workspace.take_lists(plan);
  return workspace.used;
}

template <class T>
bool knn_cpu(const Exec& exec, int64_t n, int64_t d, const T* x, int64_t k, int32_t* index, T* distance,
             void* workspace, const std::function<bool()>& interrupted, int widest) {
  const Plan<T> plan(n, d, k, exec.threads);
  Workspace<T> space{reinterpret_cast<uintptr_t>(workspace)};
  Search<T> search(plan, x, index, distance, space);
  search.pack(space.take_sums(plan));
  std::vector<Lists<T>> lists;
  for (int worker = 0; worker < plan.workers; ++worker) lists.push_back(space.take_lists(plan));
  std::atomic<int64_t> next{0};
  std::atomic<bool> stopped{false};
  std::exception_ptr error;
  parallel_region(plan.workers, [&](int worker, int) {
    const auto stop = [&] {
      try {
        if (worker == 0 && interrupted()) stopped = true;
      } catch (...) {
        error = std::current_exception();
        stopped = true;
      }
      return stopped.load(std::memory_order_relaxed);
    };
    while (!stopped) {
      const int64_t block = next++;
      if (block >= plan.blocks()) break;
      search.search(block, scan_function<T>(widest), lists[worker], stop);
    }
  });
  if (error) std::rethrow_exception(error);
  return !stopped;
}

template int64_t knn_workspace_bytes_cpu<float>(int64_t, int64_t, int64_t, int);
template int64_t knn_workspace_bytes_cpu<double>(int64_t, int64_t, int64_t, int);
template bool knn_cpu(const Exec&, int64_t, int64_t, const float*, int64_t, int32_t*, float*, void*,
                      const std::function<bool()>&, int);
template bool knn_cpu(const Exec&, int64_t, int64_t, const double*, int64_t, int32_t*, double*, void*,
                      const std::function<bool()>&, int);

}  // namespace kantor
