// The row kernels of multigrid on grids (multigrid_cpu.cpp), each compiled once per instruction set. `Links` says how a
// row's cells are linked: by the bits of voxels or by face coefficients.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/reduce.h"

namespace kantor::multigrid {

// A row of a plane and its neighbour rows. They lie in padded buffers: zero left and right of a row, and around a
// plane.
template <class S>
struct Neighbours {
  const S *centre, *below, *above, *front, *back;
};

template <class S>
struct VoxelLinks {
  const uint16_t* cells;

  KANTOR_ALWAYS_INLINE S diagonal(int64_t i) const { return S(int(cells[i] >> 8)); }
  KANTOR_ALWAYS_INLINE S inverse(int64_t i) const {
    const int d = cells[i] >> 8;
    return d ? S(1) / S(d) : S(0);
  }
  KANTOR_ALWAYS_INLINE S sum(const Neighbours<S>& u, int64_t i) const {
    const unsigned cell = cells[i];
    const S z = (cell & 1 ? u.below[i] : S(0)) + (cell & 2 ? u.above[i] : S(0));
    const S y = (cell & 4 ? u.front[i] : S(0)) + (cell & 8 ? u.back[i] : S(0));
    const S x = (cell & 16 ? u.centre[i - 1] : S(0)) + (cell & 32 ? u.centre[i + 1] : S(0));
    return x + (y + z);
  }
  // The links of a row towards one side: v where there is one, else zero.
  struct Side {
    const uint16_t* cells;
    unsigned bit;
    KANTOR_ALWAYS_INLINE S operator()(int64_t i, S v) const { return cells[i] & bit ? v : S(0); }
  };
  KANTOR_ALWAYS_INLINE Side z_side(bool upper) const { return {cells, upper ? 2u : 1u}; }
  KANTOR_ALWAYS_INLINE Side y_side(bool upper) const { return {cells, upper ? 8u : 4u}; }
  KANTOR_ALWAYS_INLINE Side left_side() const { return {cells, 16}; }
  KANTOR_ALWAYS_INLINE Side right_side() const { return {cells, 32}; }
};

template <class S>
struct FaceLinks {
  const S *below, *above, *front, *back, *left, *inverse_diagonal;

  KANTOR_ALWAYS_INLINE S diagonal(int64_t i) const {
    const S inverse = inverse_diagonal[i];
    return inverse > 0 ? S(1) / inverse : S(0);
  }
  KANTOR_ALWAYS_INLINE S inverse(int64_t i) const { return inverse_diagonal[i]; }
  KANTOR_ALWAYS_INLINE S sum(const Neighbours<S>& u, int64_t i) const {
    const S z = below[i] * u.below[i] + above[i] * u.above[i];
    const S y = front[i] * u.front[i] + back[i] * u.back[i];
    const S x = left[i] * u.centre[i - 1] + left[i + 1] * u.centre[i + 1];
    return x + (y + z);
  }
  struct Side {
    const S* coefficients;
    KANTOR_ALWAYS_INLINE S operator()(int64_t i, S v) const { return coefficients[i] > 0 ? v : S(0); }
  };
  KANTOR_ALWAYS_INLINE Side z_side(bool upper) const { return {upper ? above : below}; }
  KANTOR_ALWAYS_INLINE Side y_side(bool upper) const { return {upper ? back : front}; }
  KANTOR_ALWAYS_INLINE Side left_side() const { return {left}; }
  KANTOR_ALWAYS_INLINE Side right_side() const { return {left + 1}; }
};

// One colour from zero: out = mask b / D.
template <class S, class B, class Links>
KANTOR_SIMD void start_row(Links links, int64_t n, const S* mask, const B* b, S* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = mask[i] * (S(b[i]) * links.inverse(i));
}

// Both colours after that: the neighbours of the first colour are zero, so that it is only repeated.
template <class S, class B, class Links>
KANTOR_SIMD void solve_row(Links links, int64_t n, Neighbours<S> u, const B* b, S* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = (S(b[i]) + links.sum(u, i)) * links.inverse(i);
}

// A half sweep of Gauss-Seidel on the cells where mask is 1; the others are copied.
template <class S, class B, class Links, class Out>
KANTOR_SIMD void half_sweep_row(Links links, int64_t n, const S* mask, Neighbours<S> u, const B* b,
                                Out* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S value = (S(b[i]) + links.sum(u, i)) * links.inverse(i);
    out[i] = static_cast<Out>(u.centre[i] + mask[i] * (value - u.centre[i]));
  }
}

// out = b - A u, zero where there is no unknown.
template <class S, class B, class Links>
KANTOR_SIMD void residual_row(Links links, int64_t n, Neighbours<S> u, const B* b, S* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S diagonal = links.diagonal(i);
    const S value = (S(b[i]) - diagonal * u.centre[i]) + links.sum(u, i);
    out[i] = diagonal > 0 ? value : S(0);
  }
}

