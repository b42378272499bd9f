#include "graph/step_rows.h"

#include <cstring>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "core/simd.h"

namespace kantor {
namespace {

constexpr int64_t look_ahead = 48;  // entries between the prefetch of a far row and its use

// `width` elements in registers of at most 64 bytes.
template <class T, int width>
struct Block {
  static constexpr int bytes = std::min<int>(64, width * sizeof(T)), lanes = bytes / sizeof(T), count = width / lanes;
  typedef T Vector __attribute__((vector_size(bytes)));
  Vector v[count];

  KANTOR_ALWAYS_INLINE static Vector read(const T* from) {
    Vector vector;
    std::memcpy(&vector, from, bytes);
    return vector;
  }
  KANTOR_ALWAYS_INLINE void zero() {
    for (int l = 0; l < count; ++l) v[l] = Vector{};
  }
  KANTOR_ALWAYS_INLINE void scaled(T a, const T* x) {
    for (int l = 0; l < count; ++l) v[l] = read(x + l * lanes) * a;
  }
  KANTOR_ALWAYS_INLINE void add(T a, const T* x) {
    for (int l = 0; l < count; ++l) v[l] += read(x + l * lanes) * a;
  }
  KANTOR_ALWAYS_INLINE void store(T* y) const {
    for (int l = 0; l < count; ++l) std::memcpy(y + l * lanes, &v[l], bytes);
  }
  // Past the caches; y is a multiple of 16 bytes.
  KANTOR_ALWAYS_INLINE void stream(T* y) const {
#if defined(__SSE__)
    for (int part = 0; part < count * bytes / 16; ++part) {
      __m128 quarter;
      std::memcpy(&quarter, reinterpret_cast<const char*>(v) + 16 * part, 16);
      _mm_stream_ps(reinterpret_cast<float*>(y) + 4 * part, quarter);
    }
#else
    store(y);
#endif
  }
  KANTOR_ALWAYS_INLINE static void prefetch(const T* x) {
    for (int c = 0; c < width; c += static_cast<int>(64 / sizeof(T))) __builtin_prefetch(x + c);
  }
};

// The dropout factors of a few rows of a tile at a time, from 16 counters: as many as vectorise well.
template <class T, int width>
struct Factors {
  static constexpr int counters = 16, blocks = (width + 3) / 4, rows = counters / blocks;
  T factors[4 * counters];

