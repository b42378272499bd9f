"""Gradient-normalised smoothness: published counts, scikit-learn's solutions, and the radius itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.linalg import Dense
from kantor.optim import curvature, gradient_normalized_smoothness, minimize_gns

F64 = torch.float64

# --- the counts of iterations and solves to a target; the draws are the published ones ---


def within(count: int, published: int) -> bool:
    return abs(count - published) <= 0.2 * published


def uniform(*shape: int, first: bool = False) -> Tensor:
    """Of NumPy's legacy generator, in [-1, 1]; `first` seeds it."""
    if first:
        np.random.seed(3124)  # noqa: NPY002
    return torch.from_numpy(np.random.rand(*shape) * 2 - 1)  # noqa: NPY002


def log_sum_exp() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """A function of 200 unknowns with minimum at 0, the rows and offsets of its exponents, and its metric."""
    columns, b = uniform(200, 200, first=True), uniform(200)
    rows = columns.T - columns @ torch.softmax(-b, 0)
    return lambda x: torch.logsumexp(rows @ x - b, 0), rows, b, columns @ columns.T


@pytest.mark.parametrize(
    ("model", "iterations", "solves"), [("hessian", 18, 28), ("exact", 18, 28), ("gauss-newton", 30, 54)]
)
def test_log_sum_exp(model: str, iterations: int, solves: int) -> None:
    fun, rows, b, metric = log_sum_exp()
    x0 = torch.ones(200, dtype=F64)
    at: Any = "hessian" if model == "hessian" else curvature.logsumexp(rows, b, exact=model == "exact")
    best = float(fun(torch.zeros(200, dtype=F64)))
    result = minimize_gns(fun, x0, curvature=at, metric=metric, f_star=best, tol_f=1e-8, tol=0.0).check()
    assert -1e-12 <= result.fun - best <= 1e-8
    assert within(result.n_iter, iterations)
    assert within(result.n_solve, solves)


def test_curvature_beats_the_gradient_in_the_same_metric() -> None:
    fun, rows, b, metric = log_sum_exp()
    arguments: dict[str, Any] = {"metric": metric, "f_star": float(fun(torch.zeros(200, dtype=F64))), "tol_f": 1e-8}
    exact, gauss_newton, gradient = (
        minimize_gns(fun, torch.ones(200, dtype=F64), curvature=at, tol=0.0, **arguments).check().n_iter
        for at in (curvature.logsumexp(rows, b), curvature.logsumexp(rows, b, exact=False), "zero")
    )
    assert exact < gauss_newton < 0.6 * gradient


def test_rosenbrock() -> None:
    def fun(x: Tensor) -> Tensor:
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2

    x0 = torch.tensor([-2.0, 2.0], dtype=F64)
    result = minimize_gns(fun, x0, f_star=0.0, tol_f=1e-12, tol=0.0).check()
    assert within(result.n_iter, 52)
    assert within(result.n_solve, 106)


@pytest.mark.parametrize(("n", "iterations", "solves"), [(50, 23, 47), (200, 26, 53)])
def test_chebyshev_equations(n: int, iterations: int, solves: int) -> None:
    def residual(x: Tensor) -> Tensor:
        return torch.cat([(1 - x[:1]) / 2, x[1:] - 2 * x[:-1] ** 2 + 1])

    x0 = (uniform(n, first=True) + 1) / 2
    result = minimize_gns(
        lambda x: residual(x).square().sum() ** 2 / 4, x0, curvature=curvature.power_residual(residual, 4),
        f_star=0.0, tol_f=1e-10, tol=0.0,
    ).check()  # fmt: skip
    assert within(result.n_iter, iterations)
    assert within(result.n_solve, solves)


@pytest.mark.parametrize(("kind", "iterations", "solves"), [("exact", 30, 63), ("inexact", 30, 63), ("fisher", 20, 40)])
def test_fourth_power_of_linear_residuals(kind: Any, iterations: int, solves: int) -> None:
    A, b = uniform(100, 200, first=True), (uniform(100) + 1) / 2 * 2 - 1

    def residual(x: Tensor) -> Tensor:
        return A @ x - b

    result = minimize_gns(
        lambda x: residual(x).square().sum() ** 2 / 4, torch.ones(200, dtype=F64),
        curvature=curvature.power_residual(residual, 4, kind), metric=A.T @ A + 1e-8 * torch.eye(200, dtype=F64),
        f_star=0.0, tol_f=1e-10, tol=0.0,
    ).check()  # fmt: skip
    assert within(result.n_iter, iterations)
    assert within(result.n_solve, solves)


