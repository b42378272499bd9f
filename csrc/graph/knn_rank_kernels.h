// Device side of knn.h, last two steps: what the scan of knn_kernels.h left is put in order by exact distances and
// proven to be complete; rows without a proof are searched again.
#pragma once
#include "graph/knn_kernels.h"

namespace kantor {

// squared_distance by eight lanes, its eight partial sums; the same bits. All lanes of the warp take part.
template <class T>
__device__ __forceinline__ double squared_distance_by_lanes(int64_t d, const T* x, const T* y) {
  double sum = 0;
  for (int64_t c = simt::lane_index() % 8; c < d; c += 8)
    sum = add_square(sum, static_cast<double>(x[c]) - static_cast<double>(y[c]));
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(simt::full_warp, sum, distance);
  return sum;
}

// Writes the first k of `count` candidates in the order of (square, index), by a whole block: each thread counts who
// comes before its own. *last becomes the k-th square, if there are k.
template <class T>
__device__ __forceinline__ void write_ranked(const KnnScan<T>& s, int64_t query, int count, const double* square,
                                             const int32_t* who, double* last) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const double own = square[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += square[j] < own || (square[j] == own && who[j] < who[i]);
    if (rank >= s.k) continue;
    s.index[query * s.k + rank] = who[i];
    s.distance[query * s.k + rank] = static_cast<T>(sqrt(own));
    if (rank + 1 == s.k) *last = own;
  }
}

// Whether no candidate whose score is at most `bar` is as near to the query as sqrt(square): its row would have a norm
// of at most R = |q| + sqrt(square), and its score at least (|q|^2 - square) / 2 less the rounding errors of the dot
// product, d + 1 of them, of the norms and of the centred rows.
template <class T>
__device__ __forceinline__ bool is_proven(const KnnScan<T>& s, int64_t query, double square, double bar) {
  if (bar == -std::numeric_limits<double>::infinity()) return true;  // everyone is in the list
  constexpr double unit = std::numeric_limits<T>::epsilon() / 2;
  const double half_norm = static_cast<double>(s.half_norm[query]), norm = sqrt(2 * half_norm) * (1 + 4 * unit);
  const double d = static_cast<double>(s.d);
  const double reach = sqrt(square) * (1 + (8 + d / 8) * unit) + 4 * unit * norm, R = norm + reach;
  const double error =
      1.01 * (d + 16) * (unit * (norm * R + 0.5 * R * R) + static_cast<double>(std::numeric_limits<T>::min()));
  return R * R < static_cast<double>(std::numeric_limits<T>::max()) && half_norm - 0.5 * reach * reach - error > bar;
}

// A block for each query of this launch: the lists of all splits.
template <class T>
__global__ void rank_kernel(KnnScan<T> s) {
  SIMT_DYNAMIC_SHARED(double, square);  // splits * keep, then as many indices
  SIMT_SHARED(double, last, 1);
  auto* const who = reinterpret_cast<int32_t*>(square + s.splits * s.keep);
  const int64_t own = blockIdx.x, query = s.first_panel * knn_panel<T> + own;
  if (query >= s.n) return;
  int count = 0;
  double bar = -std::numeric_limits<double>::infinity();
  for (int split = 0; split < s.splits; ++split) {
    const int64_t list = static_cast<int64_t>(split) * s.queries + own;
    const int length = s.counts[list];
    for (int i = static_cast<int>(threadIdx.x); i < length; i += static_cast<int>(blockDim.x))
      who[count + i] = s.candidates[list * s.capacity + i];
    bar = max(bar, static_cast<double>(s.bars[list]));
    count += length;
  }
  __syncthreads();
  const int together = static_cast<int>(blockDim.x) / 8;
  for (int first = 0; first < count; first += together) {
    const int i = first + static_cast<int>(threadIdx.x) / 8;
    const int64_t other = i < count ? who[i] : query;
    const double exact = squared_distance_by_lanes(s.d, s.x + query * s.d, s.x + other * s.d);
    if (i < count && threadIdx.x % 8 == 0) square[i] = exact;
  }
  __syncthreads();
  write_ranked(s, query, count, square, who, last);
  __syncthreads();
  if (threadIdx.x == 0) s.uncertain[own] = count < s.k || !is_proven(s, query, last[0], bar);
}

// --- repeat ---

// A block for each uncertain row in turn, a thread for each candidate; `room` places for each block.
template <class T>
__global__ void repeat_kernel(KnnScan<T> s, int room, double* squares, int32_t* candidates) {
  SIMT_SHARED(double, bar, 1);
  SIMT_SHARED(double, last, 1);
  SIMT_SHARED(int, count, 1);
  const int k = static_cast<int>(s.k), threads = static_cast<int>(blockDim.x);
  squares += static_cast<int64_t>(blockIdx.x) * room;
  candidates += static_cast<int64_t>(blockIdx.x) * room;
  const auto cut = [&](int most) {  // those who come later have larger indices, so that a tie with the bar loses
    if (simt::warp_index() == 0 && count[0] > most) {
      const double worst = keep_smallest(squares, candidates, count[0], k);
      __syncwarp();
      if (simt::lane_index() == 0) {
        count[0] = k;
        bar[0] = worst;
      }
    }
    __syncthreads();
  };
  for (int own = static_cast<int>(blockIdx.x); own < s.queries; own += static_cast<int>(gridDim.x)) {
    const int64_t query = s.first_panel * knn_panel<T> + own;
    if (query >= s.n || !s.uncertain[own]) continue;
    if (threadIdx.x == 0) {
      bar[0] = std::numeric_limits<double>::infinity();
      count[0] = 0;
    }
    __syncthreads();
    for (int64_t first = 0; first < s.n; first += threads) {
      const int64_t candidate = first + threadIdx.x;
      if (candidate < s.n && candidate != query) {
        const double exact = squared_distance(s.d, s.x + query * s.d, s.x + candidate * s.d);
        if (exact < bar[0]) {
          const int at = atomicAdd(&count[0], 1);
          squares[at] = exact;
          candidates[at] = static_cast<int32_t>(candidate);
        }
      }
      __syncthreads();
      cut(room - threads);
    }
    cut(k);
    write_ranked(s, query, count[0], squares, candidates, last);
    for (int i = count[0] + static_cast<int>(threadIdx.x); i < k; i += threads) {  // distances that are not finite
      s.index[query * s.k + i] = -1;
      s.distance[query * s.k + i] = std::numeric_limits<T>::quiet_NaN();
    }
    __syncthreads();
  }
}

}  // namespace kantor
