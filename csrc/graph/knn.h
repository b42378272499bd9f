// Exact k-nearest neighbours: of each row x_i of x, (n, d), the k nearest OTHER rows in Euclidean distance, self
// excluded by its index. Rows of the results are sorted by (squared_distance, index) in lexicographic order, so that
// they are the same whatever the number of threads, the instruction set or the device: everybody selects as they like,
// but with a margin that no rounding exceeds, and then orders what is left by squared_distance as it stands here.
//   index (n, k) int32, distance (n, k): sqrt(squared_distance), rounded to T
// n < 2^31, 1 <= d <= knn_largest_d, 1 <= k <= n - 1 and on CUDA at most knn_largest_k. Values are finite, and squares
// of differences within the range of doubles; a row without k finite distances has the index -1 and the distance NaN in
// place of the missing ones.
#pragma once
#include <cstdint>
#include <functional>

#include "core/exec.h"
#include "core/hd.h"

namespace kantor {

inline constexpr int64_t knn_largest_k = 512, knn_largest_d = 1 << 20;

// sum + difference^2, rounded twice: a contracted multiply-add would give other bits than a machine without it.
KANTOR_HD double add_square(double sum, double difference) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(sum, __dmul_rn(difference, difference));
#else
  return sum + difference * difference;
#endif
}

// |x - y|^2 in double: column c goes to partial sum c % 8, the eight are added pairwise. Exact zero for equal rows, the
// same bits for (x, y) and (y, x).
template <class T>
KANTOR_HD double squared_distance(int64_t d, const T* x, const T* y) {
  double sum[8] = {};
  int64_t c = 0;
  for (; c + 8 <= d; c += 8)
    for (int lane = 0; lane < 8; ++lane)
      sum[lane] = add_square(sum[lane], static_cast<double>(x[c + lane]) - static_cast<double>(y[c + lane]));
  for (int lane = 0; c + lane < d; ++lane)
    sum[lane] = add_square(sum[lane], static_cast<double>(x[c + lane]) - static_cast<double>(y[c + lane]));
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// Bytes of workspace, which need not be initialised. Its address is a multiple of 16, for speed of 64; CUDA: of 256.
template <class T>
int64_t knn_workspace_bytes_cpu(int64_t n, int64_t d, int64_t k, int threads);
template <class T>
int64_t knn_workspace_bytes_cuda(int64_t n, int64_t d, int64_t k);

// n^2 d multiply-adds; reads x once and a packed copy of it n / 240 times, writes the results. `interrupted` is asked
// every few milliseconds by the calling thread; once it answers true the function returns false, its results undefined.
// Vectors have at most `widest` bits.
template <class T>
bool knn_cpu(const Exec& exec, int64_t n, int64_t d, const T* x, int64_t k, int32_t* index, T* distance,
             void* workspace, const std::function<bool()>& interrupted, int widest = 512);

// Asynchronous, on the stream of `exec`.
template <class T>
void knn_cuda(const Exec& exec, int64_t n, int64_t d, const T* x, int64_t k, int32_t* index, T* distance,
              void* workspace);

}  // namespace kantor
