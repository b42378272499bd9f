"""The sliced Wasserstein distance: exact transport of the projections onto many lines, averaged."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor.transport.one_dimensional import check_masses, mean_power, wasserstein_1d

_BLOCK_ENTRIES = 1 << 21  # projected points held at a time


def sliced_wasserstein(
    X: Tensor,
    Y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    p: float = 2,
    projections: int = 128,
    generator: torch.Generator | None = None,
    directions: Tensor | None = None,
) -> Tensor:
    """Sliced Wasserstein distance between two weighted samples.

    ``SW_p = (mean over unit directions t of W_p(<X, t>, <Y, t>)^p)^(1/p)``, the mean over the sphere estimated with
    random directions. One line costs O((n + m) log(n + m)), so that large samples in high dimensions are cheap.

    Parameters
    ----------
    X, Y : Tensor (n, d), (m, d)
        Points, float32 or float64; (n,) stands for (n, 1).
    a, b : Tensor (n,), (m,), optional
        Nonnegative weights of equal mass, in the dtype of X. Default: uniform of mass 1.
    p : float
        Exponent, 1 <= p < inf.
    projections : int
        Number of random directions; the error falls with its square root.
    generator : torch.Generator, optional
        Where directions are drawn from. Default: a fresh one with seed 0, so that the same call always returns the same
        number and a sum of many calls is one deterministic function. In stochastic optimisation pass one, so that each
        step sees new directions.
    directions : Tensor (L, d), optional
        Directions to use in place of random ones, of any length > 0; they are normalised here.

    Returns
    -------
    Tensor ()
        In the dtype of X; differentiable with respect to X, Y, a, b and `directions`. At equal samples, where SW_p has
        a kink, its derivative is zero.

    Raises
    ------
    ValueError
        Wrong shapes, an empty sample, NaN or infinity, negative weights, masses that differ, p out of range, a
        direction of length zero.
    TypeError
        Not a tensor; an integer dtype; mixed dtypes.

    Notes
    -----
    Projections are processed in blocks of about two million numbers; with derivatives each block is formed again in the
    backward pass, so that memory does not grow with their number. Directions are drawn in float64 on the device of the
    generator: the same on all devices. d = 1 is exact: all directions give the same distance.

    References
    ----------
    N. Bonneel, J. Rabin, G. Peyré, H. Pfister, "Sliced and Radon Wasserstein barycenters of measures", J. Math. Imaging
    Vis. 2015.

    Examples
    --------
    >>> import torch, kantor
    >>> X = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    >>> shifted = kantor.transport.sliced_wasserstein(X, X + 3.0, projections=4096)
    >>> abs(float(shifted) - 3.0) < 0.1  # |shift| / sqrt(d)
    True
    """
    call = "sliced_wasserstein"
    if not isinstance(p, int | float | np.floating | np.integer) or isinstance(p, bool) or not 1 <= p < math.inf:
        raise ValueError(f"{call}: p: expected a finite number >= 1, got {p!r}")
    if not isinstance(projections, int | np.integer) or isinstance(projections, bool) or projections < 1:
        raise ValueError(f"{call}: projections: expected an integer >= 1, got {projections!r}")
    X, Y = _points(call, X, "X"), _points(call, Y, "Y")
    for name, tensor in (("a", a), ("b", b), ("directions", directions)):
        if tensor is not None:
            check_float(check_tensor(tensor, call, name), call, name)
    check_same(call, [("X", X), ("Y", Y), ("a", a), ("b", b), ("directions", directions)])
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"{call}: X and Y: expected points of one dimension, got {X.shape[1]} and {Y.shape[1]}")
    for name, weights, size in (("a", a, X.shape[0]), ("b", b, Y.shape[0])):
        if weights is not None and weights.shape != (size,):
            raise ValueError(f"{call}: {name}: expected shape ({size},), got {tuple(weights.shape)}")
    check_masses(call, a, b)
    lines = _random(X, projections, generator) if directions is None else _normalised(call, directions, X.shape[1])
    if X.shape[1] == 1:  # <x, +-1>: one line says it all
        return wasserstein_1d(X[:, 0], Y[:, 0], a, b, p=p)

    def distances(block: Tensor) -> Tensor:
        return wasserstein_1d(block @ X.mT, block @ Y.mT, a, b, p=p)

    blocks = lines.split(max(1, _BLOCK_ENTRIES // (X.shape[0] + Y.shape[0])))
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (X, Y, a, b, lines))
    if tracked and len(blocks) > 1:
        parts = [checkpoint(distances, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    else:
        parts = [distances(block) for block in blocks]
    count = lines.shape[0]
    return mean_power(torch.cat(parts), X.new_full((count,), 1 / count), p)


def _points(call: str, points: Tensor, name: str) -> Tensor:
    check_float(check_tensor(points, call, name), call, name)
    if points.ndim == 1:
        points = points.unsqueeze(-1)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"{call}: {name}: expected points of shape (n, d) with n, d >= 1, got {tuple(points.shape)}")
    check_finite(points, call, name)
    return points


def _random(like: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Directions that are uniform on the sphere: normal vectors, normalised."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, like.shape[1], generator=generator, device=generator.device, dtype=torch.float64)
    lengths = torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
    unit: Tensor = normal / lengths
    return unit.to(like.device, like.dtype)


def _normalised(call: str, directions: Tensor, dimension: int) -> Tensor:
    if directions.ndim != 2 or directions.shape[0] == 0 or directions.shape[1] != dimension:
        raise ValueError(
            f"{call}: directions: expected shape (L, {dimension}) with L >= 1, got {tuple(directions.shape)}"
        )
    check_finite(directions, call, "directions")
    lengths = torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
    zero = (lengths == 0).flatten()
    if bool(zero.any()):
        raise ValueError(f"{call}: directions: expected nonzero vectors, got zeros in row {int(zero.nonzero()[0])}")
    unit: Tensor = directions / lengths
    return unit


__all__ = ["sliced_wasserstein"]
