"""Conjugate gradients for many shifts of one matrix at the price of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._ops import backend
from kantor._result import SolveStatus
from kantor.linalg import _native
from kantor.linalg._native import Encoded
from kantor.linalg._operator import LinearOperator, as_operator
from kantor.linalg.capped_cg import plain


@dataclass(frozen=True, repr=False)
class MultishiftResult:
    """Result of :func:`multishift_cg`.

    Attributes
    ----------
    x : Tensor
        ``(S, n)``: the solution for every shift.
    statuses : list of SolveStatus
        CONVERGED, MAXITER, NEGATIVE_CURVATURE (that shifted matrix is not positive definite), or BREAKDOWN.
    iterations : int
        Products with A.
    residual_norms : ndarray
        ``|b - (A + shift I) x|`` by the recurrence, ``(S,)``; infinite where there is no solution.
    """

    x: Tensor
    statuses: list[SolveStatus]
    iterations: int
    residual_norms: np.ndarray[Any, Any]

    @property
    def converged(self) -> bool:
        """True when every shift met its tolerance."""
        return all(status is SolveStatus.CONVERGED for status in self.statuses)

    def __repr__(self) -> str:
        counts = {status: self.statuses.count(status) for status in dict.fromkeys(self.statuses)}
        ends = ", ".join(f"{count} {status}" for status, count in counts.items())
        size = f"{len(self.statuses)} shifts of {self.x.shape[-1]:,} unknowns"
        return f"multishift_cg: {size}, {self.iterations:,} products; {ends}"


def multishift_cg(
    A: Any,
    b: Tensor,
    shifts: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
) -> MultishiftResult:
    """Solve ``(A + shift I) x = b`` for several shifts by one sequence of products with A.

    The Krylov spaces of all shifts are the same, and the residuals of all of them parallel: ``r_s = zeta_s r``. Every
    further shift costs two vector updates an iteration and no product.

    Parameters
    ----------
    A : LinearOperator, Tensor, sparse tensor, scipy sparse matrix or LinearOperator, or callable
        ``(n, n)``, symmetric; A plus each shift positive definite. See :func:`as_operator`.
    b : Tensor
        ``(n,)``, float32 or float64.
    shifts : Tensor
        ``(S,)``, in any order, at least one.
    rtol, atol : float
        Stop for a shift when ``|r_s| <= max(rtol |b|, atol)``.
    maxiter : int, optional
        Limit of products. Default ``10 n``.

    Returns
    -------
    MultishiftResult
        Solutions and a status for every shift. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Wrong types, shapes, dtypes or devices; NaN or infinity in b or the shifts; tolerances out of range.

    Notes
    -----
    Seeded by the smallest shift, the slowest; a shift that has converged is left alone. Where ``A + shift I`` meets
    negative curvature that shift is given up, and the rest starts again from the next. No preconditioner: it would have
    to commute with the shifts. Memory: ``2 S + 3`` vectors.

    Source: Jegerlehner, *Krylov space solvers for shifted linear systems*, hep-lat/9612014; van den Eshof & Sleijpen,
    Appl. Numer. Math. 49 (2004).

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import multishift_cg
    >>> A = torch.diag(torch.arange(1.0, 50.0, dtype=torch.float64))
    >>> b = torch.ones(49, dtype=torch.float64)
    >>> result = multishift_cg(A, b, torch.tensor([0.0, 1.0, 10.0]), rtol=1e-10)
    >>> result.converged
    True
    >>> bool(((A + 10 * torch.eye(49)) @ result.x[2] - b).norm() < 1e-9)
    True
    """
    check_tensor(b, "multishift_cg", "b")
    check_float(b, "multishift_cg", "b")
    operator = as_operator(A, like=b if b.ndim else None)
    n = operator.shape[0]
    if tuple(b.shape) != (n,) or operator.shape[1] != n:
        raise ValueError(
            f"multishift_cg: b: expected shape ({n},) for A of shape {operator.shape}, got {tuple(b.shape)}"
        )
    check_same("multishift_cg", [("A", torch.empty(0, dtype=operator.dtype, device=operator.device)), ("b", b)])
    check_finite(b, "multishift_cg", "b")
    shifts = torch.as_tensor(shifts).detach().double().cpu()
    if shifts.ndim != 1 or shifts.numel() == 0:
        raise ValueError(f"multishift_cg: shifts: expected shape (S,), not empty, got {tuple(shifts.shape)}")
    check_finite(shifts, "multishift_cg", "shifts")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 <= value < math.inf:
            raise ValueError(f"multishift_cg: {name}: expected a finite number >= 0, got {value!r}")
    if maxiter is not None and not (isinstance(maxiter, int | np.integer) and maxiter >= 0):
        raise ValueError(f"multishift_cg: maxiter: expected an integer >= 0, got {maxiter!r}")
    with torch.no_grad():
        return _solve(operator, b.detach(), shifts.numpy(), rtol, atol, 10 * n if maxiter is None else int(maxiter))


def _solve(
    A: LinearOperator, b: Tensor, shifts: np.ndarray[Any, Any], rtol: float, atol: float, maxiter: int
) -> MultishiftResult:
    X = b.new_zeros(len(shifts), b.numel())
    statuses = [SolveStatus.MAXITER] * len(shifts)
    residuals = np.full(len(shifts), np.inf)
    target = max(rtol * _norm(b), atol)
    iterations = 0
    order = np.argsort(shifts, kind="stable")
    while len(order) and iterations <= maxiter:
        x, spent, ended, norms = _sequence(A, b, shifts[order], target, maxiter - iterations)
        X[torch.from_numpy(order).to(X.device)] = x
        iterations += spent
        for k, status, norm in zip(order, ended, norms, strict=True):
            statuses[k], residuals[k] = status, norm
        # Without the seed the others start again; those that had converged by then stay as they are.
        again = [status is SolveStatus.MAXITER for status in ended]
        order = order[again] if ended[0] is SolveStatus.NEGATIVE_CURVATURE else order[:0]
    for k, status in enumerate(statuses):
        if status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.BREAKDOWN):
            X[k], residuals[k] = 0, np.inf
    return MultishiftResult(X, statuses, iterations, residuals)


def _sequence(
    A: LinearOperator, b: Tensor, shifts: np.ndarray[Any, Any], target: float, maxiter: int
) -> tuple[Tensor, int, list[SolveStatus], np.ndarray[Any, Any]]:
    """One Krylov sequence for ascending shifts, the first its seed: solutions, products, statuses, residual norms."""
    native, count, device = backend(), len(shifts), b.device
    b = b.resolve_neg().contiguous()
    state = torch.zeros(_C.multishift_state_size, dtype=torch.float64)
    state[:3] = torch.tensor([shifts[0], target, maxiter], dtype=torch.float64)
    table = torch.zeros(_C.multishift_scalars, count, dtype=torch.float64)
    table[0] = torch.from_numpy(shifts - shifts[0])
    state, table = state.to(device), table.to(device)
    r, p, q = (torch.empty_like(b) for _ in range(3))
    x, directions = (b.new_empty(count, b.numel()) for _ in range(2))
    workspace = torch.empty(native.multishift_workspace_bytes(), dtype=torch.uint8, device=device)
    encoded = A.encode() if A.is_native else Encoded([], [], [])
    calls = native.multishift_cg(
        *encoded, b, [r, p, q, x, directions], state, table, workspace,
        _native.projections(encoded, None, 1, b), 8 if b.is_cuda else 1,
        None if A.is_native else lambda v: plain(A.matvec(v)), p, torch.get_num_threads(),
    )  # fmt: skip
    _, _, _, status, iterations, *_ = state.tolist()
    if int(status) == _native.INTERRUPTED:
        raise KeyboardInterrupt
    residuals, done = table[1].tolist(), table[2].tolist()
    failed = {3: SolveStatus.NEGATIVE_CURVATURE, 6: SolveStatus.BREAKDOWN}.get(int(status))
    ended = [SolveStatus.CONVERGED if d > 0 else SolveStatus.MAXITER for d in done]
    if failed is SolveStatus.NEGATIVE_CURVATURE:  # the seed's matrix is not positive definite; larger shifts may be
        ended[0] = failed
    elif failed is SolveStatus.BREAKDOWN:
        ended = [failed if status is SolveStatus.MAXITER else status for status in ended]
    spent = int(iterations) + (failed is not None) if A.is_native else calls
    return x, spent, ended, np.array(residuals)


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))
