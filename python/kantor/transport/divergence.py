"""The Sinkhorn divergence: entropic transport without its bias towards blurred measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kantor.transport._arguments import strengths, weights_of
from kantor.transport.solve import Unbalanced
from kantor.transport.solve_sample import _points, solve_sample


def sinkhorn_divergence(
    X: Tensor,
    Y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float | Tensor,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    unbalanced: Unbalanced = None,
    **options: Any,
) -> Tensor:
    """Sinkhorn divergence between two weighted samples.

    ``S(a, b) = OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2``, plus ``reg / 2 (mass a - mass b)^2`` for unbalanced marginals,
    with the relative entropy. It is zero for equal measures and positive otherwise (for the costs of `solve_sample`
    whose kernel ``exp(-C / reg)`` is positive definite), and has the gradients of a distance: those of a Wasserstein
    distance as reg -> 0 and of a kernel distance as reg -> infinity.

    Parameters
    ----------
    X, Y, a, b, reg, cost, unbalanced
        As for :func:`solve_sample`; `unbalanced` one strength for both marginals.
    **options
        Passed on to :func:`solve_sample`: ``tol``, ``method``, ``p``, ...

    Returns
    -------
    Tensor (), float64
        Differentiable with respect to points and weights.

    References
    ----------
    J. Feydy et al., "Interpolating between optimal transport and MMD using Sinkhorn divergences", AISTATS 2019.
    T. Séjourné et al., "Sinkhorn divergences for unbalanced optimal transport", 2019.

    Examples
    --------
    >>> import torch, kantor
    >>> X = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    >>> shifted = kantor.transport.sinkhorn_divergence(X, X + 0.5, reg=0.1)
    >>> round(float(shifted), 6)
    0.25
    """
    X, Y = _points("sinkhorn_divergence", X, "X"), _points("sinkhorn_divergence", Y, "Y")
    rho = strengths("sinkhorn_divergence", unbalanced)
    if rho[0] != rho[1]:
        raise ValueError(f"sinkhorn_divergence: unbalanced: expected one strength for both, got {unbalanced!r}")
    a = weights_of("sinkhorn_divergence", X[:1], a, X.shape[0], "a")
    b = weights_of("sinkhorn_divergence", Y[:1], b, Y.shape[0], "b")
    options |= {"reg": reg, "cost": cost, "unbalanced": unbalanced, "reg_type": "kl"}
    values = [solve_sample(P, Q, u, v, **options).value for P, Q, u, v in ((X, Y, a, b), (X, X, a, a), (Y, Y, b, b))]
    divergence = values[0] - 0.5 * (values[1] + values[2])
    if unbalanced is not None:
        gap = a.to(torch.float64).sum() - b.to(torch.float64).sum()
        divergence = divergence + 0.5 * reg * gap.square()
    return divergence


__all__ = ["sinkhorn_divergence"]
