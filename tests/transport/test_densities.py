"""Distances of densities on grids, against linear programming, network simplex and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance
from torch import Tensor

from kantor.transport.densities import wasserstein

F64 = torch.float64


def density(*shape: int, seed: int = 0, empty: float = 0.3) -> Tensor:
    """Random masses of sum 1, some cells empty."""
    generator = torch.Generator().manual_seed(seed)
    masses = torch.rand(shape, dtype=F64, generator=generator)
    masses = torch.where(torch.rand(shape, dtype=F64, generator=generator) < empty, 0.0, masses)
    masses.view(-1)[seed % masses.numel()] += 1.0
    return masses / masses.sum()


def bump(n: int, centre: tuple[float, float], width: float) -> Tensor:
    x = torch.arange(n, dtype=F64)
    parts = [torch.exp(-((x - c) ** 2) / (2 * width**2)) for c in centre]
    image = parts[0][:, None] * parts[1]
    image = torch.where(image > 1e-12, image, 0.0)
    return image / image.sum()


def by_linear_programming(a: Tensor, b: Tensor, p: float, spacing: tuple[float, ...]) -> float:
    axes = [torch.arange(n, dtype=F64) * step for n, step in zip(a.shape, spacing, strict=True)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, a.ndim)
    cost = (points[:, None] - points).norm(dim=-1).pow(p).flatten().numpy()
    n = a.numel()
    rows, columns = np.kron(np.eye(n), np.ones((1, n))), np.kron(np.ones((1, n)), np.eye(n))
    sums = np.concatenate([a.flatten().numpy(), b.flatten().numpy()])
    return float(linprog(cost, A_eq=np.vstack([rows, columns]), b_eq=sums).fun ** (1 / p))


# --- values ---


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((4, 5), (1.0, 1.0)), ((3, 6), (0.5, 2.0)), ((1, 7), (1.0, 1.0)), ((2, 3, 3), (1.0, 0.3, 2.0))],
)
def test_linear_programming(shape: tuple[int, ...], spacing: tuple[float, ...], p: float) -> None:
    a, b = density(*shape, seed=1), density(*shape, seed=2)
    result = wasserstein(a, b, p=p, spacing=spacing)
    expected = by_linear_programming(a, b, p, spacing)
    assert float(result) == pytest.approx(expected, rel=1e-4)
    assert result.lower_bound <= expected * (1 + 1e-9)
    assert float(result) >= expected * (1 - 1e-9)
    assert result.lower_bound == pytest.approx(expected, rel=0.02)
    assert result.transport is not None
    assert result.transport.converged


def test_network_simplex() -> None:
    ot = pytest.importorskip("ot")
    a, b = density(20, 20, seed=1), density(20, 20, seed=2)
    points = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0)).double().numpy()
    for p, metric in ((1, "euclidean"), (2, "sqeuclidean")):
        cost = ot.dist(points, points, metric)
        expected = ot.emd2(a.flatten().numpy(), b.flatten().numpy(), cost) ** (1 / p)
        result = wasserstein(a, b, p=p)
        assert float(result) == pytest.approx(expected, rel=1e-5)
        assert 0.99 * expected <= result.lower_bound <= expected * (1 + 1e-9)


def test_one_dimension_is_exact() -> None:
    a, b = density(300, seed=1), density(300, seed=2)
    x = 0.1 * np.arange(300)
    result = wasserstein(a, b, p=1, spacing=0.1)
    assert float(result) == pytest.approx(wasserstein_distance(x, x, a, b), rel=1e-12)
    assert result.lower_bound == float(result)
    assert result.transport is None
    assert float(wasserstein(a, b, p=1, spacing=[0.1], reg=5.0)) == float(result)
    a, b = density(9, seed=3), density(9, seed=4)
    for p in (2, 3):
        assert float(wasserstein(a, b, p=p)) == pytest.approx(by_linear_programming(a, b, p, (1.0,)), rel=1e-8)
    moved = torch.zeros(9, dtype=F64)
    moved[8] = 1
    assert float(wasserstein(moved, moved.flip(0), p=math.inf, spacing=2)) == 16


def test_gaussians() -> None:
    """W_2 of normal distributions with covariances s^2 and t^2 is sqrt(|shift|^2 + d (s - t)^2).

    On a grid the mass of a cell goes to two neighbours along each axis, to one with the share f: this adds f (1 - f) to
    the square, 1/6 on average.
    """
    a, b = bump(32, (12.0, 14.0), 3.0), bump(32, (18.0, 16.5), 2.0)
    expected = math.sqrt(6**2 + 2.5**2 + 2 * (3 - 2) ** 2 + 2 / 6)
    result = wasserstein(a, b, p=2, tol=1e-6)
    assert float(result) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_translation(dtype: torch.dtype) -> None:
    a = torch.zeros(12, 12, dtype=F64)
    a[1:7, 2:6] = density(6, 4, seed=3)
    b = a.roll((3, 4), (0, 1))
    for p in (1, 2):
        result = wasserstein(a.to(dtype), b.to(dtype), p=p, spacing=0.5, normalize=True)
        assert result.distance.dtype == F64
        assert float(result) == pytest.approx(2.5, rel=1e-6)


def test_same_density() -> None:
    a = density(5, 5, seed=1)
    result = wasserstein(a, a.clone())
    assert float(result) == pytest.approx(0, abs=1e-4)
    assert result.lower_bound <= float(result)
    one = torch.zeros(3, 3, dtype=F64)
    one[1, 1] = 1
    assert float(wasserstein(one, one)) == 0
    assert float(wasserstein(one, one.roll(1, 0), spacing=0.25)) == pytest.approx(0.25)


def test_mass_and_normalisation() -> None:
    a, b = density(4, 4, seed=1), density(4, 4, seed=2)
    for p in (1, 2):
        distance = float(wasserstein(a, b, p=p))
        assert float(wasserstein(8 * a, 8 * b, p=p)) == pytest.approx(8 ** (1 / p) * distance, rel=1e-6)
        assert float(wasserstein(3 * a, 7 * b, p=p, normalize=True)) == pytest.approx(distance, rel=1e-6)


def test_regularised() -> None:
    a, b = density(5, 5, seed=1), density(5, 5, seed=2)
    result = wasserstein(a, b, reg=0.5)
    assert math.isnan(result.lower_bound)
    assert result.transport is not None
    assert float(result) == pytest.approx(float(result.transport.value_linear) ** 0.5)
    assert float(result) > float(wasserstein(a, b)) + 1e-3
    assert float(wasserstein(a, b, reg=1e-3)) == pytest.approx(float(wasserstein(a, b)), rel=1e-4)


def test_options_reach_the_solver() -> None:
    a, b = density(4, 4, seed=1), density(4, 4, seed=2)
    seen: list[float] = []
    result = wasserstein(a, b, reg=0.5, method="sinkhorn", callback=lambda info: seen.append(info.marginal_error))
    assert result.transport is not None
    assert result.transport.method == "sinkhorn"
    assert seen


def test_repr() -> None:
    a, b = density(4, 4, seed=1), density(4, 4, seed=2)
    assert str(wasserstein(a, b)).startswith("Wasserstein distance of order 2: ")
    assert "at least" in str(wasserstein(a, b))
    assert "at least" not in str(wasserstein(a, b, reg=0.1))


# --- derivatives ---


@pytest.mark.parametrize("shape", [(6,), (3, 4)])
@pytest.mark.parametrize("p", [1, 2])
def test_derivatives(shape: tuple[int, ...], p: float) -> None:
    a, b = density(*shape, seed=1, empty=0).requires_grad_(), density(*shape, seed=2, empty=0).requires_grad_()
    loose = {"atol": 2e-3, "eps": 1e-5} if len(shape) > 1 else {}
    assert torch.autograd.gradcheck(lambda a, b: wasserstein(a, b, p=p, normalize=True).distance, (a, b), **loose)


def test_derivatives_with_regularisation() -> None:
    a, b = density(3, 4, seed=1, empty=0).requires_grad_(), density(3, 4, seed=2, empty=0).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: wasserstein(a, b, reg=0.5, tol=1e-12, normalize=True).distance, (a, b), atol=1e-6
    )


def test_gradients_where_cells_are_empty_or_the_distance_is_zero() -> None:
    a, b = density(4, 4, seed=1), density(4, 4, seed=2)
    assert bool((a == 0).any())
    a.requires_grad_()
    (grad,) = torch.autograd.grad(wasserstein(a, b).distance, a)
    assert bool(torch.isfinite(grad).all())
    assert bool((grad[a == 0] == 0).all())
    one = torch.zeros(3, 3, dtype=F64)
    one[1, 1] = 1
    one.requires_grad_()
    (grad,) = torch.autograd.grad(wasserstein(one, one.detach()).distance, one)
    assert bool((grad == 0).all())


# --- invariants ---


@given(st.integers(0, 1000), st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=15)
def test_invariants(seed: int, p: float) -> None:
    a, b = density(3, 4, seed=seed), density(3, 4, seed=seed + 1)
    distance = float(wasserstein(a, b, p=p))
    close = {"rel": 2e-3, "abs": 1e-3}
    assert distance == pytest.approx(float(wasserstein(b, a, p=p)), **close)
    assert distance == pytest.approx(float(wasserstein(a.T, b.T, p=p)), **close)
    assert distance == pytest.approx(float(wasserstein(a.flip(0), b.flip(0), p=p)), **close)
    assert 4 * distance == pytest.approx(float(wasserstein(a, b, p=p, spacing=4)), rel=2e-3, abs=4e-3)
    assert distance == pytest.approx(float(wasserstein(a[None], b[None], p=p)), **close)


# --- messages ---


def test_messages() -> None:
    a, b = density(3, 4, seed=1), density(3, 4, seed=2)

    def raises(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match="^wasserstein: " + match):
            wasserstein(*arguments, **options)

    raises(TypeError, r"a: expected a torch\.Tensor, got ndarray", a.numpy(), b)
    raises(TypeError, r"b: expected dtype float32 or float64, got uint8", a, b.to(torch.uint8))
    raises(TypeError, r"a is float64, b is float32", a, b.float())
    raises(ValueError, r"a: expected a 1-D, 2-D or 3-D grid .*got shape \(1, 1, 3, 4\)", a[None, None], b[None, None])
    raises(ValueError, r"a: expected a 1-D, 2-D or 3-D grid with at least one cell, got shape \(0, 4\)", a[:0], b[:0])
    raises(
        ValueError, r"a and b: expected densities on one grid, got shapes \(3, 4\) and \(4, 3\); for different", a, b.T
    )
    raises(ValueError, r"a: expected finite values, got nan", a * math.nan, b)
    raises(ValueError, r"b: expected mass >= 0, got -", a, -b)
    raises(ValueError, r"a and b: expected equal masses, got 2 and 1 .*pass normalize=True", 2 * a, b)
    raises(ValueError, r"a: expected weights with a positive sum, got zeros", 0 * a, b)
    raises(ValueError, r"a: expected some mass to normalise, got zeros", 0 * a, b, normalize=True)
    raises(ValueError, r"p: expected 1 or 2 on a 2-D grid, got 3", a, b, p=3)
    raises(ValueError, r"p: expected a number >= 1, got 0\.5", a[0] / a[0].sum(), b[0] / b[0].sum(), p=0.5)
    for reg in (-1.0, math.nan, math.inf, "0"):
        raises(ValueError, r"reg: expected a finite number >= 0, got", a, b, reg=reg)
    for spacing in (0, -1.0, math.inf, (1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), None):
        raises(ValueError, r"spacing: expected a number > 0 or 2 of them, got", a, b, spacing=spacing)
