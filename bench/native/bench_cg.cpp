// Conjugate gradients without Python: the library's solver, and what testing the curvature costs it.
//
//   cg/<side>/<threads>t   cg_cpu on the 7-point stencil; bytes are 8 words an unknown and iteration
//   loop/full/<side>       the same passes on one thread, with the library's tests of p.q and q.q (cg_after_apply)
//   loop/sign/<side>       without q.q, which only the test for a singular matrix needs
//   loop/blind/<side>      without any test: alpha = rz / pq
//   scalars/full, /blind   the scalar step alone
//
// fp64. `seconds_per_iteration` is a counter of each: wall time for cg, processor time for the others. Compare the
// loops with --benchmark_enable_random_interleaving=true --benchmark_repetitions=15.
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "linalg/cg.h"
#include "linalg/operator.h"
#include "linalg/vector.h"

namespace {

using kantor::CgOptions;
using kantor::CgState;
using kantor::Range;

enum class Test { full, sign, blind };

constexpr int iterations_per_run = 20;
constexpr int64_t block_size = 1024;  // rows whose product is formed at a time, as in cg_cpu.cpp
constexpr int64_t history_length = 1024;

// One Poisson system with everything cg_cpu needs; each array starts at another offset in its page.
class System {
 public:
  explicit System(int64_t side) : n(side * side * side) {
    std::mt19937_64 random(0);
    std::normal_distribution<double> normal;
    for (int k = 0; k < 5; ++k) arrays_.push_back(allocate(k));
    std::generate_n(b(), n, [&] { return normal(random); });
    A.rows = A.cols = n;
    A.terms.push_back({1.0, kantor::Stencil<double>{side, side, side, false, false, false, weights_.data()}});
    reset();
  }

  double* b() { return arrays_[0].get() + offset(0); }
  double* x() { return arrays_[1].get() + offset(1); }
  double* r() { return arrays_[2].get() + offset(2); }
  double* p() { return arrays_[3].get() + offset(3); }
  double* q() { return arrays_[4].get() + offset(4); }
  double* history() { return history_.data(); }

  // x = 0, r = b, rz = r.r
  void reset() {
    std::fill_n(x(), n, 0.0);
    std::copy_n(b(), n, r());
    const double bb = kantor::dot(n, b(), b());
    kantor::cg_start(state, options, bb, kantor::max_abs(n, b()), bb, history());
    kantor::cg_after_precondition(state, state.rr);
  }

  const int64_t n;
  kantor::Operator<double> A;
  CgState state{};
  const CgOptions options = without_end();

 private:
  static CgOptions without_end() {
    CgOptions options{};
    options.max_iterations = std::numeric_limits<int64_t>::max();
    options.epsilon = std::numeric_limits<double>::epsilon() / 2;
    options.history_length = history_length;
    return options;
  }

  using Memory = std::unique_ptr<double, void (*)(void*)>;

  static int64_t offset(int k) { return k * 1080; }
  Memory allocate(int k) const {
    constexpr size_t page = size_t{2} << 20;
    const size_t bytes = (static_cast<size_t>(n + offset(k)) * sizeof(double) + page - 1) / page * page;
    auto* memory = static_cast<double*>(std::aligned_alloc(page, bytes));
    kantor::advise_huge_pages(memory, bytes);
    return {memory, &std::free};
  }

