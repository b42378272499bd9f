#include <algorithm>

#include "linalg/approximate_cholesky.h"

namespace kantor {
namespace {

constexpr int32_t none = -1;

// Vertices by degree, in doubly linked lists; degrees above `most` share the last one.
class DegreeQueue {
 public:
  explicit DegreeQueue(const std::vector<int32_t>& degrees)
      : next_(degrees.size(), none), previous_(degrees.size(), none), bucket_(degrees.size(), none) {
    for (size_t v = degrees.size(); v-- > 0;) insert(static_cast<int32_t>(v), degrees[v]);
  }

  int32_t pop_least() {
    while (least_ <= most && head_[least_] == none) ++least_;
    const int32_t v = head_[least_];
    remove(v);
    return v;
  }

  void update(int32_t v, int32_t degree) {
    if (std::min(degree, most) == bucket_[v]) return;
    remove(v);
    insert(v, degree);
  }

 private:
  static constexpr int32_t most = 255;

  void insert(int32_t v, int32_t degree) {
    const int32_t b = bucket_[v] = std::clamp(degree, 0, most);
    previous_[v] = none;
    next_[v] = head_[b];
    if (head_[b] != none) previous_[head_[b]] = v;
    head_[b] = v;
    least_ = std::min(least_, b);
  }
  void remove(int32_t v) {
    (previous_[v] == none ? head_[bucket_[v]] : next_[previous_[v]]) = next_[v];
    if (next_[v] != none) previous_[next_[v]] = previous_[v];
  }

  std::vector<int32_t> next_, previous_, bucket_;
  std::vector<int32_t> head_ = std::vector<int32_t>(most + 1, none);
  int32_t least_ = 0;
};

// Steele, Lea and Flood's SplitMix64: a stream of uniform numbers in [0, 1).
struct Uniform {
  uint64_t state = 0x2545f4914f6cdd1dULL;
  double operator()() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
};

// Edges at each vertex, as linked lists: an edge is found from either end; ends that are gone are skipped.
struct Adjacency {
  struct Half {
    double weight;
    int32_t to;
    int32_t next;
  };
  std::vector<int32_t> head;
  std::vector<Half> halves;

