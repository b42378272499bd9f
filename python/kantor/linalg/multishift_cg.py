"""Conjugate gradients for many shifts of one matrix at the price of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._result import SolveStatus
from kantor.linalg._operator import as_operator


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
        return _solve(operator.matvec, b.detach(), shifts.numpy(), rtol, atol, 10 * n if maxiter is None else maxiter)


def _solve(
    product: Any, b: Tensor, shifts: np.ndarray[Any, Any], rtol: float, atol: float, maxiter: int
) -> MultishiftResult:
    X = b.new_zeros(len(shifts), b.numel())
    statuses = [SolveStatus.MAXITER] * len(shifts)
    residuals = np.full(len(shifts), np.inf)
    target = max(rtol * _norm(b), atol)
    iterations = 0
    order = np.argsort(shifts, kind="stable")
    while len(order) and iterations <= maxiter:
        spent, ended = _sequence(product, b, shifts[order], target, maxiter - iterations, X, order, residuals)
        iterations += spent
        for k, status in zip(order, ended, strict=True):
            statuses[k] = status
        # Without the seed the others start again; those that had converged by then stay as they are.
        gave_up = ended[0] is SolveStatus.NEGATIVE_CURVATURE
        order = order[[s is SolveStatus.MAXITER for s in ended]] if gave_up else order[:0]
        X[order] = 0
    return MultishiftResult(X, statuses, iterations, residuals)


def _sequence(
    product: Any,
    b: Tensor,
    shifts: np.ndarray[Any, Any],
    target: float,
    maxiter: int,
    X: Tensor,
    rows: np.ndarray[Any, Any],
    residuals: np.ndarray[Any, Any],
) -> tuple[int, list[SolveStatus]]:
    """One Krylov sequence for ascending shifts, the first its seed; solutions go to `rows` of X."""
    delta = shifts - shifts[0]
    statuses = [SolveStatus.MAXITER] * len(shifts)
    active = np.arange(len(shifts))
    r = b.clone()
    P = b.expand(len(shifts), -1).clone()  # the directions of the shifts that are not done
    Y = torch.zeros_like(P)  # and their solutions
    rr = _norm(r) ** 2
    zeta, zeta_before = np.ones(len(shifts)), np.ones(len(shifts))
    alpha_before, beta_before = 1.0, 0.0
    p, iteration = b.clone(), 0

    def column(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values).to(b).unsqueeze(-1)

    while True:
        norms = zeta * math.sqrt(rr)
        residuals[rows[active]] = norms
        done = norms <= target
        if done.any():
            X[rows[active[done]]] = Y[torch.from_numpy(done)]
            for k in active[done]:
                statuses[k] = SolveStatus.CONVERGED
            keep = ~done
            active, delta, zeta, zeta_before = active[keep], delta[keep], zeta[keep], zeta_before[keep]
            P, Y = P[torch.from_numpy(keep)], Y[torch.from_numpy(keep)]
        if not len(active) or iteration >= maxiter:
            X[rows[active]] = Y
            return iteration, statuses
        q = product(p) + shifts[0] * p
        iteration += 1
        pq = float(torch.dot(p.double(), q.double()))
        if not math.isfinite(pq) or pq <= 0:
            # The seed's matrix is not positive definite; larger shifts may be.
            statuses[0] = SolveStatus.NEGATIVE_CURVATURE if math.isfinite(pq) else SolveStatus.BREAKDOWN
            residuals[rows[0]] = np.inf
            if statuses[0] is SolveStatus.BREAKDOWN:
                statuses = [SolveStatus.BREAKDOWN if s is SolveStatus.MAXITER else s for s in statuses]
            return iteration, statuses
        alpha = rr / pq
        r -= alpha * q
        rr_new = _norm(r) ** 2
        beta = rr_new / rr
        # Jegerlehner, eq. (2.42) to (2.44), with the signs of x += alpha p, p = r + beta p.
        denominator = alpha_before * zeta_before * (1 + alpha * delta) + alpha * beta_before * (zeta_before - zeta)
        zeta_new = zeta * zeta_before * alpha_before / denominator
        ratio = zeta_new / zeta
        Y += column(alpha * ratio) * P
        P = column(zeta_new) * r + column(beta * ratio**2) * P
        p = r + beta * p
        zeta, zeta_before, alpha_before, beta_before, rr = zeta_new, zeta, alpha, beta, rr_new


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))
