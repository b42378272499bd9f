// The CUDA code of the direction network on the emulator: against plain loops in double precision, in every order of
// threads and blocks, and with tiles of any number of planes.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "linalg/direction_net_cuda.cu"
#include "simt_testing.h"

using namespace kantor;
using namespace kantor::simt_test;

namespace {

using Values = std::vector<double>;
using Sizes = std::array<int64_t, 3>;

// --- the network in plain loops ---

struct Field {  // channels first
  int channels;
  Sizes size;
  Values at;
  Field(int channels_, Sizes size_)
      : channels(channels_), size(size_), at(channels_ * size_[0] * size_[1] * size_[2]) {}
  bool has(int64_t z, int64_t y, int64_t x) const {
    return z >= 0 && z < size[0] && y >= 0 && y < size[1] && x >= 0 && x < size[2];
  }
  double& operator()(int c, int64_t z, int64_t y, int64_t x) {
    return at[static_cast<size_t>(((c * size[0] + z) * size[1] + y) * size[2] + x)];
  }
  double operator()(int c, int64_t z, int64_t y, int64_t x) const { return const_cast<Field&>(*this)(c, z, y, x); }
};

template <class F>
void each_cell(const Sizes& size, F&& f) {
  for (int64_t z = 0; z < size[0]; ++z)
    for (int64_t y = 0; y < size[1]; ++y)
      for (int64_t x = 0; x < size[2]; ++x) f(z, y, x);
}

struct Network {
  DirectionNet net;
  std::vector<std::vector<float>> weights, biases;
  std::vector<const float*> weight_pointers, bias_pointers;
  std::vector<uint8_t> mask;

  Network(int dims, int channels, Sizes grid, NetPrecision precision, bool biased = true, int pairs = 2) {
    net.dims = dims, net.channels = channels, net.grid = grid, net.precision = precision;
    net.pre = pairs / 2, net.mid = net.post = pairs;
    const int count = net.convolutions();
    for (int i = 0; i < count; ++i) {
      const int in = i == 0 ? 1 : channels, out = i + 1 == count ? 1 : channels, taps = i + 1 == count ? 1 : net.taps();
      weights.push_back(random_values<float>(static_cast<size_t>(in * out * taps), 100 + i));
      for (float& w : weights.back()) w *= 0.14f / std::sqrt(static_cast<float>(in * taps));  // keeps the size
      biases.push_back(random_values<float>(static_cast<size_t>(out), 200 + i));
      for (float& b : biases.back()) b *= 0.1f;
    }
    for (float& w : weights.back()) w = std::fabs(w);  // or q may be the small difference of large numbers
    for (int i = 0; i < count; ++i) {
      weight_pointers.push_back(weights[i].data());
      bias_pointers.push_back(biased && i != 2 ? biases[i].data() : nullptr);
    }
  }

  // A slab of fluid cells, and a lone one.
  void set_mask() {
    mask.assign(static_cast<size_t>(net.cells()), 0);
    size_t i = 0;
    each_cell(net.grid, [&](int64_t, int64_t y, int64_t x) { mask[i++] = x >= 1 && x < 6 && y != 3; });
    mask.back() = 1;
  }

  Field convolve(const Field& in, int index, bool relu) const {
    const int out_channels = index + 1 == net.convolutions() ? 1 : net.channels;
    const int side = index + 1 == net.convolutions() ? 0 : 1, side_z = net.dims == 3 ? side : 0;
    Field out(out_channels, in.size);
    each_cell(in.size, [&](int64_t z, int64_t y, int64_t x) {
      for (int o = 0; o < out_channels; ++o) {
        double sum = bias_pointers[index] ? bias_pointers[index][o] : 0.0;
        const float* w = weight_pointers[index] + size_t(o) * weights[index].size() / out_channels;
        for (int c = 0; c < in.channels; ++c)
          for (int dz = -side_z; dz <= side_z; ++dz)
            for (int dy = -side; dy <= side; ++dy)
              for (int dx = -side; dx <= side; ++dx, ++w)
                if (in.has(z + dz, y + dy, x + dx)) sum += double{*w} * in(c, z + dz, y + dy, x + dx);
        out(o, z, y, x) = relu && sum < 0 ? 0 : sum;
      }
    });
    return out;
  }

