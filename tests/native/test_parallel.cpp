// core/parallel.h: every index exactly once, whatever the number of threads, and teams that keep their stages apart.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/parallel.h"

using namespace kantor;

namespace {

// Counts visits of 0..n-1 from several threads.
class Visits {
 public:
  explicit Visits(int64_t n) : counts_(static_cast<size_t>(n)) {}
  void add(int64_t i) { counts_.at(static_cast<size_t>(i)).fetch_add(1, std::memory_order_relaxed); }
  bool each_once() const {
    for (const auto& count : counts_)
      if (count.load() != 1) return false;
    return true;
  }

 private:
  std::vector<std::atomic<int>> counts_;
};

constexpr int64_t lengths[] = {0, 1, 2, 7, 8, 100, 4095, 4096, 4097, 100'000};

}  // namespace

TEST_CASE("chunks cover a range without gap or overlap") {
  for (const int64_t n : lengths)
    for (const int64_t length : {1, 3, 8, 4096}) {
      const Chunks chunks{n, length};
      int64_t next = 0;
      for (int64_t k = 0; k < chunks.count(); ++k) {
        const Range range = chunks.range(k);
        REQUIRE(range.begin == next);
        REQUIRE(range.size() > 0);
        REQUIRE(range.size() <= length);
        if (k + 1 < chunks.count()) REQUIRE(range.size() == length);
        next = range.end;
      }
      CHECK(next == n);
    }
  CHECK(Chunks{0}.count() == 0);
  CHECK(Chunks{1}.count() == 1);
  CHECK(Chunks{chunk_size + 1}.count() == 2);
}

TEST_CASE("shares cover a range, and differ by one at most") {
  for (const int64_t n : lengths)
    for (int workers = 1; workers <= 9; ++workers) {
      int64_t next = 0;
      for (int index = 0; index < workers; ++index) {
        const Range mine = share(n, index, workers);
        REQUIRE(mine.begin == next);
        REQUIRE(mine.size() >= n / workers);
        REQUIRE(mine.size() <= n / workers + 1);
        next = mine.end;
      }
      CHECK(next == n);
    }
  const Range last = share(int64_t{1} << 50, 6, 7);  // no overflow on the way
  CHECK(last.end == int64_t{1} << 50);
}

TEST_CASE("parallel_for visits each index once") {
  for (int threads = -1; threads <= 5; ++threads)
    for (const int64_t n : lengths) {
      Visits visits(n);
      parallel_for(threads, n, [&](int64_t i) { visits.add(i); });
      CHECK(visits.each_once());
    }
}

TEST_CASE("parallel_region numbers its workers") {
  for (int threads = 0; threads <= 4; ++threads) {
    std::vector<std::atomic<int>> seen(5);
    std::atomic<int> total{0};
    parallel_region(threads, [&](int worker, int workers) {
      seen.at(static_cast<size_t>(worker)) += 1;
      total = workers;
    });
    CHECK(total >= 1);
    CHECK(total <= std::max(1, threads));
    for (int worker = 0; worker < total; ++worker) CHECK(seen[static_cast<size_t>(worker)] == 1);
  }
}

TEST_CASE("small work stays on one thread") {
  CHECK(threads_for(8, serial_below - 1) == 1);
  CHECK(threads_for(8, serial_below) == 8);
  CHECK(threads_for(0, serial_below) == 1);
  CHECK(threads_for(-3, 1 << 20) == 1);
  CHECK(threads_for(1, 0) == 1);
}

TEST_CASE("a team runs its passes one after another, all workers in each") {
  for (const bool standing : {false, true})
    for (int threads = 1; threads <= 4; ++threads) {
      Team::run(threads, standing, [&](Team& team) {
        CHECK(team.threads() == threads);
        constexpr int64_t n = 10'000;
        std::vector<int64_t> values(n, 0);
        for (int64_t pass = 1; pass <= 50; ++pass) {
          std::atomic<int> errors{0};
          team.pass([&](int worker, int workers) {
            const Range mine = share(n, worker, workers);
            for (int64_t i = mine.begin; i < mine.end; ++i) {
              // What a neighbour wrote in the pass before must be visible.
              if (values[static_cast<size_t>(i)] != pass - 1) errors += 1;
              values[static_cast<size_t>(i)] = pass;
            }
          });
          for (const int64_t value : values) errors += value != pass;
          REQUIRE(errors == 0);
        }
      });
    }
}

TEST_CASE("a barrier inside a pass separates its stages") {
  for (const bool standing : {false, true})
    for (int threads = 1; threads <= 4; ++threads)
      Team::run(threads, standing, [&](Team& team) {
        constexpr int64_t n = 997;
        std::vector<int> first(n, 0), second(n, 0);
        for (int repeat = 1; repeat <= 20; ++repeat) {
          team.pass([&](int worker, int workers) {
            const Range mine = share(n, worker, workers);
            for (int64_t i = mine.begin; i < mine.end; ++i) first[static_cast<size_t>(i)] = repeat;
            team.barrier(workers);
            for (int64_t i = mine.begin; i < mine.end; ++i)
              second[static_cast<size_t>(i)] = first[static_cast<size_t>(n - 1 - i)];
          });
          for (const int value : second) REQUIRE(value == repeat);
        }
      });
}

TEST_CASE("an exception leaves a team, and the next one works") {
  for (const bool standing : {false, true})
    for (int threads = 1; threads <= 3; ++threads) {
      CHECK_THROWS_AS(Team::run(threads, standing,
                                [](Team& team) {
                                  team.pass([](int, int) {});
                                  throw std::runtime_error("on purpose");
                                }),
                      std::runtime_error);
      int passes = 0;
      Team::run(threads, standing, [&](Team& team) { team.pass([&](int worker, int) { passes += worker == 0; }); });
      CHECK(passes == 1);
    }
}

TEST_CASE("advice about huge pages never touches the data") {
  for (const size_t bytes : {size_t{0}, size_t{100}, size_t{3} << 20, size_t{9} << 20}) {
    const auto data = std::make_unique<unsigned char[]>(bytes + 1);
    std::memset(data.get(), 7, bytes + 1);
    advise_huge_pages(data.get(), bytes);
    bool same = true;
    for (size_t i = 0; i <= bytes; ++i) same = same && data[i] == 7;
    CHECK(same);
  }
  advise_huge_pages(nullptr, 0);
}
