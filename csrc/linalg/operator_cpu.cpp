#include "linalg/operator.h"

#include <cmath>

#include "core/reduce.h"
#include "core/simd.h"
#include "linalg/vector.h"

namespace kantor {
namespace {

// Each form writes or adds to rows [rows.begin, rows.end) of the product; y points at the first of these rows.

template <class Out, class T>
KANTOR_SIMD void dense_rows(const Dense<T>& A, double scale, const T* x, Out* y, Range rows, bool accumulate) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const T* row = A.values + i * A.cols;
    const double sum = lane_sum(
        A.cols, [=](int64_t j) KANTOR_INLINE_LAMBDA { return load8(row + j) * load8(x + j); },
        [=](int64_t j) KANTOR_INLINE_LAMBDA { return double(row[j]) * double(x[j]); });
    Out& target = y[i - rows.begin];
    target = static_cast<Out>(scale * sum) + (accumulate ? target : Out(0));
  }
}

// One row. Short rows, the usual case, want as few instructions as possible: neighbouring rows overlap in the processor
// anyway. In long ones four chains hide the latency of the additions.
template <class T, class Index>
KANTOR_ALWAYS_INLINE double csr_row(const T* values, const Index* col, const T* x, Index begin, Index end) {
  double sum = 0;
  Index k = begin;
  if (end - begin >= 16) {
    double a = 0, b = 0, c = 0;
    for (; k + 4 <= end; k += 4) {
      sum += double(values[k]) * double(x[col[k]]);
      a += double(values[k + 1]) * double(x[col[k + 1]]);
      b += double(values[k + 2]) * double(x[col[k + 2]]);
      c += double(values[k + 3]) * double(x[col[k + 3]]);
    }
    sum = (sum + a) + (b + c);
  }
  for (; k < end; ++k) sum += double(values[k]) * double(x[col[k]]);
  return sum;
}

template <class Out, class T, class Index>
KANTOR_SIMD void csr_rows(const Csr<T, Index>& A, double scale, const T* x, Out* __restrict y, Range rows,
                          bool accumulate) {
  const Index *crow = A.crow, *col = A.col;
  const T* values = A.values;
  Index begin = crow[rows.begin];
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const Index end = crow[i + 1];
    const Out value = static_cast<Out>(scale * csr_row(values, col, x, begin, end));
    Out& target = y[i - rows.begin];
    target = accumulate ? target + value : value;
    begin = end;
  }
}

// A grid row and its four neighbour rows. A neighbour outside the grid points at the centre row with weight 0
// (Dirichlet) or full weight (Neumann: the border value continues), so that the inner loops have no branches.
template <class T>
struct GridRow {
  const T *centre, *below, *above, *front, *back;
};

template <class Out>
struct StencilWeights {
  Out diagonal, below, above, front, back, x;
};

// Cells begin..end-1, all with a left and a right neighbour in memory; y[i] belongs to cell i.
template <class Out, class T>
KANTOR_SIMD void stencil_cells(const GridRow<T>& row, const StencilWeights<Out>& weights, int64_t begin, int64_t end,
                               Out* __restrict y, bool accumulate) {
  // Local copies: the compiler cannot tell that the members do not change while y is written.
  const T *c = row.centre, *below = row.below, *above = row.above, *front = row.front, *back = row.back;
  const StencilWeights<Out> w = weights;
  if (accumulate)
    for (int64_t i = begin; i < end; ++i)
      y[i] += (w.diagonal * Out(c[i]) - w.x * (Out(c[i - 1]) + Out(c[i + 1]))) -
              ((w.front * Out(front[i]) + w.back * Out(back[i])) + (w.below * Out(below[i]) + w.above * Out(above[i])));
  else
    for (int64_t i = begin; i < end; ++i)
      y[i] = (w.diagonal * Out(c[i]) - w.x * (Out(c[i - 1]) + Out(c[i + 1]))) -
             ((w.front * Out(front[i]) + w.back * Out(back[i])) + (w.below * Out(below[i]) + w.above * Out(above[i])));
}

