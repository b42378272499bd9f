"""The conjugate gradient solvers that bench_cg times side by side, each at the best configuration found for it."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from kantor.bench.linalg.problems import Problem
from kantor.bench.linalg.solvers import Goal, Peer, Plan, Run, Solution
from kantor.bench.linalg.torch_loops import torch_csr, torch_slices

UNATTAINABLE = 1e-30  # a tolerance that keeps a stopping test in the loop without ever meeting it


# Kantor


def _kantor(problem: Problem, form: str, preconditioner: str) -> Plan:
    from kantor import linalg

    operator: linalg.Stencil | linalg.CSR
    if form == "csr":
        operator = linalg.CSR.from_any(problem.csr.torch())
    elif problem.grid is not None:
        operator = linalg.Stencil(problem.grid, dtype=problem.b.dtype, device=problem.b.device)
    else:
        raise ValueError("_kantor: a stencil needs a grid")
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


# lineax: the whole solve in one XLA program


def _lineax(problem: Problem, tested: bool) -> Plan:
    """With `tested`, lineax's stopping test is in the loop, as in every solve to a tolerance.

    It takes norms of the residual and of the step, two more passes an iteration. Without it a fixed number of
    iterations is made, which look at nothing.
    """
    import jax

    jax.config.update("jax_enable_x64", True)
    if not problem.b.is_cuda:
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        raise RuntimeError("_lineax: this jax sees no GPU")
    import jax.numpy as jnp
    import lineax

    grid = problem.grid
    b = jnp.asarray(problem.b.cpu().numpy()).reshape(grid)
    b_norm = float(torch.linalg.vector_norm(problem.b.double()))

    # lineax takes p.Ap <= 100 eps n r.r for a breakdown and returns NaN, which in float32 ends every Poisson problem
    # from 64^3 on; a large multiple of A passes that test and has the same iterates up to that factor.
    scale = 2.0 ** max(0, math.ceil(math.log2(1e5 * torch.finfo(problem.b.dtype).eps * problem.n)))

    def stencil(u: Any) -> Any:
        padded = jnp.pad(u, 1)
        core = slice(1, -1)
        return scale * (
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
            return scale * solution.value, solution.stats["num_steps"]

        return jax.jit(solve).lower(b).compile()

    def plan(goal: Goal) -> Run:
        program = compiled(goal)

        def run() -> Solution:
            x, steps = jax.block_until_ready(program(b))
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
        Peer(
            "scipy-csr", "csr", "scipy.sparse.linalg.cg, CSR int32, BLAS on one thread",
            _scipy, ("scipy.sparse.linalg",),
        ),
        Peer(
            "torch-csr", "csr", "in-place loop, torch CSR int32, mv(out=)", torch_csr, (), BOTH,
        ),
        Peer(
            "torch-slices", "stencil", "in-place loop, stencil by shifted slices",
            torch_slices, (), BOTH, limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "torch-slices-graph", "stencil", "the same iteration as a CUDA graph",
            lambda problem: torch_slices(problem, graph=True), (), ("cuda",),
            limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "torch-csr-graph", "csr", "the torch CSR iteration as a CUDA graph",
            lambda problem: torch_csr(problem, graph=True), (), ("cuda",),
        ),
        Peer(
            "lineax-stencil", "stencil", "lineax.CG, jitted stencil, stabilise_every=None",
            lambda problem: _lineax(problem, tested=True), ("jax", "lineax"), BOTH, limit=GPU_STENCIL_LIMIT,
        ),
        Peer(
            "lineax-untested", "stencil", "the same with rtol = atol = 0: no stopping test in the loop",
            lambda problem: _lineax(problem, tested=False), ("jax", "lineax"), goals=("iterations",),
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
            "petsc-csr", "csr", "KSP cg, PC none, AIJ, one process", _petsc, ("petsc4py.PETSc",), dtypes=("float64",),
        ),
        Peer("cupy-csr", "csr", "cupyx.scipy.sparse.linalg.cg, CSR int32", _cupy, ("cupy",), ("cuda",)),
    )
}  # fmt: skip
