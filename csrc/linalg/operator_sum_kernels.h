// A whole sum of operators as a kernel argument: rows of the product in double, for true residuals.
#pragma once
#include <vector>

#include "linalg/operator_kernels.h"

namespace kantor {

// One of the forms of a sum, as a kernel argument.
template <class T>
struct DeviceTerm {
  OperatorKind kind;
  bool wide;  // 64-bit indices
  double scale;
  union {
    Dense<T> dense;
    Csr<T, int32_t> csr;
    Csr<T, int64_t> wide_csr;
    Stencil<T> stencil;
    FaceStencil<T> faces;
    Diagonal<T> diagonal;
    LowRank<T> low_rank;
    Poisson<T> poisson;
  };
};

template <class T>
struct DeviceTerms {
  static constexpr int most = 8;
  int count = 0;
  DeviceTerm<T> terms[most];
};

template <class T>
DeviceTerm<T> device_term(const OperatorTerm<T>& term) {
  DeviceTerm<T> out{};
  out.scale = term.scale;
  if (const auto* dense = std::get_if<Dense<T>>(&term.form)) out.kind = OperatorKind::dense, out.dense = *dense;
  if (const auto* csr = std::get_if<Csr<T, int32_t>>(&term.form)) out.kind = OperatorKind::csr, out.csr = *csr;
  if (const auto* csr = std::get_if<Csr<T, int64_t>>(&term.form))
    out.kind = OperatorKind::csr, out.wide = true, out.wide_csr = *csr;
  if (const auto* stencil = std::get_if<Stencil<T>>(&term.form))
    out.kind = OperatorKind::stencil, out.stencil = *stencil;
  if (const auto* faces = std::get_if<FaceStencil<T>>(&term.form)) out.kind = OperatorKind::faces, out.faces = *faces;
  if (const auto* d = std::get_if<Diagonal<T>>(&term.form)) out.kind = OperatorKind::diagonal, out.diagonal = *d;
  if (const auto* low = std::get_if<LowRank<T>>(&term.form)) out.kind = OperatorKind::low_rank, out.low_rank = *low;
  if (const auto* grid = std::get_if<Poisson<T>>(&term.form)) out.kind = OperatorKind::poisson, out.poisson = *grid;
  return out;
}

template <class T>
__device__ __forceinline__ double row_product(const DeviceTerm<T>& term, int64_t k, const T* x, int64_t i) {
  switch (term.kind) {
    case OperatorKind::dense:
      return row_product<double>(term.dense, x, i);
    case OperatorKind::csr:
      return term.wide ? row_product<double>(term.wide_csr, x, i) : row_product<double>(term.csr, x, i);
    case OperatorKind::stencil:
      return row_product<double>(term.stencil, x, i);
    case OperatorKind::faces:
      return row_product<double>(term.faces, x, i);
    case OperatorKind::low_rank:
      return row_product<double>(form_for_vector(term.low_rank, k), x, i);
    case OperatorKind::poisson:
      return row_product<double>(term.poisson, x, i);
    default:
      return row_product<double>(term.diagonal, x, i);
  }
}

// The terms of A in groups that one kernel takes; one empty group without A.
template <class T>
std::vector<DeviceTerms<T>> device_terms(const Operator<T>* A) {
  std::vector<DeviceTerms<T>> groups(1);
  if (!A) return groups;
  for (const OperatorTerm<T>& term : A->terms) {
    if (groups.back().count == DeviceTerms<T>::most) groups.emplace_back();
    groups.back().terms[groups.back().count++] = device_term(term);
  }
  return groups;
}

// Row i of scale_1 A_1 x + ... for vector k of a batch.
template <class T>
__device__ __forceinline__ double row_product(const DeviceTerms<T>& A, int64_t k, const T* x, int64_t i) {
  double sum = 0;
  for (int t = 0; t < A.count; ++t) sum += A.terms[t].scale * row_product(A.terms[t], k, x, i);
  return sum;
}

}  // namespace kantor
