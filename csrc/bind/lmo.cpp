// The elementwise passes of optim.LANTON over lists of tensors, in place. Tensors of a list are of one dtype and
// device.
#include <pybind11/stl.h>

#include "bind/dispatch.h"
#include "bind/tensor_caster.h"
#include "optim/lmo.h"

namespace py = pybind11;

namespace kantor {
namespace {

using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

// The elements of a tensor that belongs to `like`.
template <class T>
T* beside(const Tensor& like, const Tensor& tensor, const char* argument) {
  require_same_device(like, tensor, argument);
  require(tensor.size() == like.size(), std::string(argument) + ": expected as many elements as the gradient has");
  return elements<T>(tensor, argument).data();
}

double* doubles(const Tensor& like, const Tensor& tensor, int64_t size, const char* argument) {
  require_same_device(like, tensor, argument);
  require(tensor.size() >= size, std::string(argument) + ": expected more elements");
  return elements<double>(tensor, argument).data();
}

void bind_momentum(const Tensors& grads, const Tensors& momenta, const Tensors& inputs, const Optionals& previous,
                   const Optionals& differences, const std::vector<double>& betas, const std::vector<int>& flags,
                   const Tensor& accepted, const Tensor& sums, const Tensor& work, int threads) {
  const size_t count = grads.size();
  require(count > 0 && momenta.size() == count && inputs.size() == count && previous.size() == count &&
              differences.size() == count && betas.size() == count && flags.size() == count,
          "lmo_momentum: expected lists of one length");
  switch_float(grads[0], "lmo_momentum: grads", [&]<class T>(T) {
    std::vector<MomentumItem<T>> items;
    int64_t needed = 0;
    for (size_t k = 0; k < count; ++k) {
      const Tensor& grad = grads[k];
      require_same_device(grads[0], grad, "lmo_momentum: grads");
      items.push_back({grad.size(), elements<const T>(grad, "lmo_momentum: grads").data(),
                       beside<T>(grad, momenta[k], "lmo_momentum: momenta"),
                       beside<T>(grad, inputs[k], "lmo_momentum: inputs"),
                       previous[k] ? beside<T>(grad, *previous[k], "lmo_momentum: previous") : nullptr,
                       differences[k] ? beside<T>(grad, *differences[k], "lmo_momentum: differences") : nullptr,
                       betas[k], flags[k]});
      needed += momentum_work(grad.size());
    }
    const int64_t n = static_cast<int64_t>(count);
    const double* seen = doubles(grads[0], accepted, n, "lmo_momentum: accepted");
    double* totals = doubles(grads[0], sums, 4 * n, "lmo_momentum: sums");
    double* memory = doubles(grads[0], work, needed, "lmo_momentum: work");
    const Exec exec = exec_for(grads[0], threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(grads[0])) return momentum_cuda<T>(exec, items, seen, totals, memory);
    (void)use_cuda_code(grads[0]);
    momentum_cpu<T>(exec, items, seen, totals, memory);
  });
}

void bind_apply(const Tensors& parameters, const Tensors& directions, const std::vector<bool>& signs,
                const Tensor& rates, const Tensor& decays, int threads) {
  const size_t count = parameters.size();
  require(count > 0 && directions.size() == count && signs.size() == count, "lmo_apply: expected lists of one length");
  switch_float(parameters[0], "lmo_apply: parameters", [&]<class T>(T) {
    std::vector<ApplyItem<T>> items;
    for (size_t k = 0; k < count; ++k) {
      require_same_device(parameters[0], parameters[k], "lmo_apply: parameters");
      items.push_back({parameters[k].size(), elements<T>(parameters[k], "lmo_apply: parameters").data(),
                       beside<T>(parameters[k], directions[k], "lmo_apply: directions"), signs[k]});
    }
    const int64_t n = static_cast<int64_t>(count);
    const double* rate = doubles(parameters[0], rates, n, "lmo_apply: rates");
    const double* decay = doubles(parameters[0], decays, n, "lmo_apply: decays");
    const Exec exec = exec_for(parameters[0], threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(parameters[0])) return apply_cuda<T>(exec, items, rate, decay);
    (void)use_cuda_code(parameters[0]);
    apply_cpu<T>(exec, items, rate, decay);
  });
}

}  // namespace

void bind_lmo(py::module_& m) {
  m.attr("lmo_keep_gradient") = keep_gradient;
  m.attr("lmo_nesterov") = nesterov;
  m.attr("lmo_measure") = measure;
  m.attr("lmo_previous_is_given") = previous_is_given;
  m.def("lmo_work", &momentum_work);
  m.def("lmo_momentum", &bind_momentum);
  m.def("lmo_apply", &bind_apply);
}

}  // namespace kantor
