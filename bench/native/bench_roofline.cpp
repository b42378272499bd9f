// The machine's limits, as Google Benchmarks: copy, triad and dot bandwidth against the working set, and the FMA peak.
//
//   bench_roofline [--threads=N] [--bytes=B] [--seconds=S] [--repetitions=R] [Google Benchmark's own flags]
//
// Bandwidth counts the words a kernel names (copy 2, triad 3, dot 2 per element), never the read-for-ownership that an
// ordinary store adds: that is why the *_nt variants, whose non-temporal stores skip that read, can be a third faster.
// `--bytes` is the working set: the sum over all arrays of the kernel. Without it: a ladder of sets, then the FMA peak.

#include <benchmark/benchmark.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::size_t cache_line = 64;
constexpr std::size_t traffic_per_region = std::size_t{64} << 20;  // long parallel regions: a fork costs microseconds

struct Options {
  int threads = 1;
  std::size_t bytes = 0;
  double seconds = 0.05;
  int repetitions = 5;
};

// Arrays on huge pages, each starting at another offset inside its page: equal offsets would make loads and stores of
// different arrays collide in the store buffer (4 KiB aliasing).
class Arrays {
 public:
  Arrays(int count, std::size_t elements) {
    for (int k = 0; k < count; ++k) {
      const std::size_t offset = static_cast<std::size_t>(k % 8) * 8640 / cache_line * cache_line;
      const std::size_t bytes = (elements * sizeof(double) + offset + huge_page - 1) / huge_page * huge_page;
      void* memory = std::aligned_alloc(huge_page, bytes);
      if (memory == nullptr) throw std::bad_alloc();
      madvise(memory, bytes, MADV_HUGEPAGE);
      blocks_.emplace_back(memory, &std::free);
      data_.push_back(reinterpret_cast<double*>(static_cast<char*>(memory) + offset));
    }
  }
  double* operator[](std::size_t k) const { return data_[k]; }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
  std::vector<double*> data_;
};

struct Range {
  std::size_t first, last;
};

// Whole cache lines per thread, so that no line is shared and vector stores stay aligned.
Range share(std::size_t elements, int thread, int threads) {
  constexpr std::size_t line = cache_line / sizeof(double);
  const std::size_t lines = elements / line;
  return {lines * static_cast<std::size_t>(thread) / static_cast<std::size_t>(threads) * line,
          lines * static_cast<std::size_t>(thread + 1) / static_cast<std::size_t>(threads) * line};
}

// Without this attribute GCC would turn the loop into memcpy, which switches to non-temporal stores by itself.
__attribute__((noinline, optimize("no-tree-loop-distribute-patterns"))) void copy(double* __restrict a,
                                                                                  const double* __restrict b,
                                                                                  const double*, Range range) {
  for (std::size_t i = range.first; i < range.last; ++i) a[i] = b[i];
}

__attribute__((noinline)) void triad(double* __restrict a, const double* __restrict b, const double* __restrict c,
                                     Range range) {
  for (std::size_t i = range.first; i < range.last; ++i) a[i] = b[i] + 1.5 * c[i];
}

__attribute__((noinline)) void dot(double* __restrict a, const double* __restrict b, const double* __restrict c,
                                   Range range) {
  constexpr std::size_t lanes = 64;  // enough independent partial sums to hide the latency of the additions
  double sum[lanes] = {};
  std::size_t i = range.first;
  for (; i + lanes <= range.last; i += lanes)
    for (std::size_t k = 0; k < lanes; ++k) sum[k] += b[i + k] * c[i + k];
  for (; i < range.last; ++i) sum[0] += b[i] * c[i];
  double total = 0;
  for (const double s : sum) total += s;
  benchmark::DoNotOptimize(a[range.first] = total);
}

#if defined(__AVX512F__)
#define KANTOR_BENCH_NON_TEMPORAL 1
void stream(double* to, __m512d value) { _mm512_stream_pd(to, value); }
__m512d load(const double* from) { return _mm512_load_pd(from); }
__m512d multiply_add(double s, __m512d a, __m512d b) { return _mm512_fmadd_pd(_mm512_set1_pd(s), a, b); }
constexpr std::size_t vector_doubles = 8;
#elif defined(__AVX__) && defined(__FMA__)
#define KANTOR_BENCH_NON_TEMPORAL 1
void stream(double* to, __m256d value) { _mm256_stream_pd(to, value); }
__m256d load(const double* from) { return _mm256_load_pd(from); }
__m256d multiply_add(double s, __m256d a, __m256d b) { return _mm256_fmadd_pd(_mm256_set1_pd(s), a, b); }
constexpr std::size_t vector_doubles = 4;
#endif

#ifdef KANTOR_BENCH_NON_TEMPORAL
__attribute__((noinline)) void copy_nt(double* a, const double* b, const double*, Range range) {
  for (std::size_t i = range.first; i < range.last; i += vector_doubles) stream(a + i, load(b + i));
  _mm_sfence();
}

__attribute__((noinline)) void triad_nt(double* a, const double* b, const double* c, Range range) {
  for (std::size_t i = range.first; i < range.last; i += vector_doubles)
    stream(a + i, multiply_add(1.5, load(c + i), load(b + i)));
  _mm_sfence();
}
#endif

using Kernel = void (*)(double*, const double*, const double*, Range);

