// The vector passes of flexible conjugate gradients on the CPU. Words of memory traffic per unknown and iteration, with
// j directions in the history (operator and map come on top):
//   project                   read q, the Ap_j                          1 + j    one pass for all q.Ap_j
//   orthogonalise_and_apply   read q, the p_j, r, write p, Ap           4 + j    p.Ap, p.r, p.p, Ap.Ap while in cache
//   update                    read x, r, p, Ap, write x, r              6        r.r
// 11 + 2 j in all: 15 for the two directions of the deep conjugate direction method. A map in Python gets a scaled copy
// of r, 2 words. Rarely, a second orthogonalisation: 5 + 3 j.
#include <algorithm>
#include <vector>

#include "linalg/flexible_cg.h"
#include "linalg/krylov_cpu.h"

namespace kantor {
namespace {

template <class T>
class FlexibleCpuSpace {
 public:
  FlexibleCpuSpace(Team& team, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                   const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options)
      : passes_(team, A ? chunks_of(*A) : Chunks{v.n}, v.batch, static_cast<int>(std::max<int64_t>(4, options.slots))),
        A_(A),
        product_(product),
        f_(f),
        fallback_(fallback),
        v_(v),
        options_(options) {
    halo_ = A ? halo_of(*A) : 0;
    projects_ = A && projections_size(*A) > 0;
  }

  bool any_running() const {
    return any([](const FlexibleState& s) { return s.running(); });
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
    std::vector<double> bb(static_cast<size_t>(v_.batch));
    for (int64_t k = 0; k < v_.batch; ++k) bb[static_cast<size_t>(k)] = total(0, k);
    form_residual(!v_.zero_start, 0, [](int64_t) { return true; });
    for (int64_t k = 0; k < v_.batch; ++k) {
      const auto first = b_max.begin() + k * passes_.chunks().count();
      double largest = 0;
      for (auto it = first; it != first + passes_.chunks().count(); ++it) largest = std::fmax(largest, *it);
      flexible_start(v_.states[k], options_, bb[static_cast<size_t>(k)], largest, total(0, k), history(k));
    }
  }

  // q = f(r / |r|) or M r, in the first half of the slot. The second half is free: input of f, and scratch.
  void direction(int64_t round) {
    const int64_t slot = slot_of(options_, round);
    const auto takes = [this](bool from_map) {
      return [this, from_map](int64_t k) { return v_.states[k].takes(from_map); };
    };
    if (any([](const FlexibleState& s) { return s.takes(true); })) {
      if (f_.callback) {
        hand_out_residual(slot);
        f_.callback(slot);
      } else {
        apply_native(f_.native, slot, takes(true));
      }
    }
    if (any([](const FlexibleState& s) { return s.takes(false); })) {
      if (fallback_.callback) {
        fallback_.callback(slot);
        passes_.each_block(takes(false), [&](int64_t k, int64_t, Range rows) {
          std::copy_n(v_.q(slot, k) + rows.begin, rows.size(), v_.p(slot, k) + rows.begin);
        });
      } else {
        apply_native(fallback_.native, slot, takes(false));
      }
    }
  }

  void project(int64_t round) {
    const auto running = [this](int64_t k) { return v_.states[k].running(); };
    project_onto_history(round, running);
    for (int64_t k = 0; k < v_.batch; ++k) {
      if (!running(k)) continue;
      take_coefficients(round, k);
      flexible_after_project(v_.states[k], options_, directions(k), round, total(0, k));
    }
  }

  void orthogonalise_and_apply(int64_t round) {
    const int64_t slot = slot_of(options_, round);
    const auto searches = [this](int64_t k) { return v_.states[k].searches(); };
    const auto make = [&](int64_t k, Range rows) {
      T* p = v_.p(slot, k) + rows.begin;
      for (int64_t begin = 0; begin < rows.size(); begin += block_size) {  // p stays in cache from term to term
        const int64_t size = std::min(block_size, rows.size() - begin);
        scale_in_place(size, static_cast<T>(v_.states[k].scale), p + begin);
        subtract_history(round, k, rows.begin + begin, size, false);
      }
    };
    const auto sums = [&](int64_t k, int64_t chunk, Range rows) { add_direction_sums(slot, k, chunk, rows); };
    if (!any([](const FlexibleState& s) { return s.searches(); })) return;
    if (A_ && !projects_) {
      passes_.sweep(halo_, searches, make, [&](int64_t k, int64_t chunk, Range rows) {
        apply_rows(*A_, k, v_.p(slot, k), v_.q(slot, k) + rows.begin, rows);
        sums(k, chunk, rows);
      });
    } else {  // no product before all of p is known
      passes_.each_block(searches, [&](int64_t k, int64_t, Range rows) { make(k, rows); });
      if (A_)
        kantor::project(passes_.team(), *A_, v_.batch, v_.p(slot, 0), searches);
      else
        product_(false, slot);
      passes_.each_block(searches, [&](int64_t k, int64_t chunk, Range rows) {
        if (A_) apply_rows(*A_, k, v_.p(slot, k), v_.q(slot, k) + rows.begin, rows);
        sums(k, chunk, rows);
      });
    }
    take_direction_sums(round);
  }

