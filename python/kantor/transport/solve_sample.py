"""Entropic optimal transport between weighted points; the cost is computed on the fly and never stored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor, is_readable
from kantor._ops import backend
from kantor._ranks import Ranks
from kantor.transport._arguments import (
    EXACT_REG,
    check_method,
    check_options,
    check_problem,
    regularisation,
    start_of,
    strengths,
    weights_of,
)
from kantor.transport._cost import SQEUCLIDEAN, Cost, TileFunction, check_cost_name, is_tracked
from kantor.transport._native import nothing_yet, plan_of
from kantor.transport._result import TransportResult
from kantor.transport._sharded import solve_rows
from kantor.transport._value import dual_value, weight_gradient
from kantor.transport.solve import (
    TransportCallback,
    Unbalanced,
    _make_result,
    _warned,
    certify,
    run_points,
    solve_matrix,
)

_DENSE_NUMBERS = 1 << 24  # n m d up to which a problem with derivatives is solved as a matrix


def solve_sample(
    X: Tensor,
    Y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float | Tensor,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    p: float = 2.0,
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
    callback: TransportCallback | None = None,
    progress: bool = False,
    interrupt: str = "raise",
    ranks: Ranks | None = None,
) -> TransportResult:
    """Solve entropic optimal transport between two weighted samples.

    Parameters
    ----------
    X, Y : Tensor (n, d), (m, d)
        Points, float32 or float64; (n,) stands for (n, 1).
    a, b : Tensor (n,), (m,), optional
        Nonnegative weights of equal mass; default uniform of mass 1.
    reg : float or Tensor ()
        Regularisation, in units of the cost; 0 as for :func:`solve`.
    cost : str or callable
        ``"sqeuclidean"`` ``|x - y|^2``, ``"euclidean"`` ``|x - y|``, ``"l1"`` ``sum_k |x_k - y_k|``, ``"lp"``
        ``sum_k |x_k - y_k|^p``, ``"cosine"`` ``1 - x.y / |x||y|``; or a function of tiles ``(k, d), (m, d) -> (k, m)``,
        which is called once per tile of about two million entries and sweep.
    p : float
        Exponent of ``"lp"``.
    method, tol, max_iter, unbalanced, reg_type, x0, grad, warm_up, density, relaxation
        As for :func:`solve`.
    callback, progress, interrupt, ranks
        As for :func:`solve`; over ranks each passes its own rows of X and of a, and the whole of Y and b.

    Returns
    -------
    TransportResult

    Raises
    ------
    ValueError, TypeError
        As :func:`solve`; points of different dimensions, NaN or infinite points, a function that returns another shape,
        points of length zero for the cosine.

    Notes
    -----
    Memory O((n + m) d) and a sparse plan of at most six million entries: where the plan is denser Newton's systems are
    solved with products taken on the fly, one sweep each.

    Derivatives: of ``value`` with respect to points and weights always, formed tile by tile. Problems with
    ``n m d <= 2^24`` are solved as a matrix when derivatives are wanted, and then ``plan``, ``potentials`` and ``reg``
    have them too, to second order.

    Examples
    --------
    >>> import torch, kantor
    >>> X = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    >>> result = kantor.transport.solve_sample(X, X + 1, reg=1e-2)
    >>> result.barycentric_map().round(decimals=6)
    tensor([[1., 1.],
            [2., 1.]], dtype=torch.float64)
    """
    call = "solve_sample"
    options: dict[str, Any] = {
        "reg": reg, "method": method, "tol": tol, "max_iter": max_iter, "unbalanced": unbalanced, "reg_type": reg_type,
        "grad": grad, "warm_up": warm_up, "density": density, "relaxation": relaxation, "eps_scaling": False,
        "interrupt": interrupt,
    }  # fmt: skip
    if ranks is not None and ranks.size > 1:

        def read() -> Cost:
            check_cost_name(cost, p, call)
            points = _point_pair(call, X, Y, least=0)
            _check_points(call, *points, cost)
            return Cost.points(*points, cost, p)

        return solve_rows(call, read, a, b, x0, callback, progress, options, ranks, _coarse_start)
    check_options(call, options)
    check_cost_name(cost, p, call)
    X, Y = _point_pair(call, X, Y)
    n, m = X.shape[0], Y.shape[0]
    a, b = weights_of(call, X[:1], a, n, "a"), weights_of(call, X[:1], b, m, "b")
    rho = strengths(call, unbalanced)
    eps = regularisation(call, reg)
    if grad == "none":
        X, Y, a, b, eps = (t.detach() for t in (X, Y, a, b, eps))
    _check_points(call, X, Y, cost)
    tracked = is_tracked(X, Y, a, b, eps)
    if (tracked and n * m * X.shape[1] <= _DENSE_NUMBERS) or not is_readable(X):
        problem = Cost.points(X, Y, cost, p)
        result = solve_matrix(call, problem.tile(0, n), a, b, x0, callback, progress, options)
        return replace(result, cost=problem)
    problem = Cost.points(X, Y, cost, p)
    plain = problem.detach()
    exact = float(eps.detach()) == 0
    if exact and not (math.isinf(rho[0]) and math.isinf(rho[1])):
        raise ValueError(f"{call}: reg: expected a positive number with unbalanced marginals, got 0")
    chosen = "newton" if method == "auto" else method
    check_method(call, chosen, rho)
    start = start_of(call, x0, (), n, m)
    started = time.perf_counter()
    try:
        check_problem(call, plain, None, a, b, rho, float(eps.detach()))
        if exact:
            low, high, _ = plain.extent()
            eps = torch.tensor(EXACT_REG * (high - low) or 1.0, dtype=torch.float64)
        if chosen == "newton" and start is None:
            start = _coarse_start(plain, a, b, float(eps.detach()), rho, options)
        f, g, info, history = run_points(
            call, plain, a, b, float(eps.detach()), rho, chosen, start, options, callback, progress
        )
    except KeyboardInterrupt:  # before there is anything to return
        if interrupt == "raise":
            raise
        f, g, info, history = nothing_yet(plain)
    value = _PointValue.apply(X, Y, a, b, eps, f, g, (cost, p, rho, reg_type == "kl"))  # type: ignore[no-untyped-call]
    result = _make_result(problem, (a, b), f, g, value, eps.detach(), info, history, method, chosen, tol, exact)
    result = replace(result, seconds=time.perf_counter() - started)
    return _warned(certify(result) if exact else result, call, depth=3)


def _point_pair(call: str, X: Any, Y: Any, least: int = 1) -> tuple[Tensor, Tensor]:
    """X and Y as (n, d) and (m, d), n at least `least`."""
    X, Y = _points(call, X, "X", least), _points(call, Y, "Y")
    check_same(call, [("X", X), ("Y", Y)])
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"{call}: X and Y: expected points of one dimension, got {X.shape[1]} and {Y.shape[1]}")
    return X, Y


def _check_points(call: str, X: Tensor, Y: Tensor, cost: str | TileFunction) -> None:
    """Check values."""
    check_finite(X, call, "X")
    check_finite(Y, call, "Y")
    if cost == "cosine":
        for name, points in (("X", X), ("Y", Y)):
            zero = (points.detach() == 0).all(-1)
            if bool(zero.any()):
                raise ValueError(
                    f"{call}: {name}: expected nonzero points for the cosine, got zeros in row {int(zero.nonzero()[0])}"
                )


def _points(call: str, t: Any, name: str, least: int = 1) -> Tensor:
    points = check_tensor(t, call, name)
    check_float(points, call, name)
    if points.ndim == 1:
        points = points.unsqueeze(-1)
    if points.ndim != 2 or points.shape[0] < least or points.shape[1] == 0:
        raise ValueError(f"{call}: {name}: expected points of shape (n, d) with n, d >= 1, got {tuple(points.shape)}")
    return points


def _coarse_start(
    cost: Cost,
    a: Tensor,
    b: Tensor,
    eps: float,
    rho: tuple[float, float],
    options: dict[str, Any],
    ranks: Ranks | None = None,
) -> Tensor | None:
    """Start of a large problem: the potential of a sample of its points, extended to all by its own formula."""
    n, m = cost.shape
    if ranks is not None:
        n = int(ranks.sum(n)[0])
    if n * m < 1 << 24 or min(n, m) < 1000:
        return None
    generator = torch.Generator().manual_seed(0)
    (rows, a_small), (columns, b_small) = _drawn(a, n, generator, ranks), _drawn(b, m, generator, None)
    part = cost.select(rows, columns)
    if part.matrix is None and part.function is not None:
        return None  # a function's cost is the user's time
    rough = {**options, "tol": 1e-3, "interrupt": "raise"}  # nothing is worth returning yet
    drawn = None if ranks is None else int(ranks.sum(part.shape[0])[0])
    f, _, _, _ = run_points(
        "solve_sample", part, a_small, b_small, eps, rho, "newton", None, rough, None, False, ranks, drawn
    )
    f = torch.where(torch.isfinite(f), f, 0.0).cpu()
    wide = cost.select(rows, None)
    log_sums = torch.full((m,), -math.inf, dtype=torch.float64)
    if wide.shape[0]:
        backend().transport_column_log_sums(tuple(wide.encode()), eps, f, log_sums, torch.get_num_threads())
    if ranks is not None:
        top = ranks.all_reduce_(log_sums.to(ranks.device, copy=True), "max")
        top = torch.where(torch.isfinite(top), top, 0.0)
        log_sums = (ranks.all_reduce_(torch.exp(log_sums.to(top) - top)).log() + top).cpu()
    slope = 1.0 if math.isinf(rho[1]) else rho[1] / (rho[1] + eps)
    log_b = torch.log(b.detach().cpu().double())
    return torch.where(torch.isfinite(log_b), slope * eps * (log_b - log_sums), 0.0)


def _drawn(w: Tensor, size: int, generator: torch.Generator, ranks: Ranks | None) -> tuple[Tensor | None, Tensor]:
    """Which of `size` points a sample by weight has, and their weights; over ranks those of this one among all."""
    count = max(1000, size // 8)
    weights = w.detach().cpu().double()
    if size <= count:
        return None, weights
    shares, before, mass = weights.cumsum(0), 0.0, float(weights.sum())
    if ranks is not None:
        masses = [float(part) for part in ranks.all_gather(torch.tensor([mass], dtype=torch.float64).to(ranks.device))]
        before, mass = sum(masses[: ranks.rank]), sum(masses)
    draws = torch.rand(count, dtype=torch.float64, generator=generator) * (shares[-1] if ranks is None else mass)
    if ranks is not None:
        draws = draws[(draws > before) & (draws <= before + shares[-1:].sum())] - before
    index = torch.searchsorted(shares, draws).clamp(max=weights.numel() - 1).unique()
    found = index.numel() if ranks is None else max(int(ranks.sum(index.numel())[0]), 1)
    # Points drawn by weight count alike; a mass of one problem stays the mass of the other.
    return index, torch.full((index.numel(),), mass / found, dtype=torch.float64)


class _PointValue(torch.autograd.Function):
    """The value of a problem of points: derivatives of the cost are taken tile by tile, weighted by the plan."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, Y: Tensor, a: Tensor, b: Tensor, eps: Tensor, f: Tensor, g: Tensor,
        how: tuple[str | TileFunction, float, tuple[float, float], bool],
    ) -> Tensor:  # fmt: skip
        cost, p, rho, relative = how
        problem = Cost.points(X, Y, cost, p)
        a64, b64 = a.double().cpu(), b.double().cpu()
        r, c = a64, b64
        if not (math.isinf(rho[0]) and math.isinf(rho[1])):
            r, c = torch.empty_like(a64), torch.empty_like(b64)
            backend().transport_sums(
                tuple(problem.encode()), float(eps), f.cpu(), g.cpu(), r, c, torch.get_num_threads()
            )
        ctx.save_for_backward(X, Y, a, b, eps, f, g, r, c)
        ctx.how = how
        return dual_value(a64, b64, float(eps), f.cpu(), g.cpu(), r, c, *rho, relative).to(X.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        X, Y, a, b, eps, f, g, r, c = ctx.saved_tensors
        cost, p, rho, relative = ctx.how
        problem = Cost.points(X, Y, cost, p)
        grad_X = grad_Y = grad_a = grad_b = grad_eps = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_X, grad_Y = _point_gradients(problem, X, Y, cost, p, float(eps), f, g)
            grad_X, grad_Y = grad * grad_X, grad * grad_Y
        a64, b64, f64, g64 = a.double().cpu(), b.double().cpu(), f.cpu(), g.cpu()
        if ctx.needs_input_grad[2]:
            grad_a = weight_gradient(a64, b64.sum(), float(eps), f64, r, rho[0], relative)
            grad_a = grad * grad_a.to(a.device, a.dtype)
        if ctx.needs_input_grad[3]:
            grad_b = weight_gradient(b64, a64.sum(), float(eps), g64, c, rho[1], relative)
            grad_b = grad * grad_b.to(b.device, b.dtype)
        if ctx.needs_input_grad[4]:
            _, entropy = backend().transport_values(
                tuple(problem.encode()), float(eps), f64, g64, torch.get_num_threads()
            )
            if relative:
                entropy -= float(torch.special.xlogy(r, torch.where(a64 > 0, a64, 1.0)).sum())
                entropy -= float(torch.special.xlogy(c, torch.where(b64 > 0, b64, 1.0)).sum())
                entropy += float(a64.sum() * b64.sum())
            if relative or not (math.isinf(rho[0]) and math.isinf(rho[1])):
                entropy -= float(r.sum())
            grad_eps = (grad * entropy).to(eps.dtype)
        return grad_X, grad_Y, grad_a, grad_b, grad_eps, None, None, None


def _point_gradients(
    problem: Cost, X: Tensor, Y: Tensor, cost: str | TileFunction, p: float, eps: float, f: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """``sum_ij P_ij grad C_ij`` with respect to the points."""
    n = problem.shape[0]
    if problem.kind == SQEUCLIDEAN:  # 2 (r x - P y), 2 (c y - P' x)
        encoded, potentials = tuple(problem.encode()), (f.cpu(), g.cpu())
        gradients = []
        for points, others, transposed in ((X, Y, False), (Y, X, True)):
            moved = torch.cat([others.cpu().double(), torch.ones(others.shape[0], 1, dtype=torch.float64)], 1)
            out = torch.empty(points.shape[0], moved.shape[1], dtype=torch.float64)
            backend().transport_apply(
                encoded, eps, *potentials, moved.contiguous(), out, transposed, torch.get_num_threads()
            )
            gradients.append((2 * (out[:, -1:] * points.cpu().double() - out[:, :-1])).to(points.device, points.dtype))
        return gradients[0], gradients[1]
    step = max(1, problem.tile_rows() // max(X.shape[1], 1))
    grad_X, grad_Y = torch.zeros_like(X), torch.zeros_like(Y)
    for first in range(0, n, step):
        last = min(n, first + step)
        with torch.enable_grad():
            x, y = X[first:last].detach().requires_grad_(), Y.detach().requires_grad_()
            tile = Cost.points(x, y, cost, p).tile(0, last - first)
            P = plan_of(tile.detach(), f[first:last], g, eps)
            total = (P.to(tile.dtype) * tile).sum()
        part_x, part_y = torch.autograd.grad(total, (x, y), allow_unused=True)
        if part_x is not None:
            grad_X[first:last] = torch.nan_to_num(part_x)
        if part_y is not None:
            grad_Y += torch.nan_to_num(part_y)
    return grad_X, grad_Y


__all__ = ["solve_sample"]