void bandwidth(benchmark::State& state, Kernel kernel, int arrays, std::size_t working_set, int threads) {
  const std::size_t elements = working_set / (static_cast<std::size_t>(arrays) * sizeof(double)) / 64 * 64;
  const std::size_t bytes = elements * sizeof(double) * static_cast<std::size_t>(arrays);
  const std::size_t inner = std::max<std::size_t>(1, traffic_per_region / bytes);
  const Arrays memory(std::max(arrays, 3), elements);
#pragma omp parallel num_threads(threads)
  {
    const Range mine = share(elements, omp_get_thread_num(), threads);
    for (std::size_t k = 0; k < 3; ++k) std::fill(memory[k] + mine.first, memory[k] + mine.last, 1.0 + double(k));
  }
  for (auto _ : state) {
#pragma omp parallel num_threads(threads)
    {
      const Range mine = share(elements, omp_get_thread_num(), threads);
      for (std::size_t k = 0; k < inner; ++k) {
        kernel(memory[0], memory[1], memory[2], mine);
        benchmark::ClobberMemory();
      }
    }
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(bytes * inner) * state.iterations());
}

#if defined(__AVX512F__)
constexpr std::size_t vector_bytes = 64;
#elif defined(__AVX__)
constexpr std::size_t vector_bytes = 32;
#else
constexpr std::size_t vector_bytes = 16;
#endif

// Twelve independent chains of vector multiply-adds per thread: latency times issue width on current cores.
template <class T>
void fma_peak(benchmark::State& state, int threads) {
  using Vector [[gnu::vector_size(vector_bytes)]] = T;
  constexpr int chains = 12;
  constexpr int steps = 100'000;
  for (auto _ : state) {
#pragma omp parallel num_threads(threads)
    {
      Vector scale, shift, x[chains];
      for (std::size_t lane = 0; lane < vector_bytes / sizeof(T); ++lane) {
        scale[lane] = T(0.999);
        shift[lane] = T(0.001);
      }
      benchmark::DoNotOptimize(scale);
      benchmark::DoNotOptimize(shift);
      for (auto& chain : x) chain = scale;
      for (int step = 0; step < steps; ++step) {
#pragma GCC unroll 12
        for (int k = 0; k < chains; ++k) x[k] = x[k] * scale + shift;
      }
      for (auto& chain : x) benchmark::DoNotOptimize(chain);
    }
  }
  const double flops = 2.0 * chains * steps * double(vector_bytes / sizeof(T)) * threads;
  state.counters["flops"] = benchmark::Counter(flops * double(state.iterations()), benchmark::Counter::kIsRate);
}

// Without --bytes: a ladder from one thread's L2 to DRAM, which shows where each level of the hierarchy ends.
std::vector<std::size_t> ladder(int threads) {
  std::vector<std::size_t> sets = {(std::size_t{512} << 10) * static_cast<std::size_t>(threads)};
  for (const std::size_t mebibytes : {4, 16, 64, 256, 1024}) sets.push_back(mebibytes << 20);
  return sets;
}

std::string label(std::initializer_list<std::string> parts) {
  std::string name;
  for (const std::string& part : parts) name.append(name.empty() ? "" : "/").append(part);
  return name;
}

void register_all(const Options& options) {
  struct Entry {
    const char* name;
    Kernel kernel;
    int arrays;
  };
  const std::vector<Entry> entries = {
      {"copy", copy, 2},       {"triad", triad, 3},       {"dot", dot, 2},
#ifdef KANTOR_BENCH_NON_TEMPORAL
      {"copy_nt", copy_nt, 2}, {"triad_nt", triad_nt, 3},
#endif
  };
  const auto finish = [&](benchmark::internal::Benchmark* entry) {
    entry->UseRealTime()->MinTime(options.seconds)->Repetitions(options.repetitions);
  };
  const auto sets = options.bytes > 0 ? std::vector{options.bytes} : ladder(options.threads);
  const std::string threads = std::to_string(options.threads) + "t";
  for (const std::size_t bytes : sets)
    for (const auto& [name, kernel, arrays] : entries)
      finish(benchmark::RegisterBenchmark(label({name, std::to_string(bytes), threads}).c_str(), bandwidth, kernel,
                                          arrays, bytes, options.threads));
  if (options.bytes > 0) return;
  finish(benchmark::RegisterBenchmark(label({"fma_fp32", threads}).c_str(), fma_peak<float>, options.threads));
  finish(benchmark::RegisterBenchmark(label({"fma_fp64", threads}).c_str(), fma_peak<double>, options.threads));
}

template <class T>
bool take(std::string_view argument, std::string_view flag, T& value) {
  if (!argument.starts_with(flag)) return false;
  const std::string_view text = argument.substr(flag.size());
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value > 0)) {
    std::fprintf(stderr, "bench_roofline: expected a positive number in %.*s\n", int(argument.size()), argument.data());
    std::exit(2);
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  options.threads = omp_get_max_threads();
  std::vector<char*> rest = {arguments[0]};
  for (int k = 1; k < count; ++k) {
    const std::string_view argument = arguments[k];
    const bool ours = take(argument, "--threads=", options.threads) || take(argument, "--bytes=", options.bytes) ||
                      take(argument, "--seconds=", options.seconds) ||
                      take(argument, "--repetitions=", options.repetitions);
    if (!ours) rest.push_back(arguments[k]);
  }
  int left = static_cast<int>(rest.size());
  benchmark::Initialize(&left, rest.data());
  if (benchmark::ReportUnrecognizedArguments(left, rest.data())) return 2;
  register_all(options);
  benchmark::RunSpecifiedBenchmarks();
}
