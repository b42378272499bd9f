// Approximate Cholesky factorisation of symmetric diagonally dominant M-matrices (graph Laplacians plus a nonnegative
// diagonal), after Gao, Kyng and Spielman, "Robust and practical solution of Laplacian equations by approximate
// elimination" (2023). Eliminating a vertex with neighbours of weights w_1 <= ... <= w_d and D = sum w + its excess
// makes a clique with weights w_k w_l / D; here each k keeps one edge, to a later neighbour l chosen with probability
// proportional to w_l, of weight w_k (w_(k+1) + ... + w_d) / D: the clique in expectation. The graph never grows, and
// on a forest the factorisation is exact. Vertices are taken in order of degree, least first; the choices come from a
// fixed seed, so that the same matrix gives the same factor.
//
// Time and memory O(edges log edges); on the graphs met here the factor has one to three entries an edge.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

namespace kantor {

// L diag(pivot) L' with columns in order of elimination: entries (row[e], -share[e]) below a unit diagonal. A pivot of
// 0 belongs to a vertex that nothing holds (the last of a component without excess): its unknown is set to 0.
struct ApproximateCholesky {
  std::vector<int32_t> order;  // vertices as they were eliminated
  std::vector<double> pivot;   // by position in `order`
  std::vector<int64_t> start;  // of the entries of a position
  std::vector<int32_t> row;    // vertices
  std::vector<double> share;
};

struct Edge {
  int32_t from, to;
  double weight;  // > 0; parallel edges add up
};

// Factor of the Laplacian of `edges` on `vertices` vertices plus diag(excess), excess >= 0.
ApproximateCholesky approximate_cholesky(int64_t vertices, const std::vector<Edge>& edges,
                                         const std::vector<double>& excess);

// The exact factor, in the same order of degrees; nothing once it would have more than `most_entries`. For graphs that
// are nearly forests, where little fills in.
std::optional<ApproximateCholesky> exact_cholesky(int64_t vertices, const std::vector<Edge>& edges,
                                                  const std::vector<double>& excess, int64_t most_entries);

// z = (L D L')^-1 r; z may be r.
void approximate_cholesky_solve(const ApproximateCholesky& factor, const double* r, double* z);

}  // namespace kantor
