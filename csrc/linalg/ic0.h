// Incomplete Cholesky factorisation without fill, IC(0): A ~ L L' on the pattern of A's lower triangle
// (Meijerink & van der Vorst 1977; Saad, algorithm 10.4 specialised to symmetric matrices).
#pragma once
#include <cstdint>

namespace kantor {

// `crow`, `col`, `values`: the lower triangle with its diagonal, rows sorted, so that the diagonal closes each row. The
// diagonal is scaled by 1 + shift first. Writes L on the same pattern; returns -1, or the row whose pivot is not positive.
template <class T>
int64_t ic0_factor(int64_t n, const int32_t* crow, const int32_t* col, const T* values, double shift, T* factor);

// Level schedule of a triangular solve: row i depends on its off-diagonal columns. `rows` (n) lists the rows level by level,
// `pointers` (n + 1) bounds the levels. Returns the number of levels. `upper` walks the rows from the last.
int64_t level_schedule(int64_t n, const int32_t* crow, const int32_t* col, bool upper, int32_t* pointers, int32_t* rows);

}  // namespace kantor
