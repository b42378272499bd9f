"""What minimisers return: a frozen record of the point, of how it was found and of what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from kantor._errors import ConvergenceError
from kantor._result import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class OptimizeStatus(Status):
    """How a minimisation ended: ``str(status)`` is the plain word, ``status.advice`` what it means and what to try."""

    CONVERGED = (
        "converged",
        "The gradient norm meets the tolerance.",
    )
    MAX_ITER = (
        "max_iter",
        "The iteration limit was reached before the tolerance: raise max_iter or tol. To go on "
        "from here pass **result.state instead of x0.",
    )
    MAX_HVP = (
        "max_hvp",
        "The limit of Hessian-vector products was reached before the tolerance: raise max_hvp. To "
        "go on from here pass **result.state instead of x0.",
    )
    MAX_SECONDS = (
        "max_seconds",
        "The time limit was reached before the tolerance. To go on from here pass **result.state instead of x0.",
    )
    LINE_SEARCH = (
        "line_search",
        "No step lowered the function however short it was: value, gradient and Hessian "
        "products do not belong together, or their rounding errors are larger than the decrease. Check grad and hvp, "
        "or use float64.",
    )
    STALLED = (
        "stalled",
        "Value and gradient stopped changing above the tolerance: they have reached the rounding "
        "level of this dtype. Use float64 or a larger tol.",
    )
    NON_FINITE = (
        "non_finite",
        "NaN or infinite values all around the last point: look for overflow, or logarithms and "
        "roots of negative numbers, in fun, grad and hvp. The result is the last point with finite values.",
    )
    UNBOUNDED = (
        "unbounded",
        "The function falls without end along the steps: it seems to be unbounded below. Check "
        "its sign, or add a regularising term.",
    )
    STOPPED = (
        "stopped",
        "Stopped by the callback: x is the last iterate.",
    )
    INTERRUPTED = (
        "interrupted",
        "Interrupted by Ctrl-C: x is the last iterate. To go on pass **result.state instead of x0.",
    )
    FAILED = (
        "failed",
        "The library that this method is delegated to gave up; its own words are in result.message.",
    )


@dataclass(frozen=True, repr=False)
class OptimizeResult:
    """Result of a minimisation.

    For a batch of B problems ``fun`` and ``grad_norm`` are tensors ``(B,)``, the counters count calls (each serves the
    whole batch), ``status`` is the first one that is not CONVERGED, and the fields ``per_problem_*`` describe each.

    Attributes
    ----------
    x : Tensor or ndarray
        The best point found, of the kind and shape of ``x0``.
    fun : float or Tensor
        Value there.
    grad : Tensor or ndarray
        Gradient there, shaped like x.
    grad_norm : float or Tensor
        Its Euclidean norm.
    status : OptimizeStatus
        How it ended.
    n_iter : int
        Steps of the method, accepted or not.
    n_fun, n_grad, n_hvp : int
        Evaluations of value, gradient and Hessian-vector product.
    n_points : int
        Points at which Hessian-vector products were used.
    M : float or Tensor
        Final estimate of the Lipschitz constant of the Hessian (method ``arncg``; NaN for others).
    gamma : float or Tensor
        Final radius of gradient-normalised smoothness (method ``gns``; NaN for others).
    n_solve : int
        Linear systems solved (method ``gns``; 0 for others).
    history : dict of ndarray
        One entry per accepted point, the start included: ``fun``, ``grad_norm``, ``n_fun``, ``n_grad``, ``n_hvp``,
        ``seconds``; the methods' own: ``M``, ``omega`` (``arncg``), ``gamma`` (``gns``). With a leading batch
        dimension for batches.
    seconds : float
        Wall-clock time.
    method : str
        Name of the method.
    state : dict
        Keyword arguments to go on with: ``minimize(fun, **result.state)``.
    details : str
        What a library that the method is delegated to said.
    per_problem_status : list of OptimizeStatus
        One entry per problem of a batch; one for a single problem.
    per_problem_iterations : ndarray
        Accepted points of each, int64.
    """

    x: Any
    fun: Any
    grad: Any
    grad_norm: Any
    status: OptimizeStatus
    n_iter: int
    n_fun: int
    n_grad: int
    n_hvp: int
    n_points: int
    history: dict[str, np.ndarray[Any, Any]]
    seconds: float
    method: str
    tol: float
    M: Any = float("nan")
    gamma: Any = float("nan")
    n_solve: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    details: str = ""
    per_problem_status: list[OptimizeStatus] = field(default_factory=list)
    per_problem_iterations: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def converged(self) -> bool:
        """True when every problem met its tolerance."""
        return self.status is OptimizeStatus.CONVERGED

    @property
    def success(self) -> bool:
        """SciPy's name of :attr:`converged`."""
        return self.converged

    @property
    def message(self) -> str:
        """What happened and what to try."""
        failed = sum(status is not OptimizeStatus.CONVERGED for status in self.per_problem_status)
        count = len(self.per_problem_status)
        prefix = f"{failed} of {count} problems failed; the first: " if failed and count > 1 else ""
        own = f" ({self.details})" if self.details else ""
        return f"{prefix}{self.status.value}: {self.status.advice}{own}"

    def check(self) -> OptimizeResult:
        """Return self if converged, else raise :class:`kantor.ConvergenceError` carrying this result."""
        if not self.converged:
            raise ConvergenceError(f"{self.method}: {self.message}", self)
        return self

    def plot(self, ax: Axes | None = None, *, against: str = "work") -> Axes:
        """Plot value and gradient norm (needs matplotlib, extra ``cli``).

        Parameters
        ----------
        ax : Axes, optional
            Where to draw.
        against : "work", "seconds" or "points"
            The horizontal axis; work counts gradient equivalents, where a Hessian-vector product counts as two.
        """
        from kantor.plotting import plot_minimization

        return plot_minimization(self.history, ax=ax, label=self.method, tolerance=self.tol, against=against)

    def __repr__(self) -> str:
        count = len(self.per_problem_status)
        batch = f" x {count} problems" if count > 1 else ""
        size = int(np.prod(tuple(self.x.shape), dtype=np.int64))
        rows = [
            ("status", self.status.value),
            ("unknowns", f"{size // max(count, 1):,}{batch}"),
            ("value", _shown(self.fun)),
            ("gradient norm", _shown(self.grad_norm)),
            ("iterations", f"{self.n_iter:,}, {self.n_points:,} points of curvature"),
            ("calls", f"{self.n_fun:,} fun, {self.n_grad:,} grad, {self.n_hvp:,} hvp"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        width = max(len(name) for name, _ in rows)
        kind = f"{self.x.dtype} ({self.x.device})" if isinstance(self.x, Tensor) else f"{self.x.dtype}"
        lines = [f"{self.method} on {kind.removeprefix('torch.')}"]
        lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        if not self.converged:
            lines.append(f"  {self.status.advice}{f' ({self.details})' if self.details else ''}")
        return "\n".join(lines)


def _shown(value: Any) -> str:
    """A number, or the range of a batch of numbers."""
    if not isinstance(value, Tensor):
        return f"{value:.9g}"
    if value.numel() == 0:
        return "none"
    return f"{float(value.min()):.6g} to {float(value.max()):.6g}"


__all__ = ["OptimizeResult", "OptimizeStatus"]
