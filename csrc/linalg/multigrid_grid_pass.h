// A pass of the cycle over the planes of one grid on the CPU, for multigrid_cpu.cpp.
//
// The stages of a pass (first colour, second colour, residual, restriction, ...) run as a wavefront over the planes:
// each stage does a plane as soon as the one before has done the next, out of rings of three planes that stay in the
// second-level cache. Whoever does a slab of planes, a thread or one of several processes, repeats the few planes
// around it that its stages need, so that results do not depend on how the grid is cut.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "linalg/multigrid.h"
#include "linalg/multigrid_rows.h"

namespace kantor::multigrid {

enum class Stage {
  start,
  solve,
  red,
  black,
  scale,
  stencil,
  scaled_residual,
  stencil_add,
  residual,
  restriction,
  inject,
  correct
};

// Rings of three padded planes for each stage.
template <class S>
class Rings {
 public:
  static constexpr int64_t margin = 16;

  Rings(int64_t ny, int64_t nx, int64_t stages, S* memory)
      : ny_(ny), nx_(nx), pitch_((nx + 1 + 15) / 16 * 16), memory_(memory) {
    // Zero the plane outside, the rims of the others, and the alternating masks.
    std::fill_n(memory_, plane_size(), S(0));
    for (int64_t p = 0; p < 3 * stages; ++p) {
      S* plane = memory_ + (1 + p) * plane_size();
      std::fill_n(plane, margin + pitch_, S(0));
      std::fill_n(plane + margin + (ny_ + 1) * pitch_, pitch_ + margin, S(0));
      for (int64_t y = 1; y <= ny_; ++y) std::fill_n(plane + margin + y * pitch_ + nx_, pitch_ - nx_, S(0));
    }
    S* mask = memory_ + (1 + 3 * stages) * plane_size();
    for (int64_t i = 0; i < nx_ + 1; ++i) mask[i] = S(i % 2 == 0);
    even_ = mask;
  }

  static int64_t size(int64_t ny, int64_t nx, int64_t stages) {
    const int64_t pitch = (nx + 1 + 15) / 16 * 16;
    return (1 + 3 * stages) * ((ny + 2) * pitch + 2 * margin) + pitch + 16;
  }

  // Row y of plane z of a stage, or zeros outside the grid's planes 0..nz-1.
  S* row(int64_t stage, int64_t z, int64_t y) const {
    return memory_ + (1 + 3 * stage + z % 3) * plane_size() + margin + (y + 1) * pitch_;
  }
  const S* zeros(int64_t y) const { return memory_ + margin + (y + 1) * pitch_; }
  const S* row(int64_t stage, int64_t z, int64_t nz, int64_t y) const {
    return z < 0 || z >= nz ? zeros(y) : row(stage, z, y);
  }
  // 1, 0, 1, 0 ... or 0, 1, 0, 1 ...
  const S* mask(bool from_one) const { return even_ + (from_one ? 0 : 1); }

 private:
  int64_t plane_size() const { return (ny_ + 2) * pitch_ + 2 * margin; }

  int64_t ny_, nx_, pitch_;
  S* memory_;
  const S* even_ = nullptr;
};

template <class S>
struct CoarseVector {  // of the next level: a grid's or a graph's
  S* values;
  int64_t ny, nx;
  int64_t first = 0;  // in its array, the plane that planes 0 and 1 of the fine grid belong to

  S* row(int64_t z, int64_t y) const { return values + ((first + z / 2) * ny + y / 2) * nx; }
};

inline std::vector<Stage> down_stages(GridSmoother smoother, int64_t sweeps) {
  std::vector<Stage> stages;
  if (smoother == GridSmoother::red_black) {
    stages = {Stage::start, Stage::solve};
    for (int64_t k = 1; k < sweeps; ++k) stages.insert(stages.end(), {Stage::red, Stage::black});
  } else {
    stages = {Stage::scale, Stage::stencil};
    for (int64_t k = 1; k < sweeps; ++k) stages.insert(stages.end(), {Stage::scaled_residual, Stage::stencil_add});
  }
  stages.insert(stages.end(), {Stage::residual, Stage::restriction});
  return stages;
}

inline std::vector<Stage> up_stages(GridSmoother smoother, int64_t sweeps) {
  std::vector<Stage> stages{Stage::inject, Stage::correct};
  for (int64_t k = 0; k < sweeps; ++k)
    if (smoother == GridSmoother::red_black)
      stages.insert(stages.end(), {Stage::black, Stage::red});
    else
      stages.insert(stages.end(), {Stage::scaled_residual, Stage::stencil_add});
  return stages;
}

// The planes that a pass makes, and those whose x it writes on the way down: the same, and more where the way up will
// look beyond them.
struct Slab {
  Range own, kept;

  // A worker's part: whole blocks.
  Slab part(int worker, int workers) const {
    const int64_t first = own.begin / 2;
    const Range blocks = share((own.end + 1) / 2 - first, worker, workers);
    const Range mine{std::max(own.begin, 2 * (first + blocks.begin)), std::min(own.end, 2 * (first + blocks.end))};
    return {mine, {mine.begin == own.begin ? kept.begin : mine.begin, mine.end == own.end ? kept.end : mine.end}};
  }
};

// One worker's pass over a grid level. B is the type of the right-hand side, Out that of what the pass up writes.
template <class S, class B, class Out>
struct GridPass {
  const GridLevel<S>& grid;
  const B* b;
  S* x;                    // written on the way down, read on the way up
  Out* out;                // written on the way up
  CoarseVector<S> coarse;  // b of the next level on the way down, e on the way up
  const std::vector<Stage>& stages;
  Rings<S> rings;
  Slab slab;

