// The sum over the processes that share a problem, as native code sees it.
#pragma once
#include <cstdint>
#include <functional>

namespace kantor {

// Native code writes its own totals to `sums`, calls, and reads there the totals of all ranks: one call for all the
// scalars of a reduction point. `sums` is memory of a float64 tensor that Python owns, on the device of the vectors; on
// a GPU the call is queued on the current stream like a kernel. Without a `call` there is one process.
//
// Every decision that ends an iteration must be made from such totals alone: ranks that decide differently wait for
// each other for ever.
struct AllReduce {
  double* sums = nullptr;
  std::function<void(int64_t count)> call;

  explicit operator bool() const { return static_cast<bool>(call); }
};

// Sums that ask for an end of the iteration, beside those of a reduction point: interrupted, stopped.
inline constexpr int64_t rank_wishes = 2;

}  // namespace kantor
