"""Methods that other libraries do, through Kantor's door: the same counts, stops, statuses and errors."""

from __future__ import annotations

import sys
import warnings
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


@pytest.mark.parametrize("method", METHODS)
def test_steps_into_nan_are_taken_back(method: str) -> None:
    evaluated = []

    def fun(x: Any) -> float:  # NaN left of zero, where the second Newton step from 50 leads
        with np.errstate(invalid="ignore"):
            evaluated.append(float((x**4 / 4 - np.log(x)).sum() if method == "newton-cg" else (x - np.log(x)).sum()))
        return evaluated[-1]

    def grad(x: Any) -> Any:
        return x**3 - 1 / x if method == "newton-cg" else 1 - 1 / x

    def hvp(x: Any, v: Any) -> Any:
        return (3 * x**2 if method == "newton-cg" else 0) * v + v / x**2

    result = minimize(fun, np.array([50.0]), grad=grad, hvp=hvp, method=method, tol=1e-6).check()
    np.testing.assert_allclose(result.x, 1.0, rtol=1e-6)
    assert len(evaluated) < 100
    assert method == "newton-cg" or not np.isfinite(evaluated).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_point_is_evaluated_twice(method: str) -> None:
    problem = rosenbrock(20)
    seen: dict[str, list[bytes]] = {"fun": [], "grad": []}

    def fun(x: Any) -> float:
        seen["fun"].append(x.tobytes())
        return problem.fun_numpy(x)

    def grad(x: Any) -> Any:
        seen["grad"].append(x.tobytes())
        return problem.grad_numpy(x)

    minimize(fun, problem.x0.numpy(), grad=grad, hvp=problem.hvp_numpy, method=method, tol=1e-8).check()
    for points in seen.values():
        assert len(points) == len(set(points))


