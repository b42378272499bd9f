// The vector passes of conjugate gradients on the CPU. Words of memory traffic per unknown and iteration (a word is one
// element; matrix data and preconditioner come on top):
//   operator cheap to recompute (constant stencil, diagonal): 8
//     direction_and_apply   read z, read p, write p                 q = A p stays in the first-level cache: only p.q
//     leaves update                read x, r, p, write x, r                q is formed again
//   other operators: 10, and 11 where writing q fetches the line first
//     direction_and_apply   read z, read p, write p, write q
//     update                read x, r, p, q, write x, r
// The direction p is updated in place, `halo` rows ahead of the rows whose product is formed, so that it is still in
// cache.
#include <algorithm>
#include <vector>

#include "linalg/cg.h"
#include "linalg/krylov_cpu.h"

namespace kantor {
namespace {

template <class T>
class CpuSpace {
 public:
  CpuSpace(Team& team, const Operator<T>* A, const ApplyCallback& apply, const Preconditioner<T>& M,
           const CgVectors<T>& v, const CgOptions& options, const AllReduce& all_reduce)
      : passes_(team, A ? chunks_of(*A) : Chunks{v.n}, v.batch, 2),
        totals_(all_reduce, v.batch, 3),
        A_(A),
        apply_(apply),
        M_(M),
        v_(v),
        options_(options) {
    halo_ = A ? halo_of(*A) : v.n;
    recompute_ = A && words_per_row(*A) <= 1;
    projects_ = A && projections_size(*A) > 0;
    if (const auto* d = std::get_if<Diagonal<T>>(&M)) scales_ = true, scaling_ = d->values;
  }

  bool any_running() const {
    return std::any_of(v_.states, v_.states + v_.batch, [](const CgState& s) { return s.running(); });
  }

  void start() {
    std::vector<double> b_max(static_cast<size_t>(v_.batch * passes_.chunks().count()));
    passes_.each_block([](int64_t) { return true; },
                       [&](int64_t k, int64_t chunk, Range rows) {
                         const T* b = v_.b + k * v_.n + rows.begin;
                         sum(0, k, chunk) += dot(rows.size(), b, b);
                         double& largest = b_max[static_cast<size_t>(k * passes_.chunks().count() + chunk)];
                         largest = std::fmax(largest, max_abs(rows.size(), b));
                       });
    form_residual([](int64_t) { return true; });
    totals_.read(passes_, 2);
    for (int64_t k = 0; k < v_.batch; ++k) {
      const auto first = b_max.begin() + k * passes_.chunks().count();
      double largest = 0;
      for (auto it = first; it != first + passes_.chunks().count(); ++it) largest = std::fmax(largest, *it);
      totals_(2, k) = cg_kind_of_size(largest);
    }
    share(3);
    for (int64_t k = 0; k < v_.batch; ++k)
      cg_start(v_.states[k], options_, totals_(0, k), totals_(2, k), totals_(1, k), history(k));
  }

  void precondition() {
    const auto running_systems = [this](int64_t k) { return running(k); };
    if (std::holds_alternative<std::monostate>(M_)) {
      for (int64_t k = 0; k < v_.batch; ++k) cg_after_precondition(v_.states[k], v_.states[k].rr);
      return;
    }
    if (scales_ && scaled_sums_ready_) {  // they came with the update
      for (int64_t k = 0; k < v_.batch; ++k) cg_after_precondition(v_.states[k], totals_(1, k));
      return;
    }
    if (scales_) {
      passes_.each_block(running_systems, [&](int64_t k, int64_t chunk, Range rows) {
        sum(0, k, chunk) += weighted_square(rows.size(), scaling_ + rows.begin, v_.r + k * v_.n + rows.begin);
      });
    } else {
      // q is free between the update and the next product
      passes_.precondition(M_, v_.n, v_.r, v_.q, v_.z, running_systems, [&](int64_t k, int64_t chunk, Range rows) {
        const int64_t at = k * v_.n + rows.begin;
        sum(0, k, chunk) += dot(rows.size(), v_.r + at, v_.z + at);
      });
    }
    reduce(1);
    for (int64_t k = 0; k < v_.batch; ++k) cg_after_precondition(v_.states[k], totals_(0, k));
  }

