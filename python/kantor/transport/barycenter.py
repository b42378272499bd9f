"""Wasserstein barycenters on a fixed support, by iterative Bregman projections in the log domain.

    min over p   sum_k w_k OT_reg(A_k, p),      OT_reg with reg sum_ij P_ij log P_ij.

One plan for each histogram, ``P_k = exp((f_k + g_k - C) / reg)``. The first projection gives P_k the rows A_k, the second
gives all plans one column marginal: the weighted geometric mean of theirs, which is the barycenter.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._errors import ConvergenceError
from kantor._progress import progress_bar
from kantor._result import History
from kantor.transport import _native
from kantor.transport._result import TransportStatus
from kantor.transport.solve import TransportInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PATIENCE = 200  # iterations without a smaller error after which it has stalled
_MEASURED = 20  # iterations over which the rate of convergence is measured
_DIVERGED = 10.0  # growth of the error that ends an over-relaxation
_RELAXATION_LIMIT = 1.98


@dataclass(frozen=True, repr=False, eq=False)
class BarycenterResult:
    """A barycenter, and how it was found.

    Attributes
    ----------
    barycenter : Tensor (m,)
        In the dtype of A; mass 1 to within the marginal error.
    potentials : tuple of Tensor
        f (K, n) and g (K, m), float64: the plan of histogram k is ``exp((f_k[:, None] + g_k - C) / reg)``. -inf where a
        histogram is zero.
    marginal_error : float
        Largest ``|P_k 1 - A_k|_1`` of the histograms with positive weight; all plans have the barycenter as their other
        marginal.
    status : TransportStatus
        How it ended.
    n_iter : int
        Iterations: two passes over the cost for each histogram.
    seconds : float
        Wall-clock time.
    history : dict of ndarray
        ``marginal_error`` and ``seconds``, one entry an iteration.
    """

    barycenter: Tensor
    potentials: tuple[Tensor, Tensor]
    marginal_error: float
    status: TransportStatus
    n_iter: int
    seconds: float
    history: dict[str, np.ndarray[Any, Any]]
    reg: float
    tol: float
    debiased: bool

    @property
    def converged(self) -> bool:
        """True when the tolerance is met."""
        return self.status is TransportStatus.CONVERGED

    @property
    def message(self) -> str:
        """What happened and what to try."""
        return f"{self.status.value}: {_ADVICE.get(self.status, self.status.advice)}"

    @property
    def state(self) -> dict[str, Any]:
        """Keyword arguments of a warm start: ``barycenter(C, A, reg=reg, **result.state)``."""
        return {"x0": self}

    def check(self) -> BarycenterResult:
        """Return self if converged, else raise :class:`kantor.ConvergenceError` carrying this result."""
        if not self.converged:
            raise ConvergenceError(f"barycenter: {self.message}", self)
        return self

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the marginal error against the iteration (needs matplotlib, extra ``cli``)."""
        from kantor.plotting import plot_convergence

        errors = self.history["marginal_error"]
        history = History(np.arange(1, len(errors) + 1), errors)
        ax = plot_convergence(history, ax=ax, label="barycenter", tolerance=self.tol)
        ax.set_ylabel("marginal error")
        return ax

    def __repr__(self) -> str:
        count, n = self.potentials[0].shape
        rows = [
            ("status", self.status.value),
            ("problem", f"{count:,} histograms of {n:,} cells to {self.barycenter.numel():,} cells"),
            ("reg", f"{self.reg:.3g}" + (", debiased" if self.debiased else "")),
            ("marginal error", f"{self.marginal_error:.3e}"),
            ("iterations", f"{self.n_iter:,}"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = ["barycenter", *(f"  {name:<{width}}  {text}" for name, text in rows)]
        if not self.converged:
            lines.append(f"  {self.message.partition(': ')[2]}")
        return "\n".join(lines)


_ADVICE = {
    TransportStatus.MAX_ITER: "The iteration limit was reached before the tolerance: raise max_iter, tol or reg. To go on "
    "from here pass x0=result.",
    TransportStatus.STALLED: "The marginal error stopped falling above the tolerance: it has reached the rounding level of "
    "exponents (f + g - C) / reg. Raise reg or tol.",
}


def barycenter(
    C: Tensor,
    A: Tensor,
    weights: Tensor | None = None,
    *,
    reg: float,
    tol: float = 1e-9,
    max_iter: int = 20_000,
    debiased: bool = False,
    x0: BarycenterResult | None = None,
    callback: Callable[[TransportInfo], bool | None] | None = None,
    progress: bool = False,
) -> BarycenterResult:
    """Entropic Wasserstein barycenter of histograms, on a fixed support.

    Minimises ``sum_k weights_k OT_reg(A_k, p)`` over histograms p, where OT_reg is the value of :func:`solve`. The entropy
    blurs p by about ``sqrt(reg)``; ``debiased=True`` minimises the sum of Sinkhorn divergences instead, which does not.

    Parameters
    ----------
    C : Tensor (n, m)
        Cost between the supports of the histograms (n) and of the barycenter (m); finite, float32 or float64. Square and
        symmetric for ``debiased=True``.
    A : Tensor (K, n)
        Histograms, one a row: nonnegative, mass 1, in the dtype of C.
    weights : Tensor (K,), optional
        Nonnegative, of sum 1. Default: 1 / K.
    reg : float
        Entropic regularisation > 0, in units of C.
    tol : float
        L1 error of the marginals at which to stop.
    max_iter : int
        Limit of iterations.
    debiased : bool
        Remove the blur.
    x0 : BarycenterResult, optional
        Where to start, such as the result for a larger reg.
    callback : callable, optional
        ``callback(info)`` with a :class:`TransportInfo` after every iteration; returning True stops.
    progress : bool
        Show a progress bar.

    Returns
    -------
    BarycenterResult
        Without derivatives.

    Raises
    ------
    ValueError
        Wrong shapes, NaN or infinity, negative entries, masses other than 1, C not symmetric for ``debiased=True``.
    TypeError
        Not a tensor; an integer dtype; mixed dtypes.

    Warns
    -----
    RuntimeWarning
        When the tolerance is not met; ``result.check()`` raises instead.

    Notes
    -----
    An iteration takes 2 K n m exponentials (the debiased one m^2 more), in float64; memory O(K (n + m)) beyond C. The
    iteration converges linearly, the more slowly the smaller reg is; its rate is measured and both projections are
    over-relaxed to match, as in Sinkhorn's method, which takes the square root of the number of iterations.
    Deterministic.

    References
    ----------
    J.-D. Benamou et al., "Iterative Bregman projections for regularized transportation problems", SIAM J. Sci. Comput.
    2015, section 3. H. Janati, M. Cuturi, A. Gramfort, "Debiased Sinkhorn barycenters", ICML 2020, algorithm 1.
    T. Lehmann et al., "A note on overrelaxation in the Sinkhorn algorithm", Optim. Lett. 2022.

    Examples
    --------
    >>> import torch, kantor
    >>> x = torch.arange(5, dtype=torch.float64)
    >>> A = torch.eye(5, dtype=torch.float64)[[0, 4]]
    >>> kantor.transport.barycenter((x[:, None] - x) ** 2, A, reg=0.1).barycenter.round(decimals=3)
    tensor([0., 0., 1., 0., 0.], dtype=torch.float64)
    """
    call = "barycenter"
    w = _check(call, C, A, weights, reg, tol, max_iter, debiased)
    started = time.perf_counter()
    cost, histograms = C.detach(), A.detach().to("cpu", torch.float64)
    log_A, w = histograms.log(), w.to("cpu", torch.float64)
    counted = w > 0
    g, log_d = _start(call, x0, cost.shape[1], w, float(reg), debiased)

    # In units of reg: phi = f / reg - log A, gamma = g / reg.
    phi: Tensor | None = None
    gamma = g / reg
    log_p = gamma.new_zeros(gamma.shape[1])
    errors: list[float] = []
    seconds: list[float] = []
    relaxation = Relaxation()
    status = TransportStatus.MAX_ITER
    best, best_at = math.inf, 0
    with progress_bar(progress, call, tol, "marginal error", "tol") as update:
        for iteration in range(max_iter + 1):
            # Rows, for the columns of the last iteration: f = reg log A + softmin(g).
            target = _softmin(cost, gamma, reg)
            if phi is not None:
                rows = torch.exp(log_A + phi - target)
                error = float((rows - histograms).abs().sum(-1)[counted].max())
                errors.append(error)
                seconds.append(time.perf_counter() - started)
                update(iteration, error, tol)
                if not math.isfinite(error):
                    status = TransportStatus.OVERFLOW
                    break
                if error <= tol and relaxation.exact:
                    status = TransportStatus.CONVERGED
                    break
                if callback is not None and callback(TransportInfo(iteration, float(reg), error)) is True:
                    status = TransportStatus.STOPPED
                    break
                if error < best:
                    best, best_at = error, iteration
                elif iteration - best_at >= _PATIENCE:
                    status = TransportStatus.STALLED
                    break
                if iteration == max_iter:
                    break
            omega = relaxation.next(errors, tol)
            phi = target if phi is None else torch.lerp(phi, target, omega)
            # Columns: the barycenter is the geometric mean of the marginals, and g gives it to all plans.
            columns = _softmin(cost, log_A + phi, reg, transpose=True)
            log_p = log_d - w @ columns
            gamma = torch.lerp(gamma, columns + log_p, omega)
            if debiased:
                log_d = 0.5 * (log_d + log_p + _softmin(cost, log_d, reg))
    assert phi is not None
    result = BarycenterResult(
        barycenter=log_p.exp().to(A.device, A.dtype),
        potentials=((reg * (log_A + phi)).to(A.device), (reg * gamma).to(A.device)),
        marginal_error=errors[-1] if errors else math.nan,
        status=status,
        n_iter=len(errors),
        seconds=time.perf_counter() - started,
        history={"marginal_error": np.array(errors), "seconds": np.array(seconds)},
        reg=float(reg),
        tol=float(tol),
        debiased=debiased,
    )
    if status not in (TransportStatus.CONVERGED, TransportStatus.STOPPED):
        warnings.warn(f"{call}: {result.message}", RuntimeWarning, stacklevel=2)
    return result
