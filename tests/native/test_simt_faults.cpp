// Kernels with planted bugs, launches that cannot run and exceptions: what the CUDA emulator reports, and that it works
// afterwards.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt_kernels.h"
#include "simt_testing.h"

using namespace kantor;
using namespace kantor::simt_test;

TEST_CASE("divergent barriers are reported with the block and the places") {
  std::vector<int> out(64);
  under_each_schedule([&] {
    const auto partial = launch_error([&] { SIMT_LAUNCH(plant_partial_barrier, 3, 64, 0, nullptr, out.data()); });
    CAPTURE(partial);
    CHECK(contains(partial, "SIMT_LAUNCH(plant_partial_barrier"));
    CHECK(contains(partial, "divergent barrier in block ("));
    CHECK(contains(partial, "of 64 threads 16 wait in __syncthreads() at simt_kernels.h:"));
    CHECK(contains(partial, "48 returned"));
    const auto two = launch_error([&] { SIMT_LAUNCH(plant_two_barriers, 1, 64, 0, nullptr, out.data()); });
    CAPTURE(two);
    CHECK(contains(two, "divergent barrier in block (0,0,0) of grid (1,1,1)"));
    CHECK(contains(two, "16 wait in __syncthreads()"));
    CHECK(contains(two, "48 wait in __syncthreads()"));
    const auto mixed = launch_error([&] { SIMT_LAUNCH(plant_barrier_against_shuffle, 1, 32, 0, nullptr, out.data()); });
    CAPTURE(mixed);
    CHECK(contains(mixed, "16 wait in __syncthreads()"));
    CHECK(contains(mixed, "16 wait in a shuffle"));

    // The machine is usable again, with the fibers that had been left waiting.
    const auto in = random_values<double>(64);
    std::vector<double> reduced(4 * 64);
    SIMT_LAUNCH(reduce_values<double>, 1, 64, 0, nullptr, in.data(), reduced.data());
    CHECK(reduced[3 * 64] == *std::max_element(in.begin(), in.end()));
  });
}

TEST_CASE("a missing barrier changes the result or shows the poison") {
  const auto in = random_values<double>(64);
  std::vector<int> wrong_entries;
  under_each_schedule([&] {
    std::vector<double> out(64);
    SIMT_LAUNCH(plant_race, 1, 64, 0, nullptr, in.data(), out.data());
    int wrong = 0;
    for (std::size_t i = 0; i < 64; ++i) wrong += out[i] == in[63 - i] ? 0 : 1;
    CHECK(wrong > 0);
    wrong_entries.push_back(wrong);
  });
  CHECK(wrong_entries == std::vector<int>(4, 32));  // of each pair the thread that runs first reads garbage
}

TEST_CASE("a dependence between blocks shows under some schedule") {
  int right = 0;
  under_each_schedule([&] {
    std::vector<int> chain(11, 0);
    SIMT_LAUNCH(plant_block_order, 10, 32, 0, nullptr, chain.data());
    right += chain[10] == 10 ? 1 : 0;
  });
  CHECK(right == 1);
}

TEST_CASE("wrong warp operations are reported") {
  std::vector<int> out(64);
  under_each_schedule([&] {
    const auto returned =
        launch_error([&] { SIMT_LAUNCH(plant_shuffle_from_returned, 1, 32, 0, nullptr, out.data()); });
    CAPTURE(returned);
    CHECK(contains(returned, "lane 4 shuffles from lane 5, which has returned"));
    const auto absent = launch_error([&] { SIMT_LAUNCH(plant_shuffle_from_returned, 1, 5, 0, nullptr, out.data()); });
    CHECK(contains(absent, "lane 4 shuffles from lane 5, which has returned or does not exist"));
    const auto outside = launch_error([&] { SIMT_LAUNCH(plant_shuffle_outside_mask, 1, 32, 0, nullptr, out.data()); });
    CHECK(contains(outside, "lane 0 shuffles from lane 16, which is not in the mask"));
    const auto missing = launch_error([&] { SIMT_LAUNCH(plant_missing_from_mask, 1, 32, 0, nullptr, out.data()); });
    CHECK(contains(missing, "a lane is missing from the mask"));
    const auto width = launch_error([&] { SIMT_LAUNCH(plant_bad_width, 1, 32, 0, nullptr, out.data()); });
    CHECK(contains(width, "width is 24"));
  });
}

namespace {

void throw_from_thread(unsigned which) {
  if (simt::thread_rank() == which) throw std::domain_error("thrown in a kernel");
  __syncthreads();
}
void use_much_static_shared(double* out) {  // nvcc refuses to compile this
  SIMT_SHARED(double, values, 6145);
  values[threadIdx.x] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}
void launch_from_kernel(int* visits) { SIMT_LAUNCH(count_visits, 1, 32, 0, nullptr, 1, visits); }

}  // namespace

TEST_CASE("launches beyond the device's limits are refused, empty grids are not run") {
  std::vector<int> visits(1, 0);
  const auto launch = [&](dim3 grid, dim3 block, std::size_t bytes) {
    return launch_error([&] { SIMT_LAUNCH(count_visits, grid, block, bytes, nullptr, 1, visits.data()); });
  };
  CHECK(contains(launch(1, 1025, 0), "a block of 1025 threads"));
  CHECK(contains(launch(1, 0, 0), "a block of 0 threads"));
  CHECK(contains(launch(1, dim3(1, 1, 65), 0), "z <= 64"));
  CHECK(contains(launch(dim3(1, 70000), 32, 0), "a grid larger than"));
  CHECK(contains(launch(1, 32, 228 << 10), "227 KiB"));
  CHECK(launch(0, 32, 0).empty());
  CHECK(visits[0] == 0);
  CHECK(launch(1, 32, 227 << 10).empty());
  CHECK(visits[0] == 1);
  std::vector<double> out(32);
  CHECK(contains(launch_error([&] { SIMT_LAUNCH(use_much_static_shared, 1, 32, 0, nullptr, out.data()); }), "48 KiB"));
  CHECK_THROWS_AS(simt::emulator::set_schedule(4), std::invalid_argument);
  simt::emulator::set_schedule(2);
  CHECK(simt::emulator::schedule() == 2);
  simt::emulator::set_schedule(0);
}

TEST_CASE("exceptions of a kernel reach the launcher") {
  under_each_schedule([] {
    for (unsigned which : {0u, 17u, 63u}) {
      CHECK_THROWS_AS(SIMT_LAUNCH(throw_from_thread, 2, 64, 0, nullptr, which), std::domain_error);
    }
    SIMT_LAUNCH(throw_from_thread, 2, 64, 0, nullptr, 64);
  });
  int visits = 0;
  CHECK(
      contains(launch_error([&] { SIMT_LAUNCH(launch_from_kernel, 1, 1, 0, nullptr, &visits); }), "launched a kernel"));
}
