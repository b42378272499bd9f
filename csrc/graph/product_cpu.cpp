#include "graph/step_rows.h"

namespace kantor {

// Every worker has its own rows, and takes them one tile of columns after the other. The last tile is moved back where
// fewer columns are left than it has: some are then computed twice, by the same worker, to the same bits.
template <class T>
void product_cpu(const Exec& exec, const Pattern& pattern, const T* weight, int64_t d, const T* x, T* y) {
  if (pattern.n == 0 || d == 0) return;
  const int64_t widest = std::min(max_width<T>, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(d))));
  const Fetch fetch = fetch_for(pattern, widest * static_cast<int64_t>(sizeof(T)));
  advise_huge_pages(y, static_cast<size_t>(pattern.n * d) * sizeof(T));
  const int threads = threads_for(exec.threads, (pattern.nnz + pattern.n) * d);
  parallel_region(threads, [&](int worker, int workers) {
    const Range rows = rows_of(pattern, worker, workers);
    for (int64_t first = 0; first < d;) {
      const int64_t width = std::min(widest, width_for<T>(d - first));
      const int64_t begin = std::min(first, d - width);
      Step<T> step{pattern, weight, nullptr, width, width, {x + begin, d}, {y + begin, d}, width};
      step.fetch = fetch;
      step_rows(step, rows);
      first = begin + width;
    }
  });
}

template <class T>
void edge_dot_cpu(const Exec& exec, const Pattern& pattern, int64_t d, const T* a, const T* b, T* out) {
  const int threads = threads_for(exec.threads, (pattern.nnz + pattern.n) * d);
  parallel_region(threads, [&](int worker, int workers) {
    const Range rows = rows_of(pattern, worker, workers);
    dot_rows<T>(pattern, d, {a, d}, {b, d}, rows, false, out, nullptr);
  });
}

template <class T>
void dropout_mask_cpu(const Exec& exec, int64_t first_row, int64_t n, int64_t d, int64_t step, double dropout,
                      uint64_t seed, T* mask) {
  const Dropout<T> factors(dropout, seed, first_row);
  parallel_region(threads_for(exec.threads, n * d), [&](int worker, int workers) {
    const Range rows = share(n, worker, workers);
    for (int64_t first = 0; first < d; first += max_width<T>) {
      const int64_t columns = std::min(max_width<T>, d - first);
      mask_rows(factors, step, first, width_for<T>(columns), {mask + first, d}, columns, rows);
    }
  });
}

#define KANTOR_INSTANTIATE(T)                                                               \
  template void product_cpu(const Exec&, const Pattern&, const T*, int64_t, const T*, T*);  \
  template void edge_dot_cpu(const Exec&, const Pattern&, int64_t, const T*, const T*, T*); \
  template void dropout_mask_cpu(const Exec&, int64_t, int64_t, int64_t, int64_t, double, uint64_t, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
