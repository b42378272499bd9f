// KANTOR_HD marks a function that both a CUDA kernel and a plain C++ loop call. It is inlined into either, so that a
// functor costs nothing inside a vectorised loop. Includable without simt.h.
#pragma once

#if defined(__CUDACC__)
#define KANTOR_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define KANTOR_HD inline __attribute__((always_inline))
#else
#define KANTOR_HD inline
#endif
