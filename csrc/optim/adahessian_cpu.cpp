#include "optim/adahessian.h"

#include "core/reduce.h"
#include "core/simd.h"

namespace kantor {
namespace {

constexpr int64_t tile = 1024;       // elements whose denominators stay in the first-level cache
constexpr int64_t short_block = 32;  // up to here the elements of a block are added one after the other

// The 32 elements of a word, or fewer.
template <class T>
KANTOR_SIMD void signs(uint32_t word, int64_t n, T* z) {
  for (int64_t j = 0; j < n; ++j) z[j] = T(1) - T(2) * static_cast<T>((word >> j) & 1u);
}

template <class T>
KANTOR_SIMD double sum_of_magnitudes(int64_t n, const T* u) {
  const auto magnitude8 = [=](int64_t i) KANTOR_INLINE_LAMBDA {
    const Double8 x = load8(u + i);
    return x < 0 ? -x : x;
  };
  return lane_sum(n, magnitude8, [=](int64_t i) KANTOR_INLINE_LAMBDA { return std::abs(double(u[i])); });
}

// Side by side for many short blocks; sums begin at zero.
template <class T>
KANTOR_SIMD void sums_of_short_blocks(int64_t blocks, int64_t block, const T* __restrict u, double* __restrict sums) {
  for (int64_t j = 0; j < block; ++j)
    for (int64_t q = 0; q < blocks; ++q) sums[q] += std::abs(double(u[q * block + j]));
}

template <class T>
KANTOR_SIMD void average(int64_t blocks, T beta2, T rest, double scale, const double* __restrict sums,
                         T* __restrict v) {
  for (int64_t q = 0; q < blocks; ++q) {
    const T mean = static_cast<T>(sums[q] * scale);
    v[q] = beta2 * v[q] + rest * mean * mean;
  }
}

// For blocks of one element.
template <class T>
KANTOR_SIMD void average_elements(int64_t n, T beta2, T rest, T factor, const T* __restrict u, T* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    const T value = factor * u[i];
    v[i] = beta2 * v[i] + rest * value * value;
  }
}

template <class T>
KANTOR_SIMD void roots(int64_t n, T correction, const T* __restrict v, T* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(v[i]) * correction;
}
template <class T>
KANTOR_SIMD void roots_in_place(int64_t n, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);
}
template <class T>
KANTOR_SIMD void add_in_place(int64_t n, T a, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] += a;
}

// One denominator an element: v's elements in one vector loop, or one value for each run within a block.
template <class T>
void denominators(const Step<T>& step, int64_t block, int64_t begin, int64_t n, const T* v, T* out) {
  if (block == 1) {
    roots(n, step.correction, v + begin, out);
    if (step.power == T(0.5))
      roots_in_place(n, out);
    else if (step.power != T(1))
      for (int64_t i = 0; i < n; ++i) out[i] = std::pow(out[i], step.power);
    add_in_place(n, step.eps, out);
    return;
  }
  int64_t q = begin / block, end = (q + 1) * block - begin;
  for (int64_t i = 0; i < n; ++q, end += block) {
    const T value = step.denominator(v[q]);
    for (const int64_t last = std::min(end, n); i < last; ++i) out[i] = value;
  }
}

template <class T>
KANTOR_SIMD void move(int64_t n, const Step<T> step, const T* __restrict denominator, const T* __restrict g,
                      T* __restrict m, T* __restrict theta) {
  for (int64_t i = 0; i < n; ++i) {
    T moment = m[i], value = theta[i];
    step.move(denominator[i], g[i], moment, value);
    m[i] = moment;
    theta[i] = value;
  }
}

}  // namespace

template <class T>
void rademacher_cpu(const Exec& exec, const TensorTable& table, uint64_t seed) {
  for_each_chunk(exec.threads, table, [&](const TableRow& row, Chunk chunk) {
    T* const z = row.list<T>(0) + chunk.begin;
    for (int64_t i = 0; i < chunk.size; i += probes_per_call) {  // chunks begin at multiples of it
      const Philox bits = probe_bits(seed, row, (chunk.begin + i) / probes_per_call);
      for (int64_t lane = 0, at = i; lane < 4 && at < chunk.size; ++lane, at += 32)
        signs(bits.lane[lane], std::min<int64_t>(32, chunk.size - at), z + at);
    }
  });
}

template <class T>
void average_curvature_cpu(const Exec& exec, const TensorTable& table) {
  for_each_chunk(exec.threads, table, [&](const TableRow& row, Chunk chunk) {
    const T* const u = row.list<const T>(0) + chunk.begin;
    T* const v = row.list<T>(1) + chunk.begin / row.block;
    const T beta2 = static_cast<T>(row.number[0]), rest = static_cast<T>(row.number[1]);
    if (row.block == 1) return average_elements(chunk.size, beta2, rest, static_cast<T>(row.number[2]), u, v);
    double sums[chunk_size / 2];
    const int64_t blocks = chunk.size / row.block;
    if (row.block <= short_block) {
      std::fill_n(sums, blocks, 0.0);
      sums_of_short_blocks(blocks, row.block, u, sums);
    } else {
      for (int64_t q = 0; q < blocks; ++q) sums[q] = sum_of_magnitudes(row.block, u + q * row.block);
    }
    average(blocks, beta2, rest, row.number[2] / static_cast<double>(row.block), sums, v);
  });
}

template <class T>
void adahessian_step_cpu(const Exec& exec, const TensorTable& table) {
  for_each_chunk(exec.threads, table, [&](const TableRow& row, Chunk chunk) {
    const Step<T> step(row.number);
    const T *const g = row.list<const T>(1), *const v = row.list<const T>(3);
    T *const theta = row.list<T>(0), *const m = row.list<T>(2);
    T buffer[tile];
    for (int64_t i = chunk.begin; i < chunk.begin + chunk.size; i += tile) {
      const int64_t n = std::min(tile, chunk.begin + chunk.size - i);
      denominators(step, row.block, i, n, v, buffer);
      move(n, step, buffer, g + i, m + i, theta + i);
    }
  });
}

#define KANTOR_INSTANTIATE(T)                                                 \
  template void rademacher_cpu<T>(const Exec&, const TensorTable&, uint64_t); \
  template void average_curvature_cpu<T>(const Exec&, const TensorTable&);    \
  template void adahessian_step_cpu<T>(const Exec&, const TensorTable&);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
