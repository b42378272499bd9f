// Inference of the direction network without Python.
//
//   net/<side>/<channels>c/<precision>/<threads>t   the whole network "64"; FLOPS as direct convolutions count them
//   first, layer, last/<side>/<channels>c           one layer on one thread: 1 -> C, C -> C with relu, C -> C with
//   relu,
//                                                   residual sum and the last layer C -> 1 fused into it
#include <benchmark/benchmark.h>
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "linalg/conv_layer.h"
#include "linalg/direction_net.h"

namespace {

using kantor::DirectionNet;
using kantor::NetPrecision;

using Memory = std::unique_ptr<char, void (*)(void*)>;

Memory allocate(size_t bytes) {
  constexpr size_t page = size_t{2} << 20;
  const size_t rounded = (bytes + page - 1) / page * page;
  auto* memory = static_cast<char*>(std::aligned_alloc(page, rounded));
  kantor::advise_huge_pages(memory, rounded);
  std::fill_n(memory, rounded, char{0});
  return {memory, &std::free};
}

std::vector<float> normal(size_t n, float scale) {
  std::mt19937 random(0);
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> values(n);
  for (float& value : values) value = distribution(random);
  return values;
}

void report(benchmark::State& bench, double operations) {
  bench.counters["FLOPS"] = benchmark::Counter(operations, benchmark::Counter::kIsIterationInvariantRate);
}

void whole(benchmark::State& bench, int64_t side, int channels, NetPrecision precision, int threads) {
  DirectionNet net;
  net.channels = channels, net.grid = {side, side, side}, net.precision = precision;
  const double cells = static_cast<double>(net.cells()), C = channels;
  const int last = net.convolutions() - 1;
  const std::vector<float> first = normal(27 * channels, 0.1f), head = normal(channels, 0.1f);
  const std::vector<float> inner = normal(27 * channels * channels, 0.3f / static_cast<float>(channels));
  std::vector<const float*> weights(last + 1, inner.data());
  weights[0] = first.data(), weights[last] = head.data();
  net.weights = weights.data();
  const kantor::Exec exec{threads};
  const Memory prepared = allocate(kantor::direction_net_prepared_bytes_cpu(net));
  kantor::prepare_direction_net_cpu(exec, net, prepared.get());
  const Memory workspace = allocate(kantor::direction_net_workspace_cpu(exec, net, 1));
  const std::vector<float> r = normal(net.cells(), 1.0f);
  std::vector<float> q(net.cells());
  for (auto _ : bench) kantor::direction_net_cpu(exec, net, prepared.get(), 1, r.data(), q.data(), workspace.get());
  report(bench, cells * (54 * C + 2 * C + (8 + 6.0 / 8) * 54 * C * C));
}

enum class Part { first, layer, last };

void one_layer(benchmark::State& bench, int64_t side, int channels, Part part) {
  const kantor::WinogradKernels& kernels = kantor::winograd_kernels(channels, false, 512);
  const int padded = kantor::padded_channels(kernels, channels);
  const kantor::Level level{3, {side, side, side}, kernels.most_tiles};
  const int64_t cells = level.cells(), plane = (side + 2) * (side + 2);
  const Memory in = allocate(4 * cells * padded), out = allocate(4 * cells * padded);
  const Memory zeros = allocate(4 * side * padded);
  const size_t scratch_bytes = kantor::conv_scratch_bytes(kernels, level, padded);
  const Memory scratch = allocate(scratch_bytes);
  const std::vector<float> weights = normal(27 * channels * channels, 0.1f), bias(padded + 1);
  const std::vector<float> r = normal((side + 2) * plane + 16, 1.0f), first = normal(27 * padded, 0.1f);
  std::vector<float> q(cells);
  const Memory u = allocate(kantor::winograd_weight_bytes(kernels, channels, 3));
  kantor::winograd_weights(kernels, channels, 3, weights.data(), u.get());
  int64_t offsets[27];
  for (int tap = 0; tap < 27; ++tap) offsets[tap] = tap / 9 * plane + tap / 3 % 3 * (side + 2) + tap % 3;
  kantor::ConvLayer layer{&kernels,    level,   channels,    padded,   u.get(),
                          bias.data(), nullptr, zeros.get(), in.get(), out.get()};
  if (part == Part::last) {
    layer.residual = true, layer.tail = kantor::Tail::head;
    layer.head = first.data(), layer.q = q.data(), layer.q_grid = level.grid;
  }
  for (auto _ : bench) {
    if (part != Part::first) {
      kantor::Team::run(1, false,
                        [&](kantor::Team& team) { kantor::convolve(team, layer, scratch.get(), scratch_bytes); });
      continue;
    }
    for (int64_t z = 0; z < side; ++z)
      for (int64_t y = 0; y < side; ++y)
        kernels.first({r.data() + z * plane + y * (side + 2), offsets, 27, side, padded, first.data(), bias.data(),
                       out.get() + 4 * (z * side + y) * side * padded});
  }
  const double C = channels, work = part == Part::first ? 54 * C : 54 * C * C + (part == Part::last ? 2 * C : 0);
  report(bench, static_cast<double>(cells) * work);
}

}  // namespace

int main(int count, char** arguments) {
  using benchmark::RegisterBenchmark;
  const auto milliseconds = benchmark::kMillisecond;
  for (const int64_t side : {32, 64, 128}) {
    const std::string size = std::to_string(side);
    for (const int channels : {4, 8, 16, 32}) {
      if (side == 128 && channels == 32) continue;  // 2.5 GB
      const std::string shape = size + "/" + std::to_string(channels) + "c";
      for (const NetPrecision precision : {NetPrecision::f32, NetPrecision::bf16})
        for (int threads = 1; threads <= omp_get_num_procs(); threads *= 2)
          RegisterBenchmark(("net/" + shape + (precision == NetPrecision::f32 ? "/float32/" : "/bfloat16/") +
                             std::to_string(threads) + "t")
                                .c_str(),
                            whole, side, channels, precision, threads)
              ->UseRealTime()
              ->Unit(milliseconds);
      RegisterBenchmark(("first/" + shape).c_str(), one_layer, side, channels, Part::first)->Unit(milliseconds);
      RegisterBenchmark(("layer/" + shape).c_str(), one_layer, side, channels, Part::layer)->Unit(milliseconds);
      RegisterBenchmark(("last/" + shape).c_str(), one_layer, side, channels, Part::last)->Unit(milliseconds);
    }
  }
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 2;
  benchmark::RunSpecifiedBenchmarks();
}