// The first (left) or last cell of a grid row of nx cells.
template <class Out, class T>
Out stencil_border(const GridRow<T>& row, const StencilWeights<Out>& w, bool neumann_x, bool left, bool right,
                   int64_t i) {
  const Out outside = neumann_x ? Out(row.centre[i]) : Out(0);
  const Out sides = (left ? outside : Out(row.centre[i - 1])) + (right ? outside : Out(row.centre[i + 1]));
  return (w.diagonal * Out(row.centre[i]) - w.x * sides) -
         ((w.front * Out(row.front[i]) + w.back * Out(row.back[i])) +
          (w.below * Out(row.below[i]) + w.above * Out(row.above[i])));
}

// Cells begin..end-1 of consecutive grid rows that share weights and pointer offsets, counted from a row's first cell.
// Written through over the row ends, where the neighbour in memory is not the neighbour in the grid: one long loop that
// stays aligned. The two border cells of each row are then done anew. `first` and `last` bound the vector itself.
template <class Out, class T>
void stencil_stretch(const GridRow<T>& row, const StencilWeights<Out>& w, bool neumann_x, int64_t nx, int64_t begin,
                     int64_t end, int64_t first, int64_t last, Out* y) {
  const int64_t from = std::max(begin, first + 1), to = std::min(end, last - 1);
  if (from < to) stencil_cells<Out, T>(row, w, from, to, y, false);
  for (int64_t start = begin / nx * nx; start < end; start += nx) {
    const int64_t stop = start + nx - 1;
    if (start >= begin) y[start] = stencil_border(row, w, neumann_x, true, nx == 1, start);
    if (stop < end && nx > 1) y[stop] = stencil_border(row, w, neumann_x, false, true, stop);
  }
}

// The same for one grid row, adding to y.
template <class Out, class T>
void stencil_row_add(const GridRow<T>& row, const StencilWeights<Out>& w, bool neumann_x, int64_t nx, int64_t begin,
                     int64_t end, Out* y) {
  const int64_t from = std::max<int64_t>(begin, 1), to = std::min<int64_t>(end, nx - 1);
  if (from < to) stencil_cells<Out, T>(row, w, from, to, y, true);
  if (begin == 0) y[0] += stencil_border(row, w, neumann_x, true, nx == 1, 0);
  if (end == nx && nx > 1) y[nx - 1] += stencil_border(row, w, neumann_x, false, true, nx - 1);
}

// Calls row(z, y, begin, end, offset) for every stretch of a grid row inside `rows`; offset is its position in y.
template <class Row>
void for_each_grid_row(int64_t ny, int64_t nx, Range rows, Row&& row) {
  for (int64_t i = rows.begin; i < rows.end;) {
    const int64_t line = i / nx, begin = i - line * nx;
    const int64_t end = std::min(nx, begin + rows.end - i);
    row(line / ny, line % ny, begin, end, i - rows.begin);
    i += end - begin;
  }
}

template <class T>
GridRow<T> grid_row(const T* centre, int64_t nz, int64_t ny, int64_t nx, int64_t iz, int64_t iy) {
  return {centre, iz > 0 ? centre - ny * nx : centre, iz + 1 < nz ? centre + ny * nx : centre,
          iy > 0 ? centre - nx : centre, iy + 1 < ny ? centre + nx : centre};
}

