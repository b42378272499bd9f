// Decodes the (operands, layout, scales) encoding of linalg/operator.h into views.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.h"
#include "linalg/preconditioner.h"

namespace kantor {

struct OperatorArgs {
  std::vector<Tensor> operands;
  std::vector<int64_t> layout;
  std::vector<double> scales;
};

class OperatorReader {
 public:
  OperatorReader(const OperatorArgs& args, const Tensor& like) : args_(args), like_(like) {}

  bool done() const { return position_ == args_.layout.size(); }
  int64_t peek() const { return args_.layout.at(position_); }

  template <class T>
  OperatorTerm<T> term() {
    require(scale_ < args_.scales.size(), "operator: fewer scales than terms");
    const double scale = args_.scales[scale_++];
    switch (static_cast<OperatorKind>(next())) {
      case OperatorKind::dense: {
        const int64_t rows = next(), cols = next();
        return {scale, Dense<T>{rows, cols, operand<const T>(rows * cols)}};
      }
      case OperatorKind::csr: {
        const int64_t rows = next(), cols = next(), halo = next();
        if (operand_at(0).dtype == Dtype::i64) return {scale, csr<T, int64_t>(rows, cols, halo)};
        return {scale, csr<T, int32_t>(rows, cols, halo)};
      }
      case OperatorKind::stencil: {
        Stencil<T> A{};
        A.nz = next(), A.ny = next(), A.nx = next();
        A.neumann_z = next() != 0, A.neumann_y = next() != 0, A.neumann_x = next() != 0;
        A.weights = operand<const T>(4);
        return {scale, A};
      }
      case OperatorKind::faces: {
        FaceStencil<T> A{};
        A.nz = next(), A.ny = next(), A.nx = next();
        const bool three_dimensional = next() == 3;
        A.shift = operand<const T>(1);
        A.fz = operand<const T>((A.nz + 1) * A.ny * A.nx);
        A.fy = three_dimensional ? operand<const T>(A.nz * (A.ny + 1) * A.nx) : nullptr;
        A.fx = operand<const T>(A.nz * A.ny * (A.nx + 1));
        return {scale, A};
      }
      case OperatorKind::diagonal: {
        const int64_t n = next();
        return {scale, Diagonal<T>{n, operand<const T>(n)}};
      }
      case OperatorKind::low_rank: {
        const int64_t n = next(), rank = next();
        const T* factors = operand<const T>(rank * n);
        return {scale, LowRank<T>{n, rank, factors, operand<const T>(rank), nullptr, 0}};
      }
      case OperatorKind::poisson: {
        Poisson<T> A{};
        A.nz = next(), A.ny = next(), A.nx = next();
        A.cells = reinterpret_cast<const uint16_t*>(operand<const uint8_t>(2 * A.nz * A.ny * A.nx));
        return {scale, A};
      }
      default:
        throw std::invalid_argument("operator: unknown kind in the layout");
    }
  }

  template <class T>
  IncompleteCholesky<T> incomplete_cholesky() {
    ++scale_;
    require(next() == int64_t(OperatorKind::incomplete_cholesky),
            "preconditioner: expected an incomplete Cholesky factor");
    IncompleteCholesky<T> M{};
    M.n = next(), M.levels = next();
    for (TriangularFactor<T>* factor : {&M.lower, &M.upper}) {
      factor->crow = operand<const int32_t>(M.n + 1);
      const int64_t nnz = operand_at(0).size();
      factor->col = operand<const int32_t>(nnz);
      factor->values = operand<const T>(nnz);
    }
    M.level_pointers = operand<const int32_t>(M.levels + 1);
    M.rows = operand<const int32_t>(M.n);
    return M;
  }

  Multigrid multigrid() {
    ++scale_;
    require(next() == int64_t(OperatorKind::multigrid), "preconditioner: expected a multigrid hierarchy");
    const int64_t n = next(), width = next(), smoother = next(), sweeps = next(), levels = next();
    require(levels >= 1 && levels <= 64 && sweeps >= 1 && (width == 4 || width == 8), "multigrid: malformed layout");
    std::vector<LevelLayout> layouts(static_cast<size_t>(levels));
    for (LevelLayout& layout : layouts)
      for (int64_t i = 0; i < level_layout_size; ++i) reinterpret_cast<int64_t*>(&layout)[i] = next();
    const Tensor& arena_tensor = operand_at(0);
    const auto* arena = reinterpret_cast<const std::byte*>(operand<const uint8_t>(arena_tensor.size()));
    const int64_t bytes = operand_at(0).size();
    void* workspace = operand<uint8_t>(bytes);
    Multigrid M{{}, workspace};
    const auto smoothing = static_cast<GridSmoother>(smoother);
    if (width == 4)
      M.hierarchy = hierarchy_view<float>(layouts, arena, smoothing, sweeps);
    else
      M.hierarchy = hierarchy_view<double>(layouts, arena, smoothing, sweeps);
    require(M.n() == n, "multigrid: the layout does not match its first level");
    std::visit([&](auto& h) { h.workers = workers_for(h, bytes); }, M.hierarchy);
    return M;
  }

