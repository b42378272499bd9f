// What test_simt.cpp and test_simt_faults.cpp share.
#pragma once
#include <doctest/doctest.h>

#include <cstddef>
#include <random>
#include <string>
#include <vector>

#include "core/simt.h"

namespace kantor::simt_test {

// Runs `body` under each schedule; failures name it.
template <class Body>
void under_each_schedule(Body body) {
  for (int schedule = 0; schedule < simt::emulator::schedule_count; ++schedule) {
    CAPTURE(schedule);
    simt::emulator::set_schedule(schedule);
    body();
  }
  simt::emulator::set_schedule(0);
}

template <class T>
std::vector<T> random_values(std::size_t n, unsigned seed = 0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, 10);
  std::vector<T> values(n);
  for (T& v : values) v = static_cast<T>(normal(generator));
  return values;
}

// The message of the LaunchError that `body` throws; empty when it throws none.
template <class Body>
std::string launch_error(Body body) {
  try {
    body();
  } catch (const simt::emulator::LaunchError& error) { return error.what(); }
  return {};
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace kantor::simt_test
