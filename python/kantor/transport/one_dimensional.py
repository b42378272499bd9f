"""Exact optimal transport on the line: the monotone coupling takes both distributions in order.

For a convex function of the distance, such as ``|x - y|^p`` with p >= 1, the optimal plan moves the k-th bit of mass of
one side to the k-th bit of the other. Cut the masses at the sums of both sorted weight vectors: between two cuts the
mass comes from one point and goes to one point, so the plan is a staircase of n + m - 1 entries.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor, host_array, is_readable

_MASS_TOLERANCE = 1e-6  # relative difference of total masses that passes for rounding


def wasserstein_1d(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None, *, p: float = 1) -> Tensor:
    """Wasserstein distance of two distributions on the line, exactly.

    ``W_p = (min_P sum_ij P_ij |x_i - y_j|^p)^(1/p)`` over plans with marginals a and b; for ``p=inf`` the longest move
    of the best plan.

    Parameters
    ----------
    x, y : Tensor (..., n), (..., m)
        Positions in any order, float32 or float64. Leading dimensions are a batch, and broadcast.
    a, b : Tensor (n,) or (..., n), (m,) or (..., m), optional
        Nonnegative weights of equal total mass, in the dtype of x. Default: uniform of mass 1.
    p : float
        Exponent, 1 <= p <= inf.

    Returns
    -------
    Tensor (...)
        The distances themselves, not their p-th powers; in the dtype of x.

    Raises
    ------
    ValueError
        Wrong shapes, an empty distribution, NaN or infinite positions, negative or NaN weights, masses that differ, p <
        1.
    TypeError
        Not a tensor; an integer dtype; mixed dtypes.

    Notes
    -----
    O((n + m) log(n + m)) time and O(n + m) memory for each problem: sorts, cumulative sums and gathers, on the
    device of x. Cumulative weights are float64. The same input gives the same bits for the same number of threads.

    With weights given, a share of the mass that rounding may have made does not move: below ``4 sqrt(n + m)`` units of
    float64, and for ``p=inf``, where any share counts in full, one unit of the dtype more. Uniform weights are exact.

    Derivatives exist of all orders with respect to x and y, where no two points change places, and with respect to a
    and b for p < inf. These are the potentials of the dual, in the gauge ``a.grad_a = b.grad_b``: only their
    differences matter, since the masses must stay equal. Where a derivative does not exist, at duplicate points or cuts
    that coincide, a subgradient is returned. It is finite also at distance 0, where it is zero.

    Examples
    --------
    >>> import torch, kantor
    >>> x = torch.tensor([3.0, 0.0, 1.0])
    >>> kantor.transport.wasserstein_1d(x, x + 2, p=2)
    tensor(2.)
    """
    call = "wasserstein_1d"
    check_exponent(call, p)
    x, y, a, b = _check_problem(call, x, y, a, b)
    x_order, y_order = _order(x), _order(y)
    xs, ys = x.gather(-1, x_order), y.gather(-1, y_order)
    n, m = x.shape[-1], y.shape[-1]
    if a is None and b is None and n == m:
        distance, mass = (xs - ys).abs(), x.new_full((n,), 1 / n, dtype=torch.float64)
    elif a is None and b is None:
        rows, columns, mass = _staircase(*_uniform(n, m, x.device))
        mass = mass / (n * m)
        if is_readable(mass):
            kept = mass > 0
            rows, columns, mass = rows[kept], columns[kept], mass[kept]
        distance = (xs[..., rows] - ys[..., columns]).abs()
    else:
        a, b = _filled(x, a), _filled(y, b)
        rows, columns, mass = _staircase(_taken(a, x_order), _taken(b, y_order))
        distance = (_taken(xs, rows) - _taken(ys, columns)).abs()
        # Cuts that should coincide differ by rounding; for large p even 1e-16 of the mass counts if it moves far.
        noise = 4 * math.sqrt(n + m) * torch.finfo(torch.float64).eps
        noise += torch.finfo(x.dtype).eps if math.isinf(p) else 0.0
        value = mass.detach()
        mass = mass - torch.where(value <= noise * value.sum(-1, keepdim=True), value, 0.0)
    if math.isinf(p):
        return torch.where(mass > 0, distance, 0.0).amax(-1)
    return mean_power(distance, mass.to(x.dtype), p)


def plan_1d(x: Tensor, y: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal plan of two distributions on the line, for every convex function of the distance at once.

    Parameters
    ----------
    x, y : Tensor (n,), (m,)
        Positions in any order, float32 or float64.
    a, b : Tensor (n,), (m,), optional
        Nonnegative weights of equal total mass. Default: uniform of mass 1.

    Returns
    -------
    rows, columns : Tensor (n + m - 1,), int64
        Indices into x and y, in the order of the line.
    mass : Tensor (n + m - 1,)
        What moves from ``x[rows]`` to ``y[columns]``; zero where two cuts coincide. Differentiable with respect to a
        and b.

    Raises
    ------
    ValueError, TypeError
        As :func:`wasserstein_1d`.

    Examples
    --------
    >>> import torch, kantor
    >>> x, y = torch.tensor([5.0, 0.0]), torch.tensor([1.0])
    >>> kantor.transport.plan_1d(x, y)
    (tensor([1, 0]), tensor([0, 0]), tensor([0.5000, 0.5000]))
    """
    call = "plan_1d"
    x, y, a, b = _check_problem(call, x, y, a, b)
    for name, points in (("x", x), ("y", y)):
        if points.ndim != 1:
            raise ValueError(
                f"{call}: {name}: expected the points of one problem, shape (n,), got {tuple(points.shape)}; call it "
                "for each problem of a batch"
            )
    n, m = x.shape[-1], y.shape[-1]
    x_order, y_order = x.argsort(stable=True), y.argsort(stable=True)
    if a is None and b is None:
        rows, columns, mass = _staircase(*_uniform(n, m, x.device))
        mass = mass / (n * m)
    else:
        rows, columns, mass = _staircase(_filled(x, a)[x_order], _filled(y, b)[y_order])
    return x_order[rows], y_order[columns], mass.to(x.dtype)


