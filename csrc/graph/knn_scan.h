// What the nearest neighbours' inner loop, compiled once per instruction set, gets from the algorithm around it.
#pragma once
#include <cstdint>

namespace kantor {

// Points to a panel: 128 bytes a column.
template <class T>
inline constexpr int knn_panel_width = 128 / sizeof(T);

// Scores of a block of points against one panel of candidates, from some of the columns: start_j + sum_c x_ic y_jc.
// With the last columns, those that reach their point's threshold are appended to its list. A list has `capacity`
// places, of which knn_panel_width are free; returned is whether one of them now holds more than `limit`.
template <class T>
struct KnnScan {
  const T* points;       // whole panels (column, lane) from the first of these columns on
  int64_t panel_stride;  // between panels of points
  int64_t rows;          // points, a multiple of knn_panel_width
  const T* panel;        // (column, lane), the candidates
  const T* start;        // (lane)
  int64_t columns;
  bool first, last;  // whether these are the first, the last columns
  T* partial;        // (rows, lane): scores between two calls
  int32_t first_candidate;
  const T* threshold;  // (rows)
  int32_t* count;      // (rows)
  T* score;            // (rows, capacity)
  int32_t* index;
  int64_t capacity;
  int32_t limit;
};

template <class T>
using KnnScanFunction = bool (*)(const KnnScan<T>&);

// By instruction set; only to be called where the processor has it.
template <class T>
KnnScanFunction<T> knn_scan_plain();
#if defined(__x86_64__)
template <class T>
KnnScanFunction<T> knn_scan_avx2();
template <class T>
KnnScanFunction<T> knn_scan_avx512();
#endif

}  // namespace kantor