// out = D^-1/2 b, and out = D^-1/2 (b - A u).
template <class S, class B, class Links>
KANTOR_SIMD void scaled_row(Links links, int64_t n, const B* b, S* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(links.inverse(i)) * S(b[i]);
}
template <class S, class B, class Links>
KANTOR_SIMD void scaled_residual_row(Links links, int64_t n, Neighbours<S> u, const B* b, S* __restrict out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S value = (S(b[i]) - links.diagonal(i) * u.centre[i]) + links.sum(u, i);
    out[i] = std::sqrt(links.inverse(i)) * value;
  }
}

// out = x + D^-1/2 (k * s); rows[3 z + y] are the nine rows around this one, k has 27 values; x null counts as zero.
template <class S, class Links, class Out>
KANTOR_SIMD void stencil_row(Links links, int64_t n, const S* const* rows, const S* k, const S* x,
                             Out* __restrict out) {
  const S *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3], *r4 = rows[4], *r5 = rows[5], *r6 = rows[6],
          *r7 = rows[7], *r8 = rows[8];
  const auto three = [](const S* r, const S* w, int64_t i)
                         KANTOR_INLINE_LAMBDA { return w[0] * r[i - 1] + w[1] * r[i] + w[2] * r[i + 1]; };
  S w[27];
  for (int t = 0; t < 27; ++t) w[t] = k[t];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S lower = three(r0, w, i) + three(r1, w + 3, i) + three(r2, w + 6, i);
    const S middle = three(r3, w + 9, i) + three(r4, w + 12, i) + three(r5, w + 15, i);
    const S upper = three(r6, w + 18, i) + three(r7, w + 21, i) + three(r8, w + 24, i);
    const S update = std::sqrt(links.inverse(i)) * (lower + (middle + upper));
    out[i] = static_cast<Out>(x ? x[i] + update : update);
  }
}

// Where a row's partners lie: above or below, behind or in front.
struct Sides {
  bool z_upper, y_upper;
};

// S u of a row: u + 1/4 sum of the differences to the linked partners. even[i] is 1 for even i.
template <class S, class Links>
struct Partners {
  const S *centre, *z, *y, *even;
  typename Links::Side z_side, y_side, left_side, right_side;

  KANTOR_ALWAYS_INLINE Partners(Links links, Sides sides, const Neighbours<S>& u, const S* even_cells)
      : centre(u.centre),
        z(sides.z_upper ? u.above : u.below),
        y(sides.y_upper ? u.back : u.front),
        even(even_cells),
        z_side(links.z_side(sides.z_upper)),
        y_side(links.y_side(sides.y_upper)),
        left_side(links.left_side()),
        right_side(links.right_side()) {}

  KANTOR_ALWAYS_INLINE S operator()(int64_t i) const {
    const S c = centre[i];
    const S across = z_side(i, z[i] - c) + y_side(i, y[i] - c);
    const S left = left_side(i, centre[i - 1] - c), right = right_side(i, centre[i + 1] - c);
    return c + S(0.25) * ((even[i] * left + (S(1) - even[i]) * right) + across);
  }
};

template <class S, class Links>
KANTOR_SIMD void partners_row(Links links, Sides sides, int64_t n, Neighbours<S> u, const S* even, S* __restrict out) {
  const Partners<S, Links> value(links, sides, u, even);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = value(i);
}

// out = x + scale S u, zero where there is no unknown.
template <class S, class Links>
KANTOR_SIMD void correct_row(Links links, Sides sides, int64_t n, Neighbours<S> u, const S* even, S scale, const S* x,
                             S* __restrict out) {
  const Partners<S, Links> value(links, sides, u, even);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S corrected = x[i] + scale * value(i);
    out[i] = links.inverse(i) > 0 ? corrected : S(0);
  }
}

// coarse[j] = or += fine[2j] + fine[2j + 1]; the element beyond an odd row is zero.
template <class S>
KANTOR_SIMD void add_pairs(int64_t coarse_n, const S* fine, bool accumulate, S* __restrict coarse) {
  if (accumulate) {
#pragma GCC ivdep
    for (int64_t j = 0; j < coarse_n; ++j) coarse[j] += fine[2 * j] + fine[2 * j + 1];
  } else {
#pragma GCC ivdep
    for (int64_t j = 0; j < coarse_n; ++j) coarse[j] = fine[2 * j] + fine[2 * j + 1];
  }
}

// fine[2j] = fine[2j + 1] = coarse[j]
template <class S>
KANTOR_SIMD void repeat_pairs(int64_t n, const S* coarse, S* __restrict fine) {
  const int64_t pairs = n / 2;
  for (int64_t j = 0; j < pairs; ++j) fine[2 * j] = fine[2 * j + 1] = coarse[j];
  if (n % 2) fine[n - 1] = coarse[n / 2];
}

}  // namespace kantor::multigrid
