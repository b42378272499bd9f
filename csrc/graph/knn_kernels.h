// Device side of knn.h, in four steps, the last two in knn_rank_kernels.h:
//   pack    rows less the mean of all rows, in panels that are read whole, and |c|^2 / 2 for each row c
//   scan    a block takes a panel of queries through all panels of candidates, like a matrix product whose results
//           never leave the registers: the larger the score <q, c> - |c|^2 / 2, the nearer is c. Scores above a query's
//           bar are appended to its list; a full list is cut to its best, and their worst is the new bar
//   rank    exact distances of what is left, in their order; and the proof, from a bound of the scores' rounding
//           errors, that nothing else can belong there
//   repeat  rows without a proof (ties, near-duplicates far from the mean), by exact distances alone
// A list keeps more than k candidates, so that rows are rarely repeated. Which of equal scores it keeps depends on the
// order of execution, the results do not.
#pragma once
#include <limits>
#include <type_traits>

#include "core/simt.h"
#include "graph/knn.h"
#include "graph/select_kernels.h"

namespace kantor {

inline constexpr int knn_threads = 256;
inline constexpr int knn_depth = 8;  // columns of a panel in shared memory at a time

// A thread has micro x micro of the scores of two panels.
template <class T>
inline constexpr int knn_micro = sizeof(T) == 4 ? 8 : 4;
template <class T>
inline constexpr int knn_panel = 16 * knn_micro<T>;

// What is copied as one.
template <class T>
struct alignas(16) KnnPiece {
  T at[16 / sizeof(T)];
};

template <class T>
struct KnnScan {
  int64_t n, d, k;
  const T* x;
  const double* mean;  // (d)
  T* packed;           // (panels, depth, panel): depth is d rounded up to a multiple of knn_depth, with zeros
  T* half_norm;        // (panels * panel); infinite beyond n
  int64_t depth, panels;

  int64_t first_panel;  // of the queries of this launch
  int keep, capacity;   // of a list
  T* scores;            // lists: (splits, queries, capacity), negative scores
  int32_t* candidates;  // the same
  int* counts;          // (splits, queries)
  T* bars;              // the same: no one who is not in the list has a score above it
  int splits, queries;  // queries: panels of this launch * panel

  int32_t* index;      // (n, k)
  T* distance;         // (n, k)
  uint8_t* uncertain;  // (queries)
};

// --- pack ---

// partial[chunk, column]: sums of columns over a chunk of rows. A thread has one column of every few rows.
template <class T>
__global__ void column_sums_kernel(int64_t n, int64_t d, int64_t chunk_rows, const T* x, double* partial) {
  SIMT_SHARED(double, scratch, knn_threads);
  const int64_t first = blockIdx.x * chunk_rows, end = min(n, first + chunk_rows);
  for (int64_t column0 = 0; column0 < d; column0 += knn_threads) {
    const int width = static_cast<int>(min(d - column0, int64_t{knn_threads})), together = knn_threads / width;
    const int column = static_cast<int>(threadIdx.x) % width, row = static_cast<int>(threadIdx.x) / width;
    double sum = 0;
    if (row < together)
      for (int64_t i = first + row; i < end; i += together) sum += static_cast<double>(x[i * d + column0 + column]);
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (row == 0) {
      for (int other = 1; other < together; ++other) sum += scratch[other * width + column];
      partial[blockIdx.x * d + column0 + column] = sum;
    }
    __syncthreads();
  }
}

static __global__ void column_means_kernel(int64_t n, int64_t d, int64_t chunks, const double* partial, double* mean) {
  simt::grid_stride(d, [&](int64_t column) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * d + column];
    mean[column] = sum / static_cast<double>(n);
  });
}

// A block packs a panel. The mean is rounded to T, so that the difference is that of two numbers, rounded once.
template <class T>
__global__ void pack_kernel(KnnScan<T> s) {
  constexpr int panel = knn_panel<T>, together = knn_threads / panel;
  const int place = static_cast<int>(threadIdx.x) % panel;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * panel + place;
  T* const packed = s.packed + blockIdx.x * s.depth * panel + place;
  for (int64_t column = static_cast<int>(threadIdx.x) / panel; column < s.depth; column += together)
    packed[column * panel] =
        row < s.n && column < s.d ? s.x[row * s.d + column] - static_cast<T>(s.mean[column]) : T(0);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= panel) return;
  double sum = 0;
  for (int64_t column = 0; column < s.d; ++column) {
    const auto value = static_cast<double>(packed[column * panel]);
    sum += value * value;
  }
  s.half_norm[row] = row < s.n ? static_cast<T>(0.5 * sum) : std::numeric_limits<T>::infinity();
}

// --- scan ---

// Cuts the lists of the block's queries that hold more than `most`, a warp one after the other.
template <class T>
__device__ __forceinline__ void cut_lists(const KnnScan<T>& s, int64_t first_list, int* count, T* bar, int most) {
  constexpr int warps = knn_threads / 32;
  for (int query = static_cast<int>(simt::warp_index()); query < knn_panel<T>; query += warps) {
    if (count[query] <= most) continue;
    const int64_t at = (first_list + query) * s.capacity;
    const T worst = keep_smallest(s.scores + at, s.candidates + at, count[query], s.keep);
    __syncwarp();
    if (simt::lane_index() == 0) {
      count[query] = s.keep;
      bar[query] = -worst;
    }
  }
}

