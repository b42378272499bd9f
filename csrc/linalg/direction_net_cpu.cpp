#include <algorithm>
#include <cstring>

#include "linalg/direction_net_plan.h"

namespace kantor {
namespace {

// r with a border of zeros, zero as well outside of the mask and beyond the grid.
struct Bordered {
  explicit Bordered(const Level& level)
      : dims(level.dims),
        ny(level.grid[1] + 2),
        nx(level.grid[2] + 2),
        planes(level.grid[0] + (dims == 3 ? 2 : 0)),
        bytes(rounded_to_line(sizeof(float) * (planes * ny * nx + 16))) {}  // whole groups of cells are read at the end

  void write_plane(const DirectionNet& net, const float* r, int64_t plane, float* out) const {
    float* target = out + plane * ny * nx;
    std::fill(target, target + ny * nx, 0.0f);
    const int64_t z = plane - (dims == 3 ? 1 : 0);
    if (z < 0 || z >= net.grid[0]) return;
    for (int64_t y = 0; y < net.grid[1]; ++y) {
      const int64_t at = (z * net.grid[1] + y) * net.grid[2];
      float* row = target + (y + 1) * nx + 1;
      for (int64_t x = 0; x < net.grid[2]; ++x) row[x] = !net.mask || net.mask[at + x] ? r[at + x] : 0.0f;
    }
  }

  int dims;
  int64_t ny, nx, planes;
  size_t bytes;
};

struct Workspace {
  Workspace(const NetPlan& plan, int threads, void* memory = nullptr) : base(static_cast<char*>(memory)) {
    const size_t cell = size_t(plan.channels) * plan.kernels.element;
    zeros = take(cell * plan.fine.grid[2]);
    r = take(Bordered(plan.fine).bytes);
    for (auto& activation : fine) activation = take(cell * plan.fine.cells());
    for (auto& activation : coarse) activation = take(cell * plan.coarse.cells());
    scratch_stride = conv_scratch_bytes(plan.kernels, plan.fine, plan.channels);
    scratch = take(scratch_stride * threads);
  }

  char* take(size_t size) {
    char* at = base ? base + bytes : nullptr;  // without memory only the size is wanted
    // Activations of equal size would start at the same place of a page, and their rows evict each other.
    bytes += rounded_to_line(size) + 17 * 64;
    return at;
  }

  char* base;
  size_t bytes = 0, scratch_stride;
  char *zeros, *r, *fine[2], *coarse[2], *scratch;
};

class Inference {
 public:
  Inference(const DirectionNet& net, const NetPlan& plan, const char* prepared, const Workspace& workspace, Team& team,
            const std::function<bool()>& interrupted)
      : net_(net), plan_(plan), prepared_(prepared), work_(workspace), team_(team), interrupted_(interrupted) {}

  bool stopped() const { return stopped_; }

  void run(const float* r, float* q) {
    char *a = work_.fine[0], *b = work_.fine[1], *u = work_.coarse[0], *v = work_.coarse[1];
    if (net_.mask) std::fill(q, q + net_.cells(), 0.0f);
    first(r, b);
    layer_ = 1;
    apply(next(b, a));
    for (int pair = 0; pair < net_.pre; ++pair) residual_pair(a, b, [](ConvLayer&) {});
    ConvLayer pooling = next(a, b);
    pooling.tail = Tail::pool;
    pooling.other = u;
    pooling.other_grid = plan_.coarse.grid;
    apply(pooling);
    for (int pair = 0; pair < net_.mid; ++pair)
      residual_pair(u, v, [&](ConvLayer& second) {
        if (pair + 1 < net_.mid) return;
        second.tail = Tail::upsample;
        second.other = b;
        second.other_grid = plan_.fine.grid;
      });
    for (int pair = 0; pair < net_.post; ++pair)
      residual_pair(b, a, [&](ConvLayer& second) {
        if (pair + 1 < net_.post) return;
        second.tail = Tail::head;
        second.head = floats(plan_.head);
        second.q = q;
        second.mask = net_.mask;
        second.q_grid = net_.grid;
      });
  }

