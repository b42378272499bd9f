// Python code that a native iteration calls: the monitor between iterations, and callbacks inside of them.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>
#include <utility>

#include "linalg/cg.h"

namespace kantor {

// Between iterations: every 10 ms let Python handle signals; at every iteration call the user's monitor, when there is
// one. `ranks`, None for one process, defers Ctrl-C to its attribute `interrupted`.
class PythonMonitor {
 public:
  explicit PythonMonitor(pybind11::object user, pybind11::object ranks = pybind11::none())
      : user_(std::move(user)), ranks_(std::move(ranks)) {}
  CgStatus operator()(int64_t iteration, double residual_norm) {
    const auto now = std::chrono::steady_clock::now();
    if (user_.is_none() && now - last_ < std::chrono::milliseconds(10)) return CgStatus::running;
    pybind11::gil_scoped_acquire gil;
    last_ = now;
    if (PyErr_CheckSignals() != 0) {
      if (!PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) throw pybind11::error_already_set();
      PyErr_Clear();
      return CgStatus::interrupted;
    }
    if (!ranks_.is_none() && ranks_.attr("interrupted").cast<bool>()) return CgStatus::interrupted;
    try {
      if (!user_.is_none() && user_(iteration, residual_norm).cast<bool>()) return CgStatus::stopped;
    } catch (const pybind11::error_already_set& error) {
      if (!error.matches(PyExc_KeyboardInterrupt)) throw;
      return CgStatus::interrupted;
    }
    return CgStatus::running;
  }

 private:
  pybind11::object user_, ranks_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Runs Python code inside an iteration; Ctrl-C that lands there ends the iteration like one that lands in native code.
template <class Call>
void call_back(Call&& call) {
  pybind11::gil_scoped_acquire gil;
  try {
    call();
  } catch (const pybind11::error_already_set& error) {
    if (!error.matches(PyExc_KeyboardInterrupt)) throw;
    throw CgInterrupted{};
  }
}

}  // namespace kantor
