"""What a solver under test is, and how one run of it is timed.

A peer is prepared once for a problem (matrix conversion, preconditioner, workspaces), planned for a goal (compilation),
and then run: only the run is timed. The residual is formed by the harness from the returned x, not by the peer.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from kantor.bench.linalg.problems import Problem


@dataclass(frozen=True)
class Goal:
    """Exactly `iterations` iterations (rtol 0), or |r| <= rtol |b| in at most `iterations`."""

    iterations: int
    rtol: float = 0.0


@dataclass(frozen=True)
class Solution:
    """What a run gives back: x, flat, and how many iterations it took."""

    x: torch.Tensor
    iterations: int


@dataclass(frozen=True)
class Outcome:
    """One timed run. `residual` is |b - A x| / |b| in float64."""

    seconds: float
    iterations: int
    residual: float


Run = Callable[[], Solution]
Plan = Callable[[Goal], Run]


@dataclass(frozen=True)
class Peer:
    """A solver under test. `limit` is the largest number of unknowns it is asked to solve by default."""

    name: str
    operator: Literal["stencil", "csr"]
    configuration: str
    prepare: Callable[[Problem], Plan]
    needs: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float64", "float32")
    goals: tuple[str, ...] = ("iterations", "solve")
    preconditioned: bool = False
    limit: int = 256**3

    def obstacle(self, problem_is_grid: bool, dtype: str, device: str, unknowns: int) -> str:
        """Why this peer cannot run that case, "" when it can."""
        packages = [name.split(".")[0] for name in self.needs]
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        if device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"computes in {', '.join(self.dtypes)} only"
        if self.operator == "stencil" and not problem_is_grid:
            return "needs a grid"
        if unknowns > self.limit:
            return f"limited to {self.limit} unknowns"
        return ""


def measure(plan: Plan, problem: Problem, goal: Goal, least_seconds: float = 0.0) -> Outcome:
    """Time a planned run; a run shorter than `least_seconds` is repeated and its median taken."""
    run = plan(goal)
    cuda = problem.b.is_cuda
    times: list[float] = []
    while True:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        solution = run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        if sum(times) >= least_seconds:
            break
    seconds = sorted(times)[len(times) // 2]
    return Outcome(seconds, solution.iterations, problem.relative_residual(solution.x))