  Values expected(const float* r) const {
    Field in(1, net.fine());
    size_t i = 0;
    each_cell(net.grid, [&](int64_t z, int64_t y, int64_t x) {
      in(0, z, y, x) = mask.empty() || mask[i] ? double{r[i]} : 0.0;
      ++i;
    });
    int layer = 0;
    const auto pairs = [&](Field u, int count) {
      for (int k = 0; k < count; ++k) {
        const Field v = convolve(convolve(u, layer, true), layer + 1, true);
        layer += 2;
        for (size_t j = 0; j < u.at.size(); ++j) u.at[j] += v.at[j];
      }
      return u;
    };
    Field a = convolve(convolve(in, 0, false), 1, true);
    layer = 2;
    a = pairs(a, net.pre);
    Field b = convolve(a, layer++, true);
    const int64_t in_z = net.dims == 3 ? 2 : 1;
    Field u(net.channels, net.coarse());
    for (int c = 0; c < net.channels; ++c)
      each_cell(b.size, [&](int64_t z, int64_t y, int64_t x) {
        u(c, z / in_z, y / 2, x / 2) += b(c, z, y, x) / static_cast<double>(4 * in_z);
      });
    u = pairs(u, net.mid);
    for (int c = 0; c < net.channels; ++c)
      each_cell(b.size, [&](int64_t z, int64_t y, int64_t x) { b(c, z, y, x) += u(c, z / in_z, y / 2, x / 2); });
    u = pairs(b, net.post);
    const Field q = convolve(u, layer, false);
    Values out;
    i = 0;
    each_cell(net.grid, [&](int64_t z, int64_t y, int64_t x) {
      out.push_back(mask.empty() || mask[i] ? q(0, z, y, x) : 0.0);
      ++i;
    });
    return out;
  }

  // Memory comes filled with NaN, of float32 and bfloat16.
  std::vector<float> run(int64_t batch, const std::vector<float>& r) {
    net.weights = weight_pointers.data(), net.biases = bias_pointers.data();
    net.mask = mask.empty() ? nullptr : mask.data();
    const auto memory = [](size_t bytes) {
      std::vector<Words<4>> words(bytes / 16);
      std::memset(static_cast<void*>(words.data()), 0xff, bytes);
      return words;
    };
    auto prepared = memory(direction_net_prepared_bytes_cuda(net));
    auto workspace = memory(direction_net_workspace_cuda(net, batch));
    std::vector<float> q(r.size(), NAN);
    prepare_direction_net_cuda({}, net, prepared.data());
    net.weights = net.biases = nullptr;
    direction_net_cuda({}, net, prepared.data(), batch, r.data(), q.data(), workspace.data());
    return q;
  }
};

double largest(const Values& values) {
  double most = 0;
  for (const double v : values) most = std::fmax(most, std::fabs(v));
  return most;
}

double error(const std::vector<float>& actual, const Values& expected) {
  double most = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(double{actual[i]} - expected[i]);
    if (!(difference <= most)) most = difference;  // NaN too
  }
  return most / largest(expected);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Case {
  NetPrecision precision;
  double tolerance;
};
// Instrumented code takes ten times as long: a part of the cases visits all of it.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif
constexpr Case cases[] = {{NetPrecision::f32, 1e-5}, {NetPrecision::tf32, 2e-3}, {NetPrecision::bf16, 2e-2}};

}  // namespace

TEST_CASE("the network is that of plain loops") {
  for (const Case& c : cases)
    for (const int channels : {4, 8, 12, 16, 32})
      for (const Sizes& grid : {Sizes{5, 10, 19}, Sizes{1, 1, 1}, Sizes{1, 21, 70}, Sizes{1, 1, 3}}) {
        if (sanitized && channels != 4 && channels != 16) continue;
        const int dims = grid[0] == 1 && grid[1] > 1 ? 2 : 3;
        for (const bool masked : {false, true}) {
          CAPTURE(static_cast<int>(c.precision));
          CAPTURE(channels);
          CAPTURE(grid[1]);
          CAPTURE(masked);
          Network network(dims, channels, grid, c.precision, !masked);
          if (masked) network.set_mask();
          const auto r = random_values<float>(static_cast<size_t>(network.net.cells()));
          const Values expected = network.expected(r.data());
          REQUIRE(largest(expected) > 0);
          CHECK(error(network.run(1, r), expected) < c.tolerance);
        }
      }
}

