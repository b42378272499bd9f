"""Entropic optimal transport of a cost matrix, to machine precision.

    min  <P, C> + reg sum_ij P_ij log P_ij      over plans P >= 0 with P1 = a, P'1 = b.

The algorithms are native: csrc/transport/newton_cpu.cpp, sinkhorn_cpu.cpp, sns_cpu.cpp.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_float, check_tensor, host_array, is_readable
from kantor._ops import backend
from kantor._progress import progress_bar
from kantor._ranks import Ranks
from kantor.transport import _native
from kantor.transport._arguments import (
    check_method,
    check_options,
    check_problem,
    exact_reg,
    regularisation,
    start_of,
    strengths,
    weights_of,
)
from kantor.transport._cost import Cost
from kantor.transport._native import Hooks, hooks, transport_potentials
from kantor.transport._result import TransportResult, TransportStatus, sparse_csr
from kantor.transport._sharded import solve_rows
from kantor.transport._value import dual_value, transport_value

_MAX_ITER = {"newton": 500, "sns": 500, "sinkhorn": 100_000}
_POINT_ENTRIES = 6_000_000  # of a sparse plan of points: 100 MB; beyond it Newton's products are taken on the fly
_STATUSES = {
    1: TransportStatus.CONVERGED, 2: TransportStatus.MAX_ITER, 3: TransportStatus.STALLED,
    4: TransportStatus.INFEASIBLE, 5: TransportStatus.INTERRUPTED, 6: TransportStatus.STOPPED,
    7: TransportStatus.OVERFLOW,
}  # fmt: skip


@dataclass(frozen=True)
class TransportInfo:
    """What a callback is told after each step."""

    iteration: int
    reg: float
    marginal_error: float


TransportCallback = Callable[[TransportInfo], bool | None]
Unbalanced = float | tuple[float | None, float | None] | None


def solve(
    C: Tensor | Sequence[Tensor],
    a: Tensor | Sequence[Tensor] | None = None,
    b: Tensor | Sequence[Tensor] | None = None,
    *,
    reg: float | Tensor,
    method: str = "auto",
    tol: float = 1e-9,
    max_iter: int | None = None,
    unbalanced: Unbalanced = None,
    reg_type: str = "entropy",
    x0: TransportResult | tuple[Tensor, Tensor] | None = None,
    grad: str = "implicit",
    warm_up: int = 20,
    density: float | None = None,
    relaxation: float | None = None,
    eps_scaling: bool = False,
    callback: TransportCallback | None = None,
    progress: bool = False,
    interrupt: str = "raise",
    ranks: Ranks | None = None,
) -> Any:
    """Solve entropic optimal transport for a cost matrix.

    Minimises ``<P, C> + reg sum P log P`` (``reg_type="entropy"``) or ``<P, C> + reg KL(P | a x b)``
    (``reg_type="kl"``) over plans with marginals a and b. Hard marginals give the same plan for both.

    Parameters
    ----------
    C : Tensor (n, m) or (B, n, m), or a sequence of matrices
        Cost, float32 or float64; +inf forbids a pair. A batch is solved side by side, each problem stopping on its
        own; a sequence may mix shapes and returns a list of results.
    a, b : Tensor (n,), (m,) or (B, n), (B, m), optional
        Nonnegative weights of equal total mass, in the dtype of C. Default: uniform of mass 1. A pair of zero mass is
        left out of the problem.
    reg : float or Tensor ()
        Regularisation, in units of C, >= 0; differentiable. 0 solves the unregularised problem: a continuation down to
        1e-5 of the range of C, then a feasible plan and a duality gap that certifies it. (For the exact optimum of
        small problems a network simplex, as in POT, is the right tool.)
    method : "auto", "newton", "sns" or "sinkhorn"
        ``newton``: continuation in reg with sparse Newton steps; the choice of ``auto``. ``sns``:
        Sinkhorn-Newton-Sparse as published. ``sinkhorn``: plain, over-relaxed.
    tol : float
        L1 error of the marginals, relative to the mass, at which to stop.
    max_iter : int, optional
        Limit of Newton steps, or of sweeps for ``sinkhorn``; default 500 and 100 000.
    unbalanced : float or pair, optional
        Strengths rho of penalties ``rho KL(P1 | a)``, ``rho KL(P'1 | b)`` in place of hard marginals; None in a pair
        keeps that marginal hard.
    reg_type : "entropy" or "kl"
        Which entropy; see above.
    x0 : TransportResult or pair of Tensor, optional
        Where to start: an earlier result or its potentials.
    grad : "implicit" or "none"
        Whether results carry derivatives. They are implicit: nothing is unrolled.
    warm_up, density : int, float
        ``sns``: sweeps before the first Newton step, and the share of entries kept (default ``2 / n``).
    relaxation, eps_scaling : float, bool
        ``sinkhorn``: a fixed over-relaxation in [1, 2) instead of the measured one; whether to start from a larger reg.
    callback : callable, optional
        ``callback(info)`` with a :class:`TransportInfo` after every step; returning True stops.
    progress : bool
        Show a progress bar.
    interrupt : "raise" or "return"
        On Ctrl-C raise KeyboardInterrupt, or return what there is with status INTERRUPTED.
    ranks : kantor.distributed.Ranks, optional
        Processes that share one problem: each passes its own rows of C and of a, possibly none, and the whole of b;
        everything else must be the same on all. f and the plan that come back are of its rows, g and the value of all.
        Methods ``newton`` and ``sinkhorn``, reg > 0, no derivatives.

    Returns
    -------
    TransportResult, or a list of them for a sequence.

    Raises
    ------
    ValueError
        Wrong shapes; NaN or -inf in C; negative or NaN weights; masses that differ; a row or column of infinite costs;
        reg < 0 or NaN; an empty problem. With `ranks` an error on one is raised on all, and so are arguments that
        differ among them.
    TypeError
        Not a tensor; an integer dtype; mixed dtypes.
    RankError
        With `ranks`: another process ended or stalled.

    Warns
    -----
    RuntimeWarning
        When the tolerance is not met; ``result.check()`` raises instead.

    Notes
    -----
    One sweep costs n m exponentials; Newton's method takes 10 to 60 steps of two sweeps and one sparse linear solve
    each, next to independent of reg. Memory beyond C: O(n + m + nnz of the plan). float32 costs are read as they are
    and computed with in float64. The same input gives the same bits, for any number of threads.

    Over R ranks a sweep costs n m / R exponentials and one sum of ``m + O(1)`` numbers over the ranks; Newton's systems
    one such sum per iteration of conjugate gradients, or, where the plan is so sparse that a factor of the whole
    system pays, its entries once to every rank. Results equal those of one process to rounding.

    References
    ----------
    X. Tang et al., "Accelerating Sinkhorn algorithm with sparse Newton iterations", ICLR 2024.

    Examples
    --------
    >>> import torch, kantor
    >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> C = (x[:, None] - x[None]) ** 2
    >>> result = kantor.transport.solve(C, reg=1e-3)
    >>> result.status.value, round(float(result.value_linear), 6)
    ('converged', 0.0)
    """
    options = {
        "reg": reg, "method": method, "tol": tol, "max_iter": max_iter, "unbalanced": unbalanced, "reg_type": reg_type,
        "grad": grad, "warm_up": warm_up, "density": density, "relaxation": relaxation, "eps_scaling": eps_scaling,
        "interrupt": interrupt,
    }  # fmt: skip
    if ranks is not None and ranks.size > 1:
        return solve_rows("solve", lambda: _rows_of_matrix(C), a, b, x0, callback, progress, options, ranks)
    if isinstance(C, list | tuple):
        return _solve_ragged(C, a, b, x0, callback, progress, options)
    return solve_matrix("solve", C, a, b, x0, callback, progress, options)


def _rows_of_matrix(C: Any) -> Cost:
    C = check_tensor(C, "solve", "C")
    check_float(C, "solve", "C")
    if C.ndim != 2 or C.shape[1] == 0:
        raise ValueError(f"solve: C: expected shape (n, m) with m >= 1 on every rank, got {tuple(C.shape)}")
    return Cost.dense(C)


def solve_matrix(
    call: str, C: Any, a: Any, b: Any, x0: Any, callback: TransportCallback | None, progress: bool,
    options: dict[str, Any],
) -> TransportResult:  # fmt: skip
    """:func:`solve` for one matrix or a batch of equal shapes, in the name of the function `call`."""
    method, tol, reg_type, interrupt = (options[name] for name in ("method", "tol", "reg_type", "interrupt"))
    check_options(call, options)
    C = check_tensor(C, call, "C")
    check_float(C, call, "C")
    if C.ndim not in (2, 3):
        raise ValueError(f"{call}: C: expected shape (n, m) or (B, n, m), got {tuple(C.shape)}")
    n, m = C.shape[-2:]
    if C.numel() == 0:
        raise ValueError(f"{call}: C: expected at least one problem, row and column, got shape {tuple(C.shape)}")
    a, b = weights_of(call, C, a, n, "a"), weights_of(call, C, b, m, "b")
    rho = strengths(call, options["unbalanced"])
    if C.ndim == 3 and (callback is not None or progress):
        raise ValueError(f"{call}: callback and progress: expected one problem, got a batch")
    eps = regularisation(call, options["reg"])
    readable = all(is_readable(t) for t in (C, a, b, eps))
    if readable:
        check_problem(call, Cost.dense(C.detach().reshape(-1, m)), C, a, b, rho, float(eps.detach()))
    exact = readable and float(eps.detach()) == 0
    if exact:
        eps = exact_reg(call, C, rho)
    chosen = "newton" if method == "auto" else method
    check_method(call, chosen, rho)
    start = start_of(call, x0, C.shape[:-2], n, m)
    if options["grad"] == "none":
        C, a, b, eps = C.detach(), a.detach(), b.detach(), eps.detach()
    numbers = _numbers(chosen, options, n * m)
    # Hooks cannot be traced; there is nothing to report to.
    with _monitored(callback, progress, tol, interrupt) if readable else nullcontext():
        f, g, info, history = transport_potentials(
            C, a, b, eps.to(C.device), start, *rho, reg_type == "kl", chosen, numbers
        )
    value = transport_value(C, a, b, eps.to(C.device), f, g, *rho, reg_type == "kl")
    cost = Cost.dense(C) if C.ndim == 2 else [Cost.dense(matrix) for matrix in C]
    if not readable:
        return _unchecked(cost, (a, b), f, g, value, eps, chosen, tol)
    result = _make_result(cost, (a, b), f, g, value, eps, info, history, method, chosen, tol, exact)
    if exact:
        result = certify(result)
    return _warned(result, call, depth=4)


def sinkhorn(
    C: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, reg: float | Tensor, **options: Any
) -> Any:
    """Sinkhorn's iteration in the log domain: :func:`solve` with ``method="sinkhorn"``.

    Over-relaxed with a factor found from the measured rate (``relaxation`` fixes it, 1 is the plain iteration);
    ``eps_scaling=True`` starts from a larger regularisation. One iteration is one sweep: n m exponentials.

    Examples
    --------
    >>> import torch, kantor
    >>> C = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    >>> kantor.transport.sinkhorn(C, reg=0.5).plan
    tensor([[0.4404, 0.0596],
            [0.0596, 0.4404]], dtype=torch.float64)
    """
    return solve(C, a, b, reg=reg, method="sinkhorn", **options)


# --- how it is run ----------------------------------------------------------------------------------------------------


def _numbers(method: str, options: dict[str, Any], entry_limit: int) -> list[float]:
    """Options in the order of csrc/bind/transport.cpp."""
    max_iter = _MAX_ITER[method] if options["max_iter"] is None else options["max_iter"]
    return [
        float(options["tol"]), float(max_iter), 0.0, float(entry_limit), 1.0,
        float(options["relaxation"] or 0), float(options["warm_up"]), float(options["density"] or 0),
        float(options["eps_scaling"]),
    ]  # fmt: skip


class _monitored:  # noqa: N801 (a context manager that reads as a word)
    """Set the operator's hooks for one call: progress bar and callback."""

    def __init__(self, callback: TransportCallback | None, progress: bool, tol: float, interrupt: str) -> None:
        self._callback, self._tol, self._interrupt = callback, tol, interrupt
        self._bar = progress_bar(progress, "transport", tol, "marginal error", "tol")
        self._progress = progress

    def __enter__(self) -> None:
        update = self._bar.__enter__()
        monitor = None
        if self._callback is not None or self._progress:
            callback, tol = self._callback, self._tol

            def monitor(iteration: int, reg: float, error: float) -> bool:
                update(iteration, error, tol)
                answer = None if callback is None else callback(TransportInfo(iteration, reg, error))
                return isinstance(answer, bool | np.bool_) and bool(answer)

        self._token = hooks.set(Hooks(monitor, self._interrupt == "return"))

    def __exit__(self, *error: object) -> None:
        hooks.reset(self._token)
        self._bar.__exit__(*error)  # type: ignore[arg-type]


def _solve_ragged(
    costs: Sequence[Tensor], a: Any, b: Any, x0: Any, callback: Any, progress: bool, options: dict[str, Any]
) -> list[TransportResult]:
    """Problems of different shapes, one after the other."""
    count = len(costs)
    lists: list[Sequence[Any]] = []
    for name, values in (("a", a), ("b", b), ("x0", x0)):
        if values is not None and (not isinstance(values, list | tuple) or len(values) != count):
            raise ValueError(f"solve: {name}: expected a sequence of {count}, one for each cost")
        lists.append([None] * count if values is None else values)
    return [
        solve_matrix("solve", C, a_k, b_k, x_k, callback, progress, options)
        for C, a_k, b_k, x_k in zip(costs, *lists, strict=True)
    ]


def run_points(
    call: str, cost: Cost, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float], chosen: str,
    start: Tensor | None, options: dict[str, Any], callback: TransportCallback | None, progress: bool,
    ranks: Ranks | None = None, rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Potentials of a problem of points, or of any over ranks, without derivatives; `rows` is n over all ranks."""
    n, m = cost.shape
    size = (n if rows is None else rows) * m
    numbers = _numbers(chosen, options, size if cost.matrix is not None else min(size, _POINT_ENTRIES))
    with _monitored(callback, progress, options["tol"], options["interrupt"]):
        fs, gs, info, history = _native.run(
            chosen, [cost], [a.detach().cpu().double()], [b.detach().cpu().double()], eps, rho,
            options["reg_type"] == "kl", [None if start is None else start.cpu()], numbers, ranks,
        )  # fmt: skip
    return fs[0].to(cost.device), gs[0].to(cost.device), info[0], history[0]


# --- what comes back --------------------------------------------------------------------------------------------------


def _make_result(
    cost: Cost | list[Cost], weights: tuple[Tensor, Tensor], f: Tensor, g: Tensor, value: Tensor, eps: Tensor,
    info: Tensor, history: Tensor, method: str, chosen: str, tol: float, exact: bool,
) -> TransportResult:  # fmt: skip
    table = host_array(info).reshape(-1, info.shape[-1])
    statuses = [_STATUSES[int(s)] for s in table[:, _native.STATUS]]
    status = next((s for s in statuses if s is not TransportStatus.CONVERGED), TransportStatus.CONVERGED)
    errors = table[:, _native.ERROR].copy()
    worst = int(np.nan_to_num(errors, nan=math.inf).argmax()) if len(errors) else 0
    count = int(table[worst, _native.COUNT]) if len(errors) else 0
    steps = host_array(history).reshape(-1, 4, history.shape[-1])[worst, :, :count] if len(errors) else np.zeros((4, 0))
    newton_steps = int(table[:, _native.NEWTON].max(initial=0))
    reason = ""
    if method == "auto":
        reason = (
            "newton: sparse Newton steps reach any tolerance at any reg"
            if newton_steps
            else "newton: at this reg its opening sweeps converged by themselves"
        )
    names = {
        "linear_solves": _native.SOLVES, "cg_iterations": _native.CG, "factorisations": _native.FACTORISATIONS,
        "negative_curvature": _native.NEGATIVE, "sparse_entries": _native.ENTRIES,
    }  # fmt: skip
    return TransportResult(
        potentials=(f, g),
        value=value,
        marginal_error=float(errors[worst]) if len(errors) else 0.0,
        status=status,
        n_iter=int(table[:, _native.STEPS].max(initial=0)),
        n_newton=newton_steps,
        n_sweeps=int(table[:, _native.PASSES].max(initial=0)),
        method=chosen,
        reason=reason,
        reg=float(eps.detach()),
        tol=tol,
        history={
            "marginal_error": steps[2].copy(),
            "seconds": steps[0].copy(),
            "reg": steps[1].copy(),
            "kind": np.where(steps[3] > 0, "newton", "sinkhorn"),
        },
        seconds=float(table[:, _native.SECONDS].max(initial=0)),
        cost=cost,
        weights=weights,
        eps=eps,
        statistics={name: int(table[:, column].sum()) for name, column in names.items()},
        per_problem_status=statuses,
        per_problem_error=errors,
    )


def _unchecked(
    cost: Cost | list[Cost], weights: tuple[Tensor, Tensor], f: Tensor, g: Tensor, value: Tensor, eps: Tensor,
    method: str, tol: float,
) -> TransportResult:  # fmt: skip
    """Result of a traced solve, whose numbers cannot be read."""
    nan = math.nan
    return TransportResult(
        (f, g), value, nan, TransportStatus.UNCHECKED, -1, -1, -1, method, "", nan, tol, {}, nan, cost, weights, eps
    )


def _warned(result: TransportResult, call: str, depth: int) -> TransportResult:
    if not result.converged and result.status not in (TransportStatus.STOPPED, TransportStatus.INTERRUPTED):
        warnings.warn(f"{call}: {result.message}", RuntimeWarning, stacklevel=depth)
    return result


def certify(result: TransportResult) -> TransportResult:
    """Round the plan to the exact marginals and bound its cost from below by a feasible point of the dual.

    Rounding after Altschuler, Weed and Rigollet (2017): rows and columns that are too heavy are scaled down; what is
    missing, about the marginal error, is added by a monotone coupling of what rows and columns lack. The bound is
    ``a.f + b.h`` with ``h_j = min_i (C_ij - f_i)``, the c-transform.
    """
    cost = result.cost
    assert isinstance(cost, Cost)
    cost = cost.detach()
    n, m = result.shape
    f, g = result._host_potentials()
    a, b = (w.detach().cpu().double() for w in result.weights)
    b = b * (a.sum() / b.sum())
    threshold = 1e-3 * result.tol * float(a.sum()) / (n * m)
    found = backend().transport_extract(
        tuple(cost.encode()), result.reg, f, g, threshold, 1 << 28, torch.get_num_threads()
    )
    if found is None:
        return result
    plan = sparse_csr(found, (n, m)).to_sparse_coo()
    (rows, columns), values = plan.indices(), plan.values()
    for index, marginal, size in ((rows, a, n), (columns, b, m)):
        sums = torch.zeros(size, dtype=torch.float64).index_add_(0, index, values)
        values = values * torch.where(sums > marginal, marginal / sums, 1.0)[index]
    lacking_a = (a - torch.zeros(n, dtype=torch.float64).index_add_(0, rows, values)).clamp(min=0)
    lacking_b = (b - torch.zeros(m, dtype=torch.float64).index_add_(0, columns, values)).clamp(min=0)
    more_rows, more_columns, more = _monotone(lacking_a, lacking_b)
    if cost.matrix is not None:  # better a rounding error of mass missing than any on a forbidden pair
        allowed = torch.isfinite(cost.matrix[more_rows, more_columns].cpu())
        more_rows, more_columns, more = more_rows[allowed], more_columns[allowed], more[allowed]
    index = torch.stack([torch.cat([rows, more_rows]), torch.cat([columns, more_columns])])
    rounded = (
        torch.sparse_coo_tensor(index, torch.cat([values, more]), (n, m), check_invariants=False)
        .coalesce()
        .to_sparse_csr()
    )
    result = replace(result, rounded=rounded, cost=cost)

    # -t LSE(. / t) <= min: a soft minimum at a tiny t is feasible, and exact to t log n.
    low, high, _ = cost.extent()
    t = max(1e-10 * (high - low), 1e-15 * max(abs(low), abs(high)), 1e-306)
    if high == low:  # every plan is optimal, and a constant potential proves it
        f = torch.where(a > 0, torch.zeros_like(a), -math.inf)
    log_sums = torch.empty(m, dtype=torch.float64)
    backend().transport_column_log_sums(tuple(cost.encode()), t, f, log_sums, torch.get_num_threads())
    transform = torch.where(b > 0, -t * log_sums, 0.0)
    lower = float(torch.where(a > 0, a * torch.where(a > 0, f, 0.0), 0.0).sum() + (b * transform).sum())
    return replace(result, lower_bound=lower, duality_gap=float(result.value_linear) - lower)


def _monotone(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The coupling of two vectors of nearly equal mass that takes both in order: rows, columns, masses."""
    ends = torch.cat([a.cumsum(0), b.cumsum(0)]).sort().values
    total = float(min(a.sum(), b.sum()))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    mass = (ends - starts).where(ends <= total * (1 + 1e-15), 0.0)
    middle = 0.5 * (starts + ends)
    keep = mass > 0
    rows = torch.searchsorted(a.cumsum(0), middle[keep]).clamp(max=a.numel() - 1)
    columns = torch.searchsorted(b.cumsum(0), middle[keep]).clamp(max=b.numel() - 1)
    return rows, columns, mass[keep]


__all__ = ["TransportInfo", "certify", "dual_value", "sinkhorn", "solve"]
