// One matrix a thread. The result of a matrix does not depend on the others, nor on the number of threads.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "core/parallel.h"
#include "core/reduce.h"
#include "linalg/msign.h"

namespace kantor {
namespace {

template <class T>
KANTOR_SIMD double sum_of_squares(int64_t n, const T* x) {
  return lane_sum(
      n,
      [&](int64_t i) KANTOR_INLINE_LAMBDA {
        const Double8 v = load8(x + i);
        return v * v;
      },
      [&](int64_t i) KANTOR_INLINE_LAMBDA { return double(x[i]) * double(x[i]); });
}

template <class T>
MsignFunction<T> best_msign() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return msign_avx512<T>();
  if (__builtin_cpu_supports("x86-64-v3")) return msign_avx2<T>();
#endif
  return msign_plain<T>();
}

// Elements of two copies of X, its transpose and two (rows, rows) matrices, rows padded to 64 bytes.
int64_t work_elements(int64_t rows, int64_t columns) {
  const auto padded = [](int64_t n) { return (n + 15) / 16 * 16; };
  return 2 * rows * padded(columns) + (columns + 2 * rows) * padded(rows);
}

}  // namespace

template <class T>
void msign_cpu(const Exec& exec, int64_t count, int64_t rows, int64_t columns, const T* B, double safety,
               std::span<const Quintic> steps, T* out) {
  const MsignFunction<T> one = best_msign<T>();
  const int64_t size = rows * columns;
  // A step of a small matrix is many more operations than elements.
  const int threads = threads_for(exec.threads, count * size * std::max<int64_t>(1, rows / 4));
  parallel_region(static_cast<int>(std::min<int64_t>(threads, count)), [&](int worker, int workers) {
    const auto free_aligned = [](T* p) { ::operator delete[](p, std::align_val_t(64)); };
    const size_t bytes = sizeof(T) * static_cast<size_t>(work_elements(rows, columns));
    const std::unique_ptr<T[], decltype(free_aligned)> work(
        static_cast<T*>(::operator new[](bytes, std::align_val_t(64))), free_aligned);
    const Range mine = share(count, worker, workers);
    for (int64_t k = mine.begin; k < mine.end; ++k) {
      const double norm = std::sqrt(sum_of_squares(size, B + k * size));
      one(rows, columns, B + k * size, norm > 0 ? 1 / (safety * norm) : 0.0, steps, work.get(), out + k * size);
    }
  });
}

template void msign_cpu(const Exec&, int64_t, int64_t, int64_t, const float*, double, std::span<const Quintic>, float*);
template void msign_cpu(const Exec&, int64_t, int64_t, int64_t, const double*, double, std::span<const Quintic>,
                        double*);

}  // namespace kantor