  template <class T>
  Operator<T> whole_operator() {
    Operator<T> A;
    while (!done()) A.terms.push_back(term<T>());
    require(!A.terms.empty(), "operator: no terms");
    std::tie(A.rows, A.cols) = shape_of(A.terms.front());
    for (const OperatorTerm<T>& term : A.terms)
      require(shape_of(term) == std::pair(A.rows, A.cols), "operator: the terms of a sum differ in shape");
    return A;
  }

 private:
  int64_t next() {
    require(position_ < args_.layout.size(), "operator: the layout ends early");
    return args_.layout[position_++];
  }

  const Tensor& operand_at(size_t ahead) const {
    require(operand_ + ahead < args_.operands.size(), "operator: fewer operands than its layout asks for");
    return args_.operands[operand_ + ahead];
  }

  // The next operand's elements.
  template <class E>
  E* operand(int64_t size) {
    const Tensor& tensor = operand_at(0);
    ++operand_;
    require_same_device(tensor, like_, "operator and vector");
    const auto span = elements<E>(tensor, "operator");
    require(static_cast<int64_t>(span.size()) == size, "operator: an operand has the wrong number of elements");
    return span.data();
  }

  template <class T, class Index>
  Csr<T, Index> csr(int64_t rows, int64_t cols, int64_t halo) {
    const Index* crow = operand<const Index>(rows + 1);
    const int64_t nnz = operand_at(0).size();
    const Index* col = operand<const Index>(nnz);
    return {rows, cols, nnz, halo, crow, col, operand<const T>(nnz)};
  }

  template <class T>
  static std::pair<int64_t, int64_t> shape_of(const OperatorTerm<T>& term) {
    return std::visit(
        [](const auto& A) -> std::pair<int64_t, int64_t> {
          if constexpr (requires { A.rows; })
            return {A.rows, A.cols};
          else if constexpr (requires { A.nz; })
            return {A.nz * A.ny * A.nx, A.nz * A.ny * A.nx};
          else
            return {A.n, A.n};
        },
        term.form);
  }

  const OperatorArgs& args_;
  const Tensor& like_;
  size_t position_ = 0, operand_ = 0, scale_ = 0;
};

template <class T>
Operator<T> read_operator(const OperatorArgs& args, const Tensor& like) {
  return OperatorReader(args, like).whole_operator<T>();
}

// Doubles of workspace for one vector's projections, which the low-rank terms of an operator ask for.
inline int64_t projections_size_of(const std::vector<int64_t>& layout) {
  constexpr size_t integers[] = {2, 3, 6, 4, 1, 2, 2, 3};  // after the kind
  int64_t size = 0;
  for (size_t at = 0; at < layout.size(); at += 1 + integers[layout[at]]) {
    require(layout[at] >= 0 && layout[at] < int64_t(std::size(integers)) && at + integers[layout[at]] < layout.size(),
            "operator: unknown kind in the layout, or the layout ends early");
    if (layout[at] == int64_t(OperatorKind::low_rank))
      size += LowRank<double>{layout[at + 1], layout[at + 2], nullptr, nullptr, nullptr, 0}.projections_size();
  }
  return size;
}

// The part of a workspace that is not handed out yet.
class Projections {
 public:
  Projections(const std::optional<Tensor>& workspace, const Tensor& like) {
    if (!workspace) return;
    require_same_device(*workspace, like, "projections and vector");
    left_ = elements<double>(*workspace, "projections");
  }

  template <class T>
  void place(Operator<T>& A, int64_t batch) {
    const auto size = static_cast<size_t>(batch * projections_size(A));
    require(size <= left_.size(), "operator: the workspace for projections is too small");
    place_projections(A, batch, left_.data());
    left_ = left_.subspan(size);
  }

 private:
  std::span<double> left_;
};

// An empty layout means none.
template <class T>
Preconditioner<T> read_preconditioner(const OperatorArgs& args, const Tensor& like) {
  OperatorReader reader(args, like);
  if (reader.done()) return std::monostate{};
  if (reader.peek() == int64_t(OperatorKind::incomplete_cholesky)) return reader.incomplete_cholesky<T>();
  if (reader.peek() == int64_t(OperatorKind::multigrid)) return reader.multigrid();
  Operator<T> M = reader.whole_operator<T>();
  if (M.terms.size() == 1 && M.terms.front().scale == 1.0)
    if (const auto* d = std::get_if<Diagonal<T>>(&M.terms.front().form)) return *d;
  return M;
}

}  // namespace kantor
