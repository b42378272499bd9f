"""Pressure in voxels: a new geometry set up and solved, by multigrid and by others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kantor.bench.case import OWN, Peer, Problem, Run

TITLE = "Pressure in voxels, set up and solved, float64, to |b - A x| <= 1e-6 |b|"
SIZES = {"tiny": ((8,), 2), "small": ((32,), 3), "full": ((64, 128), 3)}  # sides, dimensions
SCENES = ("open_box", "smoke_balls")
RTOL = 1e-6

Solve = Callable[[float], tuple[Tensor, int]]  # the solution on the fluid cells, and how many iterations it took


@dataclass(frozen=True)
class Scene:
    """Flags, the right-hand side on the grid and on the fluid cells, and the matrix of these (None: nobody asks)."""

    flags: Tensor
    b: Tensor
    compressed_b: Tensor
    matrix: Any


@dataclass(frozen=True)
class Solver:
    """A solver: `set_up` does what a new geometry needs. `limit` is the largest number of cells it gets."""

    set_up: Callable[[Scene], Solve]
    needs: str = "torch"
    matrix: bool = False
    limit: int = 128**3

    @property
    def threaded(self) -> bool:
        """Whether it uses more than one thread."""
        return self.needs == "torch"


def _kantor(precondition: Callable[[Any], Any]) -> Callable[[Scene], Solve]:
    def set_up(problem: Scene) -> Solve:
        from kantor.linalg import PoissonGrid, cg

        A = PoissonGrid(problem.flags)
        _ = A.cells, A.closed_components
        M = precondition(A)

        def solve(rtol: float) -> tuple[Tensor, int]:
            result = cg(A, problem.b, M=M, rtol=rtol)
            return A.compress(result.x), result.iterations

        return solve

    return set_up


def _multigrid(**options: Any) -> Callable[[Any], Any]:
    def precondition(A: Any) -> Any:
        from kantor.linalg import Multigrid

        return Multigrid(A, **options)

    return precondition


def _learned(A: Any) -> Any:
    from kantor.linalg import LearnedVCycle

    return LearnedVCycle(len(A.grid)).bind(A)


def _incomplete_cholesky(A: Any) -> Any:
    from kantor.linalg import ic0

    return ic0(A)


def _pyamg(kind: str, **options: Any) -> Callable[[Scene], Solve]:
    def set_up(problem: Scene) -> Solve:
        import pyamg

        hierarchy = getattr(pyamg, kind)(problem.matrix, **options)

        def solve(rtol: float) -> tuple[Tensor, int]:
            residuals: list[float] = []
            b = problem.compressed_b.numpy()
            x = hierarchy.solve(b, tol=rtol, accel="cg", maxiter=500, residuals=residuals)
            return torch.from_numpy(x), len(residuals) - 1

        return solve

    return set_up


def _scipy(problem: Scene) -> Solve:
    from scipy.sparse.linalg import cg

    def solve(rtol: float) -> tuple[Tensor, int]:
        count = 0

        def step(_: object) -> None:
            nonlocal count
            count += 1

        x, _ = cg(problem.matrix, problem.compressed_b.numpy(), rtol=rtol, atol=0.0, callback=step)
        return torch.from_numpy(x), count

    return solve


def _hypre(problem: Scene) -> Solve:
    from petsc4py import PETSc

    m = problem.matrix
    A = PETSc.Mat().createAIJ(size=m.shape, csr=(m.indptr, m.indices, m.data), comm=PETSc.COMM_SELF)
    b = PETSc.Vec().createWithArray(problem.compressed_b.numpy(), comm=PETSc.COMM_SELF)
    x = b.duplicate()
    solver = PETSc.KSP().create(comm=PETSc.COMM_SELF)
    solver.setType("cg")
    solver.setOperators(A)
    solver.getPC().setType("hypre")
    solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
    solver.setUp()

    def solve(rtol: float) -> tuple[Tensor, int]:
        solver.setTolerances(rtol=rtol, atol=0.0, divtol=1e300, max_it=500)
        solver.solve(b, x)
        return torch.from_numpy(x.getArray(readonly=True).copy()), solver.getIterationNumber()

    return solve


FIRST = "Kantor, multigrid"
SOLVERS = {
    FIRST: Solver(_kantor(_multigrid()), limit=1 << 40),
    "  two sweeps": Solver(_kantor(_multigrid(sweeps=2))),
    "  damped Jacobi": Solver(_kantor(_multigrid(smoother="jacobi"))),
    "  learned": Solver(_kantor(_learned), limit=1 << 40),
    "  walls ignored": Solver(_kantor(_multigrid(walls=False))),
    "Kantor, cg": Solver(_kantor(lambda A: None)),
    "Kantor, cg with ic0": Solver(_kantor(_incomplete_cholesky)),
    "pyamg, SA": Solver(_pyamg("smoothed_aggregation_solver", improve_candidates=None), "pyamg", True),
    "pyamg, RS": Solver(_pyamg("ruge_stuben_solver"), "pyamg", True),
    "pyamg, RS direct": Solver(_pyamg("ruge_stuben_solver", interpolation="direct"), "pyamg", True),
    "SciPy, cg": Solver(_scipy, "scipy", True),
    "PETSc, cg with hypre": Solver(_hypre, "petsc4py", True),
}


# --- the case ---

_NEEDS = {"torch": (), "pyamg": ("pyamg",), "scipy": ("scipy",), "petsc4py": ("petsc4py",)}


def _peer(name: str, library: str, configuration: str) -> Peer:
    solver = SOLVERS[name]

    def prepare(task: Scene) -> Run:
        return lambda: solver.set_up(task)(RTOL)

    return Peer(name.strip(), library, configuration, prepare, _NEEDS[solver.needs])


PEERS = {
    peer.name: peer
    for peer in (
        _peer(FIRST, OWN, "cg(A, b, M=Multigrid(A))"),
        _peer("  learned", OWN, "cg(A, b, M=LearnedVCycle(3).bind(A))"),
        _peer("pyamg, SA", "PyAMG", "smoothed_aggregation_solver(improve_candidates=None), accel='cg'"),
        _peer("pyamg, RS", "PyAMG", "ruge_stuben_solver(), accel='cg'"),
        _peer("pyamg, RS direct", "PyAMG", "ruge_stuben_solver(interpolation='direct'), accel='cg'"),
        _peer("SciPy, cg", "SciPy", "scipy.sparse.linalg.cg, CSR int32, no preconditioner"),
        _peer("PETSc, cg with hypre", "PETSc", "KSP cg, PC hypre"),
    )
}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """Scenes of `kantor.datasets.poisson_scenes`; none on a GPU, where the set-up has no peer."""
    if device == "cuda":
        return ()
    sides, dim = SIZES[size]
    return tuple(
        Problem(f"{scene} {' x '.join([str(side)] * dim)}", "|b - A x| / |b|", 1.1 * RTOL)
        for side in sides
        for scene in SCENES
    )


def make(problem: str, device: str) -> Scene:
    """The scene, with a standard normal right-hand side; the finished matrix for those that need one."""
    from kantor.datasets.poisson_scenes import SCENES as KNOWN
    from kantor.linalg import PoissonGrid

    scene, shape = problem.split(" ", 1)
    flags = KNOWN[scene]([int(side) for side in shape.split(" x ")])
    A = PoissonGrid(flags)
    b = torch.randn(A.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * A.mask
    return Scene(flags, b, A.compress(b), A.to_csr().to_scipy())


def judge(task: Scene, answer: Any) -> dict[str, Any]:
    """True residual."""
    from kantor.linalg import PoissonGrid

    x, iterations = answer
    A = PoissonGrid(task.flags)
    residual = task.compressed_b - A.compress(A.matvec(A.expand(x)))
    return {"accuracy": float(residual.norm() / task.compressed_b.norm()), "iterations": iterations}
