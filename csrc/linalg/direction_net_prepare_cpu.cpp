// What happens once for the weights and the mask of a direction network.
#include <algorithm>
#include <vector>

#include "linalg/direction_net_plan.h"

namespace kantor {
namespace {

using Grid = std::array<int64_t, 3>;
using Map = std::vector<uint8_t>;  // a byte a cell

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
void for_each_child(const NetPlan& plan, Body&& body) {
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
void write_maps(const DirectionNet& net, const NetPlan& plan, char* prepared) {
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

}  // namespace

size_t direction_net_prepared_bytes_cpu(const DirectionNet& net) { return NetPlan(net).bytes; }

void prepare_direction_net_cpu(const Exec&, const DirectionNet& net, void* prepared) {
  const NetPlan plan(net);
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

}  // namespace kantor