  std::vector<Memory> arrays_;
  const std::vector<double> weights_ = {0, 1, 1, 1};
  std::vector<double> history_ = std::vector<double>(history_length);
};

void report(benchmark::State& bench, int64_t iterations, int64_t unknowns) {
  using benchmark::Counter;
  bench.counters["seconds_per_iteration"] =
      Counter(double(iterations), Counter::kIsIterationInvariantRate | Counter::kInvert);
  if (unknowns > 0) bench.SetBytesProcessed(bench.iterations() * iterations * unknowns * 8 * int64_t{sizeof(double)});
}

void solver(benchmark::State& bench, int64_t side, int threads) {
  System system(side);
  CgOptions options = system.options;
  options.max_iterations = iterations_per_run;
  const kantor::Preconditioner<double> no_preconditioner{};
  const kantor::CgVectors<double> vectors{system.n,         1,          system.b(), system.x(), system.r(),
                                          system.p(),       system.q(), system.r(), true,       &system.state,
                                          system.history(), nullptr};
  for (auto _ : bench)
    kantor::cg_cpu<double>({threads, 0, nullptr}, &system.A, {}, no_preconditioner, vectors, options, {});
  report(bench, iterations_per_run, system.n);
}

// The passes of cg_cpu.cpp for an operator that is cheap to recompute, on one thread.
template <Test test>
void iterate(System& s) {
  double scratch[block_size];
  const int64_t halo = kantor::halo_of(s.A);
  double pq = 0, qq = 0, rr = 0;
  for (int64_t begin = 0, frontier = 0; begin < s.n; begin += block_size) {
    const int64_t end = std::min(begin + block_size, s.n), needed = std::min(end + halo, s.n);
    kantor::update_direction(needed - frontier, s.state.beta, s.r() + frontier, s.p() + frontier);
    frontier = needed;
    kantor::apply_rows(s.A, 0, s.p(), scratch, Range{begin, end});
    pq += kantor::dot(end - begin, s.p() + begin, scratch);
    if constexpr (test == Test::full) qq += kantor::dot(end - begin, scratch, scratch);
  }
  if constexpr (test != Test::blind)
    kantor::cg_after_apply(s.state, s.options, pq, qq);
  else
    s.state.alpha = s.state.rz / pq;
  for (int64_t begin = 0; begin < s.n; begin += block_size) {
    const int64_t end = std::min(begin + block_size, s.n);
    kantor::apply_rows(s.A, 0, s.p(), scratch, Range{begin, end});
    rr += kantor::update_iterate(end - begin, s.state.alpha, s.p() + begin, scratch, s.x() + begin, s.r() + begin);
  }
  kantor::cg_after_update(s.state, s.options, rr, s.history());
  kantor::cg_after_precondition(s.state, s.state.rr);
}

template <Test test>
void loop(benchmark::State& bench, int64_t side) {
  System system(side);
  for (auto _ : bench) {
    system.reset();
    for (int k = 0; k < iterations_per_run; ++k) iterate<test>(system);
  }
  if (!system.state.running()) bench.SkipWithError("the iteration stopped early");
  report(bench, iterations_per_run, system.n);
}

// rz, p.q and q.q of a run that never ends: every step takes the common path.
template <Test test>
void scalars(benchmark::State& bench) {
  System system(8);
  for (auto _ : bench) {
    double pq = 2 * system.state.rz, qq = 4 * system.state.rz;
    benchmark::DoNotOptimize(pq);
    benchmark::DoNotOptimize(qq);
    if constexpr (test != Test::blind)
      kantor::cg_after_apply(system.state, system.options, pq, qq);
    else
      system.state.alpha = system.state.rz / pq;
    benchmark::DoNotOptimize(system.state);
  }
  if (!system.state.running()) bench.SkipWithError("the iteration stopped early");
  report(bench, 1, 0);
}

}  // namespace

int main(int count, char** arguments) {
  using benchmark::RegisterBenchmark;
  for (const int64_t side : {32, 64, 128, 256}) {
    const std::string size = std::to_string(side);
    for (int threads = 1; threads <= omp_get_num_procs(); threads *= 2)
      RegisterBenchmark(("cg/" + size + "/" + std::to_string(threads) + "t").c_str(), solver, side, threads)
          ->UseRealTime();
    RegisterBenchmark(("loop/full/" + size).c_str(), loop<Test::full>, side);
    RegisterBenchmark(("loop/sign/" + size).c_str(), loop<Test::sign>, side);
    RegisterBenchmark(("loop/blind/" + size).c_str(), loop<Test::blind>, side);
  }
  RegisterBenchmark("scalars/full", scalars<Test::full>);
  RegisterBenchmark("scalars/blind", scalars<Test::blind>);
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
