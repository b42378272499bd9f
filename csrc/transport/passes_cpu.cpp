// Passes over the plan on the CPU. Memory traffic of a pass: the cost once (n m words; none for points), the vectors,
// and for column sums `chunks` rows of m doubles that stay in cache. Column sums are added chunk by chunk of rows and
// the chunks in a fixed tree, so the number of threads does not change a bit.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "core/parallel.h"
#include "core/reduce.h"
#include "transport/passes.h"
#include "transport/row_kernels.h"

namespace kantor::transport {
namespace {

constexpr int64_t most_chunks = 16;
constexpr int64_t entries_per_poll = int64_t{1} << 20;
constexpr int64_t serial_entries = int64_t{1} << 18;  // 0.2 ms: below, a second thread gains less than it may cost

// The row under work: its exponents and the blocks that matter.
struct Row {
  std::vector<double> t, largest;
  std::vector<int32_t> active;
  int64_t count = 0;
  explicit Row(int64_t blocks) : t(blocks * block), largest(blocks), active(blocks) {}
};

template <class T>
class PassesCpu final : public Passes {
 public:
  PassesCpu(const Exec& exec, const Cost<T>& cost) : cost_(cost), threads_(exec.threads) {
    n = cost.n;
    m = cost.m;
    blocks_ = blocks_of(m);
    if (n * m < serial_entries) threads_ = 1;
  }

  void sweep(double eps, double cutoff, const double* g, const double* offset, double slope, double* log_sums,
             double* f, double* column_sums) override {
    with_column_sums(column_sums, [&](int64_t i, const T* row, Row& w, double* sums) {
      double shift;
      const double sum = softmax(i, row, g, eps, cutoff, w, &shift);
      log_sums[i] = std::log(sum) + shift;
      f[i] = offset[i] - slope * eps * log_sums[i];
      // P_ij = e_ij exp(f / eps + shift): the row sum is known, so no exponential of a large number is taken
      add_row(w.count, w.active.data(), w.t.data(), std::exp(f[i] / eps + shift), sums);
    });
  }

  void column_log_sums(double eps, const double* f, double* log_sums) override {
    std::vector<double> largest(padded() * chunks_in_use(), minus_infinity), sums(padded() * chunks_in_use(), 0.0);
    const std::vector<double> zero(m, 0.0);
    const int64_t chunks = for_rows([&](int64_t chunk, int64_t i, const T* row, Row& w) {
      logits(i, row, zero.data(), eps, w);
      column_maxima(padded(), w.t.data(), f[i] / eps, largest.data() + chunk * padded());
    });
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t j = 0; j < padded(); ++j) largest[j] = std::max(largest[j], largest[c * padded() + j]);
    for (int64_t j = 0; j < padded(); ++j)
      if (!(largest[j] > minus_infinity)) largest[j] = 0;
    for_rows([&](int64_t chunk, int64_t i, const T* row, Row& w) {
      logits(i, row, zero.data(), eps, w);
      column_exponentials(padded(), w.t.data(), f[i] / eps, largest.data(), sums.data() + chunk * padded());
    });
    combine(chunks, sums, log_sums);
    for (int64_t j = 0; j < m; ++j) log_sums[j] = std::log(log_sums[j]) + largest[j];
  }

  void sums(double eps, const double* f, const double* g, double* row_sums, double* column_sums) override {
    with_column_sums(column_sums, [&](int64_t i, const T* row, Row& w, double* sums) {
      row_sums[i] = entries(i, row, f, g, eps, -700, w);
      add_row(w.count, w.active.data(), w.t.data(), 1.0, sums);
    });
  }

