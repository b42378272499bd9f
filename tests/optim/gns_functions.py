"""Functions that the tests of gradient-normalised smoothness share, and runs with an observer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor.optim import OptimizeResult, minimize_gns
from kantor.optim.gns import TINY

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def spd(n: int, seed: int = 0) -> Tensor:
    R = draw(n, n, seed=seed)
    return R @ R.T / n + 0.1 * torch.eye(n, dtype=F64)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


SAMPLES, SIGNS = draw(60, 8, seed=1), torch.sign(draw(60, seed=2))


def logistic_loss(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-SIGNS * (SAMPLES @ x)).mean() + 1e-2 * x.square().sum() / 2


@dataclass
class Run:
    """A run and what an observer outside saw: the accepted points, with values and gradients formed anew."""

    result: OptimizeResult
    x: list[Tensor]
    f: list[float]
    g: list[Tensor]
    lam: list[float]  # of the step that leads to each point but the first

    @property
    def by_rounding(self) -> list[bool]:
        """Steps whose decrease is lost in rounding, and which are accepted by their gradient."""
        noise = [10 * 1.2e-16 * max(1.0, abs(f)) for f in self.f]
        return [abs(a - b) <= eps for a, b, eps in zip(self.f[:-1], self.f[1:], noise[:-1], strict=True)]


def run(fun: Callable[[Tensor], Tensor], x0: Tensor, dual_norm: Any = Tensor.norm, **arguments: Any) -> Run:
    """Minimise; the radii of accepted steps are half of those that the history shows after them."""
    x = [x0.clone()]
    result = minimize_gns(fun, x0, callback=lambda info: x.append(info.x.clone()), **arguments)
    f = [float(fun(p)) for p in x]
    g = [torch.func.grad(fun)(p) for p in x]
    gamma = result.history["gamma"]
    assert len(gamma) == len(x)
    np.testing.assert_allclose(result.history["fun"], f, rtol=1e-12, atol=1e-300)
    lam = [float(dual_norm(p)) / (after / 2 + TINY) for p, after in zip(g[:-1], gamma[1:], strict=True)]
    return Run(result, x, f, g, lam)
