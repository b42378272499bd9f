// Lists of (key, index) in device memory, cut to their smallest by one warp. No sorting: the bits of the largest key
// that stays are found one after the other, by counting with votes.
#pragma once
#include <cstdint>

#include "core/simt.h"

namespace kantor {

// Bits that are ordered like the numbers, NaN aside.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  const auto bits = static_cast<unsigned>(__float_as_int(x));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ unsigned long long ordered_bits(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ unsigned ordered_bits(int32_t x) { return static_cast<unsigned>(x); }  // not negative

// How many of 0..count-1 fulfil the predicate; by a whole warp, which gets the answer in every lane.
template <class Predicate>
__device__ __forceinline__ int warp_count(int count, Predicate predicate) {
  int total = 0;
  for (int i = 0; i < count; i += 32) {
    const int mine = i + static_cast<int>(simt::lane_index());
    total += __popc(__ballot_sync(simt::full_warp, mine < count && predicate(mine)));
  }
  return total;
}

// The bits of the keep-th smallest key among those that `takes_part` names, which are at least `keep`: bit by bit from
// the highest.
template <class Key, class Predicate>
__device__ __forceinline__ auto select_bits(const Key* keys, int count, int keep, Predicate takes_part) {
  using Bits = decltype(ordered_bits(Key{}));
  Bits low = 0;
  for (int bit = 8 * static_cast<int>(sizeof(Bits)) - 1; bit >= 0; --bit) {
    const Bits middle = low | ((Bits{1} << bit) - 1);
    if (warp_count(count, [&](int i) { return takes_part(i) && ordered_bits(keys[i]) <= middle; }) < keep)
      low |= Bits{1} << bit;
  }
  return low;
}

// Cuts a list of `count` > `keep` to the keep smallest (key, index), by a whole warp. Returns their largest key.
template <class Key>
__device__ __forceinline__ Key keep_smallest(Key* keys, int32_t* indices, int count, int keep) {
  const auto bits = select_bits(keys, count, keep, [](int) { return true; });
  const int smaller = warp_count(count, [&](int i) { return ordered_bits(keys[i]) < bits; });
  const int equal = warp_count(count, [&](int i) { return ordered_bits(keys[i]) == bits; });
  unsigned last_index = 0xffffffffu;
  if (smaller + equal > keep)
    last_index = select_bits(indices, count, keep - smaller, [&](int i) { return ordered_bits(keys[i]) == bits; });
  Key largest = 0;
  for (int i = 0, kept = 0; i < count; i += 32) {
    const int mine = i + static_cast<int>(simt::lane_index());
    const Key key = mine < count ? keys[mine] : Key(0);
    const int32_t index = mine < count ? indices[mine] : 0;
    const bool tied = ordered_bits(key) == bits;
    const bool stays = mine < count && (tied ? ordered_bits(index) <= last_index : ordered_bits(key) < bits);
    const unsigned staying = __ballot_sync(simt::full_warp, stays);  // everyone has read what others now overwrite
    if (stays) {
      const int place = kept + __popc(staying & ((1u << simt::lane_index()) - 1));
      keys[place] = key;
      indices[place] = index;
    }
    const unsigned tie = __ballot_sync(simt::full_warp, stays && tied);
    if (tie) largest = __shfl_sync(simt::full_warp, key, __ffs(static_cast<int>(tie)) - 1);
    kept += __popc(staying);
  }
  return largest;
}

}  // namespace kantor