  bool extract(double eps, const double* f, const double* g, double threshold, int64_t limit,
               SparsePlan& plan) override {
    struct Part {
      std::vector<int32_t> column;
      std::vector<double> value;
    };
    std::vector<Part> parts(most_chunks);
    std::atomic<int64_t> total{0};
    plan.n = n;
    plan.m = m;
    plan.row_start.assign(n + 1, 0);
    const double lowest = threshold > 0 ? std::max(std::log(threshold), -700.0) : -700.0;
    const int64_t chunks = for_rows([&](int64_t chunk, int64_t i, const T* row, Row& w) {
      if (total.load(std::memory_order_relaxed) > limit) return;
      Part& part = parts[chunk];
      entries(i, row, f, g, eps, lowest, w);
      const size_t before = part.value.size();
      for (int64_t a = 0; a < w.count; ++a) {
        const int64_t j = int64_t(w.active[a]) * block;
        const int64_t end = std::min<int64_t>(block, m - j);
        for (int64_t k = 0; k < end; ++k) {
          if (!(w.t[j + k] > threshold)) continue;
          part.column.push_back(static_cast<int32_t>(j + k));
          part.value.push_back(w.t[j + k]);
        }
      }
      const int64_t found = static_cast<int64_t>(part.value.size() - before);
      plan.row_start[i + 1] = found;
      total.fetch_add(found, std::memory_order_relaxed);
    });
    if (total.load() > limit) return false;
    for (int64_t i = 0; i < n; ++i) plan.row_start[i + 1] += plan.row_start[i];
    plan.column.clear();
    plan.value.clear();
    plan.column.reserve(total.load());
    plan.value.reserve(total.load());
    if (cost_.kind != CostKind::callback) {
      for (int64_t c = 0; c < chunks; ++c) {
        plan.column.insert(plan.column.end(), parts[c].column.begin(), parts[c].column.end());
        plan.value.insert(plan.value.end(), parts[c].value.begin(), parts[c].value.end());
        parts[c] = {};
      }
      return true;
    }
    std::vector<size_t> at(most_chunks, 0);  // every tile was cut into chunks again
    for (int64_t first = 0; first < n; first += cost_.tile_rows) {
      const int64_t rows = std::min(cost_.tile_rows, n - first);
      const int64_t pieces = chunks_of(rows);
      for (int64_t c = 0; c < pieces; ++c) {
        const Range mine = share(rows, static_cast<int>(c), static_cast<int>(pieces));
        const size_t count = plan.row_start[first + mine.end] - plan.row_start[first + mine.begin];
        plan.column.insert(plan.column.end(), parts[c].column.begin() + at[c], parts[c].column.begin() + at[c] + count);
        plan.value.insert(plan.value.end(), parts[c].value.begin() + at[c], parts[c].value.begin() + at[c] + count);
        at[c] += count;
      }
    }
    return true;
  }

  void gram_product(double eps, double cutoff, const double* f, const double* g, const double* scale, const double* v,
                    double* out) override {
    std::vector<double> v_padded(padded(), 0.0);
    std::copy(v, v + m, v_padded.begin());
    with_column_sums(out, [&](int64_t i, const T* row, Row& w, double* sums) {
      double shift;
      softmax(i, row, g, eps, cutoff, w, &shift);
      const double weight = std::exp(f[i] / eps + shift);
      const double product = weight * dot_row(w.count, w.active.data(), w.t.data(), v_padded.data());
      add_row(w.count, w.active.data(), w.t.data(), weight * scale[i] * product, sums);
    });
  }

  void apply(double eps, const double* f, const double* g, const double* V, int64_t k, double* out) override {
    std::vector<double> columns(padded() * k, 0.0);  // one column of V after the other, padded
    for (int64_t j = 0; j < m; ++j)
      for (int64_t c = 0; c < k; ++c) columns[c * padded() + j] = V[j * k + c];
    for_rows([&](int64_t, int64_t i, const T* row, Row& w) {
      entries(i, row, f, g, eps, -700, w);
      for (int64_t c = 0; c < k; ++c)
        out[i * k + c] = dot_row(w.count, w.active.data(), w.t.data(), columns.data() + c * padded());
    });
  }

