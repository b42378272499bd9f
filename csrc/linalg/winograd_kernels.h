// The kernels of linalg/winograd.h for one instruction set. The file that includes this defines KANTOR_TARGET, the
// target attribute of every function, and a struct with the vector operations:
//   Element, Vector, lanes, pack, most_tiles; zero, add, sub, mul, relu, load and store (float), read and write
//   (Element), sum; Weight, weight and mac(accumulator, pointer to `pack` Elements to broadcast, weight)
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "linalg/winograd.h"

#define KANTOR_INLINE inline __attribute__((always_inline)) KANTOR_TARGET

namespace kantor {
namespace {

// Column x of the four rows, transformed in y: (1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1).
template <class Isa>
KANTOR_INLINE void transformed_column(const typename Isa::Element* const* rows, int64_t x, int64_t nx, int channels,
                                      typename Isa::Vector* column) {
  if (x < 0 || x >= nx) {
    for (int i = 0; i < 4; ++i) column[i] = Isa::zero();
    return;
  }
  const int64_t at = x * channels;
  const auto d0 = Isa::read(rows[0] + at), d1 = Isa::read(rows[1] + at), d2 = Isa::read(rows[2] + at),
             d3 = Isa::read(rows[3] + at);
  column[0] = Isa::sub(d0, d2);
  column[1] = Isa::add(d1, d2);
  column[2] = Isa::sub(d2, d1);
  column[3] = Isa::sub(d1, d3);
}

// A tile and channel: 4 reads (columns are shared by two tiles), 24 additions, 16 writes.
template <class Isa>
KANTOR_TARGET void transform(const InputBlock& block) {
  using Element = typename Isa::Element;
  const int groups = block.channels / Isa::lanes;
  const int64_t stride = int64_t{groups} * block.tiles * Isa::lanes;  // between frequencies
  for (int group = 0; group < groups; ++group) {
    const Element* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = static_cast<const Element*>(block.rows[i]) + group * Isa::lanes;
    Element* v = static_cast<Element*>(block.v) + int64_t{group} * block.tiles * Isa::lanes;
    typename Isa::Vector a[4], b[4], c[4], d[4];
    int64_t x = 2 * block.first_tile;
    transformed_column<Isa>(rows, x - 1, block.nx, block.channels, a);
    transformed_column<Isa>(rows, x, block.nx, block.channels, b);
    for (int tile = 0; tile < block.tiles; ++tile, x += 2, v += Isa::lanes) {
      transformed_column<Isa>(rows, x + 1, block.nx, block.channels, c);
      transformed_column<Isa>(rows, x + 2, block.nx, block.channels, d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Isa::write(v + (4 * i + 0) * stride, Isa::sub(a[i], c[i]));
        Isa::write(v + (4 * i + 1) * stride, Isa::add(b[i], c[i]));
        Isa::write(v + (4 * i + 2) * stride, Isa::sub(c[i], b[i]));
        Isa::write(v + (4 * i + 3) * stride, Isa::sub(b[i], d[i]));
        a[i] = c[i];
        b[i] = d[i];
      }
    }
  }
}

// One 16th of the lines of the rows ahead.
KANTOR_INLINE void prefetch(const Product& product, int64_t k) {
  for (const void* row : product.ahead)
    if (row)
      for (int64_t at = 64 * k; at < product.ahead_bytes; at += 64 * frequencies)
        __builtin_prefetch(static_cast<const char*>(row) + at);
}

// For every frequency a product of matrices, (tiles x channels in) (channels in x lanes), its result in registers: one
// vector of weights is read for `tiles` multiply-adds, whose other operand is broadcast from memory.
template <class Isa, int tiles>
KANTOR_TARGET void multiply_tiles(const Product& product) {
  using Element = typename Isa::Element;
  const int groups = product.groups, planes = product.planes;
  const int64_t v_size = int64_t{groups} * tiles * Isa::lanes, tap_size = int64_t{product.terms} * Isa::lanes;
  const Element* u = static_cast<const Element*>(product.u) + product.skipped * tap_size;
  const int64_t skipped = (product.all_taps - planes) * tap_size;
  float* m = product.m;
  for (int out = 0; out < groups; ++out)
    for (int64_t k = 0; k < frequencies; ++k, u += skipped, m += tiles * Isa::lanes) {
      if (out == 0) prefetch(product, k);
      typename Isa::Vector sum[tiles];
#pragma GCC unroll 16
      for (int t = 0; t < tiles; ++t) sum[t] = Isa::zero();
      for (int plane = 0; plane < planes; ++plane) {
        const Element* v = static_cast<const Element*>(product.v[plane]) + k * v_size;
        for (int in = 0; in < product.terms; in += Isa::lanes, v += tiles * Isa::lanes) {
          const int channels = std::min(Isa::lanes, product.terms - in);
          for (int c = 0; c < channels; c += 4) {
#pragma GCC unroll 4
            for (int i = c; i < c + 4; i += Isa::pack, u += Isa::lanes * Isa::pack) {
              const auto w = Isa::weight(u);
#pragma GCC unroll 16
              for (int t = 0; t < tiles; ++t) sum[t] = Isa::mac(sum[t], v + t * Isa::lanes + i, w);
            }
          }
        }
      }
#pragma GCC unroll 16
      for (int t = 0; t < tiles; ++t) Isa::store(m + t * Isa::lanes, sum[t]);
    }
}

template <class Isa, int... counts>
constexpr std::array<void (*)(const Product&), sizeof...(counts)> multiply_table(
    std::integer_sequence<int, counts...>) {
  return {&multiply_tiles<Isa, counts + 1>...};
}

template <class Isa>
void multiply(const Product& product) {
  static constexpr auto table = multiply_table<Isa>(std::make_integer_sequence<int, Isa::most_tiles>{});
  table[product.tiles - 1](product);
}

// The four outputs of a tile, y[2 * row + column]. 16 reads, 24 additions.
template <class Isa>
KANTOR_INLINE void tile_outputs(const float* m, int64_t stride, typename Isa::Vector* y) {
  typename Isa::Vector upper[4], lower[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto m0 = Isa::load(m + j * stride), m1 = Isa::load(m + (4 + j) * stride),
               m2 = Isa::load(m + (8 + j) * stride), m3 = Isa::load(m + (12 + j) * stride);
    upper[j] = Isa::add(Isa::add(m0, m1), m2);
    lower[j] = Isa::sub(Isa::sub(m1, m2), m3);
  }
  y[0] = Isa::add(Isa::add(upper[0], upper[1]), upper[2]);
  y[1] = Isa::sub(Isa::sub(upper[1], upper[2]), upper[3]);
  y[2] = Isa::add(Isa::add(lower[0], lower[1]), lower[2]);
  y[3] = Isa::sub(Isa::sub(lower[1], lower[2]), lower[3]);
}

// y += the sum so far, if any; kept, or divided and written to the coarser level.
template <class Isa>
KANTOR_INLINE void pool_tile(const OutputBlock& block, int64_t tile, int channel, const typename Isa::Vector* y) {
  float* sums = block.sums + tile * block.channels + channel;
  auto total = Isa::add(Isa::add(y[0], y[1]), Isa::add(y[2], y[3]));
  if (!block.opens) total = Isa::add(Isa::load(sums), total);
  if (block.closes)
    Isa::write(static_cast<typename Isa::Element*>(block.pooled) + tile * block.channels + channel,
               Isa::mul(total, Isa::broadcast(block.average)));
  else
    Isa::store(sums, total);
}

template <class Isa, Tail tail>
KANTOR_TARGET void output_tiles(const OutputBlock& block) {
  using Element = typename Isa::Element;
  using Vector = typename Isa::Vector;
  const int groups = block.channels / Isa::lanes;
  const int64_t stride = int64_t{block.tiles} * Isa::lanes;
  for (int t = 0; t < block.tiles; ++t) {
    const int64_t tile = block.first_tile + t, x = 2 * tile;
    const int columns = x + 1 < block.nx ? 2 : 1;
    Vector dots[4] = {Isa::zero(), Isa::zero(), Isa::zero(), Isa::zero()};
    for (int group = 0; group < groups; ++group) {
      const int channel = group * Isa::lanes;
      Vector y[4];
      tile_outputs<Isa>(block.m + (int64_t{group} * frequencies * block.tiles + t) * Isa::lanes, stride, y);
      const Vector bias = block.bias ? Isa::load(block.bias + channel) : Isa::zero();
      for (int i = 0; i < 4; ++i) y[i] = Isa::relu(Isa::add(y[i], bias));
      for (int row = 0; row < block.rows; ++row)
        for (int column = 0; column < columns; ++column) {
          Vector& value = y[2 * row + column];
          const int64_t at = (x + column) * block.channels + channel;
          Element* out = static_cast<Element*>(block.out[row]) + at;
          if (block.residual) value = Isa::add(value, Isa::read(out));
          if constexpr (tail == Tail::store || tail == Tail::pool) Isa::write(out, value);
          if constexpr (tail == Tail::upsample)
            for (int fine = 0; fine < block.fine_rows; ++fine) {
              Element* below = static_cast<Element*>(block.fine[row][fine]) + at + (x + column) * block.channels;
              Isa::write(below, Isa::add(Isa::read(below), value));
              Isa::write(below + block.channels, Isa::add(Isa::read(below + block.channels), value));
            }
          if constexpr (tail == Tail::head)
            dots[2 * row + column] =
                Isa::add(dots[2 * row + column], Isa::mul(value, Isa::load(block.weights + channel)));
        }
      if constexpr (tail == Tail::pool) pool_tile<Isa>(block, tile, channel, y);
    }
    if constexpr (tail == Tail::head)
      for (int row = 0; row < 2; ++row)
        for (int column = 0; column < 2; ++column)
          if (block.q[row] && x + column < block.nq)
            block.q[row][x + column] = !block.mask[row] || block.mask[row][x + column]
                                           ? Isa::sum(dots[2 * row + column]) + block.weights[block.channels]
                                           : 0.0f;
  }
}

template <class Isa>
void output(const OutputBlock& block) {
  switch (block.tail) {
    case Tail::store:
      return output_tiles<Isa, Tail::store>(block);
    case Tail::pool:
      return output_tiles<Isa, Tail::pool>(block);
    case Tail::upsample:
      return output_tiles<Isa, Tail::upsample>(block);
    case Tail::head:
      return output_tiles<Isa, Tail::head>(block);
  }
}

template <class Isa>
KANTOR_TARGET void first(const FirstRow& row) {
  constexpr int cells = 8;
  for (int64_t x = 0; x < row.nx; x += cells)
    for (int channel = 0; channel < row.channels; channel += Isa::lanes) {
      typename Isa::Vector sum[cells];
      for (int i = 0; i < cells; ++i) sum[i] = row.bias ? Isa::load(row.bias + channel) : Isa::zero();
      for (int tap = 0; tap < row.taps; ++tap) {
        const auto w = Isa::load(row.weights + tap * row.channels + channel);
        const float* r = row.r + row.offsets[tap] + x;
#pragma GCC unroll 8
        for (int i = 0; i < cells; ++i) sum[i] = Isa::fma(Isa::broadcast(r[i]), w, sum[i]);
      }
      auto* out = static_cast<typename Isa::Element*>(row.out) + x * row.channels + channel;
      const int inside = static_cast<int>(std::min<int64_t>(cells, row.nx - x));
#pragma GCC unroll 8
      for (int i = 0; i < cells; ++i)
        if (i < inside) Isa::write(out + i * row.channels, sum[i]);
    }
}

template <class Isa>
constexpr WinogradKernels kernels_of() {
  return {Isa::lanes,   Isa::pack,  sizeof(typename Isa::Element), Isa::most_tiles, &transform<Isa>, &multiply<Isa>,
          &output<Isa>, &first<Isa>};
}

}  // namespace
}  // namespace kantor
