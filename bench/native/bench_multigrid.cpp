// Multigrid without Python, on a box that is open above: one cycle, its set-up, and the product that goes with it.
//
//   cycle/<side>/<threads>t           red-black 1 + 1 in float, vectors in double; 36 bytes a cell of the finest grid
//                                     (multigrid_cpu.cpp) and 50 for each of the 1/7 below
//   cycle/double/, cycle/stencil/     the same in double; damped Jacobi, as a stencil
//   cycle/walls/                      plates one cell thick every eight cells: graphs. No bytes are counted
//   setup/, setup/walls/              the hierarchy; reads 2 bytes a cell, writes 2 and 16 for each of the 1/7 below
//   product/                          A x in double: 18 bytes a cell
//
// Three dimensions. `seconds_per_call` is wall time.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "linalg/multigrid.h"
#include "linalg/multigrid_setup.h"
#include "linalg/operator.h"

namespace {

using kantor::GridSmoother;

constexpr double coarse_cells = 1.0 / 7;  // of all levels below, for each cell of the finest

enum class Kind : uint8_t { solid, fluid, air };

// The cells of operator.h: links in the low byte, the diagonal in the high one. `walls`: plates across z, every eighth
// plane, with an opening a sixteenth of the side wide.
std::vector<uint16_t> open_box(int64_t side, bool walls) {
  const auto kind = [&](int64_t z, int64_t y, int64_t x) {
    if (std::min({z, y, x}) < 0 || std::max({z, y, x}) >= side) return Kind::solid;
    if (z == side - 1) return Kind::air;
    return walls && z % 8 == 7 && x >= std::max<int64_t>(1, side / 16) ? Kind::solid : Kind::fluid;
  };
  constexpr int steps[6][3] = {{-1, 0, 0}, {1, 0, 0}, {0, -1, 0}, {0, 1, 0}, {0, 0, -1}, {0, 0, 1}};
  std::vector<uint16_t> cells(static_cast<size_t>(side * side * side), 0);
  for (int64_t z = 0, i = 0; z < side; ++z)
    for (int64_t y = 0; y < side; ++y)
      for (int64_t x = 0; x < side; ++x, ++i) {
        if (kind(z, y, x) != Kind::fluid) continue;
        unsigned links = 64, diagonal = 0;
        for (unsigned k = 0; k < 6; ++k) {
          const Kind there = kind(z + steps[k][0], y + steps[k][1], x + steps[k][2]);
          links |= static_cast<unsigned>(there == Kind::fluid) << k;
          diagonal += there != Kind::solid;
        }
        cells[static_cast<size_t>(i)] = static_cast<uint16_t>(diagonal << 8 | links);
      }
  return cells;
}

struct System {
  System(int64_t side_, bool walls) : side(side_), n(side * side * side), cells(open_box(side, walls)), r(n), z(n) {
    std::mt19937_64 random(0);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) r[i] = cells[i] ? normal(random) : 0.0;
  }

  template <class S>
  kantor::BuiltHierarchy build(const kantor::SetupOptions& options) const {
    return kantor::build_hierarchy<S, double>({side, side, side, cells.data(), nullptr, nullptr, nullptr, nullptr},
                                              options);
  }

  int64_t side, n;
  std::vector<uint16_t> cells;
  std::vector<double> r, z;
};

void report(benchmark::State& bench, double bytes) {
  using benchmark::Counter;
  bench.counters["seconds_per_call"] = Counter(1, Counter::kIsIterationInvariantRate | Counter::kInvert);
  if (bytes > 0) bench.SetBytesProcessed(static_cast<int64_t>(static_cast<double>(bench.iterations()) * bytes));
}

template <class S>
void one_cycle(benchmark::State& bench, int64_t side, int threads, GridSmoother smoother, bool walls) {
  System system(side, walls);
  std::vector<double> jacobi(27, 0.0);
  jacobi[13] = 0.8;
  kantor::SetupOptions options;
  options.threads = threads;
  if (smoother == GridSmoother::stencil) options.stencils = jacobi.data(), options.stencil_levels = 1;
  const kantor::BuiltHierarchy built = system.build<S>(options);
  auto M = kantor::hierarchy_view<S>(built.levels, built.arena.data(), smoother, 1);
  std::vector<S> work(static_cast<size_t>(kantor::multigrid_workspace_cpu(M, threads)));
  M.workers = kantor::workers_for(M, static_cast<int64_t>(work.size() * sizeof(S)));
  kantor::Team::run(threads, true, [&](kantor::Team& team) {
    for (auto _ : bench) kantor::multigrid_cpu(team, M, system.r.data(), work.data(), system.z.data());
  });
  const double word = sizeof(S);
  report(bench, walls ? 0 : double(system.n) * ((2 * word + 28) + coarse_cells * (12.5 * word)));
}

void setup(benchmark::State& bench, int64_t side, int threads, bool walls) {
  const System system(side, walls);
  kantor::SetupOptions options;
  options.threads = threads;
  for (auto _ : bench) benchmark::DoNotOptimize(system.build<float>(options).arena.data());
  report(bench, walls ? 0 : double(system.n) * (4 + 16 * coarse_cells));
}

void product(benchmark::State& bench, int64_t side, int threads) {
  System system(side, false);
  kantor::Operator<double> A;
  A.rows = A.cols = system.n;
  A.terms.push_back({1.0, kantor::Poisson<double>{side, side, side, system.cells.data()}});
  for (auto _ : bench) kantor::matvec_cpu<double>({threads, 0, nullptr}, A, 1, system.r.data(), system.z.data());
  report(bench, double(system.n) * 18);
}

}  // namespace

int main(int count, char** arguments) {
  using benchmark::RegisterBenchmark;
  for (const int64_t side : {32, 64, 128, 256})
    for (int threads = 1; threads <= omp_get_num_procs(); threads *= 2) {
      const auto add = [&](const char* name, auto function, auto... options) {
        const std::string full = std::string(name) + "/" + std::to_string(side) + "/" + std::to_string(threads) + "t";
        RegisterBenchmark(full.c_str(), function, side, threads, options...)->UseRealTime();
      };
      add("cycle", one_cycle<float>, GridSmoother::red_black, false);
      add("cycle/double", one_cycle<double>, GridSmoother::red_black, false);
      add("cycle/stencil", one_cycle<float>, GridSmoother::stencil, false);
      add("cycle/walls", one_cycle<float>, GridSmoother::red_black, true);
      add("setup", setup, false);
      add("setup/walls", setup, true);
      add("product", product);
    }
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
