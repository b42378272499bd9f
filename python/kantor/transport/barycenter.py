"""Wasserstein barycenters on a fixed support, by iterative Bregman projections in the log domain.

    min over p   sum_k w_k OT_reg(A_k, p),      OT_reg with reg sum_ij P_ij log P_ij.

One plan for each histogram, ``P_k = exp((f_k + g_k - C) / reg)``. The first projection gives P_k the rows A_k, the
second gives all plans one column marginal: the weighted geometric mean of theirs, which is the barycenter.
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
_WINDOW = 20  # iterations after which the rate of convergence is measured, over the second half
_GROWTH = 100.0  # of the error that ends an over-relaxation
_LARGEST_FACTOR = 1.99
_LINEAR = 0.5  # error below which rates mean something
_MASS_TOLERANCE = 1e-6


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
        Largest ``|P_k 1 - A_k|_1 + |P_k' 1 - p|_1`` of the histograms with positive weight, p being the barycenter.
        Debiased: of these and of the transport of p to itself.
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
    TransportStatus.MAX_ITER: (
        "The iteration limit was reached before the tolerance: raise max_iter, tol or reg. To go on from here pass "
        "x0=result."
    ),
    TransportStatus.STALLED: (
        "The marginal error stopped falling above the tolerance: it has reached the rounding level of exponents "
        "(f + g - C) / reg. Raise reg or tol."
    ),
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

    Minimises ``sum_k weights_k OT_reg(A_k, p)`` over histograms p, where OT_reg is the value of :func:`solve`. The
    entropy blurs p by about ``sqrt(reg)``; ``debiased=True`` minimises the sum of Sinkhorn divergences instead, which
    does not.

    Parameters
    ----------
    C : Tensor (n, m)
        Cost between the supports of the histograms (n) and of the barycenter (m); finite, float32 or float64. Square
        and symmetric for ``debiased=True``.
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
    over-relaxed to match, as in Sinkhorn's method, which takes the square root of the number of iterations. For small
    reg start from the result for a larger one. The debiased iteration is the published one: a deconvolution, slow where
    ``sqrt(reg)`` exceeds the width of the details it has to restore; ``tol=1e-5`` shows nothing of that. Deterministic.

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
    log_A = histograms.log()

    # In units of reg: phi = f / reg - log A, gamma = g / reg.
    gamma = _start(call, x0, w, cost.shape, debiased) / reg
    log_d = w @ gamma  # zero, but for the debiased barycenter
    phi = _softmin(cost, gamma, reg)
    log_p = log_d
    errors: list[float] = []
    seconds: list[float] = []
    relaxation = _Relaxation()
    rounding = torch.finfo(torch.float64).eps * float(cost.abs().max()) / reg  # of the exponents
    status, best, best_at = TransportStatus.MAX_ITER, math.inf, 0
    with progress_bar(progress, call, tol, "marginal error", "tol") as update:
        for iteration in range(1, max_iter + 1):
            # Columns: the barycenter is the geometric mean of the marginals, and g gives it to all plans.
            columns = _softmin(cost, log_A + phi, reg, transpose=True)
            log_p = log_d - w @ columns
            gamma = torch.lerp(gamma, columns + log_p, relaxation.factor)
            unsettled = 0.0
            if debiased:  # the transport of p to itself has the symmetric plan d exp(-C / reg) d
                own = log_d - _softmin(cost, log_d, reg)
                unsettled = float((own.exp() - log_p.exp()).abs().sum())
                log_d = log_d + 0.5 * (log_p - own)
            # Rows: f = reg log A + softmin(g).
            rows = _softmin(cost, gamma, reg)
            missed = (torch.exp(log_A + phi - rows) - histograms).abs().sum(-1)
            missed = missed + (torch.exp(gamma - columns) - log_p.exp()).abs().sum(-1)
            error = max(float(missed[w > 0].max()), unsettled)
            errors.append(error)
            seconds.append(time.perf_counter() - started)
            update(iteration, error, tol)
            answer = None if callback is None else callback(TransportInfo(iteration, float(reg), error))
            if math.isnan(error) or (math.isinf(error) and relaxation.factor == 1):
                status = TransportStatus.OVERFLOW
            elif error <= tol:
                status = TransportStatus.CONVERGED
            elif isinstance(answer, bool | np.bool_) and answer:
                status = TransportStatus.STOPPED
            elif iteration - best_at > _PATIENCE and best < 1e3 * rounding:
                status = TransportStatus.STALLED
            if status is not TransportStatus.MAX_ITER:
                break
            if error < best:
                best, best_at = error, iteration
            if not debiased:  # whose slow modes are those of the deconvolution, which are not those of the projections
                relaxation.adapt(errors)
            if iteration < max_iter:
                phi = torch.lerp(phi, rows, relaxation.factor)
    result = BarycenterResult(
        barycenter=log_p.exp().to(A.device, A.dtype),
        potentials=((reg * (log_A + phi)).to(A.device), (reg * gamma).to(A.device)),
        marginal_error=errors[-1],
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


class _Relaxation:
    """The over-relaxation factor that the measured rate of convergence asks for (adaptive SOR, Hageman and Young).

    If the plain iteration reduces the error by a factor r, relaxed by w it reduces it by the root m of
    ``(m + w - 1)^2 = m w^2 r`` and, at the best ``w = 2 / (1 + sqrt(1 - r))``, by w - 1. A measured m gives r.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._limit = _LARGEST_FACTOR
        self._since = 0  # iterations when the factor was set

    def adapt(self, errors: list[float]) -> None:
        """Look at the errors of all iterations so far."""
        age = len(errors) - self._since
        if self.factor > 1 and errors[-1] > _GROWTH * max(errors[self._since - 1], min(errors)):
            self._limit = 1 + 0.75 * (self.factor - 1)
            self.factor, self._since = 1.0, len(errors)
        elif age and age % _WINDOW == 0 and 0 < errors[-1] < _LINEAR:
            rate = (errors[-1] / errors[-1 - _WINDOW // 2]) ** (2 / _WINDOW)
            if self.factor - 1 < rate < 1:
                plain = min((rate + self.factor - 1) ** 2 / (rate * self.factor**2), 1.0)
                best = min(2 / (1 + math.sqrt(1 - plain)), 1 + 0.5 * self.factor, self._limit)  # in steps: no shock
                if best > self.factor:
                    self.factor, self._since = best, len(errors)


def _softmin(C: Tensor, potential: Tensor, reg: float, *, transpose: bool = False) -> Tensor:
    """:func:`kantor.transport._native.softmin` of potentials in units of reg."""
    return _native.softmin(C, reg * potential, float(reg), transpose=transpose).cpu() / reg


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(
    call: str, C: Tensor, A: Tensor, weights: Tensor | None, reg: Any, tol: Any, max_iter: Any, debiased: bool
) -> Tensor:
    """Raise unless the arguments make a problem; return the weights in float64 on the CPU."""
    for name, tensor in (("C", C), ("A", A), ("weights", weights)):
        if tensor is not None or name != "weights":
            check_float(check_tensor(tensor, call, name), call, name)
    check_same(call, [("C", C), ("A", A), ("weights", weights)])
    if C.ndim != 2 or 0 in C.shape:
        raise ValueError(f"{call}: C: expected shape (n, m) with n, m >= 1, got {tuple(C.shape)}")
    if A.ndim != 2 or A.shape[0] == 0 or A.shape[1] != C.shape[0]:
        raise ValueError(
            f"{call}: A: expected histograms in rows, shape (K, {C.shape[0]}) with K >= 1, got {tuple(A.shape)}"
        )
    if weights is not None and weights.shape != A.shape[:1]:
        raise ValueError(f"{call}: weights: expected shape ({A.shape[0]},), got {tuple(weights.shape)}")
    for name, value, least in (("reg", reg, "> 0"), ("tol", tol, "> 0")):
        if not (isinstance(value, int | float | np.floating) and 0 < value < math.inf):
            raise ValueError(f"{call}: {name}: expected a finite number {least}, got {value!r}")
    if not isinstance(max_iter, int | np.integer) or isinstance(max_iter, bool) or max_iter < 1:
        raise ValueError(f"{call}: max_iter: expected an integer >= 1, got {max_iter!r}")
    check_finite(C, call, "C")
    w = A.new_full((A.shape[0],), 1 / A.shape[0]) if weights is None else weights
    for name, values, masses in (("A", A.detach(), A.detach().double().sum(-1)), ("weights", w.detach(), None)):
        check_finite(values, call, name)
        if bool((values < 0).any()):
            where = tuple((values < 0).nonzero()[0].tolist())
            index = where[0] if len(where) == 1 else where
            raise ValueError(f"{call}: {name}: expected numbers >= 0, got {values[where].item()} at {index}")
        totals = values.double().sum(-1).reshape(-1) if masses is None else masses
        wrong = (totals - 1).abs() > _MASS_TOLERANCE
        if bool(wrong.any()):
            k = int(wrong.nonzero()[0])
            of = f" in row {k}" if masses is not None else ""
            raise ValueError(
                f"{call}: {name}: expected numbers of sum 1, got {float(totals[k]):.9g}{of}; normalise them"
            )
    if debiased:
        _check_symmetric(call, C.detach())
    w = w.detach().to("cpu", torch.float64)
    return w / w.sum()


def _check_symmetric(call: str, C: Tensor) -> None:
    if C.shape[0] != C.shape[1]:
        raise ValueError(f"{call}: C: expected a square matrix with debiased=True, got shape {tuple(C.shape)}")
    if float((C - C.mT).abs().max()) > 1e3 * torch.finfo(C.dtype).eps * float(C.abs().max()):
        raise ValueError(f"{call}: C: expected a symmetric matrix with debiased=True; symmetrise it as (C + C.T) / 2")


def _start(call: str, x0: Any, w: Tensor, shape: torch.Size, debiased: bool) -> Tensor:
    """The potentials g (K, m) to start from; their weighted mean is zero, or reg log d of the debiased barycenter."""
    (n, m), count = shape, w.numel()
    if x0 is None:
        return w.new_zeros(count, m)
    if not isinstance(x0, BarycenterResult):
        raise TypeError(f"{call}: x0: expected a BarycenterResult, got {type(x0).__name__}")
    g = x0.potentials[1]
    if x0.potentials[0].shape != (count, n) or g.shape != (count, m):
        raise ValueError(
            f"{call}: x0: expected the result for {count} histograms, {n} to {m} cells, got one with potentials "
            f"{tuple(x0.potentials[0].shape)} and {tuple(g.shape)}"
        )
    g = torch.nan_to_num(g.cpu(), 0.0, 0.0, 0.0)
    return g if debiased and x0.debiased else g - w @ g


__all__ = ["BarycenterResult", "barycenter"]
