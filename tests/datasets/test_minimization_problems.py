"""The callables by hand equal automatic differentiation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kantor.datasets import MinimizationProblem, minimization_problems
from kantor.datasets.minimization import extended_rosenbrock, sine_maximum

PROBLEMS = [*minimization_problems(), extended_rosenbrock(10), sine_maximum()]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_callables_by_hand_equal_autograd(problem: MinimizationProblem) -> None:
    generator = torch.Generator().manual_seed(0)
    x = problem.x0 + 0.3 * torch.randn(problem.x0.shape, dtype=torch.float64, generator=generator)
    v = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    g, Hv = torch.autograd.functional.vhp(problem.fun, x, v)
    g = torch.func.grad(problem.fun)(x)
    assert problem.fun_numpy(x.numpy()) == pytest.approx(problem.fun(x).item(), rel=1e-12)
    for mine, theirs in ((problem.grad_numpy(x.numpy()), g), (problem.hvp_numpy(x.numpy(), v.numpy()), Hv)):
        scale = theirs.abs().max().item()
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-10, atol=1e-12 * scale)


def test_seeds_make_data() -> None:
    first, again, other = (minimization_problems(seed)[4] for seed in (0, 0, 1))
    assert torch.equal(first.x0, again.x0)
    assert not torch.equal(first.x0, other.x0)
