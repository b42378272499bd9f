#include <algorithm>
#include <cmath>

#include "core/simd.h"
#include "optim/mfac.h"

namespace kantor {

namespace {

// std::hypot without its newest symbol, GLIBC_2.35, which would keep wheels from older systems. x > 0.
KANTOR_ALWAYS_INLINE double length(double x, double y) {
  const double scale = std::max(x, std::abs(y)), u = x / scale, v = y / scale;
  return scale * std::sqrt(u * u + v * v);
}

}  // namespace

// With row r apart, rows before it do not change, row r follows by substitution, and of the trailing part L33 the
// product changes by the old column r and the new one: L33 L33' + a a' - b b', a rotation and a hyperbolic one for each
// column.
KANTOR_SIMD bool replace_in_cholesky(int64_t m, int64_t r, double* __restrict s, double* __restrict L,
                                     double* __restrict a) {
  for (int64_t k = 0; k < r; ++k) {
    double* column = L + k * m;
    const double y = s[k] / column[k];
    column[r] = y;
    for (int64_t i = k + 1; i < m; ++i) s[i] -= y * column[i];
  }
  if (!(s[r] > 0)) return false;
  double* column = L + r * m;
  const double root = column[r] = std::sqrt(s[r]);
  double* b = s;
  for (int64_t i = r + 1; i < m; ++i) {
    a[i] = column[i];
    column[i] = b[i] = s[i] / root;
  }
  for (int64_t k = r + 1; k < m; ++k) {
    column = L + k * m;
    const double longer = length(column[k], a[k]);
    const double cosine = column[k] / longer, sine = a[k] / longer;
    const double ratio = b[k] / longer, left = (1 - ratio) * (1 + ratio);
    if (!(left > 1e-10)) return false;  // too many digits would be lost
    const double shrink = std::sqrt(left);
    column[k] = longer * shrink;
    for (int64_t i = k + 1; i < m; ++i) {
      const double rotated = cosine * column[i] + sine * a[i];
      a[i] = cosine * a[i] - sine * column[i];
      column[i] = (rotated - ratio * b[i]) / shrink;
      b[i] = shrink * b[i] - ratio * column[i];
    }
  }
  return true;
}

}  // namespace kantor
