#include "linalg/direction_net.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "bind/dispatch.h"
#include "bind/tensor_caster.h"

namespace py = pybind11;

namespace kantor {
namespace {

using Layout = std::vector<int64_t>;

// layout: dims, channels, pre, mid, post, nz, ny, nx, precision, widest. See kantor/linalg/_conv_inference.py.
DirectionNet read_net(const Layout& layout) {
  require(layout.size() == 10, "direction_net: layout: expected 10 integers");
  DirectionNet net;
  const auto integer = [&](int i) { return static_cast<int>(layout[i]); };
  net.dims = integer(0), net.channels = integer(1), net.pre = integer(2), net.mid = integer(3), net.post = integer(4);
  net.grid = {layout[5], layout[6], layout[7]};
  net.precision = static_cast<NetPrecision>(integer(8)), net.widest = integer(9);
  require(net.dims == 3 || (net.dims == 2 && net.grid[0] == 1), "direction_net: layout: expected 2 or 3 dimensions");
  require(net.channels > 0 && net.channels <= 1024 && net.channels % 4 == 0 && net.pre >= 0 && net.mid >= 1 &&
              net.post >= 1 && std::max({net.pre, net.mid, net.post}) < 1000,
          "direction_net: layout: expected channels a multiple of 4, pre >= 0, mid >= 1, post >= 1");
  for (const int64_t n : net.grid) require(n >= 1 && n < (int64_t{1} << 31), "direction_net: layout: empty grid");
  require(integer(8) >= 0 && integer(8) <= 2, "direction_net: layout: unknown precision");
  return net;
}

void read_mask(DirectionNet& net, const std::optional<Tensor>& mask) {
  if (!mask) return;
  net.mask = elements<const uint8_t>(*mask, "mask").data();
  require(mask->size() == net.cells(), "direction_net: mask: expected as many elements as the grid has cells");
}

// `like` only says where the network will run.
int64_t bind_prepared_bytes(const Layout& layout, bool masked, const Tensor& like) {
  DirectionNet net = read_net(layout);
  const uint8_t some = 1;
  if (masked) net.mask = &some;
  if constexpr (cuda_code_built)
    if (use_cuda_code(like)) return static_cast<int64_t>(direction_net_prepared_bytes_cuda(net));
  (void)use_cuda_code(like);
  return static_cast<int64_t>(direction_net_prepared_bytes_cpu(net));
}

int64_t bind_workspace_bytes(const Layout& layout, int64_t batch, const Tensor& like, int threads) {
  const DirectionNet net = read_net(layout);
  if constexpr (cuda_code_built)
    if (use_cuda_code(like)) return static_cast<int64_t>(direction_net_workspace_cuda(net, batch));
  (void)use_cuda_code(like);
  return static_cast<int64_t>(direction_net_workspace_cpu(exec_for(like, threads), net, batch));
}

void bind_prepare(const Layout& layout, const std::vector<Tensor>& weights,
                  const std::vector<std::optional<Tensor>>& biases, const std::optional<Tensor>& mask,
                  const Tensor& prepared, int threads) {
  DirectionNet net = read_net(layout);
  read_mask(net, mask);
  const size_t count = net.convolutions();
  require(weights.size() == count && biases.size() == count, "direction_net: weights: wrong number of convolutions");
  std::vector<const float*> w, b;
  for (size_t i = 0; i < count; ++i) {
    const int64_t in = i == 0 ? 1 : net.channels, out = i + 1 == count ? 1 : net.channels;
    require_same_device(weights[i], prepared, "direction_net");
    w.push_back(elements<const float>(weights[i], "weights").data());
    require(weights[i].size() == in * out * (i + 1 == count ? 1 : net.taps()), "direction_net: weights: wrong shape");
    if (biases[i]) require_same_device(*biases[i], prepared, "direction_net");
    require(!biases[i] || biases[i]->size() == out, "direction_net: biases: wrong shape");
    b.push_back(biases[i] ? elements<const float>(*biases[i], "biases").data() : nullptr);
  }
  net.weights = w.data(), net.biases = b.data();
  const auto memory = elements<uint8_t>(prepared, "prepared");
  const Exec exec = exec_for(prepared, threads);
  py::gil_scoped_release nogil;
  if constexpr (cuda_code_built)
    if (use_cuda_code(prepared)) {
      require(memory.size() >= direction_net_prepared_bytes_cuda(net), "direction_net: prepared: too small");
      return prepare_direction_net_cuda(exec, net, memory.data());
    }
  (void)use_cuda_code(prepared);
  require(memory.size() >= direction_net_prepared_bytes_cpu(net), "direction_net: prepared: too small");
  prepare_direction_net_cpu(exec, net, memory.data());
}

void bind_inference(const Layout& layout, const Tensor& prepared, const std::optional<Tensor>& mask, const Tensor& r,
                    const Tensor& q, const Tensor& workspace, int threads) {
  DirectionNet net = read_net(layout);
  read_mask(net, mask);
  for (const Tensor* t : {&r, &q, &workspace}) require_same_device(*t, prepared, "direction_net");
  const auto rs = elements<const float>(r, "r");
  const auto qs = elements<float>(q, "q");
  const auto memory = elements<uint8_t>(prepared, "prepared"), work = elements<uint8_t>(workspace, "workspace");
  const int64_t batch = r.size() / net.cells();
  require(r.size() == batch * net.cells() && q.size() == r.size(), "direction_net: r: expected (batch, grid)");
  const Exec exec = exec_for(r, threads);
  py::gil_scoped_release nogil;
  if constexpr (cuda_code_built)
    if (use_cuda_code(r)) {
      require(memory.size() >= direction_net_prepared_bytes_cuda(net), "direction_net: prepared: too small");
      require(work.size() >= direction_net_workspace_cuda(net, batch), "direction_net: workspace: too small");
      return direction_net_cuda(exec, net, memory.data(), batch, rs.data(), qs.data(), work.data());
    }
  (void)use_cuda_code(r);
  require(memory.size() >= direction_net_prepared_bytes_cpu(net), "direction_net: prepared: too small");
  require(work.size() >= direction_net_workspace_cpu(exec, net, batch), "direction_net: workspace: too small");
  // A layer of a large grid takes tens of milliseconds.
  const auto interrupted = [] {
    const py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
  };
  std::function<bool()> poll;
  if (net.cells() >= int64_t{1} << 20) poll = interrupted;
  if (!direction_net_cpu(exec, net, memory.data(), batch, rs.data(), qs.data(), work.data(), poll)) {
    const py::gil_scoped_acquire gil;
    throw py::error_already_set();
  }
}

}  // namespace

void bind_direction_net(py::module_& m) {
  m.def("direction_net_prepared_bytes", &bind_prepared_bytes);
  m.def("direction_net_workspace_bytes", &bind_workspace_bytes);
  m.def("prepare_direction_net", &bind_prepare);
  m.def("direction_net", &bind_inference);
}

}  // namespace kantor
