// Device side of propagate.h. A group of lanes takes a row of the graph: each lane keeps its columns of the sum in
// registers while the group walks along the row's entries, four rows of x on their way at a time. No lane needs
// another, so there are no barriers and no atomics, and every sum is formed in the order of the row.
//
// Masks are applied where values are written, z_{k+1} = m_{k+1} x_{k+1}, and not where they are gathered: once for each
// value and not once for each entry.
#pragma once
#include "core/philox.h"
#include "core/simt.h"
#include "graph/propagate.h"

namespace kantor {

// Rows of a matrix, `stride` apart.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  KANTOR_HD T* at(int64_t i, int64_t column) const { return data + i * stride + column; }
};

// Neighbouring columns, loaded and stored as one.
template <class T, int width>
struct alignas(width * sizeof(T)) Columns {
  T at[width];
};
template <int width, class T>
__device__ __forceinline__ Columns<std::remove_const_t<T>, width> load_columns(T* from) {
  return *reinterpret_cast<const Columns<std::remove_const_t<T>, width>*>(from);
}
template <class T, int width>
__device__ __forceinline__ void store_columns(T* to, const Columns<T, width>& values) {
  *reinterpret_cast<Columns<T, width>*>(to) = values;
}

// sum += weight x
template <class T, int width>
__device__ __forceinline__ void add_scaled(Columns<T, width>& sum, T weight, const Columns<T, width>& x) {
  KANTOR_UNROLL for (int v = 0; v < width; ++v) sum.at[v] += weight * x.at[v];
}

// x = m x, from `column` on, a multiple of `width`.
template <class T, int width>
__device__ __forceinline__ void drop(Columns<T, width>& x, const Dropout<T>& dropout, int64_t column, int64_t row,
                                     int64_t step) {
  const Philox random = dropout.bits(column / 4, row, step);
  KANTOR_UNROLL for (int v = 0; v < width; ++v) {
    const int lane = width == 4 ? v : static_cast<int>(column % 4) + v;
    const uint32_t low = lane % 2 == 0 ? random.lane[0] : random.lane[1];
    const uint32_t high = lane % 2 == 0 ? random.lane[2] : random.lane[3];
    x.at[v] *= dropout.factor(lane < 2 ? low : high);
  }
}

// --- one step, all columns from global memory ---

// out = m (D in + E in + a start), or of the adjoint, out = m (D in + E in), where a (in + earlier) goes to `later` or,
// in the last step, into the result.
template <class T>
struct Step {
  Pattern pattern;
  const T* edge = nullptr;
  const T* diagonal = nullptr;  // null: none
  int64_t columns = 0;
  Rows<const T> in;
  Rows<T> out;

  T teleport = 0;  // 0: none of the following is read
  bool adjoint = false;
  Rows<const T> start;    // forward
  Rows<const T> earlier;  // null: zero
  Rows<T> later;          // null: the last step

  Dropout<T> dropout;
  int64_t mask_step = -1;    // -1: no mask
  int64_t first_column = 0;  // of the masks, a multiple of 4

  // How the work is laid out: 2^lane_bits lanes take a row in `column_blocks` parts; a group takes `turns` of them.
  int lane_bits = 0, turns = 1;
  int64_t column_blocks = 1;
};

// The parts that all steps of a recurrence share.
template <class T>
Step<T> make_step(const Recurrence<T>& r, const Dropout<T>& dropout, int64_t columns) {
  Step<T> s;
  s.pattern = r.pattern, s.edge = r.edge, s.diagonal = r.diagonal;
  s.columns = columns;
  s.teleport = static_cast<T>(r.teleport);
  s.adjoint = r.adjoint;
  s.dropout = dropout;
  return s;
}

// Adds the row's products with the lane's columns, which start at `shift` behind `column`.
template <class T, int width, int pieces>
__device__ __forceinline__ void add_row_product(const Step<T>& s, int64_t row, int64_t column,
                                                const int (&shift)[pieces], Columns<T, width> (&sum)[pieces]) {
  constexpr int at_once = 4;
  const int32_t end = s.pattern.rowptr[row + 1];
  int32_t e = s.pattern.rowptr[row];
  for (; e + at_once <= end; e += at_once) {
    Columns<T, width> x[at_once][pieces];
    T weight[at_once];
    KANTOR_UNROLL for (int i = 0; i < at_once; ++i) {
      const T* from = s.in.at(s.pattern.col[e + i], column);
      weight[i] = s.edge[e + i];
      KANTOR_UNROLL for (int p = 0; p < pieces; ++p) x[i][p] = load_columns<width>(from + shift[p]);
    }
    KANTOR_UNROLL for (int i = 0; i < at_once; ++i) KANTOR_UNROLL for (int p = 0; p < pieces; ++p)
        add_scaled(sum[p], weight[i], x[i][p]);
  }
  for (; e < end; ++e) {
    const T* from = s.in.at(s.pattern.col[e], column);
    KANTOR_UNROLL for (int p = 0; p < pieces; ++p) add_scaled(sum[p], s.edge[e], load_columns<width>(from + shift[p]));
  }
}

// What is left to do for one piece of a row, its sum formed.
template <bool masked, class T, int width>
__device__ __forceinline__ void finish_step(const Step<T>& s, int64_t row, int64_t column, const Columns<T, width>& own,
                                            Columns<T, width> value) {
  if (s.teleport != 0 && !s.adjoint) add_scaled(value, s.teleport, load_columns<width>(s.start.at(row, column)));
  if constexpr (masked) drop(value, s.dropout, s.first_column + column, row, s.mask_step);
  if (s.teleport != 0 && s.adjoint) {
    Columns<T, width> total{};
    if (s.earlier.data) total = load_columns<width>(s.earlier.at(row, column));
    add_scaled(total, s.teleport, own);
    if (s.later.data)
      store_columns(s.later.at(row, column), total);
    else
      add_scaled(value, T(1), total);
  }
  store_columns(s.out.at(row, column), value);
}

