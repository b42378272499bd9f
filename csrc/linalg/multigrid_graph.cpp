// Coarsening of the graph levels of multigrid.h.
#include <algorithm>
#include <numeric>

#include "linalg/multigrid_setup.h"

namespace kantor {
namespace {

class Components {
 public:
  explicit Components(int64_t n) : parents_(static_cast<size_t>(n)) { std::iota(parents_.begin(), parents_.end(), 0); }
  int32_t root(int32_t i) {
    while (parents_[i] != i) i = parents_[i] = parents_[parents_[i]];
    return i;
  }
  void join(int32_t a, int32_t b) {
    a = root(a), b = root(b);
    parents_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<int32_t> parents_;
};

// The transposed of n rows, cols columns.
template <class S>
void transpose(int64_t cols, const std::vector<int32_t>& crow, const std::vector<int32_t>& col,
               const std::vector<S>& values, std::vector<int32_t>& t_crow, std::vector<int32_t>& t_col,
               std::vector<S>& t_values) {
  t_crow.assign(static_cast<size_t>(cols) + 1, 0);
  for (const int32_t j : col) ++t_crow[j + 1];
  std::partial_sum(t_crow.begin(), t_crow.end(), t_crow.begin());
  t_col.resize(col.size()), t_values.resize(col.size());
  std::vector<int32_t> next(t_crow.begin(), t_crow.end() - 1);
  for (size_t i = 0; i + 1 < crow.size(); ++i)
    for (int32_t k = crow[i]; k < crow[i + 1]; ++k) {
      const int32_t to = next[col[k]]++;
      t_col[to] = static_cast<int32_t>(i), t_values[to] = values[k];
    }
}

}  // namespace

template <class S>
void merge_edges(std::vector<int32_t>& crow, std::vector<int32_t>& col, std::vector<S>& values) {
  int32_t written = 0, begin = crow.empty() ? 0 : crow[0];
  for (size_t i = 0; i + 1 < crow.size(); ++i) {
    const int32_t first = written, end = crow[i + 1];
    for (int32_t k = begin; k < end; ++k) {  // rows are short: a linear search for the column
      int32_t at = first;
      while (at < written && col[at] != col[k]) ++at;
      if (at == written)
        col[written] = col[k], values[written] = values[k], ++written;
      else
        values[at] += values[k];
    }
    begin = end;
    crow[i + 1] = written;
  }
  col.resize(static_cast<size_t>(written)), values.resize(static_cast<size_t>(written));
}

template <class S>
GraphCoefficients<S> coarsen_graph(const GraphCoefficients<S>& fine, double factor, Interpolation<S>& P) {
  const int64_t n = fine.n();
  const auto block = [&](int32_t i) {
    const auto& p = fine.position[i];
    return typename GraphCoefficients<S>::Position{p.z / 2, p.y / 2, p.x / 2};
  };
  Components parts(n);
  for (int32_t i = 0; i < n; ++i)
    for (int32_t k = fine.crow[i]; k < fine.crow[i + 1]; ++k)
      if (block(i) == block(fine.col[k])) parts.join(i, fine.col[k]);

  // Nodes without links are solved exactly where they are, and leave the hierarchy.
  std::vector<int32_t> node(static_cast<size_t>(n), -1);
  GraphCoefficients<S> coarse;
  for (int32_t i = 0; i < n; ++i) {
    if (fine.crow[i] == fine.crow[i + 1]) continue;
    const int32_t root = parts.root(i);  // the smallest of its part: numbered before the others
    if (root == i) {
      node[i] = static_cast<int32_t>(coarse.position.size());
      coarse.position.push_back(block(i));
    } else {
      node[i] = node[root];
    }
  }
  const auto coarse_n = static_cast<int64_t>(coarse.position.size());

  // Edges across blocks at half their weight, first counted, then placed, then merged.
  coarse.d.assign(static_cast<size_t>(coarse_n), S(0));
  coarse.crow.assign(static_cast<size_t>(coarse_n) + 1, 0);
  P.p_crow.assign(static_cast<size_t>(n) + 1, 0);
  P.p_col.clear(), P.p_values.clear();
  for (int32_t i = 0; i < n; ++i) {
    if (node[i] >= 0) {
      coarse.d[node[i]] += static_cast<S>(factor) * fine.d[i];
      double axis_sum[3] = {0, 0, 0};
      const auto axis_of = [&](int32_t j) {
        return fine.position[i].z != fine.position[j].z ? 0 : fine.position[i].y != fine.position[j].y ? 1 : 2;
      };
      for (int32_t k = fine.crow[i]; k < fine.crow[i + 1]; ++k)
        if (node[fine.col[k]] != node[i]) {
          ++coarse.crow[node[i] + 1];
          axis_sum[axis_of(fine.col[k])] += double(fine.values[k]);
        }
      // A quarter towards the partners of each axis, in proportion to their weights.
      const S own = static_cast<S>(1 - 0.25 * ((axis_sum[0] > 0) + (axis_sum[1] > 0) + (axis_sum[2] > 0)));
      P.p_col.push_back(node[i]), P.p_values.push_back(own);
      for (int32_t k = fine.crow[i]; k < fine.crow[i + 1]; ++k)
        if (const int32_t to = node[fine.col[k]]; to != node[i]) {
          P.p_col.push_back(to);
          P.p_values.push_back(static_cast<S>(0.25 * double(fine.values[k]) / axis_sum[axis_of(fine.col[k])]));
        }
    }
    P.p_crow[i + 1] = static_cast<int32_t>(P.p_col.size());
  }
  merge_edges(P.p_crow, P.p_col, P.p_values);
  transpose(coarse_n, P.p_crow, P.p_col, P.p_values, P.r_crow, P.r_col, P.r_values);

  std::partial_sum(coarse.crow.begin(), coarse.crow.end(), coarse.crow.begin());
  coarse.col.resize(static_cast<size_t>(coarse.crow.back()));
  coarse.values.resize(coarse.col.size());
  std::vector<int32_t> next(coarse.crow.begin(), coarse.crow.end() - 1);
  for (int32_t i = 0; i < n; ++i)
    for (int32_t k = fine.crow[i]; node[i] >= 0 && k < fine.crow[i + 1]; ++k)
      if (const int32_t to = node[fine.col[k]]; to != node[i]) {
        const int32_t at = next[node[i]]++;
        coarse.col[at] = to, coarse.values[at] = S(0.5) * fine.values[k];
      }
  merge_edges(coarse.crow, coarse.col, coarse.values);
  return coarse;
}

template void merge_edges(std::vector<int32_t>&, std::vector<int32_t>&, std::vector<float>&);
template void merge_edges(std::vector<int32_t>&, std::vector<int32_t>&, std::vector<double>&);
template GraphCoefficients<float> coarsen_graph(const GraphCoefficients<float>&, double, Interpolation<float>&);
template GraphCoefficients<double> coarsen_graph(const GraphCoefficients<double>&, double, Interpolation<double>&);

}  // namespace kantor
