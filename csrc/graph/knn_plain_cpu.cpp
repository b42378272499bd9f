// The nearest neighbours' inner loop for any processor: vectors of 16 bytes, which the compiler splits where there are
// none.
#include <cstring>

#define KANTOR_TARGET
#include "graph/knn_tile.h"

namespace kantor {
namespace {

template <class T>
struct Plain {
  using Element = T;
  typedef T Vector __attribute__((vector_size(16)));
  static constexpr int lanes = 16 / sizeof(T), rows = 1;
  KANTOR_INLINE static Vector load(const T* p) {
    Vector a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  KANTOR_INLINE static void store(T* p, Vector a) { std::memcpy(p, &a, sizeof a); }
  KANTOR_INLINE static Vector broadcast(T a) { return a - Vector{}; }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
  KANTOR_INLINE static uint32_t reaches(Vector score, Vector threshold) {
    const auto lane = score >= threshold;
    uint32_t bits = 0;
    for (int l = 0; l < lanes; ++l) bits |= static_cast<uint32_t>(lane[l] != 0) << l;
    return bits;
  }
};

}  // namespace

template <class T>
KnnScanFunction<T> knn_scan_plain() {
  return &scan_panel<Plain<T>>;
}
template KnnScanFunction<float> knn_scan_plain<float>();
template KnnScanFunction<double> knn_scan_plain<double>();

}  // namespace kantor