  void apply_transposed(double eps, const double* f, const double* g, const double* V, int64_t k,
                        double* out) override {
    // Few columns at a time: each chunk of rows keeps their sums.
    constexpr int64_t at_once = 8;
    for (int64_t first = 0; first < k; first += at_once) {
      const int64_t count = std::min(at_once, k - first), length = count * padded();
      std::vector<double> sums(chunks_in_use() * length, 0.0);
      const int64_t chunks = for_rows([&](int64_t chunk, int64_t i, const T* row, Row& w) {
        entries(i, row, f, g, eps, -700, w);
        for (int64_t c = 0; c < count; ++c)
          add_row(w.count, w.active.data(), w.t.data(), V[i * k + first + c],
                  sums.data() + chunk * length + c * padded());
      });
      for (int64_t c = 0; c < count; ++c)
        for (int64_t j = 0; j < m; ++j) {
          double values[most_chunks];
          for (int64_t chunk = 0; chunk < chunks; ++chunk) values[chunk] = sums[chunk * length + c * padded() + j];
          out[j * k + first + c] = tree_sum(values, chunks);
        }
    }
  }

  void values(double eps, const double* f, const double* g, double* linear, double* entropy) override {
    std::vector<double> costs(n), entropies(n), zero(m, 0.0);
    for_rows([&](int64_t, int64_t i, const T* row, Row& w) {
      entries(i, row, f, g, eps, -700, w);
      // log P is (f + g - C) / eps; the cost is read off it, so that both are those of the same entries.
      double mass = 0, g_mass = 0, log_mass = 0;
      for (int64_t a = 0; a < w.count; ++a) {
        const int64_t j = int64_t(w.active[a]) * block, end = std::min<int64_t>(block, m - j);
        for (int64_t k = 0; k < end; ++k) {
          const double p = w.t[j + k];
          if (!(p > 0)) continue;
          mass += p;
          g_mass += p * g[j + k];
          log_mass += p * std::log(p);
        }
      }
      entropies[i] = log_mass;
      costs[i] = (mass > 0 ? f[i] * mass : 0) + g_mass - eps * log_mass;  // f is -inf in a row without mass
    });
    *linear = tree_sum(costs.data(), n);
    *entropy = tree_sum(entropies.data(), n);
  }

 private:
  int64_t padded() const { return blocks_ * block; }
  int64_t chunks_in_use() const {
    return chunks_of(cost_.kind == CostKind::callback ? std::min(n, cost_.tile_rows) : n);
  }
  static int64_t chunks_of(int64_t rows) { return std::clamp<int64_t>(rows / 8, 1, most_chunks); }

  // t and its maxima for row i.
  double logits(int64_t i, const T* row, const double* g, double eps, Row& w) const {
    const double inverse = 1 / eps;
    const auto points = [&](auto function) {
      return function(m, cost_.d, cost_.p, cost_.x + i * cost_.d, cost_.y_by_axis, g, inverse, w.t.data(),
                      w.largest.data());
    };
    switch (cost_.kind) {
      case CostKind::sqeuclidean:
        switch (cost_.d) {
          case 1:
            return points(&sqeuclidean_logits<T, 1>);
          case 2:
            return points(&sqeuclidean_logits<T, 2>);
          case 3:
            return points(&sqeuclidean_logits<T, 3>);
          default:
            return points(&sqeuclidean_logits<T, 0>);
        }
      case CostKind::euclidean:
        switch (cost_.d) {
          case 2:
            return points(&euclidean_logits<T, 2>);
          case 3:
            return points(&euclidean_logits<T, 3>);
          default:
            return points(&euclidean_logits<T, 0>);
        }
      case CostKind::lp:
        return cost_.p == 1 ? points(&l1_logits<T, 0>) : points(&lp_logits<T, 0>);
      case CostKind::cosine:
        return points(&cosine_logits<T, 0>);
      default:
        return dense_logits<T>(m, row, g, inverse, w.t.data(), w.largest.data());
    }
  }

