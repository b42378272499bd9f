// What the algorithms of entropic transport share: the problem, how they report, how they end.
#pragma once
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/exec.h"
#include "transport/passes.h"

namespace kantor::transport {

inline constexpr double unlimited = std::numeric_limits<double>::infinity();

struct Problem {
  // Weights, positive: (n,) and (m,). Where both are constraints their sums are 1.
  const double* a = nullptr;
  const double* b = nullptr;
  double eps = 0;
  double rho_a = unlimited, rho_b = unlimited;  // strengths of the marginals; unlimited: a constraint
  bool relative = false;  // the entropy is KL(P | a x b): with finite strengths the weights enter differently
  double cost_low = 0, cost_high = 0;  // of the finite costs
  bool forbidden = false;              // some costs are infinite
};

enum class Status : int {
  running = 0,
  converged = 1,
  max_iter = 2,
  stalled = 3,
  infeasible = 4,
  interrupted = 5,
  stopped = 6,
  overflow = 7,
  failed = 8,  // another rank did
};

enum class Step : int { sinkhorn = 0, newton = 1 };

struct Record {
  double seconds, eps, error;
  Step step;
};

struct Outcome {
  Status status = Status::running;
  int64_t newton_steps = 0;
  int64_t passes = 0;  // over all n m entries
  int64_t solves = 0, cg_iterations = 0, factorisations = 0;
  int64_t negative_curvature = 0;
  int64_t most_entries = 0;  // of a plan made sparse
  double error = unlimited;  // L1 error of the marginals relative to their mass
  double dual = 0;
  std::vector<Record> history;
};

// Asked after each step; anything but running ends the algorithm.
using Monitor = std::function<Status(int64_t step, double eps, double error)>;

struct Options {
  double tol = 1e-9;
  int64_t max_iter = 500;
  int threads = 1;
  // newton
  double first_eps = 0;        // of the continuation; 0: a tenth of the range of the cost (sinkhorn: none)
  int64_t entry_limit = 0;     // of a sparse plan; beyond it products are taken through passes
  bool sinkhorn_first = true;  // where sweeps converge quickly, let them
  // sinkhorn
  double relaxation = 0;  // over-relaxation factor; 0: found from the rate of convergence
  bool scaling = false;   // continuation in eps
  // sns
  int64_t warm_up = 20;
  double density = 0;  // share of the entries of P kept; 0: 2 / n
};

// f (n,) and g (m,): the start (g alone matters but for sns), then the result.
Outcome newton(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor, double* f,
               double* g);
Outcome sinkhorn(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor, double* f,
                 double* g);
Outcome sns(Passes& passes, const Problem& problem, const Options& options, const Monitor& monitor, double* f,
            double* g);

}  // namespace kantor::transport