TEST_CASE("batches and orders of threads and blocks change no bit") {
  for (const Case& c : cases)
    for (const int dims : {2, 3}) {
      if (sanitized && c.precision == NetPrecision::tf32) continue;
      Network network(dims, 16, dims == 3 ? Sizes{3, 5, 17} : Sizes{1, 5, 65}, c.precision, true, 1);
      const auto cells = static_cast<size_t>(network.net.cells());
      auto r = random_values<float>(cells), q = network.run(1, r);
      r.insert(r.end(), cells, 0.25f);
      r.insert(r.end(), r.begin(), r.begin() + static_cast<long>(cells));
      network.set_mask();
      const auto first = network.run(3, r);
      CHECK(std::memcmp(first.data(), first.data() + 2 * cells, cells * sizeof(float)) == 0);
      network.mask.clear();
      under_each_schedule([&] {
        const auto again = network.run(3, r);
        CHECK(std::memcmp(again.data(), q.data(), cells * sizeof(float)) == 0);
        network.set_mask();
        CHECK(same_bits(network.run(3, r), first));
        network.mask.clear();
      });
    }
}

TEST_CASE("tiles that nothing on the mask depends on are left out, and no bit changes") {
  for (const Case& c : cases)
    for (const int dims : {2, 3}) {
      if (sanitized && c.precision == NetPrecision::tf32) continue;
      Network network(dims, 8, dims == 3 ? Sizes{6, 12, 70} : Sizes{1, 12, 300}, c.precision);
      network.set_mask();
      network.mask.back() = 0;
      auto r = random_values<float>(static_cast<size_t>(network.net.cells()));
      const auto skipping = network.run(1, r);
      for (size_t i = 0; i < r.size(); ++i) r[i] = network.mask[i] ? r[i] : 0;
      const auto mask = std::exchange(network.mask, {});
      auto everything = network.run(1, r);
      for (size_t i = 0; i < r.size(); ++i) everything[i] = mask[i] ? everything[i] : 0;
      CHECK(same_bits(skipping, everything));
      network.mask.assign(mask.size(), 0);  // no fluid at all
      for (const float q : network.run(1, r)) REQUIRE(q == 0);
    }
}

TEST_CASE("tiles are needed from a cell's receptive field inwards, and hardly farther") {
  Network network(2, 8, Sizes{1, 64, 512}, NetPrecision::f32);
  network.mask.assign(static_cast<size_t>(network.net.cells()), 0);
  network.mask[0] = 1;
  network.run(1, random_values<float>(static_cast<size_t>(network.net.cells())));  // sets the pointers
  network.net.weights = network.weight_pointers.data();
  const DirectionNet& net = network.net;
  std::vector<uint8_t> prepared(direction_net_prepared_bytes_cuda(net));
  prepare_direction_net_cuda({}, net, prepared.data());
  const Prepared layout = prepared_layout(net);
  const Layers layers(net);
  for (int layer = 0; layer < layers.count; ++layer) {
    // Tiles of 64 columns and 2 planes of the layer's level.
    const int scale = layers.coarse(layer) ? 2 : 1, columns = 512 / 64 / scale, planes = 64 / 2 / scale;
    for (int i = 0; i < planes * columns; ++i) {
      const int z = i / columns * 2 * scale, x = i % columns * 64 * scale, nearest = std::max(z, x);
      const bool needed = prepared[layout.needed[layer] + static_cast<size_t>(i)] != 0;
      CAPTURE(layer);
      CAPTURE(i);
      if (nearest <= layers.radius(layer)) REQUIRE(needed);
      if (nearest > layers.radius(layer) + block_edge) REQUIRE(!needed);
    }
  }
  CHECK(layers.radius(layers.count - 1) == 0);
  CHECK(layers.radius(0) == 17);  // 4 after the sum, 8 coarser, 1 of pooling, and b's and both of the pair and a's
}

