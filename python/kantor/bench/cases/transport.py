"""Entropic transport to the same marginal error, whatever a library's own stopping test looks at."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kantor.bench.case import OWN, Peer, Problem, Run
from kantor.bench.transport import peers

TITLE = "Entropic transport, float64, L1 error of both marginals <= 1e-9"
SIZES = {"tiny": ((25, 5e-2),), "small": ((400, 3e-3),), "full": ((1000, 1e-3), (1000, 1e-4), (2000, 1e-3))}
TOL = 1e-9
ROUNDS = 6  # of finding a threshold

_FAMILIES = {
    "kantor": OWN, "regot": "regot", "pot": "POT", "ott": "OTT", "torch": "torch", "geomloss": "GeomLoss",
}  # fmt: skip
_NEEDS = {
    "kantor": (), "regot": ("regot",), "pot": ("ot",), "ott": ("ott", "jax"), "torch": (), "geomloss": ("geomloss",),
}  # fmt: skip
# Those that a small problem is worth: what is slow there is left to the full size.
_QUICK = (
    "kantor", "regot-ssns", "regot-newton", "pot-kernel", "pot-stabilized", "ott-log-adaptive", "ott-log-1.5",
    "torch-log", "torch-log-1.5", "geomloss",
)  # fmt: skip
_ON_GPU = ("kantor", "torch-log", "torch-log-1.5", "geomloss")


def make_problem(name: str, n: int, reg: float, seed: int, device: str = "cpu") -> peers.Problem:
    """One problem of the suite at about n points."""
    from kantor.datasets import transport

    makers: dict[str, Any] = {
        "random": lambda: transport.random_assignment(n, seed),
        "images-l1": lambda: transport.image_pair_l1(round(math.sqrt(n)), seed),
        "images-l2": lambda: transport.image_pair_l2(round(math.sqrt(n)), seed),
        "colours": lambda: transport.colour_clouds(n, seed),
        "digits": lambda: transport.digit_clouds(n, seed=seed),
        "mixture-1d": lambda: transport.mixture_1d(n, seed=seed),
        "clouds": lambda: transport.point_clouds(n, 3, seed),
    }
    C, a, b = (part.to(device) for part in makers[name]())
    return peers.Problem(C, a, b, reg)


def next_threshold(threshold: float, error: float, first: bool) -> float:
    """A threshold at which the error should be the one wanted: tests are off by a nearly constant factor.

    Newton's error falls in leaps, so that a slightly smaller threshold may change nothing.
    """
    return threshold * min(0.9 * TOL / error, 1.0 if first else 0.3)


def _peer(solver: peers.Peer) -> Peer:
    def prepare(task: peers.Problem) -> Run:
        solve = solver.prepare(task)
        threshold = TOL
        for round_number in range(ROUNDS):
            error = judge(task, solve(threshold))["accuracy"]
            # Not finite, or far off: it stopped for another reason, which no threshold mends.
            if error <= TOL or not error <= 1e4 * threshold:
                break
            threshold = next_threshold(threshold, error, first=round_number == 0)
        return lambda: solve(threshold)

    devices = ("cpu", "cuda") if solver.name in _ON_GPU else ("cpu",)
    name = solver.family
    return Peer(solver.name, _FAMILIES[name], solver.configuration, prepare, _NEEDS[name], devices)


PEERS = {name: _peer(peers.PEERS[name]) for name in (*peers.DEFAULT, "geomloss") if not peers.PEERS[name].exact}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """Random costs, and two photographs as densities on a grid with the squared distance."""
    suits = () if size == "full" else _QUICK
    return tuple(
        Problem(f"{name}, n = {n}, reg = {reg:g}", "L1 error of the marginals", TOL, needs=needs, suits=suits)
        for n, reg in SIZES[size]
        for name, needs in (("random", ()), ("images-l2", ("skimage",)))
    )


def make(problem: str, device: str) -> peers.Problem:
    """The problem that a name stands for."""
    name, n, reg = (part.split(" = ")[-1] for part in problem.split(", "))
    return make_problem(name, int(n), float(reg), 0, device)


def judge(task: peers.Problem, answer: peers.Outcome) -> dict[str, Any]:
    """Error of both marginals of the plan, and what it costs."""
    plan = answer.plan.cpu() if hasattr(answer.plan, "cpu") else answer.plan
    plan = np.asarray(plan, dtype=np.float64)
    C, a, b = (part.cpu().numpy() for part in (task.C, task.a, task.b))
    error = float(np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum())
    cost = float(np.vdot(plan, C))
    return {"accuracy": error, "steps": answer.steps, "cost": cost if math.isfinite(cost) else None}
