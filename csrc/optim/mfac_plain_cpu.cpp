// M-FAC's inner loops for any processor: vectors of 16 bytes, which the compiler splits where there are none.
#include <cstring>

#define KANTOR_TARGET
#include "optim/mfac_loops.h"

namespace kantor {
namespace {

struct Plain {
  typedef double Vector __attribute__((vector_size(16)));
  static constexpr int lanes = 2, rows = 2;
  template <class S>
  KANTOR_INLINE static Vector load(const S* p) {
    return Vector{widen(p[0]), widen(p[1])};
  }
  KANTOR_INLINE static void store(double* p, Vector a) { std::memcpy(p, &a, sizeof a); }
  KANTOR_INLINE static Vector broadcast(double a) { return Vector{a, a}; }
  KANTOR_INLINE static Vector add(Vector a, Vector b) { return a + b; }
  KANTOR_INLINE static Vector multiply(Vector a, Vector b) { return a * b; }
  KANTOR_INLINE static Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
};

}  // namespace

KANTOR_ROW_LOOPS(row_loops_plain, Plain)

}  // namespace kantor
