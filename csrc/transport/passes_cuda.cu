// Passes over the plan on CUDA. Rows: a block each, with a running maximum, so that the cost is read once. Columns: a
// thread each, over chunks of rows, partial sums added in a fixed order: no atomics, the same bits in every run. A
// sweep reads a stored cost twice, 2 n m words, and takes two exponentials an entry. Vectors travel between host and
// device, 8 (n + m) bytes a pass; the algorithm on the host waits for them once.
#include <algorithm>
#include <cmath>

#include "core/simt.h"
#include "transport/passes.h"

namespace kantor::transport {
namespace {

constexpr unsigned block_threads = 256;
constexpr int64_t most_chunks = 64;
constexpr int64_t least_buffer = int64_t{1} << 20;  // entries of a sparse plan copied at a time

template <class T>
struct DeviceCost {
  CostKind kind;
  int64_t m, d;
  double p;
  const T* matrix;  // its first row is row 0 of the tile
  const T* x;       // likewise
  const T* y_by_axis;

  __device__ __forceinline__ double operator()(int64_t i, int64_t j) const {
    if (kind == CostKind::dense || kind == CostKind::callback) return double(matrix[i * m + j]);
    double sum = 0;
    for (int64_t axis = 0; axis < d; ++axis) {
      const double a = double(x[i * d + axis]), b = double(y_by_axis[axis * m + j]);
      const double difference = a - b, size = difference < 0 ? -difference : difference;
      if (kind == CostKind::cosine) {
        sum += a * b;
      } else if (kind == CostKind::lp) {
        sum += p == 1 ? size : pow(size, p);
      } else {
        sum += difference * difference;
      }
    }
    if (kind == CostKind::euclidean) return sqrt(sum);
    return kind == CostKind::cosine ? 1 - sum : sum;
  }
};

__device__ __forceinline__ bool finite_below(double t) { return t > -1e300; }  // false for -inf and NaN

// A sum of exponentials, its largest exponent taken out.
struct LogSum {
  double largest = -1e308, sum = 0;

  __device__ __forceinline__ void add(double t) {
    if (!finite_below(t)) return;
    if (t > largest) {
      sum = sum * exp(largest - t) + 1;
      largest = t;
    } else {
      sum += exp(t - largest);
    }
  }
  __device__ __forceinline__ double value() const { return sum > 0 ? log(sum) + largest : log(0.0); }
};

// --- rows ---

template <class T>
__global__ void row_log_sums_kernel(DeviceCost<T> cost, int64_t rows, const double* g, double inverse_eps,
                                    const double* offset, double slope_eps, double* log_sums, double* f) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    LogSum own;
    for (int64_t j = threadIdx.x; j < cost.m; j += blockDim.x) own.add((g[j] - cost(i, j)) * inverse_eps);
    const double largest = simt::block_max(own.largest);
    const double sum = simt::block_sum(own.sum > 0 ? own.sum * exp(own.largest - largest) : 0.0);
    if (threadIdx.x == 0) {
      log_sums[i] = LogSum{largest, sum}.value();
      f[i] = offset[i] - slope_eps * log_sums[i];
    }
  }
}

// out_i = sum_j P_ij v_j (v null: 1), or sum_j P_ij log P_ij.
template <class T, bool entropy>
__global__ void row_products_kernel(DeviceCost<T> cost, int64_t rows, const double* f, const double* g,
                                    double inverse_eps, const double* v, double* out) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    double sum = 0;
    for (int64_t j = threadIdx.x; j < cost.m; j += blockDim.x) {
      const double t = (f[i] + g[j] - cost(i, j)) * inverse_eps;
      if (!(t > -700)) continue;
      sum += exp(t) * (entropy ? t : v ? v[j] : 1.0);
    }
    sum = simt::block_sum(sum);
    if (threadIdx.x == 0) out[i] = sum;
  }
}

// --- columns ---