// A lane has `pieces` times `width` columns. Traffic per step: 8 bytes an entry for each part of the columns, x once
// where its rows stay in cache (else nnz d words), n d words written; with teleport n d words more, adjoint 2 n d.
template <class T, int width, int pieces, bool masked>
__global__ void __launch_bounds__(512) step_kernel(Step<T> s) {
  const int lanes = 1 << s.lane_bits, groups = static_cast<int>(blockDim.x) >> s.lane_bits;
  const int apart = lanes * width;
  int64_t item = static_cast<int64_t>(blockIdx.x) * groups * s.turns + (threadIdx.x >> s.lane_bits);
  for (int turn = 0; turn < s.turns; ++turn, item += groups) {
    const int64_t row = s.column_blocks == 1 ? item : item / s.column_blocks;
    if (row >= s.pattern.n) return;
    const int64_t block = item - row * s.column_blocks;
    const int64_t column = block * apart * pieces + static_cast<int64_t>(threadIdx.x & (lanes - 1)) * width;
    if (column >= s.columns) continue;
    int shift[pieces];  // a piece beyond the last column reads the first one once more, and is not stored
    KANTOR_UNROLL for (int p = 0; p < pieces; ++p) shift[p] = column + p * apart < s.columns ? p * apart : 0;
    Columns<T, width> own[pieces] = {}, sum[pieces] = {};
    if (s.diagonal) {
      const T diagonal = s.diagonal[row];
      KANTOR_UNROLL for (int p = 0; p < pieces; ++p) {
        own[p] = load_columns<width>(s.in.at(row, column + shift[p]));
        add_scaled(sum[p], diagonal, own[p]);
      }
    }
    add_row_product(s, row, column, shift, sum);
    KANTOR_UNROLL for (int p = 0; p < pieces; ++p) if (p == 0 || shift[p] > 0)
        finish_step<masked>(s, row, column + shift[p], own[p], sum[p]);
  }
}

// --- products of rows ---

template <class T>
struct EdgeDot {
  Pattern pattern;
  int64_t columns = 0;
  Rows<const T> a, b;
  T* edge = nullptr;      // <a_i, b_j>
  T* diagonal = nullptr;  // <a_i, b_i>; null: none
  bool add = false;       // to what is there
  int lane_bits = 0;
};

// A warp takes a row, 2^lane_bits lanes an entry. a once, b as x above, nnz words written, and read where they are
// added to.
template <class T, int width>
__global__ void edge_dot_kernel(EdgeDot<T> s) {
  const int64_t row = simt::global_thread_index() / 32;
  if (row >= s.pattern.n) return;
  const int lanes = 1 << s.lane_bits, at_once = 32 >> s.lane_bits;
  const int lane = static_cast<int>(simt::lane_index()) & (lanes - 1);
  const int64_t first = s.pattern.rowptr[row], end = s.pattern.rowptr[row + 1];
  const int64_t count = end - first + (s.diagonal ? 1 : 0);  // the diagonal comes last
  for (int64_t e0 = 0; e0 < count; e0 += at_once) {
    const int64_t e = first + e0 + (simt::lane_index() >> s.lane_bits);
    const bool mine = e < first + count;
    T sum = 0;
    if (mine) {
      const int64_t other = e < end ? s.pattern.col[e] : row;
      for (int64_t column = lane * width; column < s.columns; column += lanes * width) {
        const auto a = load_columns<width>(s.a.at(row, column)), b = load_columns<width>(s.b.at(other, column));
        KANTOR_UNROLL for (int v = 0; v < width; ++v) sum += a.at[v] * b.at[v];
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(simt::full_warp, sum, distance);
    if (mine && lane == 0) {
      T* const out = e < end ? s.edge + e : s.diagonal + row;
      *out = s.add ? *out + sum : sum;
    }
  }
}

// --- masks ---

// out = m in, without `in` the mask itself. A thread for each four columns.
template <class T>
__global__ void drop_kernel(int64_t n, int64_t columns, int64_t first_column, Dropout<T> dropout, int64_t step,
                            Rows<const T> in, Rows<T> out) {
  const int64_t blocks = (columns + 3) / 4;
  simt::grid_stride(n * blocks, [&](int64_t k) {
    const int64_t row = k / blocks, column = (k - row * blocks) * 4;
    Columns<T, 4> piece{};
    KANTOR_UNROLL for (int v = 0; v < 4; ++v) {
      piece.at[v] = T(1);
      if (in.data && column + v < columns) piece.at[v] = *in.at(row, column + v);
    }
    if (dropout.threshold > 0) drop(piece, dropout, first_column + column, row, step);
    KANTOR_UNROLL for (int v = 0; v < 4; ++v) if (column + v < columns) * out.at(row, column + v) = piece.at[v];
  });
}

// --- launches (propagate_cuda.cu); they choose the width of the loads, and do nothing else than the kernels ---

template <class T>
void launch_step(const Exec& exec, const Step<T>& step);
template <class T>
void launch_edge_dot(const Exec& exec, EdgeDot<T> dot);
template <class T>
void launch_drop(const Exec& exec, int64_t n, int64_t columns, int64_t first_column, const Dropout<T>& dropout,
                 int64_t step, Rows<const T> in, Rows<T> out);

}  // namespace kantor