template <class Out, class T>
void stencil_rows(const Stencil<T>& A, double scale, const T* x, Out* y, Range rows, bool accumulate) {
  const double shift = A.weights[0], wz = A.weights[1], wy = A.weights[2], wx = A.weights[3];
  for (int64_t i = rows.begin; i < rows.end;) {
    const int64_t line = i / A.nx, iz = line / A.ny, iy = line % A.ny, start = line * A.nx;
    const bool below = iz > 0, above = iz + 1 < A.nz, front = iy > 0, back = iy + 1 < A.ny;
    // Grid rows with all neighbours inside form one stretch up to the last such row of the plane; others stand alone.
    const bool interior = below && above && front && back && !accumulate;
    const int64_t lines_end = interior ? iz * A.ny + A.ny - 1 : line + 1;
    const int64_t end = std::min(rows.end, lines_end * A.nx);
    const StencilWeights<Out> w{Out(scale * (shift + 2 * (wz + wy + wx))),  Out(below || A.neumann_z ? scale * wz : 0),
                                Out(above || A.neumann_z ? scale * wz : 0), Out(front || A.neumann_y ? scale * wy : 0),
                                Out(back || A.neumann_y ? scale * wy : 0),  Out(scale * wx)};
    const GridRow<T> row = grid_row(x + start, A.nz, A.ny, A.nx, iz, iy);
    Out* target = y + (start - rows.begin);
    if (accumulate)
      stencil_row_add(row, w, A.neumann_x, A.nx, i - start, end - start, target);
    else
      stencil_stretch(row, w, A.neumann_x, A.nx, i - start, end - start, -start, A.nz * A.ny * A.nx - start, target);
    i = end;
  }
}

// One grid row with face coefficients; the faces' pointers are those of cell 0 of the row.
template <class T>
struct FaceRow {
  GridRow<T> u;
  const T *z0, *z1, *y0, *y1, *x;  // y0, y1 null on a two-dimensional grid
  T below, above, front, back;     // 1, or 0 where that neighbour is outside the grid
};

template <bool three_dimensional, class Out, class T>
KANTOR_SIMD void face_row(const FaceRow<T>& r, double scale, double shift, int64_t nx, int64_t begin, int64_t end,
                          Out* __restrict y, bool accumulate) {
  const FaceRow<T> row = r;
  const GridRow<T> u = r.u;
  const Out s = static_cast<Out>(shift), a = static_cast<Out>(scale);
  const auto cell = [=](int64_t i, Out left, Out right) KANTOR_INLINE_LAMBDA {
    const Out centre = u.centre[i];
    Out sum = s * centre + Out(row.x[i]) * (centre - left) + Out(row.x[i + 1]) * (centre - right) +
              Out(row.z0[i]) * (centre - Out(row.below * u.below[i])) +
              Out(row.z1[i]) * (centre - Out(row.above * u.above[i]));
    if constexpr (three_dimensional)
      sum += Out(row.y0[i]) * (centre - Out(row.front * u.front[i])) +
             Out(row.y1[i]) * (centre - Out(row.back * u.back[i]));
    return a * sum;
  };
  const auto border = [=](int64_t i) KANTOR_INLINE_LAMBDA {
    const Out value = cell(i, i > 0 ? Out(u.centre[i - 1]) : Out(0), i + 1 < nx ? Out(u.centre[i + 1]) : Out(0));
    y[i] = accumulate ? y[i] + value : value;
  };
  if (begin == 0) border(0);
  const int64_t first = std::max<int64_t>(begin, 1), last = std::min<int64_t>(end, nx - 1);
  // ivdep: y overlaps none of the many arrays read, which the compiler would otherwise check one by one, or give up.
  if (accumulate) {
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) y[i] += cell(i, Out(u.centre[i - 1]), Out(u.centre[i + 1]));
  } else {
#pragma GCC ivdep
    for (int64_t i = first; i < last; ++i) y[i] = cell(i, Out(u.centre[i - 1]), Out(u.centre[i + 1]));
  }
  if (end == nx && nx > 1) border(nx - 1);
}

