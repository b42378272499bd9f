// What the conjugate gradient family (cg_cpu.cpp and others) shares on the CPU: passes over the blocks of a
// batch of vectors with deterministic partial sums, and the preconditioner.
#pragma once
#include <algorithm>
#include <vector>

#include "core/all_reduce.h"
#include "core/parallel.h"
#include "core/reduce.h"
#include "linalg/cg.h"
#include "linalg/preconditioner.h"
#include "linalg/vector.h"

namespace kantor {

// Rows that a fused pass works on at a time: 8 KiB of doubles a vector, so that they stay in the first-level cache.
inline constexpr int64_t block_size = 1024;

// Passes over `batch` vectors, cut into chunks whose sums are added in a fixed tree whatever the number of threads.
class BlockPasses {
 public:
  BlockPasses(Team& team, Chunks chunks, int64_t batch, int sums) : team_(team), chunks_(chunks), batch_(batch) {
    sums_.resize(static_cast<size_t>(sums * batch * chunks.count()));
  }

  Team& team() { return team_; }
  const Chunks& chunks() const { return chunks_; }

  // Partial sum number `which` of system k.
  double& sum(int which, int64_t k, int64_t chunk) {
    return sums_[static_cast<size_t>((which * batch_ + k) * chunks_.count() + chunk)];
  }
  double total(int which, int64_t k) { return chunks_.count() == 0 ? 0 : tree_sum(&sum(which, k, 0), chunks_.count()); }
  void clear_sums() { std::fill(sums_.begin(), sums_.end(), 0.0); }

  // body(chunks, systems, workers) on every thread: a share of the chunks of all systems (the operator's data is then
  // read once for the batch), or all chunks of a share of the systems when there are few chunks.
  template <class Body>
  void split(Body&& body) {
    team_.pass([&](int worker, int workers) {
      if (batch_ >= workers && chunks_.count() < 4 * workers)
        body(Range{0, chunks_.count()}, share(batch_, worker, workers), workers);
      else
        body(share(chunks_.count(), worker, workers), Range{0, batch_}, workers);
    });
  }

  // body(k, chunk, rows) for every block of rows of every system that `active` selects. Clears the sums first.
  template <class Active, class Body>
  void each_block(Active&& active, Body&& body) {
    clear_sums();
    split([&](Range chunks, Range systems, int) {
      for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        const Range rows = chunks_.range(chunk);
        for (int64_t begin = rows.begin; begin < rows.end; begin += block_size)
          for (int64_t k = systems.begin; k < systems.end; ++k)
            if (active(k)) body(k, chunk, Range{begin, std::min(begin + block_size, rows.end)});
      }
    });
  }