  // e_j = exp((g_j - C_ij) / eps - shift), shift their largest exponent; returns the sum of e.
  double softmax(int64_t i, const T* row, const double* g, double eps, double cutoff, Row& w, double* shift) const {
    *shift = logits(i, row, g, eps, w);
    if (!(*shift > minus_infinity)) *shift = 0;  // a row without an allowed entry
    return exponentials<true>(blocks_, *shift, *shift - cutoff, w.largest.data(), w.t.data(), w.active.data(),
                              &w.count);
  }

  // e_j = P_ij in blocks with an entry above exp(lowest); returns their sum.
  double entries(int64_t i, const T* row, const double* f, const double* g, double eps, double lowest, Row& w) const {
    logits(i, row, g, eps, w);
    const double own = f[i] / eps;
    return exponentials<false>(blocks_, -own, lowest - own, w.largest.data(), w.t.data(), w.active.data(), &w.count);
  }

  // body(chunk, i, row of a stored cost or null, work) for every row; returns the number of chunks in use.
  template <class Body>
  int64_t for_rows(Body&& body) {
    std::atomic<bool> stop{false};
    int64_t most = 0;
    const auto rows = [&](int64_t first, int64_t last, const T* base) {
      const int64_t chunks = chunks_of(last - first);
      most = std::max(most, chunks);
      parallel_region(static_cast<int>(std::min<int64_t>(threads_, chunks)), [&](int worker, int workers) {
        Row work(blocks_);
        int64_t since_poll = 0;
        const Range mine = share(chunks, worker, workers);
        for (int64_t chunk = mine.begin; chunk < mine.end; ++chunk) {
          const Range part = share(last - first, static_cast<int>(chunk), static_cast<int>(chunks));
          for (int64_t i = first + part.begin; i < first + part.end; ++i) {
            if (stop.load(std::memory_order_relaxed)) return;
            body(chunk, i, base ? base + (i - first) * m : nullptr, work);
            since_poll += m;
            if (worker == 0 && since_poll >= entries_per_poll) {
              since_poll = 0;
              if (interrupted && interrupted()) stop = true;
            }
          }
        }
      });
      if (stop) throw Interrupted{};
    };
    if (cost_.kind == CostKind::callback) {
      for (int64_t first = 0; first < n; first += cost_.tile_rows) {
        const int64_t last = std::min(n, first + cost_.tile_rows);
        cost_.fill(first, last);
        rows(first, last, cost_.matrix);
      }
    } else {
      rows(0, n, cost_.kind == CostKind::dense ? cost_.matrix : nullptr);
    }
    return most;
  }

  // body(i, row, work, sums): adds to the padded column sums of its chunk.
  template <class Body>
  void with_column_sums(double* column_sums, Body&& body) {
    sums_.assign(padded() * chunks_in_use(), 0.0);
    const int64_t chunks = for_rows(
        [&](int64_t chunk, int64_t i, const T* row, Row& w) { body(i, row, w, sums_.data() + chunk * padded()); });
    combine(chunks, sums_, column_sums);
  }

  void combine(int64_t chunks, const std::vector<double>& parts, double* sums) const {
    for (int64_t j = 0; j < m; ++j) {
      double values[most_chunks];
      for (int64_t c = 0; c < chunks; ++c) values[c] = parts[c * padded() + j];
      sums[j] = tree_sum(values, chunks);
    }
  }

  Cost<T> cost_;
  int threads_;
  int64_t blocks_;
  std::vector<double> sums_;
};

}  // namespace

template <class T>
std::unique_ptr<Passes> make_passes_cpu(const Exec& exec, const Cost<T>& cost) {
  return std::make_unique<PassesCpu<T>>(exec, cost);
}
template std::unique_ptr<Passes> make_passes_cpu<float>(const Exec&, const Cost<float>&);
template std::unique_ptr<Passes> make_passes_cpu<double>(const Exec&, const Cost<double>&);

}  // namespace kantor::transport