  void add(int32_t from, int32_t to, double weight) {
    halves.push_back({weight, to, head[from]});
    head[from] = static_cast<int32_t>(halves.size()) - 1;
  }
};

struct Neighbour {
  double weight;
  int32_t vertex, parallel;  // how many edges were merged
};

// Elimination with sampled cliques, or with whole ones as long as the factor has at most `most_entries`.
std::optional<ApproximateCholesky> eliminate(int64_t vertices, const std::vector<Edge>& edges,
                                             const std::vector<double>& excess_in, bool exact, int64_t most_entries) {
  std::vector<double> excess = excess_in;
  std::vector<int32_t> degree(vertices, 0);
  Adjacency adjacency;
  adjacency.head.assign(vertices, none);
  adjacency.halves.reserve(4 * edges.size());
  for (const Edge& edge : edges) {
    adjacency.add(edge.from, edge.to, edge.weight);
    adjacency.add(edge.to, edge.from, edge.weight);
    ++degree[edge.from];
    ++degree[edge.to];
  }
  DegreeQueue queue(degree);
  Uniform uniform;

  ApproximateCholesky factor;
  factor.order.reserve(vertices);
  factor.pivot.reserve(vertices);
  factor.start.reserve(vertices + 1);
  factor.row.reserve(edges.size());
  factor.share.reserve(edges.size());
  factor.start.push_back(0);
  std::vector<char> gone(vertices, 0);
  std::vector<int32_t> slot(vertices, none);
  std::vector<Neighbour> neighbours;
  std::vector<double> later;  // later[k] = w_(k+1) + ... + w_d

  for (int64_t step = 0; step < vertices; ++step) {
    const int32_t v = queue.pop_least();
    gone[v] = 1;
    neighbours.clear();
    for (int32_t h = adjacency.head[v]; h != none; h = adjacency.halves[h].next) {
      const auto [weight, to, next] = adjacency.halves[h];
      if (gone[to]) continue;
      if (slot[to] == none) {
        slot[to] = static_cast<int32_t>(neighbours.size());
        neighbours.push_back({weight, to, 1});
      } else {
        neighbours[slot[to]].weight += weight;
        ++neighbours[slot[to]].parallel;
      }
    }
    std::sort(neighbours.begin(), neighbours.end(), [](const Neighbour& a, const Neighbour& b) {
      return a.weight < b.weight || (a.weight == b.weight && a.vertex < b.vertex);
    });
    const int64_t d = static_cast<int64_t>(neighbours.size());
    // The ground, which holds the excess, is the last neighbour: what is tied to it becomes excess.
    later.assign(d + 1, 0.0);
    later[d] = excess[v];
    for (int64_t k = d - 1; k >= 0; --k) later[k] = later[k + 1] + neighbours[k].weight;
    const double pivot = later[0];  // from here on later[k + 1] is what comes after neighbour k
    factor.order.push_back(v);
    factor.pivot.push_back(pivot);
    for (int64_t k = 0; k < d; ++k) {
      const Neighbour& near = neighbours[k];
      slot[near.vertex] = none;
      degree[near.vertex] -= near.parallel;
      factor.row.push_back(near.vertex);
      factor.share.push_back(near.weight / pivot);
      const double weight = near.weight / pivot * later[k + 1];
      if (!(weight > 0)) continue;
      if (exact) {
        for (int64_t l = k + 1; l < d; ++l) {
          const Neighbour& far = neighbours[l];
          const double fill = near.weight / pivot * far.weight;
          adjacency.add(near.vertex, far.vertex, fill);
          adjacency.add(far.vertex, near.vertex, fill);
          ++degree[near.vertex], ++degree[far.vertex];
        }
        excess[near.vertex] += near.weight / pivot * excess[v];
        continue;
      }
      // The neighbour l > k in whose stretch of later[l + 1]..later[l] the number falls; d is the ground.
      const double number = uniform() * later[k + 1];
      int64_t low = k + 1, high = d;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (later[middle + 1] <= number)
          high = middle;
        else
          low = middle + 1;
      }
      if (low == d) {
        excess[near.vertex] += weight;
        continue;
      }
      const int32_t far = neighbours[low].vertex;
      adjacency.add(near.vertex, far, weight);
      adjacency.add(far, near.vertex, weight);
      ++degree[near.vertex];
      ++degree[far];
    }
    for (const Neighbour& near : neighbours) queue.update(near.vertex, degree[near.vertex]);
    factor.start.push_back(static_cast<int64_t>(factor.row.size()));
    if (exact && static_cast<int64_t>(std::max(factor.row.size(), adjacency.halves.size() / 8)) > most_entries)
      return {};
  }
  return factor;
}

}  // namespace

ApproximateCholesky approximate_cholesky(int64_t vertices, const std::vector<Edge>& edges,
                                         const std::vector<double>& excess) {
  return *eliminate(vertices, edges, excess, false, 0);
}

std::optional<ApproximateCholesky> exact_cholesky(int64_t vertices, const std::vector<Edge>& edges,
                                                  const std::vector<double>& excess, int64_t most_entries) {
  return eliminate(vertices, edges, excess, true, most_entries);
}

void approximate_cholesky_solve(const ApproximateCholesky& factor, const double* r, double* z) {
  const int64_t n = static_cast<int64_t>(factor.order.size());
  if (z != r) std::copy(r, r + n, z);
  for (int64_t k = 0; k < n; ++k) {
    const double value = z[factor.order[k]];
    for (int64_t e = factor.start[k]; e < factor.start[k + 1]; ++e) z[factor.row[e]] += factor.share[e] * value;
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    const int32_t v = factor.order[k];
    double value = factor.pivot[k] > 0 ? z[v] / factor.pivot[k] : 0.0;
    for (int64_t e = factor.start[k]; e < factor.start[k + 1]; ++e) value += factor.share[e] * z[factor.row[e]];
    z[v] = value;
  }
}

}  // namespace kantor
