// Numbers in which a window of gradients may be stored: float, double, and three narrow ones that halve or quarter the
// traffic. Arithmetic is never done in them: a value is widened when it is loaded and rounded when it is stored.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/hd.h"

namespace kantor {

struct Bfloat16 {
  uint16_t bits;
};
// IEEE half precision. Rows are scaled to at most 1 in magnitude, so that infinities and NaN need no care.
struct Half {
  uint16_t bits;
};

// The type of vectors that go with rows stored as S.
template <class S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class To, class From>
KANTOR_HD To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

KANTOR_HD double widen(double value) { return value; }
KANTOR_HD double widen(float value) { return value; }
KANTOR_HD double widen(int8_t value) { return value; }
KANTOR_HD double widen(Bfloat16 value) { return same_bits<float>(uint32_t(value.bits) << 16); }
// The exponent's bias is made up by a product that is exact; it takes care of subnormal numbers too.
KANTOR_HD double widen(Half value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13, sign = uint32_t(value.bits & 0x8000) << 16;
  return same_bits<float>(magnitude | sign) * 0x1p112f;
}

// To the nearest number of type S, ties to even. Not for NaN.
template <class S>
KANTOR_HD S narrow(Wide<S> value) {
  if constexpr (std::is_same_v<S, Bfloat16>) {
    const uint32_t bits = same_bits<uint32_t>(value);
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<S, Half>) {
    const uint32_t bits = same_bits<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // Below the smallest normal number: units of 2^-24, those of floats from 1/2 to 1. Both, for loops to be
    // vectorised.
    const uint32_t subnormal = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    return {static_cast<uint16_t>(sign | (magnitude < 0x38800000 ? subnormal : normal))};
  } else if constexpr (std::is_same_v<S, int8_t>) {
    return static_cast<int8_t>(static_cast<int>(value + 0x1.8p23f - 0x1.8p23f));  // rounds to an integer
  } else {
    return value;
  }
}

}  // namespace kantor
