"""Largest eigenvalue of a graph's Laplacian ``L = D - W``: an estimate from below and a bound from above."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kantor.graph._native import product

_STEPS, _WINDOW, _SETTLED = 100, 5, 1e-3  # at most; an estimate that grows by less than this over a window is taken


def upper_bound(rowptr: Tensor, col: Tensor, weight: Tensor, degree: Tensor) -> float:
    """Bound on the modulus of every eigenvalue of ``D - W``; `degree` without the diagonal entries. O(nnz).

    ``|D - W| <= D + W`` entry by entry, and the row sums of ``D^-1 (D + W) D`` are ``d_i + sum_j w_ij d_j / d_i``: a
    node's degree and the mean degree of its neighbours (Merris, *A note on Laplacian graph eigenvalues*, 1998). Never
    above Gershgorin's ``2 max d_i``.
    """
    if degree.numel() == 0:
        return 0.0
    share = degree / degree.max().clamp(min=torch.finfo(degree.dtype).tiny)
    reached = product(rowptr, col, weight, share[:, None])[:, 0]
    mean = torch.where(share > 0, reached / torch.where(share > 0, share, 1), 0)
    return float((degree + mean).max())


def largest_eigenvalue(rowptr: Tensor, col: Tensor, weight: Tensor, degree: Tensor) -> float:
    """Lanczos estimate of the largest eigenvalue of a symmetric ``D - W``, from below and within about 1 %. float64.

    The start is a fixed random vector that is larger where the degree is: there lives the eigenvector of a graph with
    hubs, which a plain random vector would hardly contain. Lost orthogonality only repeats eigenvalues that have
    converged; the largest one is safe (Paige 1971). A product and three vectors a step.
    """
    n = degree.numel()
    if n == 0 or not bool((degree > 0).any()):
        return 0.0
    scale = float(degree.max())
    weight, degree = weight / scale, degree / scale  # the squares of any weights are in range then

    def laplacian(v: Tensor) -> Tensor:
        return degree * v - product(rowptr, col, weight, v[:, None])[:, 0]

    def dot(v: Tensor, w: Tensor) -> float:
        return float(v @ w)

    return scale * lanczos(laplacian, dot, lanczos_start(degree, seed=0), n)


def lanczos_start(degree: Tensor, seed: int) -> Tensor:
    """The start of `lanczos`; the largest degree of the graph is 1."""
    random = torch.randn(degree.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return random.to(degree.device) * degree.square().clamp(min=1e-2)


def lanczos(laplacian: Callable[[Tensor], Tensor], dot: Callable[[Tensor, Tensor], float], v: Tensor, n: int) -> float:
    """Largest eigenvalue of a Laplacian of n nodes whose largest diagonal entry is 1, from below."""
    v, before, beta = v / dot(v, v) ** 0.5, torch.zeros_like(v), 0.0
    alphas: list[float] = []
    betas: list[float] = []
    estimates = [0.0]
    for _ in range(min(_STEPS, n)):
        w = laplacian(v) - beta * before
        alphas.append(dot(w, v))
        w -= alphas[-1] * v
        beta = dot(w, w) ** 0.5
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        tridiagonal += torch.diag(torch.tensor(betas, dtype=torch.float64), -1)
        estimates.append(float(torch.linalg.eigvalsh(tridiagonal)[-1]))  # reads the lower triangle
        settled = len(estimates) > 2 * _WINDOW and estimates[-1] - estimates[-1 - _WINDOW] <= _SETTLED * estimates[-1]
        if settled or beta <= 1e-12 * estimates[-1]:
            break
        betas.append(beta)
        before, v = v, w / beta
    return max(estimates[-1], 1.0)  # L_ii is a Rayleigh quotient too
