"""Which preconditioner ``kantor solve`` uses, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor

from kantor import KantorError
from kantor._solve_files import BadInputError
from kantor.linalg import CSR, LinearOperator, Multigrid, SolveResult, ic0, jacobi
from kantor.linalg.grid_detection import GridMatrix, detect_grid

TINY = 64  # unknowns up to which a preconditioner cannot pay for its own set-up
_CONTRAST = 1e4  # of the coefficients beyond which incomplete Cholesky is mostly faster than multigrid


class Preconditioner(StrEnum):
    """Choices of ``--preconditioner``."""

    auto = "auto"
    none = "none"
    jacobi = "jacobi"
    ic0 = "ic0"
    multigrid = "multigrid"


@dataclass(frozen=True)
class Chosen:
    """What to solve with: the operator, its preconditioner, and the reason where it is not the obvious one.

    With multigrid the operator is that of the grid behind the matrix; ``matrix`` tells which row is which cell.
    """

    A: LinearOperator
    M: LinearOperator | None
    name: str
    note: str = ""
    matrix: GridMatrix | None = None

    def posed(self, b: Tensor) -> Tensor:
        """Return right-hand sides of the matrix, (n,) or (k, n), as the operator takes them.

        Raises
        ------
        BadInputError
            The matrix is that of a grid without Dirichlet cells, and a right-hand side does not sum to zero.
        """
        if self.matrix is None:
            return b
        posed = self.matrix.expand(b)
        try:
            self.matrix.grid.admit(posed, "kantor solve")
        except ValueError as error:
            labels, count = self.matrix.grid.closed_components
            part = labels.flatten().long()
            inside = part >= 0
            sums = b.new_zeros((*b.shape[:-1], count)).index_add(-1, part[inside], posed[..., inside])
            worst = int(sums.abs().reshape(-1, count).amax(0).argmax())
            raise BadInputError(
                f"the right-hand side sums to {float(sums[..., worst].abs().max()):.3g} over the "
                f"{int((part == worst).sum()):,} unknowns of a part whose rows of the matrix sum to zero, expected 0: "
                "the matrix is singular there; subtract its mean over them from the right-hand side, and pass that "
                "with --rhs"
            ) from error
        return posed

    def answered(self, result: SolveResult, b: Tensor) -> SolveResult:
        """Return the operator's result with the unknowns of the matrix."""
        return result if self.matrix is None else replace(result, x=self.matrix.compress(result.x, b))


def choose(wanted: Preconditioner, A: CSR) -> Chosen:
    """Build the preconditioner that is wanted; ``auto``: the first that can be built of multigrid, ic0 and jacobi.

    Beyond four orders of magnitude between the coefficients of a grid ``auto`` leaves multigrid out.

    Raises
    ------
    BadInputError
        The one that is wanted cannot be built.
    """
    if wanted is Preconditioner.none:
        return Chosen(A, None, "none")
    if wanted is Preconditioner.auto and A.shape[0] <= TINY:
        return Chosen(A, None, "none", f"{A.shape[0]} unknowns need none")
    builders: dict[str, Callable[[CSR], Chosen]] = {"multigrid": _multigrid, "ic0": _ic0, "jacobi": _jacobi}
    failures: dict[str, str] = {}
    for name, build in builders.items():
        if wanted.value not in ("auto", name):
            continue
        try:
            chosen = build(A)
            if wanted is Preconditioner.auto and chosen.matrix is not None and chosen.matrix.contrast > _CONTRAST:
                raise ValueError(f"coefficients that differ by a factor of {chosen.matrix.contrast:.1e}")
        except (ValueError, KantorError) as error:
            failures[name] = str(error).removeprefix(f"{name}: A: ").removesuffix("; use M='jacobi' or none")
            continue
        reasons = [note for note in (chosen.note, because(failures)) if note]
        return replace(chosen, note="; ".join(reasons))
    if wanted is not Preconditioner.auto:
        raise BadInputError(f"--preconditioner {wanted.value}: {failures[wanted.value]}")
    return Chosen(A, None, "none", because(failures))


def because(failures: dict[str, str]) -> str:
    """Return why each of the better ones could not be built."""
    return "; ".join(f"no {name}: {reason}" for name, reason in failures.items())


def _multigrid(A: CSR) -> Chosen:
    matrix = detect_grid(A)
    grid = matrix.grid
    size = " x ".join(map(str, grid.grid))
    kind = "constant" if grid.face_coef is None else "variable"
    return Chosen(grid, Multigrid(grid), "multigrid", f"a grid of {size} cells, {kind} coefficients", matrix)


def _ic0(A: CSR) -> Chosen:
    M = ic0(A)
    note = f"the factorisation needed the diagonal scaled by {1 + M.shift:g}" if M.shift else ""
    return Chosen(A, M, "ic0", note)


def _jacobi(A: CSR) -> Chosen:
    return Chosen(A, jacobi(A), "jacobi")
