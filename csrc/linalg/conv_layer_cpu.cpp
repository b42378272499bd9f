#include <algorithm>
#include <atomic>

#include "linalg/conv_layer.h"

namespace kantor {
namespace {

constexpr int64_t blocks_together = 4;  // of a strip: up to 64 tiles, whose three planes of V stay in the second level
constexpr int64_t shortest_run = 8;     // planes that one thread takes in a row at least; each run repeats two of V

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t v_block_bytes(const WinogradKernels& kernels, int channels) {
  return size_t{frequencies} * kernels.most_tiles * channels * kernels.element;
}

size_t m_block_floats(const WinogradKernels& kernels, int channels) {
  return size_t{frequencies} * kernels.most_tiles * channels;
}

// A strip, or a part of one, from plane z.begin to z.end: V of each block is formed once, and the products of plane z
// use those of z-1, z and z+1.
class Run {
 public:
  Run(const ConvLayer& layer, int64_t strip, Range blocks, Range z, char* scratch)
      : layer_(layer), kernels_(*layer.kernels), strip_(strip), blocks_(blocks), z_(z) {
    const size_t v_bytes = v_block_bytes(kernels_, layer.channels);
    for (auto& plane : v_)
      for (auto& block : plane) block.data = scratch, scratch += v_bytes;
    m_ = reinterpret_cast<float*>(scratch);
    sums_ = m_ + m_block_floats(kernels_, layer.channels);
  }

  void run() {
    for (int64_t z = z_.begin; z < z_.end; ++z) {
      for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
        if (!is_needed(z, block)) continue;
        transform(z, block);
        multiply(z, block);
        output(z, block);
      }
    }
  }

 private:
  struct Transformed {
    char* data;
    int64_t z = -1;
  };

  const Level& level() const { return layer_.level; }
  Range taps(int64_t z) const {
    return level().dims == 3 ? Range{std::max<int64_t>(z - 1, 0), std::min(z + 2, level().grid[0])} : Range{z, z + 1};
  }
  bool is_needed(int64_t z, int64_t block) const {
    return !layer_.needed || layer_.needed[(z * level().strips() + strip_) * level().blocks() + block];
  }
  Transformed& v(int64_t z, int64_t block) { return v_[z % 3][block - blocks_.begin]; }
  // Row y of plane z of an activation; null outside.
  template <class Data>
  Data* row(Data* data, const std::array<int64_t, 3>& grid, int64_t z, int64_t y) const {
    using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
    if (z < 0 || z >= grid[0] || y < 0 || y >= grid[1]) return nullptr;
    return static_cast<Byte*>(data) + (z * grid[1] + y) * grid[2] * layer_.channels * kernels_.element;
  }

  // V of a block in the planes that the outputs of plane z take, where it is not there yet.
  void transform(int64_t z, int64_t block) {
    const Range tiles = level().tiles_of(block), planes = taps(z);
    for (int64_t plane = planes.begin; plane < planes.end; ++plane) {
      Transformed& target = v(plane, block);
      if (target.z == plane) continue;
      target.z = plane;
      InputBlock input{{}, level().grid[2], tiles.begin, static_cast<int>(tiles.size()), layer_.channels, target.data};
      for (int i = 0; i < 4; ++i) {
        const void* data = row(layer_.in, level().grid, plane, 2 * strip_ - 1 + i);
        input.rows[i] = data ? data : layer_.zeros;
      }
      kernels_.transform(input);
    }
  }

  // 2 * 16 * 3 C^2 operations a tile.
  void multiply(int64_t z, int64_t block) {
    const Range planes = taps(z);
    Product product{};
    product.planes = static_cast<int>(planes.size());
    product.all_taps = level().dims == 3 ? 3 : 1;
    product.skipped = product.all_taps == 3 && z == 0;
    product.tiles = static_cast<int>(level().tiles_of(block).size());
    product.terms = layer_.terms;
    product.groups = layer_.channels / kernels_.lanes;
    product.u = layer_.u;
    product.m = m_;
    for (int64_t plane = planes.begin; plane < planes.end; ++plane)
      product.v[plane - planes.begin] = v(plane, block).data;
    look_ahead(z, block, product);
    kernels_.multiply(product);
  }

