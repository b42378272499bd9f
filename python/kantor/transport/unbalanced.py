"""Unbalanced transport: marginals that may be missed at a price."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kantor.transport.solve import solve


def unbalanced(
    C: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    reg: float | Tensor,
    rho: float | tuple[float | None, float | None],
    reg_type: str = "kl",
    **options: Any,
) -> Any:
    """Entropic transport with marginals penalised by a Kullback-Leibler divergence.

    Minimises ``<P, C> + reg KL(P | a x b) + rho_a KL(P1 | a) + rho_b KL(P'1 | b)``, with
    ``KL(p | q) = sum p log(p / q) - p + q``; ``reg_type="entropy"`` replaces the second term by
    ``reg sum (P log P - P)``. The masses of a and b may differ. :func:`solve` with ``unbalanced=rho``; one strength may
    be None, which keeps that marginal exact.

    Returns
    -------
    TransportResult
        ``marginal_error`` is the L1 distance from the marginals that the optimality conditions ask for.

    References
    ----------
    L. Chizat, G. Peyré, B. Schmitzer, F.-X. Vialard, "Scaling algorithms for unbalanced optimal transport problems",
    Math. Comp. 2018. Newton's method: as :func:`solve`; the penalties add a diagonal to its systems.

    Examples
    --------
    >>> import torch, kantor
    >>> C = torch.tensor([[0.0, 9.0], [9.0, 0.0]], dtype=torch.float64)
    >>> a, b = torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, 3.0]).double()
    >>> result = kantor.transport.unbalanced(C, a, b, reg=0.01, rho=1.0)
    >>> round(float(result.plan.sum()), 3)
    2.737
    """
    return solve(C, a, b, reg=reg, unbalanced=rho, reg_type=reg_type, **options)


__all__ = ["unbalanced"]