  // Columns first..first+width-1 of rows row..row+rows-1; `first` is a multiple of 4.
  KANTOR_ALWAYS_INLINE void draw(const Dropout<T>& dropout, int64_t step, int64_t row, int64_t first) {
    const Dropout<T> local = dropout;
    uint32_t random[4][counters];
    for (int q = 0; q < counters; ++q) {
      const Philox bits = local.bits(first / 4 + q % blocks, row + q / blocks, step);
      for (int l = 0; l < 4; ++l) random[l][q] = bits.lane[l];
    }
    for (int q = 0; q < counters; ++q)
      for (int l = 0; l < 4; ++l) factors[4 * q + l] = local.factor(random[l][q]);
  }
  KANTOR_ALWAYS_INLINE void apply(int64_t row, T* value) const {
    for (int c = 0; c < width; ++c) value[c] *= factors[row * blocks * 4 + c];
  }
};

// What a step does beside D and E: teleport, mask and the adjoint's sum.
template <class T, int width>
KANTOR_ALWAYS_INLINE void finish_row(const Step<T>& step, int64_t i, const Factors<T, width>& factors, int64_t row,
                                     T* value) {
  if (step.start.data) {
    const T* start = step.start.row(i);
    for (int64_t c = 0; c < step.columns; ++c) value[c] += step.teleport * start[c];
  }
  if (step.dropout.active()) factors.apply(row, value);
  if (step.sum.data) {
    T* sum = step.sum.row(i);
    if (step.last)
      for (int64_t c = 0; c < step.columns; ++c) value[c] += sum[c];
    else
      for (int64_t c = 0; c < step.columns; ++c) sum[c] += step.teleport * value[c];
  }
}

template <class T, int width, Fetch::Mode mode>
KANTOR_SIMD void step_rows_of(const Step<T>& step, Range rows) {
  const int32_t *rowptr = step.pattern.rowptr, *col = step.pattern.col;
  const T *edge = step.edge, *diagonal = step.diagonal, *source = step.source.data;
  const int64_t stride = step.source.stride, last_entry = step.pattern.nnz - 1;
  const int64_t ahead = step.fetch.ahead, last_row = step.pattern.n - 1;
  const bool plain = !step.start.data && !step.sum.data && !step.dropout.active() && step.stored == width;
  const bool stream = step.fetch.stream && width * sizeof(T) >= 64 &&
                      (reinterpret_cast<uintptr_t>(step.target.data) | step.target.stride * sizeof(T)) % 16 == 0;
  Factors<T, width> factors;
  int64_t drawn = rows.begin;  // from this row on, where there are masks
  int32_t e = rowptr[rows.begin];
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    if constexpr (mode == Fetch::near) Block<T, width>::prefetch(source + std::min(i + ahead, last_row) * stride);
    Block<T, width> sum;
    if (diagonal)
      sum.scaled(diagonal[i], source + i * stride);
    else
      sum.zero();
    for (const int32_t end = rowptr[i + 1]; e < end; ++e) {
      if constexpr (mode == Fetch::far)
        Block<T, width>::prefetch(source + col[std::min(e + look_ahead, last_entry)] * stride);
      sum.add(edge[e], source + col[e] * stride);
    }
    if (plain && stream) {
      sum.stream(step.target.row(i));
    } else if (plain) {
      sum.store(step.target.row(i));
    } else {
      if (step.dropout.active() && (i - rows.begin) % factors.rows == 0)
        factors.draw(step.dropout, step.mask_step, drawn = i, step.first_column);
      T value[width];
      sum.store(value);
      finish_row(step, i, factors, i - drawn, value);
      std::copy_n(value, step.stored, step.target.row(i));
    }
  }
#if defined(__SSE__)
  if (stream) _mm_sfence();  // before other threads read the rows
#endif
}

template <class T, int width>
KANTOR_SIMD void pack_rows_of(Rows<const T> x, int64_t columns, const Dropout<T>& dropout, int64_t mask_step,
                              int64_t first_column, Rows<T> tile, int64_t stored, Range rows) {
  Factors<T, width> factors;
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    T value[width] = {};
    std::copy_n(x.row(i), columns, value);
    if (dropout.active()) {
      const int64_t row = (i - rows.begin) % factors.rows;
      if (row == 0) factors.draw(dropout, mask_step, i, first_column);
      factors.apply(row, value);
    }
    std::copy_n(value, stored, tile.row(i));
  }
}

// Lanes, not one sum: fast, and of about the accuracy of pairwise summation. Always in the same order.
template <class T>
KANTOR_ALWAYS_INLINE T dot(int64_t length, const T* a, const T* b) {
  constexpr int lanes = 64 / sizeof(T);
  using B = Block<T, lanes>;
  typename B::Vector even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * lanes <= length; c += 2 * lanes) {
    even += B::read(a + c) * B::read(b + c);
    odd += B::read(a + c + lanes) * B::read(b + c + lanes);
  }
  if (c + lanes <= length) {
    even += B::read(a + c) * B::read(b + c);
    c += lanes;
  }
  even += odd;
  T rest = 0;
  for (; c < length; ++c) rest += a[c] * b[c];
  T part[lanes];
  std::memcpy(part, &even, sizeof part);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return part[0] + rest;
}

template <class T>
KANTOR_SIMD void dot_rows_of(const Pattern& pattern, int64_t length, Rows<const T> a, Rows<const T> b, Range rows,
                             bool accumulate, T* out, T* diagonal) {
  const int32_t* col = pattern.col;
  int32_t e = pattern.rowptr[rows.begin];
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const T* ai = a.row(i);
    for (const int32_t end = pattern.rowptr[i + 1]; e < end; ++e) {
      const T value = dot(length, ai, b.row(col[e]));
      out[e] = accumulate ? out[e] + value : value;
    }
    if (diagonal) diagonal[i] += dot(length, ai, b.row(i));
  }
}

