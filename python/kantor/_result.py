"""What solvers return: a frozen record of the answer and of how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from torch import Tensor

from kantor._checks import host_array
from kantor._errors import ConvergenceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Status(str, Enum):
    """A word for how something ended, which equals its string, with advice.

    Attributes
    ----------
    advice : str
        What happened and what to try, in one or two sentences.
    """

    advice: str

    def __new__(cls, word: str, advice: str) -> Self:
        """Make a member; its value is the word alone."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.advice = advice
        return member

    def __str__(self) -> str:
        return str(self.value)


class SolveStatus(Status):
    """How a linear solve ended: ``str(status)`` is the plain word, ``status.advice`` what it means and what to try."""

    CONVERGED = (
        "converged",
        "The true residual meets the tolerance.",
    )
    MAXITER = (
        "maxiter",
        "The iteration limit was reached before the tolerance: raise maxiter, loosen rtol, or use a "
        "preconditioner (M='jacobi' or M='ic0'). To go on from here pass x0=result.x.",
    )
    NEGATIVE_CURVATURE = (
        "negative_curvature",
        "A direction d with d'Ad < 0 was met: A is not positive definite. The direction is "
        "result.direction, its curvature result.curvature. For an indefinite A use another method (MINRES in scipy); "
        "in a minimisation the direction is a descent direction.",
    )
    SINGULAR = (
        "singular",
        "A direction of zero curvature was met: A is singular to working precision and b is not "
        "in its range, or A is indefinite, or conditioned worse than 1/eps. If A is semidefinite, remove its null "
        "space from b (for pure Neumann problems: the mean), or add a shift. The direction is result.direction.",
    )
    STAGNATED = (
        "stagnated",
        "The true residual stopped falling above the tolerance: it has reached the rounding level "
        "of this dtype. Use float64, storage=torch.float32 with float64 input, or a looser rtol.",
    )
    BREAKDOWN = (
        "breakdown",
        "The iteration produced NaN or infinity: look for overflow in the operator or the preconditioner.",
    )
    INTERRUPTED = (
        "interrupted",
        "Interrupted by Ctrl-C: x is the last iterate. To go on pass x0=result.x.",
    )
    STOPPED = (
        "stopped",
        "Stopped by the callback: x is the last iterate.",
    )
    INDEFINITE_PRECONDITIONER = (
        "indefinite_preconditioner",
        "The preconditioner gave r'Mr <= 0: it is not positive definite. Use a "
        "symmetric positive definite M, such as 'jacobi' on a matrix with a positive diagonal.",
    )
    UNCHECKED = (
        "unchecked",
        "The solve ran inside torch.compile, export or vmap, where its numbers cannot be looked at: "
        "only x is known. Check the residual yourself.",
    )


@dataclass(frozen=True)
class History:
    """Residual norms against iteration numbers.

    Long runs keep at most a few thousand entries, evenly spread (every 2nd, 4th, ... iteration).

    Attributes
    ----------
    iterations : ndarray
        Iteration numbers (m,), int64.
    residual_norms : ndarray
        Residual norms of the recurrence at these iterations (m,), float64.
    """

    iterations: np.ndarray[Any, np.dtype[np.int64]]
    residual_norms: np.ndarray[Any, np.dtype[np.float64]]

    def __len__(self) -> int:
        return len(self.iterations)


@dataclass(frozen=True, repr=False)
class SolveResult:
    """Result of an iterative solve of ``A x = b``.

    For a batch of right-hand sides the scalars describe the worst system, the fields ``per_system_*`` all of them.

    Attributes
    ----------
    x : Tensor
        Solution, shaped like ``b``; differentiable with respect to ``b`` and the operator's tensors.
    status : SolveStatus
        How the solve ended; for a batch, the first status that is not CONVERGED.
    iterations : int
        Iterations of the longest system.
    residual_norm : float
        Largest true residual norm ``|b - A x|_2`` of the batch, formed anew in double precision at the end.
    relative_residual : float
        Largest ``|b - A x| / |b|``.
    history : History
        Residual norms of the system with the largest final residual.
    seconds : float
        Wall-clock time of the solve.
    direction : Tensor or None
        With status NEGATIVE_CURVATURE or SINGULAR: the direction ``d``, shaped like ``b``; zero for the systems of a
        batch that ended otherwise.
    curvature : float or None
        ``d'Ad / d'd`` of the first such system.
    state : dict
        Keyword arguments to resume or warm start with: ``cg(A, b, **result.state)``.
    per_system_status : list of SolveStatus
        One entry per right-hand side, flattened.
    per_system_iterations : Tensor
        Iterations of each, int64.
    per_system_residual_norm : Tensor
        True residual norm of each, float64.
    """

    x: Tensor
    status: SolveStatus
    iterations: int
    residual_norm: float
    relative_residual: float
    history: History
    seconds: float
    method: str
    tolerance: float
    per_system_status: list[SolveStatus]
    per_system_iterations: Tensor
    per_system_residual_norm: Tensor
    direction: Tensor | None = None
    curvature: float | None = None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """True when every system met its tolerance."""
        return self.status is SolveStatus.CONVERGED

    @property
    def message(self) -> str:
        """What happened and what to try."""
        failed = sum(status is not SolveStatus.CONVERGED for status in self.per_system_status)
        count = len(self.per_system_status)
        prefix = f"{failed} of {count} systems failed; the first: " if failed and count > 1 else ""
        return f"{prefix}{self.status.value}: {self.status.advice}"

    def check(self) -> SolveResult:
        """Return self if converged, else raise :class:`kantor.ConvergenceError` carrying this result."""
        if not self.converged:
            raise ConvergenceError(f"{self.method}: {self.message}", self)
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return x as a NumPy array, shaped like ``b``, from whatever device and without derivatives."""
        return host_array(self.x)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the residual norm against the iteration (needs matplotlib, extra ``cli``)."""
        from kantor.plotting import plot_convergence

        return plot_convergence(self.history, ax=ax, label=self.method, tolerance=self.tolerance)

    def __repr__(self) -> str:
        count = len(self.per_system_status)
        rows = [
            ("status", self.status.value),
            (
                "unknowns",
                f"{self.x.numel() // max(count, 1):,}" + (f" x {count} right-hand sides" if count > 1 else ""),
            ),
            ("iterations", f"{self.iterations:,}"),
            ("|b - Ax|", f"{self.residual_norm:.3e}"),
            ("|b - Ax| / |b|", f"{self.relative_residual:.3e}"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        if self.curvature is not None:
            rows.append(("curvature", f"{self.curvature:.3e}"))
        width = max(len(name) for name, _ in rows)
        lines = [f"{self.method} on {str(self.x.dtype).removeprefix('torch.')} ({self.x.device})"]
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        if not self.converged:
            lines.append(f"  {self.status.advice}")
        return "\n".join(lines)


__all__ = ["History", "SolveResult", "SolveStatus", "Status"]