# --- the plan ---------------------------------------------------------------------------------------------------------


def _staircase(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and masses (..., n + m - 1) of the monotone coupling of weights a (..., n) and b (..., m).

    Each cut ends the row or the column it comes from. The order of the cuts alone gives the indices, so that rounding
    cannot make the path jump; where two coincide an entry of mass zero stays between them, and the entries remain a
    spanning tree, whose potentials are a subgradient with respect to the weights.
    """
    n, m = a.shape[-1], b.shape[-1]
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    sums_a = a.to(torch.float64).expand(*lead, n).cumsum(-1)
    sums_b = b.to(torch.float64).expand(*lead, m).cumsum(-1)
    total = 0.5 * (sums_a[..., -1:] + sums_b[..., -1:])
    ends_a = sums_a[..., :-1] * (total / sums_a[..., -1:])
    ends_b = sums_b[..., :-1] * (total / sums_b[..., -1:])
    ends = torch.cat([ends_a, ends_b], -1)
    order = _order(ends)
    cuts = ends.gather(-1, order)
    rows = torch.cat([order.new_zeros(*lead, 1), (order < n - 1).cumsum(-1)], -1)
    columns = torch.arange(n + m - 1, device=a.device) - rows
    mass = torch.diff(torch.cat([torch.zeros_like(total), cuts, total], -1), dim=-1)
    return rows, columns, mass - mass.detach().clamp(max=0)  # the last cuts may exceed the total by rounding


def mean_power(distance: Tensor, mass: Tensor, p: float) -> Tensor:
    """``(sum mass distance^p)^(1/p)``, free of overflow, with derivative zero at zero."""
    if p == 1:
        return (mass * distance).sum(-1)
    scale = torch.where(mass > 0, distance, 0.0).detach().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    # Above 1 there are only distances that no mass travels: these must not make an infinity, times zero.
    ratio = (distance / scale).clamp(max=torch.finfo(distance.dtype).max ** (0.5 / p))
    power = (mass * (ratio.square() if p == 2 else ratio.pow(p))).sum(-1)
    positive = power > 0
    root = torch.where(positive, power, 1.0).pow(1 / p)
    return torch.where(positive, scale.squeeze(-1) * root, 0.0)


def _uniform(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Equal weights of total n m: whole numbers, in which cuts coincide exactly."""
    whole = {"dtype": torch.float64, "device": device}
    return torch.full((n,), float(m), **whole), torch.full((m,), float(n), **whole)  # type: ignore[call-overload]


def _order(values: Tensor) -> Tensor:
    """Indices that sort the last dimension; equal values in any order."""
    if values.device.type == "cpu" and is_readable(values):
        return torch.from_numpy(np.argsort(host_array(values), axis=-1))  # vectorised: several times faster than torch
    return values.argsort(dim=-1)


def _filled(points: Tensor, weights: Tensor | None) -> Tensor:
    size = points.shape[-1]
    return points.new_full((size,), 1 / size, dtype=torch.float64) if weights is None else weights


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """``values[..., index]`` with leading dimensions that broadcast."""
    lead = torch.broadcast_shapes(values.shape[:-1], index.shape[:-1])
    return values.expand(*lead, values.shape[-1]).gather(-1, index.expand(*lead, index.shape[-1]))


# --- checks -----------------------------------------------------------------------------------------------------------


def check_exponent(call: str, p: object) -> None:
    if not isinstance(p, int | float | np.floating | np.integer) or isinstance(p, bool) or not p >= 1:
        raise ValueError(f"{call}: p: expected a number >= 1, got {p!r}; below 1 the best plan is not the one in order")


def _check_problem(
    call: str, x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    for name, points, size in (("x", x, "n"), ("y", y, "m")):
        check_float(check_tensor(points, call, name), call, name)
        if points.ndim == 0 or points.shape[-1] == 0:
            raise ValueError(
                f"{call}: {name}: expected shape (..., {size}) with at least one point, got {tuple(points.shape)}"
            )
    for name, weights in (("a", a), ("b", b)):
        if weights is not None:
            check_float(check_tensor(weights, call, name), call, name)
    check_same(call, [("x", x), ("y", y), ("a", a), ("b", b)])
    lead = _broadcast(call, "x and y", x, y)
    for name, weights, points in (("a", a, x), ("b", b, y)):
        if weights is None:
            continue
        if weights.ndim == 0 or weights.shape[-1] != points.shape[-1]:
            raise ValueError(
                f"{call}: {name}: expected one weight for each of the {points.shape[-1]} points, shape "
                f"(..., {points.shape[-1]}), got {tuple(weights.shape)}"
            )
        _broadcast(call, f"{name} and the points", weights, points.new_empty(*lead, 0))
    for name, points in (("x", x), ("y", y)):
        check_finite(points, call, name)
    check_masses(call, a, b)
    return x, y, a, b


def _broadcast(call: str, names: str, first: Tensor, second: Tensor) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(first.shape[:-1], second.shape[:-1]))
    except RuntimeError:
        raise ValueError(
            f"{call}: {names}: expected leading dimensions that broadcast, got {tuple(first.shape[:-1])} and "
            f"{tuple(second.shape[:-1])}"
        ) from None


def check_masses(call: str, a: Tensor | None, b: Tensor | None, hint: str = "normalise them") -> None:
    """Raise ValueError unless weights (..., n), (..., m) are finite, nonnegative and of equal, positive mass."""
    if a is None and b is None:
        return
    totals: list[Tensor] = []
    for name, weights in (("a", a), ("b", b)):
        if weights is None:
            totals.append(torch.ones((), dtype=torch.float64))
            continue
        if not is_readable(weights):
            return
        check_finite(weights, call, name)
        values = weights.detach()
        if bool((values < 0).any()):
            where = tuple((values < 0).nonzero()[0].tolist())
            raise ValueError(
                f"{call}: {name}: expected weights >= 0, got {values[where].item()} at "
                f"{where[0] if len(where) == 1 else where}"
            )
        totals.append(values.to("cpu", torch.float64).sum(-1))
        if not bool((totals[-1] > 0).all()):
            raise ValueError(f"{call}: {name}: expected weights with a positive sum, got zeros")
    gap = (totals[0] - totals[1]).abs()
    if bool((gap > _MASS_TOLERANCE * torch.maximum(*totals)).any()):
        k = int(gap.flatten().argmax())
        first, second = (float(t.expand_as(gap).flatten()[k]) for t in totals)
        raise ValueError(
            f"{call}: a and b: expected equal masses, got {first:.9g} and {second:.9g} (default weights have mass 1); "
            f"{hint}"
        )


__all__ = ["plan_1d", "wasserstein_1d"]
