// Accesses outside an array that AddressSanitizer has to find: the test passes when this program fails.
// Usage: plant_oob global|static|dynamic
#include <cstdio>
#include <string>
#include <vector>

#include "simt_kernels.h"

int main(int argc, char** argv) {
  using namespace kantor::simt_test;
  const std::string where = argc == 2 ? argv[1] : "global";
  std::vector<unsigned> out(32);
  if (where == "global") {
    std::vector<double> x(1000);
    SIMT_LAUNCH(plant_global_overrun<double>, 8, 128, 0, nullptr, 1000, x.data());
  } else if (where == "static") {
    SIMT_LAUNCH(plant_static_overrun, 1, 32, 0, nullptr, out.data(), 1);
  } else if (where == "dynamic") {
    SIMT_LAUNCH(plant_dynamic_overrun, 1, 32, 32 * sizeof(unsigned), nullptr, out.data(), 1);
  }
  std::printf("the access outside the %s array was not found\n", where.c_str());
  return 0;
}
