// Many tensors a launch: a row of blocks for each. The sums are formed block by block, then in a fixed order.
#include <algorithm>

#include "core/simt.h"
#include "optim/lmo.h"

namespace kantor {
namespace {

constexpr int threads = 256, most_items = 32;
constexpr int64_t most_blocks = 64, elements_of_block = 4096;

int64_t blocks_of(int64_t n) { return std::min(most_blocks, (n + elements_of_block - 1) / elements_of_block); }

template <class T>
struct MomentumItems {
  MomentumItem<T> item[most_items];
  int blocks[most_items];
  double* work[most_items];  // blocks x 3
};
template <class T>
struct ApplyItems {
  ApplyItem<T> item[most_items];
};

template <class T>
__global__ void absolute_sum_kernel(MomentumItems<T> items) {
  const int k = static_cast<int>(blockIdx.y), blocks = items.blocks[k], block = static_cast<int>(blockIdx.x);
  if (block >= blocks) return;
  const MomentumItem<T>& item = items.item[k];
  double sum = 0;
  for (int64_t i = int64_t(block) * threads + threadIdx.x; i < item.n; i += int64_t(blocks) * threads)
    sum += fabs(double(item.grad[i]));
  sum = simt::block_sum(sum);
  if (threadIdx.x == 0) items.work[k][block] = sum;
}

// sums[4 k + first + c] = the sum over the blocks of item k of work[block * columns + c].
template <class T>
__global__ void add_up_kernel(MomentumItems<T> items, int columns, int first, double* sums) {
  const int k = static_cast<int>(blockIdx.x), c = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  double sum = 0;
  for (int b = lane; b < items.blocks[k]; b += 32) sum += items.work[k][b * columns + c];
  sum = simt::warp_sum(sum);
  if (lane == 0) sums[4 * k + first + c] = sum;
}

template <class T>
__global__ void momentum_kernel(MomentumItems<T> items, const double* accepted, const double* sums) {
  const int k = static_cast<int>(blockIdx.y), blocks = items.blocks[k], block = static_cast<int>(blockIdx.x);
  if (block >= blocks) return;
  const MomentumItem<T>& item = items.item[k];
  const double mark = sums[4 * k];
  const bool active = mark > 0 && mark < INFINITY, first = accepted[k] == 0;
  const double beta = first ? 0.0 : item.beta, lead = item.flags & nesterov ? item.beta : 1.0;
  const bool given = item.flags & previous_is_given;
  const bool difference = active && item.previous && (item.flags & measure) && (given || !first);
  const bool keep = item.previous && !given && (first || (item.flags & keep_gradient));
  double squares = 0, magnitudes = 0, input_squares = 0;
  for (int64_t i = int64_t(block) * threads + threadIdx.x; i < item.n; i += int64_t(blocks) * threads) {
    const double g = item.grad[i], previous = difference ? double(item.previous[i]) : g;
    if (item.difference) item.difference[i] = difference ? static_cast<T>(g - previous) : T(0);
    if (!active) {
      if (item.input != item.momentum) item.input[i] = 0;
      continue;
    }
    const T momentum = static_cast<T>(beta * double(item.momentum[i]) + (1 - beta) * g);
    item.momentum[i] = momentum;
    double input = momentum;
    if (item.input != item.momentum) {
      input = lead * input + (1 - lead) * g;
      item.input[i] = static_cast<T>(input);
    }
    input_squares += input * input;
    if (difference) {
      squares += (g - previous) * (g - previous);
      magnitudes += fabs(g - previous);
    }
    if (keep) item.previous[i] = static_cast<T>(g);
  }
  squares = simt::block_sum(squares);
  magnitudes = simt::block_sum(magnitudes);
  input_squares = simt::block_sum(input_squares);
  if (threadIdx.x != 0) return;
  items.work[k][3 * block] = squares;
  items.work[k][3 * block + 1] = magnitudes;
  items.work[k][3 * block + 2] = input_squares;
}

template <class T>
__global__ void apply_kernel(ApplyItems<T> items, const double* rates, const double* decays) {
  const ApplyItem<T>& item = items.item[blockIdx.y];
  const double rate = rates[blockIdx.y], decay = decays[blockIdx.y];
  if (rate == 0) return;
  simt::grid_stride(item.n, [&](int64_t i) {
    const double d = item.direction[i];
    item.X[i] = static_cast<T>(decay * double(item.X[i]) - rate * (item.sign ? double(d > 0) - double(d < 0) : d));
  });
}

template <class Item>
int64_t largest(std::span<const Item> items) {
  int64_t n = 0;
  for (const Item& item : items) n = std::max(n, item.n);
  return n;
}

}  // namespace

template <class T>
void momentum_cuda(const Exec& exec, std::span<const MomentumItem<T>> items, const double* accepted, double* sums,
                   double* work) {
  const simt::DeviceGuard guard(exec.device);
  for (size_t first = 0; first < items.size(); first += most_items) {
    const auto now = items.subspan(first, std::min<size_t>(most_items, items.size() - first));
    MomentumItems<T> launched{};
    for (size_t k = 0; k < now.size(); ++k) {
      launched.item[k] = now[k];
      launched.blocks[k] = static_cast<int>(blocks_of(now[k].n));
      launched.work[k] = work;
      work += momentum_work(now[k].n);
    }
    const unsigned count = static_cast<unsigned>(now.size());
    const dim3 grid(static_cast<unsigned>(blocks_of(largest(now))), count);
    double* const totals = sums + 4 * first;
    SIMT_LAUNCH(absolute_sum_kernel<T>, grid, threads, 0, exec.stream, launched);
    SIMT_LAUNCH(add_up_kernel<T>, count, 32, 0, exec.stream, launched, 1, 0, totals);
    SIMT_LAUNCH(momentum_kernel<T>, grid, threads, 0, exec.stream, launched, accepted + first, totals);
    SIMT_LAUNCH(add_up_kernel<T>, count, 96, 0, exec.stream, launched, 3, 1, totals);
  }
}

template <class T>
void apply_cuda(const Exec& exec, std::span<const ApplyItem<T>> items, const double* rates, const double* decays) {
  const simt::DeviceGuard guard(exec.device);
  for (size_t first = 0; first < items.size(); first += most_items) {
    const auto now = items.subspan(first, std::min<size_t>(most_items, items.size() - first));
    ApplyItems<T> launched{};
    std::copy(now.begin(), now.end(), launched.item);
    const dim3 grid(static_cast<unsigned>(blocks_of(largest(now))), static_cast<unsigned>(now.size()));
    SIMT_LAUNCH(apply_kernel<T>, grid, threads, 0, exec.stream, launched, rates + first, decays + first);
  }
}

#define KANTOR_INSTANTIATE(T)                                                                                  \
  template void momentum_cuda(const Exec&, std::span<const MomentumItem<T>>, const double*, double*, double*); \
  template void apply_cuda(const Exec&, std::span<const ApplyItem<T>>, const double*, const double*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