namespace {

// A convolution by itself, all that it leaves behind in one vector.
template <class Sum, class Tile>
std::vector<float> convolve_alone(Finish finish, bool residual) {
  constexpr int channels = Tile::channels;
  using Element = typename Sum::Element;
  const Grid grid{10, Tile::middle_taps == 3 ? 6 : 1, 20};
  const auto count = static_cast<size_t>(grid.cells() * channels);
  const auto aligned = [](const std::vector<float>& values) {
    std::vector<Words<4>> out(values.size() / (16 / sizeof(Element)));
    auto* to = reinterpret_cast<Element*>(out.data());
    for (size_t i = 0; i < values.size(); ++i)
      if constexpr (sizeof(Element) == 2)
        to[i] = to_bf16(values[i]);
      else
        to[i] = values[i];
    return out;
  };
  const auto weights = random_values<float>(Tile::taps * channels * channels, 1);
  std::vector<Words<4>> ordered(weights.size() / 4);
  SIMT_LAUNCH((order_weights_kernel<Sum>), 3, 64, 0, nullptr, weights.data(), channels, channels, Tile::taps,
              reinterpret_cast<typename Sum::Weight*>(ordered.data()));
  auto input = aligned(random_values<float>(2 * count, 2)), output = aligned(random_values<float>(2 * count, 3));
  auto other = aligned(random_values<float>(16 * count, 4));
  std::vector<Words<4>> head(channels / 4 + 1);
  const auto head_values = random_values<float>(channels + 1, 5);
  std::memcpy(static_cast<void*>(head.data()), head_values.data(), sizeof(float) * (channels + 1));
  std::vector<float> q(static_cast<size_t>(2 * grid.cells()));
  const Grid tiles = tiles_of(grid, tile_size<Tile>());
  Convolution a{};
  a.grid = a.outside = grid;
  a.tiles_z = tiles.nz, a.tiles_y = tiles.ny, a.tiles_x = tiles.nx;
  a.input = input.data(), a.output = output.data(), a.other = other.data(), a.weights = ordered.data();
  if (residual) a.residual = output.data();
  a.head = reinterpret_cast<const float*>(head.data());
  a.bias = a.head;
  a.relu = true;
  a.finish = finish;
  a.q = q.data();
  launch_convolution<Sum, Tile>(nullptr, 2, a);
  const auto append = [&](const std::vector<Words<4>>& words) {
    for (const auto& four : words)
      for (const uint32_t word : four.at) q.push_back(std::bit_cast<float>(word));
  };
  append(output);
  append(other);
  return q;
}

template <NetPrecision precision, int channels, int dims>
void compare_planes() {
  CAPTURE(channels);
  CAPTURE(dims);
  for (const Finish finish : {Finish::store, Finish::pool, Finish::spread, Finish::head})
    for (const bool residual : {false, true}) {
      const auto run = [&]<int planes>(std::integral_constant<int, planes>) {
        using Tile = ConvTile<channels, dims, planes>;
        return convolve_alone<typename SumsOf<precision, Tile>::Middle, Tile>(finish, residual);
      };
      const auto two = run(std::integral_constant<int, 2>{});
      CHECK(same_bits(two, run(std::integral_constant<int, 4>{})));
      CHECK(same_bits(two, run(std::integral_constant<int, 8>{})));
    }
}

}  // namespace

TEST_CASE("the number of planes of a tile changes no bit") {
  compare_planes<NetPrecision::f32, 8, 3>();
  compare_planes<NetPrecision::f32, 16, 2>();
  compare_planes<NetPrecision::tf32, 16, 3>();
  compare_planes<NetPrecision::tf32, 32, 2>();
  compare_planes<NetPrecision::bf16, 8, 2>();
  compare_planes<NetPrecision::bf16, 16, 3>();
  compare_planes<NetPrecision::bf16, 32, 3>();
}

TEST_CASE("too many channels are refused") {
  const Network network(3, 36, Sizes{2, 2, 2}, NetPrecision::f32);
  CHECK_THROWS_WITH_AS(direction_net_prepared_bytes_cuda(network.net), doctest::Contains("expected at most 32 on CUDA"),
                       std::invalid_argument);
}

TEST_CASE("rounding to bfloat16 and TF32") {
  CHECK(from_bf16(to_bf16(1.0f)) == 1.0f);
  CHECK(from_bf16(to_bf16(1.0f + 0x1p-8f)) == 1.0f);  // a tie, to even
  CHECK(from_bf16(to_bf16(1.0f + 0x1.8p-7f)) == 1.0f + 0x1p-6f);
  CHECK(from_bf16(to_bf16(-INFINITY)) == -INFINITY);
  CHECK(std::isnan(from_bf16(to_bf16(NAN))));
  const auto tf32 = [](float x) { return std::bit_cast<float>(to_tf32(std::bit_cast<uint32_t>(x))); };
  CHECK(tf32(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f);  // a tie, away from zero
  CHECK(tf32(-1.0f - 0x1p-12f) == -1.0f);
  CHECK(tf32(INFINITY) == INFINITY);
  CHECK(std::isnan(tf32(NAN)));
}
