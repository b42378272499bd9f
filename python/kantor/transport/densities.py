"""Wasserstein distance of two densities on a regular grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor.transport._result import TransportResult
from kantor.transport.one_dimensional import check_exponent, check_masses, wasserstein_1d
from kantor.transport.solve_sample import solve_sample

_COSTS = {1: "euclidean", 2: "sqeuclidean"}


@dataclass(frozen=True, eq=False)
class DensityDistance:
    """Distance of two densities, and how well it is known.

    Attributes
    ----------
    distance : Tensor ()
        ``W_p``, float64; differentiable with respect to the densities.
    lower_bound : float
        What W_p is at least, from a feasible point of the dual; `distance` is an upper bound, being that of a feasible
        plan. Equal to `distance` up to rounding on 1-D grids, NaN with ``reg > 0``.
    p : float
        Exponent.
    transport : TransportResult or None
        Plan and potentials between the cells that hold mass, in row-major order; None on 1-D grids, which need no
        solver.
    """

    distance: Tensor
    lower_bound: float
    p: float
    transport: TransportResult | None

    def __float__(self) -> float:
        return float(self.distance.detach())

    def __repr__(self) -> str:
        bound = "" if math.isnan(self.lower_bound) else f", at least {self.lower_bound:.9g}"
        return f"Wasserstein distance of order {self.p:g}: {float(self):.9g}{bound}"


def wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    p: float = 2,
    spacing: float | Sequence[float] = 1.0,
    reg: float = 0.0,
    tol: float = 1e-9,
    normalize: bool = False,
    **options: Any,
) -> DensityDistance:
    """Wasserstein distance of two densities on one regular grid.

    Each cell's mass sits at its centre; moving it costs the p-th power of the Euclidean distance. 1-D grids are solved
    exactly, by sorting; 2-D and 3-D grids with :func:`solve_sample` between the cells that hold mass.

    Parameters
    ----------
    a, b : Tensor (n_1,), (n_1, n_2) or (n_1, n_2, n_3)
        Mass of each cell, nonnegative, float32 or float64; equal totals.
    p : float
        1 or 2; any 1 <= p <= inf on 1-D grids.
    spacing : float or sequence of floats
        Distance of neighbouring cells, or one for each axis.
    reg : float
        Entropic regularisation, in units of the cost. 0 for the distance itself: that of a feasible plan, with a lower
        bound that certifies it. Positive: the cost of the entropic plan, which is larger. 1-D grids are exact whatever
        it is.
    tol : float
        L1 error of the marginals, relative to the mass, at which to stop.
    normalize : bool
        Scale both densities to mass 1 first.
    **options
        Of :func:`solve_sample`: ``method``, ``max_iter``, ``callback``, ``progress``, ``x0``, ...

    Returns
    -------
    DensityDistance
        ``distance``, ``lower_bound`` and ``transport``; ``float(result)`` is the distance. It scales with the 1/p-th
        power of the mass.

    Raises
    ------
    ValueError
        Shapes that differ or of more than three dimensions, negative mass, NaN, no mass, masses that differ, a spacing
        that is not positive, another p.
    TypeError
        Not a tensor; an integer dtype; mixed dtypes.

    Warns
    -----
    RuntimeWarning
        When the solver does not meet the tolerance.

    Notes
    -----
    Memory O(cells). Derivatives with respect to the masses are the potentials of the dual (with ``reg=0`` those of the
    last regularisation, 1e-5 of the range of the cost), up to a constant: only directions that keep the masses equal
    have a meaning. Cells without mass take no part and get derivative 0. At distance 0 the derivative is 0.
    Deterministic.

    Examples
    --------
    >>> import torch, kantor
    >>> a, b = torch.zeros(4, 4), torch.zeros(4, 4)
    >>> a[0, 0] = b[3, 3] = 1.0
    >>> kantor.transport.wasserstein(a, b, p=1, spacing=0.5).distance
    tensor(2.1213, dtype=torch.float64)
    """
    call = "wasserstein"
    check_exponent(call, p)
    a, b = _densities(call, a, b, normalize)
    steps = _steps(call, spacing, a.ndim)
    if not isinstance(reg, int | float | np.floating) or not 0 <= reg < math.inf:
        raise ValueError(f"{call}: reg: expected a finite number >= 0, got {reg!r}")
    if a.ndim == 1:
        centres = steps[0] * torch.arange(a.numel(), dtype=torch.float64, device=a.device)
        distance = wasserstein_1d(centres, centres, a, b, p=p)
        return DensityDistance(distance, float(distance.detach()), float(p), None)
    if p not in _COSTS:
        raise ValueError(f"{call}: p: expected 1 or 2 on a {a.ndim}-D grid, got {p!r}")
    points, weights = zip(*(_occupied(density, steps) for density in (a, b)), strict=True)
    result = solve_sample(*points, *weights, reg=reg, cost=_COSTS[int(p)], tol=tol, reg_type="kl", **options)
    power, bound = result.value_linear, math.nan
    if reg == 0:
        # The plan is rounded and has no derivative; the optimal value has: the potentials.
        power = power.detach() + (result.value - result.value.detach())
        bound = max(result.lower_bound, 0.0) ** (1 / p)
    return DensityDistance(_root(power, float(p)), bound, float(p), result)


def _root(power: Tensor, p: float) -> Tensor:
    """``power^(1/p)``, with derivative zero at zero."""
    positive = power > 0
    return torch.where(positive, torch.where(positive, power, 1.0).pow(1 / p), 0.0)


def _densities(call: str, a: Tensor, b: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The densities in float64, checked."""
    for name, density in (("a", a), ("b", b)):
        check_float(check_tensor(density, call, name), call, name)
        if density.ndim not in (1, 2, 3) or density.numel() == 0:
            raise ValueError(
                f"{call}: {name}: expected a 1-D, 2-D or 3-D grid with at least one cell, got shape "
                f"{tuple(density.shape)}"
            )
    check_same(call, [("a", a), ("b", b)])
    if a.shape != b.shape:
        raise ValueError(
            f"{call}: a and b: expected densities on one grid, got shapes {tuple(a.shape)} and {tuple(b.shape)}; for "
            "different grids use solve_sample with the centres of their cells"
        )
    for name, density in (("a", a), ("b", b)):
        check_finite(density, call, name)
        negative = density.detach() < 0
        if bool(negative.any()):
            where = tuple(negative.nonzero()[0].tolist())
            index = where[0] if len(where) == 1 else where
            raise ValueError(f"{call}: {name}: expected mass >= 0, got {density.detach()[where].item()} at {index}")
    a, b = a.to(torch.float64), b.to(torch.float64)
    if normalize:
        for name, density in (("a", a), ("b", b)):
            if not float(density.detach().sum()) > 0:
                raise ValueError(f"{call}: {name}: expected some mass to normalise, got zeros")
        a, b = a / a.sum(), b / b.sum()
    check_masses(call, a.flatten(), b.flatten(), "normalise them, or pass normalize=True")
    return a, b


def _steps(call: str, spacing: Any, ndim: int) -> list[float]:
    steps = list(spacing) if isinstance(spacing, Sequence | np.ndarray) else [spacing] * ndim
    valid = all(isinstance(step, int | float | np.floating) and 0 < step < math.inf for step in steps)
    if len(steps) != ndim or not valid:
        raise ValueError(f"{call}: spacing: expected a number > 0 or {ndim} of them, got {spacing!r}")
    return [float(step) for step in steps]


def _occupied(density: Tensor, steps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Centres (k, d) and masses (k,) of the cells that hold mass."""
    index = (density.detach() > 0).nonzero(as_tuple=True)
    centres = [step * axis.to(torch.float64) for step, axis in zip(steps, index, strict=True)]
    return torch.stack(centres, -1), density[index]


__all__ = ["DensityDistance", "wasserstein"]