template <class Out, class T>
void face_rows(const FaceStencil<T>& A, double scale, const T* x, Out* y, Range rows, bool accumulate) {
  const int64_t plane = A.ny * A.nx;
  for_each_grid_row(A.ny, A.nx, rows, [&](int64_t iz, int64_t iy, int64_t begin, int64_t end, int64_t offset) {
    const int64_t line = iz * A.ny + iy;
    FaceRow<T> row{};
    row.u = grid_row(x + line * A.nx, A.nz, A.ny, A.nx, iz, iy);
    row.z0 = A.fz + line * A.nx;
    row.z1 = row.z0 + plane;
    row.y0 = A.fy ? A.fy + (iz * (A.ny + 1) + iy) * A.nx : nullptr;
    row.y1 = A.fy ? row.y0 + A.nx : nullptr;
    row.x = A.fx + line * (A.nx + 1);
    row.below = T(iz > 0), row.above = T(iz + 1 < A.nz), row.front = T(iy > 0), row.back = T(iy + 1 < A.ny);
    const auto apply = A.fy ? face_row<true, Out, T> : face_row<false, Out, T>;
    apply(row, scale, double(*A.shift), A.nx, begin, end, y + (offset - begin), accumulate);
  });
}

// Cells begin..end-1; all pointers are those of the vector's element `begin`. No branch but the links': a bit that is
// not set leaves its neighbour unread in effect, whatever lies there.
template <class Out, class T>
KANTOR_SIMD void poisson_cells(const uint16_t* cells, const T* centre, const T* below, const T* above, const T* front,
                               const T* back, int64_t n, double scale, Out* __restrict y, bool accumulate) {
  const Out a = static_cast<Out>(scale);
  const auto value = [=](int64_t i) KANTOR_INLINE_LAMBDA {
    const unsigned cell = cells[i];
    // Loaded whatever the links say: loads under a mask are not fetched ahead.
    const T u_below = below[i], u_above = above[i], u_front = front[i], u_back = back[i];
    const T u_left = centre[i - 1], u_right = centre[i + 1], u = centre[i];
    const Out sum_z = Out(cell & 1 ? u_below : T(0)) + Out(cell & 2 ? u_above : T(0));
    const Out sum_y = Out(cell & 4 ? u_front : T(0)) + Out(cell & 8 ? u_back : T(0));
    const Out sum_x = Out(cell & 16 ? u_left : T(0)) + Out(cell & 32 ? u_right : T(0));
    const Out own = Out(int(cell >> 8)) * Out(cell >> 8 ? u : T(0));
    return a * (own - (sum_x + (sum_y + sum_z)));
  };
  if (accumulate) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] += value(i);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = value(i);
  }
}

// Rows of the flat vector in stretches within which all neighbours, linked or not, lie inside the vector; a neighbour
// that would lie outside is replaced by the cell itself, which costs nothing: no link points there.
template <class Out, class T>
void poisson_rows(const Poisson<T>& A, double scale, const T* x, Out* y, Range rows, bool accumulate) {
  const int64_t plane = A.ny * A.nx, n = A.nz * plane;
  const int64_t cuts[] = {1, A.nx, plane, n - plane, n - A.nx, n - 1, n};
  for (int64_t i = rows.begin; i < rows.end;) {
    int64_t end = rows.end;
    for (const int64_t cut : cuts)
      if (cut > i) end = std::min(end, cut);
    const auto neighbour = [&](int64_t offset) {
      return i + offset >= 0 && end - 1 + offset < n ? x + i + offset : x + i;
    };
    if (i == 0 || i == n - 1) {  // the neighbour to the left, or right, lies outside the vector
      const unsigned cell = A.cells[i];
      Out sum = cell >> 8 ? Out(int(cell >> 8)) * Out(x[i]) : Out(0);
      const int64_t offsets[] = {-plane, plane, -A.nx, A.nx, -1, 1};
      for (int side = 0; side < 6; ++side)
        if (cell >> side & 1) sum -= Out(x[i + offsets[side]]);
      Out& target = y[i - rows.begin];
      target = static_cast<Out>(scale) * sum + (accumulate ? target : Out(0));
      end = i + 1;
    } else {
      poisson_cells<Out, T>(A.cells + i, x + i, neighbour(-plane), neighbour(plane), neighbour(-A.nx), neighbour(A.nx),
                            end - i, scale, y + (i - rows.begin), accumulate);
    }
    i = end;
  }
}