  // While plane z is multiplied: the inputs of the plane that the next one takes first, and the rows to be written.
  void look_ahead(int64_t z, int64_t block, Product& product) const {
    const Range tiles = level().tiles_of(block);
    const int64_t cell = int64_t{layer_.channels} * kernels_.element, begin = 2 * tiles.begin * cell;
    product.ahead_bytes = std::min(2 * tiles.size(), level().grid[2] - 2 * tiles.begin) * cell;
    const auto ahead = [&](int i, const void* row) {
      product.ahead[i] = row ? static_cast<const char*>(row) + begin : nullptr;
    };
    for (int i = 0; i < 4; ++i) ahead(i, row(layer_.in, level().grid, z + 2, 2 * strip_ - 1 + i));
    for (int i = 0; i < 2; ++i)
      ahead(4 + i, row(static_cast<const void*>(layer_.out), level().grid, z, 2 * strip_ + i));
  }

  void output(int64_t z, int64_t block) {
    const Range tiles = level().tiles_of(block);
    const int64_t y = 2 * strip_;
    OutputBlock out{};
    out.m = m_;
    out.nx = level().grid[2];
    out.first_tile = tiles.begin;
    out.tiles = static_cast<int>(tiles.size());
    out.channels = layer_.channels;
    out.bias = layer_.bias;
    out.tail = layer_.tail;
    out.rows = y + 1 < level().grid[1] ? 2 : 1;
    out.residual = layer_.residual;
    for (int i = 0; i < 2; ++i) out.out[i] = row(layer_.out, level().grid, z, y + i);
    if (layer_.tail == Tail::pool) pool(z, out);
    if (layer_.tail == Tail::upsample) upsample(z, out);
    if (layer_.tail == Tail::head) head(z, out);
    kernels_.output(out);
  }

  void pool(int64_t z, OutputBlock& out) {
    const bool three = level().dims == 3;
    out.sums = sums_;
    out.opens = !three || z % 2 == 0;
    out.closes = !three || z % 2 == 1;
    out.average = three ? 0.125f : 0.25f;
    out.pooled = row(layer_.other, layer_.other_grid, three ? z / 2 : z, strip_);
  }

  void upsample(int64_t z, OutputBlock& out) const {
    const int planes = level().dims == 3 ? 2 : 1;
    out.fine_rows = 2 * planes;
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < out.fine_rows; ++k)
        out.fine[i][k] = row(layer_.other, layer_.other_grid, planes * z + k / 2, 2 * (2 * strip_ + i) + k % 2);
  }

  void head(int64_t z, OutputBlock& out) const {
    const auto& [nz, ny, nx] = layer_.q_grid;
    out.weights = layer_.head;
    out.nq = nx;
    for (int i = 0; i < 2; ++i) {
      const int64_t y = 2 * strip_ + i, at = (z * ny + y) * nx;
      out.q[i] = z < nz && y < ny ? layer_.q + at : nullptr;
      out.mask[i] = layer_.mask ? layer_.mask + at : nullptr;
    }
  }

  const ConvLayer& layer_;
  const WinogradKernels& kernels_;
  const int64_t strip_;
  const Range blocks_, z_;
  Transformed v_[3][blocks_together];
  float *m_, *sums_;
};

}  // namespace

size_t conv_scratch_bytes(const WinogradKernels& kernels, const Level& level, int channels) {
  return rounded(blocks_together * 3 * v_block_bytes(kernels, channels) +
                 sizeof(float) * (m_block_floats(kernels, channels) + static_cast<size_t>(level.tiles()) * channels));
}

void convolve(Team& team, const ConvLayer& layer, char* scratch, size_t scratch_stride) {
  const Level& level = layer.level;
  const int64_t nz = level.grid[0], parts = (level.blocks() + blocks_together - 1) / blocks_together;
  // Few strips for many threads: cut in z, at even planes, so that two planes to be averaged stay together.
  const int64_t wanted = 4 * team.threads() / std::max<int64_t>(1, level.strips() * parts) + 1;
  const int64_t length = std::min(nz, std::max(shortest_run, (nz / wanted + 1) / 2 * 2));
  const int64_t runs = (nz + length - 1) / length, items = runs * level.strips() * parts;
  std::atomic<int64_t> next{0};
  team.pass([&](int worker, int) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const int64_t part = item % parts, strip = item / parts % level.strips(), run = item / parts / level.strips();
      const Range blocks{part * blocks_together, std::min(level.blocks(), (part + 1) * blocks_together)};
      const Range z{run * length, std::min(nz, (run + 1) * length)};
      Run(layer, strip, blocks, z, scratch + worker * scratch_stride).run();
    }
  });
}

}  // namespace kantor