  void direction_and_apply() {
    if (!A_) {
      passes_.each_block([this](int64_t k) { return running(k); },
                         [&](int64_t k, int64_t, Range rows) { advance_direction(k, rows); });
      apply_(false);
      passes_.each_block([this](int64_t k) { return running(k); },
                         [&](int64_t k, int64_t chunk, Range rows) {
                           const int64_t at = k * v_.n + rows.begin;
                           sum(0, k, chunk) += dot(rows.size(), v_.p + at, v_.q + at);
                         });
    } else {
      const auto runs = [this](int64_t k) { return running(k); };
      const auto advance = [this](int64_t k, Range rows) { advance_direction(k, rows); };
      const auto apply = [this](int64_t k, int64_t chunk, Range rows) {
        alignas(64) T scratch[block_size];
        T* q = recompute_ ? scratch : v_.q + k * v_.n + rows.begin;
        apply_rows(*A_, k, v_.p + k * v_.n, q, rows);
        sum(0, k, chunk) += dot(rows.size(), v_.p + k * v_.n + rows.begin, q);
      };
      if (projects_) {  // no product before all of p is known
        passes_.each_block(runs, [&](int64_t k, int64_t, Range rows) { advance(k, rows); });
        project(passes_.team(), *A_, v_.batch, v_.p, runs);
        passes_.each_block(runs, apply);
      } else {
        passes_.sweep(halo_, runs, advance, apply);
      }
    }
    reduce(1);
    std::vector<double> pq(static_cast<size_t>(v_.batch));
    for (int64_t k = 0; k < v_.batch; ++k) pq[static_cast<size_t>(k)] = totals_(0, k);
    const bool any = form_squares_of_doubtful_products(pq);
    for (int64_t k = 0; k < v_.batch; ++k)
      cg_after_apply(v_.states[k], options_, pq[static_cast<size_t>(k)], any ? totals_(0, k) : 0);
  }

  void update() {
    passes_.each_block([this](int64_t k) { return running(k); },
                       [&](int64_t k, int64_t chunk, Range rows) {
                         const int64_t at = k * v_.n + rows.begin;
                         alignas(64) T scratch[block_size];
                         const T* q = v_.q + at;
                         if (recompute_) {
                           apply_rows(*A_, k, v_.p + k * v_.n, scratch, rows);
                           q = scratch;
                         }
                         const T alpha = static_cast<T>(v_.states[k].alpha);
                         sum(0, k, chunk) += update_iterate(rows.size(), alpha, v_.p + at, q, v_.x + at, v_.r + at);
                         if (scales_)
                           sum(1, k, chunk) += weighted_square(rows.size(), scaling_ + rows.begin, v_.r + at);
                       });
    scaled_sums_ready_ = true;
    reduce(scales_ ? 2 : 1);
    for (int64_t k = 0; k < v_.batch; ++k) cg_after_update(v_.states[k], options_, totals_(0, k), history(k));
  }

  // Whether any system still runs, after the monitor had its say.
  bool proceed(int64_t iteration, const CgMonitor& monitor) {
    if (ended_ != CgStatus::running) return any_running();
    double largest = 0;
    for (int64_t k = 0; k < v_.batch; ++k) largest = std::fmax(largest, v_.states[k].rr);
    const CgStatus status = monitor(iteration, std::sqrt(largest));
    if (status != CgStatus::running && !totals_.postpone(status)) finish_running(status);
    return any_running();
  }

  void finish_running(CgStatus status) {
    for (int64_t k = 0; k < v_.batch; ++k)
      if (running(k)) v_.states[k].finish(status);
  }

  void verify() {
    const auto stopped = [this](int64_t k) { return !running(k) && v_.states[k].verified == 0; };
    passes_.each_block(stopped, [&](int64_t k, int64_t chunk, Range rows) {
      const T* p = v_.p + k * v_.n + rows.begin;
      if (v_.states[k].curvature != 0) sum(0, k, chunk) += dot(rows.size(), p, p);
    });
    form_residual(stopped);
    totals_.read(passes_, 2);
    const CgStatus wish = totals_.share(2);
    for (int64_t k = 0; k < v_.batch; ++k) {
      if (!stopped(k)) continue;
      cg_after_verify(v_.states[k], options_, totals_(1, k), totals_(0, k));
      v_.states[k].verified = running(k) ? 0 : 1;
    }
    end(wish);
  }

 private:
  bool running(int64_t k) const { return v_.states[k].running(); }
  double* history(int64_t k) const { return v_.history + k * options_.history_length; }

  double& sum(int which, int64_t k, int64_t chunk) { return passes_.sum(which, k, chunk); }

  // The reduction point behind a pass: the first `count` sums of every system, over all ranks.
  void reduce(int count) {
    totals_.read(passes_, count);
    share(count);
  }
  void share(int count) { end(totals_.share(count)); }
  void end(CgStatus wish) {
    if (wish != CgStatus::running) ended_ = wish;
    if (ended_ != CgStatus::running) finish_running(ended_);
  }