# --- scikit-learn ---


def standardised(name: str) -> tuple[Tensor, Tensor]:
    """Samples with a column of ones, and labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    X = (X - X.mean(0)) / np.maximum(X.std(0), 1e-12)
    return torch.from_numpy(np.column_stack([X, np.ones(len(X))])), torch.from_numpy(y).long()


def scikit_learn(A: Tensor, y: Tensor, l2: float) -> np.ndarray[Any, Any]:
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(
        C=1 / (len(y) * l2), solver="newton-cholesky", tol=1e-10, fit_intercept=False, max_iter=1000
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tolerance is below what it calls converged
        return model.fit(A.numpy(), y.numpy()).coef_  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", ["exact", "hessian"])
def test_logistic_regression_is_scikit_learns(model: str) -> None:
    A, y = standardised("breast_cancer")
    signs, l2 = 2.0 * y - 1.0, 1e-4

    def fun(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-signs * (A @ x)).mean() + l2 * x @ x / 2

    at: Any = curvature.logistic(A, l2=l2) if model == "exact" else "hessian"
    result = minimize_gns(fun, torch.zeros(31, dtype=F64), curvature=at, tol=1e-8).check()
    assert result.n_iter <= 60
    theirs = float(fun(torch.from_numpy(scikit_learn(A, y, l2)[0])))
    assert result.fun == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("exact", [True, False])
def test_softmax_regression_is_scikit_learns(exact: bool, size: str) -> None:
    A, y = standardised("digits")
    l2 = 1e-4 if exact else 1e-1
    if size == "small":
        A, y = torch.cat([A[:600, 20:44], A[:600, -1:]], 1), y[:600]
    features = A.shape[1]

    def fun(W: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(A @ W, y) + l2 * W.square().sum() / 2

    result = minimize_gns(
        fun, torch.zeros(features, 10, dtype=F64), curvature=curvature.softmax(A, 10, l2=l2, exact=exact),
        tol=1e-8 if exact else 1e-6,
    ).check()  # fmt: skip
    if exact:
        assert result.n_iter <= 60
        theirs = float(fun(torch.from_numpy(scikit_learn(A, y, l2).T.copy())))
        assert result.fun == pytest.approx(theirs, rel=1e-8)
    else:
        exactly = minimize_gns(fun, result.x, curvature=curvature.softmax(A, 10, l2=l2), tol=1e-9).check()
        assert result.fun == pytest.approx(exactly.fun, rel=1e-10)


# --- the radius ---

SPECTRUM = torch.logspace(-1, 2, 9, dtype=F64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * (SPECTRUM * x.square()).sum()


@pytest.mark.parametrize("seed", range(3))
def test_radius_without_curvature_is_gradient_over_lipschitz_constant(seed: int) -> None:
    x = draw(9, seed=seed)
    bound = float((SPECTRUM * x).norm() / SPECTRUM.max())
    estimate = gradient_normalized_smoothness(quadratic, x, "zero")
    assert bound * (1 - 1e-9) <= estimate <= bound * float(SPECTRUM.max() / SPECTRUM.min())
    assert estimate <= 3 * bound  # of 66 directions some come near the steepest


def test_radius_in_one_dimension_is_exact() -> None:
    x = torch.tensor([1.5], dtype=F64)
    assert gradient_normalized_smoothness(lambda x: 3.5 * x @ x, x, "zero") == pytest.approx(1.5, rel=1e-9)
    # x^3 / 6: the error of the exact Hessian is h^2 / 2, so c = sqrt(2 |g|) = x.
    fun = lambda x: (x**3).sum() / 6  # noqa: E731
    assert gradient_normalized_smoothness(fun, x, "hessian") == pytest.approx(1.5, rel=1e-6)


def test_radius_of_the_exact_hessian_of_a_quadratic_is_infinite() -> None:
    x = draw(9)
    assert gradient_normalized_smoothness(quadratic, x, "hessian") > 1e6
    assert gradient_normalized_smoothness(quadratic, x, lambda x: torch.diag(SPECTRUM)) > 1e6


@pytest.mark.parametrize("L2", [0.01, 1.0, 50.0])
def test_radius_of_the_exact_hessian_is_at_least_that_of_its_lipschitz_constant(L2: float) -> None:
    def fun(x: Tensor) -> Tensor:  # third derivatives L2 along each axis: |error| <= L2 |h|^2 / 2
        return quadratic(x) + L2 * (x.abs() ** 3).sum() / 6

    x = 1 + draw(9).abs()
    g = torch.func.grad(fun)(x)
    estimate = gradient_normalized_smoothness(fun, x, "hessian")
    assert estimate >= math.sqrt(2 * float(g.norm()) / L2) * (1 - 1e-6)
    assert math.isfinite(estimate)


def test_radius_with_an_error_in_the_hessian_is_the_root_of_its_quadratic() -> None:
    x, delta = torch.tensor([2.0], dtype=F64), 0.25
    fun = lambda x: (x**3).sum() / 6  # noqa: E731
    # c^2 / 2 + delta c = |g| where the error adds up in one direction
    g = float(x) ** 2 / 2
    root = -delta + math.sqrt(delta**2 + 2 * g)
    at = lambda x: (x - delta).reshape(1, 1)  # noqa: E731
    assert gradient_normalized_smoothness(fun, x, at) == pytest.approx(root, rel=1e-6)


def test_radius_in_a_metric_is_the_radius_in_its_variable() -> None:
    B = draw(9).abs() + 0.5
    x = draw(9, seed=1)
    measured = gradient_normalized_smoothness(quadratic, x, "zero", metric=B, n_dir=400)
    changed = gradient_normalized_smoothness(lambda z: quadratic(z / B.sqrt()), B.sqrt() * x, "zero", n_dir=400)
    exact = float((SPECTRUM * x / B.sqrt()).norm() / (SPECTRUM / B).max())
    assert measured >= exact * (1 - 1e-9)
    assert changed >= exact * (1 - 1e-9)
    assert measured == pytest.approx(changed, rel=0.3)
    dense = gradient_normalized_smoothness(quadratic, x, "zero", metric=Dense(torch.diag(B)), n_dir=400)
    assert dense == pytest.approx(measured, rel=1e-6)


def test_steps_within_the_radius_are_accepted_and_lower_the_function_as_promised() -> None:
    A, b = draw(40, 9, seed=2), draw(40, seed=3)

    def fun(x: Tensor) -> Tensor:
        return torch.logsumexp(A @ x - b, 0)

    x = draw(9, seed=4)
    at = curvature.logsumexp(A, b, exact=False)
    gamma = 0.9 * gradient_normalized_smoothness(fun, x, at, n_dir=500)
    g = torch.func.grad(fun)(x)
    y = x + torch.linalg.solve(at(x).dense() + g.norm() / gamma * torch.eye(9, dtype=F64), -g)
    assert fun(x) - fun(y) >= torch.func.grad(fun)(y).square().sum() * gamma / (8 * g.norm())
    result = minimize_gns(fun, x, curvature=at, gamma0=gamma, max_iter=1)
    assert result.n_solve == 1


def test_radius_takes_points_of_any_shape_and_a_generator() -> None:
    X = draw(3, 3)
    first, again = (
        gradient_normalized_smoothness(
            lambda X: (X**4).sum(), X, "hessian", generator=torch.Generator().manual_seed(5), n_dir=8
        )
        for _ in range(2)
    )
    assert 0 < first == again < math.inf


def test_radius_at_a_stationary_point_is_zero() -> None:
    assert gradient_normalized_smoothness(lambda x: (x**4).sum(), torch.zeros(3, dtype=F64), "hessian") == 0.0


def test_radius_stays_inside_the_region_where_the_function_is_finite() -> None:
    x = torch.full((1,), 0.5, dtype=F64)
    estimate = gradient_normalized_smoothness(lambda x: (x - torch.log(x)).sum(), x, "hessian")
    assert 0 < estimate < 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_dir": 0}, ValueError, "n_dir"),
        ({"curvature": "fisher"}, ValueError, "curvature"),
        ({"metric": torch.ones(2, dtype=F64)}, ValueError, "metric"),
        ({"x": torch.ones(3).half()}, TypeError, "float16"),
    ],
)
def test_radius_says_what_does_not_fit(arguments: dict[str, Any], error: Any, message: str) -> None:
    given = {"fun": quadratic, "x": draw(9), "curvature": "zero"} | arguments
    with pytest.raises(error, match=message):
        gradient_normalized_smoothness(**given)
