"""The solvers that bench_solve times side by side. Each returns its plan; the bench measures the marginals itself.

A peer is prepared for a problem and a regularisation, then called with the threshold of its own stopping test. These
tests differ (2-norms of one marginal for POT, of both for regot), so the bench looks for the loosest threshold at which
the L1 error of the returned plan is what was asked for.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ENDLESS = 10_000_000  # iterations: what ends a run is the time limit


@dataclass(frozen=True)
class Problem:
    """Cost (n, m), weights (n,) and (m,), float64; and the regularisation."""

    C: Tensor
    a: Tensor
    b: Tensor
    reg: float


@dataclass(frozen=True)
class Outcome:
    """A plan, with the steps taken and what a step is."""

    plan: Any
    steps: int
    passes: int = 0


Solve = Callable[[float], Outcome]


@dataclass(frozen=True)
class Peer:
    """`prepare(problem)` returns `solve(threshold)`.

    `family` groups the configurations of one library, whose best counts; `slows` says that smaller regularisation
    takes it longer, so that it need not be tried again where it ran out of time; `exact` that it solves the
    unregularised problem.
    """

    name: str
    family: str
    step: str
    prepare: Callable[[Problem], Solve]
    slows: bool = False
    exact: bool = False
    configuration: str = ""


# Kantor


def _kantor(problem: Problem, method: str) -> Solve:
    from kantor import transport

    def solve(threshold: float) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bench reports failures
            result = transport.solve(
                problem.C, problem.a, problem.b, reg=problem.reg, tol=threshold, method=method, grad="none"
            )
        steps = result.n_sweeps if method == "sinkhorn" else result.n_iter
        return Outcome(result.plan, int(steps), int(result.n_sweeps))

    return solve


# POT: loops in Python over NumPy or torch


def _pot(problem: Problem, function: str, backend: str, options: dict[str, Any]) -> Solve:
    import ot

    # POT's logsumexp is scipy's on arrays and torch's, several times faster, on tensors; its products are BLAS either
    # way.
    C, a, b = (t if backend == "torch" else t.numpy() for t in (problem.C, problem.a, problem.b))
    call = getattr(ot.bregman, function)
    set_blas_threads(torch.get_num_threads())

    def solve(threshold: float) -> Outcome:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with np.errstate(all="ignore"):
                plan, log = call(a, b, C, problem.reg, stopThr=threshold, log=True, **options)
        return Outcome(plan, int(log.get("niter", log.get("n_iter", 0))) + 1)

    return solve


def _pot_emd(problem: Problem) -> Solve:
    import ot

    C, a, b = problem.C.numpy(), problem.a.numpy(), problem.b.numpy()

    def solve(_: float) -> Outcome:
        return Outcome(ot.emd(a, b, C, numItermax=ENDLESS), 0)

    return solve


def set_blas_threads(threads: int) -> None:
    """The harness gives OpenBLAS one thread; here products of a matrix and a vector are what NumPy's peers do."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads, "blas")


# regot: C++ throughout; it takes columns first, and would copy anything else


def _regot(problem: Problem, function: str, options: dict[str, Any]) -> Solve:
    import regot

    call = getattr(regot, function)
    C, a, b = np.asfortranarray(problem.C.numpy()), problem.a.numpy(), problem.b.numpy()

    def solve(threshold: float) -> Outcome:
        result = call(C, a, b, problem.reg, tol=threshold, **({"max_iter": 20_000} | options))
        return Outcome(result.plan, int(result.niter))

    return solve


# OTT-JAX: one XLA program, compiled before the clock starts


