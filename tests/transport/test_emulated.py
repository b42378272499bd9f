"""The CUDA passes on the emulator: whatever order threads and blocks run in, the results are those of the CPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
import measures
from kantor import _C
from kantor._ops import emulated
from kantor.transport import doubly_stochastic, sinkhorn_divergence, solve, solve_sample, unbalanced
from kantor.transport._cost import Cost
from measures import F32, F64, METHODS, ends_with, error, normal, uniform, weights

SCHEDULES = (0, 1, 2, 3)
EPS = 0.3


@pytest.fixture(params=SCHEDULES, ids=["forward", "reverse", "shuffled", "shuffled again"])
def schedule(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the emulator's threads and blocks in this order."""
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    assert emulator.schedule_count == len(SCHEDULES)
    emulator.set_schedule(request.param)
    yield request.param
    emulator.set_schedule(0)


def log_cost(x: Tensor, y: Tensor) -> Tensor:
    return torch.log1p((x[:, None] - y[None]).square().sum(-1))


def holes(C: Tensor) -> Tensor:
    """Some pairs forbidden, a whole row and a whole column among them."""
    C = C.clone()
    C[torch.rand(C.shape, generator=measures.generator(4)) < 0.2] = math.inf
    if min(C.shape) > 3:
        C[2], C[:, 1] = math.inf, math.inf
    return C


def costs(n: int, m: int, dtype: torch.dtype) -> dict[str, Cost]:
    """One cost of each kind."""
    x, y = normal(n, 3).to(dtype), normal(m, 3, seed=1).to(dtype)
    matrix = uniform(n, m).to(dtype)
    kinds: dict[str, Any] = {"sqeuclidean": {}, "euclidean": {}, "l1": {}, "lp": {"p": 1.7}, "cosine": {}}
    made = {kind: Cost.points(x, y, kind, **options) for kind, options in kinds.items()}
    made |= {"one axis": Cost.points(x[:, :1], y[:, :1], "sqeuclidean"), "callable": Cost.points(x, y, log_cost)}
    wide = Cost.points(normal(n, 9).to(dtype), normal(m, 9, seed=1).to(dtype), "euclidean")
    return made | {"nine axes": wide, "matrix": Cost.dense(matrix), "forbidden": Cost.dense(holes(matrix))}


KINDS = tuple(costs(4, 5, F64))
SHAPES = ((1, 40), (17, 1), (5, 300), (35, 40))


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """The same infinities, and the same numbers up to the order of sums."""
    assert torch.equal(torch.isfinite(actual), torch.isfinite(expected)), what
    finite = torch.isfinite(expected)
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-11, atol=1e-12, msg=lambda m: f"{what}: {m}")


class Passes:
    """Every pass over a cost, on one backend."""

    def __init__(self, native: Any, cost: Cost, f: Tensor, g: Tensor) -> None:
        self.native, self.cost, self.f, self.g = native, cost, f, g
        self.n, self.m = cost.shape

    def call(self, name: str, *args: Any) -> Any:
        return getattr(self.native, f"transport_{name}")(tuple(self.cost.encode()), EPS, *args, 1)

    def all(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}

        def empty(*names_and_sizes: tuple[str, Any]) -> list[Tensor]:
            for name, shape in names_and_sizes:
                out[name] = torch.full(shape if isinstance(shape, tuple) else (shape,), 77.0, dtype=F64)
            return [out[name] for name, _ in names_and_sizes]

        offset = 0.1 * normal(self.n, seed=7)
        sweep = empty(("log sums of rows", self.n), ("f", self.n), ("column sums of the sweep", self.m))
        self.call("sweep", 700.0, self.g, offset, *sweep, 1)
        self.call("column_log_sums", self.f, *empty(("log sums of columns", self.m)))
        self.call("sums", self.f, self.g, *empty(("row sums", self.n), ("column sums", self.m)))
        for k in (1, 11):
            V, W = normal(self.m, k, seed=8), normal(self.n, k, seed=9)
            self.call("apply", self.f, self.g, V, *empty((f"P V, {k}", (self.n, k))), False)
            self.call("apply", self.f, self.g, W, *empty((f"P' W, {k}", (self.m, k))), True)
        linear, entropy = self.call("values", self.f, self.g)
        out["values"] = torch.tensor([linear, entropy], dtype=F64)
        return out

    def extracted(self, threshold: float, limit: int = 1 << 30) -> Any:
        return self.call("extract", self.f, self.g, threshold, limit)