  void run() const {
    const auto last = static_cast<int64_t>(stages.size()) - 1;
    // Stage s does the planes that stage s + 1 needs: one more on either side.
    const auto planes = [&](int64_t s) {
      return Range{std::max<int64_t>(0, slab.own.begin - (last - s)), std::min(grid.nz, slab.own.end + (last - s))};
    };
    for (int64_t t = planes(0).begin; t < slab.own.end + last; ++t)
      for (int64_t s = 0; s <= last; ++s)
        if (const int64_t z = t - s; z >= planes(s).begin && z < planes(s).end) plane(s, z);
  }

  void plane(int64_t s, int64_t z) const {
    if (grid.cells)
      plane_with(s, z, [&](int64_t at) { return VoxelLinks<S>{grid.cells + at}; });
    else
      plane_with(s, z, [&](int64_t at) {
        return FaceLinks<S>{grid.below + at, grid.below + at + grid.plane(), grid.front + at, grid.front + at + grid.nx,
                            grid.left + at,  grid.inverse_diagonal + at};
      });
  }

  Neighbours<S> neighbours(int64_t s, int64_t z, int64_t y) const {
    return {rings.row(s, z, y), rings.row(s, z - 1, grid.nz, y), rings.row(s, z + 1, grid.nz, y),
            rings.row(s, z, y - 1), rings.row(s, z, y + 1)};
  }

  template <class LinksAt>
  void plane_with(int64_t s, int64_t z, LinksAt links_at) const {
    const bool keeps = z >= slab.kept.begin && z < slab.kept.end;
    const bool last_smoothing = s + 3 == static_cast<int64_t>(stages.size()) && stages.back() == Stage::restriction;
    for (int64_t y = 0; y < grid.ny; ++y) {
      const int64_t at = (z * grid.ny + y) * grid.nx;
      row(s, z, y, at, links_at(at));
      if (last_smoothing && keeps) std::copy_n(rings.row(s, z, y), grid.nx, x + at);
    }
  }

  template <class Links>
  void row(int64_t s, int64_t z, int64_t y, int64_t at, Links links) const {
    const int64_t n = grid.nx;
    const bool is_last = s + 1 == static_cast<int64_t>(stages.size());
    S* target = rings.row(s, z, y);
    const S* red = rings.mask((z + y) % 2 == 0);
    const S* black = rings.mask((z + y) % 2 != 0);
    const Sides sides{z % 2 != 0, y % 2 != 0};
    switch (stages[static_cast<size_t>(s)]) {
      case Stage::start:
        return start_row<S, B>(links, n, red, b + at, target);
      case Stage::solve:
        return solve_row<S, B>(links, n, neighbours(s - 1, z, y), b + at, target);
      case Stage::red:
      case Stage::black: {
        const S* mask = stages[static_cast<size_t>(s)] == Stage::red ? red : black;
        if (is_last) return half_sweep_row<S, B>(links, n, mask, neighbours(s - 1, z, y), b + at, out + at);
        return half_sweep_row<S, B>(links, n, mask, neighbours(s - 1, z, y), b + at, target);
      }
      case Stage::scale:
        return scaled_row<S, B>(links, n, b + at, target);
      case Stage::scaled_residual:
        return scaled_residual_row<S, B>(links, n, neighbours(s - 1, z, y), b + at, target);
      case Stage::stencil:
      case Stage::stencil_add: {
        std::array<const S*, 9> rows{};
        for (int64_t dz = -1; dz <= 1; ++dz)
          for (int64_t dy = -1; dy <= 1; ++dy)
            rows[static_cast<size_t>(3 * dz + dy + 4)] = rings.row(s - 1, z + dz, grid.nz, y + dy);
        // After the correction the transposed stencil.
        const bool going_up = stages.front() == Stage::inject;
        std::array<S, 27> k;
        for (size_t i = 0; i < 27; ++i) k[i] = grid.stencil[going_up ? 26 - i : i];
        const S* from = stages[static_cast<size_t>(s)] == Stage::stencil ? nullptr : rings.row(s - 2, z, y);
        if (is_last) return stencil_row<S>(links, n, rows.data(), k.data(), from, out + at);
        return stencil_row<S>(links, n, rows.data(), k.data(), from, target);
      }
      case Stage::residual:
        return residual_row<S, B>(links, n, neighbours(s - 1, z, y), b + at, target);
      case Stage::restriction:
        partners_row<S>(links, sides, n, neighbours(s - 1, z, y), rings.mask(true), target);
        return restrict_row(z, y, at, target);
      case Stage::inject:
        return inject_row(z, y, at, target);
      case Stage::correct:
        return correct_row<S>(links, sides, n, neighbours(s - 1, z, y), rings.mask(true), *grid.scale, x + at, target);
    }
  }

  void restrict_row(int64_t z, int64_t y, int64_t at, const S* values) const {
    if (!grid.labels) return add_pairs(coarse.nx, values, z % 2 != 0 || y % 2 != 0, coarse.row(z, y));
    if (z % 2 == 0 && y == 0)
      std::fill(coarse.values + grid.first_nodes[z / 2], coarse.values + grid.first_nodes[z / 2 + 1], S(0));
    for (int64_t i = 0; i < grid.nx; ++i)
      if (const int32_t node = grid.labels[at + i]; node >= 0) coarse.values[node] += values[i];
  }

  void inject_row(int64_t z, int64_t y, int64_t at, S* target) const {
    if (!grid.labels) return repeat_pairs(grid.nx, coarse.row(z, y), target);
    for (int64_t i = 0; i < grid.nx; ++i) {
      const int32_t node = grid.labels[at + i];
      target[i] = node >= 0 ? coarse.values[node] : S(0);
    }
  }
};

}  // namespace kantor::multigrid
