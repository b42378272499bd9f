"""Methods that other libraries do, through Kantor's door: the same counts, stops, statuses and errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.datasets.minimization import powell, rosenbrock
from kantor.optim import OptimizeStatus, minimize

F64 = torch.float64
SCIPY = ("trust-krylov", "trust-ncg", "newton-cg")
METHODS = (*SCIPY, "lbfgs")


class Counted:
    """NumPy callables of the Rosenbrock function that count."""

    def __init__(self) -> None:
        self.problem = rosenbrock(10)
        self.calls = {"fun": 0, "grad": 0, "hvp": 0}
        self.points: set[bytes] = set()

    def fun(self, x: Any) -> float:
        self.calls["fun"] += 1
        return self.problem.fun_numpy(x)

    def grad(self, x: Any) -> Any:
        self.calls["grad"] += 1
        return self.problem.grad_numpy(x)

    def hvp(self, x: Any, v: Any) -> Any:
        self.calls["hvp"] += 1
        self.points.add(x.tobytes())
        return self.problem.hvp_numpy(x, v)

    def run(self, method: Any, **options: Any) -> Any:
        return minimize(self.fun, self.problem.x0.numpy(), grad=self.grad, hvp=self.hvp, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_minimum_counts_and_history(method: str) -> None:
    c = Counted()
    result = c.run(method, tol=1e-7).check()
    assert np.linalg.norm(c.problem.grad_numpy(result.x)) <= 1e-7
    assert (result.n_fun, result.n_grad, result.n_hvp) == (c.calls["fun"], c.calls["grad"], c.calls["hvp"])
    assert result.n_points == len(c.points)
    history = result.history
    assert history["fun"][0] == c.problem.fun_numpy(c.problem.x0.numpy())
    assert history["fun"][-1] == result.fun
    assert list(history["n_grad"]) == sorted(history["n_grad"])
    assert len(history["fun"]) == result.n_iter + 1
    assert method in repr(result)


@pytest.mark.parametrize("method", METHODS)
def test_torch_functions_need_no_derivatives(method: str) -> None:
    problem = rosenbrock(6)
    result = minimize(problem.fun, problem.x0, method=method, tol=1e-7).check()
    assert isinstance(result.x, Tensor)
    assert torch.func.grad(problem.fun)(result.x).norm() <= 1e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_points_keep_their_shape(method: str, shape: tuple[int, ...]) -> None:
    result = minimize(lambda X: ((X - 1) ** 4).sum() + X.square().sum(), torch.zeros(shape, dtype=F64), method=method)
    assert result.converged
    assert result.x.shape == shape


def test_float32_and_lbfgs_options() -> None:
    problem = rosenbrock(4)
    result = minimize(lambda x: problem.fun(x), problem.x0.float(), method="lbfgs", tol=1e-2, history_size=5)
    assert result.converged
    assert result.x.dtype is torch.float32


@pytest.mark.parametrize("method", SCIPY)
def test_limit_of_products_is_kept(method: str) -> None:
    c = Counted()
    with pytest.warns(RuntimeWarning, match="max_hvp"):
        result = c.run(method, tol=1e-10, max_hvp=12)
    assert result.status is OptimizeStatus.MAX_HVP
    assert c.calls["hvp"] <= 12
    assert result.fun <= result.history["fun"][0]


@pytest.mark.parametrize("method", METHODS)
def test_limit_of_iterations_is_kept(method: str) -> None:
    c = Counted()
    with pytest.warns(RuntimeWarning, match="max_iter"):
        result = c.run(method, tol=1e-10, max_iter=3)
    assert result.status is OptimizeStatus.MAX_ITER
    assert result.n_iter <= 3


@pytest.mark.parametrize("method", METHODS)
def test_callback_stops(method: str) -> None:
    result = Counted().run(method, callback=lambda info: info.iteration == 2)
    assert result.status is OptimizeStatus.STOPPED
    assert result.n_iter == 2


@pytest.mark.parametrize("error", [RuntimeError("mine"), np.linalg.LinAlgError("mine"), StopIteration("mine")])
@pytest.mark.parametrize(
    ("method", "where"),
    [(m, w) for m in METHODS for w in ("fun", "grad", "hvp", "callback") if (m, w) != ("lbfgs", "hvp")],
)
def test_exceptions_of_callables_come_out(method: str, where: str, error: Exception) -> None:
    c = Counted()
    calls = 0

    def broken(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise error
        return getattr(c, where)(*args) if where != "callback" else None

    given = {"grad": c.grad, "hvp": c.hvp, "callback": None} | ({where: broken} if where != "fun" else {})
    with pytest.raises(type(error), match="mine"):
        minimize(broken if where == "fun" else c.fun, c.problem.x0.numpy(), method=method, tol=1e-10, **given)


@pytest.mark.parametrize("method", METHODS)
def test_interrupt_returns_the_best_point(method: str) -> None:
    def broken_off(info: Any) -> None:
        if info.iteration == 2:
            raise KeyboardInterrupt

    result = Counted().run(method, callback=broken_off, interrupt="return")
    assert result.status is OptimizeStatus.INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
        Counted().run(method, callback=broken_off)


@pytest.mark.parametrize("method", METHODS)
def test_singular_hessians(method: str) -> None:
    problem = powell(8)
    assert minimize(problem.fun, problem.x0, method=method, tol=1e-5).converged


@pytest.mark.parametrize("method", METHODS)
def test_start_at_a_stationary_point_ends_at_once(method: str) -> None:
    result = minimize(lambda x: x.square().sum(), torch.zeros(3, dtype=F64), method=method)
    assert result.converged
    assert result.n_iter == 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "trust-ncg", "no_such_option": 1}, TypeError, "no_such_option"),
        ({"method": "lbfgs", "no_such_option": 1}, TypeError, "no_such_option"),
        ({"method": "lbfgs", "batched": True}, ValueError, "batched"),
        ({"method": "trust-krylov", "preset": "paper"}, ValueError, "preset"),
        ({"method": "bfgs"}, ValueError, "method"),
    ],
)
def test_bad_options_say_what_was_wrong(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        minimize(lambda x: x.square().sum(), torch.ones(2, 2, dtype=F64), **options)


@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite(method: str) -> None:
    with pytest.raises(ValueError, match="finite"):
        minimize(lambda x: x.sum() / 0, torch.ones(2, dtype=F64), method=method)
    with pytest.raises(ValueError, match="finite"):
        minimize(lambda x: x.abs().sqrt().sum(), torch.zeros(2, dtype=F64), method=method)
