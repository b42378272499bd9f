// The polar iteration of small matrices for any processor: vectors of 16 bytes, which the compiler splits where there
// are none.
#include <algorithm>
#include <cstring>

#define KANTOR_TARGET
#include "linalg/msign_tile.h"

namespace kantor {
namespace {

template <class T>
struct Plain {
  using Element = T;
  typedef T Vector __attribute__((vector_size(16)));
  static constexpr int lanes = 16 / sizeof(T), rows = 4;
  KANTOR_INLINE static Vector load(const T* p) {
    Vector a;
    std::memcpy(&a, p, sizeof a);
    return a;
  }
  KANTOR_INLINE static void store(T* p, Vector a) { std::memcpy(p, &a, sizeof a); }
  KANTOR_INLINE static Vector broadcast(T a) { return a - Vector{}; }
  KANTOR_INLINE static Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
};

}  // namespace

template <class T>
MsignFunction<T> msign_plain() {
  return &msign_one<Plain<T>>;
}
template MsignFunction<float> msign_plain<float>();
template MsignFunction<double> msign_plain<double>();

}  // namespace kantor