  // One pass that makes a vector and multiplies it: advance(k, rows) makes p, consume(k, chunk, rows) forms A p there,
  // where row i needs p in [i - halo, i + halo]. Each thread makes both edges of its slab first, because its neighbours
  // reach into it; after the barrier it sweeps the slab with p `halo` rows ahead of the product, still in cache. Clears
  // the sums first.
  template <class Active, class Advance, class Consume>
  void sweep(int64_t halo, Active&& active, Advance&& advance, Consume&& consume) {
    clear_sums();
    split([&](Range chunks, Range systems, int workers) {
      const int64_t begin = chunks_.range(chunks.begin).begin;
      const Range slab{begin, chunks.begin < chunks.end ? chunks_.range(chunks.end - 1).end : begin};
      const auto make = [&](int64_t from, int64_t to) {
        if (from >= to) return;
        for (int64_t k = systems.begin; k < systems.end; ++k)
          if (active(k)) advance(k, Range{from, to});
      };
      int64_t frontier = std::min(slab.begin + halo, slab.end);
      const int64_t last = std::max(frontier, slab.end - halo);
      make(slab.begin, frontier);
      make(last, slab.end);
      team_.barrier(workers);
      for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        const Range rows = chunks_.range(chunk);
        for (int64_t first = rows.begin; first < rows.end; first += block_size) {
          const Range block{first, std::min(first + block_size, rows.end)};
          const int64_t needed = std::min(block.end + halo, last);
          make(frontier, needed);
          frontier = std::max(frontier, needed);
          for (int64_t k = systems.begin; k < systems.end; ++k)
            if (active(k)) consume(k, chunk, block);
        }
      }
    });
  }

  // z = M r for the systems that `active` selects, then consume(k, chunk, rows) for every block of z. `work` is scratch
  // of the size of r; M is not monostate.
  template <class T, class Active, class Consume>
  void precondition(const Preconditioner<T>& M, int64_t n, const T* r, T* work, T* z, Active&& active,
                    Consume&& consume) {
    if (const auto* factor = std::get_if<IncompleteCholesky<T>>(&M)) {
      for (int64_t k = 0; k < batch_; ++k)
        if (active(k)) solve_incomplete_cholesky_cpu(team_, *factor, r + k * n, work + k * n, z + k * n);
    } else if (const auto* multigrid = std::get_if<Multigrid>(&M)) {
      for (int64_t k = 0; k < batch_; ++k)
        if (active(k)) apply_multigrid_cpu(team_, *multigrid, r + k * n, z + k * n);
    } else if (const auto* callback = std::get_if<Callback>(&M)) {
      (*callback)();
    }
    const auto* A = std::get_if<Operator<T>>(&M);
    const auto* D = std::get_if<Diagonal<T>>(&M);
    if (A) project(team_, *A, batch_, r, active);
    each_block(active, [&](int64_t k, int64_t chunk, Range rows) {
      const int64_t at = k * n + rows.begin;
      if (A) apply_rows(*A, k, r + k * n, z + at, rows);
      if (D) update_direction_scaled(rows.size(), T(0), D->values + rows.begin, r + at, z + at);
      consume(k, chunk, rows);
    });
  }

 private:
  Team& team_;
  Chunks chunks_;
  int64_t batch_;
  std::vector<double> sums_;
};

// The totals of a reduction point: of this process, then in one call of all ranks. What the monitor of one rank wants
// travels along, so that all ranks end at the same point.
class Totals {
 public:
  Totals(const AllReduce& all_reduce, int64_t batch, int most) : all_reduce_(all_reduce), batch_(batch) {
    if (all_reduce) return;
    own_.resize(static_cast<size_t>(batch * most));
  }

  // Total number `which` of system k.
  double& operator()(int which, int64_t k) {
    double* sums = all_reduce_ ? all_reduce_.sums : own_.data();
    return sums[which * batch_ + k];
  }

  // From the partial sums of a pass, the first `count` of each system.
  void read(BlockPasses& passes, int count) {
    for (int which = 0; which < count; ++which)
      for (int64_t k = 0; k < batch_; ++k) (*this)(which, k) = passes.total(which, k);
  }

  // Sums the first `count` totals of each system over the ranks. Returns what a rank has asked for since the last time.
  CgStatus share(int count) {
    if (!all_reduce_) return CgStatus::running;
    double* wishes = all_reduce_.sums + count * batch_;
    wishes[0] = wish_ == CgStatus::interrupted;
    wishes[1] = wish_ == CgStatus::stopped;
    wish_ = CgStatus::running;
    all_reduce_.call(count * batch_ + rank_wishes);
    return wishes[0] > 0 ? CgStatus::interrupted : wishes[1] > 0 ? CgStatus::stopped : CgStatus::running;
  }

  // Whether `status`, which this rank asks for, has to wait for the next reduction point.
  bool postpone(CgStatus status) {
    if (all_reduce_) wish_ = status;
    return static_cast<bool>(all_reduce_);
  }

 private:
  const AllReduce& all_reduce_;
  int64_t batch_;
  std::vector<double> own_;
  CgStatus wish_ = CgStatus::running;
};

}  // namespace kantor
