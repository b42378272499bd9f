#include <algorithm>
#include <cstring>
#include <vector>

#include "linalg/conv_layer.h"
#include "linalg/direction_net.h"

namespace kantor {
namespace {

using Grid = std::array<int64_t, 3>;
using Map = std::vector<uint8_t>;  // a byte a cell

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Where everything is in `prepared`, and the shapes of the layers; a function of the description and the processor.
struct Plan {
  explicit Plan(const DirectionNet& net)
      : kernels(winograd_kernels(net.channels, net.precision == NetPrecision::bf16, net.widest)),
        channels(padded_channels(kernels, net.channels)),
        fine{net.dims, net.fine(), kernels.most_tiles},
        coarse{net.dims, net.coarse(), kernels.most_tiles},
        first_coarse(3 + 2 * net.pre),
        end_coarse(first_coarse + 2 * net.mid),
        head_layer(net.convolutions() - 1) {
    const size_t vector = rounded(sizeof(float) * (channels + 1));
    u_bytes = rounded(winograd_weight_bytes(kernels, net.channels, net.dims == 3 ? 3 : 1));
    first_bias = rounded(sizeof(float) * net.taps() * channels);
    convolutions = first_bias + vector;
    convolution_bytes = u_bytes + vector;
    head = convolutions + (head_layer - 1) * convolution_bytes;
    maps = head + vector;
    bytes = maps;
    if (net.mask)
      for (int layer = 1; layer < head_layer; ++layer) bytes += rounded(level(layer).map_size());
  }

  bool is_coarse(int layer) const { return layer >= first_coarse && layer < end_coarse; }
  const Level& level(int layer) const { return is_coarse(layer) ? coarse : fine; }
  size_t u(int layer) const { return convolutions + (layer - 1) * convolution_bytes; }
  size_t bias(int layer) const { return u(layer) + u_bytes; }
  size_t map(int layer) const {
    size_t at = maps;
    for (int before = 1; before < layer; ++before) at += rounded(level(before).map_size());
    return at;
  }

  const WinogradKernels& kernels;
  int channels;  // padded
  Level fine, coarse;
  int first_coarse, end_coarse;  // layers on the coarse level
  int head_layer;
  size_t u_bytes, first_bias, convolutions, convolution_bytes, head, maps, bytes;
};

// Cells of which a neighbour, diagonal ones included, is set.
void dilate(Map& map, const Grid& grid) {
  const int64_t strides[3] = {grid[1] * grid[2], grid[2], 1};
  Map before;
  for (int axis = 0; axis < 3; ++axis) {
    before = map;
    const int64_t stride = strides[axis], line = grid[axis] * stride, cells = static_cast<int64_t>(map.size());
    for (int64_t begin = 0; begin < cells; begin += line) {
      for (int64_t i = begin; i < begin + line - stride; ++i) map[i] |= before[i + stride];
      for (int64_t i = begin + stride; i < begin + line; ++i) map[i] |= before[i - stride];
    }
  }
}

// The coarse cell of every fine cell; calls body(fine, coarse).
template <class Body>
void for_each_child(const Plan& plan, Body&& body) {
  const Grid &fine = plan.fine.grid, &coarse = plan.coarse.grid;
  const int64_t in_z = plan.fine.dims == 3 ? 2 : 1;
  for (int64_t z = 0, i = 0; z < fine[0]; ++z)
    for (int64_t y = 0; y < fine[1]; ++y)
      for (int64_t x = 0; x < fine[2]; ++x, ++i) body(i, (z / in_z * coarse[1] + y / 2) * coarse[2] + x / 2);
}

// The blocks with a set cell.
void write_blocks(const Map& map, const Level& level, uint8_t* needed) {
  for (int64_t z = 0, i = 0; z < level.grid[0]; ++z)
    for (int64_t strip = 0; strip < level.strips(); ++strip)
      for (int64_t block = 0; block < level.blocks(); ++block, ++i) {
        const Range tiles = level.tiles_of(block);
        const int64_t x = 2 * tiles.begin, length = std::min(level.grid[2], 2 * tiles.end) - x;
        needed[i] = 0;
        for (int64_t y = 2 * strip; y < std::min(level.grid[1], 2 * strip + 2); ++y) {
          const uint8_t* row = map.data() + (z * level.grid[1] + y) * level.grid[2] + x;
          needed[i] |= std::any_of(row, row + length, [](uint8_t value) { return value != 0; });
        }
      }
}

// Which blocks of each convolution have to be computed. The head needs its input on the fluid cells; going backwards,
// every convolution needs its input on the neighbours of the cells on which its output is needed. The outputs of cells
// that nobody needs may be garbage, also where they share a block with needed ones: no needed value depends on them, so
// that skipping changes no bit of q.
void write_maps(const DirectionNet& net, const Plan& plan, char* prepared) {
  const Grid grid = plan.fine.grid;
  Map needed(plan.fine.cells(), 0), coarse(plan.coarse.cells(), 0);
  for (int64_t z = 0, i = 0; z < net.grid[0]; ++z)
    for (int64_t y = 0; y < net.grid[1]; ++y)
      for (int64_t x = 0; x < net.grid[2]; ++x, ++i) needed[(z * grid[1] + y) * grid[2] + x] = net.mask[i] != 0;
  int layer = plan.head_layer;
  const auto step = [&](Map& map) {
    --layer;
    const Level& level = plan.level(layer);
    write_blocks(map, level, reinterpret_cast<uint8_t*>(prepared + plan.map(layer)));
    dilate(map, level.grid);
  };
  while (layer > plan.end_coarse) step(needed);
  for_each_child(plan, [&](int64_t i, int64_t parent) { coarse[parent] |= needed[i]; });
  while (layer > plan.first_coarse) step(coarse);
  for_each_child(plan, [&](int64_t i, int64_t parent) { needed[i] |= coarse[parent]; });
  while (layer > 1) step(needed);
}

// r with a border of zeros, zero as well outside of the mask and beyond the grid.
struct Bordered {
  explicit Bordered(const Level& level)
      : dims(level.dims),
        ny(level.grid[1] + 2),
        nx(level.grid[2] + 2),
        planes(level.grid[0] + (dims == 3 ? 2 : 0)),
        bytes(rounded(sizeof(float) * (planes * ny * nx + 16))) {}  // whole groups of cells are read at the end

