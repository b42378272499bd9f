"""Weights that several files of tests share, and what diffusion does in plain NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor.graph import Graph

F32, F64 = torch.float32, torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator(seed)).to(dtype)


def random_weights(
    n: int, seed: int = 0, *, symmetric: bool = True, loops: bool = True, density: float = 0.2
) -> Tensor:
    """Sparse dense-stored weights in (0, 1) with an isolated last node; row sums around one."""
    draw = torch.rand(n, n, dtype=F64, generator=generator(seed))
    weights = torch.where(draw < density, torch.rand(n, n, dtype=F64, generator=generator(seed + 1)), 0.0)
    weights = (weights + weights.T) / 2 if symmetric else weights
    weights = weights if loops else weights - torch.diag(weights.diagonal())
    weights[-1], weights[:, -1] = 0, 0
    return weights / max(float(weights.sum(1).mean()), 1e-3)


def path(n: int) -> Tensor:
    weights = torch.zeros(n, n, dtype=F64)
    i = torch.arange(n - 1)
    weights[i, i + 1] = weights[i + 1, i] = 1
    return weights


def star(leaves: int) -> Tensor:
    weights = torch.zeros(leaves + 1, leaves + 1, dtype=F64)
    weights[0, 1:] = weights[1:, 0] = 1
    return weights


def as_graph(weights: Tensor) -> Graph:
    """The graph of the nonzero entries; differentiable."""
    pattern = weights.detach() != 0
    rowptr = torch.cat([torch.zeros(1, dtype=torch.long), pattern.sum(1).cumsum(0)])
    return Graph(rowptr, pattern.nonzero()[:, 1], weights[pattern])


def one_step(weights: Tensor, step: float) -> np.ndarray[Any, Any]:
    """``I - step (D - W)``."""
    W = weights.numpy().astype(np.float64)
    return np.asarray(np.eye(len(W)) - step * (np.diag(W.sum(1)) - W))


def diffused(x: Tensor, weights: Tensor, step: float, num_steps: int) -> Tensor:
    """The explicit steps, by numpy, in float64."""
    power = np.linalg.matrix_power(one_step(weights, step), num_steps)
    return torch.from_numpy(power @ x.numpy().astype(np.float64))


def error(result: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((result.double() - expected).abs().max() / expected.abs().max())
