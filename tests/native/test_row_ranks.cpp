// Reductions over ranks, which are threads here.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include "transport/row_ranks.h"

#include <doctest/doctest.h>

#include <barrier>
#include <limits>
#include <memory>
#include <stdexcept>
#include <thread>

using namespace kantor;
using namespace kantor::transport;

namespace {

constexpr int64_t capacity = 8;
constexpr double infinity = std::numeric_limits<double>::infinity();

// body(ranks, rank) on `size` threads.
template <class Body>
void on_ranks(int size, Body body) {
  std::vector<std::vector<double>> memory(size, std::vector<double>(capacity));
  std::barrier meeting(size);
  const auto reduction = [&](int rank, bool largest) {
    return AllReduce{memory[rank].data(), [&, rank, largest](int64_t count) {
                       CHECK(count <= capacity);
                       meeting.arrive_and_wait();
                       std::vector<double> total(memory[0].begin(), memory[0].begin() + count);
                       for (int other = 1; other < size; ++other)
                         for (int64_t k = 0; k < count; ++k)
                           total[k] = largest ? std::max(total[k], memory[other][k]) : total[k] + memory[other][k];
                       meeting.arrive_and_wait();
                       std::copy(total.begin(), total.end(), memory[rank].begin());
                     }};
  };
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      RowRanks ranks(reduction(rank, false), reduction(rank, true), capacity, rank, size);
      body(ranks, rank);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

TEST_CASE("One process alone adds nothing") {
  RowRanks alone;
  double value = 3;
  alone.sum({{&value, 1}});
  alone.largest({{&value, 1}});
  CHECK(value == 3);
  CHECK(alone.place(5).total == 5);
  CHECK(alone.gather(std::vector<int>{1, 2}, {0, 2}) == std::vector<int>{1, 2});
  CHECK_THROWS_AS(alone.own([] { throw std::runtime_error("own"); }), std::runtime_error);
}

TEST_CASE("Sums, maxima and logarithms of sums") {
  on_ranks(3, [](RowRanks& ranks, int rank) {
    double first[2] = {double(rank), 1}, second = -rank;
    ranks.sum({{first, 2}, {&second, 1}});
    CHECK(first[0] == 3);
    CHECK(first[1] == 3);
    CHECK(second == -3);
    second = rank;
    ranks.largest({{&second, 1}});
    CHECK(second == 2);
    double logs[2] = {1000.0 * rank, -infinity};  // far apart, and nothing anywhere
    if (rank == 0) logs[0] = 2000;
    ranks.log_sum(logs, 2);
    CHECK(logs[0] == doctest::Approx(2000 + std::log(2.0)).epsilon(1e-15));
    CHECK(logs[1] == -infinity);
  });
}

TEST_CASE("What the ranks have is put together in pieces") {
  on_ranks(3, [](RowRanks& ranks, int rank) {
    std::vector<int32_t> own(rank == 1 ? 0 : 9 + rank);  // more than the memory holds, and none
    for (size_t k = 0; k < own.size(); ++k) own[k] = static_cast<int32_t>(100 * rank + k);
    const RowRanks::Place place = ranks.place(static_cast<int64_t>(own.size()));
    CHECK(place.total == 20);
    CHECK(place.first == (rank == 0 ? 0 : 9));
    const std::vector<int32_t> all = ranks.gather(own, place);
    for (int32_t k = 0; k < 20; ++k) CHECK(all[k] == (k < 9 ? k : 200 + k - 9));
  });
}

TEST_CASE("An error, an interrupt or a stop on one rank ends the next reduction of all") {
  on_ranks(3, [](RowRanks& ranks, int rank) {
    double value = 1;
    ranks.own([&] {
      if (rank == 1) throw std::runtime_error("here");
    });
    if (rank == 1)
      CHECK_THROWS_AS(ranks.sum({{&value, 1}}), std::runtime_error);
    else
      CHECK_THROWS_AS(ranks.sum({{&value, 1}}), OtherRankFailed);
    if (rank == 2) ranks.stop();
    try {
      ranks.settle();
      CHECK(false);
    } catch (const Interrupted& reason) { CHECK(reason.by_callback); }
    ranks.own([&] {
      if (rank == 0) throw Interrupted{};
    });
    try {
      ranks.largest({{&value, 1}});
      CHECK(false);
    } catch (const Interrupted& reason) { CHECK(!reason.by_callback); }
    ranks.sum({{&value, 1}});  // over and done with
    CHECK(value == 3);
  });
}
