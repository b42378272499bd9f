// The rows of a plan spread over ranks. Every rank runs the same algorithm on its own rows and on all columns; what is
// summed over rows is summed over the ranks here, all that one point of the algorithm needs in one reduction. The ranks
// then hold the same bits and decide alike. An error, Ctrl-C or a callback's wish to stop on one rank travels with the
// next reduction, after which all of them end: none waits for another that has left. A single process reduces nothing.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "core/all_reduce.h"

namespace kantor::transport {

// Thrown by a pass when Passes::interrupted answers true, and by a reduction when a rank was interrupted or, by its
// callback, stopped.
struct Interrupted {
  bool by_callback = false;
};

// Thrown where another rank ends with an error of its own.
struct OtherRankFailed {};

class RowRanks {
 public:
  struct Part {
    double* values;
    int64_t count;
  };
  struct Place {  // of this rank's share among all
    int64_t first, total;
  };

  RowRanks() = default;
  // Both reductions use the same memory, of `capacity` doubles: `sums` adds it up, `maxima` takes the largest.
  RowRanks(AllReduce sums, AllReduce maxima, int64_t capacity, int rank, int size)
      : sums_(std::move(sums)), maxima_(std::move(maxima)), capacity_(capacity), rank_(rank), size_(size) {}

  bool alone() const { return !sums_; }
  bool first() const { return rank_ == 0; }

  // This rank's part of a pass. What it throws is kept for the next reduction.
  template <class Work>
  void own(Work&& work) {
    if (alone()) return work();
    try {
      work();
    } catch (const Interrupted&) { interrupted_ = true; } catch (...) {
      error_ = std::current_exception();
    }
  }
  void interrupt() { interrupted_ = true; }
  void stop() { stopped_ = true; }
  // At the end: no rank leaves with what the others have not heard of.
  void settle() { sum({}); }

  // All parts, added up over the ranks.
  void sum(std::initializer_list<Part> parts) { reduce(sums_, parts); }
  void largest(std::initializer_list<Part> parts) { reduce(maxima_, parts); }

  // log sum exp of every value over the ranks.
  void log_sum(double* values, int64_t count) {
    if (alone()) return;
    std::vector<double> top(values, values + count);
    largest({{top.data(), count}});
    for (int64_t j = 0; j < count; ++j) {
      if (!std::isfinite(top[j])) top[j] = 0;  // a column that nothing reaches
      values[j] = std::exp(values[j] - top[j]);
    }
    sum({{values, count}});
    for (int64_t j = 0; j < count; ++j) values[j] = std::log(values[j]) + top[j];
  }

  Place place(int64_t count) {
    if (alone()) return {0, count};
    std::vector<double> counts(size_, 0.0);
    counts[rank_] = static_cast<double>(count);
    sum({{counts.data(), size_}});
    Place place{0, 0};
    for (int k = 0; k < size_; ++k) {
      if (k == rank_) place.first = place.total;
      place.total += static_cast<int64_t>(counts[k]);
    }
    return place;
  }

  // The values of all ranks, one after the other: each adds its own to zeros.
  template <class T>
  std::vector<T> gather(const std::vector<T>& own, Place place) {
    if (alone()) return own;
    std::vector<T> all(place.total);
    const int64_t length = capacity_ - flags, end = place.first + static_cast<int64_t>(own.size());
    std::vector<double> piece;
    for (int64_t begin = 0; begin < place.total; begin += length) {
      const int64_t count = std::min(length, place.total - begin);
      piece.assign(count, 0.0);
      for (int64_t k = std::max(begin, place.first); k < std::min(begin + count, end); ++k)
        piece[k - begin] = static_cast<double>(own[k - place.first]);
      sum({{piece.data(), count}});
      for (int64_t k = 0; k < count; ++k) all[begin + k] = static_cast<T>(piece[k]);
    }
    return all;
  }

 private:
  static constexpr int64_t flags = 3;  // before the values: how many ranks are interrupted, stopped, failed

  void reduce(const AllReduce& over, std::initializer_list<Part> parts) {
    if (alone()) return;
    double* memory = over.sums;
    memory[0] = interrupted_;
    memory[1] = stopped_;
    memory[2] = error_ != nullptr;
    int64_t at = flags;
    for (const Part& part : parts) {
      std::copy_n(part.values, part.count, memory + at);
      at += part.count;
    }
    over.call(at);
    const bool interrupted = memory[0] > 0, stopped = memory[1] > 0, failed = memory[2] > 0;
    interrupted_ = stopped_ = false;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    if (failed) throw OtherRankFailed{};
    if (interrupted || stopped) throw Interrupted{!interrupted};
    at = flags;
    for (const Part& part : parts) {
      std::copy_n(memory + at, part.count, part.values);
      at += part.count;
    }
  }

  AllReduce sums_, maxima_;
  int64_t capacity_ = 0;
  int rank_ = 0, size_ = 1;
  bool interrupted_ = false, stopped_ = false;
  std::exception_ptr error_;
};

}  // namespace kantor::transport