  void orthogonalise_again(int64_t round) {
    const auto repeats = [this](int64_t k) { return v_.states[k].repeats(); };
    if (!any([](const FlexibleState& s) { return s.repeats(); })) return;
    project_onto_history(round, repeats);
    for (int64_t k = 0; k < v_.batch; ++k) {
      if (!repeats(k)) continue;
      take_coefficients(round, k);
      flexible_after_second_project(v_.states[k], options_, directions(k), round);
    }
    passes_.each_block(repeats, [&](int64_t k, int64_t chunk, Range rows) {
      subtract_history(round, k, rows.begin, rows.size(), true);
      add_direction_sums(slot_of(options_, round), k, chunk, rows);
    });
    for (int64_t k = 0; k < v_.batch; ++k)
      if (repeats(k)) take_direction_sums_of(k, round);
  }

  void update(int64_t round) {
    const int64_t slot = slot_of(options_, round);
    const auto searches = [this](int64_t k) { return v_.states[k].searches(); };
    passes_.each_block(searches, [&](int64_t k, int64_t chunk, Range rows) {
      const int64_t at = k * v_.n + rows.begin;
      sum(0, k, chunk) += update_iterate(rows.size(), static_cast<T>(v_.states[k].step), v_.p(slot, k) + rows.begin,
                                         v_.q(slot, k) + rows.begin, v_.x + at, v_.r + at);
    });
    for (int64_t k = 0; k < v_.batch; ++k) {
      if (searches(k)) flexible_after_update(v_.states[k], options_, total(0, k), history(k));
      if (v_.states[k].stopped_by_curvature(round)) std::copy_n(v_.p(slot, k), v_.n, v_.direction + k * v_.n);
    }
  }

  void refresh(int64_t round) {
    if (options_.refresh_every == 0 || (round + 1) % options_.refresh_every != 0 || !any_running()) return;
    const auto running = [this](int64_t k) { return v_.states[k].running(); };
    form_residual(true, slot_of(options_, round + 1), running);
    for (int64_t k = 0; k < v_.batch; ++k)
      if (running(k)) flexible_after_refresh(v_.states[k], total(0, k));
  }

  // Whether any system still runs, after the monitor had its say. It does not hear of rounds in which no one moved.
  bool proceed(int64_t, const CgMonitor& monitor) {
    double largest = 0, iterations = 0;
    for (int64_t k = 0; k < v_.batch; ++k) {
      largest = std::fmax(largest, v_.states[k].cg.rr);
      iterations = std::fmax(iterations, v_.states[k].cg.iterations);
    }
    if (iterations > reported_) {
      const CgStatus status = monitor(static_cast<int64_t>(iterations), std::sqrt(largest));
      if (status != CgStatus::running) finish_running(status);
    }
    reported_ = iterations;
    return any_running();
  }

  void finish_running(CgStatus status) {
    for (int64_t k = 0; k < v_.batch; ++k)
      if (v_.states[k].running()) v_.states[k].cg.finish(status);
  }

  void verify(int64_t round) {
    const auto stopped = [this](int64_t k) { return !v_.states[k].running() && v_.states[k].cg.verified == 0; };
    form_residual(true, slot_of(options_, round), stopped);
    for (int64_t k = 0; k < v_.batch; ++k)
      if (stopped(k)) flexible_after_verify(v_.states[k], options_, total(0, k));
  }

 private:
  template <class Predicate>
  bool any(Predicate&& predicate) const {
    return std::any_of(v_.states, v_.states + v_.batch, predicate);
  }
  double* history(int64_t k) const { return v_.history + k * options_.cg.history_length; }
  DirectionScalars* directions(int64_t k) const { return v_.directions + k * options_.slots; }
  double& sum(int64_t which, int64_t k, int64_t chunk) { return passes_.sum(static_cast<int>(which), k, chunk); }
  double total(int64_t which, int64_t k) { return passes_.total(static_cast<int>(which), k); }

  // All systems get one, also those that have finished: f sees the whole batch.
  void hand_out_residual(int64_t slot) {
    passes_.each_block([](int64_t) { return true; },
                       [&](int64_t k, int64_t, Range rows) {
                         const double rr = v_.states[k].cg.rr;
                         const double factor = !options_.normalised || rr == 0 ? 1 : 1 / std::sqrt(rr);
                         if (!std::isfinite(rr))
                           return std::fill_n(v_.q(slot, k) + rows.begin, rows.size(), T(0)), void();
                         scale(rows.size(), factor, v_.r + k * v_.n + rows.begin, v_.q(slot, k) + rows.begin, false);
                       });
  }

  template <class Active>
  void apply_native(const Preconditioner<T>& M, int64_t slot, Active&& active) {
    if (std::holds_alternative<std::monostate>(M))
      passes_.each_block(active, [&](int64_t k, int64_t, Range rows) {
        std::copy_n(v_.r + k * v_.n + rows.begin, rows.size(), v_.p(slot, k) + rows.begin);
      });
    else
      passes_.precondition(M, v_.n, v_.r, v_.q(slot, 0), v_.p(slot, 0), active, [](int64_t, int64_t, Range) {});
  }