def expected_passes(cost: Cost, f: Tensor, g: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The plan and the passes in plain torch, from the cost in double."""
    wide = Cost(cost.kind, *(None if t is None else t.double() for t in (cost.matrix, cost.x, cost.y)), cost.p)
    C = (wide if cost.function is None else cost).tile(0, cost.shape[0]).double()
    P = measures.plan(C, f, g, EPS)
    log_sums = torch.logsumexp((g - C) / EPS, 1)
    own = 0.1 * normal(len(f), seed=7) - EPS * log_sums
    column_sums = torch.where(torch.isfinite(own)[:, None], measures.plan(C, own, g, EPS), 0.0).sum(0)
    out = {
        "log sums of rows": log_sums,
        "column sums of the sweep": column_sums,
        "log sums of columns": torch.logsumexp((f[:, None] - C) / EPS, 0),
        "row sums": P.sum(1),
        "column sums": P.sum(0),
        "values": torch.stack([torch.where(P > 0, P * C, 0.0).sum(), torch.special.xlogy(P, P).sum()]),
    }
    for k in (1, 11):
        out[f"P V, {k}"], out[f"P' W, {k}"] = P @ normal(len(g), k, seed=8), P.T @ normal(len(f), k, seed=9)
    return P, out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["matrix", "forbidden", "lp", "callable"])
def test_passes(kind: str, shape: tuple[int, int], schedule: int) -> None:
    check_passes(kind, shape, F64)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_costs(kind: str, dtype: torch.dtype) -> None:
    """Every formula of an entry; for these one order of threads is as good as another."""
    devices.require("emulated")
    for shape in ((1, 1), (9, 7)):
        check_passes(kind, shape, dtype)


def check_passes(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = shape
    cost = costs(n, m, dtype)[kind]
    f, g = 0.2 * normal(n, seed=5), 0.2 * normal(m, seed=6)
    with emulated():
        emulator: Any = importlib.import_module("kantor._emu")
        there = Passes(emulator, cost, f, g)
        actual, again = there.all(), there.all()
        assert all(torch.equal(again[name], actual[name]) or name == "f" for name in actual)
        sparse = [there.extracted(threshold) for threshold in (0.0, 0.1, 1e9)]
        assert there.extracted(0.0, 0) is None or sparse[0][0][-1] == 0
    here = Passes(_C, cost, f, g)
    for name, value in here.all().items():
        close(actual[name], value, f"{name}, against the CPU")
    P, expected = expected_passes(cost, f, g)
    if dtype is F64 or kind in ("matrix", "forbidden"):
        for name, value in expected.items():
            close(actual[name], value, f"{name}, against torch")
    for (crow, col, values), threshold in zip(sparse, (0.0, 0.1, 1e9), strict=True):
        wanted = here.extracted(threshold)
        assert crow.tolist() == wanted[0].tolist()
        assert col.tolist() == wanted[1].tolist()
        torch.testing.assert_close(torch.from_numpy(values), torch.from_numpy(wanted[2]), rtol=1e-12, atol=0)
        if dtype is F64:
            dense = torch.zeros(n, m, dtype=F64)
            rows = torch.arange(n).repeat_interleave(torch.from_numpy(crow).diff())
            dense[rows, torch.from_numpy(col).long()] = torch.from_numpy(values)
            torch.testing.assert_close(dense, torch.where(threshold < P, P, 0.0), rtol=1e-11, atol=0)


def test_tiles_of_a_callable(monkeypatch: pytest.MonkeyPatch, schedule: int) -> None:
    """Several tiles, the last of them shorter."""
    from kantor.transport import _cost

    monkeypatch.setattr(_cost, "_TILE_ENTRIES", 13 * 33)
    cost = costs(30, 33, F64)["callable"]
    assert cost.tile_rows() == 13
    f, g = 0.2 * normal(30, seed=5), 0.2 * normal(33, seed=6)
    with emulated():
        actual = Passes(importlib.import_module("kantor._emu"), cost, f, g).all()
    for name, value in Passes(_C, cost, f, g).all().items():
        close(actual[name], value, name)


# --- whole solves ---


def problem() -> tuple[Tensor, Tensor, Tensor]:
    p = measures.clouds(24, 20)
    return p.C, p.a, p.b


def zeros_and_holes() -> tuple[Tensor, Tensor, Tensor]:
    C, a, b = problem()
    a[3], b[[0, 7]] = 0.0, 0.0
    C[torch.rand(C.shape, generator=measures.generator(4)) < 0.2] = math.inf
    return C, a / a.sum(), b / b.sum()


X, Y = normal(22, 3), normal(19, 3, seed=1)
SOLVES: dict[str, Callable[[], Any]] = {
    **{
        f"{method}, {reg}": lambda method=method, reg=reg: solve(
            *problem(), reg=reg, method=method, tol=1e-12, density=0.9
        )
        for method, reg in (("newton", 0.3), ("newton", 1e-2), ("newton", 1e-4), ("sns", 0.05), ("sinkhorn", 0.05))
    },
    "kl": lambda: solve(*problem(), reg=0.02, reg_type="kl", tol=1e-12),
    "unbalanced": lambda: unbalanced(*problem(), reg=0.01, rho=(0.5, 2.0), tol=1e-12),
    "semi-unbalanced": lambda: unbalanced(*problem(), reg=0.01, rho=(None, 0.5), reg_type="entropy", tol=1e-12),
    "zeros and holes": lambda: solve(*zeros_and_holes(), reg=0.01, tol=1e-12),
    "single precision": lambda: solve(*(t.to(F32) for t in problem()), reg=0.01, tol=1e-12),
    "batch": lambda: solve(torch.stack([uniform(12, 9, seed=k) for k in range(3)]), reg=0.02, tol=1e-12),
    "points": lambda: solve_sample(X, Y, reg=0.1, tol=1e-12),
    "points, lp": lambda: solve_sample(X, Y, reg=0.1, cost="lp", p=1.5, tol=1e-12),
    "points, callable": lambda: solve_sample(X, Y, reg=0.03, cost=log_cost, tol=1e-12),
}


@pytest.mark.parametrize("kind", list(SOLVES))
def test_solves(kind: str, schedule: int) -> None:
    expected = SOLVES[kind]()
    with emulated():
        actual = SOLVES[kind]()
        assert actual.converged
        assert error(actual.plan, expected.plan) < (1e-6 if "0.0001" in kind else 1e-9)
        assert float((actual.value - expected.value).abs().max()) < 1e-10
        assert float((actual.value_linear - expected.value_linear).abs().max()) < 1e-9
    assert actual.method == expected.method
    assert abs(actual.n_iter - expected.n_iter) <= 2


def test_products_on_the_fly(monkeypatch: pytest.MonkeyPatch, schedule: int) -> None:
    """A plan with more entries than may be kept: Newton's products are passes."""
    import sys

    monkeypatch.setattr(sys.modules["kantor.transport.solve"], "_POINT_ENTRIES", 100)
    options: dict[str, Any] = {"reg": 0.05, "tol": 1e-11, "method": "newton"}
    expected = solve_sample(X, Y, **options)
    with emulated():
        actual = solve_sample(X, Y, **options)
        assert error(actual.plan, expected.plan) < 1e-8
    assert actual.n_newton > 0


def test_results(schedule: int) -> None:
    """What is asked of a result runs there, too."""
    expected = solve_sample(X, Y, reg=0.05)
    V, U = normal(19, 2, seed=3), normal(22, 2, seed=3)
    with emulated():
        actual = solve_sample(X, Y, reg=0.05)
        torch.testing.assert_close(actual.apply(V), expected.apply(V), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(
            actual.apply(U, transpose=True), expected.apply(U, transpose=True), rtol=1e-7, atol=1e-9
        )
        torch.testing.assert_close(actual.barycentric_map(), expected.barycentric_map(), rtol=1e-7, atol=1e-7)
        sparse = actual.plan_sparse(1e-6).to_dense()
    torch.testing.assert_close(sparse, expected.plan_sparse(1e-6).to_dense(), rtol=1e-6, atol=1e-6)


def test_exact(schedule: int) -> None:
    expected = solve(*problem(), reg=0)
    with emulated():
        actual = solve(*problem(), reg=0)
    assert float(actual.value_linear) == pytest.approx(float(expected.value_linear), rel=1e-7)
    assert actual.lower_bound == pytest.approx(expected.lower_bound, rel=1e-7)
    assert actual.duality_gap >= 0


def test_gradients() -> None:
    devices.require("emulated")

    def gradients() -> list[Tensor]:
        C, a, b = (t.clone().requires_grad_() for t in problem())
        result = solve(C, a, b, reg=0.05, tol=1e-12)
        loss = result.value + result.plan.square().sum() + result.potentials[0].square().sum()
        x = X.clone().requires_grad_()
        return [*torch.autograd.grad(loss, (C, a, b)), *torch.autograd.grad(sinkhorn_divergence(x, Y, reg=0.3), x)]

    expected = gradients()
    with emulated():
        for actual, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_statuses(method: str) -> None:
    devices.require("emulated")
    C, a, b = problem()
    with emulated():
        result = ends_with("max_iter", lambda: solve(C, a, b, reg=0.02, method=method, max_iter=2, tol=1e-14))
        assert result.marginal_error == pytest.approx(measures.marginal_error(result.plan, a, b), rel=1e-6)
        stopped = solve(C, a, b, reg=1e-3, method=method, callback=lambda info: info.iteration == 3)
        assert stopped.status.value == "stopped"
        C[:12, :10], C[12:, 10:] = math.inf, math.inf
        if method == "newton":
            ends_with("infeasible", lambda: solve(C, a, b, reg=1e-2))
        with pytest.raises(ValueError, match="NaN"):
            solve(torch.full((3, 3), math.nan, dtype=F64), reg=0.1)


def test_masses_from_1e300_to_1() -> None:
    devices.require("emulated")
    a, b = torch.logspace(-300, 0, 30, dtype=F64), torch.logspace(-300, 0, 20, dtype=F64)
    a, b = a / a.sum(), (b / b.sum()).flip(0)
    for reg in (1e-1, 1e-3):
        expected = solve(uniform(30, 20), a, b, reg=reg)
        with emulated():
            actual = solve(uniform(30, 20), a, b, reg=reg)
            assert actual.converged
            assert error(actual.plan, expected.plan) < 1e-8


def test_doubly_stochastic_on_the_emulator(schedule: int) -> None:
    A = -measures.squared(X, X)
    expected = doubly_stochastic(A, reg=0.5, tol=1e-12)
    with emulated():
        actual = doubly_stochastic(A, reg=0.5, tol=1e-12)
    assert error(actual.plan, expected.plan) < 1e-8


def test_one_point_and_weights_of_nothing() -> None:
    devices.require("emulated")
    with emulated():
        assert solve(torch.tensor([[1.0]], dtype=F64), reg=1.0).plan.item() == pytest.approx(1)
        a = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
        plan = solve(uniform(3, 4), a, weights(4), reg=0.1).plan
    torch.testing.assert_close(plan[1], weights(4), rtol=1e-9, atol=0)
    assert float(plan[[0, 2]].sum()) == 0
