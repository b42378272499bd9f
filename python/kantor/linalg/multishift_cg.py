"""Conjugate gradients for many shifts of one matrix at the price of one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from kantor.linalg._operator import LinearOperator, as_operator, require_one_process
from kantor.linalg.capped_cg import plain
from kantor.linalg.diagonal import Diagonal


@dataclass(frozen=True, repr=False)
class MultishiftResult:
    """Result of :func:`multishift_cg`.

    Attributes
    ----------
    x : Tensor
        ``(S, n)``: the solution for every shift.
    statuses : list of SolveStatus
        CONVERGED, MAXITER, NEGATIVE_CURVATURE (that shifted matrix is not positive definite), STAGNATED (the true
        residual cannot be made as small in this dtype), or BREAKDOWN.
    iterations : int
        Products with A, beside those that form true residuals.
    residual_norms : ndarray
        ``|b - (A + shift I) x|``, ``(S,)``: the true one where a native operator converged, else that of the
        recurrence; infinite where there is no solution.
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
    to commute with the shifts. Memory: ``2 S + 3`` vectors. The same bits for any number of threads.

    With a native operator the true residual of every solution is formed at the end, by one product each; where rounding
    made the recurrence drift away from it, plain conjugate gradients go on from there, for as many iterations at most.
    A callable A is called once an iteration and no more: its products are the user's to count.

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
    require_one_process(operator, "multishift_cg")
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
    limit = 10 * n if maxiter is None else min(int(maxiter), 2**52)
    with torch.no_grad():
        b = b.detach()
        # Where squares of b would under- or overflow, a power of two brings it to size one; no bit of x changes.
        exponent = int(torch.frexp(b.abs().amax()).exponent) if n else 0
        if abs(exponent) <= (40 if b.dtype is torch.float32 else 400):
            return _solve(operator, b, shifts.numpy(), rtol, atol, limit)
        result = _solve(operator, _scaled(b, -exponent), shifts.numpy(), rtol, float(np.ldexp(atol, -exponent)), limit)
        norms = np.ldexp(result.residual_norms, exponent)
        return replace(result, x=_scaled(result.x, exponent), residual_norms=norms)


def _scaled(a: Tensor, exponent: int) -> Tensor:
    """``2^exponent a``, in two steps because the power itself may be out of range."""
    half = exponent // 2
    return a * 2.0**half * 2.0 ** (exponent - half)


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
    ready = [k for k, status in enumerate(statuses) if status is SolveStatus.CONVERGED]
    if A.is_native and ready:
        rows = torch.tensor(ready, device=X.device)
        true = b - A.matvec(X[rows]) - torch.from_numpy(shifts[ready]).to(X).unsqueeze(-1) * X[rows]
        residuals[ready] = torch.linalg.vector_norm(true, dim=-1, dtype=torch.float64).cpu().numpy()
        made = iterations
        for k in (k for k in ready if not residuals[k] <= target):
            # As many iterations again tell what can be had. No further ones: it is rounding that holds the rest back.
            left = min(made, maxiter - iterations)
            spent, met, residuals[k] = _continue(A, b, X[k], shifts[k], rtol, atol, left)
            statuses[k] = (
                SolveStatus.CONVERGED if met else SolveStatus.STAGNATED if spent < left or left == made
                else SolveStatus.MAXITER
            )  # fmt: skip
            iterations += spent
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


def _continue(
    A: LinearOperator, b: Tensor, x: Tensor, shift: float, rtol: float, atol: float, maxiter: int
) -> tuple[int, bool, float]:
    """Go on from a solution x, in place, by plain conjugate gradients, unless that makes its true residual no smaller.

    Returns iterations, whether the tolerance is met, and the norm of the true residual.
    """
    shifted = (A + float(shift) * Diagonal(torch.ones_like(b))).encode()
    columns = [_native.STATUS, _native.ITERATIONS, _native.RESIDUAL_NORM]
    before, after = (
        _native.run_cg(shifted, Encoded([], [], []), b, x, rtol, atol, limit) for limit in (0, max(maxiter, 0))
    )
    norm = float(before[2][_native.RESIDUAL_NORM])
    status, iterations, better = after[2][columns].tolist()
    if better < norm:
        x.copy_(after[0])
    return int(iterations), status == 1, min(better, norm)


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))
