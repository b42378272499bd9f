// Parallel loops on the CPU. The number of threads is an argument of every call: no thread state is kept between calls.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace kantor {

// Below this many simple elements a parallel region costs more than it saves.
inline constexpr int64_t serial_below = 32768;

// Elements per chunk: the unit of work and of reduction. Fixed, so that results do not depend on the number of threads;
// a chunk of doubles is 32 KiB and stays in the first-level cache between the stages of a fused pass.
inline constexpr int64_t chunk_size = 4096;

inline int threads_for(int threads, int64_t elements) { return elements < serial_below ? 1 : std::max(1, threads); }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// 0..n-1 cut into chunks of `length`.
struct Chunks {
  int64_t n, length = chunk_size;
  int64_t count() const { return (n + length - 1) / length; }
  Range range(int64_t chunk) const { return {chunk * length, std::min(n, (chunk + 1) * length)}; }
};

// The contiguous share of worker `index` out of `workers` in 0..count-1.
inline Range share(int64_t count, int index, int workers) {
  return {count * index / workers, count * (index + 1) / workers};
}

// body(worker, workers) on each thread of a team; `barrier()` below may be used inside.
template <class Body>
void parallel_region(int threads, Body&& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

inline void barrier() {
#pragma omp barrier
}

// A barrier for loops with hundreds of short stages: spins for about a microsecond, then offers the processor to
// others. OpenMP's own either sleeps at once (OMP_WAIT_POLICY=passive: tens of microseconds a stage) or spins for very
// long.
class ShortBarrier {
 public:
  void wait(int workers) {
    const int stage = stage_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers) {
      arrived_.store(0, std::memory_order_relaxed);
      stage_.store(stage + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; stage_.load(std::memory_order_acquire) == stage; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  std::atomic<int> arrived_{0}, stage_{0};
};

// body(i) for i in 0..count-1, contiguous shares.
template <class Body>
void parallel_for(int threads, int64_t count, Body&& body) {
  parallel_region(static_cast<int>(std::min<int64_t>(threads, count)), [&](int worker, int workers) {
    const Range mine = share(count, worker, workers);
    for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
  });
}

// Asks for transparent huge pages behind a large workspace (a no-op for small ones): fewer page faults and TLB misses.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace kantor
