// The passes of multi-shift conjugate gradients on the CPU. Words of memory traffic per unknown and iteration, beside
// the operator's own: product 1 (2 and q for a callback), update 3, directions 3 for p and 5 for every shift that runs.
#include <algorithm>

#include "linalg/krylov_cpu.h"
#include "linalg/multishift_cg.h"

namespace kantor {
namespace {

template <class T>
class MultishiftCpuSpace {
 public:
  MultishiftCpuSpace(Team& team, const Operator<T>* A, const ProductCallback<T>& product, const MultishiftVectors<T>& v)
      : passes_(team, A ? chunks_of(*A) : Chunks{v.n}, 1, 1), A_(A), product_(product), v_(v) {}

  bool any_running(int64_t) const { return v_.state->running(); }

  void start() {
    pass([&](Range rows) {
      const T* b = v_.b + rows.begin;
      std::copy_n(b, rows.size(), v_.r + rows.begin);
      std::copy_n(b, rows.size(), v_.p + rows.begin);
      for (int64_t k = 0; k < v_.shifts.count; ++k) {
        std::copy_n(b, rows.size(), v_.directions + k * v_.n + rows.begin);
        std::fill_n(v_.x + k * v_.n + rows.begin, rows.size(), T(0));
      }
      return dot(rows.size(), b, b);
    });
    multishift_start(*v_.state, v_.shifts, passes_.total(0, 0));
  }

  void product() {
    const T* given = A_ ? nullptr : product_();
    if (A_) project(passes_.team(), *A_, 1, v_.p, [](int64_t) { return true; });
    const T shift = static_cast<T>(v_.state->shift);
    pass([&](Range rows) {
      T* q = v_.q + rows.begin;
      const T* p = v_.p + rows.begin;
      if (A_) {
        apply_rows(*A_, 0, v_.p, q, rows);
        if (shift != 0) multiply_add_in_place(rows.size(), shift, p, q);
      } else {
        multiply_add(rows.size(), T(1), given + rows.begin, shift, p, q);
      }
      return dot(rows.size(), p, q);
    });
    multishift_after_product(*v_.state, passes_.total(0, 0));
  }

  void update() {
    if (!v_.state->running()) return;
    const T alpha = static_cast<T>(v_.state->alpha);
    pass([&](Range rows) {
      T* r = v_.r + rows.begin;
      multiply_add_in_place(rows.size(), -alpha, v_.q + rows.begin, r);
      return dot(rows.size(), r, r);
    });
    multishift_after_update(*v_.state, v_.shifts, passes_.total(0, 0));
  }

  void directions(int64_t iteration) {
    if (v_.state->iterations != double(iteration)) return;  // it ended before this step
    const T beta = static_cast<T>(v_.state->beta);
    pass([&](Range rows) {
      const T* r = v_.r + rows.begin;
      for (int64_t k = 0; k < v_.shifts.count; ++k) {
        if (v_.shifts.done[k] == 2) continue;
        T* direction = v_.directions + k * v_.n + rows.begin;
        multiply_add_in_place(rows.size(), static_cast<T>(v_.shifts.a[k]), direction, v_.x + k * v_.n + rows.begin);
        combine(rows.size(), static_cast<T>(v_.shifts.zeta[k]), r, static_cast<T>(v_.shifts.b[k]), direction);
      }
      update_direction(rows.size(), beta, r, v_.p + rows.begin);
      return 0.0;
    });
  }

  void interrupt() {
    if (v_.state->running()) v_.state->finish(CgStatus::interrupted);
  }

 private:
  // One sum from every block.
  template <class Body>
  void pass(Body&& body) {
    passes_.each_block([](int64_t) { return true; },
                       [&](int64_t, int64_t chunk, Range rows) { passes_.sum(0, 0, chunk) += body(rows); });
  }

  BlockPasses passes_;
  const Operator<T>* A_;
  const ProductCallback<T>& product_;
  MultishiftVectors<T> v_;
};

}  // namespace

template <class T>
void multishift_cg_cpu(const Exec& exec, const Operator<T>* A, const ProductCallback<T>& product,
                       const MultishiftVectors<T>& v, const CgMonitor& monitor) {
  const int64_t work = A ? work_of(*A, 1) : v.n;
  Team::run(threads_for(exec.threads, work + v.n * v.shifts.count), A != nullptr, [&](Team& team) {
    MultishiftCpuSpace<T> space(team, A, product, v);
    multishift_conjugate_gradients(space, monitor);
  });
}

#define KANTOR_INSTANTIATE(T)                                                                 \
  template void multishift_cg_cpu(const Exec&, const Operator<T>*, const ProductCallback<T>&, \
                                  const MultishiftVectors<T>&, const CgMonitor&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
