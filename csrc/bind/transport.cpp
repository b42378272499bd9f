// Entropic transport. A cost travels as (operands, layout, power, fill): operands are the matrix (n, m), or the points
// x (n, d) and y (d, m), or the memory of one tile (tile_rows, m); layout is kind, n, m, d, tile_rows; fill(first,
// last) writes rows of a tile. Potentials, weights and sums are float64 on the CPU.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <atomic>
#include <exception>

#include "bind/dispatch.h"
#include "bind/signals.h"
#include "bind/tensor_caster.h"
#include "core/parallel.h"
#include "transport/algorithm.h"
#include "transport/newton_system.h"

namespace py = pybind11;

namespace kantor {
namespace {

using namespace transport;

struct CostArgs {
  std::vector<Tensor> operands;
  std::vector<int64_t> layout;
  double power = 2;
  py::object fill;
};

CostArgs read_cost(const py::tuple& cost) {
  require(cost.size() == 4, "transport: a cost is (operands, layout, power, fill)");
  return {cost[0].cast<std::vector<Tensor>>(), cost[1].cast<std::vector<int64_t>>(), cost[2].cast<double>(), cost[3]};
}

std::unique_ptr<Passes> make_passes(const CostArgs& args, int threads) {
  require(!args.operands.empty() && args.layout.size() == 5, "transport: a cost has operands and five integers");
  return switch_float(args.operands[0], "cost", [&]<class T>(T) -> std::unique_ptr<Passes> {
    Cost<T> cost;
    cost.kind = static_cast<CostKind>(args.layout[0]);
    cost.n = args.layout[1], cost.m = args.layout[2], cost.d = args.layout[3], cost.tile_rows = args.layout[4];
    cost.p = args.power;
    const bool points = cost.kind != CostKind::dense && cost.kind != CostKind::callback;
    require(args.operands.size() >= (points ? 2u : 1u), "transport: too few operands");
    if (points) {
      cost.x = elements<const T>(args.operands[0], "x").data();
      cost.y_by_axis = elements<const T>(args.operands[1], "y").data();
      require(args.operands[0].size() == cost.n * cost.d && args.operands[1].size() == cost.m * cost.d,
              "transport: points do not have the shapes stated");
    } else {
      cost.matrix = elements<const T>(args.operands[0], "cost").data();
      const int64_t rows = cost.kind == CostKind::callback ? cost.tile_rows : cost.n;
      require(args.operands[0].size() == rows * cost.m, "transport: the cost does not have the shape stated");
    }
    if (cost.kind == CostKind::callback)
      cost.fill = [fill = args.fill](int64_t first, int64_t last) {
        py::gil_scoped_acquire gil;
        try {
          fill(first, last);
        } catch (const py::error_already_set& raised) {  // Ctrl-C that lands in Python code
          if (!raised.matches(PyExc_KeyboardInterrupt)) throw;
          throw Interrupted{};
        }
      };
    const Exec exec = exec_for(args.operands[0], threads);
    if constexpr (cuda_code_built)
      if (use_cuda_code(args.operands[0])) {
        const Tensor& workspace = args.operands.back();
        require(workspace.dtype == Dtype::u8 && workspace.size() >= transport_workspace_bytes(cost.n, cost.m),
                "transport: on CUDA the last operand is the workspace");
        cost.workspace = workspace.data;
        if (cost.n > 0) return make_passes_cuda<T>(exec, cost);
      }
    (void)use_cuda_code(args.operands[0]);  // without rows nothing is read
    return make_passes_cpu<T>(exec, cost);
  });
}

std::span<double> doubles(const Tensor& tensor, int64_t size, const char* name) {
  require_host(tensor, name);
  const auto values = elements<double>(tensor, name);
  require(static_cast<int64_t>(values.size()) == size, std::string(name) + ": has another size than the problem");
  return values;
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict to_dict(const Outcome& outcome) {
  py::dict result;
  result["status"] = static_cast<int>(outcome.status);
  result["newton_steps"] = outcome.newton_steps;
  result["passes"] = outcome.passes;
  result["solves"] = outcome.solves;
  result["cg_iterations"] = outcome.cg_iterations;
  result["factorisations"] = outcome.factorisations;
  result["negative_curvature"] = outcome.negative_curvature;
  result["most_entries"] = outcome.most_entries;
  result["error"] = outcome.error;
  result["dual"] = outcome.dual;
  std::vector<double> seconds, eps, error, step;
  for (const Record& record : outcome.history) {
    seconds.push_back(record.seconds);
    eps.push_back(record.eps);
    error.push_back(record.error);
    step.push_back(static_cast<double>(record.step));
  }
  result["seconds"] = to_array(seconds);
  result["eps"] = to_array(eps);
  result["errors"] = to_array(error);
  result["steps"] = to_array(step);
  return result;
}

// One problem of a batch: (cost, a, b, [eps, rho_a, rho_b, relative, cost_low, cost_high, forbidden], f, g).
struct Task {
  CostArgs cost;
  std::vector<double> numbers;
  std::span<double> a, b, f, g;

  Problem problem() const {
    return {a.data(),        b.data(),   numbers[0], numbers[1],     numbers[2],
            numbers[3] != 0, numbers[4], numbers[5], numbers[6] != 0};
  }
};

Task read_task(const py::tuple& source, bool alone) {
  require(source.size() == 6, "transport: a problem is (cost, a, b, numbers, f, g)");
  Task task;
  task.cost = read_cost(source[0].cast<py::tuple>());
  task.numbers = source[3].cast<std::vector<double>>();
  require(task.numbers.size() == 7, "transport: a problem has seven numbers");
  const int64_t n = task.cost.layout.at(1), m = task.cost.layout.at(2);
  require((n > 0 || !alone) && m > 0, "transport: a problem needs a row and a column of positive mass");
  task.a = doubles(source[1].cast<Tensor>(), n, "a");
  task.b = doubles(source[2].cast<Tensor>(), m, "b");
  task.f = doubles(source[4].cast<Tensor>(), n, "f");
  task.g = doubles(source[5].cast<Tensor>(), m, "g");
  return task;
}

Outcome run(const std::string& method, Passes& passes, const Task& task, const Options& options,
            const Monitor& monitor) {
  const Problem problem = task.problem();
  if (method == "newton") return newton(passes, problem, options, monitor, task.f.data(), task.g.data());
  if (method == "sns") return sns(passes, problem, options, monitor, task.f.data(), task.g.data());
  require(method == "sinkhorn", "transport: unknown method " + method);
  return sinkhorn(passes, problem, options, monitor, task.f.data(), task.g.data());
}

// (memory, sums, maxima, rank, size): sums(count) and maxima(count) reduce the first numbers of the memory in place.
RowRanks read_ranks(const py::object& source) {
  if (source.is_none()) return {};
  const py::tuple parts = source.cast<py::tuple>();
  const Tensor memory = parts[0].cast<Tensor>();
  double* numbers = doubles(memory, memory.size(), "ranks").data();
  const auto reduction = [&](py::object call) {
    return AllReduce{numbers, [call = std::move(call)](int64_t count) {
                       py::gil_scoped_acquire gil;
                       call(count);
                     }};
  };
  return {reduction(parts[1]), reduction(parts[2]), memory.size(), parts[3].cast<int>(), parts[4].cast<int>()};
}

// options: tol, max_iter, first_eps, entry_limit, sinkhorn_first, relaxation, warm_up, density, scaling.
// Several problems on the CPU run side by side, one thread each. With ranks there is one problem, and its rows are
// those of this rank.
py::list bind_solve(const std::string& method, const py::list& sources, const std::vector<double>& numbers,
                    const py::object& user, int threads, const py::object& ranks) {
  std::vector<Task> tasks;
  for (const py::handle& source : sources) tasks.push_back(read_task(source.cast<py::tuple>(), ranks.is_none()));
  require(ranks.is_none() || (tasks.size() == 1 && method != "sns"), "transport: over ranks, one problem; no sns");
  require(numbers.size() == 9, "transport: nine options are expected");
  Options options;
  options.tol = numbers[0], options.max_iter = static_cast<int64_t>(numbers[1]), options.first_eps = numbers[2];
  options.entry_limit = static_cast<int64_t>(numbers[3]), options.sinkhorn_first = numbers[4] != 0;
  options.relaxation = numbers[5], options.warm_up = static_cast<int64_t>(numbers[6]), options.density = numbers[7];
  options.scaling = numbers[8] != 0;
  bool side_by_side = tasks.size() > 1;
  for (const Task& task : tasks)
    side_by_side = side_by_side && !task.cost.operands.at(0).on_cuda() && task.cost.fill.is_none();
  options.threads = side_by_side ? 1 : threads;

  std::vector<Outcome> outcomes(tasks.size());
  SignalPoll poll;
  std::atomic<bool> interrupted{false};
  std::vector<std::unique_ptr<Passes>> passes;
  for (const Task& task : tasks) passes.push_back(make_passes(task.cost, options.threads));
  if (!ranks.is_none()) passes[0]->ranks = read_ranks(ranks);
  const auto solve_one = [&](int64_t k, bool main_thread) {
    Passes& mine = *passes[k];
    if (main_thread) {
      mine.interrupted = [&] { return poll() ? interrupted = true : interrupted.load(); };
    } else {
      mine.interrupted = [&] { return interrupted.load(); };
    }
    const Monitor monitor = [&](int64_t step, double eps, double error) {
      if (mine.interrupted && mine.interrupted()) return Status::interrupted;
      if (!user.is_none()) {
        py::gil_scoped_acquire gil;
        try {
          if (user(step, eps, error).cast<bool>()) return Status::stopped;
        } catch (const py::error_already_set& raised) {
          if (!raised.matches(PyExc_KeyboardInterrupt)) throw;
          interrupted = true;
          return Status::interrupted;
        }
      }
      return Status::running;
    };
    // What one rank wants the others hear at the next reduction.
    const Monitor monitor_of_ranks = [&](int64_t step, double eps, double error) {
      Status answer = Status::running;
      mine.ranks.own([&] { answer = monitor(step, eps, error); });
      if (answer == Status::interrupted) mine.ranks.interrupt();
      if (answer == Status::stopped) mine.ranks.stop();
      return Status::running;
    };
    if (interrupted) {
      outcomes[k].status = Status::interrupted;
      return;
    }
    if (mine.ranks.alone()) {
      outcomes[k] = run(method, mine, tasks[k], options, monitor);
      return;
    }
    try {
      outcomes[k] = run(method, mine, tasks[k], options, monitor_of_ranks);
      mine.ranks.settle();
    } catch (const Interrupted& reason) {
      outcomes[k].status = reason.by_callback ? Status::stopped : Status::interrupted;
    } catch (const OtherRankFailed&) { outcomes[k].status = Status::failed; }
  };
  {
    py::gil_scoped_release nogil;
    if (!side_by_side) {
      for (size_t k = 0; k < tasks.size(); ++k) solve_one(k, true);
    } else {
      std::exception_ptr error;
      std::atomic<int64_t> next{0};
      parallel_region(static_cast<int>(std::min<size_t>(threads, tasks.size())), [&](int worker, int) {
        try {
          for (int64_t k = next++; k < static_cast<int64_t>(tasks.size()); k = next++) solve_one(k, worker == 0);
        } catch (...) {
#pragma omp critical(kantor_transport_error)
          error = std::current_exception();
          next = static_cast<int64_t>(tasks.size());
        }
      });
      if (error) std::rethrow_exception(error);
    }
  }
  py::list results;
  for (const Outcome& outcome : outcomes) results.append(to_dict(outcome));
  return results;
}

// body(passes, f, g) with signals polled; KeyboardInterrupt when one came.
template <class Body>
void with_passes(const py::tuple& cost, int threads, Body&& body) {
  const CostArgs args = read_cost(cost);
  const std::unique_ptr<Passes> passes = make_passes(args, threads);
  SignalPoll poll;
  passes->interrupted = [&poll] { return poll(); };
  try {
    py::gil_scoped_release nogil;
    body(*passes);
  } catch (const Interrupted&) {
    PyErr_SetNone(PyExc_KeyboardInterrupt);
    throw py::error_already_set();
  }
}

py::object bind_extract(const py::tuple& cost, double eps, const Tensor& f, const Tensor& g, double threshold,
                        int64_t limit, int threads) {
  SparsePlan plan;
  bool fits = false;
  with_passes(cost, threads, [&](Passes& passes) {
    fits =
        passes.extract(eps, doubles(f, passes.n, "f").data(), doubles(g, passes.m, "g").data(), threshold, limit, plan);
  });
  if (!fits) return py::none();
  return py::make_tuple(to_array(plan.row_start), to_array(plan.column), to_array(plan.value));
}

void bind_apply(const py::tuple& cost, double eps, const Tensor& f, const Tensor& g, const Tensor& V, const Tensor& out,
                bool transposed, int threads) {
  with_passes(cost, threads, [&](Passes& passes) {
    const int64_t rows = transposed ? passes.n : passes.m, others = transposed ? passes.m : passes.n;
    const int64_t k = V.ndim == 2 ? V.shape[1] : 1;
    const double* from = doubles(V, rows * k, "V").data();
    double* to = doubles(out, others * k, "out").data();
    const double *f_of = doubles(f, passes.n, "f").data(), *g_of = doubles(g, passes.m, "g").data();
    transposed ? passes.apply_transposed(eps, f_of, g_of, from, k, to) : passes.apply(eps, f_of, g_of, from, k, to);
  });
}

py::tuple bind_values(const py::tuple& cost, double eps, const Tensor& f, const Tensor& g, int threads) {
  double linear = 0, entropy = 0;
  with_passes(cost, threads, [&](Passes& passes) {
    passes.values(eps, doubles(f, passes.n, "f").data(), doubles(g, passes.m, "g").data(), &linear, &entropy);
  });
  return py::make_tuple(linear, entropy);
}

void bind_sums(const py::tuple& cost, double eps, const Tensor& f, const Tensor& g, const Tensor& row_sums,
               const Tensor& column_sums, int threads) {
  with_passes(cost, threads, [&](Passes& passes) {
    passes.sums(eps, doubles(f, passes.n, "f").data(), doubles(g, passes.m, "g").data(),
                doubles(row_sums, passes.n, "row_sums").data(), doubles(column_sums, passes.m, "column_sums").data());
  });
}

void bind_sweep(const py::tuple& cost, double eps, double cutoff, const Tensor& g, const Tensor& offset,
                const Tensor& log_sums, const Tensor& f, const Tensor& column_sums, int64_t repeats, int threads) {
  with_passes(cost, threads, [&](Passes& passes) {
    for (int64_t k = 0; k < repeats; ++k)
      passes.sweep(eps, cutoff, doubles(g, passes.m, "g").data(), doubles(offset, passes.n, "offset").data(), 1,
                   doubles(log_sums, passes.n, "log_sums").data(), doubles(f, passes.n, "f").data(),
                   doubles(column_sums, passes.m, "column_sums").data());
  });
}

void bind_column_log_sums(const py::tuple& cost, double eps, const Tensor& f, const Tensor& log_sums, int threads) {
  with_passes(cost, threads, [&](Passes& passes) {
    passes.column_log_sums(eps, doubles(f, passes.n, "f").data(), doubles(log_sums, passes.m, "log_sums").data());
  });
}

// Solves [diag R, M; M', diag C] [xi; zeta] = [u; v]; returns iterations, relative residual and negative curvatures.
py::tuple bind_linear_solve(const Tensor& row_start, const Tensor& column, const Tensor& value, const Tensor& R,
                            const Tensor& C, const Tensor& u, const Tensor& v, const Tensor& xi, const Tensor& zeta,
                            double rtol, int64_t max_iterations, int threads) {
  SparsePlan M;
  M.n = R.size(), M.m = C.size();
  const auto starts = elements<const int64_t>(row_start, "row_start");
  const auto columns = elements<const int32_t>(column, "column");
  const auto values = elements<const double>(value, "value");
  require(static_cast<int64_t>(starts.size()) == M.n + 1, "transport: row_start has another size than the rows");
  M.row_start.assign(starts.begin(), starts.end());
  M.column.assign(columns.begin(), columns.end());
  M.value.assign(values.begin(), values.end());
  const auto copy = [](const Tensor& source, int64_t size, const char* name) {
    const auto from = doubles(source, size, name);
    return std::vector<double>(from.begin(), from.end());
  };
  const std::vector<double> rows = copy(R, M.n, "R"), columns_of = copy(C, M.m, "C");
  const std::vector<double> first = copy(u, M.n, "u"), second = copy(v, M.m, "v");
  const auto out_x = doubles(xi, M.n, "xi"), out_z = doubles(zeta, M.m, "zeta");
  std::vector<double> x, z;
  CgReport report;
  {
    py::gil_scoped_release nogil;
    const ApproximateCholesky factor = factor_plan(M, rows, columns_of);
    report = solve_whole(M, rows, columns_of, factor, first, second, {rtol, max_iterations}, threads, x, z);
    block_step(M, rows, columns_of, first, second, x, z);
  }
  std::copy(x.begin(), x.end(), out_x.begin());
  std::copy(z.begin(), z.end(), out_z.begin());
  return py::make_tuple(report.iterations, report.relative_residual, report.negative_curvature);
}

}  // namespace

void bind_transport(py::module_& m) {
  m.def("transport_solve", &bind_solve, py::arg("method"), py::arg("tasks"), py::arg("options"), py::arg("monitor"),
        py::arg("threads"), py::arg("ranks") = py::none());
  m.def("transport_extract", &bind_extract);
  m.def("transport_apply", &bind_apply);
  m.def("transport_values", &bind_values);
  m.def("transport_sums", &bind_sums);
  m.def("transport_sweep", &bind_sweep);
  m.def("transport_column_log_sums", &bind_column_log_sums);
  m.def("transport_linear_solve", &bind_linear_solve);
  if constexpr (cuda_code_built)
    m.def("transport_workspace_bytes", &transport_workspace_bytes);
  else
    m.def("transport_workspace_bytes", [](int64_t, int64_t) { return int64_t{0}; });
}

}  // namespace kantor
