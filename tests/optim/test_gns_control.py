"""Gradient-normalised smoothness: where it ends, what it counts, and what it does where functions misbehave."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import devices
from gns_functions import F64, SAMPLES, SIGNS, draw, logistic_loss, rosenbrock, run, saddle
from kantor.optim import OptimizeStatus, curvature, minimize, minimize_gns

# --- what it finds ---


@pytest.mark.parametrize("negative_curvature", [False, True])
def test_leaves_a_saddle_from_beside_it(negative_curvature: bool) -> None:
    x0 = torch.tensor([0.5, 1e-8], dtype=F64)
    result = minimize_gns(saddle, x0, negative_curvature=negative_curvature, tol=1e-9).check()
    torch.testing.assert_close(result.x.abs(), torch.tensor([0.0, math.sqrt(0.5)], dtype=F64), rtol=0, atol=1e-8)
    assert (np.diff(result.history["fun"]) <= 0).all()


def test_leaves_a_maximum_along_negative_curvature() -> None:
    x0 = torch.full((3,), 1e-6, dtype=F64)
    result = minimize_gns(lambda x: torch.cos(x).sum(), x0, negative_curvature=True).check()
    assert result.fun == pytest.approx(-3.0, abs=1e-12)


def test_negative_curvature_takes_fewer_solves_than_rejections_do() -> None:
    x0 = torch.tensor([0.5, 1e-8], dtype=F64)
    assert minimize_gns(saddle, x0, negative_curvature=True).n_solve < minimize_gns(saddle, x0).n_solve


def test_steps_into_nan_are_taken_back() -> None:
    fun = lambda x: (x - torch.log(x)).sum()  # noqa: E731  NaN left of zero
    for start in (50.0, 1e-3):
        result = minimize_gns(fun, torch.full((4,), start, dtype=F64), tol=1e-9).check()
        torch.testing.assert_close(result.x, torch.ones(4, dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("model", ["zero", "hessian"])
def test_unbounded_function_is_told(model: str) -> None:
    result = minimize_gns(lambda x: x.sum(), torch.zeros(3, dtype=F64), curvature=model)
    assert result.status is OptimizeStatus.UNBOUNDED
    assert result.n_iter < 200


def test_wrong_gradient_ends_after_the_trials_where_it_began() -> None:
    x0 = np.ones(3)
    result = minimize_gns(lambda x: float(x @ x), x0, grad=lambda x: -2 * x, hvp=lambda x, v: 2 * v, max_trials=17)
    assert result.status is OptimizeStatus.LINE_SEARCH
    assert (result.n_iter, result.n_solve) == (0, 17)
    np.testing.assert_array_equal(result.x, x0)


@pytest.mark.parametrize("solver", ["cholesky", "multishift", "cg"])
def test_products_of_nan_end_where_they_began(solver: Any) -> None:
    x0 = np.ones(3)
    result = minimize_gns(
        lambda x: float(x @ x), x0, grad=lambda x: 2 * x, hvp=lambda x, v: np.full(3, np.nan), solver=solver
    )
    assert result.status is OptimizeStatus.NON_FINITE
    assert result.n_iter == 0
    np.testing.assert_array_equal(result.x, x0)


def test_curvature_that_turns_nan_does_not_lose_the_best_point() -> None:
    def at(x: Tensor) -> Tensor:
        return torch.full((3, 3), math.nan, dtype=F64) if float(x.norm()) < 1 else torch.eye(3, dtype=F64)

    result = minimize_gns(lambda x: (x**4).sum(), torch.full((3,), 2.0, dtype=F64), curvature=at)
    assert result.status is OptimizeStatus.NON_FINITE
    assert result.fun < 3 * 2.0**4
    assert torch.isfinite(result.x).all()


@pytest.mark.parametrize("fun", [lambda x: (SAMPLES @ x - SIGNS).square().sum(), logistic_loss])
def test_unreachable_tolerance_ends_at_the_minimum(fun: Any) -> None:
    result = minimize_gns(fun, torch.ones(8, dtype=F64), tol=0.0)
    assert result.status in (OptimizeStatus.STALLED, OptimizeStatus.CONVERGED)
    assert result.n_iter < 100
    assert result.grad_norm < 1e-12


@pytest.mark.parametrize("L", [1e-6, 1.0, 1e3, 1e6])
def test_gradient_method_reaches_small_gradients_whatever_the_scale(L: float) -> None:
    result = minimize_gns(lambda x: 0.5 * L * x @ x, torch.ones(3, dtype=F64), curvature="zero", tol=1e-8)
    assert result.converged, result


def test_units_of_the_function_change_nothing() -> None:
    x0 = 3 * torch.ones(8, dtype=F64)
    plain = run(logistic_loss, x0, tol=1e-6)
    scaled = run(lambda x: 2.0**20 * logistic_loss(x), x0, tol=1e-6 * 2**20)
    assert plain.result.n_solve == scaled.result.n_solve
    for x, y in zip(plain.x, scaled.x, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_stops_at_the_known_value() -> None:
    result = minimize_gns(rosenbrock, torch.tensor([-2.0, 2.0], dtype=F64), f_star=0.0, tol_f=1e-3, tol=0.0)
    assert result.converged
    assert 1e-12 < result.fun <= 1e-3
    assert result.history["fun"][-2] > 1e-3


def test_float32_reaches_its_own_accuracy() -> None:
    for arguments in ({}, {"curvature": curvature.logistic(SAMPLES.float(), l2=1e-2)}, {"solver": "multishift"}):
        x0 = torch.zeros(8)
        samples, signs = SAMPLES.float(), SIGNS.float()
        fun = lambda x: torch.nn.functional.softplus(-signs * (samples @ x)).mean() + 1e-2 * x @ x / 2  # noqa: B023, E731
        start = float(torch.func.grad(fun)(x0).norm())
        result = minimize_gns(fun, x0, tol=1e-4 * start, **arguments).check()
        assert result.x.dtype is torch.float32
        exact = minimize_gns(logistic_loss, x0.double(), tol=1e-12).check()
        torch.testing.assert_close(result.x.double(), exact.x, rtol=0, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["rosenbrock", "logistic", "logsumexp"])
def test_gpu_takes_the_steps_of_the_cpu(name: str) -> None:
    devices.require("cuda")
    devices.require("cuda")
    n, samples, signs = 8, SAMPLES, SIGNS

    def make(device: str) -> tuple[Any, Any]:
        S, y = samples.to(device), signs.to(device)
        if name == "logistic":
            loss = lambda x: torch.nn.functional.softplus(-y * (S @ x)).mean() + 1e-2 * x @ x / 2  # noqa: E731
            return loss, curvature.logistic(S, l2=1e-2)
        if name == "logsumexp":
            return lambda x: torch.logsumexp(S @ x - y, 0) + x @ x, curvature.logsumexp(S, y, exact=False)
        return rosenbrock, "hessian"

    results = [
        minimize_gns(make(device)[0], torch.zeros(n, dtype=F64, device=device), curvature=make(device)[1], tol=1e-9)
        for device in ("cpu", "cuda")
    ]
    assert results[0].n_iter == results[1].n_iter
    torch.testing.assert_close(results[1].x.cpu(), results[0].x, rtol=0, atol=1e-9)


# --- counting, callables, limits ---


class Counting:
    """NumPy callables of a quartic that count their calls and can run out of budget."""

    class Budget(RuntimeError):
        pass

    def __init__(self, n: int = 12, most: float = math.inf) -> None:
        self.calls = {"fun": 0, "grad": 0, "hvp": 0}
        self.A = np.random.default_rng(0).standard_normal((n, n)) / n
        self.A = self.A @ self.A.T
        self.most = most

    def _count(self, name: str) -> None:
        self.calls[name] += 1
        if sum(self.calls.values()) > self.most:
            raise self.Budget("out of budget")

    def fun(self, x: np.ndarray) -> float:
        self._count("fun")
        return float((x**4).sum() / 4 + 0.5 * x @ self.A @ x - x.sum())

    def grad(self, x: np.ndarray) -> np.ndarray:
        self._count("grad")
        return x**3 + self.A @ x - 1

    def hvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self._count("hvp")
        return 3 * x**2 * v + self.A @ v


@pytest.mark.parametrize("arguments", [{"solver": "cholesky"}, {"solver": "multishift"}, {"negative_curvature": True}])
def test_counts_equal_the_calls(arguments: Any) -> None:
    c = Counting()
    result = minimize_gns(c.fun, np.full(12, 2.0), grad=c.grad, hvp=c.hvp, tol=1e-8, **arguments).check()
    assert {"fun": result.n_fun, "grad": result.n_grad, "hvp": result.n_hvp} == c.calls
    assert isinstance(result.x, np.ndarray)
    np.testing.assert_allclose(c.grad(result.x), 0, atol=1e-8)
    assert list(result.history["n_hvp"]) == sorted(result.history["n_hvp"])


def test_numpy_callables_and_autograd_take_the_same_path() -> None:
    c = Counting()
    M = torch.from_numpy(c.A)
    by_hand = minimize_gns(c.fun, np.full(12, 2.0), grad=c.grad, hvp=c.hvp)
    by_autograd = minimize_gns(
        lambda x: (x**4).sum() / 4 + 0.5 * x @ M @ x - x.sum(), torch.full((12,), 2.0, dtype=F64)
    )
    assert (by_hand.n_iter, by_hand.n_solve) == (by_autograd.n_iter, by_autograd.n_solve)
    np.testing.assert_allclose(by_hand.x, by_autograd.x.numpy(), rtol=1e-10)


def test_numpy_users_may_take_the_curvature_models() -> None:
    S, y = SAMPLES.numpy(), SIGNS.numpy()

    def fun(x: np.ndarray) -> float:
        return float(np.logaddexp(0, -y * (S @ x)).mean() + 5e-3 * x @ x)

    def grad(x: np.ndarray) -> np.ndarray:
        return -S.T @ (y / (1 + np.exp(y * (S @ x)))) / len(y) + 1e-2 * x

    result = minimize_gns(fun, np.zeros(8), grad=grad, curvature=curvature.logistic(SAMPLES, l2=1e-2)).check()
    exact = minimize_gns(logistic_loss, torch.zeros(8, dtype=F64)).check()
    np.testing.assert_allclose(result.x, exact.x.numpy(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("most", [0, 1, 2, 5, 17])
@pytest.mark.parametrize("solver", ["cholesky", "multishift", "cg"])
def test_exception_in_a_callable_comes_out_as_it_is(most: int, solver: Any) -> None:
    c = Counting(most=most)
    with pytest.raises(Counting.Budget, match="out of budget"):
        minimize_gns(c.fun, np.full(12, 5.0), grad=c.grad, hvp=c.hvp, tol=1e-12, solver=solver)
    assert sum(c.calls.values()) == most + 1


def test_exception_in_a_curvature_comes_out_as_it_is() -> None:
    def at(x: Tensor) -> Tensor:
        raise Counting.Budget("out of budget")

    with pytest.raises(Counting.Budget, match="out of budget"):
        minimize_gns(rosenbrock, torch.zeros(3, dtype=F64), curvature=at)


def test_callables_may_overwrite_what_they_get() -> None:
    def at(x: Tensor) -> Tensor:
        H = torch.autograd.functional.hessian(logistic_loss, x.clone())
        x.zero_()
        return H

    result = minimize_gns(logistic_loss, torch.ones(8, dtype=F64), curvature=at)
    exact = minimize_gns(logistic_loss, torch.ones(8, dtype=F64))
    assert result.n_iter == exact.n_iter
    torch.testing.assert_close(result.x, exact.x)


def test_points_of_any_shape() -> None:
    M = draw(3, 4)

    def fun(X: Tensor) -> Tensor:
        return 0.5 * (X - M).square().sum() + (X**4).sum() / 4

    exact = minimize_gns(fun, torch.zeros(3, 4, dtype=F64)).check()
    assert exact.x.shape == exact.grad.shape == (3, 4)
    torch.testing.assert_close(exact.x - M + exact.x**3, torch.zeros(3, 4, dtype=F64), rtol=0, atol=1e-7)
    for at in (curvature.hessian(fun), torch.func.hessian(fun)):  # (12, 12), and (3, 4, 3, 4)
        result = minimize_gns(fun, torch.zeros(3, 4, dtype=F64), curvature=at).check()
        torch.testing.assert_close(result.x, exact.x, rtol=0, atol=1e-8)


def test_one_unknown() -> None:
    result = minimize_gns(lambda x: (x**4).sum() - x.sum(), torch.ones(1, dtype=F64)).check()
    assert float(result.x) == pytest.approx(0.25 ** (1 / 3), abs=1e-8)


def test_start_at_the_minimum_takes_no_step() -> None:
    result = minimize_gns(lambda x: x @ x, torch.zeros(3, dtype=F64))
    assert result.converged
    assert (result.n_iter, result.n_solve, result.n_fun) == (0, 0, 1)


def test_iteration_limit_is_kept_and_the_run_resumes_as_one() -> None:
    x0 = torch.tensor([-2.0, 2.0], dtype=F64)
    whole = minimize_gns(rosenbrock, x0).check()
    part = minimize_gns(rosenbrock, x0, max_iter=9)
    assert part.status is OptimizeStatus.MAX_ITER
    assert part.n_iter == 9
    rest = minimize_gns(rosenbrock, **part.state).check()
    assert part.n_iter + rest.n_iter == whole.n_iter
    assert torch.equal(rest.x, whole.x)


def test_callback_sees_every_step_and_stops() -> None:
    seen: list[Any] = []

    def callback(info: Any) -> bool:
        seen.append((info.iteration, info.fun, info.grad_norm))
        return info.iteration == 3

    result = minimize_gns(rosenbrock, torch.tensor([-2.0, 2.0], dtype=F64), callback=callback)
    assert result.status is OptimizeStatus.STOPPED
    assert [row[0] for row in seen] == [1, 2, 3]
    assert seen[-1][1:] == (result.fun, result.grad_norm)


@pytest.mark.parametrize("where", ["callback", "fun", "curvature"])
def test_interrupt_is_raised_or_returned(where: str) -> None:
    calls = 0

    def broken_off(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    def watched(name: str, fn: Any) -> Any:
        return lambda x: (broken_off() if where == name else None, fn(x))[1]

    arguments: dict[str, Any] = {
        "curvature": watched("curvature", lambda x: torch.autograd.functional.hessian(rosenbrock, x)),
        "callback": broken_off if where == "callback" else None,
    }
    x0 = torch.tensor([-2.0, 2.0], dtype=F64)
    with pytest.raises(KeyboardInterrupt):
        minimize_gns(watched("fun", rosenbrock), x0, **arguments)
    calls = 0
    result = minimize_gns(watched("fun", rosenbrock), x0, interrupt="return", **arguments)
    assert result.status is OptimizeStatus.INTERRUPTED
    assert result.fun == float(rosenbrock(result.x))
    assert minimize_gns(rosenbrock, **result.state).converged


def test_front_door_is_the_same_function() -> None:
    x0 = torch.tensor([-2.0, 2.0], dtype=F64)
    direct, through = minimize_gns(rosenbrock, x0, tol=1e-6), minimize(rosenbrock, x0, method="gns", tol=1e-6)
    assert torch.equal(direct.x, through.x)
    assert (through.method, through.n_solve, through.gamma) == ("gns", direct.n_solve, direct.gamma)
    at = curvature.logistic(SAMPLES, l2=1e-2)
    assert minimize(logistic_loss, torch.zeros(8, dtype=F64), method="gns", curvature=at).converged
    with pytest.warns(RuntimeWarning, match="max_iter"):
        minimize(rosenbrock, x0, method="gns", max_iter=2)


# --- what does not fit ---

TWO = torch.zeros(2, dtype=F64)
BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"gamma0": 0.0}, ValueError, "gamma0"),
    ({"gamma0": -1.0}, ValueError, "gamma0"),
    ({"gamma0": math.nan}, ValueError, "gamma0"),
    ({"tol": -1e-9}, ValueError, "tol"),
    ({"tol": math.nan}, ValueError, "tol"),
    ({"tol_f": -1.0}, ValueError, "tol_f"),
    ({"max_iter": -1}, ValueError, "max_iter"),
    ({"max_trials": 0}, ValueError, "max_trials"),
    ({"solver": "lu"}, ValueError, "solver"),
    ({"solver": "woodbury"}, ValueError, "woodbury"),
    ({"interrupt": "never"}, ValueError, "interrupt"),
    ({"curvature": "fisher"}, ValueError, "curvature"),
    ({"curvature": torch.eye(2, dtype=F64)}, TypeError, "curvature"),
    ({"curvature": lambda x: torch.eye(3, dtype=F64)}, ValueError, r"\(2, 2\).*\(3, 3\)"),
    ({"curvature": lambda x: torch.eye(2)}, (TypeError, ValueError), "float32"),
    ({"curvature": lambda x: torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)}, ValueError, "symmetric"),
    ({"metric": torch.ones(3, dtype=F64)}, ValueError, r"\(3,\)"),
    ({"metric": torch.ones(2, 3, dtype=F64)}, ValueError, r"\(2, 3\)"),
    ({"metric": torch.tensor([1.0, 0.0], dtype=F64)}, ValueError, "positive"),
    ({"metric": torch.tensor([1.0, math.nan], dtype=F64)}, ValueError, "metric"),
    ({"metric": -torch.eye(2, dtype=F64)}, ValueError, r"positive definite.*\(2, 2\)"),
    ({"metric": torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64)}, ValueError, r"symmetric.*\(2, 2\)"),
    ({"metric": torch.ones(2)}, TypeError, "x0 is float64, metric is float32"),
    ({"metric": "identity"}, TypeError, "metric"),
    ({"metric": torch.ones(2, dtype=F64), "negative_curvature": True}, ValueError, "negative_curvature"),
    ({"x0": TWO.half()}, TypeError, "float16"),
    ({"x0": TWO.bfloat16()}, TypeError, "bfloat16"),
    ({"x0": torch.tensor([0.0, math.inf], dtype=F64)}, ValueError, "x0"),
    ({"x0": np.zeros(2)}, TypeError, "grad"),
    ({"fun": lambda x: x}, ValueError, "scalar"),
    ({"fun": lambda x: (x / 0).sum()}, ValueError, "finite value at x0"),
    ({"fun": lambda x: x.abs().sqrt().sum()}, ValueError, "finite gradient at x0"),
    ({"fun": 3.0}, TypeError, "callable"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(k) for k in range(len(BAD))])
def test_bad_input_says_what_was_wrong(arguments: dict[str, Any], error: Any, message: str) -> None:
    given = {"fun": rosenbrock, "x0": TWO} | arguments
    with pytest.raises(error, match=message):
        minimize_gns(given.pop("fun"), given.pop("x0"), **given)
