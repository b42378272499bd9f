"""The callables by hand equal automatic differentiation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kantor.datasets import MinimizationProblem, minimization_problems
from kantor.datasets.minimization import extended_rosenbrock, powell, rosenbrock, sine_maximum, woods

PROBLEMS = [
    *minimization_problems(),
    extended_rosenbrock(10),
    sine_maximum(),
    rosenbrock(1000),
    minimization_problems(7)[6],
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.name}-{len(p.x0)}")
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


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.name}-{len(p.x0)}")
def test_callables_leave_their_arguments_alone(problem: MinimizationProblem) -> None:
    x, v = problem.x0.numpy().copy(), np.ones(len(problem.x0))
    for call in (problem.fun_numpy, problem.grad_numpy, lambda x: problem.hvp_numpy(x, v)):
        first, again = call(x), call(x)
        np.testing.assert_array_equal(first, again)
        assert first is not again or isinstance(first, float)
    np.testing.assert_array_equal(x, problem.x0.numpy())
    np.testing.assert_array_equal(v, 1.0)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.name}-{len(p.x0)}")
def test_products_are_symmetric(problem: MinimizationProblem) -> None:
    random = np.random.default_rng(1)
    x = problem.x0.numpy()
    u, v = random.standard_normal((2, len(x)))
    a, b = u @ problem.hvp_numpy(x, v), v @ problem.hvp_numpy(x, u)
    assert a == pytest.approx(b, rel=1e-9, abs=1e-12 * np.linalg.norm(problem.hvp_numpy(x, v)))


# Values and minima from Moré, Garbow, Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981).
@pytest.mark.parametrize(
    ("problem", "start", "minimum"),
    [
        (rosenbrock(2), 24.2, 1.0),
        (extended_rosenbrock(8), 4 * 24.2, 1.0),
        (powell(8), 2 * 215.0, 0.0),
        (woods(8), 2 * 19192.0, 1.0),
    ],
    ids=lambda p: getattr(p, "name", None),
)
def test_textbook_values(problem: MinimizationProblem, start: float, minimum: float) -> None:
    assert problem.fun_numpy(problem.x0.numpy()) == pytest.approx(start, rel=1e-13)
    best = np.full(len(problem.x0), minimum)
    assert problem.fun_numpy(best) == 0
    assert not problem.grad_numpy(best).any()


def test_trigonometric_has_the_textbook_residuals() -> None:
    problem = minimization_problems()[3]
    x = np.random.default_rng(2).standard_normal(50)
    f = [50 - np.cos(x).sum() + (i + 1) * (1 - np.cos(x[i])) - np.sin(x[i]) for i in range(50)]
    assert problem.fun_numpy(x) == pytest.approx(np.square(f).sum(), rel=1e-12)


def test_starts_near_a_maximum_and_near_a_saddle() -> None:
    maximum, saddle = sine_maximum(), minimization_problems()[5]
    assert torch.linalg.eigvalsh(torch.autograd.functional.hessian(maximum.fun, maximum.x0)).max() < -0.99
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(saddle.fun, saddle.x0))
    assert values[0] < -1
    assert values[-1] > 1


@pytest.mark.parametrize(
    ("make", "n"), [(rosenbrock, 1), (extended_rosenbrock, 5), (powell, 6), (woods, 6), (woods, 0), (powell, 4.0)]
)
def test_sizes_that_do_not_fit(make: Any, n: Any) -> None:
    with pytest.raises(ValueError, match=rf"{make.__name__}: n: expected .*, got {n}"):
        make(n)
