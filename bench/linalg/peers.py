"""Conjugate gradient solvers that bench_cg times side by side, each at the best configuration found for it.

A peer is prepared once for a problem (matrix conversion, preconditioner, workspaces), planned for a goal (compilation),
and then run: only the run is timed. The residual is formed by the harness from the returned x, not by the peer.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.dlpack import from_dlpack

from linalg.problems import Problem, poisson_slices

UNATTAINABLE = 1e-30  # a tolerance that keeps a stopping test in the loop without ever meeting it
CHECK_EVERY = 16  # iterations between two convergence tests of the loops that must not synchronise with the GPU


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
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
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


# Kantor


def _kantor(problem: Problem, form: str, preconditioner: str) -> Plan:
    from kantor import linalg

    if form == "stencil":
        operator = linalg.Stencil(problem.grid, dtype=problem.b.dtype, device=problem.b.device)
    else:
        operator = linalg.CSR.from_any(problem.csr.torch())
    M = {"": lambda _: None, "jacobi": linalg.jacobi, "ic0": linalg.ic0}[preconditioner](operator)

    def plan(goal: Goal) -> Run:
        def run() -> Solution:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # stopping after a fixed number of iterations is the point here
                result = linalg.cg(operator, problem.b, M=M, rtol=goal.rtol, atol=0.0, maxiter=goal.iterations)
            return Solution(result.x, int(result.iterations))

        return run

    return plan


# scipy, pyamg, PETSc: compiled matrix-vector product, the loop in Python (scipy, pyamg) or C (PETSc)


def _scipy(problem: Problem) -> Plan:
    from scipy.sparse.linalg import cg

    matrix, b = problem.csr.scipy(), problem.b.numpy()

    def plan(goal: Goal) -> Run:
        def run() -> Solution:
            count = 0

            def step(_: object) -> None:
                nonlocal count
                count += 1

            x, _ = cg(matrix, b, rtol=goal.rtol, atol=0.0, maxiter=goal.iterations, callback=step)
            return Solution(torch.from_numpy(x), count)

        return run

    return plan


def _pyamg(problem: Problem, smoothed_aggregation: bool) -> Plan:
    import pyamg

    matrix, b = problem.csr.scipy(), problem.b.numpy()
    M = pyamg.smoothed_aggregation_solver(matrix).aspreconditioner(cycle="V") if smoothed_aggregation else None

    def plan(goal: Goal) -> Run:
        def run() -> Solution:
            residuals: list[float] = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x, _ = pyamg.krylov.cg(matrix, b, tol=goal.rtol, maxiter=goal.iterations, M=M, residuals=residuals)
            return Solution(torch.from_numpy(x), len(residuals) - 1)

        return run

    return plan


def _petsc(problem: Problem) -> Plan:
    import petsc4py

    petsc4py.init(["-malloc_debug", "no"])
    from petsc4py import PETSc

    arrays = problem.csr
    matrix = PETSc.Mat().createAIJ(
        size=(problem.n, problem.n),
        csr=(arrays.crow.numpy(), arrays.col.numpy(), arrays.values.numpy()),
        comm=PETSc.COMM_SELF,
    )
    b = PETSc.Vec().createWithArray(problem.b.numpy(), comm=PETSc.COMM_SELF)
    x = b.duplicate()
    solver = PETSc.KSP().create(comm=PETSc.COMM_SELF)
    solver.setType("cg")
    solver.getPC().setType("none")
    solver.setOperators(matrix)
    solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)

    def plan(goal: Goal) -> Run:
        solver.setTolerances(rtol=goal.rtol, atol=0.0, divtol=1e300, max_it=goal.iterations)
        solver.setUp()

        def run() -> Solution:
            solver.solve(b, x)
            return Solution(torch.from_numpy(x.getArray(readonly=True).copy()), solver.getIterationNumber())

        return run

    return plan


# Plain torch loops: every update in place, every product into a workspace, three fused vector updates an iteration

Apply = Callable[[torch.Tensor, torch.Tensor], object]


def _apply_slices(problem: Problem) -> Apply:
    if problem.grid is None:
        raise ValueError("_apply_slices: expected a grid")
    grid = problem.grid
    return lambda p, q: poisson_slices(p.view(grid), q.view(grid))


def _apply_csr(problem: Problem) -> Apply:
    matrix = problem.csr.torch()
    return lambda p, q: torch.mv(matrix, p, out=q)


def _torch_host(problem: Problem, apply: Apply) -> Plan:
    """The loop for a CPU: scalars are Python floats."""
    b = problem.b
    x, r, p, q = (torch.empty_like(b) for _ in range(4))

    def solve(goal: Goal) -> Solution:
        x.zero_()
        r.copy_(b)
        p.copy_(b)
        rr = float(torch.dot(r, r))
        target = goal.rtol**2 * rr
        done = 0
        while done < goal.iterations and rr > target:
            apply(p, q)
            alpha = rr / float(torch.dot(p, q))
            x.add_(p, alpha=alpha)
            r.sub_(q, alpha=alpha)
            before, rr = rr, float(torch.dot(r, r))
            torch.add(r, p, alpha=rr / before, out=p)
            done += 1
        return Solution(x, done)

    return lambda goal: functools.partial(solve, goal)


def _torch_device(problem: Problem, apply: Apply, graph: bool) -> Plan:
    """The loop for a GPU: scalars stay on the device and convergence is looked at every CHECK_EVERY iterations only.

    With `graph`, one iteration is captured as a CUDA graph and replayed.
    """
    b = problem.b
    x, r, p, q = (torch.empty_like(b) for _ in range(4))
    rr = torch.zeros((), dtype=b.dtype, device=b.device)

    def start() -> None:
        x.zero_()
        r.copy_(b)
        p.copy_(b)
        rr.copy_(torch.dot(r, r))

    def step() -> None:
        apply(p, q)
        alpha = rr / torch.dot(p, q)
        x.addcmul_(p, alpha)
        r.addcmul_(q, alpha, value=-1.0)
        new = torch.dot(r, r)
        torch.addcmul(r, p, new / rr, out=p)
        rr.copy_(new)

    advance: Callable[[], object] = step
    if graph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # capture needs the libraries' workspaces to exist
            start()
            step()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        advance = captured.replay

    def solve(goal: Goal) -> Solution:
        start()
        target = goal.rtol**2 * float(rr) if goal.rtol > 0 else 0.0
        done = 0
        while done < goal.iterations:
            if goal.rtol > 0 and done % CHECK_EVERY == 0 and float(rr) <= target:
                break
            advance()
            done += 1
        return Solution(x, done)

    return lambda goal: functools.partial(solve, goal)


def _torch_slices(problem: Problem) -> Plan:
    apply = _apply_slices(problem)
    return _torch_device(problem, apply, graph=False) if problem.b.is_cuda else _torch_host(problem, apply)


def _torch_csr(problem: Problem) -> Plan:
    apply = _apply_csr(problem)
    return _torch_device(problem, apply, graph=False) if problem.b.is_cuda else _torch_host(problem, apply)


# lineax: the whole solve in one XLA program


def _lineax(problem: Problem, tested: bool) -> Plan:
    """With `tested`, lineax's stopping test is in the loop, as in every solve to a tolerance: norms of the residual and
    of the step, two more passes an iteration. Without it, a fixed number of iterations that look at nothing.
    """
    import jax

    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    import jax.numpy as jnp
    import lineax

    grid = problem.grid
    b = jnp.asarray(problem.b.cpu().numpy()).reshape(grid)
    b_norm = float(torch.linalg.vector_norm(problem.b.double()))

    def stencil(u: Any) -> Any:
        padded = jnp.pad(u, 1)
        core = slice(1, -1)
        return (
            6 * u
            - padded[:-2, core, core]
            - padded[2:, core, core]
            - padded[core, :-2, core]
            - padded[core, 2:, core]
            - padded[core, core, :-2]
            - padded[core, core, 2:]
        )

    structure = jax.eval_shape(lambda u: u, b)
    operator = lineax.FunctionLinearOperator(stencil, structure, tags=lineax.positive_semidefinite_tag)

    def two_norm(u: Any) -> Any:
        return jnp.sqrt(jnp.sum(u * u))

    @functools.cache
    def compiled(goal: Goal) -> Any:
        # atol in the 2-norm is |r| <= rtol |b|; lineax asks the same of the last step, so it may run a little longer.
        atol = max(goal.rtol * b_norm, UNATTAINABLE) if tested else 0.0
        method = lineax.CG(rtol=0.0, atol=atol, norm=two_norm, stabilise_every=None, max_steps=goal.iterations)

        def solve(rhs: Any) -> Any:
            solution = lineax.linear_solve(operator, rhs, method, throw=False)
            return solution.value, solution.stats["num_steps"]

        return jax.jit(solve).lower(b).compile()

    def plan(goal: Goal) -> Run:
        program = compiled(goal)

        def run() -> Solution:
            x, steps = jax.block_until_ready(program(b))  # type: ignore[no-untyped-call]
            return Solution(from_dlpack(x).reshape(-1), int(steps))

        return run

    return plan


# CuPy: cuSPARSE product, the loop in Python


def _cupy(problem: Problem) -> Plan:
    import cupy
    from cupyx.scipy.sparse import csr_matrix
    from cupyx.scipy.sparse.linalg import cg

    arrays = problem.csr
    parts = tuple(cupy.from_dlpack(part) for part in (arrays.values, arrays.col, arrays.crow))
    matrix = csr_matrix(parts, shape=(problem.n, problem.n))
    b = cupy.from_dlpack(problem.b)
    tolerance = "rtol" if "rtol" in inspect.signature(cg).parameters else "tol"

    def plan(goal: Goal) -> Run:
        def run() -> Solution:
            count = 0

            def step(_: object) -> None:
                nonlocal count
                count += 1

            x, _ = cg(matrix, b, maxiter=goal.iterations, atol=0.0, callback=step, **{tolerance: goal.rtol})
            return Solution(from_dlpack(x), count)

        return run

    return plan


BOTH = ("cpu", "cuda")
GPU_STENCIL_LIMIT = 512**3

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "kantor-stencil", "stencil", "cg(Stencil(shape), b)",
            lambda problem: _kantor(problem, "stencil", ""), ("kantor",), BOTH, limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "kantor-csr", "csr", "cg(CSR.from_any(A), b)",
            lambda problem: _kantor(problem, "csr", ""), ("kantor",), BOTH,
        ),
        Peer(
            "kantor-csr-jacobi", "csr", "cg(CSR.from_any(A), b, M=jacobi(A))",
            lambda problem: _kantor(problem, "csr", "jacobi"), ("kantor",), BOTH, preconditioned=True,
        ),
        Peer(
            "kantor-csr-ic0", "csr", "cg(CSR.from_any(A), b, M=ic0(A))",
            lambda problem: _kantor(problem, "csr", "ic0"), ("kantor",), BOTH, preconditioned=True,
        ),
        Peer("scipy-csr", "csr", "scipy.sparse.linalg.cg, CSR int32", _scipy, ("scipy",)),
        Peer(
            "torch-csr", "csr", "in-place loop, torch CSR int32, mv(out=)", _torch_csr, (), BOTH,
        ),
        Peer(
            "torch-slices", "stencil", "in-place loop, stencil by shifted slices",
            _torch_slices, (), BOTH, limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "torch-slices-graph", "stencil", "the same iteration as a CUDA graph",
            lambda problem: _torch_device(problem, _apply_slices(problem), graph=True), (), ("cuda",),
            limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "torch-csr-graph", "csr", "the torch CSR iteration as a CUDA graph",
            lambda problem: _torch_device(problem, _apply_csr(problem), graph=True), (), ("cuda",),
        ),
        Peer(
            "lineax-stencil", "stencil", "lineax.CG, jitted stencil, stabilise_every=None",
            lambda problem: _lineax(problem, tested=True), ("jax", "lineax"), BOTH, limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "lineax-untested", "stencil", "the same with rtol = atol = 0: no stopping test in the loop",
            lambda problem: _lineax(problem, tested=False), ("jax", "lineax"), BOTH, goals=("iterations",),
            limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "pyamg-csr", "csr", "pyamg.krylov.cg, CSR int32", lambda problem: _pyamg(problem, False), ("pyamg",),
        ),
        Peer(
            "pyamg-csr-sa", "csr", "pyamg.krylov.cg, smoothed aggregation V-cycle",
            lambda problem: _pyamg(problem, True), ("pyamg",), goals=("solve",), preconditioned=True, limit=128**3,
        ),
        Peer(
            "petsc-csr", "csr", "KSP cg, PC none, AIJ, one process", _petsc, ("petsc4py",), dtypes=("float64",),
        ),
        Peer("cupy-csr", "csr", "cupyx.scipy.sparse.linalg.cg, CSR int32", _cupy, ("cupy", "cupyx"), ("cuda",)),
    )
}  # fmt: skip
