"""Right-hand sides for training: mixtures of the Ritz vectors of an operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kantor._progress import steps_bar
from kantor.linalg._operator import as_operator

_SMALLEST = 1e-8  # Ritz values below this share of the largest belong to the null space
_BLOCK = 1024  # samples formed at once


def ritz_values(A: Any, m: int, *, seed: int = 0, progress: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Run m Lanczos steps with full re-orthogonalisation.

    Parameters
    ----------
    A : anything :func:`kantor.linalg.as_operator` takes
        Symmetric ``(n, n)``. The start vector is A times a standard normal one, as in the paper.
    m : int
        Steps, 1 to n.
    seed : int
        Of the start vector.
    progress : bool
        Show a bar.

    Returns
    -------
    values : Tensor
        Ritz values, ascending, ``(k,)``; k = m, or fewer where the Krylov space ends before.
    weights : Tensor
        ``(k, k)``: the columns are the Ritz vectors in the Lanczos basis.
    basis : Tensor
        ``(k, n)``: orthonormal Lanczos vectors. The Ritz vectors are ``weights.T @ basis``.

    Notes
    -----
    ``m n + 3 m^2`` numbers of memory. O(m^2 n) work in matrix-vector products with the basis, twice each step.
    Deterministic for a seed on one machine.
    """
    operator = as_operator(A)
    n = operator.shape[0]
    if not (isinstance(m, int) and 1 <= m <= n):
        raise ValueError(f"ritz_dataset: m: expected an integer from 1 to {n}, got {m!r}")
    with torch.no_grad(), steps_bar(progress, "Lanczos", m) as advance:
        start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        v = operator.matvec(start.to(operator.device, operator.dtype))
        if not bool(torch.isfinite(v).all()) or float(v.norm()) == 0:
            raise ValueError("ritz_dataset: A: expected products that are finite and not zero")
        basis = v.new_empty(m, n)
        alpha, beta = v.new_zeros(m), v.new_zeros(m)
        basis[0] = v / v.norm()
        k = 1
        for k in range(1, m + 1):
            known = basis[:k]
            w = operator.matvec(known[-1])
            alpha[k - 1] = known[-1] @ w
            size = w.norm()
            for _ in range(2):  # once leaves what cancellation made of it
                w = w - known.mT @ (known @ w)
            beta[k - 1] = w.norm()
            advance(k, "")
            if k == m or float(beta[k - 1]) <= n**0.5 * torch.finfo(w.dtype).eps * float(size):
                break  # the Krylov space is invariant: there is nothing more to find
            basis[k] = w / beta[k - 1]
    off_diagonal = torch.diag(beta[: k - 1], 1)
    values, weights = torch.linalg.eigh(torch.diag(alpha[:k]) + off_diagonal + off_diagonal.mT)
    return values, weights, basis[:k]


def ritz_dataset(
    A: Any,
    m: int,
    n_samples: int,
    low_fraction: float = 0.55,
    low_gain: float = 9.0,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:
    """Return right-hand sides that are rich in the smooth modes on which iterative methods are slow.

    ``b = sum_i c_i q_i / |.|`` over Ritz vectors q_i, with standard normal c_i, times `low_gain` for those of the
    lowest Ritz values.

    Parameters
    ----------
    A : anything :func:`as_operator` takes
        Symmetric positive (semi)definite ``(n, n)``; float64 is recommended.
    m : int
        Lanczos steps, 1 to n.
    n_samples : int
        How many.
    low_fraction : float
        Share of the Ritz vectors, from the lowest value up, that get the gain; 0 to 1.
    low_gain : float
        The gain, positive.
    seed : int
        Of the start vector and the coefficients.
    dtype : torch.dtype
        Of the result.
    progress : bool
        Show a bar.

    Returns
    -------
    Tensor
        ``(n_samples, *grid)`` for operators on a grid, else ``(n_samples, n)``; each of norm one.

    Raises
    ------
    ValueError
        An argument out of range; products that are zero or not finite.

    Notes
    -----
    ``m n + 3 m^2`` numbers of A's dtype and ``n_samples n`` of the result's are held: 28 MB and 49 MB for m = 600 and
    3000 samples of 64 x 64 cells, 23 GB and 21 GB for m = 10,000 and 20,000 samples of 64^3. O(m^2 n + n_samples m n)
    work. Ritz values below 1e-8 of the largest are left out.

    Source: Kaneda et al., *A Deep Conjugate Direction Method for Iteratively Solving Linear Systems*, ICML 2023,
    section 5.1.

    Examples
    --------
    >>> from kantor.datasets import poisson_scenes
    >>> from kantor.linalg import PoissonGrid, ritz_dataset
    >>> A = PoissonGrid(poisson_scenes.open_box((16, 16)))
    >>> ritz_dataset(A, 50, 200).shape
    torch.Size([200, 16, 16])
    """
    if not (isinstance(n_samples, int) and n_samples >= 1):
        raise ValueError(f"ritz_dataset: n_samples: expected a positive integer, got {n_samples!r}")
    if not 0 <= low_fraction <= 1:
        raise ValueError(f"ritz_dataset: low_fraction: expected a share from 0 to 1, got {low_fraction!r}")
    if not (isinstance(low_gain, int | float) and 0 < low_gain < math.inf):
        raise ValueError(f"ritz_dataset: low_gain: expected a positive finite number, got {low_gain!r}")
    values, weights, basis = ritz_values(A, m, seed=seed, progress=progress)
    weights = weights[:, values > _SMALLEST * values.abs().max()]
    if weights.shape[1] == 0:
        raise ValueError("ritz_dataset: A: expected positive eigenvalues, found none; is it negative definite?")
    gains = weights.new_ones(weights.shape[1])
    gains[: round(low_fraction * len(gains))] = low_gain
    generator = torch.Generator().manual_seed(seed + 1)
    samples = torch.empty(n_samples, basis.shape[1], dtype=dtype, device=basis.device)
    for rows in samples.split(_BLOCK):
        c = torch.randn(len(rows), len(gains), dtype=torch.float64, generator=generator).to(gains)
        block = (c * gains) @ weights.mT @ basis
        rows.copy_(block / block.norm(dim=1, keepdim=True))
    grid = as_operator(A).grid
    return samples if grid is None else samples.unflatten(1, grid)


__all__ = ["ritz_dataset", "ritz_values"]