  void advance_direction(int64_t k, Range rows) {
    const T beta = static_cast<T>(v_.states[k].beta);
    const int64_t at = k * v_.n + rows.begin;
    if (scales_)
      update_direction_scaled(rows.size(), beta, scaling_ + rows.begin, v_.r + at, v_.p + at);
    else
      update_direction(rows.size(), beta, v_.z + at, v_.p + at);
  }

  // q.q in total 0 for the systems whose p.q is positive but within rounding: too rare to be formed every time. False
  // where there are none.
  bool form_squares_of_doubtful_products(const std::vector<double>& pq) {
    const auto doubtful = [&](int64_t k) {
      const double product = pq[static_cast<size_t>(k)];
      return running(k) && product > 0 && product <= cg_curvature_noise(v_.states[k], options_);
    };
    int64_t count = 0;
    for (int64_t k = 0; k < v_.batch; ++k) count += doubtful(k);
    if (count == 0) return false;
    passes_.each_block(doubtful, [&](int64_t k, int64_t chunk, Range rows) {
      alignas(64) T scratch[block_size];
      const T* q = v_.q + k * v_.n + rows.begin;
      if (recompute_) {
        apply_rows(*A_, k, v_.p + k * v_.n, scratch, rows);
        q = scratch;
      }
      sum(0, k, chunk) += dot(rows.size(), q, q);
    });
    reduce(1);
    return true;
  }

  // r = b - A x with the product and the difference in double; r.r in sum 1. Leaves sum 0 as it is.
  template <class Active>
  void form_residual(Active&& active) {
    const bool with_product = !(v_.zero_start && first_residual_);
    if (!A_ && with_product) apply_(true);
    if (A_ && with_product) project(passes_.team(), *A_, v_.batch, v_.x, active);
    passes_.split([&](Range chunks, Range systems, int) {
      for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk)
        for (int64_t k = systems.begin; k < systems.end; ++k) {
          if (!active(k)) continue;
          sum(1, k, chunk) = 0;
          const Range rows = passes_.chunks().range(chunk);
          for (int64_t begin = rows.begin; begin < rows.end; begin += block_size)
            residual_block(k, chunk, {begin, std::min(begin + block_size, rows.end)});
        }
    });
    first_residual_ = false;
    scaled_sums_ready_ = false;
  }

  void residual_block(int64_t k, int64_t chunk, Range rows) {
    alignas(64) double product[block_size];
    if (v_.zero_start && first_residual_)
      std::fill_n(product, rows.size(), 0.0);
    else if (A_)
      apply_rows(*A_, k, v_.x + k * v_.n, product, rows);
    else
      std::copy_n(v_.q + k * v_.n + rows.begin, rows.size(), product);
    const int64_t at = k * v_.n + rows.begin;
    sum(1, k, chunk) += subtract(rows.size(), v_.b + at, product, v_.r + at);
  }

  BlockPasses passes_;  // with two partial sums a chunk and system
  Totals totals_;
  const Operator<T>* A_;
  const ApplyCallback& apply_;
  const Preconditioner<T>& M_;
  CgVectors<T> v_;
  CgOptions options_;
  int64_t halo_ = 0;
  bool recompute_ = false;
  bool projects_ = false;
  bool first_residual_ = true;
  CgStatus ended_ = CgStatus::running;  // or what a rank has asked for: the end of all
  bool scaled_sums_ready_ = false;      // total 1 holds r.z for the diagonal preconditioner
  bool scales_ = false;                 // diagonal preconditioner: z = scaling * r is never stored
  const T* scaling_ = nullptr;          // null for a rank without rows
};

}  // namespace

template <class T>
void cg_cpu(const Exec& exec, const Operator<T>* A, const ApplyCallback& apply, const Preconditioner<T>& M,
            const CgVectors<T>& v, const CgOptions& options, const CgMonitor& monitor, const AllReduce& all_reduce) {
  const bool calls_back = !A || std::holds_alternative<Callback>(M) || options.watched || all_reduce;
  Team::run(threads_for(exec.threads, A ? work_of(*A, v.batch) : v.n * v.batch), !calls_back, [&](Team& team) {
    CpuSpace<T> space(team, A, apply, M, v, options, all_reduce);
    conjugate_gradients(space, monitor);
  });
}

template void cg_cpu(const Exec&, const Operator<float>*, const ApplyCallback&, const Preconditioner<float>&,
                     const CgVectors<float>&, const CgOptions&, const CgMonitor&, const AllReduce&);
template void cg_cpu(const Exec&, const Operator<double>*, const ApplyCallback&, const Preconditioner<double>&,
                     const CgVectors<double>&, const CgOptions&, const CgMonitor&, const AllReduce&);

}  // namespace kantor