// partial[chunk, j] = sum_i P_ij w_i over a chunk of rows (w null: 1).
template <class T>
__global__ void column_products_kernel(DeviceCost<T> cost, int64_t rows, int64_t chunk_rows, const double* f,
                                       const double* g, double inverse_eps, const double* w, double* partial) {
  const int64_t j = simt::global_thread_index();
  if (j >= cost.m) return;
  const int64_t first = blockIdx.y * chunk_rows, last = first + chunk_rows < rows ? first + chunk_rows : rows;
  double sum = 0;
  for (int64_t i = first; i < last; ++i) {
    const double t = (f[i] + g[j] - cost(i, j)) * inverse_eps;
    if (t > -700) sum += exp(t) * (w ? w[i] : 1.0);
  }
  partial[blockIdx.y * cost.m + j] = sum;
}

__global__ void add_chunks_kernel(int64_t m, int64_t chunks, const double* partial, double* out) {
  simt::grid_stride(m, [&](int64_t j) {
    double sum = out[j];
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c * m + j];
    out[j] = sum;
  });
}

template <class T>
__global__ void column_log_sums_kernel(DeviceCost<T> cost, int64_t rows, int64_t chunk_rows, const double* f,
                                       double inverse_eps, LogSum* partial) {
  const int64_t j = simt::global_thread_index();
  if (j >= cost.m) return;
  const int64_t first = blockIdx.y * chunk_rows, last = first + chunk_rows < rows ? first + chunk_rows : rows;
  LogSum sum;
  for (int64_t i = first; i < last; ++i) sum.add((f[i] - cost(i, j)) * inverse_eps);
  partial[blockIdx.y * cost.m + j] = sum;
}

// running_j takes in its chunks; `log_sums` (may be null) gets the value.
__global__ void add_log_sums_kernel(int64_t m, int64_t chunks, const LogSum* partial, LogSum* running,
                                    double* log_sums) {
  simt::grid_stride(m, [&](int64_t j) {
    LogSum total = running[j];
    for (int64_t c = 0; c < chunks; ++c) {
      const LogSum part = partial[c * m + j];
      if (!(part.sum > 0)) continue;
      if (part.largest > total.largest) {
        total.sum = (total.sum > 0 ? total.sum * exp(total.largest - part.largest) : 0.0) + part.sum;
        total.largest = part.largest;
      } else {
        total.sum += part.sum * exp(part.largest - total.largest);
      }
    }
    running[j] = total;
    log_sums[j] = total.value();
  });
}

__global__ void clear_log_sums_kernel(int64_t m, LogSum* running) {
  simt::grid_stride(m, [&](int64_t j) { running[j] = LogSum{}; });
}

// --- entries above a threshold ---

template <class T>
__global__ void count_entries_kernel(DeviceCost<T> cost, int64_t rows, const double* f, const double* g,
                                     double inverse_eps, double threshold, int64_t* counts) {
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    int count = 0;
    for (int64_t j = threadIdx.x; j < cost.m; j += blockDim.x) {
      const double t = (f[i] + g[j] - cost(i, j)) * inverse_eps;
      count += t > -700 && exp(t) > threshold;
    }
    count = simt::block_sum(count);
    if (threadIdx.x == 0) counts[i] = count;
  }
}

// A warp a row, columns in order.
template <class T>
__global__ void fill_entries_kernel(DeviceCost<T> cost, int64_t first, int64_t last, const double* f, const double* g,
                                    double inverse_eps, double threshold, const int64_t* starts, int64_t base,
                                    int32_t* columns, double* values) {
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t i = first + (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; i < last; i += warps) {
    int64_t at = starts[i] - base;
    for (int64_t j0 = 0; j0 < cost.m; j0 += 32) {
      const int64_t j = j0 + simt::lane_index();
      double value = 0;
      if (j < cost.m) {
        const double t = (f[i] + g[j] - cost(i, j)) * inverse_eps;
        if (t > -700) value = exp(t);
      }
      const bool keep = value > threshold;
      const unsigned kept = __ballot_sync(simt::full_warp, keep);
      if (keep) {
        const int64_t mine = at + __popc(kept & ((1u << simt::lane_index()) - 1));
        columns[mine] = static_cast<int32_t>(j);
        values[mine] = value;
      }
      at += __popc(kept);
    }
  }
}