 private:
  const float* floats(size_t offset) const { return reinterpret_cast<const float*>(prepared_ + offset); }

  // conv_0: 1/C of the operations of another layer.
  void first(const float* r, char* out) {
    const Bordered bordered(plan_.fine);
    float* border = reinterpret_cast<float*>(work_.r);
    team_.for_each(bordered.planes, [&](int64_t plane) { bordered.write_plane(net_, r, plane, border); });
    int64_t offsets[27];
    for (int tap = 0; tap < net_.taps(); ++tap)
      offsets[tap] = (tap / 9 * bordered.ny + tap / 3 % 3) * bordered.nx + tap % 3;
    const auto& [nz, ny, nx] = plan_.fine.grid;
    const int64_t row_bytes = nx * plan_.channels * plan_.kernels.element;
    const int64_t width = nx, height = ny;
    team_.for_each(nz * ny, [&](int64_t row) {
      const int64_t z = row / height, y = row % height;
      plan_.kernels.first({border + (z * bordered.ny + y) * bordered.nx, offsets, net_.taps(), width, plan_.channels,
                           floats(0), floats(plan_.first_bias), out + row * row_bytes});
    });
  }

  // Nothing any more once the caller wants to stop; he is asked before each layer.
  void apply(const ConvLayer& layer) {
    if (!stopped_ && interrupted_) stopped_ = interrupted_();
    if (!stopped_) convolve(team_, layer, work_.scratch, work_.scratch_stride);
  }

  // The next convolution, relu after it.
  ConvLayer next(const void* in, void* out) {
    const int layer = layer_++;
    ConvLayer conv{&plan_.kernels,
                   plan_.level(layer),
                   net_.channels,
                   plan_.channels,
                   prepared_ + plan_.u(layer),
                   floats(plan_.bias(layer)),
                   nullptr,
                   work_.zeros,
                   in,
                   out};
    if (net_.mask) conv.needed = reinterpret_cast<const uint8_t*>(prepared_ + plan_.map(layer));
    return conv;
  }

  // v = relu(conv(u)); u = relu(conv(v)) + u. The second reads v alone around a cell, and u is replaced in place.
  template <class Finish>
  void residual_pair(char* u, char* v, Finish&& finish) {
    apply(next(u, v));
    ConvLayer second = next(v, u);
    second.residual = true;
    finish(second);
    apply(second);
  }

  const DirectionNet& net_;
  const NetPlan& plan_;
  const char* prepared_;
  const Workspace& work_;
  Team& team_;
  const std::function<bool()>& interrupted_;
  bool stopped_ = false;
  int layer_ = 1;
};

int threads_of(const Exec& exec, const DirectionNet& net) { return threads_for(exec.threads, 64 * net.cells()); }

}  // namespace

size_t direction_net_workspace_cpu(const Exec& exec, const DirectionNet& net, int64_t) {
  return Workspace(NetPlan(net), threads_of(exec, net)).bytes;
}

bool direction_net_cpu(const Exec& exec, const DirectionNet& net, const void* prepared, int64_t batch, const float* r,
                       float* q, void* workspace, const std::function<bool()>& interrupted) {
  const NetPlan plan(net);
  const int threads = threads_of(exec, net);
  const Workspace work(plan, threads, workspace);
  advise_huge_pages(workspace, work.bytes);
  std::memset(work.zeros, 0, size_t(plan.channels) * plan.kernels.element * plan.fine.grid[2]);
  bool finished = true;
  Team::run(threads, true, [&](Team& team) {
    Inference inference(net, plan, static_cast<const char*>(prepared), work, team, interrupted);
    for (int64_t i = 0; i < batch && !inference.stopped(); ++i) inference.run(r + i * net.cells(), q + i * net.cells());
    finished = !inference.stopped();
  });
  return finished;
}

}  // namespace kantor
