// Exceptions of the native core. The bindings turn them into Python's (see bind/module.cpp):
//   std::invalid_argument -> ValueError, TypeMismatch -> TypeError, BackendUnavailable -> kantor.BackendUnavailable.
// A message names the function, the argument, what was expected, what came, and what to do.
#pragma once
#include <stdexcept>
#include <string>

namespace kantor {

struct TypeMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct BackendUnavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace kantor
