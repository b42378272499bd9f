#pragma once

namespace kantor {

// Where and how a kernel runs. `threads` is read on the CPU, `device` and `stream` on CUDA.
struct Exec {
  int threads = 1;
  int device = 0;
  void* stream = nullptr;
};

}  // namespace kantor
