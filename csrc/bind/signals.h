// Ctrl-C in native loops that do not call Python otherwise.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>

namespace kantor {

// Every 10 ms: true when Python has a pending Ctrl-C. Other signals' exceptions go through.
class SignalPoll {
 public:
  bool operator()() {
    if (interrupted_) return true;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(10)) return false;
    last_ = now;
    pybind11::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() == 0) return false;
    if (!PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) throw pybind11::error_already_set();
    PyErr_Clear();
    return interrupted_ = true;
  }

 private:
  bool interrupted_ = false;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace kantor
