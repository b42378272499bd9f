// Parallel loops on the CPU. The number of threads is an argument of every call: no thread state is kept between calls.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>
#include <type_traits>

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

// body(worker, workers) on each of `threads` threads.
template <class Body>
void parallel_region(int threads, Body&& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

// A barrier for many short stages: spins for about a microsecond, then lets others run, at last sleeps. OpenMP's own
// either sleeps at once (OMP_WAIT_POLICY=passive: tens of microseconds a stage) or spins for milliseconds, which on a
// busy machine means waiting for a thread that cannot run.
class ShortBarrier {
 public:
  void wait(int workers) {
    const int stage = stage_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers) {
      arrived_.store(0, std::memory_order_relaxed);
      stage_.store(stage + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; stage_.load(std::memory_order_acquire) == stage; ++spins) {
      if (spins > 100000)
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      else if (spins > 1000)
        std::this_thread::yield();
    }
  }

 private:
  std::atomic<int> arrived_{0}, stage_{0};
};

// Threads for an algorithm of many short passes. A standing team is one parallel region for the whole algorithm, whose
// workers wait for the next pass at a ShortBarrier. Where Python is called back between passes the team does not stand:
// each pass is a region of its own, and the callback may use all threads.
class Team {
 public:
  // main(team) on the calling thread.
  template <class Main>
  static void run(int threads, bool standing, Main&& main) {
    Team team;
    team.threads_ = threads;
    if (threads <= 1 || !standing) return main(team);
    std::exception_ptr error;  // may not leave the parallel region by itself
    parallel_region(threads, [&](int worker, int workers) {
      if (worker > 0) return team.serve(worker, workers);
      team.workers_ = workers;
      try {
        main(team);
      } catch (...) { error = std::current_exception(); }
      team.job_ = nullptr;
      team.barrier_.wait(workers);
    });
    if (error) std::rethrow_exception(error);
  }

  int threads() const { return threads_; }

  // body(worker, workers) on every thread; returns when all are done.
  template <class Body>
  void pass(Body&& body) {
    if (workers_ == 0) return parallel_region(threads_, body);
    job_ = [](void* context, int worker, int workers) {
      (*static_cast<std::remove_reference_t<Body>*>(context))(worker, workers);
    };
    context_ = const_cast<void*>(static_cast<const void*>(&body));
    barrier_.wait(workers_);
    body(0, workers_);
    barrier_.wait(workers_);
  }

  // body(i) for i in 0..count-1, contiguous shares, as one pass.
  template <class Body>
  void for_each(int64_t count, Body&& body) {
    pass([&](int worker, int workers) {
      const Range mine = share(count, worker, workers);
      for (int64_t i = mine.begin; i < mine.end; ++i) body(i);
    });
  }

  // Inside a pass, between stages of it.
  void barrier(int workers) {
    if (workers > 1) stages_.wait(workers);
  }

 private:
  void serve(int worker, int workers) {
    for (;;) {
      barrier_.wait(workers);
      if (!job_) return;
      job_(context_, worker, workers);
      barrier_.wait(workers);
    }
  }

  int threads_ = 1;
  int workers_ = 0;  // of a standing team
  void (*job_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  ShortBarrier barrier_, stages_;
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
