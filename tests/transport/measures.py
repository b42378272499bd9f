"""Transport problems that several files of tests share, and oracles in plain torch and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64
METHODS = ("newton", "sns", "sinkhorn")


@dataclass(frozen=True)
class Problem:
    """A cost matrix of range 1 with weights of mass 1."""

    C: Tensor
    a: Tensor
    b: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return torch.rand(shape, dtype=F64, generator=generator(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def weights(n: int, seed: int = 0) -> Tensor:
    """Positive weights of sum 1, within a factor of ten of each other."""
    w = uniform(n, seed=seed) + 0.1
    return w / w.sum()


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(-1)


def normalised(C: Tensor) -> Tensor:
    return C / C.max()


# --- the suite: small relatives of what people solve ---


def random_cost(n: int = 90) -> Problem:
    """Costs without any structure."""
    w = torch.full((n,), 1 / n, dtype=F64)
    return Problem(uniform(n, n), w, w)


def images(side: int = 10, power: int = 2) -> Problem:
    """Two smooth images on a grid, with a floor of 1 % of the mass."""
    grid = torch.linspace(0, 1, side, dtype=F64)
    points = torch.cartesian_prod(grid, grid)
    C = (points[:, None] - points[None]).abs().pow(power).sum(-1)

    def image(*centres: tuple[float, float]) -> Tensor:
        total = sum((-30 * squared(points, torch.tensor([centre], dtype=F64))[:, 0]).exp() for centre in centres)
        assert isinstance(total, Tensor)
        return 0.99 * total / total.sum() + 0.01 / len(points)

    return Problem(normalised(C), image((0.3, 0.2), (0.5, 0.8)), image((0.7, 0.5)))


def clouds(n: int = 110, m: int = 90) -> Problem:
    """Two clouds of colours."""
    x, y = uniform(n, 3), uniform(m, 3, seed=1).square()
    return Problem(normalised(squared(x, y)), weights(n), weights(m, seed=1))


def mixture(n: int = 120, m: int = 80) -> Problem:
    """An exponential against a mixture of two Gaussians, on a line."""
    x, y = torch.linspace(0, 5, n, dtype=F64), torch.linspace(0, 5, m, dtype=F64)
    a, b = (-x).exp(), (-8 * (y - 1) ** 2).exp() + 0.5 * (-2 * (y - 4) ** 2).exp()
    return Problem(normalised((x[:, None] - y) ** 2), a / a.sum(), b / b.sum())


SUITE: dict[str, Callable[[], Problem]] = {
    "random": random_cost,
    "image, squared": images,
    "image, l1": lambda: images(power=1),
    "clouds": clouds,
    "mixture": mixture,
}


# --- oracles ---


def plan(C: Tensor, f: Tensor, g: Tensor, eps: float) -> Tensor:
    return torch.exp((f[:, None] + g - C) / eps)


def sinkhorn(C: Tensor, a: Tensor, b: Tensor, eps: float, sweeps: int = 100_000, tol: float = 1e-13) -> Tensor:
    """The plan, by Sinkhorn's iteration with torch.logsumexp."""
    g = torch.zeros_like(b)
    log_a, log_b = a.log(), b.log()
    for sweep in range(sweeps):
        f = eps * (log_a - torch.logsumexp((g - C) / eps, 1))
        if sweep % 10 == 0 and float((plan(C, f, g, eps).sum(0) - b).abs().sum()) < tol:
            return plan(C, f, g, eps)
        g = eps * (log_b - torch.logsumexp((f[:, None] - C) / eps, 0))
    raise AssertionError("the oracle has not converged")


def entropy(P: Tensor) -> float:
    return float(torch.special.xlogy(P, P).sum())


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p | q) of measures, not only of probabilities."""
    return float((torch.special.xlogy(p, p) - torch.special.xlogy(p, torch.where(p > 0, q, 1.0)) - p + q).sum())


def exact_cost(C: Tensor, a: Tensor, b: Tensor) -> float:
    """Cost of the unregularised optimum, by linear programming."""
    from scipy.optimize import linprog
    from scipy.sparse import eye_array, kron, vstack

    n, m = C.shape
    rows, columns = kron(eye_array(n), np.ones((1, m))), kron(np.ones((1, n)), eye_array(m))
    right = np.concatenate([a.numpy(), b.numpy()])
    found = linprog(C.numpy().ravel(), A_eq=vstack([rows, columns]).tocsc(), b_eq=right, method="highs")
    assert found.status == 0
    return float(found.fun)


def marginal_error(P: Tensor, a: Tensor, b: Tensor) -> float:
    """L1 error relative to the mass."""
    P = P.double()
    return float(((P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum()) / a.sum())


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


def ends_with(status: str, call: Callable[[], Any]) -> Any:
    """Result of a solve that must end with this status and warn of it."""
    with pytest.warns(RuntimeWarning, match="solve"):
        result = call()
    assert result.status.value == status, result
    assert not result.converged
    return result
