// k-nearest neighbours on CUDA: queries in groups, as many as there is room for their lists, each in three launches.
#include <algorithm>
#include <cstddef>

#include "graph/knn_rank_kernels.h"

namespace kantor {
namespace {

constexpr int64_t list_bytes = int64_t{48} << 20;  // of the lists of one launch
constexpr int64_t most_blocks = 528, most_splits = 8, most_ranked = 2048;
constexpr int64_t most_sums = int64_t{1} << 20, most_chunks = 256, repeat_blocks = 512;
constexpr unsigned rank_threads = 128;

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sizes of everything, and where it is in the workspace.
template <class T>
class KnnPlan {
 public:
  KnnPlan(int64_t n, int64_t d, int64_t k, void* workspace) : workspace_(static_cast<std::byte*>(workspace)) {
    constexpr int64_t panel = knn_panel<T>;
    scan.n = n, scan.d = d, scan.k = k;
    scan.depth = quotient_up(d, knn_depth) * knn_depth;
    scan.panels = quotient_up(n, panel);
    // More than k are kept, so that rounding rarely matters; as many again may come before a list is cut.
    scan.keep = static_cast<int>(k + 16 + k / 8);
    scan.capacity = 2 * scan.keep + static_cast<int>(panel);
    const int64_t block_bytes = panel * scan.capacity * static_cast<int64_t>(sizeof(T) + sizeof(int32_t));
    const int64_t blocks = std::clamp<int64_t>(list_bytes / block_bytes, 1, most_blocks);
    const int64_t splits = std::min({most_splits, most_ranked / scan.keep, blocks / scan.panels, scan.panels});
    scan.splits = static_cast<int>(std::max<int64_t>(1, splits));
    panels_at_once = std::min(scan.panels, std::max<int64_t>(1, blocks / scan.splits));
    sum_chunks = std::clamp<int64_t>(most_sums / d, 1, most_chunks);
    room = static_cast<int>(k) + 2 * knn_threads;

    const int64_t lists = scan.splits * panels_at_once * panel;
    take(scan.packed, scan.panels * panel * scan.depth);
    take(scan.half_norm, scan.panels * panel);
    take(mean, d);
    take(partial, sum_chunks * d);
    take(scan.scores, lists * scan.capacity);
    take(scan.candidates, lists * scan.capacity);
    take(scan.counts, lists);
    take(scan.bars, lists);
    take(scan.uncertain, panels_at_once * panel);
    take(squares, repeat_blocks * room);
    take(repeat_candidates, repeat_blocks * room);
    scan.mean = mean;
  }

  int64_t bytes() const { return bytes_; }

  KnnScan<T> scan{};
  int64_t panels_at_once, sum_chunks;
  int room;
  double *mean = nullptr, *partial = nullptr, *squares = nullptr;
  int32_t* repeat_candidates = nullptr;

 private:
  template <class U>
  void take(U*& pointer, int64_t count) {
    if (workspace_) pointer = reinterpret_cast<U*>(workspace_ + bytes_);
    bytes_ += quotient_up(count * static_cast<int64_t>(sizeof(U)), 256) * 256;
  }

  std::byte* workspace_;
  int64_t bytes_ = 0;
};

}  // namespace

template <class T>
int64_t knn_workspace_bytes_cuda(int64_t n, int64_t d, int64_t k) {
  return KnnPlan<T>(n, d, k, nullptr).bytes();
}

template <class T>
void knn_cuda(const Exec& exec, int64_t n, int64_t d, const T* x, int64_t k, int32_t* index, T* distance,
              void* workspace) {
  constexpr int64_t panel = knn_panel<T>;
  const simt::DeviceGuard guard(exec.device);
  KnnPlan<T> plan(n, d, k, workspace);
  KnnScan<T>& s = plan.scan;
  s.x = x, s.index = index, s.distance = distance;
  // Whole waves of two blocks a multiprocessor.
  int64_t at_once = plan.panels_at_once;
  const int64_t wave = 2 * simt::sm_count(exec.device);
  if (at_once < s.panels && at_once > wave) at_once = at_once / wave * wave;

  const int64_t chunk_rows = quotient_up(n, plan.sum_chunks), chunks = quotient_up(n, chunk_rows);
  SIMT_LAUNCH(column_sums_kernel<T>, static_cast<unsigned>(chunks), knn_threads, 0, exec.stream, n, d, chunk_rows, x,
              plan.partial);
  SIMT_LAUNCH(column_means_kernel, simt::blocks_for(d, knn_threads), knn_threads, 0, exec.stream, n, d, chunks,
              plan.partial, plan.mean);
  SIMT_LAUNCH(pack_kernel<T>, static_cast<unsigned>(s.panels), knn_threads, 0, exec.stream, s);
  for (s.first_panel = 0; s.first_panel < s.panels; s.first_panel += at_once) {
    const int64_t panels = std::min(at_once, s.panels - s.first_panel);
    s.queries = static_cast<int>(panels * panel);
    SIMT_LAUNCH(scan_kernel<T>, dim3(static_cast<unsigned>(panels), static_cast<unsigned>(s.splits)), knn_threads, 0,
                exec.stream, s);
    const size_t ranked = static_cast<size_t>(s.splits) * static_cast<size_t>(s.keep);
    SIMT_LAUNCH(rank_kernel<T>, static_cast<unsigned>(s.queries), rank_threads,
                ranked * (sizeof(double) + sizeof(int32_t)), exec.stream, s);
    SIMT_LAUNCH(repeat_kernel<T>, static_cast<unsigned>(std::min<int64_t>(repeat_blocks, s.queries)), knn_threads, 0,
                exec.stream, s, plan.room, plan.squares, plan.repeat_candidates);
  }
}

#define KANTOR_INSTANTIATE(T)                                              \
  template int64_t knn_workspace_bytes_cuda<T>(int64_t, int64_t, int64_t); \
  template void knn_cuda(const Exec&, int64_t, int64_t, const T*, int64_t, int32_t*, T*, void*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
