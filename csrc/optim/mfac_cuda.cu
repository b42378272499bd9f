#include <algorithm>

#include "core/simt.h"
#include "optim/mfac.h"

namespace kantor {
namespace {

constexpr unsigned threads = 256;
constexpr int rows_of_warp = 4;  // part of x is read once for all of them
constexpr int rows_of_block = rows_of_warp * threads / 32;
constexpr int unroll = 8;  // loads of a thread that are under way together

// V stored numbers in one load.
template <class S, int V>
struct alignas(sizeof(S) * V) Packet {
  S values[V];
};
template <class S>
constexpr int packet = 16 / sizeof(S);
// Whether every block begins at a whole packet. Behind the last column are zeros.
template <class S>
bool has_packets(const Window& w) {
  return w.blocks() == 1 || w.block % packet<S> == 0;
}

template <class S, int V>
__device__ __forceinline__ Packet<S, V> load_packet(const S* source) {
  return *reinterpret_cast<const Packet<S, V>*>(source);
}

// --- products ---

// Of one vector. Block (group of pieces, group of rows). A warp takes four rows over one piece after the other. Of the
// row that is inserted only the block whose rows include it reads, after it has written.
template <class S, int V>
__global__ void products_kernel(Products<S> p, Pieces pieces, int64_t group, double* results) {
  using T = Wide<S>;
  SIMT_DYNAMIC_SHARED(T, part);
  const Window& w = p.window;
  const int64_t first = blockIdx.x * group;
  const int64_t last = first + group < pieces.count() ? first + group : pieces.count();
  const int64_t begin = pieces.piece(first).begin, n = pieces.piece(last - 1).end - begin;
  const int64_t group_row = static_cast<int64_t>(blockIdx.y) * rows_of_block;
  const bool writes = p.slot >= group_row && p.slot < group_row + rows_of_block;
  for (int64_t i = threadIdx.x; i < n + V; i += blockDim.x) {
    T value = i < n ? p.x[begin + i] : T(0);
    if (p.slot >= 0 && i < n) {
      const S stored = narrow<S>(value * static_cast<T>(p.inverse_scale));
      if (writes) p.G[p.slot * w.stride + begin + i] = stored;
      value = static_cast<T>(widen(stored));
    }
    part[i] = value;
  }
  __syncthreads();

  const int64_t row = group_row + simt::warp_index() * rows_of_warp;
  if (row >= w.rows) return;
  for (int64_t q = first; q < last; ++q) {
    const Piece piece = pieces.piece(q);
    const T* x = part + (piece.begin - begin);
    double sums[rows_of_warp] = {};
    for (int64_t i = simt::lane_index() * V; i < piece.end - piece.begin; i += 32 * V) {
      double v[V];
      KANTOR_UNROLL
      for (int e = 0; e < V; ++e) v[e] = x[i + e];
      KANTOR_UNROLL
      for (int j = 0; j < rows_of_warp; ++j) {
        const int64_t at = row + j < w.rows ? row + j : w.rows - 1;
        const auto g = load_packet<S, V>(p.G + at * w.stride + piece.begin + i);
        KANTOR_UNROLL
        for (int e = 0; e < V; ++e) sums[j] += widen(g.values[e]) * v[e];
      }
    }
    KANTOR_UNROLL
    for (int j = 0; j < rows_of_warp; ++j) {
      const double sum = simt::warp_sum(sums[j]);
      if (simt::lane_index() == 0 && row + j < w.rows) results[q * w.rows + row + j] = sum;
    }
  }
}

// Block (block of columns, 32 rows): the sum over the pieces, in eight strands.
__global__ void sum_pieces_kernel(int64_t rows, int64_t pieces, const double* partial, double* out) {
  constexpr int strands = threads / 32;
  SIMT_SHARED(double, sums, threads);
  const int64_t block = blockIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * 32 + simt::lane_index();
  double sum = 0;
  if (row < rows)
    for (int64_t q = simt::warp_index(); q < pieces; q += strands) sum += partial[(block * pieces + q) * rows + row];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || row >= rows) return;
  for (int strand = 1; strand < strands; ++strand) sum += sums[strand * 32 + threadIdx.x];
  out[block * rows + row] = sum;
}

// --- combinations ---

// A thread forms V columns of y.
template <class S, int V>
__global__ void combine_kernel(Combination<S> p) {
  const Window& w = p.window;
  const int64_t column = simt::global_thread_index() * V, k = blockIdx.y;
  if (column >= w.d) return;
  const double* c = p.c + (k * w.blocks() + column / w.block) * w.rows;
  const S* G = p.G + column;
  double sums[V];
  KANTOR_UNROLL
  for (int e = 0; e < V; ++e) sums[e] = p.x && column + e < w.d ? p.scale * double(p.x[k * w.d + column + e]) : 0.0;
  int64_t i = 0;
  for (; i + unroll <= w.rows; i += unroll) {
    Packet<S, V> g[unroll];
    KANTOR_UNROLL
    for (int j = 0; j < unroll; ++j) g[j] = load_packet<S, V>(G + (i + j) * w.stride);
    KANTOR_UNROLL
    for (int j = 0; j < unroll; ++j) {
      const double factor = c[i + j];
      KANTOR_UNROLL
      for (int e = 0; e < V; ++e) sums[e] += factor * widen(g[j].values[e]);
    }
  }
  for (; i < w.rows; ++i) {
    const auto g = load_packet<S, V>(G + i * w.stride);
    KANTOR_UNROLL
    for (int e = 0; e < V; ++e) sums[e] += c[i] * widen(g.values[e]);
  }
  KANTOR_UNROLL
  for (int e = 0; e < V; ++e)
    if (column + e < w.d) p.y[k * w.d + column + e] = static_cast<Wide<S>>(sums[e]);
}

template <class S, int V>
void launch_products(const Exec& exec, const Products<S>& p) {
  const Window& w = p.window;
  const Pieces pieces{w, product_columns};
  const int64_t group = std::max<int64_t>(1, product_columns / pieces.length());
  const auto parts = static_cast<unsigned>((pieces.count() + group - 1) / group);
  const auto row_groups = static_cast<unsigned>((w.rows + rows_of_block - 1) / rows_of_block);
  const auto bytes = static_cast<size_t>(std::min(w.d, product_columns) + V) * sizeof(Wide<S>);
  const bool direct = pieces.per_block() == 1;
  // Several vectors share the workspace, one after the other.
  for (int64_t k = 0; k < p.count; ++k) {
    Products<S> one = p;
    one.count = 1, one.x += k * w.d, one.out += k * w.blocks() * w.rows;
    SIMT_LAUNCH((products_kernel<S, V>), dim3(parts, row_groups), threads, bytes, exec.stream, one, pieces, group,
                direct ? one.out : p.partial);
    if (direct) continue;
    SIMT_LAUNCH(sum_pieces_kernel, dim3(static_cast<unsigned>(w.blocks()), simt::blocks_for(w.rows, 32)), threads, 0,
                exec.stream, w.rows, pieces.per_block(), p.partial, one.out);
  }
}

template <class S, int V>
void launch_combine(const Exec& exec, const Combination<S>& p) {
  const Window& w = p.window;
  const unsigned blocks = simt::blocks_for((w.d + V - 1) / V, threads);
  constexpr int64_t most = 65535;  // of a grid's second dimension
  for (int64_t k = 0; k < p.count; k += most) {
    Combination<S> some = p;
    some.count = std::min(most, p.count - k), some.c += k * w.blocks() * w.rows, some.y += k * w.d;
    if (p.x) some.x += k * w.d;
    SIMT_LAUNCH((combine_kernel<S, V>), dim3(blocks, static_cast<unsigned>(some.count)), threads, 0, exec.stream, some);
  }
}

}  // namespace

template <class S>
void mfac_products_cuda(const Exec& exec, const Products<S>& p) {
  const simt::DeviceGuard guard(exec.device);
  if (has_packets<S>(p.window))
    launch_products<S, packet<S>>(exec, p);
  else
    launch_products<S, 1>(exec, p);
}

template <class S>
void mfac_combine_cuda(const Exec& exec, const Combination<S>& p) {
  const simt::DeviceGuard guard(exec.device);
  if (has_packets<S>(p.window))
    launch_combine<S, packet<S>>(exec, p);
  else
    launch_combine<S, 1>(exec, p);
}

#define KANTOR_INSTANTIATE(S)                                           \
  template void mfac_products_cuda<S>(const Exec&, const Products<S>&); \
  template void mfac_combine_cuda<S>(const Exec&, const Combination<S>&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
KANTOR_INSTANTIATE(Bfloat16)
KANTOR_INSTANTIATE(Half)
KANTOR_INSTANTIATE(int8_t)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