int64_t buffer_entries(int64_t m) { return std::max(m, least_buffer); }

template <class T>
class PassesCuda final : public Passes {
 public:
  PassesCuda(const Exec& exec, const Cost<T>& cost) : exec_(exec), cost_(cost) {
    n = cost.n;
    m = cost.m;
    auto* at = static_cast<char*>(cost.workspace);
    const auto take = [&at](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
      at += (count * static_cast<int64_t>(sizeof *pointer) + 255) / 256 * 256;
    };
    for (double** vector : {&f_, &row_a_, &row_b_, &row_c_}) take(*vector, n);
    for (double** vector : {&g_, &column_a_, &column_b_}) take(*vector, m);
    take(running_, m);
    take(partial_, most_chunks * m);
    take(counts_, n + 1);
    take(columns_, buffer_entries(m));
    take(values_, buffer_entries(m));
  }

  void sweep(double eps, double, const double* g, const double* offset, double slope, double* log_sums, double* f,
             double* column_sums) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(g_, g, m);
    to_device(row_a_, offset, n);
    simt::memset_async(column_a_, 0, m * sizeof(double), exec_.stream);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      SIMT_LAUNCH(row_log_sums_kernel<T>, row_grid(rows), block_threads, 0, exec_.stream, cost, rows, g_, 1 / eps,
                  row_a_ + first, slope * eps, row_b_ + first, f_ + first);
      add_columns(cost, first, rows, 1 / eps, nullptr);
    });
    to_host(log_sums, row_b_, n);
    to_host(f, f_, n);
    to_host(column_sums, column_a_, m);
  }

  void column_log_sums(double eps, const double* f, double* log_sums) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    SIMT_LAUNCH(clear_log_sums_kernel, simt::blocks_for(m, block_threads), block_threads, 0, exec_.stream, m, running_);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      const int64_t chunks = chunks_of(rows);
      auto* partial = reinterpret_cast<LogSum*>(partial_);
      SIMT_LAUNCH(column_log_sums_kernel<T>, column_grid(chunks), block_threads, 0, exec_.stream, cost, rows,
                  (rows + chunks - 1) / chunks, f_ + first, 1 / eps, partial);
      SIMT_LAUNCH(add_log_sums_kernel, simt::blocks_for(m, block_threads), block_threads, 0, exec_.stream, m, chunks,
                  partial, running_, column_a_);
    });
    to_host(log_sums, column_a_, m);
  }

  void sums(double eps, const double* f, const double* g, double* row_sums, double* column_sums) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    to_device(g_, g, m);
    simt::memset_async(column_a_, 0, m * sizeof(double), exec_.stream);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      row_products<false>(cost, first, rows, 1 / eps, nullptr, row_a_);
      add_columns(cost, first, rows, 1 / eps, nullptr);
    });
    to_host(row_sums, row_a_, n);
    to_host(column_sums, column_a_, m);
  }

  bool extract(double eps, const double* f, const double* g, double threshold, int64_t limit,
               SparsePlan& plan) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    to_device(g_, g, m);
    plan.n = n;
    plan.m = m;
    plan.row_start.assign(n + 1, 0);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      SIMT_LAUNCH(count_entries_kernel<T>, row_grid(rows), block_threads, 0, exec_.stream, cost, rows, f_ + first, g_,
                  1 / eps, threshold, counts_ + first);
    });
    simt::copy_to_host(plan.row_start.data() + 1, counts_, n * sizeof(int64_t), exec_.stream);
    for (int64_t i = 0; i < n; ++i) plan.row_start[i + 1] += plan.row_start[i];
    const int64_t total = plan.row_start[n];
    if (total > limit) return false;
    plan.column.resize(total);
    plan.value.resize(total);
    simt::copy_to_device(counts_, plan.row_start.data(), (n + 1) * sizeof(int64_t), exec_.stream);
    const int64_t room = buffer_entries(m);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      for (int64_t i = 0; i < rows;) {
        const int64_t base = plan.row_start[first + i];
        int64_t last = i + 1;
        while (last < rows && plan.row_start[first + last + 1] - base <= room) ++last;
        const int64_t count = plan.row_start[first + last] - base;
        SIMT_LAUNCH(fill_entries_kernel<T>, row_grid((last - i + 7) / 8), block_threads, 0, exec_.stream, cost, i, last,
                    f_ + first, g_, 1 / eps, threshold, counts_ + first, base, columns_, values_);
        if (count > 0) {
          simt::copy_to_host(plan.column.data() + base, columns_, count * sizeof(int32_t), exec_.stream);
          simt::copy_to_host(plan.value.data() + base, values_, count * sizeof(double), exec_.stream);
        }
        i = last;
      }
    });
    return true;
  }

  void gram_product(double eps, double, const double* f, const double* g, const double* scale, const double* v,
                    double* out) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    to_device(g_, g, m);
    to_device(column_b_, v, m);
    simt::memset_async(column_a_, 0, m * sizeof(double), exec_.stream);
    std::vector<double> products(n);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      row_products<false>(cost, first, rows, 1 / eps, column_b_, row_a_);
      to_host(products.data() + first, row_a_ + first, rows);
      for (int64_t i = first; i < first + rows; ++i) products[i] *= scale[i];
      to_device(row_b_ + first, products.data() + first, rows);
      add_columns(cost, first, rows, 1 / eps, row_b_);
    });
    to_host(out, column_a_, m);
  }

  void apply(double eps, const double* f, const double* g, const double* V, int64_t k, double* out) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    to_device(g_, g, m);
    std::vector<double> column(m), result(n);
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t j = 0; j < m; ++j) column[j] = V[j * k + c];
      to_device(column_b_, column.data(), m);
      tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
        row_products<false>(cost, first, rows, 1 / eps, column_b_, row_a_);
      });
      to_host(result.data(), row_a_, n);
      for (int64_t i = 0; i < n; ++i) out[i * k + c] = result[i];
    }
  }

  void apply_transposed(double eps, const double* f, const double* g, const double* V, int64_t k,
                        double* out) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    to_device(g_, g, m);
    std::vector<double> weights(n), result(m);
    for (int64_t c = 0; c < k; ++c) {
      for (int64_t i = 0; i < n; ++i) weights[i] = V[i * k + c];
      to_device(row_b_, weights.data(), n);
      simt::memset_async(column_a_, 0, m * sizeof(double), exec_.stream);
      tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
        add_columns(cost, first, rows, 1 / eps, row_b_);
      });
      to_host(result.data(), column_a_, m);
      for (int64_t j = 0; j < m; ++j) out[j * k + c] = result[j];
    }
  }

  void values(double eps, const double* f, const double* g, double* linear, double* entropy) override {
    const simt::DeviceGuard guard(exec_.device);
    to_device(f_, f, n);
    to_device(g_, g, m);
    // g is finite where the plan has mass; -inf times a mass of zero must not count.
    std::vector<double> finite(g, g + m), rows_of(n), products(n), logs(n);
    for (double& value : finite)
      if (!std::isfinite(value)) value = 0;
    to_device(column_b_, finite.data(), m);
    tiles([&](const DeviceCost<T>& cost, int64_t first, int64_t rows) {
      row_products<false>(cost, first, rows, 1 / eps, nullptr, row_a_);
      row_products<false>(cost, first, rows, 1 / eps, column_b_, row_b_);
      row_products<true>(cost, first, rows, 1 / eps, nullptr, row_c_);
    });
    to_host(rows_of.data(), row_a_, n);
    to_host(products.data(), row_b_, n);
    to_host(logs.data(), row_c_, n);
    *linear = *entropy = 0;
    for (int64_t i = 0; i < n; ++i) {
      *linear += (rows_of[i] > 0 ? f[i] * rows_of[i] : 0.0) + products[i] - eps * logs[i];
      *entropy += logs[i];
    }
  }

 private:
  static int64_t chunks_of(int64_t rows) { return std::clamp<int64_t>(rows / 8, 1, most_chunks); }
  static unsigned row_grid(int64_t rows) { return static_cast<unsigned>(std::clamp<int64_t>(rows, 1, 65535)); }
  dim3 column_grid(int64_t chunks) const {
    return dim3(simt::blocks_for(m, block_threads), static_cast<unsigned>(chunks));
  }
  void to_device(double* to, const double* from, int64_t count) {
    simt::copy_to_device(to, from, static_cast<size_t>(count) * sizeof(double), exec_.stream);
  }
  void to_host(double* to, const double* from, int64_t count) {
    simt::copy_to_host(to, from, static_cast<size_t>(count) * sizeof(double), exec_.stream);
  }

  // body(cost of the tile, its first row, its rows)
  template <class Body>
  void tiles(Body&& body) {
    if (interrupted && interrupted()) throw Interrupted{};
    const int64_t step = cost_.kind == CostKind::callback ? cost_.tile_rows : n;
    for (int64_t first = 0; first < n; first += step) {
      const int64_t rows = std::min(step, n - first);
      if (cost_.kind == CostKind::callback) cost_.fill(first, first + rows);
      body(DeviceCost<T>{cost_.kind, m, cost_.d, cost_.p, cost_.matrix, cost_.x ? cost_.x + first * cost_.d : nullptr,
                         cost_.y_by_axis},
           first, rows);
    }
  }

  template <bool entropy>
  void row_products(const DeviceCost<T>& cost, int64_t first, int64_t rows, double inverse_eps, const double* v,
                    double* out) {
    SIMT_LAUNCH((row_products_kernel<T, entropy>), row_grid(rows), block_threads, 0, exec_.stream, cost, rows,
                f_ + first, g_, inverse_eps, v, out + first);
  }

  // column_a += P' w over the rows of a tile.
  void add_columns(const DeviceCost<T>& cost, int64_t first, int64_t rows, double inverse_eps, const double* w) {
    const int64_t chunks = chunks_of(rows);
    SIMT_LAUNCH(column_products_kernel<T>, column_grid(chunks), block_threads, 0, exec_.stream, cost, rows,
                (rows + chunks - 1) / chunks, f_ + first, g_, inverse_eps, w ? w + first : nullptr,
                reinterpret_cast<double*>(partial_));
    SIMT_LAUNCH(add_chunks_kernel, simt::blocks_for(m, block_threads), block_threads, 0, exec_.stream, m, chunks,
                reinterpret_cast<const double*>(partial_), column_a_);
  }

  Exec exec_;
  Cost<T> cost_;
  double *f_, *row_a_, *row_b_, *row_c_, *g_, *column_a_, *column_b_, *values_;
  LogSum *running_, *partial_;
  int64_t* counts_;
  int32_t* columns_;
};

}  // namespace

int64_t transport_workspace_bytes(int64_t n, int64_t m) {
  return 8 * (5 * n + 6 * m) + 16 * (1 + most_chunks) * m + 12 * buffer_entries(m) + 16 * 256;
}

template <class T>
std::unique_ptr<Passes> make_passes_cuda(const Exec& exec, const Cost<T>& cost) {
  return std::make_unique<PassesCuda<T>>(exec, cost);
}
template std::unique_ptr<Passes> make_passes_cuda<float>(const Exec&, const Cost<float>&);
template std::unique_ptr<Passes> make_passes_cuda<double>(const Exec&, const Cost<double>&);

}  // namespace kantor::transport