// body.operator()<width>() for a width that is a power of two.
template <class T, class Body>
void switch_width(int64_t width, Body&& body) {
  switch (width) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 4:
      return body.template operator()<4>();
    case 8:
      return body.template operator()<8>();
    case 16:
      return body.template operator()<16>();
    case 32:
      return body.template operator()<32>();
    default:
      if constexpr (max_width<T> == 64) return body.template operator()<64>();
  }
}

}  // namespace

template <class T>
void step_rows(const Step<T>& step, Range rows) {
  if (rows.size() == 0) return;
  switch_width<T>(step.width, [&]<int width>() {
    if constexpr (width * sizeof(T) >= 32) {  // many narrow rows share a line: not worth code of their own
      if (step.fetch.mode == Fetch::near) return step_rows_of<T, width, Fetch::near>(step, rows);
      if (step.fetch.mode == Fetch::far) return step_rows_of<T, width, Fetch::far>(step, rows);
    }
    step_rows_of<T, width, Fetch::none>(step, rows);
  });
}

template <class T>
void pack_rows(Rows<const T> x, int64_t columns, int64_t width, const Dropout<T>& dropout, int64_t mask_step,
               int64_t first_column, Rows<T> tile, Range rows) {
  switch_width<T>(width,
                  [&]<int w>() { pack_rows_of<T, w>(x, columns, dropout, mask_step, first_column, tile, w, rows); });
}

template <class T>
void mask_rows(const Dropout<T>& dropout, int64_t mask_step, int64_t first_column, int64_t width, Rows<T> mask,
               int64_t columns, Range rows) {
  T ones[max_width<T>];
  std::fill(ones, ones + max_width<T>, T(1));
  switch_width<T>(width, [&]<int w>() {
    pack_rows_of<T, w>({ones, 0}, columns, dropout, mask_step, first_column, mask, columns, rows);
  });
}

template <class T>
void dot_rows(const Pattern& pattern, int64_t length, Rows<const T> a, Rows<const T> b, Range rows, bool accumulate,
              T* out, T* diagonal) {
  if (rows.size() > 0) dot_rows_of(pattern, length, a, b, rows, accumulate, out, diagonal);
}

Range rows_of(const Pattern& pattern, int worker, int workers) {
  // Row i begins after rowptr[i] entries and i rows, each of which costs about as much as an entry.
  const auto first = [&](int w) {
    const int64_t before = (pattern.nnz + pattern.n) * w / workers;
    int64_t low = 0, high = pattern.n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (pattern.rowptr[middle] + middle < before)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  return {first(worker), worker + 1 == workers ? pattern.n : first(worker + 1)};
}

Fetch fetch_for(const Pattern& pattern, int64_t bytes) {
  // Bytes of a tile that stays in cache by itself; of a window of rows that does; of one that no cache holds.
  constexpr int64_t cached = 512 << 10, window = 256 << 10, uncached = 48 << 20;
  constexpr int64_t samples = 256;
  Fetch fetch;
  fetch.stream = pattern.n * bytes > uncached;
  if (pattern.nnz == 0 || pattern.n * bytes <= cached) return fetch;
  int64_t far = 0, seen = 0;
  for (int64_t s = 0; s < samples; ++s) {
    const int64_t i = pattern.n * s / samples;
    for (int32_t e = pattern.rowptr[i]; e < pattern.rowptr[i + 1]; ++e, ++seen) {
      const int64_t distance = pattern.col[e] - i;
      if (std::max(distance, -distance) * bytes > window)
        ++far;
      else
        fetch.ahead = std::max(fetch.ahead, distance);
    }
  }
  fetch.mode = 20 * far > seen ? Fetch::far : Fetch::near;
  fetch.ahead += 32;
  return fetch;
}

#define KANTOR_INSTANTIATE(T)                                                                                    \
  template void step_rows(const Step<T>&, Range);                                                                \
  template void pack_rows(Rows<const T>, int64_t, int64_t, const Dropout<T>&, int64_t, int64_t, Rows<T>, Range); \
  template void mask_rows(const Dropout<T>&, int64_t, int64_t, int64_t, Rows<T>, int64_t, Range);                \
  template void dot_rows(const Pattern&, int64_t, Rows<const T>, Rows<const T>, Range, bool, T*, T*);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
