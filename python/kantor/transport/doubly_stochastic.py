"""The nearest doubly stochastic matrix to an affinity, in relative entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_float, check_tensor
from kantor.transport._result import TransportResult
from kantor.transport.solve import solve


def doubly_stochastic(A: Tensor, *, reg: float | Tensor, tol: float = 1e-9, **options: Any) -> TransportResult:
    """Project a symmetric affinity onto the doubly stochastic matrices.

    The plan of the result is the matrix ``D exp(A / reg) D`` with row and column sums 1: entropic transport with cost
    ``-A`` and unit weights. -inf in A forbids a pair, which stays zero. A must be symmetric; so is the result, to the
    tolerance.

    Parameters
    ----------
    A : Tensor (n, n)
        Symmetric affinities (larger is closer), float32 or float64.
    reg : float or Tensor ()
        Temperature, > 0.
    tol : float
        L1 error of the row sums relative to n.
    **options
        Of :func:`solve`.

    Returns
    -------
    TransportResult
        ``result.plan`` (n, n) is doubly stochastic; ``result.value_linear`` is ``-<P, A>``.

    Raises
    ------
    ValueError
        A is not square or not symmetric, or has a row without any finite entry.

    References
    ----------
    R. Sinkhorn, P. Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", 1967.

    Examples
    --------
    >>> import torch, kantor
    >>> A = torch.tensor([[2.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    >>> kantor.transport.doubly_stochastic(A, reg=1.0).plan
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], dtype=torch.float64)
    """
    A = check_tensor(A, "doubly_stochastic", "A")
    check_float(A, "doubly_stochastic", "A")
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise ValueError(f"doubly_stochastic: A: expected a square matrix, got shape {tuple(A.shape)}")
    values = A.detach()
    finite = torch.isfinite(values)
    difference = torch.where(finite & finite.mT, values - values.mT, 0.0).abs()
    scale = float(values[finite].abs().max()) if bool(finite.any()) else 0.0
    if bool((finite != finite.mT).any()) or float(difference.max()) > 1e3 * torch.finfo(A.dtype).eps * scale:
        raise ValueError("doubly_stochastic: A: expected a symmetric matrix; symmetrise it as (A + A.T) / 2")
    ones = A.new_ones(A.shape[0])
    result = solve(-A, ones, ones, reg=reg, tol=tol, **options)
    assert isinstance(result, TransportResult)
    return result


__all__ = ["doubly_stochastic"]
