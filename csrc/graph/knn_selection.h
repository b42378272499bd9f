// The list of candidates of one point, on the CPU: how far up its scores the k nearest reach, and their order. S_ij and
// g as in knn_cpu.cpp.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/simd.h"
#include "graph/knn.h"

namespace kantor {

// S_ij - 2 g s_j, and -infinity for i itself and up to a multiple of 16.
template <class T>
KANTOR_SIMD void lower_scores(int64_t count, const T* score, const int32_t* index, const T* starts, T factor, int64_t i,
                              T* lower) {
  for (int64_t m = 0; m < count; ++m) {
    const T value = score[m] + factor * starts[index[m]];
    lower[m] = index[m] == i ? -std::numeric_limits<T>::infinity() : value;
  }
  for (int64_t m = count; m % 16 != 0; ++m) lower[m] = -std::numeric_limits<T>::infinity();
}

// A number that at least k of the values reach, and as a rule few more: bisection, which unlike a partial sort has no
// branch that depends on a value. The lowest number where there are not more than k.
template <class T>
KANTOR_SIMD T low_threshold(int64_t count, const T* values, int64_t k) {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const Integer padded = static_cast<Integer>((count + 15) / 16 * 16), wanted = static_cast<Integer>(k);
  T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::lowest();
  for (Integer m = 0; m < padded; ++m) {
    low = values[m] < low && values[m] >= std::numeric_limits<T>::lowest() ? values[m] : low;
    high = values[m] > high ? values[m] : high;
  }
  Integer reached = 0;
  for (Integer m = 0; m < padded; ++m) reached += values[m] >= low;
  if (reached <= wanted) return std::numeric_limits<T>::lowest();
  for (int halvings = 0; halvings < 40 && reached > wanted + wanted / 8; ++halvings) {
    const T middle = low + (high - low) / 2;
    Integer above = 0;
    for (Integer m = 0; m < padded; ++m) above += values[m] >= middle;
    const bool enough = above >= wanted;
    low = enough ? middle : low;
    high = enough ? high : middle;
    reached = enough ? above : reached;
  }
  return low;
}

// Keeps those that reach the threshold, without i; returns how many.
template <class T>
int32_t drop_below(int64_t count, T threshold, int64_t i, T* score, int32_t* index) {
  int32_t kept = 0;
  for (int64_t m = 0; m < count; ++m) {
    const bool keep = (score[m] >= threshold) & (index[m] != i);
    score[kept] = score[m];
    index[kept] = index[m];
    kept += keep;
  }
  return kept;
}

template <class T>
struct Ranked {
  double squared_distance;
  int32_t index;
  T score;
  bool operator<(const Ranked& other) const {
    return squared_distance < other.squared_distance ||
           (squared_distance == other.squared_distance && index < other.index);
  }
};

template <class T>
KANTOR_SIMD void rank(int64_t d, const T* x, int64_t i, int64_t count, const int32_t* index, const T* score,
                      Ranked<T>* ranked) {
  for (int64_t m = 0; m < count; ++m)
    ranked[m] = {squared_distance(d, x + i * d, x + index[m] * d), index[m], score[m]};
}

// A list is short, and then insertion is twice as fast as anything that branches more cleverly.
template <class T>
void sort(Ranked<T>* begin, Ranked<T>* end) {
  if (end - begin > 64) return std::sort(begin, end);
  for (Ranked<T>* next = begin; next < end; ++next) {
    const Ranked<T> moved = *next;
    Ranked<T>* place = next;
    for (; place > begin && moved < place[-1]; --place) *place = place[-1];
    *place = moved;
  }
}

}  // namespace kantor
