// What a kernel needs for tensor cores: aligned groups of words, bfloat16 and TF32, products of small matrices, and
// copies into shared memory that pass no register. Under nvcc the instructions of sm_80; under the emulator the lanes
// of a warp lay their fragments out for each other and each computes its own four results from them.
#pragma once
#include <bit>
#include <cstdint>

#include "core/simt.h"

namespace kantor {

// n 32-bit words that are loaded and stored as one: n = 1, 2 or 4.
template <int n>
struct alignas(4 * n) Words {
  uint32_t at[n];
};

// --- bfloat16, the upper half of a float, and TF32, a float with 10 bits of mantissa ---

__device__ __forceinline__ float from_bf16(uint32_t bits) {
  return __int_as_float(static_cast<int>(bits << 16));  // NOLINT: the lower half of `bits`
}

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ uint16_t to_bf16(float x) {
  const auto bits = static_cast<uint32_t>(__float_as_int(x));
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// To the nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__int_as_float(static_cast<int>(bits))));
  return rounded;
#else
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
#endif
}

// --- products ---

enum class TensorCore { bf16_k16, bf16_k8, tf32_k8 };

// Words of a fragment: of a row of A, or of a column of B.
constexpr int fragment_words(TensorCore kind) { return kind == TensorCore::bf16_k8 ? 1 : 2; }

// c += A B with A 16 x k, B k x 8, by a whole warp. Lane 4 g + t holds of
//   A: its k/4 elements number t of row g, then those of row g + 8
//   B: its k/4 elements number t of column g
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// Which k these elements are does not matter as long as A and B agree, so each lane takes adjacent ones: the
// instructions' own order is another (PTX manual, "Matrix fragments for mma").
template <TensorCore kind>
using Fragment = Words<fragment_words(kind)>;

#if defined(__CUDA_ARCH__)

template <TensorCore kind>
__device__ __forceinline__ void multiply_add(float (&c)[4], const Fragment<kind> (&a)[2], const Fragment<kind>& b) {
  if constexpr (kind == TensorCore::bf16_k16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0].at[0]), "r"(a[1].at[0]), "r"(a[0].at[1]), "r"(a[1].at[1]), "r"(b.at[0]), "r"(b.at[1]));
  } else if constexpr (kind == TensorCore::bf16_k8) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0].at[0]), "r"(a[1].at[0]), "r"(b.at[0]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0].at[0]), "r"(a[1].at[0]), "r"(a[0].at[1]), "r"(a[1].at[1]), "r"(b.at[0]), "r"(b.at[1]));
  }
}

#elif defined(KANTOR_EMULATE)

namespace detail {

struct LaneFragments {
  Words<2> a[2], b;
};
// Of each warp of the block that runs on this OS thread: its fibers take turns.
inline thread_local LaneFragments lane_fragments[32][32];

template <TensorCore kind>
float product(uint32_t a, uint32_t b) {
  if constexpr (kind == TensorCore::tf32_k8) return std::bit_cast<float>(a) * std::bit_cast<float>(b);
  return from_bf16(a & 0xffffu) * from_bf16(b & 0xffffu) + from_bf16(a >> 16) * from_bf16(b >> 16);
}

}  // namespace detail

template <TensorCore kind>
void multiply_add(float (&c)[4], const Fragment<kind> (&a)[2], const Fragment<kind>& b) {
  constexpr int words = fragment_words(kind);
  detail::LaneFragments(&lanes)[32] = detail::lane_fragments[simt::warp_index()];
  const unsigned lane = simt::lane_index(), g = lane / 4, t = lane % 4;
  for (int w = 0; w < words; ++w) {
    lanes[lane].a[0].at[w] = a[0].at[w];
    lanes[lane].a[1].at[w] = a[1].at[w];
    lanes[lane].b.at[w] = b.at[w];
  }
  __syncwarp();
  for (unsigned column = 0; column < 2; ++column) {
    for (unsigned k = 0; k < 4; ++k) {
      const detail::LaneFragments &left = lanes[4 * g + k], &right = lanes[4 * (2 * t + column) + k];
      for (int w = 0; w < words; ++w) {
        c[column] += detail::product<kind>(left.a[0].at[w], right.b.at[w]);
        c[2 + column] += detail::product<kind>(left.a[1].at[w], right.b.at[w]);
      }
    }
  }
  __syncwarp();
}

#else  // nvcc's pass for the host sees kernels, but never runs them

template <TensorCore kind>
__device__ void multiply_add(float (&)[4], const Fragment<kind> (&)[2], const Fragment<kind>&) {}

#endif

// --- 16 bytes from global to shared memory; zeros instead of them where not `inside` ---

__device__ __forceinline__ void copy_16_async(void* to, const void* from, bool inside) {
#if defined(__CUDA_ARCH__)
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(inside ? 16 : 0)
      : "memory");
#else
  Words<4> value{};
  if (inside) value = *static_cast<const Words<4>*>(from);
  *static_cast<Words<4>*>(to) = value;
#endif
}

// Of the calling thread; the block still needs a barrier.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace kantor
