// Passes over a window of gradients by every instruction set there is: the same bits, and the sums of the definition.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "optim/mfac.h"

using namespace kantor;

namespace {

template <class S>
struct Problem {
  Window window;
  std::vector<S> G;
  std::vector<Wide<S>> x;
  std::vector<double> c;

  Problem(int64_t rows, int64_t d, int64_t block, int64_t count) : window{rows, d, (d + 63) / 64 * 64, block} {
    std::mt19937_64 generator(7);
    std::normal_distribution<Wide<S>> normal;
    const Wide<S> scale = std::is_same_v<S, int8_t> ? 30 : 1;
    G.resize(rows * window.stride);
    for (int64_t i = 0; i < rows; ++i)
      // Of all magnitudes, subnormal halves among them.
      for (int64_t j = 0; j < d; ++j)
        G[i * window.stride + j] = narrow<S>(scale * normal(generator) * std::pow(Wide<S>(0.1), Wide<S>(j % 7)));
    for (int64_t j = 0; j < count * d; ++j) x.push_back(normal(generator));
    for (int64_t j = 0; j < count * window.blocks() * rows; ++j) c.push_back(normal(generator));
  }
};

// Not for the many small blocks, whose products are many, and are held as matrices of their own where there are more
// rows.
bool has_gram(const Window& w) { return w.block >= 16 || w.blocks() == 1; }

template <class S>
struct Results {
  std::vector<double> products, gram;
  std::vector<Wide<S>> combination;
};

template <class S>
Results<S> passes(Problem<S> p, int64_t slot, int threads, int widest) {
  Exec exec;
  exec.threads = threads;
  const Window& w = p.window;
  const int64_t count = slot < 0 ? static_cast<int64_t>(p.x.size()) / w.d : 1;
  const bool gram = slot < 0 && has_gram(w);
  std::vector<double> workspace(std::max(products_workspace(w), gram ? gram_workspace(w) : 0) + 1);
  Results<S> results{std::vector<double>(count * w.blocks() * w.rows),
                     std::vector<double>(gram ? w.blocks() * w.rows * w.rows : 0), std::vector<Wide<S>>(count * w.d)};
  if (gram) mfac_gram_cpu<S>(exec, {w, p.G.data(), results.gram.data(), workspace.data()}, {}, widest);
  mfac_products_cpu<S>(exec, {w, p.G.data(), slot, 0.25, count, p.x.data(), results.products.data(), workspace.data()},
                       widest);
  mfac_combine_cpu<S>(exec, {w, p.G.data(), count, p.c.data(), 0.5, p.x.data(), results.combination.data()}, widest);
  return results;
}

}  // namespace

TEST_CASE_TEMPLATE("all instruction sets", S, float, double, Bfloat16, Half, int8_t) {
  for (const int64_t rows : {1, 7, 8, 21, 140})
    for (const int64_t d : {1, 9, 200, 5000})
      for (const int64_t block : {int64_t{1}, int64_t{3}, int64_t{16}, int64_t{120}, d}) {
        if (block > d) continue;
        CAPTURE(rows);
        CAPTURE(d);
        CAPTURE(block);
        const Problem<S> p(rows, d, block, 2);
        for (const int64_t slot : {int64_t{-1}, rows / 2}) {
          const Results<S> plain = passes<S>(p, slot, 1, 128);
          for (const int widest : {128, 256, 512}) {
            const Results<S> results = passes<S>(p, slot, 3, widest);
            CHECK(results.products == plain.products);
            CHECK(results.combination == plain.combination);
            CHECK(results.gram == plain.gram);
          }
        }
        const Window& w = p.window;
        const Results<S> results = passes<S>(p, -1, 1, 512);
        double worst = 0;
        for (int64_t b = 0; b < w.blocks(); ++b)
          for (int64_t i = 0; i < rows; ++i) {
            double sum = 0, magnitude = 1e-300;
            for (int64_t j = b * block; j < std::min(d, (b + 1) * block); ++j) {
              const double term = widen(p.G[i * w.stride + j]) * p.x[j];
              sum += term, magnitude += std::abs(term);
            }
            worst = std::max(worst, std::abs(results.products[b * rows + i] - sum) / magnitude);
          }
        CHECK(worst <= 1e-14);
        worst = 0;
        for (int64_t b = 0; has_gram(w) && b < w.blocks(); ++b)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t e = 0; e < rows; e += 1 + rows / 5) {
              double sum = 0, magnitude = 1e-300;
              for (int64_t j = b * block; j < std::min(d, (b + 1) * block); ++j) {
                const double term = widen(p.G[i * w.stride + j]) * widen(p.G[e * w.stride + j]);
                sum += term, magnitude += std::abs(term);
              }
              worst = std::max(worst, std::abs(results.gram[(b * rows + i) * rows + e] - sum) / magnitude);
            }
        CHECK(worst <= 1e-14);
        int64_t wrong = 0;
        for (int64_t j = 0; j < d; ++j) {
          double sum = 0.5 * p.x[j];
          for (int64_t i = 0; i < rows; ++i) sum += p.c[j / block * rows + i] * widen(p.G[i * w.stride + j]);
          wrong += results.combination[j] != static_cast<Wide<S>>(sum);
        }
        CHECK(wrong == 0);
      }
}
