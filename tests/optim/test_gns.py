"""Gradient-normalised smoothness: closed forms of its steps, its acceptance rule, its solvers against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gns_functions import F64, SAMPLES, draw, logistic_loss, rosenbrock, run, saddle, spd
from kantor.linalg import CSR, Dense, Diagonal, LowRank, cg, multishift_cg
from kantor.optim import curvature, minimize_gns

# --- 1, 2: closed forms ---


@pytest.mark.parametrize("solver", ["cholesky", "woodbury"])
def test_quadratic_with_its_hessian_contracts_as_in_closed_form(solver: Any) -> None:
    n = 12
    Q, _ = torch.linalg.qr(draw(n, n))
    h = torch.logspace(-2, 2, n, dtype=F64)
    H, solution = Q @ torch.diag(h) @ Q.T, draw(n, seed=4)
    exact = LowRank(Q.T.contiguous(), h) if solver == "woodbury" else Dense(H)
    r = run(
        lambda x: 0.5 * (x - solution) @ H @ (x - solution), solution + draw(n, seed=5),
        curvature=lambda x: exact, solver=solver, gamma0=1e6, tol=1e-13,
    )  # fmt: skip
    assert r.result.converged
    assert r.result.n_iter <= 4
    error = Q.T @ (r.x[0] - solution)
    for x, lam in zip(r.x[1:], r.lam, strict=True):
        error = error * lam / (h + lam)
        torch.testing.assert_close(Q.T @ (x - solution), error, rtol=0, atol=1e-10)


@pytest.mark.parametrize("L", [1.0, 7.3, 40.0])
def test_without_curvature_it_is_gradient_descent_whose_step_settles(L: float) -> None:
    # From a radius that is too large, so that every acceptance follows a rejection.
    r = run(lambda x: 0.5 * L * x @ x, draw(6), curvature="zero", tol=1e-5 * L, gamma0=1e3)
    assert r.result.converged
    for x, y, g, lam in zip(r.x[:-1], r.x[1:], r.g[:-1], r.lam, strict=True):
        torch.testing.assert_close(y, x - g / lam, rtol=1e-12, atol=1e-12)
    assert len(r.lam) >= 5
    for lam in r.lam:
        assert 0.546 * L <= lam <= 1.095 * L


# --- 3: the acceptance rule ---

A, B = draw(30, 10, seed=6), draw(30, seed=7)
PROBLEMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, dict[str, Any]]] = {
    "rosenbrock": (rosenbrock, torch.tensor([-2.0, 2.0], dtype=F64), {}),
    "rosenbrock by products": (rosenbrock, torch.zeros(9, dtype=F64), {"solver": "multishift"}),
    "rosenbrock by cg": (rosenbrock, torch.zeros(9, dtype=F64), {"solver": "cg"}),
    "logistic": (logistic_loss, 3 * torch.ones(8, dtype=F64), {"curvature": curvature.logistic(SAMPLES, l2=1e-2)}),
    "logistic bound": (
        logistic_loss, torch.zeros(8, dtype=F64), {"curvature": curvature.logistic(SAMPLES, l2=1e-2, exact=False)},
    ),
    "gradient": (logistic_loss, torch.zeros(8, dtype=F64), {"curvature": "zero", "tol": 1e-4}),
    "logsumexp": (
        lambda x: torch.logsumexp(A @ x - B, 0) + 1e-3 * x @ x, torch.ones(10, dtype=F64),
        {"curvature": curvature.logsumexp(A, B, exact=False)},
    ),
    "power": (
        lambda x: (A @ x - B).square().sum() ** 1.5 / 3, torch.ones(10, dtype=F64),
        {"curvature": curvature.power_residual(lambda x: A @ x - B, 3, "fisher"), "metric": A.T @ A, "tol": 1e-6},
    ),
    "saddle": (saddle, torch.tensor([0.7, 1e-3], dtype=F64), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_accepted_steps_satisfy_the_inequality(name: str) -> None:
    fun, x0, arguments = PROBLEMS[name]
    metric = arguments.get("metric", torch.eye(x0.numel(), dtype=F64))

    def dual_norm(g: Tensor) -> float:
        return math.sqrt(float(g @ torch.linalg.solve(metric, g)))

    r = run(fun, x0, dual_norm, **arguments)
    assert r.result.converged, r.result
    checked = 0
    for k, lam in enumerate(r.lam):
        if r.by_rounding[k]:
            assert dual_norm(r.g[k + 1]) <= dual_norm(r.g[k]) * (1 + 1e-12)
            continue
        needed = dual_norm(r.g[k + 1]) ** 2 / (8 * lam)
        assert r.f[k] - r.f[k + 1] >= needed * (1 - 1e-12) - 1e-15 * max(1, abs(r.f[k]))
        checked += 1
    assert checked >= 3


@pytest.mark.parametrize("name", ["rosenbrock", "logistic", "logsumexp", "power", "gradient"])
def test_steps_solve_their_systems(name: str) -> None:
    fun, x0, arguments = PROBLEMS[name]
    metric = arguments.get("metric", torch.eye(x0.numel(), dtype=F64))
    model = arguments.get("curvature", "hessian")

    def matrix(x: Tensor) -> Tensor:
        if isinstance(model, str):
            exact = torch.autograd.functional.hessian(fun, x)
            return exact if model == "hessian" else torch.zeros_like(exact)
        return model(x).dense()  # type: ignore[no-any-return]

    r = run(fun, x0, lambda g: math.sqrt(float(g @ torch.linalg.solve(metric, g))), **arguments)
    for k, lam in enumerate(r.lam):
        if not r.by_rounding[k]:
            d = torch.linalg.solve(matrix(r.x[k]) + lam * metric, -r.g[k])
            torch.testing.assert_close(r.x[k + 1], r.x[k] + d, rtol=1e-6, atol=1e-6 * float(d.norm()))


@pytest.mark.parametrize("name", PROBLEMS)
def test_curvature_is_formed_once_a_point_and_every_trial_is_counted(name: str) -> None:
    fun, x0, arguments = PROBLEMS[name]
    calls = 0
    given = arguments.get("curvature", "hessian")
    if not isinstance(given, str):

        def counted(x: Tensor) -> Any:
            nonlocal calls
            calls += 1
            return given(x)

        arguments = arguments | {"curvature": counted}
    result = minimize_gns(fun, x0, **arguments)
    assert result.n_points == result.n_iter == len(result.history["fun"]) - 1
    assert calls in (0, result.n_points)
    rejected = result.n_solve - result.n_iter
    assert rejected >= 0
    # Each accepted step doubles the radius, each rejected one halves it; rounding leaves it.
    doublings = math.log2(result.gamma / result.history["gamma"][0])
    assert doublings == pytest.approx(round(doublings), abs=1e-9)
    assert -rejected <= round(doublings) <= result.n_iter - rejected


# --- 4: solvers and metrics ---


@pytest.mark.parametrize("rank", [1, 3, 9, 20, 50])
@pytest.mark.parametrize("kind", ["identity", "diagonal", "matrix"])
def test_woodbury_takes_the_steps_of_cholesky(rank: int, kind: str) -> None:
    n = 20
    F, w = draw(rank, n, seed=8), draw(rank, seed=9).abs()
    metric = {"identity": None, "diagonal": draw(n, seed=10).abs() + 0.1, "matrix": spd(n, seed=11)}[kind]

    def fun(x: Tensor) -> Tensor:
        return 0.5 * (w * (F @ x).square()).sum() + 0.1 * (x**4).sum() + x.sum()

    H = LowRank(F, w)
    first, second = (
        run(fun, draw(n, seed=12), curvature=lambda x, H=H: H, solver=solver, metric=metric, max_iter=12, tol=1e-6)
        for solver, H in (("woodbury", H), ("cholesky", H))
    )
    assert (first.result.n_iter, first.result.n_solve) == (second.result.n_iter, second.result.n_solve)
    for x, y in zip(first.x, second.x, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "matrix"])
def test_sherman_morrison_equals_a_dense_solve(kind: str) -> None:
    n, g, u = 30, draw(30, seed=13), draw(1, 30, seed=14)
    B = {"identity": torch.eye(n, dtype=F64), "diagonal": torch.diag(draw(n).abs() + 0.1), "matrix": spd(n)}[kind]
    metric = {"identity": None, "diagonal": B.diagonal().clone(), "matrix": B}[kind]
    r = run(
        lambda x: g @ x + 0.5 * (u @ x).square().sum() + 0.5 * x @ B @ x, torch.zeros(n, dtype=F64),
        lambda v: math.sqrt(float(v @ torch.linalg.solve(B, v))), curvature=lambda x: LowRank(u), solver="woodbury",
        metric=metric, max_iter=1,
    )  # fmt: skip
    d = torch.linalg.solve(u.T @ u + r.lam[0] * B, -g)
    torch.testing.assert_close(r.x[1], d, rtol=0, atol=1e-10 * float(d.norm()))


def test_multishift_cg_equals_separate_solves() -> None:
    H, b = spd(80, seed=15), draw(80, seed=16)
    shifts = 0.3 * 2.0 ** torch.arange(-1, 7, dtype=F64)
    together = multishift_cg(Dense(H), b, shifts, rtol=1e-12)
    assert together.converged
    for shift, x in zip(shifts, together.x, strict=True):
        alone = cg(Dense(H) + Diagonal(torch.full((80,), float(shift), dtype=F64)), b, rtol=1e-12).x
        torch.testing.assert_close(x, alone, rtol=0, atol=1e-8 * float(alone.norm()))


@pytest.mark.parametrize("solver", ["multishift", "cg"])
@pytest.mark.parametrize("kind", ["identity", "diagonal", "matrix"])
def test_solvers_by_products_reach_the_same_minimum(solver: Any, kind: str) -> None:
    n = 25
    metric = {"identity": None, "diagonal": draw(n, seed=10).abs() + 0.1, "matrix": spd(n, seed=11)}[kind]
    H = spd(n, seed=17)

    def fun(x: Tensor) -> Tensor:
        return 0.5 * x @ H @ x + (x**4).sum() / 4 + x.sum()

    by_products = minimize_gns(fun, draw(n), solver=solver, metric=metric, tol=1e-9).check()
    exact = minimize_gns(fun, draw(n), solver="cholesky", metric=metric, tol=1e-9).check()
    torch.testing.assert_close(by_products.x, exact.x, rtol=0, atol=1e-8)
    assert by_products.n_iter <= 2 * exact.n_iter


def test_further_trials_of_multishift_cost_no_product() -> None:
    slopes = torch.logspace(-0.5, 0.5, 30, dtype=F64)

    def fun(x: Tensor) -> Tensor:  # Newton's step from 3 leads to -27
        return (1 + (slopes * x).square()).sqrt().sum()

    arguments: dict[str, Any] = {"gamma0": 1e3, "max_iter": 1}
    x0 = torch.full((30,), 3.0, dtype=F64)
    together = minimize_gns(fun, x0, solver="multishift", **arguments)
    one_by_one = minimize_gns(fun, x0, solver="cg", **arguments)
    assert 4 <= together.n_solve <= 8
    assert together.n_solve == one_by_one.n_solve
    assert 0 < together.n_hvp < 0.5 * one_by_one.n_hvp


@pytest.mark.parametrize("kind", ["diagonal", "matrix"])
@pytest.mark.parametrize("model", ["exact", "gauss_newton", "zero"])
def test_a_metric_is_a_change_of_variables(kind: str, model: str) -> None:
    n = 10
    B = torch.diag(draw(n).abs() + 0.5) if kind == "diagonal" else spd(n)
    values, vectors = torch.linalg.eigh(B)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T  # B^1/2
    inverse = torch.linalg.inv(root)

    def fun(x: Tensor) -> Tensor:
        return torch.logsumexp(A @ x - B_SHIFT, 0) + 0.05 * x @ x

    at = {
        "exact": lambda x: torch.autograd.functional.hessian(fun, x),
        "gauss_newton": lambda x: curvature.logsumexp(A, B_SHIFT, exact=False)(x).dense(),
        "zero": lambda x: torch.zeros(n, n, dtype=F64),
    }[model]
    metric = B.diagonal().clone() if kind == "diagonal" else B
    x0 = draw(n, seed=18)
    arguments: dict[str, Any] = {"tol": 1e-7, "max_iter": 30}

    def dual_norm(g: Tensor) -> float:
        return math.sqrt(float(g @ torch.linalg.solve(B, g)))

    measured = run(fun, x0, dual_norm, curvature=at, metric=metric, **arguments)
    changed = run(
        lambda z: fun(inverse @ z), root @ x0, curvature=lambda z: inverse @ at(inverse @ z) @ inverse, **arguments
    )
    assert len(measured.x) == len(changed.x) >= 4
    np.testing.assert_allclose(measured.result.history["gamma"], changed.result.history["gamma"])
    for x, z in zip(measured.x, changed.x, strict=True):
        torch.testing.assert_close(inverse @ z, x, rtol=0, atol=1e-8)


B_SHIFT = B


def test_forms_of_the_same_metric_and_of_the_same_curvature_agree() -> None:
    b = draw(8).abs() + 0.5
    H = spd(8)
    fun, x0 = logistic_loss, torch.ones(8, dtype=F64)
    reference = minimize_gns(fun, x0, curvature=lambda x: H, metric=b, tol=1e-6).check()
    for metric in (b, Diagonal(b), torch.diag(b), Dense(torch.diag(b)), CSR.from_any(torch.diag(b).to_sparse_csr())):
        for form in (H, Dense(H), H.numpy()):
            other = minimize_gns(fun, x0, curvature=lambda x, form=form: form, metric=metric, tol=1e-6).check()
            assert (other.n_iter, other.n_solve) == (reference.n_iter, reference.n_solve)
            torch.testing.assert_close(other.x, reference.x, rtol=0, atol=1e-9)


def test_a_metric_may_be_anything_that_multiplies() -> None:
    class Twice:
        def matvec(self, h: Tensor) -> Tensor:
            return 2 * h

        def solve(self, g: Tensor) -> Tensor:
            return g / 2

    x0 = torch.ones(8, dtype=F64)
    given = minimize_gns(logistic_loss, x0, metric=Twice()).check()
    same = minimize_gns(logistic_loss, x0, metric=torch.full((8,), 2.0, dtype=F64)).check()
    torch.testing.assert_close(given.x, same.x, rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 12), rank=st.integers(1, 20), seed=st.integers(0, 10**6), exponent=st.integers(-3, 0))
def test_any_semidefinite_curvature_minimises_a_convex_function(n: int, rank: int, seed: int, exponent: int) -> None:
    H = spd(n, seed=seed)
    F = 10.0**exponent * draw(rank, n, seed=seed + 1)
    result = minimize_gns(
        lambda x: 0.5 * x @ H @ x + torch.nn.functional.softplus(x).sum(), draw(n, seed=seed + 2),
        curvature=lambda x: LowRank(F, torch.full((rank,), 1.0 / rank, dtype=F64)), tol=1e-4, max_iter=20_000,
    )  # fmt: skip
    assert result.converged
    assert (np.diff(result.history["fun"]) <= 0).all()
