// The inner loop of exact nearest neighbours for one instruction set. The file that includes this defines
// KANTOR_TARGET, the target attribute of every function, and a struct with the vector operations:
//   Element, Vector, lanes; rows: points taken at once, a divisor of the panel's width; load, store, broadcast,
//   fma(a, b, c), reaches(score, threshold): bit l where lane l of score >= threshold
#pragma once
#include <cstdint>

#include "graph/knn_scan.h"

#define KANTOR_INLINE inline __attribute__((always_inline)) KANTOR_TARGET

namespace kantor {
namespace {

// One vector of candidates is read for `rows` multiply-adds, whose other operand is broadcast from memory; the scores
// are compared in registers, and only those of a row that has a survivor are written.
template <class Isa>
KANTOR_TARGET bool scan_panel(const KnnScan<typename Isa::Element>& scan) {
  using T = typename Isa::Element;
  constexpr int width = knn_panel_width<T>, vectors = width / Isa::lanes, rows = Isa::rows;
  bool some_long = false;
  for (int64_t row = 0; row < scan.rows; row += rows) {
    const T* x = scan.points + row / width * scan.panel_stride + row % width;
    const T* y = scan.panel;
    T* partial = scan.partial + row * width;
    typename Isa::Vector score[rows][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
        score[r][v] = Isa::load(scan.first ? scan.start + v * Isa::lanes : partial + r * width + v * Isa::lanes);
    for (int64_t c = 0; c < scan.columns; ++c, x += width, y += width) {
      typename Isa::Vector candidates[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) candidates[v] = Isa::load(y + v * Isa::lanes);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        const auto coordinate = Isa::broadcast(x[r]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) score[r][v] = Isa::fma(coordinate, candidates[v], score[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      uint32_t survivors = 0;
      if (scan.last) {
        const auto threshold = Isa::broadcast(scan.threshold[row + r]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) survivors |= Isa::reaches(score[r][v], threshold) << v * Isa::lanes;
        if (survivors == 0) continue;
      }
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) Isa::store(partial + r * width + v * Isa::lanes, score[r][v]);
      int32_t count = scan.count[row + r];
      for (; survivors != 0; survivors &= survivors - 1, ++count) {
        const int lane = __builtin_ctz(survivors);
        scan.score[(row + r) * scan.capacity + count] = partial[r * width + lane];
        scan.index[(row + r) * scan.capacity + count] = scan.first_candidate + lane;
      }
      scan.count[row + r] = count;
      some_long |= count > scan.limit;
    }
  }
  return some_long;
}

}  // namespace
}  // namespace kantor
