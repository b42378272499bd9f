// AdaHessian's passes (optim/adahessian.h). They write into parameters, so they are plain functions, not operators.
#include <pybind11/stl.h>

#include "bind/dispatch.h"
#include "bind/tensor_caster.h"
#include "optim/adahessian.h"

namespace py = pybind11;

namespace kantor {
namespace {

using Lists = std::vector<std::vector<Tensor>>;

// Fills the table, in CPU memory, and returns its number of chunks. All lists have a tensor of one dtype for each row;
// those of the last have one element for each block, the others one for each element.
template <class T>
int64_t fill_table(const Lists& lists, const std::vector<int64_t>& blocks,
                   const std::vector<std::vector<double>>& numbers, bool whole_blocks, TableRow* rows) {
  int64_t chunks = 0;
  for (size_t i = 0; i < blocks.size(); ++i) {
    TableRow& row = rows[i] = {};
    row.size = lists[0][i].size();
    row.block = blocks[i];
    require(row.block >= 1 && row.size % row.block == 0, "tensor_table: a block does not divide its tensor");
    for (size_t k = 0; k < lists.size(); ++k) {
      const Tensor& tensor = lists[k][i];
      require_same_device(tensor, lists[0][0], "tensor_table");
      require(tensor.size() == (k + 1 == lists.size() ? row.size / row.block : row.size), "tensor_table: sizes differ");
      row.data[k] = elements<T>(tensor, "tensor_table").data();
    }
    row.length = whole_blocks ? std::max<int64_t>(1, chunk_size / row.block) * row.block : chunk_size;
    row.first_chunk = chunks;
    chunks += Chunks{row.size, row.length}.count();
    require(numbers[i].size() <= std::size(row.number), "tensor_table: too many numbers");
    std::copy(numbers[i].begin(), numbers[i].end(), row.number);
  }
  require(chunks < int64_t{1} << 31, "tensor_table: too many elements for one launch");
  return chunks;
}

int64_t bind_tensor_table(const Lists& lists, const std::vector<int64_t>& blocks,
                          const std::vector<std::vector<double>>& numbers, bool whole_blocks, const Tensor& table) {
  const size_t count = blocks.size();
  require(count > 0 && !lists.empty() && lists.size() <= 4 && numbers.size() == count, "tensor_table: wrong lengths");
  for (const auto& list : lists) require(list.size() == count, "tensor_table: the lists have different lengths");
  require_host(table, "table");
  int64_t* const words = elements<int64_t>(table, "table").data();
  require(table.size() == static_cast<int64_t>(count) * table_row_words, "table: has another size");
  return switch_float(lists[0][0], "tensor_table", [&]<class T>(T) {
    return fill_table<T>(lists, blocks, numbers, whole_blocks, reinterpret_cast<TableRow*>(words));
  });
}

// `like` has the dtype and the device of the tensors behind the table.
TensorTable read_table(const Tensor& table, int64_t chunks, const Tensor& like) {
  require_same_device(table, like, "table");
  const int64_t* const words = elements<const int64_t>(table, "table").data();
  return {reinterpret_cast<const TableRow*>(words), table.size() / table_row_words, chunks};
}

void bind_rademacher(const Tensor& table, int64_t chunks, const Tensor& like, int64_t seed, int threads) {
  const TensorTable rows = read_table(table, chunks, like);
  switch_float(like, "rademacher", [&]<class T>(T) {
    const Exec exec = exec_for(like, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(like)) return rademacher_cuda<T>(exec, rows, static_cast<uint64_t>(seed));
    (void)use_cuda_code(like);
    rademacher_cpu<T>(exec, rows, static_cast<uint64_t>(seed));
  });
}

void bind_average_curvature(const Tensor& table, int64_t chunks, const Tensor& like, int threads) {
  const TensorTable rows = read_table(table, chunks, like);
  switch_float(like, "average_curvature", [&]<class T>(T) {
    const Exec exec = exec_for(like, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(like)) return average_curvature_cuda<T>(exec, rows);
    (void)use_cuda_code(like);
    average_curvature_cpu<T>(exec, rows);
  });
}

void bind_adahessian_step(const Tensor& table, int64_t chunks, const Tensor& like, int threads) {
  const TensorTable rows = read_table(table, chunks, like);
  switch_float(like, "adahessian_step", [&]<class T>(T) {
    const Exec exec = exec_for(like, threads);
    py::gil_scoped_release nogil;
    if constexpr (cuda_code_built)
      if (use_cuda_code(like)) return adahessian_step_cuda<T>(exec, rows);
    (void)use_cuda_code(like);
    adahessian_step_cpu<T>(exec, rows);
  });
}

}  // namespace

void bind_adahessian(py::module_& m) {
  m.attr("table_row_words") = table_row_words;
  m.def("tensor_table", &bind_tensor_table);
  m.def("rademacher", &bind_rademacher);
  m.def("average_curvature", &bind_average_curvature);
  m.def("adahessian_step", &bind_adahessian_step);
}

}  // namespace kantor
