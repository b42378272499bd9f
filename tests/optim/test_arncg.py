"""Regularised Newton-CG: what it finds, what it counts, and what it does where functions misbehave."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.optim import OptimizeStatus, minimize

F64 = torch.float64
PRESETS = ("economy", "guarantee", "paper")


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quartic(n: int, seed: int = 0) -> Any:
    """sum x^4/4 + x^2/2 and a random positive semidefinite coupling; minimum 0 at 0."""
    A = torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)) / math.sqrt(n)
    return lambda x: (x**4 / 4 + x**2 / 2).sum() + 0.5 * (A @ x).square().sum()


def saddle(x: Tensor) -> Tensor:
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def start(n: int, scale: float = 1.0, seed: int = 1) -> Tensor:
    return scale * torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- what it finds ---


@pytest.mark.parametrize("preset", PRESETS)
def test_minimum_of_a_quadratic_is_the_solution_of_the_linear_system(preset: str) -> None:
    R = torch.randn(30, 30, dtype=F64, generator=torch.Generator().manual_seed(2))
    A, b = R @ R.T + torch.eye(30, dtype=F64), start(30)
    result = minimize(lambda x: 0.5 * x @ A @ x - b @ x, torch.zeros(30, dtype=F64), tol=1e-10, preset=preset)
    assert result.check().status is OptimizeStatus.CONVERGED
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("theta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("policy", ["gradient", "min_gradient"])
@pytest.mark.parametrize("fallback", [0.0, 1.0])
def test_every_variant_reaches_the_minimum(theta: float, policy: Any, fallback: float) -> None:
    x0 = torch.tensor([-1.2, 1.0], dtype=F64)
    result = minimize(rosenbrock, x0, tol=1e-9, theta=theta, policy=policy, fallback=fallback).check()
    torch.testing.assert_close(result.x, torch.ones(2, dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_value_never_increases(preset: str) -> None:
    result = minimize(rosenbrock, torch.tensor([-1.2, 1.0] * 20, dtype=F64), preset=preset)
    f = result.history["fun"]
    assert result.converged
    assert (np.diff(f) <= 1e-15 * np.abs(f[:-1])).all()


@pytest.mark.parametrize("preset", ["guarantee", "paper"])
def test_local_convergence_is_quadratic(preset: str) -> None:
    result = minimize(quartic(20), start(20, 4.0), tol=1e-13, theta=1.0, preset=preset).check()
    G = result.history["grad_norm"]
    G = G[(G < 0.9) & (G > 1e-13)]
    orders = np.log(G[1:]) / np.log(G[:-1])
    assert len(orders) >= 2
    assert (orders[-2:] >= 1.8).all(), orders


def test_iterates_do_not_depend_on_orthogonal_coordinates() -> None:
    n = 15
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(3)))
    fun, x0 = quartic(n), start(n, 3.0)
    plain: list[Tensor] = []
    turned: list[Tensor] = []
    for f, x, seen in ((fun, x0, plain), (lambda z: fun(Q @ z), Q.T @ x0, turned)):
        minimize(f, x, tol=1e-12, callback=lambda info, seen=seen: seen.append(info.x.clone()))
    assert len(plain) >= 5
    for x, z in zip(plain[:20], turned[:20], strict=False):
        torch.testing.assert_close(Q @ z, x, rtol=1e-8, atol=1e-8)


# --- saddles, maxima, functions without a minimum ---


def test_exact_saddle_is_stationary() -> None:
    assert minimize(saddle, torch.zeros(2, dtype=F64)).converged


@pytest.mark.parametrize("preset", PRESETS)
def test_leaves_a_saddle_from_beside_it(preset: str) -> None:
    result = minimize(saddle, torch.tensor([0.0, 1e-8], dtype=F64), tol=1e-10, preset=preset).check()
    torch.testing.assert_close(result.x.abs(), torch.tensor([0.0, math.sqrt(0.5)], dtype=F64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_leaves_a_maximum(preset: str) -> None:
    def fun(x: Tensor) -> Tensor:
        return torch.cos(x).sum()

    result = minimize(fun, torch.full((3,), 1e-6, dtype=F64), tol=1e-8, preset=preset).check()
    assert result.fun == pytest.approx(-3.0, abs=1e-12)


@pytest.mark.parametrize("fun", [saddle, lambda x: torch.cos(x).sum()])
def test_second_order_check_leaves_stationary_points_that_are_no_minima(fun: Any) -> None:
    x0 = torch.zeros(2, dtype=F64)
    assert minimize(fun, x0).fun == fun(x0).item()
    result = minimize(fun, x0, tol=1e-8, curvature_tol=1e-4).check()
    H = torch.autograd.functional.hessian(fun, result.x)
    assert torch.linalg.eigvalsh(H).min() > 0
    assert result.fun < fun(x0).item() - 0.1


def test_second_order_check_accepts_a_minimum() -> None:
    result = minimize(quartic(10), start(10), tol=1e-9, curvature_tol=1e-4).check()
    assert result.fun < 1e-15


@pytest.mark.parametrize("preset", PRESETS)
def test_unbounded_function_is_told(preset: str) -> None:
    slope = torch.arange(1.0, 6.0, dtype=F64)
    with pytest.warns(RuntimeWarning, match="unbounded"):
        result = minimize(lambda x: x @ slope, torch.zeros(5, dtype=F64), preset=preset)
    assert result.status is OptimizeStatus.UNBOUNDED
    assert result.n_iter < 200


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_into_nan_are_taken_back(preset: str) -> None:
    def fun(x: Tensor) -> Tensor:  # NaN left of zero
        return (x - torch.log(x)).sum()

    result = minimize(fun, torch.full((4,), 50.0, dtype=F64), tol=1e-9, preset=preset).check()
    torch.testing.assert_close(result.x, torch.ones(4, dtype=F64), rtol=0, atol=1e-8)


def test_wrong_gradient_ends_in_a_line_search_failure() -> None:
    x0 = np.ones(3)
    with pytest.warns(RuntimeWarning, match="do not belong together"):
        result = minimize(lambda x: float(x @ x), x0, grad=lambda x: -2 * x, hvp=lambda x, v: 2 * v)
    assert result.status is OptimizeStatus.LINE_SEARCH
    np.testing.assert_array_equal(result.x, x0)


def test_nan_from_hvp_is_told() -> None:
    with pytest.warns(RuntimeWarning, match="NaN"):
        result = minimize(lambda x: float(x @ x), np.ones(3), grad=lambda x: 2 * x, hvp=lambda x, v: np.full(3, np.nan))
    assert result.status is OptimizeStatus.NON_FINITE
    np.testing.assert_array_equal(result.x, np.ones(3))


def test_unreachable_tolerance_stalls() -> None:
    A = 1e3 * torch.randn(20, 20, dtype=F64, generator=torch.Generator().manual_seed(6))
    b = start(20)
    with pytest.warns(RuntimeWarning):
        result = minimize(lambda x: (A @ x - b).square().sum() + (x - 1).square().sum(), start(20), tol=0.0)
    assert result.status in (OptimizeStatus.STALLED, OptimizeStatus.LINE_SEARCH)
    assert result.n_iter < 1000
    exact = torch.linalg.solve(A.T @ A + torch.eye(20, dtype=F64), A.T @ b + 1)
    torch.testing.assert_close(result.x, exact, rtol=1e-7, atol=1e-7)


def test_float32_reaches_its_own_accuracy() -> None:
    result = minimize(rosenbrock, torch.tensor([-1.2, 1.0] * 5), tol=1e-3).check()
    assert result.x.dtype is torch.float32
    exact = minimize(rosenbrock, torch.tensor([-1.2, 1.0] * 5, dtype=F64), tol=1e-10).check()
    assert result.fun == pytest.approx(exact.fun, abs=1e-4)


# --- counting, callables, limits ---


class Counting:
    """NumPy callables of a quartic that count their calls and can run out of budget."""

    class Budget(RuntimeError):
        pass

    def __init__(self, n: int = 12, most: float = math.inf) -> None:
        self.fun_calls = self.grad_calls = self.hvp_calls = 0
        self.A = np.random.default_rng(0).standard_normal((n, n)) / n
        self.A = self.A @ self.A.T
        self.most = most

    def fun(self, x: np.ndarray) -> float:
        self.fun_calls += 1
        return float((x**4).sum() / 4 + 0.5 * x @ self.A @ x - x.sum())

    def grad(self, x: np.ndarray) -> np.ndarray:
        self.grad_calls += 1
        return x**3 + self.A @ x - 1

    def hvp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        self.hvp_calls += 1
        if self.hvp_calls > self.most:
            raise self.Budget("out of budget")
        return 3 * x**2 * v + self.A @ v


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_equal_the_calls(preset: str) -> None:
    c = Counting()
    result = minimize(c.fun, np.full(12, 2.0), grad=c.grad, hvp=c.hvp, tol=1e-8, preset=preset).check()
    assert (result.n_fun, result.n_grad, result.n_hvp) == (c.fun_calls, c.grad_calls, c.hvp_calls)
    assert isinstance(result.x, np.ndarray)
    assert isinstance(result.grad, np.ndarray)
    np.testing.assert_allclose(c.grad(result.x), 0, atol=1e-8)
    assert result.n_points <= result.n_iter
    assert list(result.history["n_hvp"]) == sorted(result.history["n_hvp"])


def test_callables_and_autograd_take_the_same_path() -> None:
    c = Counting()
    A = torch.from_numpy(c.A)
    by_hand = minimize(c.fun, np.full(12, 2.0), grad=c.grad, hvp=c.hvp, tol=1e-8)
    by_autograd = minimize(
        lambda x: (x**4).sum() / 4 + 0.5 * x @ A @ x - x.sum(), torch.full((12,), 2.0, dtype=F64), tol=1e-8
    )
    assert (by_hand.n_iter, by_hand.n_hvp) == (by_autograd.n_iter, by_autograd.n_hvp)
    np.testing.assert_allclose(by_hand.x, by_autograd.x.numpy(), rtol=1e-10)
    by_grad = minimize(
        lambda x: float((x**4).sum() / 4 + 0.5 * x @ A @ x - x.sum()), torch.full((12,), 2.0, dtype=F64),
        grad=lambda x: x**3 + A @ x - 1, tol=1e-8,
    )  # fmt: skip
    np.testing.assert_allclose(by_grad.x.numpy(), by_hand.x, rtol=1e-10)


@pytest.mark.parametrize("most", [0, 1, 3, 7])
def test_exception_in_a_callable_comes_out_as_it_is(most: int) -> None:
    c = Counting(most=most)
    with pytest.raises(Counting.Budget, match="out of budget"):
        minimize(c.fun, np.full(12, 5.0), grad=c.grad, hvp=c.hvp, tol=1e-12)
    assert c.hvp_calls == most + 1
    c.most = math.inf
    assert minimize(c.fun, np.full(12, 5.0), grad=c.grad, hvp=c.hvp).converged  # nothing is left in a bad state


@pytest.mark.parametrize("which", ["fun", "hvp", "callback"])
def test_stop_iteration_of_a_callable_is_not_mistaken_for_the_end(which: str) -> None:
    def broken(*args: Any) -> Any:
        raise StopIteration

    c = Counting()
    calls = {"fun": c.fun, "hvp": c.hvp, "callback": lambda info: None} | {which: broken}
    with pytest.raises(StopIteration):
        minimize(calls["fun"], np.full(12, 5.0), grad=c.grad, hvp=calls["hvp"], callback=calls["callback"])


def test_limit_of_products_is_kept_and_the_run_resumes() -> None:
    c = Counting()
    with pytest.warns(RuntimeWarning, match="max_hvp"):
        part = minimize(c.fun, np.full(12, 5.0), grad=c.grad, hvp=c.hvp, tol=1e-10, max_hvp=6)
    assert part.status is OptimizeStatus.MAX_HVP
    assert part.n_hvp <= 6
    rest = minimize(c.fun, grad=c.grad, hvp=c.hvp, tol=1e-10, **part.state).check()
    assert rest.history["M"][0] == part.M


def test_resumed_steps_are_the_steps_of_one_run() -> None:
    x0 = torch.tensor([-1.2, 1.0] * 3, dtype=F64)
    whole = minimize(rosenbrock, x0, tol=1e-10).check()
    with pytest.warns(RuntimeWarning, match="max_iter"):
        part = minimize(rosenbrock, x0, tol=1e-10, max_iter=5)
    rest = minimize(rosenbrock, tol=1e-10, **part.state).check()
    torch.testing.assert_close(rest.x, whole.x, rtol=0, atol=0)
    assert part.n_iter + rest.n_iter == whole.n_iter


def test_callback_sees_every_step_and_stops() -> None:
    seen: list[Any] = []

    def callback(info: Any) -> bool:
        seen.append((info.iteration, info.fun, info.grad_norm, info.n_hvp))
        return info.iteration == 3

    result = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=F64), callback=callback)
    assert result.status is OptimizeStatus.STOPPED
    assert [row[0] for row in seen] == [1, 2, 3]
    assert seen[-1][1] == result.fun


def test_interrupt_is_raised_or_returned() -> None:
    def broken_off(info: Any) -> bool:
        raise KeyboardInterrupt

    x0 = torch.tensor([-1.2, 1.0], dtype=F64)
    with pytest.raises(KeyboardInterrupt):
        minimize(rosenbrock, x0, callback=broken_off)
    result = minimize(rosenbrock, x0, callback=broken_off, interrupt="return")
    assert result.status is OptimizeStatus.INTERRUPTED
    assert minimize(rosenbrock, **result.state).converged


def test_points_of_any_shape() -> None:
    M = torch.randn(6, 5, dtype=F64, generator=torch.Generator().manual_seed(4))
    result = minimize(lambda X: 0.5 * (X - M).square().sum() + (X**4).sum() / 4, torch.zeros(6, 5, dtype=F64)).check()
    assert result.x.shape == (6, 5)
    torch.testing.assert_close(result.x - M + result.x**3, torch.zeros(6, 5, dtype=F64), rtol=0, atol=1e-5)


def test_works_without_gradients_enabled_and_on_strided_starts() -> None:
    x0 = torch.zeros(8, 2, dtype=F64)[:, 0]
    with torch.no_grad():
        result = minimize(quartic(8), x0 + 1).check()
        assert not result.x.requires_grad
    strided = minimize(quartic(8), torch.ones(8, 2, dtype=F64)[:, 0]).check()
    assert torch.equal(strided.x, result.x)


# --- batches ---


def batch_of_quartics(B: int, n: int) -> tuple[Any, list[Any], Tensor]:
    A = torch.randn(B, n, n, dtype=F64, generator=torch.Generator().manual_seed(5)) / math.sqrt(n)

    def single(k: int) -> Any:
        return lambda x: (x**4 / 4 - x**2 / 2).sum() + 0.5 * (A[k] @ x).square().sum()

    def together(X: Tensor) -> Tensor:
        return (X**4 / 4 - X**2 / 2).sum(-1) + 0.5 * torch.einsum("bij,bj->bi", A, X).square().sum(-1)

    return together, [single(k) for k in range(B)], start(B * n, 2.0).view(B, n)


@pytest.mark.parametrize("preset", PRESETS)
def test_batch_equals_a_loop(preset: str) -> None:
    together, singles, X0 = batch_of_quartics(7, 6)
    result = minimize(together, X0, batched=True, tol=1e-8, preset=preset).check()
    assert result.x.shape == X0.shape
    for k, fun in enumerate(singles):
        alone = minimize(fun, X0[k], tol=1e-8, preset=preset).check()
        torch.testing.assert_close(result.x[k], alone.x, rtol=1e-8, atol=1e-8)
        assert result.per_problem_iterations[k] == len(alone.history["fun"]) - 1
    assert result.history["fun"].shape[0] == 7
    assert (result.grad_norm <= 1e-8).all()


def test_batch_with_problems_that_end_at_once_or_never() -> None:
    def fun(X: Tensor) -> Tensor:  # the third problem is unbounded
        weights = torch.tensor([1.0, 1.0, 0.0], dtype=F64)
        return weights * X.square().sum(-1) + (1 - weights) * X.sum(-1)

    X0 = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 1.0]], dtype=F64)
    with pytest.warns(RuntimeWarning, match="1 of 3"):
        result = minimize(fun, X0, batched=True)
    assert [str(s) for s in result.per_problem_status] == ["converged", "converged", "unbounded"]
    assert result.per_problem_iterations[0] == 0
    assert torch.equal(result.x[0], X0[0])


def test_batch_resumes() -> None:
    together, _, X0 = batch_of_quartics(4, 5)
    whole = minimize(together, X0, batched=True, tol=1e-9).check()
    with pytest.warns(RuntimeWarning, match="max_iter"):
        part = minimize(together, X0, batched=True, tol=1e-9, max_iter=3)
    rest = minimize(together, tol=1e-9, **part.state).check()
    torch.testing.assert_close(rest.x, whole.x, rtol=1e-7, atol=1e-8)


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"x0": torch.ones(3, dtype=torch.int64)}, TypeError, "float32 or float64"),
        ({"x0": torch.ones(3, dtype=torch.float16)}, TypeError, "float32 or float64"),
        ({"x0": np.arange(3)}, TypeError, "int"),
        ({"x0": torch.zeros(0)}, ValueError, "at least one"),
        ({"x0": torch.tensor([1.0, math.nan])}, ValueError, "finite"),
        ({"x0": np.ones(3)}, TypeError, "pass grad= and hvp="),
        ({"fun": 3.0}, TypeError, "callable"),
        ({"fun": lambda x: x}, ValueError, "scalar"),
        ({"fun": lambda x: x.detach().sum()}, RuntimeError, "does not depend on x"),
        ({"fun": lambda x: x.sum().item()}, RuntimeError, "does not depend on x"),
        ({"fun": lambda x: x.sum() / 0}, ValueError, "finite value at x0"),
        ({"fun": lambda x: x.abs().sqrt().sum(), "x0": torch.zeros(3)}, ValueError, "finite gradient at x0"),
        ({"grad": lambda x: x[:2], "hvp": lambda x, v: v}, ValueError, r"grad: expected shape \(3,\), got \(2,\)"),
        ({"grad": lambda x: 2 * x, "hvp": lambda x, v: v[:2]}, ValueError, r"hvp: expected shape \(3,\), got \(2,\)"),
        ({"grad": lambda x: 2 * x, "hvp": lambda x, v: v.double()}, ValueError, "hvp: expected torch.float32"),
        ({"grad": lambda x: (2 * x).detach()}, RuntimeError, "pass hvp="),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"tol": math.nan}, ValueError, "tol"),
        ({"theta": -1.0}, ValueError, "theta"),
        ({"mu": 0.5}, ValueError, "mu"),
        ({"gamma": 1.0}, ValueError, "gamma"),
        ({"eta": 1.0}, ValueError, "eta"),
        ({"rule": "tight"}, ValueError, "rule"),
        ({"policy": "none"}, ValueError, "policy"),
        ({"preset": "fast"}, ValueError, "preset"),
        ({"method": "newton"}, ValueError, "method"),
        ({"method": "lbfgs", "theta": 1.0}, ValueError, "theta"),
        ({"max_iter": -1}, ValueError, "max_iter"),
        ({"max_hvp": 1.5}, ValueError, "max_hvp"),
        ({"batched": True}, ValueError, "batched"),
        ({"interrupt": "never"}, ValueError, "interrupt"),
        ({"curvature_tol": 0.0}, ValueError, "curvature_tol"),
    ],
)
def test_bad_input_says_what_was_wrong(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"fun": lambda x: x.square().sum(), "x0": torch.ones(3)} | arguments
    with pytest.raises(error, match=match):
        minimize(given.pop("fun"), given.pop("x0"), **given)


def test_preconditioner_must_be_positive_definite() -> None:
    with pytest.raises(ValueError, match="preconditioner: expected a positive definite one"):
        minimize(lambda x: x.square().sum(), torch.ones(5, dtype=F64), preconditioner=lambda x: lambda r: -r)
    with pytest.raises(ValueError, match="preconditioner"):
        minimize(lambda x: x.square().sum(), torch.ones(5, dtype=F64), preconditioner="jacobi")


def test_gradients_that_do_not_change_have_no_hessian() -> None:
    """torch answers with zeros that have no memory."""
    with pytest.warns(RuntimeWarning):
        result = minimize(lambda x: x.abs().sum(), torch.tensor([2.0, -1.0], dtype=F64), max_iter=200)
    assert result.fun < 0.1


def test_function_that_cannot_be_differentiated_twice_asks_for_hvp() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    with pytest.raises(RuntimeError, match="pass hvp="):
        minimize(lambda x: Once.apply(x).sum(), torch.ones(3))
