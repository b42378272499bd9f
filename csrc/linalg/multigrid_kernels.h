// The kernels of multigrid.h on CUDA: one thread per cell, pair of cells, block of cells or node. A half sweep works in
// place, since the cells of a colour see only cells of the other.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/simt.h"
#include "linalg/multigrid.h"
#include "linalg/tensor_core.h"

namespace kantor::multigrid {

// --- grids ---

enum Side : int { below, above, front, back, left, right };

// How a cell is linked to its six neighbours, whichever form the grid has: a link that is missing has weight zero, and
// what lies behind it is not looked at.
template <class S>
struct CellLinks {
  S weight[6];
  S diagonal, inverse;  // of A; both zero where there is no unknown
};

template <class S>
__device__ __forceinline__ S inverse_of(const GridLevel<S>& grid, int64_t i) {
  if (!grid.cells) return grid.inverse_diagonal[i];
  const int diagonal = grid.cells[i] >> 8;
  return diagonal ? S(1) / S(diagonal) : S(0);
}

template <class S>
__device__ __forceinline__ CellLinks<S> links_of(const GridLevel<S>& grid, int64_t i) {
  if (grid.cells) {
    const unsigned cell = grid.cells[i];
    const auto link = [&](int side) { return S(cell >> side & 1u); };
    const S diagonal = S(int(cell >> 8));
    return {{link(below), link(above), link(front), link(back), link(left), link(right)},
            diagonal,
            diagonal > 0 ? S(1) / diagonal : S(0)};
  }
  const S inverse = grid.inverse_diagonal[i];
  return {{grid.below[i], grid.below[i + grid.plane()], grid.front[i], grid.front[i + grid.nx], grid.left[i],
           grid.left[i + 1]},
          inverse > 0 ? S(1) / inverse : S(0),
          inverse};
}

// sum of weight * u over the neighbours, u = at(cell).
template <class S, class At>
__device__ __forceinline__ S linked_sum(const CellLinks<S>& links, const GridLevel<S>& grid, int64_t i, At&& at) {
  const auto term = [&](int side, int64_t offset) {
    return links.weight[side] > 0 ? links.weight[side] * at(i + offset) : S(0);
  };
  const S z = term(below, -grid.plane()) + term(above, grid.plane());
  const S y = term(front, -grid.nx) + term(back, grid.nx);
  const S x = term(left, -1) + term(right, 1);
  return x + (y + z);
}

// The partner's side along each axis.
struct PartnerSides {
  bool above, back, right;
};

// S u at a cell whose u is `centre`: u + 1/4 sum of the differences to the linked partners, at(axis) = u of the partner
// along that axis (0: z, 1: y, 2: x).
template <class S, class At>
__device__ __forceinline__ S smoothed(const CellLinks<S>& links, PartnerSides partners, S centre, At&& at) {
  const auto term = [&](bool linked, int axis) { return linked ? at(axis) - centre : S(0); };
  const S z = term((partners.above ? links.weight[above] : links.weight[below]) > 0, 0);
  const S y = term((partners.back ? links.weight[back] : links.weight[front]) > 0, 1);
  const S x = term((partners.right ? links.weight[right] : links.weight[left]) > 0, 2);
  return centre + S(0.25) * (x + (y + z));
}

struct Place {
  int64_t z, y, x;
};

// Number t of an array (.., ny, nx). 64-bit divisions are slow, and hardly ever needed.
__device__ __forceinline__ Place place_of(int64_t t, int64_t ny, int64_t nx) {
  if ((t | ny | nx) >> 32 == 0) {
    const auto width = static_cast<uint32_t>(nx), height = static_cast<uint32_t>(ny), at = static_cast<uint32_t>(t);
    const uint32_t line = at / width, z = line / height;
    return {z, line - z * height, at - line * width};
  }
  const int64_t line = t / nx;
  return {line / ny, line % ny, t % nx};
}

enum class Colour : int { red = 0, black = 1 };

// x = a sweep of Gauss-Seidel from zero, both colours at once: the red cells around a black one are b / D.
template <class S, class B>
__global__ void grid_start_kernel(GridLevel<S> grid, const B* b, S* x) {
  simt::grid_stride(grid.size(), [&](int64_t i) {
    const Place p = place_of(i, grid.ny, grid.nx);
    if ((p.z + p.y + p.x) % 2 == 0) {
      x[i] = S(b[i]) * inverse_of(grid, i);
      return;
    }
    const CellLinks<S> links = links_of(grid, i);
    const S sum = linked_sum(links, grid, i, [&](int64_t j) { return S(b[j]) * inverse_of(grid, j); });
    x[i] = (S(b[i]) + sum) * links.inverse;
  });
}

// What a half sweep of Gauss-Seidel makes of u at cell i: in the form of the CPU's rows, so that roundings agree.
template <class S, class B>
__device__ __forceinline__ S relaxed(const GridLevel<S>& grid, int64_t i, const B* b, const S* u) {
  const CellLinks<S> links = links_of(grid, i);
  const S value = (S(b[i]) + linked_sum(links, grid, i, [&](int64_t j) { return u[j]; })) * links.inverse;
  return u[i] + (value - u[i]);
}

// A half sweep on u, in place.
template <class S, class B>
__global__ void grid_half_sweep_kernel(GridLevel<S> grid, Colour colour, const B* b, S* u) {
  const int64_t pairs = (grid.nx + 1) / 2;
  simt::grid_stride(grid.nz * grid.ny * pairs, [&](int64_t t) {
    const Place p = place_of(t, grid.ny, pairs);
    const int64_t x = 2 * p.x + ((p.z + p.y + int(colour)) & 1);
    if (x >= grid.nx) return;
    const int64_t i = (p.z * grid.ny + p.y) * grid.nx + x;
    u[i] = relaxed(grid, i, b, u);
  });
}

// The last one of the way up, which hands the result out.
template <class S, class B, class Out>
__global__ void grid_last_half_sweep_kernel(GridLevel<S> grid, Colour colour, const B* b, const S* u, Out* out) {
  simt::grid_stride(grid.size(), [&](int64_t i) {
    const Place p = place_of(i, grid.ny, grid.nx);
    const bool active = ((p.z + p.y + p.x) & 1) == int(colour);
    out[i] = static_cast<Out>(active ? relaxed(grid, i, b, u) : u[i]);
  });
}

// r = b - A u, or (scaled) D^-1/2 (b - A u); u null counts as zero.
template <class S, class B, bool scaled>
__global__ void grid_residual_kernel(GridLevel<S> grid, const B* b, const S* u, S* r) {
  simt::grid_stride(grid.size(), [&](int64_t i) {
    const CellLinks<S> links = links_of(grid, i);
    S value = S(b[i]);
    if (u) value = (value - links.diagonal * u[i]) + linked_sum(links, grid, i, [&](int64_t j) { return u[j]; });
    if constexpr (scaled)
      r[i] = std::sqrt(links.inverse) * value;
    else
      r[i] = links.diagonal > 0 ? value : S(0);
  });
}

// out = x + D^-1/2 (k * s), k flipped on the way up; x null counts as zero, out may be x.
template <class S, class Out>
__global__ void grid_stencil_kernel(GridLevel<S> grid, bool flipped, const S* s, const S* x, Out* out) {
  const S* k = grid.stencil;
  simt::grid_stride(grid.size(), [&](int64_t i) {
    const Place p = place_of(i, grid.ny, grid.nx);
    const bool has_left = p.x > 0, has_right = p.x + 1 < grid.nx;
    S planes[3];
    KANTOR_UNROLL
    for (int dz = 0; dz < 3; ++dz) {
      planes[dz] = 0;
      if (p.z + dz < 1 || p.z + dz > grid.nz) continue;
      KANTOR_UNROLL
      for (int dy = 0; dy < 3; ++dy) {
        if (p.y + dy < 1 || p.y + dy > grid.ny) continue;
        const int64_t at = i + (dz - 1) * grid.plane() + (dy - 1) * grid.nx;
        const int first = 9 * dz + 3 * dy;
        const auto weight = [&](int tap) { return k[flipped ? 26 - tap : tap]; };
        const S lower = has_left ? weight(first) * s[at - 1] : S(0);
        const S upper = has_right ? weight(first + 2) * s[at + 1] : S(0);
        planes[dz] += lower + weight(first + 1) * s[at] + upper;
      }
    }
    const S update = std::sqrt(inverse_of(grid, i)) * (planes[0] + (planes[1] + planes[2]));
    out[i] = static_cast<Out>(x ? x[i] + update : update);
  });
}

// coarse = R r: a thread gathers what a block of cells gives to its coarse cell, or to its graph nodes, which are this
// block's alone.
template <class S>
__global__ void grid_restriction_kernel(GridLevel<S> grid, const S* r, S* coarse) {
  const int64_t by = grid.coarse(grid.ny), bx = grid.coarse(grid.nx);
  simt::grid_stride(grid.coarse(grid.nz) * by * bx, [&](int64_t block) {
    const Place p = place_of(block, by, bx);
    S values[8];
    int32_t nodes[8];
    KANTOR_UNROLL
    for (int c = 0; c < 8; ++c) {
      const int64_t z = 2 * p.z + (c >> 2), y = 2 * p.y + (c >> 1 & 1), x = 2 * p.x + (c & 1);
      const bool inside = z < grid.nz && y < grid.ny && x < grid.nx;
      values[c] = 0, nodes[c] = -1;
      if (!inside) continue;
      const int64_t i = (z * grid.ny + y) * grid.nx + x;
      const PartnerSides partners{(c & 4) != 0, (c & 2) != 0, (c & 1) != 0};
      const int64_t offsets[3] = {partners.above ? grid.plane() : -grid.plane(), partners.back ? grid.nx : -grid.nx,
                                  partners.right ? 1 : -1};
      values[c] = smoothed(links_of(grid, i), partners, r[i], [&](int axis) { return r[i + offsets[axis]]; });
      if (grid.labels) nodes[c] = grid.labels[i];
    }
    if (!grid.labels) {
      S sum = values[0] + values[1];
      for (int c = 2; c < 8; c += 2) sum += values[c] + values[c + 1];
      coarse[block] = sum;
      return;
    }
    KANTOR_UNROLL
    for (int c = 0; c < 8; ++c) {
      if (nodes[c] < 0) continue;
      S sum = values[c];
      KANTOR_UNROLL
      for (int other = c + 1; other < 8; ++other)
        if (nodes[other] == nodes[c]) {
          sum += values[other];
          nodes[other] = -1;  // summed here
        }
      coarse[nodes[c]] = sum;
    }
  });
}

// x += scale P coarse.
template <class S>
__global__ void grid_correction_kernel(GridLevel<S> grid, const S* coarse, S* x) {
  const int64_t by = grid.coarse(grid.ny), bx = grid.coarse(grid.nx);
  const S scale = *grid.scale;
  simt::grid_stride(grid.size(), [&](int64_t i) {
    const CellLinks<S> links = links_of(grid, i);
    if (!(links.inverse > 0)) {
      x[i] = 0;
      return;
    }
    const Place p = place_of(i, grid.ny, grid.nx);
    const PartnerSides partners{p.z % 2 != 0, p.y % 2 != 0, p.x % 2 != 0};
    const auto correction = [&](int64_t steps_z, int64_t steps_y, int64_t steps_x) {
      if (!grid.labels) return coarse[((p.z / 2 + steps_z) * by + p.y / 2 + steps_y) * bx + p.x / 2 + steps_x];
      const int32_t node = grid.labels[i + steps_z * grid.plane() + steps_y * grid.nx + steps_x];
      return node >= 0 ? coarse[node] : S(0);
    };
    // A step to the partner leads into the next block, in cells as in blocks.
    x[i] += scale * smoothed(links, partners, correction(0, 0, 0), [&](int axis) {
              return correction(axis != 0        ? 0
                                : partners.above ? 1
                                                 : -1,
                                axis != 1       ? 0
                                : partners.back ? 1
                                                : -1,
                                axis != 2        ? 0
                                : partners.right ? 1
                                                 : -1);
            });
  });
}

// --- graphs ---

template <class S>
__device__ __forceinline__ S row_sum(const Rows<S>& rows, int64_t i, const S* u, S sum = 0) {
  for (int32_t k = rows.crow[i]; k < rows.crow[i + 1]; ++k) sum += rows.values[k] * u[rows.col[k]];
  return sum;
}

// e = a sweep from zero, red and black at once as on grids.
template <class S>
__global__ void graph_start_kernel(GraphLevel<S> graph, const S* b, S* e) {
  const Rows<S>& links = graph.links;
  simt::grid_stride(graph.n, [&](int64_t t) {
    const bool is_red = t < graph.red_count;
    const int32_t i = is_red ? graph.red[t] : graph.black[t - graph.red_count];
    S sum = 0;
    if (!is_red)
      for (int32_t k = links.crow[i]; k < links.crow[i + 1]; ++k)
        sum += links.values[k] * (b[links.col[k]] * graph.inverse_diagonal[links.col[k]]);
    e[i] = (b[i] + sum) * graph.inverse_diagonal[i];
  });
}

template <class S>
__global__ void graph_half_sweep_kernel(GraphLevel<S> graph, Colour colour, const S* b, S* e) {
  const bool is_red = colour == Colour::red;
  const int32_t* nodes = is_red ? graph.red : graph.black;
  simt::grid_stride(is_red ? graph.red_count : graph.n - graph.red_count, [&](int64_t t) {
    const int32_t i = nodes[t];
    e[i] = (b[i] + row_sum(graph.links, i, e)) * graph.inverse_diagonal[i];
  });
}

// r = b - A e; r may be b. Keeps e in `saved` unless that is null.
template <class S>
__global__ void graph_residual_kernel(GraphLevel<S> graph, const S* b, const S* e, S* r, S* saved) {
  simt::grid_stride(graph.n, [&](int64_t i) {
    const S inverse = graph.inverse_diagonal[i];
    if (saved) saved[i] = e[i];
    r[i] = inverse > 0 ? b[i] - e[i] / inverse + row_sum(graph.links, i, e) : S(0);
  });
}

// y = or += rows u; and y += u.
template <class S>
__global__ void rows_kernel(int64_t n, Rows<S> rows, bool accumulate, const S* u, S* y) {
  simt::grid_stride(n, [&](int64_t i) { y[i] = row_sum(rows, i, u, accumulate ? y[i] : S(0)); });
}
template <class S>
__global__ void add_kernel(int64_t n, const S* u, S* y) {
  simt::grid_stride(n, [&](int64_t i) { y[i] += u[i]; });
}

// --- the last level ---

template <class S, class B, class Out>
__global__ void dense_kernel(int64_t n, const S* inverse, const B* b, Out* e) {
  simt::grid_stride(n, [&](int64_t i) {
    S sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += inverse[i * n + j] * S(b[j]);
    e[i] = static_cast<Out>(sum);
  });
}

// Unknowns of a factor that are kept in shared memory while it is solved with.
template <class S>
constexpr int64_t factor_shared_limit = (96 << 10) / sizeof(S);

// e = (L D L')^-1 b by one block: a warp goes through the columns, its lanes through the entries of each. Columns
// depend on each other and are short, so that it is latency that counts.
template <class S>
__global__ void factor_kernel(Factor<S> L, const S* b, S* e) {
  SIMT_DYNAMIC_SHARED(S, shared);
  S* u = L.n <= factor_shared_limit<S> ? shared : e;
  for (int64_t i = threadIdx.x; i < L.n; i += blockDim.x) u[i] = b[i];
  __syncthreads();
  if (simt::warp_index() == 0) {
    const auto lane = static_cast<int32_t>(simt::lane_index());
    for (int64_t k = 0; k < L.n; ++k) {
      const S value = u[L.order[k]];
      for (int32_t t = L.start[k] + lane; t < L.start[k + 1]; t += 32) u[L.row[t]] += L.share[t] * value;
      __syncwarp();
    }
    for (int64_t k = L.n - 1; k >= 0; --k) {
      S sum = 0;
      for (int32_t t = L.start[k] + lane; t < L.start[k + 1]; t += 32) sum += L.share[t] * u[L.row[t]];
      sum = simt::warp_sum(sum);
      if (lane == 0) u[L.order[k]] = L.inverse_pivot[k] * u[L.order[k]] + sum;
      __syncwarp();
    }
  }
  __syncthreads();
  if (u != e)
    for (int64_t i = threadIdx.x; i < L.n; i += blockDim.x) e[i] = u[i];
}

}  // namespace kantor::multigrid
