#include "linalg/poisson_components.h"

#include <bit>
#include <numeric>
#include <vector>

namespace kantor {
namespace {

// Union-find over runs: stretches of cells of one grid row that are linked one to the next.
class Runs {
 public:
  int32_t add() {
    parents_.push_back(static_cast<int32_t>(parents_.size()));
    open_.push_back(0);
    return parents_.back();
  }

  int32_t root(int32_t run) {
    while (parents_[run] != run) run = parents_[run] = parents_[parents_[run]];  // path halving
    return run;
  }

  // The smaller number, hence the earlier run, becomes the root.
  void join(int32_t a, int32_t b) {
    a = root(a), b = root(b);
    if (a == b) return;
    if (a > b) std::swap(a, b);
    parents_[b] = a;
    open_[a] |= open_[b];
  }

  void open(int32_t run) { open_[root(run)] = 1; }
  bool is_open(int32_t run) { return open_[root(run)] != 0; }
  int32_t count() const { return static_cast<int32_t>(parents_.size()); }

 private:
  std::vector<int32_t> parents_;
  std::vector<uint8_t> open_;
};

}  // namespace

int64_t closed_components_cpu(int64_t nz, int64_t ny, int64_t nx, const uint16_t* cells, int32_t* labels) {
  constexpr unsigned below = 1, front = 4, left = 16;
  const int64_t plane = ny * nx;
  Runs runs;
  for (int64_t line = 0; line < nz * ny; ++line) {
    int32_t joined[2] = {-1, -1};  // the last runs of the rows in front and below that this one was joined to
    for (int64_t i = line * nx; i < (line + 1) * nx; ++i) {
      const unsigned cell = cells[i];
      if (cell == 0) {
        labels[i] = -1;
        continue;
      }
      const bool goes_on = cell & left;
      labels[i] = goes_on ? labels[i - 1] : runs.add();
      if (!goes_on) joined[0] = joined[1] = -1;
      if (cell & front && labels[i - nx] != joined[0]) runs.join(labels[i], joined[0] = labels[i - nx]);
      if (cell & below && labels[i - plane] != joined[1]) runs.join(labels[i], joined[1] = labels[i - plane]);
      if (static_cast<int>(cell >> 8) > std::popcount(cell & 63)) runs.open(labels[i]);
    }
  }
  std::vector<int32_t> number(static_cast<size_t>(runs.count()), -1);
  int32_t closed = 0;
  for (int32_t run = 0; run < runs.count(); ++run) {
    const int32_t root = runs.root(run);
    if (runs.is_open(root)) continue;
    if (root == run) number[run] = closed++;
    number[run] = number[root];  // a root comes before its runs
  }
  for (int64_t i = 0; i < nz * plane; ++i)
    if (labels[i] >= 0) labels[i] = number[labels[i]];
  return closed;
}

}  // namespace kantor
