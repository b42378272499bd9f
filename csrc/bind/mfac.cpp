// Passes over a window of gradients, csrc/optim/mfac.h. G is (rows, stride), x and y are (count, d), products and
// coefficients (count, blocks, rows) in double. The functions write into G, out and y.
#include "optim/mfac.h"

#include <vector>

#include "bind/dispatch.h"
#include "bind/signals.h"
#include "bind/tensor_caster.h"

namespace py = pybind11;

namespace kantor {

template <>
constexpr Dtype dtype_of<int8_t>() {
  return Dtype::i8;
}
template <>
constexpr Dtype dtype_of<Half>() {
  return Dtype::f16;
}
template <>
constexpr Dtype dtype_of<Bfloat16>() {
  return Dtype::bf16;
}

namespace {

// body(S{}) for the type in which G is stored.
template <class Body>
void switch_storage(const Tensor& G, Body&& body) {
  if (G.dtype == Dtype::bf16) return body(Bfloat16{});
  if (G.dtype == Dtype::f16) return body(Half{});
  if (G.dtype == Dtype::i8) return body(int8_t{});
  switch_float(G, "mfac: G", body);
}

Window window_of(const Tensor& G, const Tensor& x, const Tensor& products, int64_t block) {
  require(G.ndim == 2 && x.ndim == 2 && products.ndim == 3,
          "mfac: expected G (rows, stride), x (count, d), products "
          "(count, blocks, rows)");
  const Window w{G.shape[0], x.shape[1], G.shape[1], block};
  require(w.rows >= 1 && w.d >= 1 && w.stride >= w.d && w.stride % 64 == 0 && block >= 1,
          "mfac: G: expected whole lines");
  require(products.shape[0] == x.shape[0] && products.shape[1] == w.blocks() && products.shape[2] == w.rows,
          "mfac: products: expected shape (count, blocks, rows)");
  for (const Tensor* t : {&x, &products}) require_same_device(G, *t, "mfac");
  return w;
}

int64_t bind_workspace(int64_t rows, int64_t d, int64_t block) { return products_workspace({rows, d, d, block}); }

void bind_products(const Tensor& G, int64_t block, int64_t slot, double inverse_scale, const Tensor& x,
                   const Tensor& out, const Tensor& workspace, int threads) {
  const Window w = window_of(G, x, out, block);
  require(slot < w.rows && (slot < 0 || x.shape[0] == 1), "mfac: slot: expected a row, and one vector");
  require(workspace.size() >= products_workspace(w), "mfac: workspace: expected more doubles");
  require_same_device(G, workspace, "mfac");
  switch_storage(G, [&]<class S>(S) {
    const Products<S> p{w,
                        elements<S>(G, "mfac: G").data(),
                        slot,
                        inverse_scale,
                        x.shape[0],
                        elements<const Wide<S>>(x, "mfac: x").data(),
                        elements<double>(out, "mfac: out").data(),
                        elements<double>(workspace, "mfac: workspace").data()};
    const Exec exec = exec_for(G, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(G)) return mfac_products_cuda(exec, p);
    mfac_products_cpu(exec, p);
  });
}

void bind_combine(const Tensor& G, int64_t block, const Tensor& c, double scale, const Tensor& x, const Tensor& y,
                  int threads) {
  const Window w = window_of(G, y, c, block);
  require(scale == 0 || x.size() == y.size(), "mfac: x: expected the shape of y");
  require_same_device(G, x, "mfac");
  switch_storage(G, [&]<class S>(S) {
    const Combination<S> p{w,
                           elements<const S>(G, "mfac: G").data(),
                           y.shape[0],
                           elements<const double>(c, "mfac: c").data(),
                           scale,
                           scale == 0 ? nullptr : elements<const Wide<S>>(x, "mfac: x").data(),
                           elements<Wide<S>>(y, "mfac: y").data()};
    const Exec exec = exec_for(G, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(G)) return mfac_combine_cuda(exec, p);
    mfac_combine_cpu(exec, p);
  });
}

int64_t bind_gram_workspace(int64_t rows, int64_t d, int64_t block) { return gram_workspace({rows, d, d, block}); }

// False where the device has CUDA code: there is none for this, and torch's product does.
bool bind_gram(const Tensor& G, int64_t d, int64_t block, const Tensor& out, const Tensor& workspace, int threads) {
  if (use_cuda_code(G)) return false;
  require(G.ndim == 2 && out.ndim == 3, "mfac: expected G (rows, stride), out (blocks, rows, rows)");
  const Window w{G.shape[0], d, G.shape[1], block};
  require(w.rows >= 1 && d >= 1 && w.stride >= d && block >= 1, "mfac: G: expected whole lines");
  require(out.shape[0] == w.blocks() && out.shape[1] == w.rows && out.shape[2] == w.rows &&
              workspace.size() >= gram_workspace(w),
          "mfac: out: expected shape (blocks, rows, rows)");
  for (const Tensor* t : {&out, &workspace}) require_same_device(G, *t, "mfac");
  switch_storage(G, [&]<class S>(S) {
    const Gram<S> p{w, elements<const S>(G, "mfac: G").data(), elements<double>(out, "mfac: out").data(),
                    elements<double>(workspace, "mfac: workspace").data()};
    const Exec exec = exec_for(G, threads);
    bool finished;
    {
      py::gil_scoped_release nogil;
      finished = mfac_gram_cpu(exec, p, SignalPoll());
    }
    if (finished) return;
    PyErr_SetNone(PyExc_KeyboardInterrupt);
    throw py::error_already_set();
  });
  return true;
}

// False where one of the blocks has to be factorised anew.
bool bind_replace(const Tensor& factors, int64_t slot, const Tensor& rows) {
  require_host(factors, "mfac: factors");
  require(factors.ndim == 3 && factors.shape[1] == factors.shape[2] && slot >= 0 && slot < factors.shape[1] &&
              rows.size() == factors.shape[0] * factors.shape[1],
          "mfac: factors: expected shape (blocks, m, m), rows (blocks, m)");
  const int64_t m = factors.shape[1];
  double* L = elements<double>(factors, "mfac: factors").data();
  double* s = elements<double>(rows, "mfac: rows").data();
  std::vector<double> work(m);
  py::gil_scoped_release nogil;
  for (int64_t b = 0; b < factors.shape[0]; ++b)
    if (!replace_in_cholesky(m, slot, s + b * m, L + b * m * m, work.data())) return false;
  return true;
}

}  // namespace

void bind_mfac(py::module_& m) {
  m.def("mfac_workspace", &bind_workspace);
  m.def("mfac_products", &bind_products);
  m.def("mfac_combine", &bind_combine);
  m.def("mfac_gram_workspace", &bind_gram_workspace);
  m.def("mfac_gram", &bind_gram);
  m.def("mfac_replace", &bind_replace);
}

}  // namespace kantor
