// The passes of capped conjugate gradients on the CPU. Words of memory traffic per unknown and iteration, beside the
// operator's own and the preconditioner:
//   update      read p, Hp, y, Hy, r, write y, Hy, r         8;  rr, yy, y.Hy, Hy.Hy from registers
//   direction   read z, p, Hp, write p, Hp                   5;  pp, p.Hp, Hp.Hp, Hz.Hz from registers
// 13 for a native operator, whose product stays in the first-level cache, 14 for a callback, which is read once more.
#include <algorithm>

#include "linalg/capped_cg.h"
#include "linalg/krylov_cpu.h"

namespace kantor {
namespace {

template <class T>
class CappedCpuSpace {
 public:
  CappedCpuSpace(Team& team, const Operator<T>* H, const ProductCallback<T>& product, const Preconditioner<T>& M,
                 const CappedVectors<T>& v, const CappedOptions& options, const AllReduce& all_reduce)
      : passes_(team, H ? chunks_of(*H) : Chunks{v.n}, v.batch, 4),
        totals_(all_reduce, v.batch, 4),
        H_(H),
        product_(product),
        M_(M),
        v_(v),
        options_(options) {}

  bool any_running(int64_t) const {
    return std::any_of(v_.states, v_.states + v_.batch, [](const CappedState& s) { return s.running(); });
  }

  void start() {
    passes_.each_block([](int64_t) { return true; },
                       [&](int64_t k, int64_t chunk, Range rows) {
                         const int64_t at = k * v_.n + rows.begin;
                         std::fill_n(v_.y + at, rows.size(), T(0));
                         std::fill_n(v_.Hy + at, rows.size(), T(0));
                         std::copy_n(v_.g + at, rows.size(), v_.r + at);
                         passes_.sum(0, k, chunk) += dot(rows.size(), v_.g + at, v_.g + at);
                       });
    reduce(1);
    for (int64_t k = 0; k < v_.batch; ++k) capped_start(v_.states[k], totals_(0, k));
  }

  void precondition() {
    if (!options_.preconditioned) {
      for (int64_t k = 0; k < v_.batch; ++k) capped_after_precondition(v_.states[k], v_.states[k].rr, v_.states[k].rr);
      return;
    }
    passes_.precondition(
        M_, v_.n, v_.r, v_.q, v_.z, [this](int64_t k) { return v_.states[k].running(); },
        [&](int64_t k, int64_t chunk, Range rows) {
          const int64_t at = k * v_.n + rows.begin;
          passes_.sum(0, k, chunk) += dot(rows.size(), v_.r + at, v_.z + at);
          passes_.sum(1, k, chunk) += dot(rows.size(), v_.z + at, v_.z + at);
        });
    reduce(2);
    for (int64_t k = 0; k < v_.batch; ++k) capped_after_precondition(v_.states[k], totals_(0, k), totals_(1, k));
  }

  void direction() {
    const T* product = H_ ? nullptr : product_();
    if (H_) project(passes_.team(), *H_, v_.batch, v_.z, [this](int64_t k) { return v_.states[k].running(); });
    pass([&](const CappedState& s, int64_t k, Range rows) {
      const int64_t at = k * v_.n + rows.begin;
      alignas(64) T scratch[block_size];
      const T* q = H_ ? scratch : product + at;
      if (H_) apply_rows(*H_, k, v_.z + k * v_.n, scratch, rows);
      return advance_with_product(rows.size(), static_cast<T>(s.beta), v_.z + at, q, v_.p + at, v_.Hp + at);
    });
    for (int64_t k = 0; k < v_.batch; ++k)
      capped_after_direction(v_.states[k], options_, v_.arrays_of(k, options_.capacity), totals_(0, k), totals_(1, k),
                             totals_(2, k), totals_(3, k));
  }

  void update() {
    pass([&](const CappedState& s, int64_t k, Range rows) {
      const int64_t at = k * v_.n + rows.begin;
      return update_with_product(rows.size(), static_cast<T>(s.alpha), static_cast<T>(2 * s.damping), v_.p + at,
                                 v_.Hp + at, v_.y + at, v_.Hy + at, v_.r + at);
    });
    for (int64_t k = 0; k < v_.batch; ++k)
      capped_after_update(v_.states[k], options_, totals_(0, k), totals_(1, k), totals_(2, k), totals_(3, k));
  }

  void watch(int64_t iteration, const CgMonitor& monitor) {
    const CgStatus status = monitor(iteration, 0);
    if (status != CgStatus::running && !totals_.postpone(status)) finish_running(CappedStatus::interrupted);
  }

  void finish_running(CappedStatus status) {
    for (int64_t k = 0; k < v_.batch; ++k)
      if (v_.states[k].running()) v_.states[k].finish(status);
  }

 private:
  // The reduction point behind a pass: the first `count` sums of every system, over all ranks.
  void reduce(int count) {
    totals_.read(passes_, count);
    if (totals_.share(count) != CgStatus::running) finish_running(CappedStatus::interrupted);
  }

  // Four sums from every block of the systems that run.
  template <class Body>
  void pass(Body&& body) {
    passes_.each_block([this](int64_t k) { return v_.states[k].running(); },
                       [&](int64_t k, int64_t chunk, Range rows) {
                         const FourSums sums = body(v_.states[k], k, rows);
                         for (int which = 0; which < 4; ++which) passes_.sum(which, k, chunk) += sums[which];
                       });
    reduce(4);
  }

  BlockPasses passes_;  // with four partial sums a chunk and system
  Totals totals_;
  const Operator<T>* H_;
  const ProductCallback<T>& product_;
  const Preconditioner<T>& M_;
  CappedVectors<T> v_;
  CappedOptions options_;
};

}  // namespace

template <class T>
void capped_cg_cpu(const Exec& exec, const Operator<T>* H, const ProductCallback<T>& product,
                   const Preconditioner<T>& M, const CappedVectors<T>& v, const CappedOptions& options, bool resume,
                   const CgMonitor& monitor, const AllReduce& all_reduce) {
  const bool calls_back = !H || std::holds_alternative<Callback>(M) || all_reduce;
  Team::run(threads_for(exec.threads, H ? work_of(*H, v.batch) : v.n * v.batch), !calls_back, [&](Team& team) {
    CappedCpuSpace<T> space(team, H, product, M, v, options, all_reduce);
    capped_conjugate_gradients(space, resume, monitor);
  });
}

#define KANTOR_INSTANTIATE(T)                                                                                       \
  template void capped_cg_cpu(const Exec&, const Operator<T>*, const ProductCallback<T>&, const Preconditioner<T>&, \
                              const CappedVectors<T>&, const CappedOptions&, bool, const CgMonitor&,                \
                              const AllReduce&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
