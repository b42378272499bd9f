#include <algorithm>

#include "core/parallel.h"
#include "optim/mfac_rows.h"

namespace kantor {
namespace {

// Of a panel, which stays in the second-level cache.
int64_t panel_columns(const Window& w) {
  return std::min(w.block, std::clamp<int64_t>((int64_t{1} << 16) / w.rows, 64, 256));
}

// Bands of rows, of which the last ones are empty, for tiles that reach over the end.
struct Bands {
  int64_t rows;
  int64_t count() const { return (rows + band_rows - 1) / band_rows; }
  int64_t padded() const { return count() + tile_bands - 1; }
  int64_t stride() const { return padded() * band_rows; }  // of the products
};

template <class S>
void interleave(const Window& w, const S* G, int64_t band, Range columns, double* out) {
  const int64_t first = band * band_rows, count = std::min<int64_t>(band_rows, w.rows - first);
  const S* row = G + first * w.stride + columns.begin;
  for (int64_t k = 0; k < columns.size(); ++k)
    for (int64_t i = 0; i < count; ++i) out[k * band_rows + i] = widen(row[i * w.stride + k]);
}

}  // namespace

int64_t gram_workspace(const Window& w) {
  const Bands bands{w.rows};
  return bands.stride() * (bands.count() * band_rows + panel_columns(w));
}

template <class S>
bool mfac_gram_cpu(const Exec& exec, const Gram<S>& p, const std::function<bool()>& interrupted, int widest) {
  const Window& w = p.window;
  const Bands bands{w.rows};
  const RowLoops<S> loops = row_loops_for<S>(widest);
  const int64_t most = panel_columns(w), m = w.rows, stride = bands.stride(), size = bands.count() * band_rows * stride;
  double *sums = p.workspace, *panel = p.workspace + size;
  bool finished = true;
  Team::run(threads_for(exec.threads, m * m * most / 16), true, [&](Team& team) {
    for (int64_t b = 0; b < w.blocks(); ++b) {
      const int64_t end = std::min(w.d, (b + 1) * w.block);
      std::fill(sums, sums + size, 0.0);
      for (int64_t begin = b * w.block; begin < end; begin += most) {
        const Range columns{begin, std::min(end, begin + most)};
        if (interrupted && interrupted()) return void(finished = false);
        const int64_t n = columns.size(), length = n * band_rows;
        team.pass([&](int worker, int workers) {
          for (int64_t band = worker; band < bands.padded(); band += workers) {
            double* out = panel + band * length;
            if ((band + 1) * band_rows > m) std::fill(out, out + length, 0.0);
            if (band < bands.count()) interleave(w, p.G, band, columns, out);
          }
          team.barrier(workers);
          for (int64_t band = worker; band < bands.count(); band += workers)  // interleaved: later ones are longer
            for (int64_t q = 0; q <= band; q += tile_bands)
              loops.tile(n, panel + band * length, panel + q * length, sums + (band * stride + q) * band_rows, stride);
        });
      }
      double* out = p.out + b * m * m;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j <= i; ++j) out[i * m + j] = out[j * m + i] = sums[i * stride + j];
    }
  });
  return finished;
}

#define KANTOR_INSTANTIATE(S) \
  template bool mfac_gram_cpu<S>(const Exec&, const Gram<S>&, const std::function<bool()>&, int);
KANTOR_INSTANTIATE(float)
KANTOR_INSTANTIATE(double)
KANTOR_INSTANTIATE(Bfloat16)
KANTOR_INSTANTIATE(Half)
KANTOR_INSTANTIATE(int8_t)
#undef KANTOR_INSTANTIATE

}  // namespace kantor