template <class Out, class T>
KANTOR_SIMD void diagonal_rows(const Diagonal<T>& A, double scale, const T* x, Out* __restrict y, Range rows,
                               bool accumulate) {
  const T *d = A.values + rows.begin, *u = x + rows.begin;
  const Out a = static_cast<Out>(scale);
  for (int64_t i = 0; i < rows.size(); ++i) y[i] = a * Out(d[i]) * Out(u[i]) + (accumulate ? y[i] : Out(0));
}

template <class T>
struct ApplyRows {
  template <class Out>
  struct To {
    double scale;
    int64_t k;
    const T* x;
    Out* y;
    Range rows;
    bool accumulate;
    void operator()(const Dense<T>& A) const { dense_rows<Out, T>(A, scale, x, y, rows, accumulate); }
    void operator()(const Csr<T, int32_t>& A) const { csr_rows<Out, T, int32_t>(A, scale, x, y, rows, accumulate); }
    void operator()(const Csr<T, int64_t>& A) const { csr_rows<Out, T, int64_t>(A, scale, x, y, rows, accumulate); }
    void operator()(const Stencil<T>& A) const { stencil_rows(A, scale, x, y, rows, accumulate); }
    void operator()(const FaceStencil<T>& A) const { face_rows(A, scale, x, y, rows, accumulate); }
    void operator()(const Diagonal<T>& A) const { diagonal_rows<Out, T>(A, scale, x, y, rows, accumulate); }
    void operator()(const LowRank<T>& A) const { low_rank_rows(A, scale, k, y, rows, accumulate); }
    void operator()(const Poisson<T>& A) const { poisson_rows(A, scale, x, y, rows, accumulate); }
  };
};

template <class... F>
struct Overloaded : F... {
  using F::operator()...;
};
template <class... F>
Overloaded(F...) -> Overloaded<F...>;

}  // namespace

template <class T, class Out>
void apply_rows(const Operator<T>& A, int64_t k, const T* x, Out* y, Range rows) {
  bool accumulate = false;
  for (const OperatorTerm<T>& term : A.terms) {
    std::visit(typename ApplyRows<T>::template To<Out>{term.scale, k, x, y, rows, accumulate}, term.form);
    accumulate = true;
  }
}

template <class T>
int64_t halo_of(const Operator<T>& A) {
  int64_t halo = 0;
  for (const OperatorTerm<T>& term : A.terms)
    halo = std::max(
        halo,
        std::visit(
            Overloaded{[](const Dense<T>& a) { return a.cols; }, [](const Csr<T, int32_t>& a) { return a.halo; },
                       [](const Csr<T, int64_t>& a) { return a.halo; }, [](const Stencil<T>& a) { return a.ny * a.nx; },
                       [](const FaceStencil<T>& a) { return a.ny * a.nx; },
                       [](const Diagonal<T>&) { return int64_t{0}; }, [](const LowRank<T>&) { return int64_t{0}; },
                       [](const Poisson<T>& a) { return a.ny * a.nx; }},
            term.form));
  return halo;
}

template <class T>
double words_per_row(const Operator<T>& A) {
  double words = 0;
  for (const OperatorTerm<T>& term : A.terms)
    words += std::visit(
        Overloaded{[](const Dense<T>& a) { return double(a.cols); },
                   [](const Csr<T, int32_t>& a) { return 1.5 * double(a.nnz) / double(std::max<int64_t>(a.rows, 1)); },
                   [](const Csr<T, int64_t>& a) { return 2.0 * double(a.nnz) / double(std::max<int64_t>(a.rows, 1)); },
                   [](const Stencil<T>&) { return 0.0; }, [](const FaceStencil<T>& a) { return a.fy ? 3.0 : 2.0; },
                   [](const Diagonal<T>&) { return 1.0; }, [](const Poisson<T>&) { return 2.0 / sizeof(T); },
                   [](const LowRank<T>& a) { return a.reads_once() ? 1.0 : double(a.rank); }},
        term.form);
  return words;
}

