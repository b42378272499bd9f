// How the CPU cuts a recurrence into tiles of columns and hands them to threads.
#pragma once
#include <array>
#include <atomic>
#include <exception>
#include <functional>

#include "graph/step_rows.h"

namespace kantor {

// Asks every now and then whether the user wants to stop; only the calling thread may.
class Interruption {
 public:
  explicit Interruption(const std::function<bool()>& interrupted) : interrupted_(interrupted) {}

  bool asked() {
    if (!interrupted_ || error_) return error_ != nullptr;
    try {
      return interrupted_();
    } catch (...) { error_ = std::current_exception(); }  // may not leave the parallel region by itself
    return true;
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const std::function<bool()>& interrupted_;
  std::exception_ptr error_;
};

// What the threads of one parallel region share.
struct Region {
  ShortBarrier barrier;
  Interruption interruption;
  std::atomic<int64_t> next{0};      // item, where crews take items
  std::atomic<bool> stopped{false};  // no item is begun any more
  std::array<bool, 2> stop_at{};     // whether a crew of several stops at its even, its odd stages
};

// Threads that work on one tile together: each has its share of the rows.
class Crew {
 public:
  Crew(Region& region, bool calling, int worker_, int workers_)
      : worker(worker_), workers(workers_), region_(region), calling_(calling) {}
  const int worker, workers;

  // The end of a stage: false when the user wants to stop.
  bool wait() {
    if (workers == 1) {
      if (calling_ && region_.interruption.asked()) region_.stopped = true;
      return !region_.stopped;
    }
    // Written before the barrier and read behind it; two places, since the first may write that of the next stage
    // before the last has read this one.
    bool& stop = region_.stop_at[stage_++ % 2];
    if (calling_) stop = region_.interruption.asked();
    region_.barrier.wait(workers);
    if (stop) region_.stopped = true;
    return !stop;
  }

 private:
  Region& region_;
  const bool calling_;
  int64_t stage_ = 0;
};

struct Tiling {
  int64_t width;  // columns of a tile; a power of two
  int threads;
  int crews;    // `threads` crews of one, each with its own tiles, or one crew of all
  bool cached;  // a tile stays in the second-level cache (or close to it) through all steps
  Fetch fetch;

  int64_t count(int64_t d) const { return (d + width - 1) / width; }

  // All threads on one tile at a time, where a step is work enough: a barrier takes about a microsecond.
  void share_tiles(const Pattern& pattern) {
    crews = 1;
    if ((pattern.nnz + pattern.n) * width < int64_t{1} << 18) threads = 1;
  }
};

// Bytes of a tile that is meant to stay in a cache of 1 MiB, beside a second one that is being written and the entries;
// and the most that still pays with tiles of one cache line: above, rows are read whole from memory.
inline constexpr int64_t tile_bytes = 384 << 10, narrow_tile_bytes = 2 << 20, line_bytes = 64;

// `widest` bounds the width; only where `narrow` is set may it depend on the number of threads.
template <class T>
Tiling tiling_of(const Exec& exec, const Pattern& pattern, int64_t steps, int64_t d, int64_t widest, bool narrow) {
  constexpr int64_t size = sizeof(T);
  const int64_t n = pattern.n;
  Tiling tiling{std::min(widest, width_for<T>(d)), 1, 1, true, {}};
  int64_t& width = tiling.width;
  while (width * size > line_bytes && n * width * size > tile_bytes) width /= 2;
  tiling.cached = n * width * size <= narrow_tile_bytes;
  if (!tiling.cached) width = std::min(widest, width_for<T>(d));
  // A region of several threads takes some 10 us to begin.
  if ((pattern.nnz + n) * steps * d >= int64_t{1} << 21) tiling.threads = std::max(1, exec.threads);
  const auto few_tiles = [&] { return tiling.count(d) < tiling.threads; };
  while (narrow && tiling.cached && few_tiles() && width * size > line_bytes) width /= 2;
  if (tiling.cached && !few_tiles())
    tiling.crews = tiling.threads;
  else
    tiling.share_tiles(pattern);
  tiling.fetch = fetch_for(pattern, width * size);
  return tiling;
}

// body(crew, index of the crew, item) for items 0..count-1: each by one crew, or one after another by the crew of all
// threads. False when the user stopped it.
template <class Body>
bool for_each_item(const Tiling& tiling, int64_t count, const std::function<bool()>& interrupted, Body&& body) {
  Region region{{}, Interruption(interrupted)};
  parallel_region(tiling.threads, [&](int worker, int workers) {
    const bool alone = tiling.crews > 1;
    Crew crew(region, worker == 0, alone ? 0 : worker, alone ? 1 : workers);
    for (int64_t item = 0; !region.stopped; ++item) {
      if (alone) item = region.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= count) break;
      body(crew, alone ? worker : 0, item);
    }
  });
  region.interruption.rethrow();
  return !region.stopped;
}

}  // namespace kantor
