// The vector updates and dots of the conjugate gradient family, one fused pass each, on one chunk of memory.
// Element type T is the storage; every sum is in double (core/reduce.h). SIMD clones agree bit for bit.
#pragma once
#include <array>
#include <cstdint>

namespace kantor {

using FourSums = std::array<double, 4>;

// x . y                                                                                    reads 2 words
template <class T>
double dot(int64_t n, const T* x, const T* y);

// sum_i d_i x_i^2                                                                          reads 2 words
template <class T>
double weighted_square(int64_t n, const T* d, const T* x);

// max_i |x_i|, NaN counting as nothing                                                     reads 1 word
template <class T>
double max_abs(int64_t n, const T* x);

// out = a x + b y                                                                          reads 2, writes 1 word
template <class T>
void multiply_add(int64_t n, T a, const T* x, T b, const T* y, T* out);

// y += a x                                                                                reads 2, writes 1 word
template <class T>
void multiply_add_in_place(int64_t n, T a, const T* x, T* y);

// y = a x + b y                                                                           reads 2, writes 1 word
template <class T>
void combine(int64_t n, T a, const T* x, T b, T* y);

// y *= a                                                                                  reads 1, writes 1 word
template <class T>
void scale_in_place(int64_t n, T a, T* y);

// p = z + beta p (p is not read when beta = 0)                                             reads 2, writes 1 word
template <class T>
void update_direction(int64_t n, T beta, const T* z, T* p);

// p = d z + beta p, elementwise d (p is not read when beta = 0)                            reads 3, writes 1 word
template <class T>
void update_direction_scaled(int64_t n, T beta, const T* d, const T* z, T* p);

// x += alpha p, r -= alpha q; returns r . r                                                reads 4, writes 2 words
template <class T>
double update_iterate(int64_t n, T alpha, const T* p, const T* q, T* x, T* r);

// y += alpha p, Hy += alpha Hp, r += alpha (Hp + shift p); returns r.r, y.y, y.Hy, Hy.Hy   reads 5, writes 3 words
template <class T>
FourSums update_with_product(int64_t n, T alpha, T shift, const T* p, const T* Hp, T* y, T* Hy, T* r);

// p = beta p - z, Hp = beta Hp - Hz (p, Hp not read when beta = 0); returns p.p, p.Hp, Hp.Hp, Hz.Hz
//                                                                                          reads 4, writes 2 words
template <class T>
FourSums advance_with_product(int64_t n, T beta, const T* z, const T* Hz, T* p, T* Hp);

// p.q, p.r, p.p, q.q                                                                      reads 3 words
template <class T>
FourSums direction_sums(int64_t n, const T* p, const T* q, const T* r);

// r = b - ax with ax in double; returns r . r before rounding to T                         reads 2, writes 1 word
template <class T>
double subtract(int64_t n, const T* b, const double* ax, T* r);

// y = a x, or y += a x when accumulating                                                   reads 1 (2), writes 1 word
template <class T, class Out>
void scale(int64_t n, double a, const T* x, Out* y, bool accumulate);

}  // namespace kantor