  // q.q in sum 0, q.Ap_j in sum j for the direction that is j rounds old; q is the new direction.
  template <class Active>
  void project_onto_history(int64_t round, Active&& active) {
    const int64_t slot = slot_of(options_, round);
    passes_.each_block(active, [&](int64_t k, int64_t chunk, Range rows) {
      const T* q = v_.p(slot, k) + rows.begin;
      sum(0, k, chunk) += dot(rows.size(), q, q);
      const int64_t used = flexible_used(v_.states[k], options_);
      for (int64_t age = 1; age <= used; ++age)
        sum(age, k, chunk) += dot(rows.size(), q, v_.q(slot_of(options_, round, age), k) + rows.begin);
    });
  }

  void take_coefficients(int64_t round, int64_t k) {
    const int64_t used = flexible_used(v_.states[k], options_);
    for (int64_t age = 1; age <= used; ++age) directions(k)[slot_of(options_, round, age)].coefficient = total(age, k);
  }

  // p -= sum_j c_j p_j on a block, and the same for A p.
  void subtract_history(int64_t round, int64_t k, int64_t begin, int64_t size, bool with_product) {
    const int64_t slot = slot_of(options_, round), used = flexible_used(v_.states[k], options_);
    for (int64_t age = 1; age <= used; ++age) {
      const int64_t other = slot_of(options_, round, age);
      const T c = static_cast<T>(-directions(k)[other].coefficient);
      multiply_add_in_place(size, c, v_.p(other, k) + begin, v_.p(slot, k) + begin);
      if (with_product) multiply_add_in_place(size, c, v_.q(other, k) + begin, v_.q(slot, k) + begin);
    }
  }

  void add_direction_sums(int64_t slot, int64_t k, int64_t chunk, Range rows) {
    const FourSums sums = direction_sums(rows.size(), v_.p(slot, k) + rows.begin, v_.q(slot, k) + rows.begin,
                                         v_.r + k * v_.n + rows.begin);
    for (int which = 0; which < 4; ++which) sum(which, k, chunk) += sums[static_cast<size_t>(which)];
  }

  void take_direction_sums(int64_t round) {
    for (int64_t k = 0; k < v_.batch; ++k)
      if (v_.states[k].searches()) take_direction_sums_of(k, round);
  }
  void take_direction_sums_of(int64_t k, int64_t round) {
    flexible_after_product(v_.states[k], options_, directions(k), round, total(0, k), total(1, k), total(2, k),
                           total(3, k));
  }

  // r = b - A x with the product and the difference in double; r.r in sum 0. Python's product goes through `slot`.
  template <class Active>
  void form_residual(bool with_product, int64_t slot, Active&& active) {
    if (with_product && !A_) product_(true, slot);
    if (with_product && A_) kantor::project(passes_.team(), *A_, v_.batch, v_.x, active);
    passes_.each_block(active, [&](int64_t k, int64_t chunk, Range rows) {
      alignas(64) double product[block_size];
      if (!with_product)
        std::fill_n(product, rows.size(), 0.0);
      else if (A_)
        apply_rows(*A_, k, v_.x + k * v_.n, product, rows);
      else
        std::copy_n(v_.q(slot, k) + rows.begin, rows.size(), product);
      const int64_t at = k * v_.n + rows.begin;
      sum(0, k, chunk) += subtract(rows.size(), v_.b + at, product, v_.r + at);
    });
  }

  BlockPasses passes_;  // with a sum for q.q and for every direction of the history, at least four
  const Operator<T>* A_;
  const SlotProduct& product_;
  const DirectionMap<T>& f_;
  const DirectionMap<T>& fallback_;
  FlexibleVectors<T> v_;
  FlexibleOptions options_;
  int64_t halo_ = 0;
  bool projects_ = false;
  double reported_ = 0;  // iterations, to the monitor
};

}  // namespace

template <class T>
void flexible_cg_cpu(const Exec& exec, const Operator<T>* A, const SlotProduct& product, const DirectionMap<T>& f,
                     const DirectionMap<T>& fallback, const FlexibleVectors<T>& v, const FlexibleOptions& options,
                     const CgMonitor& monitor) {
  const bool calls_back = !A || f.callback || fallback.callback || options.cg.watched;
  Team::run(threads_for(exec.threads, A ? work_of(*A, v.batch) : v.n * v.batch), !calls_back, [&](Team& team) {
    FlexibleCpuSpace<T> space(team, A, product, f, fallback, v, options);
    flexible_conjugate_gradients(space, monitor);
  });
}

#define KANTOR_INSTANTIATE(T)                                                                                \
  template void flexible_cg_cpu(const Exec&, const Operator<T>*, const SlotProduct&, const DirectionMap<T>&, \
                                const DirectionMap<T>&, const FlexibleVectors<T>&, const FlexibleOptions&,   \
                                const CgMonitor&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
