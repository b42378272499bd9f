"""Transport between points, with costs that are never stored: the same as with the matrix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import measures
from kantor.transport import TransportInfo, TransportResult, solve, solve_sample
from measures import F32, F64, METHODS, error, marginal_error, normal, uniform, weights

N, M, D = 130, 70, 3


def harmonic(x: Tensor, y: Tensor) -> Tensor:
    """A cost of one's own."""
    return torch.log1p((x[:, None] - y[None]).square().sum(-1))


def matrix(X: Tensor, Y: Tensor, cost: Any, p: float = 2.0) -> Tensor:
    """The cost, in plain torch."""
    X, Y = X.double(), Y.double()
    if callable(cost):
        made: Tensor = cost(X, Y)
        return made
    if cost == "cosine":
        return 1 - torch.cosine_similarity(X[:, None], Y[None], dim=-1)
    difference = (X[:, None] - Y[None]).abs()
    return {
        "sqeuclidean": lambda: difference.square().sum(-1),
        "euclidean": lambda: difference.square().sum(-1).sqrt(),
        "l1": lambda: difference.sum(-1),
        "lp": lambda: difference.pow(p).sum(-1),
    }[cost]()


COSTS: dict[str, dict[str, Any]] = {
    "sqeuclidean": {"cost": "sqeuclidean"},
    "euclidean": {"cost": "euclidean"},
    "l1": {"cost": "l1"},
    "lp, 1.5": {"cost": "lp", "p": 1.5},
    "lp, 0.5": {"cost": "lp", "p": 0.5},
    "cosine": {"cost": "cosine"},
    "callable": {"cost": harmonic},
}
COST = pytest.mark.parametrize("name", list(COSTS))


