// Incomplete Cholesky factorisation without fill, IC(0): A ~ L L' on the pattern of A's lower triangle
// (Meijerink & van der Vorst 1977; Saad, algorithm 10.4 specialised to symmetric matrices).
#pragma once
#include <cstdint>

namespace kantor {

// `crow`, `col`, `values`: the lower triangle with its diagonal, rows sorted, so that the diagonal closes each row. The
// diagonal is scaled by 1 + shift first. Writes L on the same pattern; returns -1, or the row whose pivot is not
// positive.
template <class T>
int64_t ic0_factor(int64_t n, const int32_t* crow, const int32_t* col, const T* values, double shift, T* factor);

// Level schedule of the triangular solves: a row's level is one more than the largest among the rows it depends on.
// `rows` (n) lists the rows level by level, `pointers` (n + 1) bounds the levels. Returns the number of levels. No two
// rows of a level are coupled, so the same schedule, walked backwards, serves the transposed factor.
int64_t level_schedule(int64_t n, const int32_t* crow, const int32_t* col, int32_t* pointers, int32_t* rows);

}  // namespace kantor
