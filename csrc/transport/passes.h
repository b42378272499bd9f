// Entropic optimal transport as the algorithms see it: passes over the n x m entries of a plan
//     P_ij = exp((f_i + g_j - C_ij) / eps),
// whose cost C is stored or computed on the fly from points. The algorithms (sinkhorn.h, newton.h, sns.h) are written
// once on this interface; processors and GPUs supply the passes. Potentials, weights and sums are doubles on the host,
// n + m of them, whatever the precision of the cost: an exponent (f + g - C) / eps is only as exact as its terms.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/exec.h"
#include "transport/row_ranks.h"

namespace kantor::transport {

enum class CostKind : int { dense = 0, sqeuclidean = 1, euclidean = 2, lp = 3, cosine = 4, callback = 5 };

// Fills rows first..last-1 of the cost, row-major, into memory known to the caller (kind callback).
using CostCallback = std::function<void(int64_t first, int64_t last)>;

template <class T>
struct Cost {
  CostKind kind = CostKind::dense;
  int64_t n = 0, m = 0, d = 0;
  double p = 2;                  // lp: sum_k |x_k - y_k|^p
  const T* matrix = nullptr;     // dense: (n, m); callback: (tile_rows, m), filled by `fill`
  const T* x = nullptr;          // points: (n, d)
  const T* y_by_axis = nullptr;  // points: (d, m)
  int64_t tile_rows = 0;
  CostCallback fill;
  void* workspace = nullptr;  // CUDA: transport_workspace_bytes(n, m) of device memory
};

// A plan without its small entries, by rows: columns increase within a row.
struct SparsePlan {
  int64_t n = 0, m = 0;
  std::vector<int64_t> row_start;
  std::vector<int32_t> column;
  std::vector<double> value;
  int64_t nnz() const { return static_cast<int64_t>(value.size()); }
};

class Passes {
 public:
  virtual ~Passes() = default;
  int64_t n = 0, m = 0;
  std::function<bool()> interrupted;  // asked every million entries or so, by one thread
  RowRanks ranks;  // where other processes hold other rows: a pass is over this one's, the algorithms add up

  // For every row the sum of its entries as log_sums_i = log sum_j exp((g_j - C_ij) / eps), then, with
  // f_i = offset_i - slope * eps * log_sums_i, the column sums of P. One exponential an entry:
  // the row that was just summed is still in the first-level cache when its share goes to the columns.
  // offset = eps log a and slope 1 make the row sums a. Entries below e^-cutoff of their row's largest are left out.
  virtual void sweep(double eps, double cutoff, const double* g, const double* offset, double slope, double* log_sums,
                     double* f, double* column_sums) = 0;

  // log_sums_j = log sum_i exp((f_i - C_ij) / eps) over columns, each with its own largest entry taken out.
  virtual void column_log_sums(double eps, const double* f, double* log_sums) = 0;

  // Row and column sums of P for any f and g; +inf where they overflow.
  virtual void sums(double eps, const double* f, const double* g, double* row_sums, double* column_sums) = 0;

  // The entries of P above `threshold`; false, and nothing useful, when there are more than `limit` of them.
  virtual bool extract(double eps, const double* f, const double* g, double threshold, int64_t limit,
                       SparsePlan& plan) = 0;

  // out = P' diag(scale) P v: the curvature that the rows, eliminated, leave to the columns.
  virtual void gram_product(double eps, double cutoff, const double* f, const double* g, const double* scale,
                            const double* v, double* out) = 0;

  // out = P V, (n, k); V is (m, k).
  virtual void apply(double eps, const double* f, const double* g, const double* V, int64_t k, double* out) = 0;
  // out = P' V, (m, k); V is (n, k).
  virtual void apply_transposed(double eps, const double* f, const double* g, const double* V, int64_t k,
                                double* out) = 0;
  // sum_ij P_ij C_ij and sum_ij P_ij log P_ij.
  virtual void values(double eps, const double* f, const double* g, double* linear, double* entropy) = 0;
};

template <class T>
std::unique_ptr<Passes> make_passes_cpu(const Exec& exec, const Cost<T>& cost);
template <class T>
std::unique_ptr<Passes> make_passes_cuda(const Exec& exec, const Cost<T>& cost);
int64_t transport_workspace_bytes(int64_t n, int64_t m);

}  // namespace kantor::transport
