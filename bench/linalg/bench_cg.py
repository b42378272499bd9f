"""Conjugate gradients: 3-D Poisson and pyamg's matrices, Kantor beside its peers. Run through bench/run.py.

Goal "iterations": exactly k iterations from x = 0 (rtol 0, maxiter k), reported twice: whole call / k, and the
difference of the calls with k and k/4 iterations over 3k/4, which leaves out what entering and leaving a solver costs.
Goal "solve": until |r| <= rtol |b| with the solver's own residual; the true one is formed afterwards in float64.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from kantor.bench.harness import Measure, Spec
from kantor.bench.linalg import peers, problems, solvers

TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32}
LEAST_SECONDS = 0.1  # a shorter run is repeated and its median taken


def unknowns(problem: str) -> int:
    """Number of unknowns of a problem, 0 (unknown but small) for a matrix."""
    return int(problem.removeprefix("poisson3d-")) ** 3 if problem.startswith("poisson3d-") else 0


def default_iterations(problem: str, device: str) -> int:
    """A fixed iteration count that lasts about a second with the slowest peers; a multiple of four."""
    work, low, high = (13e9, 48, 200) if device == "cuda" else (2.7e8, 16, 100)
    return int(min(max(work / max(unknowns(problem), 1), low), high)) // 4 * 4


def state_bytes(spec: Spec) -> int:
    """Bytes of x, r and p: the working set whose copy bandwidth is the yardstick."""
    return 3 * unknowns(spec.problem) * TORCH_DTYPES[spec.dtype].itemsize


def memory_estimate(spec: Spec) -> int:
    """Bytes a worker will occupy, roughly: ten vectors, and the matrix with what its construction needs."""
    word, n = TORCH_DTYPES[spec.dtype].itemsize, unknowns(spec.problem)
    matrix = 7 * n * (word + 4) * 2 if peers.PEERS[spec.peer].operator == "csr" else 0
    hierarchy = 3 * matrix if spec.peer.endswith("-sa") else 0
    return (400 << 20) + 10 * word * n + matrix + hierarchy


def obstacle(spec: Spec) -> str:
    """Why the spec's peer cannot run it, "" when it can."""
    peer = peers.PEERS[spec.peer]
    return peer.obstacle(spec.problem.startswith("poisson3d-"), spec.dtype, spec.device, unknowns(spec.problem))


def goals(spec: Spec, wanted: list[str]) -> list[str]:
    """Those of the wanted goals that the spec's peer has."""
    return [goal for goal in wanted if goal in peers.PEERS[spec.peer].goals]


def slow(spec: Spec) -> bool:
    """Whether one solve to the tolerance is enough for a run."""
    return unknowns(spec.problem) > 64**3


def prepare(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """In a worker: build problem and solver, warm it up, and return what measures a goal."""
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    problem = problems.make(spec.problem, TORCH_DTYPES[spec.dtype], device)
    peer = peers.PEERS[spec.peer]
    if peer.operator == "csr":
        _ = problem.csr  # assembling the matrix is nobody's setup
    for name in peer.needs:
        importlib.import_module(name)  # nor is importing a library
    begin = time.perf_counter()
    plan = peer.prepare(problem)
    setup = time.perf_counter() - begin
    short = solvers.Goal(spec.iterations // 4)
    if "iterations" in peer.goals:
        plan(short)()

    def fixed() -> dict[str, Any]:
        quarter = solvers.measure(plan, problem, short, LEAST_SECONDS / 4)
        whole = solvers.measure(plan, problem, solvers.Goal(spec.iterations), LEAST_SECONDS)
        if whole.iterations != spec.iterations:
            raise RuntimeError(f"stopped after {whole.iterations} of {spec.iterations} iterations")
        marginal = (whole.seconds - quarter.seconds) / (whole.iterations - quarter.iterations)
        return {
            "seconds": whole.seconds,
            "iterations": whole.iterations,
            "residual": whole.residual,
            "ms_per_iteration": 1e3 * whole.seconds / whole.iterations,
            "marginal_ms_per_iteration": 1e3 * marginal,
        }

    def solve() -> dict[str, Any]:
        outcome = solvers.measure(plan, problem, solvers.Goal(10 * problem.n, spec.rtol), LEAST_SECONDS)
        # Between the recursive and the true residual lies rounding; ten times the tolerance is a failure.
        return {
            "seconds": outcome.seconds,
            "iterations": outcome.iterations,
            "residual": outcome.residual,
            "converged": outcome.residual <= 10 * spec.rtol,
        }

    measures: dict[str, Callable[[], dict[str, Any]]] = {"iterations": fixed, "solve": solve}
    facts = {"setup_seconds": setup, "unknowns": problem.n, "nonzeros": _nonzeros(problem, peer)}
    return lambda goal: measures[goal](), facts


def _nonzeros(problem: problems.Problem, peer: solvers.Peer) -> int:
    return problem.csr.values.numel() if peer.operator == "csr" else 0
