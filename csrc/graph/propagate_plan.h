// How the CPU cuts a recurrence into tiles of columns and hands them to threads.
#pragma once
#include <atomic>

#include "graph/step_rows.h"

namespace kantor {

// Threads that work on one tile together: each has its share of the rows.
struct Crew {
  int index = 0;  // of the crew
  int worker = 0, workers = 1;
  ShortBarrier* barrier = nullptr;
  void wait() const {
    if (workers > 1) barrier->wait(workers);
  }
};

struct Tiling {
  int64_t width;  // columns of a tile; a power of two
  int threads;
  int crews;    // `threads` crews of one, each with its own tiles, or one crew of all
  bool cached;  // a tile stays in the second-level cache (or close to it) through all steps
  Fetch fetch;

  int64_t count(int64_t d) const { return (d + width - 1) / width; }
};

// Bytes of a tile that is meant to stay in a cache of 1 MiB, beside a second one that is being written and the entries;
// and the most that still pays with tiles of one cache line: above, rows are read whole from memory.
inline constexpr int64_t tile_bytes = 384 << 10, narrow_tile_bytes = 2 << 20, line_bytes = 64;

template <class T>
Tiling tiling_of(const Exec& exec, const Pattern& pattern, int64_t steps, int64_t d, int64_t widest = max_width<T>) {
  constexpr int64_t size = sizeof(T);
  const int64_t n = pattern.n, step_work = pattern.nnz + n;
  Tiling tiling{std::min(widest, width_for<T>(d)), 1, 1, true, {}};
  int64_t& width = tiling.width;
  while (width * size > line_bytes && n * width * size > tile_bytes) width /= 2;
  tiling.cached = n * width * size <= narrow_tile_bytes;
  if (!tiling.cached) width = std::min(widest, width_for<T>(d));
  // A region of several threads takes some 10 us to begin, a barrier about one.
  if (step_work * steps * d >= int64_t{1} << 21) tiling.threads = std::max(1, exec.threads);
  const auto few_tiles = [&] { return tiling.count(d) < tiling.threads; };
  while (tiling.cached && few_tiles() && width * size > line_bytes) width /= 2;
  if (tiling.cached && !few_tiles())
    tiling.crews = tiling.threads;
  else if (step_work * width < int64_t{1} << 18)
    tiling.threads = 1;
  tiling.fetch = fetch_for(pattern, width * size);
  return tiling;
}

// body(crew, item) for items 0..count-1: each by one crew, or one after another by the crew of all threads.
template <class Body>
void for_each_item(const Tiling& tiling, int64_t count, Body&& body) {
  std::atomic<int64_t> next{0};
  ShortBarrier barrier;
  parallel_region(tiling.threads, [&](int worker, int workers) {
    if (tiling.crews == 1) {
      for (int64_t item = 0; item < count; ++item) body(Crew{0, worker, workers, &barrier}, item);
    } else {
      while (true) {
        const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
        if (item >= count) break;
        body(Crew{worker, 0, 1, nullptr}, item);
      }
    }
  });
}

}  // namespace kantor
