// Philox4x32-10, a counter-based random number generator: 128 random bits from a counter and a key, the same on every
// device, in any order, with nothing stored. Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011, section 3.3 and table 2.
#pragma once
#include <cstdint>

#include "core/hd.h"

namespace kantor {

struct Philox {
  uint32_t lane[4];
};

// No branch and no table: a loop over counters that calls it vectorises, once the rounds are unrolled.
KANTOR_HD Philox philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if !defined(__CUDACC__)  // whose device half unrolls by itself
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;  // the golden ratio
    k1 += 0xBB67AE85u;  // sqrt(3) - 1
  }
  return {{c0, c1, c2, c3}};
}

// The factors of dropout with probability p in [0, 1): 0 with probability p, else 1 / (1 - p), so that the mean is 1.
// Columns 4 b .. 4 b + 3 of a row share one call of philox, column by column in its four lanes.
template <class T>
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // floor(p 2^32)
  T scale = 1;             // 1 / (1 - p)
  uint32_t first_row = 0;  // of all rows, where row 0 here is one in their midst

  Dropout() = default;
  Dropout(double p, uint64_t seed_, int64_t first_row_ = 0)
      : seed(seed_),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<T>(1.0 / (1.0 - p))),
        first_row(static_cast<uint32_t>(first_row_)) {}

  bool active() const { return threshold > 0; }
  KANTOR_HD Philox bits(int64_t column_block, int64_t row, int64_t step) const {
    return philox(seed, static_cast<uint32_t>(column_block), first_row + static_cast<uint32_t>(row),
                  static_cast<uint32_t>(step), 0);
  }
  KANTOR_HD T factor(uint32_t random) const { return random >= threshold ? scale : T(0); }
};

}  // namespace kantor