def points(d: int = D, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    X, Y = normal(N, d).to(dtype), (0.7 * normal(M, d, seed=1) + 0.3).to(dtype)
    return X, Y, weights(N).to(dtype), weights(M, seed=1).to(dtype)


@pytest.mark.parametrize("reg", [1e-1, 3e-3, 1e-4])
@COST
def test_same_as_with_the_matrix(name: str, reg: float) -> None:
    X, Y, a, b = points()
    C = matrix(X, Y, **COSTS[name])
    eps = reg * float(C.max())
    result = solve_sample(X, Y, a, b, reg=eps, tol=1e-11, **COSTS[name])
    expected = solve(C, a, b, reg=eps, tol=1e-11)
    P = expected.plan
    assert result.converged
    assert marginal_error(result.plan, a, b) < 1.1e-10
    assert error(result.plan, P) < 1e-6
    assert float(result.value) == pytest.approx(float(expected.value), rel=1e-9)
    assert float(result.value_linear) == pytest.approx(float((P * C).sum()), rel=1e-7)
    V = normal(M, 2, seed=5)
    torch.testing.assert_close(result.apply(V), result.plan @ V, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.apply(X, transpose=True), result.plan.T @ X, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.barycentric_map(), (P @ Y) / a[:, None], rtol=1e-5, atol=1e-6)
    sparse = result.plan_sparse(1e-8).to_dense()
    torch.testing.assert_close(sparse, torch.where(result.plan > 1e-8, result.plan, 0.0), rtol=1e-9, atol=2e-8)


@pytest.mark.parametrize("method", METHODS)
@COST
def test_methods(name: str, method: str) -> None:
    X, Y, a, b = points()
    C = matrix(X, Y, **COSTS[name])
    eps = 0.05 * float(C.max())
    result = solve_sample(X, Y, a, b, reg=eps, method=method, tol=1e-11, density=0.5, **COSTS[name])
    assert result.converged
    assert result.method == method
    assert error(result.plan, measures.sinkhorn(C, a, b, eps)) < 1e-8


@pytest.mark.parametrize("d", [1, 2, 8, 33])
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_dimensions_and_precisions(d: int, dtype: torch.dtype) -> None:
    """float32 points are computed with in float64: only their own rounding shows."""
    X, Y, a, b = points(d, dtype)
    for name in ("sqeuclidean", "euclidean", "l1"):
        C = matrix(X, Y, name)
        eps = 0.01 * float(C.max())
        result = solve_sample(X, Y, a, b, reg=eps, cost=name, tol=1e-10)
        assert result.converged
        assert result.plan.dtype is dtype
        wide_a, wide_b = a.double() / a.double().sum(), b.double() / b.double().sum()
        expected = measures.sinkhorn(C, wide_a, wide_b, eps, tol=1e-11)
        assert error(result.plan.double(), expected) < (1e-7 if dtype is F64 else 1e-4)
        wide = solve_sample(X.double(), Y.double(), a.double() / a.double().sum(), wide_b, reg=eps, cost=name)
        assert float(result.value) == pytest.approx(float(wide.value), rel=1e-6)


def test_points_on_a_line() -> None:
    x, y = normal(N), normal(M, seed=1)
    result = solve_sample(x, y, reg=1e-2)
    assert torch.equal(result.plan, solve_sample(x[:, None], y[:, None], reg=1e-2).plan)
    assert result.shape == (N, M)
    assert result.barycentric_map().shape == (N, 1)


def test_far_from_the_origin() -> None:
    """|x - y|^2 is formed from differences: a shift of all points by a million costs six digits, not twelve."""
    X, Y, a, b = points()
    expected = solve_sample(X, Y, a, b, reg=0.02, tol=1e-11)
    moved = solve_sample(X + 2**20, Y + 2**20, a, b, reg=0.02, tol=1e-11)
    assert moved.converged
    assert error(moved.plan, expected.plan) < 1e-6
    assert float(moved.value) == pytest.approx(float(expected.value), rel=1e-7)


def test_translations() -> None:
    """Squared distances: W(X + t, Y) adds |t|^2 + 2 t (mean X - mean Y), and the plan stays."""
    X, Y, a, b = points()
    t = torch.tensor([0.3, -1.2, 2.0], dtype=F64)
    first, second = (solve_sample(Z, Y, a, b, reg=0.05, tol=1e-12) for Z in (X, X + t))
    assert error(second.plan, first.plan) < 1e-8
    gain = float(t @ t + 2 * t @ (a @ X - b @ Y))
    assert float(second.value) == pytest.approx(float(first.value) + gain, rel=1e-9)


def test_exact() -> None:
    """reg = 0: matched to within the certificate of the linear program's optimum."""
    X, Y, a, b = points(2)
    for name in ("sqeuclidean", "euclidean", "callable"):
        C = matrix(X, Y, **COSTS[name])
        expected = measures.exact_cost(C, a, b)
        result = solve_sample(X, Y, a, b, reg=0, **COSTS[name])
        assert marginal_error(result.plan, a, b) < 1e-13
        assert float(result.value_linear) == pytest.approx(float((result.plan * C).sum()), rel=1e-11)
        assert result.lower_bound - 1e-9 <= expected <= float(result.value_linear) + 1e-9
        # For points the range is bounded from their extent, so reg may be a little more than 1e-5 of the cost's.
        assert 0 <= result.duality_gap <= 10e-5 * float(C.max()) * math.log(M)


@pytest.mark.slow
def test_coarse_starts(size: str) -> None:
    """Large problems begin with the potentials of a sample; the answer is that of any start."""
    n, m = (20_000, 8_000) if size == "full" else (5_000, 3_400)
    X, Y = uniform(n, 3), uniform(m, 3, seed=1) ** 2
    a = weights(n)
    a[::7] = 0
    a = a / a.sum()
    result = solve_sample(X, Y, a, reg=3e-2, tol=1e-7)
    assert result.converged
    r = result.apply(torch.ones(m, dtype=F64))
    c = result.apply(torch.ones(n, dtype=F64), transpose=True)
    assert float((r - a).abs().sum() + (c - 1 / m).abs().sum()) < 1.1e-7
    assert bool((r[::7] == 0).all())
    cold = solve_sample(X, Y, a, reg=3e-2, tol=1e-7, x0=(torch.zeros(n, dtype=F64), torch.zeros(m, dtype=F64)))
    assert float(result.value) == pytest.approx(float(cold.value), rel=1e-7)


def test_dense_plans_of_many_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of entries Newton's products are taken on the fly."""
    from kantor.transport import solve as _  # noqa: F401 (the module is shadowed by its function)

    module = __import__("sys").modules["kantor.transport.solve"]
    X, Y, a, b = points()
    expected = solve_sample(X, Y, a, b, reg=0.02, tol=1e-11, method="newton")
    monkeypatch.setattr(module, "_POINT_ENTRIES", 500)
    limited = solve_sample(X, Y, a, b, reg=0.02, tol=1e-11, method="newton")
    assert limited.converged
    assert limited.statistics["sparse_entries"] <= 16 * (N + M)
    assert error(limited.plan, expected.plan) < 1e-7


def test_callables_see_tiles() -> None:
    """A cost function gets some of the rows and all columns, in the dtype of the points, once more each sweep."""
    seen: list[tuple[int, int]] = []

    def cost(x: Tensor, y: Tensor) -> Tensor:
        assert x.dtype is F32
        assert not x.requires_grad
        seen.append((len(x), len(y)))
        return (x[:, None] - y[None]).abs().sum(-1)

    X, Y = normal(1500, 2).to(F32), normal(1700, 2, seed=1).to(F32)
    result = solve_sample(X, Y, reg=0.5, tol=1e-6, cost=cost)
    assert {columns for _, columns in seen} == {1700}
    assert sum(rows for rows, _ in seen) % 1500 == 0
    assert max(rows for rows, _ in seen) < 1500
    assert max(rows for rows, _ in seen) * 1700 <= 1 << 21
    expected = solve_sample(X, Y, reg=0.5, tol=1e-6, cost="l1")
    assert error(result.plan, expected.plan) < 1e-4


def test_exceptions_of_a_callable_pass_through() -> None:
    calls: list[int] = []

    def failing(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise ZeroDivisionError("on purpose")
        return harmonic(x, y)

    X, Y, a, b = points()
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        solve_sample(X, Y, a, b, reg=1e-3, cost=failing)
    assert len(calls) == 6
    assert solve_sample(X, Y, a, b, reg=1e-3, cost=harmonic).converged


def test_callables_with_forbidden_pairs() -> None:
    """+inf from a cost function forbids a pair, as in a matrix."""

    def near(x: Tensor, y: Tensor) -> Tensor:
        distance = (x[:, None] - y[None]).square().sum(-1)
        return torch.where(distance > 4, math.inf, distance)

    x = torch.linspace(0, 10, 60, dtype=F64)
    y = torch.linspace(0.5, 10.5, 60, dtype=F64)
    result = solve_sample(x, y, reg=0.05, cost=near)
    C = near(x[:, None], y[:, None])
    assert error(result.plan, solve(C, reg=0.05).plan) < 1e-6
    assert bool((result.plan[torch.isinf(C)] == 0).all())


def test_zero_weights() -> None:
    X, Y, a, b = points()
    a[3], b[10:20] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    result = solve_sample(X, Y, a, b, reg=0.02, tol=1e-11)
    kept_a, kept_b = a > 0, b > 0
    part = solve_sample(X[kept_a], Y[kept_b], a[kept_a], b[kept_b], reg=0.02, tol=1e-11)
    assert error(result.plan[kept_a][:, kept_b], part.plan) < 1e-9
    assert bool((result.plan[3] == 0).all())
    assert bool((result.plan[:, 10:20] == 0).all())
    assert bool(torch.isnan(result.barycentric_map()[3]).all())
    assert float(result.value) == pytest.approx(float(part.value), rel=1e-11)


def test_warm_starts_and_callbacks() -> None:
    X, Y, a, b = points()
    first = solve_sample(X, Y, a, b, reg=0.01)
    again = solve_sample(X, Y, a, b, reg=0.01, **first.state)
    assert again.n_iter == 0
    seen: list[TransportInfo] = []
    stopped: TransportResult = solve_sample(
        X,
        Y,
        a,
        b,
        reg=1e-3,
        callback=lambda info: seen.append(info) or len(seen) == 4,  # type: ignore[func-returns-value]
    )
    assert stopped.status.value == "stopped"
    assert [info.iteration for info in seen] == [1, 2, 3, 4]
    assert solve_sample(X, Y, a, b, reg=1e-3, x0=stopped).converged


def test_against_pot() -> None:
    ot = pytest.importorskip("ot")
    X, Y, a, b = points()
    reference = ot.solve_sample(
        X.numpy(), Y.numpy(), a.numpy(), b.numpy(), reg=0.1, reg_type="KL", max_iter=50_000, tol=1e-12
    )
    result = solve_sample(X, Y, a, b, reg=0.1, reg_type="kl", tol=1e-12)
    assert float((result.plan - torch.as_tensor(reference.plan)).abs().max()) < 1e-8
    assert float(result.value) == pytest.approx(float(reference.value), rel=1e-6)


def test_large_plans_are_not_formed_by_accident() -> None:
    """n x m entries are beyond any memory here: what does not need them works, what does says so."""
    n = 60_000
    x = torch.linspace(0, 1, n, dtype=F64)
    y = torch.tensor([0.25, 0.75], dtype=F64)
    result = solve_sample(x, y, reg=1e-3, tol=1e-6)
    assert result.barycentric_map().shape == (n, 1)
    from dataclasses import replace

    from kantor.transport._cost import Cost

    wide = replace(
        result, cost=Cost.points(x[:, None], x[:, None], "sqeuclidean"), potentials=(x, torch.zeros(n, dtype=F64))
    )
    with pytest.raises(ValueError, match=r"plan: a dense plan of 60000 x 60000 entries would need 26\.8 GiB; use"):
        _ = wide.plan
    with pytest.raises(ValueError, match="plan_sparse: more than 1000 entries exceed the threshold"):
        result.plan_sparse(0.0, limit=1000)