@pytest.mark.parametrize("method", SCIPY)
def test_warnings_are_the_functions_own(method: str) -> None:
    calls = 0

    def fun(x: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:  # SciPy is at work
            warnings.warn("from fun", RuntimeWarning, stacklevel=1)
        return float(x @ x)

    with pytest.warns(
        RuntimeWarning
    ) as caught:  # the derivatives are wrong; asked to, SciPy warns of what that leads to
        result = minimize(fun, np.ones(3), grad=lambda x: -2 * x, hvp=lambda x, v: 2 * v, method=method, disp=True)
    assert calls > 3
    assert result.status is OptimizeStatus.FAILED
    assert result.details.startswith("SciPy: ")
    assert result.details in result.message
    assert {str(w.message) for w in caught} == {"from fun", f"minimize: {result.message}"}
    np.testing.assert_array_equal(result.x, np.ones(3))


def test_a_librarys_success_above_the_tolerance_is_none() -> None:
    with pytest.warns(RuntimeWarning, match="its own test was met, tol was not"):
        result = Counted().run("newton-cg", tol=1e-9, xtol=1e3)
    assert result.status is OptimizeStatus.FAILED
    assert result.grad_norm > 1e-9


@pytest.mark.parametrize("method", SCIPY)
def test_products_that_are_not_finite_end_the_run(method: str) -> None:
    calls = 0

    def hvp(x: Any, v: Any) -> Any:
        nonlocal calls
        calls += 1
        return np.full(3, np.nan)

    with pytest.warns(RuntimeWarning, match="non_finite"):
        result = minimize(lambda x: float((x**4).sum()), np.ones(3), grad=lambda x: 4 * x**3, hvp=hvp, method=method)
    assert result.status is OptimizeStatus.NON_FINITE
    assert calls == 1
    np.testing.assert_array_equal(result.x, np.ones(3))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg", "lbfgs"])
def test_a_gradient_that_is_not_finite_ends_the_run(method: str, value: float) -> None:
    def grad(x: Any) -> Any:
        return 4 * x**3 if (x == 1).all() else np.full(3, value)

    with pytest.warns(RuntimeWarning, match="non_finite"):
        result = minimize(
            lambda x: float((x**4).sum()), np.ones(3), grad=grad, hvp=lambda x, v: 12 * x**2 * v, method=method
        )
    assert result.status is OptimizeStatus.NON_FINITE
    np.testing.assert_array_equal(result.x, np.ones(3))
    np.testing.assert_array_equal(result.grad, np.full(3, 4.0))


def test_a_step_that_is_not_finite_ends_the_run() -> None:
    problem = rosenbrock(4)
    with pytest.warns(RuntimeWarning, match="at a point that is not finite"):
        result = minimize(problem.fun, problem.x0, method="lbfgs", lr=float("inf"))
    assert result.status is OptimizeStatus.FAILED
    torch.testing.assert_close(result.x, problem.x0, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["trust-krylov", "trust-ncg"])
def test_rejected_steps_count_towards_the_limit_of_iterations(method: str) -> None:
    problem = rosenbrock(100)
    with pytest.warns(RuntimeWarning, match="max_iter"):
        result = minimize(problem.fun, problem.x0, method=method, max_iter=20)
    assert result.status is OptimizeStatus.MAX_ITER
    assert result.n_iter < 20


@pytest.mark.parametrize("method", METHODS)
def test_limit_of_time_is_kept(method: str) -> None:
    with pytest.warns(RuntimeWarning, match="max_seconds"):
        result = Counted().run(method, tol=1e-12, max_seconds=1e-9)
    assert result.status is OptimizeStatus.MAX_SECONDS
    assert result.n_iter == 0


@pytest.mark.parametrize("method", SCIPY)
def test_missing_scipy_names_the_extra(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"kantor\[cli\]"):
        minimize(lambda x: x.square().sum(), torch.ones(2, dtype=F64), method=method)


@pytest.mark.parametrize("method", SCIPY)
def test_counts_are_those_of_scipy_by_itself(method: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    ours, theirs = Counted(), Counted()
    result = ours.run(method, tol=1e-6)
    stop = {"gtol": 1e-6} if method.startswith("trust") else {"xtol": 1e-300}

    def small(intermediate_result: Any) -> None:
        if np.linalg.norm(theirs.problem.grad_numpy(intermediate_result.x)) <= 1e-6:
            raise StopIteration

    answer = optimize.minimize(
        theirs.fun, theirs.problem.x0.numpy(), jac=theirs.grad, hessp=theirs.hvp, method=method, callback=small,
        options=stop,
    )  # fmt: skip
    assert result.fun == answer.fun
    assert ours.calls["hvp"] == theirs.calls["hvp"]
    assert result.n_points == len(theirs.points)


def test_lbfgs_takes_torchs_own_path() -> None:
    problem = rosenbrock(10)
    seen: list[tuple[int, float]] = []
    result = minimize(
        problem.fun, problem.x0, method="lbfgs", tol=1e-6, callback=lambda info: seen.append((info.n_grad, info.fun))
    )
    x = problem.x0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=result.n_iter, max_eval=10**6, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        f = problem.fun(x)
        f.backward()
        return f

    optimizer.step(closure)
    torch.testing.assert_close(result.x, x.detach(), rtol=0, atol=0)
    assert result.n_grad == calls


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ({"jac": None}, "grad="),
        ({"hessp": None}, "hvp="),
        ({"args": ()}, "lambda"),
        ({"bounds": []}, "no constraints"),
        ({"options": {}}, "one by one"),
    ],
)
@pytest.mark.parametrize("method", ["arncg", "gns", "lbfgs"])
def test_names_of_scipy_are_told_what_they_are_called_here(words, advice, method):
    with pytest.raises(TypeError, match=f"minimize: unexpected argument {next(iter(words))}: .*{advice}"):
        minimize(torch.sum, torch.zeros(3, dtype=F64), method=method, **words)


def quartic(x: Tensor) -> Tensor:
    return x.pow(4).sum()


def test_maxiter_is_an_option_of_scipy_alone():
    with pytest.raises(TypeError, match="unexpected argument maxiter: it is called max_iter"):
        minimize(quartic, torch.ones(3, dtype=F64), maxiter=3)
    with pytest.warns(RuntimeWarning, match="minimize: max_iter"):
        result = minimize(quartic, torch.ones(3, dtype=F64), method="trust-ncg", maxiter=3)
    assert (result.status, result.n_iter) == ("max_iter", 3)


def test_values_that_are_none_say_what_to_return():
    start = torch.ones(3, dtype=F64)
    with pytest.raises(TypeError, match="fun: expected a number, got None; return"):
        minimize(lambda x: None, start)
    with pytest.raises(ValueError, match=r"expected a scalar, got shape \(3,\); return a sum"):
        minimize(lambda x: x**2, start)
    with pytest.raises(TypeError, match="pass grad= and hvp=, or grad= alone with method='lbfgs'"):
        minimize(lambda x: x @ x, np.ones(3))
    result = minimize(lambda x: x @ x, np.ones(3), grad=lambda x: 2 * x, method="lbfgs")
    assert result.converged


@pytest.mark.parametrize("fun", [lambda x: np.sum(x**2), lambda x: (x.numpy() ** 2).sum()])
def test_numpy_in_a_function_of_tensors_is_told_of(fun):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        minimize(fun, torch.ones(3, dtype=F64))
    assert "minimize: fun: got a torch tensor" in caught.value.__notes__[0]