  void write_plane(const DirectionNet& net, const float* r, int64_t plane, float* out) const {
    float* target = out + plane * ny * nx;
    std::fill(target, target + ny * nx, 0.0f);
    const int64_t z = plane - (dims == 3 ? 1 : 0);
    if (z < 0 || z >= net.grid[0]) return;
    for (int64_t y = 0; y < net.grid[1]; ++y) {
      const int64_t at = (z * net.grid[1] + y) * net.grid[2];
      float* row = target + (y + 1) * nx + 1;
      for (int64_t x = 0; x < net.grid[2]; ++x) row[x] = !net.mask || net.mask[at + x] ? r[at + x] : 0.0f;
    }
  }

  int dims;
  int64_t ny, nx, planes;
  size_t bytes;
};

struct Workspace {
  Workspace(const DirectionNet& net, const Plan& plan, int threads, void* memory = nullptr)
      : base(static_cast<char*>(memory)) {
    const size_t cell = size_t(plan.channels) * plan.kernels.element;
    zeros = take(cell * plan.fine.grid[2]);
    r = take(Bordered(plan.fine).bytes);
    for (auto& activation : fine) activation = take(cell * plan.fine.cells());
    for (auto& activation : coarse) activation = take(cell * plan.coarse.cells());
    scratch_stride = conv_scratch_bytes(plan.kernels, plan.fine, plan.channels);
    scratch = take(scratch_stride * threads);
    (void)net;
  }

  char* take(size_t size) {
    char* at = base + bytes;
    // Activations of equal size would start at the same place of a page, and their rows evict each other.
    bytes += rounded(size) + 17 * 64;
    return at;
  }

  char* base;
  size_t bytes = 0, scratch_stride;
  char *zeros, *r, *fine[2], *coarse[2], *scratch;
};

class Inference {
 public:
  Inference(const DirectionNet& net, const Plan& plan, const char* prepared, const Workspace& workspace, Team& team)
      : net_(net), plan_(plan), prepared_(prepared), work_(workspace), team_(team) {}

  void run(const float* r, float* q) {
    char *a = work_.fine[0], *b = work_.fine[1], *u = work_.coarse[0], *v = work_.coarse[1];
    if (net_.mask) std::fill(q, q + net_.cells(), 0.0f);
    first(r, b);
    layer_ = 1;
    convolve(team_, next(b, a), work_.scratch, work_.scratch_stride);
    for (int pair = 0; pair < net_.pre; ++pair) residual_pair(a, b, [](ConvLayer&) {});
    ConvLayer pooling = next(a, b);
    pooling.tail = Tail::pool;
    pooling.other = u;
    pooling.other_grid = plan_.coarse.grid;
    convolve(team_, pooling, work_.scratch, work_.scratch_stride);
    for (int pair = 0; pair < net_.mid; ++pair)
      residual_pair(u, v, [&](ConvLayer& second) {
        if (pair + 1 < net_.mid) return;
        second.tail = Tail::upsample;
        second.other = b;
        second.other_grid = plan_.fine.grid;
      });
    for (int pair = 0; pair < net_.post; ++pair)
      residual_pair(b, a, [&](ConvLayer& second) {
        if (pair + 1 < net_.post) return;
        second.tail = Tail::head;
        second.head = floats(plan_.head);
        second.q = q;
        second.mask = net_.mask;
        second.q_grid = net_.grid;
      });
  }

 private:
  const float* floats(size_t offset) const { return reinterpret_cast<const float*>(prepared_ + offset); }

