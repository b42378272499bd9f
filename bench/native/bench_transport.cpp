// One pass over a transport plan without Python: the sweep that is an iteration of Sinkhorn's method, and what it is
// held against.
//
//   sweep/dense/<dtype>/<n>/<threads>t     cost read from memory
//   sweep/points/<dtype>/<n>/<threads>t    squared distances of points in three dimensions
//   exp/<n>                                n n exponentials alone, the library's own
//
// `ns_per_entry` and, for stored costs, bytes a second; eps is a tenth of the range, so that no block is skipped.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/vecmath.h"
#include "transport/passes.h"

namespace {

using kantor::transport::Cost;
using kantor::transport::CostKind;
using kantor::transport::Passes;

std::vector<double> uniform(int64_t count) {
  std::mt19937_64 random(0);
  std::uniform_real_distribution<double> distribution;
  std::vector<double> values(count);
  for (double& value : values) value = distribution(random);
  return values;
}

void per_entry(benchmark::State& state, int64_t n) {
  using benchmark::Counter;
  state.counters["ns_per_entry"] =
      Counter(1e-9 * double(n) * double(n), Counter::kIsIterationInvariantRate | Counter::kInvert);
}

template <class T, bool stored>
void sweep(benchmark::State& state, int64_t n, int threads) {
  const std::vector<double> numbers = uniform(stored ? n * n : 6 * n);
  const std::vector<T> values(numbers.begin(), numbers.end());
  Cost<T> cost;
  cost.n = cost.m = n;
  if constexpr (stored) {
    cost.matrix = values.data();
  } else {
    cost.kind = CostKind::sqeuclidean;
    cost.d = 3;
    cost.x = values.data();
    cost.y_by_axis = values.data() + 3 * n;
  }
  kantor::Exec exec;
  exec.threads = threads;
  const std::unique_ptr<Passes> passes = kantor::transport::make_passes_cpu<T>(exec, cost);
  const double eps = 0.1;
  std::vector<double> g(n, 0.0), offset(n, eps * std::log(1.0 / double(n))), log_sums(n), f(n), sums(n);
  for (auto _ : state) {
    passes->sweep(eps, 60, g.data(), offset.data(), 1, log_sums.data(), f.data(), sums.data());
    benchmark::DoNotOptimize(sums.data());
  }
  per_entry(state, n);
  if constexpr (stored) state.SetBytesProcessed(state.iterations() * n * n * int64_t(sizeof(T)));
}

void exponentials(benchmark::State& state, int64_t n) {
  std::vector<double> x = uniform(n), y(n);
  for (double& value : x) value *= -10;
  for (auto _ : state)
    for (int64_t i = 0; i < n; ++i) {
      kantor::vecmath::exp_array(n, x.data(), y.data());
      benchmark::ClobberMemory();
    }
  per_entry(state, n);
}

}  // namespace

int main(int argc, char** argv) {
  for (const int64_t n : {500, 1000, 4000}) {
    const std::string size = std::to_string(n);
    benchmark::RegisterBenchmark(("exp/" + size).c_str(), exponentials, n);
    for (const int threads : {1, 2}) {
      const std::string name = size + "/" + std::to_string(threads) + "t";
      benchmark::RegisterBenchmark(("sweep/dense/float64/" + name).c_str(), sweep<double, true>, n, threads)
          ->UseRealTime();
      benchmark::RegisterBenchmark(("sweep/dense/float32/" + name).c_str(), sweep<float, true>, n, threads)
          ->UseRealTime();
      benchmark::RegisterBenchmark(("sweep/points/float64/" + name).c_str(), sweep<double, false>, n, threads)
          ->UseRealTime();
    }
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