template <class T>
Chunks chunks_of(const Operator<T>& A) {
  const double words = std::max(1.0, words_per_row(A) / 16);
  // Low-rank factors alone are read along the rows' direction, where short pieces waste what each line of memory
  // brings.
  const bool only_low_rank = std::ranges::all_of(A.terms, [](const OperatorTerm<T>& term) {
    return std::holds_alternative<LowRank<T>>(term.form) || std::holds_alternative<Diagonal<T>>(term.form);
  });
  const int64_t least = only_low_rank ? 1024 : 8;
  return {A.rows, std::max(least, static_cast<int64_t>(double(chunk_size) / words))};
}

template <class T>
int64_t work_of(const Operator<T>& A, int64_t batch) {
  double words = words_per_row(A);
  for (const OperatorTerm<T>& term : A.terms)  // and the projections
    if (const auto* low = std::get_if<LowRank<T>>(&term.form)) words += double(low->rank);
  return static_cast<int64_t>(std::min(double(A.rows) * double(batch) * (1 + words / 4), 1e18));
}

template <class T>
int64_t projections_size(const Operator<T>& A) {
  int64_t size = 0;
  for (const OperatorTerm<T>& term : A.terms)
    if (const auto* low = std::get_if<LowRank<T>>(&term.form)) size += low->projections_size();
  return size;
}

template <class T>
void place_projections(Operator<T>& A, int64_t batch, double* projections) {
  for (OperatorTerm<T>& term : A.terms)
    if (auto* low = std::get_if<LowRank<T>>(&term.form)) {
      low->projections = projections;
      low->projections_stride = low->projections_size();
      projections += batch * low->projections_stride;
    }
}

template <class T>
void matvec_cpu(const Exec& exec, const Operator<T>& A, int64_t batch, const T* x, T* y) {
  const Chunks chunks = chunks_of(A);
  const int threads = threads_for(exec.threads, work_of(A, batch));
  Team::run(threads, true, [&](Team& team) {
    project(team, A, batch, x, [](int64_t) { return true; });
    // Chunk by chunk, all vectors of the batch before the next chunk: the operator's data is read once for all of them.
    team.for_each(chunks.count() * batch, [&](int64_t item) {
      const int64_t chunk = item / batch, k = item % batch;
      const Range rows = chunks.range(chunk);
      apply_rows(A, k, x + k * A.cols, y + k * A.rows + rows.begin, rows);
    });
  });
}

template void apply_rows(const Operator<float>&, int64_t, const float*, float*, Range);
template void apply_rows(const Operator<float>&, int64_t, const float*, double*, Range);
template void apply_rows(const Operator<double>&, int64_t, const double*, double*, Range);
template int64_t projections_size(const Operator<float>&);
template int64_t projections_size(const Operator<double>&);
template void place_projections(Operator<float>&, int64_t, double*);
template void place_projections(Operator<double>&, int64_t, double*);
template int64_t halo_of(const Operator<float>&);
template int64_t halo_of(const Operator<double>&);
template double words_per_row(const Operator<float>&);
template double words_per_row(const Operator<double>&);
template Chunks chunks_of(const Operator<float>&);
template Chunks chunks_of(const Operator<double>&);
template int64_t work_of(const Operator<float>&, int64_t);
template int64_t work_of(const Operator<double>&, int64_t);
template void matvec_cpu(const Exec&, const Operator<float>&, int64_t, const float*, float*);
template void matvec_cpu(const Exec&, const Operator<double>&, int64_t, const double*, double*);

}  // namespace kantor
