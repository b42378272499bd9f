// The CPU's view of a direction network: the kernels it uses, and where `prepared` holds what they read.
#pragma once
#include <cstddef>

#include "linalg/conv_layer.h"
#include "linalg/direction_net.h"

namespace kantor {

inline size_t rounded_to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Where everything is in `prepared`, and the shapes of the layers; a function of the description and the processor.
struct NetPlan {
  explicit NetPlan(const DirectionNet& net)
      : kernels(winograd_kernels(net.channels, net.precision == NetPrecision::bf16, net.widest)),
        channels(padded_channels(kernels, net.channels)),
        fine{net.dims, net.fine(), kernels.most_tiles},
        coarse{net.dims, net.coarse(), kernels.most_tiles},
        first_coarse(3 + 2 * net.pre),
        end_coarse(first_coarse + 2 * net.mid),
        head_layer(net.convolutions() - 1) {
    const size_t vector = rounded_to_line(sizeof(float) * (channels + 1));
    u_bytes = rounded_to_line(winograd_weight_bytes(kernels, net.channels, net.dims == 3 ? 3 : 1));
    first_bias = rounded_to_line(sizeof(float) * net.taps() * channels);
    convolutions = first_bias + vector;
    convolution_bytes = u_bytes + vector;
    head = convolutions + (head_layer - 1) * convolution_bytes;
    maps = head + vector;
    bytes = maps;
    if (net.mask)
      for (int layer = 1; layer < head_layer; ++layer) bytes += rounded_to_line(level(layer).map_size());
  }

  bool is_coarse(int layer) const { return layer >= first_coarse && layer < end_coarse; }
  const Level& level(int layer) const { return is_coarse(layer) ? coarse : fine; }
  size_t u(int layer) const { return convolutions + (layer - 1) * convolution_bytes; }
  size_t bias(int layer) const { return u(layer) + u_bytes; }
  size_t map(int layer) const {
    size_t at = maps;
    for (int before = 1; before < layer; ++before) at += rounded_to_line(level(before).map_size());
    return at;
  }

  const WinogradKernels& kernels;
  int channels;  // padded
  Level fine, coarse;
  int first_coarse, end_coarse;  // layers on the coarse level
  int head_layer;
  size_t u_bytes, first_bias, convolutions, convolution_bytes, head, maps, bytes;
};

}  // namespace kantor