def _ott(problem: Problem, **options: Any) -> Solve:
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear import acceleration
    from ott.solvers.linear.sinkhorn import Sinkhorn

    arrays = [jax.numpy.asarray(t.numpy()) for t in (problem.C, problem.a, problem.b)]
    over_relaxed = {
        "adaptive": {"momentum": acceleration.Momentum(start=100, error_threshold=1.0)},
        "fixed": {"momentum": acceleration.Momentum(value=1.5)},
        "anderson": {"anderson": acceleration.AndersonAcceleration(memory=5, refresh_every=1)},
    }
    chosen = over_relaxed.get(options.pop("acceleration", ""), {})

    def run(threshold: Any, C: Any, a: Any, b: Any, reg: Any) -> tuple[Any, Any]:
        solver = Sinkhorn(threshold=threshold, max_iterations=ENDLESS // 10, inner_iterations=10, **options, **chosen)
        # Without the record of errors, one number each inner_iterations for as many as might be needed.
        out = solver(LinearProblem(Geometry(C, epsilon=reg), a, b))
        return out.matrix, out.n_iters

    compiled = jax.jit(run).lower(1e-9, *arrays, problem.reg).compile()

    def solve(threshold: float) -> Outcome:
        plan, steps = compiled(threshold, *arrays, problem.reg)
        return Outcome(np.asarray(plan), int(steps))

    return solve


# GeomLoss: no stopping test, a number of iterations, in which the regularisation falls to its value


def _geomloss(problem: Problem, iterations: int) -> Solve:
    from geomloss import ot

    def solve(_: float) -> Outcome:
        result = ot.solve(problem.C, reg=problem.reg, a=problem.a, b=problem.b, max_iter=iterations)
        return Outcome(result.plan, iterations)

    return solve


# What somebody writes who wants no library


def _torch(problem: Problem, relaxation: float) -> Solve:
    """Log-domain Sinkhorn, the matrix divided by reg once, with one temporary.

    Both orders of the matrix are kept, so that every logsumexp runs along rows. After a column update the row error is
    what the next row update changes: no extra pass.
    """
    K, KT = problem.C / -problem.reg, (problem.C.T / -problem.reg).contiguous()
    a, log_a, log_b = problem.a, problem.a.log(), problem.b.log()
    work, workT = torch.empty_like(K), torch.empty_like(KT)

    def solve(threshold: float) -> Outcome:
        f, g = torch.zeros_like(log_a), torch.zeros_like(log_b)
        steps = 0
        for steps in range(1, ENDLESS):
            change = log_a - torch.logsumexp(torch.add(K, g, out=work), 1) - f
            # With relaxation columns are not exact, but the two errors fall together.
            if steps > 1 and steps % 10 == 0 and float((a * torch.expm1(-change)).abs().sum()) <= threshold:
                break
            f = f + (relaxation if steps > 20 else 1.0) * change
            g = g + (relaxation if steps > 20 else 1.0) * (log_b - torch.logsumexp(torch.add(KT, f, out=workT), 1) - g)
        return Outcome(torch.exp(K + f[:, None] + g), steps)

    return solve


def _words(args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """A configuration as its function and options, without limits that are never met."""
    plain = [str(arg) for arg in args if not isinstance(arg, dict)]
    named = [item for part in (*args, options) if isinstance(part, dict) for item in part.items()]
    return ", ".join(plain + [f"{name}={value}" for name, value in named if value != ENDLESS])


def _peers() -> list[Peer]:
    def peer(name: str, step: str, prepare: Callable[..., Solve], *args: Any, **options: Any) -> Peer:
        slows, exact = options.pop("slows", False), options.pop("exact", False)
        bound = functools.partial(prepare, **options) if options else prepare
        return Peer(
            name, name.split("-")[0], step, lambda problem: bound(problem, *args), slows, exact, _words(args, options)
        )

    sweeps: dict[str, Any] = {"slows": True}
    many = {"numItermax": ENDLESS}
    return [
        peer("kantor", "Newton", _kantor, "auto"),
        peer("sinkhorn-kantor", "sweeps", _kantor, "sinkhorn", **sweeps),
        peer("regot-ssns", "steps", _regot, "sinkhorn_ssns", {}),
        peer("regot-ssns-0.01", "steps", _regot, "sinkhorn_ssns", {"mu0": 0.01}),
        peer("regot-splr", "steps", _regot, "sinkhorn_splr", {}),
        peer("regot-splr-0.1", "steps", _regot, "sinkhorn_splr", {"density": 0.1}),
        peer("regot-sparse-0.1", "steps", _regot, "sinkhorn_sparse_newton", {"density": 0.1}),
        peer("regot-newton", "steps", _regot, "sinkhorn_newton", {}),
        peer("regot-lbfgs", "steps", _regot, "sinkhorn_lbfgs_dual", {"max_iter": ENDLESS}),
        peer("regot-bcd", "sweeps", _regot, "sinkhorn_bcd", {"max_iter": ENDLESS}, **sweeps),
        peer("pot-kernel", "sweeps", _pot, "sinkhorn_knopp", "numpy", many, **sweeps),
        peer("pot-log", "sweeps", _pot, "sinkhorn_log", "torch", many, **sweeps),
        peer("pot-log-numpy", "sweeps", _pot, "sinkhorn_log", "numpy", many, **sweeps),
        peer("pot-stabilized", "sweeps", _pot, "sinkhorn_stabilized", "numpy", many, **sweeps),
        peer("pot-scaling", "sweeps", _pot, "sinkhorn_epsilon_scaling", "numpy", {"epsilon0": 1.0} | many, **sweeps),
        peer("pot-greenkhorn", "entries", _pot, "greenkhorn", "numpy", many, **sweeps),
        peer("ott-log", "sweeps", _ott, **sweeps),
        peer("ott-log-adaptive", "sweeps", _ott, acceleration="adaptive", **sweeps),
        peer("ott-log-1.5", "sweeps", _ott, acceleration="fixed", **sweeps),
        peer("ott-log-anderson", "sweeps", _ott, acceleration="anderson", **sweeps),
        peer("ott-kernel-adaptive", "sweeps", _ott, lse_mode=False, acceleration="adaptive", **sweeps),
        peer("geomloss", "sweeps", _geomloss, iterations=100),
        peer("torch-log", "sweeps", _torch, 1.0, **sweeps),
        peer("torch-log-1.5", "sweeps", _torch, 1.5, **sweeps),
        peer("exact-pot", "", _pot_emd, exact=True),
    ]


PEERS = {peer.name: peer for peer in _peers()}
# Those that are the best of their library on some problem of the suite; the others are there to be asked for.
DEFAULT = (
    "kantor", "regot-ssns", "regot-ssns-0.01", "regot-splr", "regot-splr-0.1", "regot-newton", "pot-kernel", "pot-log",
    "pot-stabilized", "ott-log", "ott-log-adaptive", "ott-log-1.5", "torch-log", "torch-log-1.5", "exact-pot",
)  # fmt: skip


def entropy_bound(problem: Problem) -> float:
    """How far the cost of the entropic plan can lie above the exact one: reg min(H(a), H(b))."""
    return problem.reg * min(float(-(w * w.clamp_min(math.ulp(0.0)).log()).sum()) for w in (problem.a, problem.b))