  // conv_0: 1/C of the operations of another layer.
  void first(const float* r, char* out) {
    const Bordered bordered(plan_.fine);
    float* border = reinterpret_cast<float*>(work_.r);
    team_.for_each(bordered.planes, [&](int64_t plane) { bordered.write_plane(net_, r, plane, border); });
    int64_t offsets[27];
    for (int tap = 0; tap < net_.taps(); ++tap)
      offsets[tap] = (tap / 9 * bordered.ny + tap / 3 % 3) * bordered.nx + tap % 3;
    const auto& [nz, ny, nx] = plan_.fine.grid;
    const int64_t row_bytes = nx * plan_.channels * plan_.kernels.element;
    const int64_t width = nx, height = ny;
    team_.for_each(nz * ny, [&](int64_t row) {
      const int64_t z = row / height, y = row % height;
      plan_.kernels.first({border + (z * bordered.ny + y) * bordered.nx, offsets, net_.taps(), width, plan_.channels,
                           floats(0), floats(plan_.first_bias), out + row * row_bytes});
    });
  }

  // The next convolution, relu after it.
  ConvLayer next(const void* in, void* out) {
    const int layer = layer_++;
    ConvLayer conv{&plan_.kernels,
                   plan_.level(layer),
                   net_.channels,
                   plan_.channels,
                   prepared_ + plan_.u(layer),
                   floats(plan_.bias(layer)),
                   nullptr,
                   work_.zeros,
                   in,
                   out};
    if (net_.mask) conv.needed = reinterpret_cast<const uint8_t*>(prepared_ + plan_.map(layer));
    return conv;
  }

  // v = relu(conv(u)); u = relu(conv(v)) + u. The second reads v alone around a cell, and u is replaced in place.
  template <class Finish>
  void residual_pair(char* u, char* v, Finish&& finish) {
    convolve(team_, next(u, v), work_.scratch, work_.scratch_stride);
    ConvLayer second = next(v, u);
    second.residual = true;
    finish(second);
    convolve(team_, second, work_.scratch, work_.scratch_stride);
  }

  const DirectionNet& net_;
  const Plan& plan_;
  const char* prepared_;
  const Workspace& work_;
  Team& team_;
  int layer_ = 1;
};

int threads_of(const Exec& exec, const DirectionNet& net) { return threads_for(exec.threads, 64 * net.cells()); }

}  // namespace

size_t direction_net_prepared_bytes_cpu(const DirectionNet& net) { return Plan(net).bytes; }

void prepare_direction_net_cpu(const Exec&, const DirectionNet& net, void* prepared) {
  const Plan plan(net);
  char* base = static_cast<char*>(prepared);
  const auto write_bias = [&](int layer, size_t at) {
    float* bias = reinterpret_cast<float*>(base + at);
    std::fill(bias, bias + plan.channels, 0.0f);
    if (net.biases && net.biases[layer]) std::copy_n(net.biases[layer], net.channels, bias);
  };
  float* first = reinterpret_cast<float*>(base);
  std::fill(first, first + net.taps() * plan.channels, 0.0f);
  for (int channel = 0; channel < net.channels; ++channel)
    for (int tap = 0; tap < net.taps(); ++tap)
      first[tap * plan.channels + channel] = net.weights[0][channel * net.taps() + tap];
  write_bias(0, plan.first_bias);
  for (int layer = 1; layer < plan.head_layer; ++layer) {
    winograd_weights(plan.kernels, net.channels, net.dims == 3 ? 3 : 1, net.weights[layer], base + plan.u(layer));
    write_bias(layer, plan.bias(layer));
  }
  float* head = reinterpret_cast<float*>(base + plan.head);
  std::fill(head, head + plan.channels + 1, 0.0f);
  std::copy_n(net.weights[plan.head_layer], net.channels, head);
  if (net.biases && net.biases[plan.head_layer]) head[plan.channels] = *net.biases[plan.head_layer];
  if (net.mask) write_maps(net, plan, base);
}

size_t direction_net_workspace_cpu(const Exec& exec, const DirectionNet& net, int64_t) {
  return Workspace(net, Plan(net), threads_of(exec, net)).bytes;
}

void direction_net_cpu(const Exec& exec, const DirectionNet& net, const void* prepared, int64_t batch, const float* r,
                       float* q, void* workspace) {
  const Plan plan(net);
  const int threads = threads_of(exec, net);
  const Workspace work(net, plan, threads, workspace);
  advise_huge_pages(workspace, work.bytes);
  std::memset(work.zeros, 0, size_t(plan.channels) * plan.kernels.element * plan.fine.grid[2]);
  Team::run(threads, true, [&](Team& team) {
    Inference inference(net, plan, static_cast<const char*>(prepared), work, team);
    for (int64_t i = 0; i < batch; ++i) inference.run(r + i * net.cells(), q + i * net.cells());
  });
}

}  // namespace kantor
