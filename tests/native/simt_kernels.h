// Kernels that exercise every construct of core/simt.h, and kernels with planted bugs. Compiled by g++ for the
// emulator's tests (test_simt.cpp, plant_oob.cpp) and by nvcc to show that the same text is CUDA (simt_kernels.cu).
#pragma once
#include "core/simt.h"

namespace kantor::simt_test {

// --- where am I ---

struct Coordinates {
  unsigned thread[3], block[3], rank, lane, warp;
};

__global__ void record_coordinates(Coordinates* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * simt::block_size() + simt::thread_rank()] = {{threadIdx.x, threadIdx.y, threadIdx.z},
                                                           {blockIdx.x, blockIdx.y, blockIdx.z},
                                                           simt::thread_rank(),
                                                           simt::lane_index(),
                                                           simt::warp_index()};
}

__global__ void count_visits(std::int64_t n, int* visits) {
  simt::grid_stride(n, [&](std::int64_t i) { ++visits[i]; });
}

__global__ void record_global_index(std::int64_t n, std::int64_t* out) {
  const std::int64_t i = simt::global_thread_index();
  if (i < n) out[i] = i;
}

// --- warp operations ---

// Rows of `out`: shfl, shfl_up, shfl_down, shfl_xor, one value per thread of the block.
template <class T>
__global__ void shuffle_values(const T* in, T* out, int amount, int width) {
  const unsigned i = threadIdx.x, n = blockDim.x;
  const T value = in[i];
  out[i] = __shfl_sync(simt::full_warp, value, amount, width);
  out[n + i] = __shfl_up_sync(simt::full_warp, value, static_cast<unsigned>(amount), width);
  out[2 * n + i] = __shfl_down_sync(simt::full_warp, value, static_cast<unsigned>(amount), width);
  out[3 * n + i] = __shfl_xor_sync(simt::full_warp, value, amount, width);
}

// Even and odd lanes each among themselves: `mask` differs from lane to lane.
__global__ void vote_by_parity(const int* predicate, unsigned* ballot, int* any, int* all) {
  const unsigned i = threadIdx.x;
  const unsigned mask = i % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  ballot[i] = __ballot_sync(mask, predicate[i]);
  any[i] = __any_sync(mask, predicate[i]);
  all[i] = __all_sync(mask, predicate[i]);
}

// Each lane of a warp reads what its neighbour wrote; no barrier of the block.
__global__ void rotate_in_warp(const int* in, int* out) {
  SIMT_SHARED(int, values, 1024);
  const unsigned i = threadIdx.x, warp_start = i / 32 * 32;
  values[i] = in[i];
  __syncwarp();
  out[i] = values[warp_start + (i + 1) % 32];
}

// Lanes that returned take no part: 8 lanes vote with the mask of the whole warp.
__global__ void vote_after_return(unsigned* ballot) {
  if (threadIdx.x % 32 >= 8) return;
  ballot[threadIdx.x] = __ballot_sync(simt::full_warp, 1);
}

// --- shared memory ---

template <class T>
__global__ void transpose_tiles(int rows, int columns, const T* in, T* out) {
  constexpr int tile = 16;
  SIMT_SHARED(T, values, tile * (tile + 1));
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x) * tile + x, row = static_cast<int>(blockIdx.y) * tile + y;
  if (row < rows && column < columns) values[y * (tile + 1) + x] = in[row * columns + column];
  __syncthreads();
  const int out_row = static_cast<int>(blockIdx.x) * tile + y, out_column = static_cast<int>(blockIdx.y) * tile + x;
  if (out_row < columns && out_column < rows) out[out_row * rows + out_column] = values[x * (tile + 1) + y];
}

template <class T>
__global__ void reverse_blocks(const T* in, T* out) {
  SIMT_DYNAMIC_SHARED(T, values);
  const unsigned i = threadIdx.x, first = blockIdx.x * blockDim.x;
  values[i] = in[first + i];
  __syncthreads();
  out[first + i] = values[blockDim.x - 1 - i];
}

// What is in shared memory before anyone wrote to it.
__global__ void read_fresh_shared(double* static_value, unsigned* dynamic_value) {
  SIMT_SHARED(double, values, 4);
  SIMT_DYNAMIC_SHARED(unsigned, words);
  static_value[blockIdx.x] = values[3];
  dynamic_value[blockIdx.x] = words[0];
  values[3] = 1;
  words[0] = 1;
}

// --- atomics and bits ---

struct Tallies {
  int sum, largest, smallest;
  unsigned unsigned_sum, unsigned_largest, ring;
  unsigned long long huge_sum, huge_largest;
  long long signed_smallest;
  float single_sum;
  double double_sum, double_by_cas;
};

__global__ void tally(int n, const int* values, Tallies* t) {
  simt::grid_stride(n, [&](std::int64_t i) {
    const int v = __ldg(values + i);
    atomicAdd(&t->sum, v);
    atomicMax(&t->largest, v);
    atomicMin(&t->smallest, v);
    atomicAdd(&t->unsigned_sum, static_cast<unsigned>(v));
    atomicMax(&t->unsigned_largest, static_cast<unsigned>(v));
    atomicInc(&t->ring, 4u);
    atomicAdd(&t->huge_sum, static_cast<unsigned long long>(v));
    atomicMax(&t->huge_largest, static_cast<unsigned long long>(v));
    atomicMin(&t->signed_smallest, static_cast<long long>(v));
    atomicAdd(&t->single_sum, static_cast<float>(v));
    atomicAdd(&t->double_sum, static_cast<double>(v));
    auto* word = reinterpret_cast<unsigned long long*>(&t->double_by_cas);
    unsigned long long seen = *word, expected;
    do {
      expected = seen;
      const double sum = __longlong_as_double(static_cast<long long>(expected)) + v;
      seen = atomicCAS(word, expected, static_cast<unsigned long long>(__double_as_longlong(sum)));
    } while (seen != expected);
  });
}