// Block (query panel, split). Reads every panel of the split once, and the queries again for each: 2 panel words for
// panel^2 multiply-adds, from the second-level cache.
template <class T>
__global__ void __launch_bounds__(knn_threads, 2) scan_kernel(KnnScan<T> s) {
  constexpr int micro = knn_micro<T>, half = micro / 2, panel = knn_panel<T>, chunk = knn_depth * panel;
  using Piece = KnnPiece<T>;
  static_assert(sizeof(Piece) == half * sizeof(T) && chunk * sizeof(T) == knn_threads * sizeof(Piece));
  SIMT_SHARED(Piece, query_pieces, 2 * knn_threads);
  SIMT_SHARED(Piece, candidate_pieces, 2 * knn_threads);
  SIMT_SHARED(T, bar, panel);
  SIMT_SHARED(int, count, panel);
  SIMT_SHARED(int, overfull, 1);
  const int tid = static_cast<int>(threadIdx.x), tx = tid % 16, ty = tid / 16;
  // The panel's row that is number i of this thread's micro, in the direction of t.
  const auto place = [](int t, int i) { return i < half ? t * half + i : panel / 2 + t * half + i - half; };

  const int64_t query_panel = s.first_panel + blockIdx.x;
  const int64_t first_list = static_cast<int64_t>(blockIdx.y) * s.queries + static_cast<int64_t>(blockIdx.x) * panel;
  const int64_t begin = s.panels * blockIdx.y / s.splits, end = s.panels * (blockIdx.y + 1) / s.splits;
  const int64_t chunks = s.depth / knn_depth, stages = (end - begin) * chunks;
  const int most = s.capacity - panel;  // a panel of candidates may follow
  if (tid < panel) {
    const bool real = query_panel * panel + tid < s.n;
    bar[tid] = real ? -std::numeric_limits<T>::infinity() : std::numeric_limits<T>::infinity();
    count[tid] = 0;
  }
  if (tid == 0) overfull[0] = 0;

  const auto piece_of = [&](int64_t panel_number, int64_t part) {
    return reinterpret_cast<const Piece*>(s.packed + (panel_number * s.depth + part * knn_depth) * panel)[tid];
  };
  Piece next_query = piece_of(query_panel, 0), next_candidate = begin < end ? piece_of(begin, 0) : Piece{};
  T score[micro][micro];
  int64_t candidate_panel = begin, part = 0;
  for (int64_t stage = 0; stage < stages; ++stage) {
    const int buffer = static_cast<int>(stage % 2) * knn_threads;
    query_pieces[buffer + tid] = next_query;
    candidate_pieces[buffer + tid] = next_candidate;
    __syncthreads();
    if (part == 0) {
      KANTOR_UNROLL for (int j = 0; j < micro; ++j) {
        const T start = -s.half_norm[candidate_panel * panel + place(tx, j)];
        KANTOR_UNROLL for (int i = 0; i < micro; ++i) score[i][j] = start;
      }
    }
    const bool last_part = part + 1 == chunks;
    if (stage + 1 < stages) {
      next_query = piece_of(query_panel, last_part ? 0 : part + 1);
      next_candidate = piece_of(last_part ? candidate_panel + 1 : candidate_panel, last_part ? 0 : part + 1);
    }
    KANTOR_UNROLL for (int column = 0; column < knn_depth; ++column) {
      constexpr int row_pieces = panel / half;
      const Piece* const q = query_pieces + buffer + column * row_pieces;
      const Piece* const c = candidate_pieces + buffer + column * row_pieces;
      const Piece a[2] = {q[ty], q[row_pieces / 2 + ty]}, b[2] = {c[tx], c[row_pieces / 2 + tx]};
      KANTOR_UNROLL for (int i = 0; i < micro; ++i) KANTOR_UNROLL for (int j = 0; j < micro; ++j) score[i][j] +=
          a[i / half].at[i % half] * b[j / half].at[j % half];
    }
    if (!last_part) {
      ++part;
      continue;
    }
    KANTOR_UNROLL for (int i = 0; i < micro; ++i) {
      const int query = place(ty, i);
      const T least = bar[query];
      T best = score[i][0];
      KANTOR_UNROLL for (int j = 1; j < micro; ++j) best = score[i][j] > best ? score[i][j] : best;
      if (!(best > least)) continue;
      KANTOR_UNROLL for (int j = 0; j < micro; ++j) {
        const int64_t candidate = candidate_panel * panel + place(tx, j);
        if (!(score[i][j] > least) || candidate == query_panel * panel + query) continue;
        const int at = atomicAdd(&count[query], 1);
        const int64_t list = (first_list + query) * s.capacity;
        s.scores[list + at] = -score[i][j];
        s.candidates[list + at] = static_cast<int32_t>(candidate);
        if (at >= most) overfull[0] = 1;
      }
    }
    __syncthreads();
    const bool cut = overfull[0] != 0;
    if (cut) {
      __syncthreads();  // everyone knows
      if (tid == 0) overfull[0] = 0;
      cut_lists(s, first_list, count, bar, most);
      __syncthreads();
    }
    ++candidate_panel;
    part = 0;
  }
  __syncthreads();
  cut_lists(s, first_list, count, bar, s.keep);
  __syncthreads();
  if (tid < panel) {
    s.counts[first_list + tid] = count[tid];
    s.bars[first_list + tid] = bar[tid];
  }
}

}  // namespace kantor
