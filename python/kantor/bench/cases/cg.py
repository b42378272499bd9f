"""Conjugate gradients on a Poisson problem in three dimensions: each library's own form of it, and the matrix alone."""

from __future__ import annotations

from typing import Any

import torch

from kantor.bench.case import OWN, Peer, Problem, Run
from kantor.bench.linalg import problems as systems
from kantor.bench.linalg import solvers
from kantor.bench.linalg.peers import PEERS as SOLVERS

TITLE = "Conjugate gradients, 3-D Poisson, float64, to |b - A x| <= 1e-8 |b|"
SIZES = {"tiny": (8,), "small": (40,), "full": (64, 128)}
RTOL = 1e-8
WORD = 8

_LIBRARIES = {
    "kantor": OWN, "scipy": "SciPy", "torch": "torch", "lineax": "lineax", "pyamg": "PyAMG", "petsc": "PETSc",
    "cupy": "CuPy",
}  # fmt: skip


def _peer(solver: solvers.Peer) -> Peer:
    def prepare(task: systems.Problem) -> Run:
        run = solver.prepare(task)(solvers.Goal(10 * task.n, RTOL))
        return lambda: (solver.operator, run())

    needs = tuple(name.split(".")[0] for name in solver.needs)
    return Peer(
        solver.name, _LIBRARIES[solver.name.split("-")[0]], solver.configuration, prepare, needs, solver.devices
    )


PEERS = {
    name: _peer(solver) for name, solver in SOLVERS.items() if "solve" in solver.goals and not solver.preconditioned
}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """A grid that libraries may treat as they like, and its matrix, where they all multiply by the same CSR arrays."""
    matrix = tuple(name for name in PEERS if SOLVERS[name].operator == "csr")
    return tuple(
        Problem(f"{form} {side}^3", "|b - A x| / |b|", 1.1 * RTOL, suits=suits)  # a tenth for rounding
        for side in SIZES[size]
        for form, suits in (("grid", ()), ("matrix", matrix))
    )


def make(problem: str, device: str) -> systems.Problem:
    """The system, with a standard normal right-hand side."""
    side = int(problem.split()[1].removesuffix("^3"))
    system = systems.poisson(side, torch.float64, torch.device(device))
    _ = system.csr  # assembling the matrix is nobody's work
    return system


def judge(task: systems.Problem, answer: Any) -> dict[str, Any]:
    """True residual, and the least bytes that the iterations move: bench/README.md counts them."""
    operator, solution = answer
    words = 8 * task.n if operator == "stencil" else 11 * task.n
    matrix = task.csr.values.numel() * (WORD + 4) + 4 * task.n if operator == "csr" else 0
    return {
        "accuracy": task.relative_residual(solution.x),
        "iterations": solution.iterations,
        "bytes": solution.iterations * (words * WORD + matrix),
        "working_set": 3 * task.n * WORD + matrix,
    }