// Threads hand a token on: each stores its number and passes on the number it found.
__global__ void pass_token(int* slot, int* found) {
  found[simt::global_thread_index()] = atomicExch(slot, static_cast<int>(simt::global_thread_index()));
}

__global__ void count_bits(int n, const unsigned* words, int* ones, int* first, int* leading) {
  simt::grid_stride(n, [&](std::int64_t i) {
    ones[i] = __popc(words[i]);
    first[i] = __ffs(static_cast<int>(words[i]));
    leading[i] = __clz(static_cast<int>(words[i]));
  });
}

__global__ void add_pairs(int n, const double2* a, const float4* b, double* sums) {
  simt::grid_stride(n, [&](std::int64_t i) {
    const double2 p = a[i];
    const float4 q = b[i];
    sums[i] = p.x + p.y + static_cast<double>(q.x + q.y + q.z + q.w);
  });
}

// --- reductions ---

// Rows of `out`: warp_sum, warp_max, block_sum, block_max, one value per thread. The block reductions twice in a row,
// as an algorithm uses them.
template <class T>
__global__ void reduce_values(const T* in, T* out) {
  const unsigned i = threadIdx.x, n = blockDim.x;
  const T value = in[i];
  out[i] = simt::warp_sum(value);
  out[n + i] = simt::warp_max(value);
  const T sum = simt::block_sum(value);
  out[2 * n + i] = simt::block_sum(value) == sum ? sum : T(-1);
  out[3 * n + i] = simt::block_max(value);
}

// dot(x, y) in one launch; x and y are read once, `partial` holds a value per block.
template <class T>
__global__ void dot(std::int64_t n, const T* __restrict__ x, const T* __restrict__ y, T* partial, unsigned* ticket,
                    T* result) {
  T sum = 0;
  simt::grid_stride(n, [&](std::int64_t i) { sum += x[i] * y[i]; });
  sum = simt::block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  if (!simt::is_last_block(ticket)) return;
  sum = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) sum += partial[b];
  sum = simt::block_sum(sum);
  if (threadIdx.x == 0) *result = sum;
}

// A warp per row of a CSR matrix; the warps beyond the last row return at once.
template <class T>
__global__ void csr_product(int rows, const int* __restrict__ starts, const int* __restrict__ columns,
                            const T* __restrict__ values, const T* __restrict__ x, T* __restrict__ y) {
  const int row = static_cast<int>(simt::global_thread_index() / 32);
  if (row >= rows) return;
  T sum = 0;
  for (int k = starts[row] + static_cast<int>(simt::lane_index()); k < starts[row + 1]; k += 32) {
    sum += values[k] * x[columns[k]];
  }
  sum = simt::warp_sum(sum);
  if (simt::lane_index() == 0) y[row] = sum;
}

// log(sum_j exp(a_ij)) of each row, a row per block, staged in dynamic shared memory.
template <class T>
__global__ void log_sum_exp_rows(int n, const T* a, T* out) {
  SIMT_DYNAMIC_SHARED(T, row);
  const T* source = a + static_cast<std::int64_t>(blockIdx.x) * n;
  T largest = source[0];
  for (int j = static_cast<int>(threadIdx.x); j < n; j += static_cast<int>(blockDim.x)) {
    row[j] = source[j];
    largest = max(largest, row[j]);
  }
  largest = simt::block_max(largest);
  T sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < n; j += static_cast<int>(blockDim.x)) sum += exp(row[j] - largest);
  sum = simt::block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = largest + log(sum);
}

// --- planted bugs ---

__global__ void plant_partial_barrier(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void plant_two_barriers(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void plant_barrier_against_shuffle(int* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(simt::full_warp, 1, 1);
  }
}

// The barrier between writing and reading shared memory is missing.
__global__ void plant_race(const double* in, double* out) {
  SIMT_SHARED(double, values, 64);
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// Block b relies on block b-1 having run.
__global__ void plant_block_order(int* chain) {
  if (threadIdx.x == 0) chain[blockIdx.x + 1] = chain[blockIdx.x] + 1;
}

__global__ void plant_shuffle_from_returned(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(simt::full_warp, 1, 1);
}

__global__ void plant_shuffle_outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 16);
}

__global__ void plant_missing_from_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

__global__ void plant_bad_width(int* out) { out[threadIdx.x] = __shfl_sync(simt::full_warp, 1, 0, 24); }

template <class T>
__global__ void plant_global_overrun(std::int64_t n, T* x) {
  const std::int64_t i = simt::global_thread_index();
  if (i <= n) x[i] = 1;
}

__global__ void plant_static_overrun(unsigned* out, unsigned excess) {
  SIMT_SHARED(unsigned, values, 32);
  unsigned* const start = values;
  start[threadIdx.x + excess] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void plant_dynamic_overrun(unsigned* out, unsigned excess) {
  SIMT_DYNAMIC_SHARED(unsigned, values);
  values[threadIdx.x + excess] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

}  // namespace kantor::simt_test
