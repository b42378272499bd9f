// The direction network on CUDA: one kernel for each convolution. The head, pooling and the sum with the upsampled
// activation are done by the kernel of the convolution before them. Memory traffic in activations of the level, read or
// written: the first convolution 1, a single one 2, a pair 5 (the residual is read as well). Pooling adds a coarse one;
// the last coarse pair reads and writes fine ones instead of writing coarse ones; the last fine pair writes none.
#include <array>
#include <string>
#include <vector>

#include "core/error.h"
#include "linalg/conv_kernels.h"
#include "linalg/direction_net.h"
#include "linalg/direction_net_kernels.h"

namespace kantor {
namespace {

constexpr size_t alignment = 256;
constexpr size_t aligned(size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// --- which kernels: by precision, channels, dimensions and planes of a tile ---

template <NetPrecision precision, class Tile_>
struct SumsOf {
  using Tile = Tile_;
  static constexpr TensorCore core = precision == NetPrecision::tf32 ? TensorCore::tf32_k8
                                     : Tile::channels == 8           ? TensorCore::bf16_k8
                                                                     : TensorCore::bf16_k16;
  using Middle = std::conditional_t<precision == NetPrecision::f32, FloatSum<Tile>, TensorCoreSum<Tile, core>>;
  using First = FirstSum<Tile, typename Middle::Element>;
};

int padded_channels(const DirectionNet& net) { return net.channels <= 8 ? 8 : net.channels <= 16 ? 16 : 32; }
size_t element_bytes(const DirectionNet& net) { return net.precision == NetPrecision::bf16 ? 2 : 4; }

Grid grid_of(const DirectionNet& net, const std::array<int64_t, 3>& sizes) {
  const auto [nz, ny, nx] =
      std::array{static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(sizes[2])};
  return net.dims == 3 ? Grid{nz, ny, nx} : Grid{ny, 1, nx};  // see conv_tile_kernels.h
}

// body(SumsOf<...>{}) for this network on a level of this size. Tiles have few planes where the grid is
// so small that otherwise most of the GPU would idle, and where a plane of activations takes much shared memory. The
// choice does not change a bit of the result.
template <NetPrecision precision, int channels, int dims, class Body>
void choose_planes(const Grid& grid, Body& body) {
  constexpr int most = channels * (precision == NetPrecision::bf16 ? 2 : 4) <= 32 ? 8 : 4;
  using Large = ConvTile<channels, dims, most>;
  const int64_t cells = int64_t{200} * Large::cells;  // in all blocks that a large GPU runs at once
  if (grid.cells() >= cells) return body(SumsOf<precision, Large>{});
  body(SumsOf<precision, ConvTile<channels, dims, 2>>{});
}

template <NetPrecision precision, class Body>
void choose_channels(const DirectionNet& net, const Grid& grid, Body& body) {
  const int channels = padded_channels(net);
  if (net.dims == 3) {
    if (channels == 8) choose_planes<precision, 8, 3>(grid, body);
    if (channels == 16) choose_planes<precision, 16, 3>(grid, body);
    if (channels == 32) choose_planes<precision, 32, 3>(grid, body);
  } else {
    if (channels == 8) choose_planes<precision, 8, 2>(grid, body);
    if (channels == 16) choose_planes<precision, 16, 2>(grid, body);
    if (channels == 32) choose_planes<precision, 32, 2>(grid, body);
  }
}

template <class Body>
void choose(const DirectionNet& net, const Grid& grid, Body&& body) {
  if (net.precision == NetPrecision::f32) choose_channels<NetPrecision::f32>(net, grid, body);
  if (net.precision == NetPrecision::tf32) choose_channels<NetPrecision::tf32>(net, grid, body);
  if (net.precision == NetPrecision::bf16) choose_channels<NetPrecision::bf16>(net, grid, body);
}

// --- the convolutions but the head, in order ---

struct Layers {
  int mid, post;
  int pool;   // b's layer
  int count;  // without the head

  explicit Layers(const DirectionNet& net)
      : mid(net.mid), post(net.post), pool(2 + 2 * net.pre), count(net.convolutions() - 1) {}

  int last_coarse() const { return pool + 2 * mid; }
  bool coarse(int layer) const { return layer > pool && layer <= last_coarse(); }

  // How far from a cell its result can matter, in cells of the fine level and each axis: up to the last layer's 0 each
  // convolution behind adds a cell of its level. A coarse cell counts as its 2^d fine ones, so that a fine cell which
  // is pooled is one cell farther than they are.
  int radius(int layer) const {
    if (layer > last_coarse()) return count - 1 - layer;
    if (layer > pool) return 2 * post + 2 * (last_coarse() - layer);
    return 2 * post + 4 * mid + 1 + (pool - layer);
  }
};

// --- prepared memory ---

struct Prepared {
  std::vector<size_t> weights, biases, needed;  // offset of each layer's
  size_t head = 0, occupied = 0, bytes = 0;
};

Grid tiles_of(const Grid& grid, const Grid& tile) {
  const auto tiles = [](int n, int size) { return (n + size - 1) / size; };
  return {tiles(grid.nz, tile.nz), tiles(grid.ny, tile.ny), tiles(grid.nx, tile.nx)};
}

template <class Tile>
constexpr Grid tile_size() {
  return {Tile::planes, Tile::rows, Tile::columns};
}

Grid level_of(const DirectionNet& net, const Layers& layers, int layer) {
  return grid_of(net, layers.coarse(layer) ? net.coarse() : net.fine());
}

Prepared prepared_layout(const DirectionNet& net) {
  require(net.channels <= 32, "direction_net: channels: expected at most 32 on CUDA, got " +
                                  std::to_string(net.channels) + "; move the network to the CPU");
  const Layers layers(net);
  Prepared out;
  const auto reserve = [&](size_t bytes) {
    const size_t at = out.bytes;
    out.bytes += aligned(bytes);
    return at;
  };
  const size_t channels = padded_channels(net);
  for (int layer = 0; layer < layers.count; ++layer) {
    choose(net, level_of(net, layers, layer), [&]<class Sums>(Sums) {
      using Middle = typename Sums::Middle;
      using First = typename Sums::First;
      out.weights.push_back(reserve(layer == 0 ? First::weights * sizeof(typename First::Weight)
                                               : Middle::weights * sizeof(typename Middle::Weight)));
      out.biases.push_back(reserve(channels * sizeof(float)));
      const Grid tiles = tiles_of(level_of(net, layers, layer), tile_size<typename Sums::Tile>());
      out.needed.push_back(reserve(net.mask ? tiles.cells() : 0));
    });
  }
  out.head = reserve((channels + 1) * sizeof(float));
  if (net.mask) out.occupied = reserve(blocks_of(grid_of(net, net.grid)).cells());
  return out;
}

template <class T>
T* at(const void* memory, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(const_cast<void*>(memory)) + offset);
}

constexpr unsigned threads_for_preparation = 128;
unsigned blocks_for_preparation(int64_t n) { return simt::blocks_for(n, threads_for_preparation, 1024); }

void pad(const Exec& exec, const float* from, int count, int padded, float* to) {
  SIMT_LAUNCH(pad_kernel, 1, threads_for_preparation, 0, exec.stream, from, count, padded, to);
}

template <class Sum>
void order_weights(const Exec& exec, const float* from, int out, int in, int taps, void* to) {
  SIMT_LAUNCH((order_weights_kernel<Sum>), blocks_for_preparation(Sum::weights), threads_for_preparation, 0,
              exec.stream, from, out, in, taps, static_cast<typename Sum::Weight*>(to));
}

// --- a run ---

struct Activations {
  void *fine[2], *coarse[2];
};

// What layer `layer` does with which activations; see direction_net.h for the network.
void connect(const Layers& layers, const Activations& memory, int layer, Convolution& a) {
  a.relu = layer > 0;
  a.finish = Finish::store;
  if (layer <= layers.pool) {
    // u = fine[1] between pairs; first, second, and b go 0, 1, ..., 0
    const bool second_of_pair = layer > 1 && layer < layers.pool && layer % 2 == 1;
    const int target = layer % 2;
    a.input = memory.fine[1 - target];
    a.output = memory.fine[target];
    if (second_of_pair) a.residual = a.output;
    if (layer == layers.pool) a.finish = Finish::pool, a.other = memory.coarse[0];
    return;
  }
  const int start =
      layers.coarse(layer) ? layers.pool : layers.last_coarse();  // of the stage; u = ...[0] between pairs
  void* const* stage = layers.coarse(layer) ? memory.coarse : memory.fine;
  const int target = (layer - start) % 2;
  a.input = stage[1 - target];
  a.output = stage[target];
  if (target == 0) a.residual = a.output;
  if (layer == layers.last_coarse()) a.finish = Finish::spread, a.other = memory.fine[0];
  if (layer == layers.count - 1) a.finish = Finish::head;
}

size_t activation_bytes(const DirectionNet& net, int64_t batch, const std::array<int64_t, 3>& sizes) {
  return aligned(static_cast<size_t>(batch * sizes[0] * sizes[1] * sizes[2]) * padded_channels(net) *
                 element_bytes(net));
}

}  // namespace

size_t direction_net_prepared_bytes_cuda(const DirectionNet& net) { return prepared_layout(net).bytes; }

void prepare_direction_net_cuda(const Exec& exec, const DirectionNet& net, void* prepared) {
  const simt::DeviceGuard guard(exec.device);
  const Layers layers(net);
  const Prepared layout = prepared_layout(net);
  const int channels = padded_channels(net);
  const Grid grid = grid_of(net, net.grid), blocks = blocks_of(grid);
  const auto bias = [&](int convolution) { return net.biases ? net.biases[convolution] : nullptr; };
  auto* occupied = at<uint8_t>(prepared, layout.occupied);
  if (net.mask)
    SIMT_LAUNCH(occupied_blocks_kernel, blocks_for_preparation(blocks.cells()), threads_for_preparation, 0, exec.stream,
                grid, net.mask, occupied);
  for (int layer = 0; layer < layers.count; ++layer) {
    const Grid level = level_of(net, layers, layer);
    choose(net, level, [&]<class Sums>(Sums) {
      void* weights = at<char>(prepared, layout.weights[layer]);
      if (layer == 0)
        order_weights<typename Sums::First>(exec, net.weights[layer], net.channels, 1, net.taps(), weights);
      else
        order_weights<typename Sums::Middle>(exec, net.weights[layer], net.channels, net.channels, net.taps(), weights);
      pad(exec, bias(layer), net.channels, channels, at<float>(prepared, layout.biases[layer]));
      if (!net.mask) return;
      Grid tile = tile_size<typename Sums::Tile>();
      const Grid tiles = tiles_of(level, tile);
      if (layers.coarse(layer)) tile = {2 * tile.nz, net.dims == 3 ? 2 * tile.ny : tile.ny, 2 * tile.nx};
      SIMT_LAUNCH(needed_tiles_kernel, blocks_for_preparation(tiles.cells()), threads_for_preparation, 0, exec.stream,
                  blocks, occupied, tiles, tile, layers.radius(layer), at<uint8_t>(prepared, layout.needed[layer]));
    });
  }
  auto* head = at<float>(prepared, layout.head);
  pad(exec, net.weights[layers.count], net.channels, channels, head);
  pad(exec, bias(layers.count), 1, 1, head + channels);
}

size_t direction_net_workspace_cuda(const DirectionNet& net, int64_t batch) {
  return 2 * (activation_bytes(net, batch, net.fine()) + activation_bytes(net, batch, net.coarse()));
}

void direction_net_cuda(const Exec& exec, const DirectionNet& net, const void* prepared, int64_t batch, const float* r,
                        float* q, void* workspace) {
  const simt::DeviceGuard guard(exec.device);
  const Layers layers(net);
  const Prepared layout = prepared_layout(net);
  const size_t fine = activation_bytes(net, batch, net.fine()), coarse = activation_bytes(net, batch, net.coarse());
  const Activations memory{{at<char>(workspace, 0), at<char>(workspace, fine)},
                           {at<char>(workspace, 2 * fine), at<char>(workspace, 2 * fine + coarse)}};
  for (int layer = 0; layer < layers.count; ++layer) {
    const Grid level = level_of(net, layers, layer);
    choose(net, level, [&]<class Sums>(Sums) {
      const Grid tiles = tiles_of(level, tile_size<typename Sums::Tile>());
      Convolution a{};
      a.grid = level;
      a.tiles_z = tiles.nz, a.tiles_y = tiles.ny, a.tiles_x = tiles.nx;
      if (net.mask) a.needed = at<uint8_t>(prepared, layout.needed[layer]);
      a.weights = at<char>(prepared, layout.weights[layer]);
      a.bias = at<float>(prepared, layout.biases[layer]);
      a.outside = grid_of(net, net.grid);
      a.mask = net.mask;
      a.head = at<float>(prepared, layout.head);
      a.q = q;
      connect(layers, memory, layer, a);
      if (layer == 0) a.input = r;
      require(batch * a.tiles() < (int64_t{1} << 31), "direction_net: r: too large a batch; split it");
      if (layer == 0)
        launch_convolution<typename Sums::First, typename Sums::Tile>(exec.stream, batch, a);
      else
        launch_convolution<typename Sums::Middle, typename Sums::Tile>(exec.stream, batch, a);
    });
  }
}

}  // namespace kantor
