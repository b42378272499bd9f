"""Functions summed over ranks, and the minimisers on them."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor

from kantor import KantorError, RankError
from kantor._ranks import Ranks
from kantor.distributed import split, sum_over_ranks
from kantor.optim import minimize
from ranks import outcomes, run
from systems_in_shares import F64, vector

SAMPLES, UNKNOWNS = 61, 5


def _data() -> tuple[Tensor, Tensor]:
    X = vector(SAMPLES, UNKNOWNS)
    return X, (X[:, 0] + 0.5 * vector(SAMPLES, seed=4)).sign()


def _loss(X: Tensor, y: Tensor) -> Any:
    """Logistic regression with a nonconvex penalty, which is shared out among the samples."""

    def fun(x: Tensor) -> Tensor:
        penalty = len(X) / SAMPLES * (x**2 / (1 + x**2)).sum(-1)
        return torch.nn.functional.softplus(-y * (x @ X.T)).mean(-1) * len(X) / SAMPLES + 1e-2 * penalty

    return fun


def _mine(ranks: Ranks) -> Any:
    X, y = _data()
    counts = {1: [61], 2: [11, 50], 3: [30, 1, 30], 4: [20, 20, 1, 20]}[ranks.size]
    return _loss(split(X, ranks, counts, dim=0), split(y, ranks, counts))


def _derivatives(ranks: Ranks) -> list[Any]:
    fun = sum_over_ranks(_mine(ranks), ranks)
    x = vector(UNKNOWNS, seed=7).requires_grad_()
    ranks.traffic.reset()
    value = fun(x)
    (g,) = torch.autograd.grad(value, x, create_graph=True)
    (Hv,) = torch.autograd.grad(g, x, vector(UNKNOWNS, seed=8), retain_graph=True)
    sent = ranks.traffic.all_reduce.bytes
    (rows,) = torch.autograd.grad(Hv.new_zeros(()) + g @ vector(UNKNOWNS, seed=8), x, create_graph=True)
    hessian = torch.func.hessian(fun)(x.detach()) if ranks.size == 2 else None  # the first call takes seconds
    return [value.detach(), g.detach(), Hv, rows.detach(), hessian, sent]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_value_gradient_and_hessian_products(size: int) -> None:
    fun = _loss(*_data())
    x = vector(UNKNOWNS, seed=7)
    H = torch.autograd.functional.hessian(fun, x)
    for value, g, Hv, rows, hessian, sent in run(size, _derivatives):
        torch.testing.assert_close(value, fun(x), rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(g, torch.autograd.functional.jacobian(fun, x), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(Hv, H @ vector(UNKNOWNS, seed=8), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(rows, Hv, rtol=1e-12, atol=1e-13)
        if hessian is not None:
            torch.testing.assert_close(hessian, H, rtol=1e-12, atol=1e-13)
        # One number and a flag for the value, then n for the gradient and n for the product.
        assert sent == (8 * (2 + 2 * UNKNOWNS) if size > 1 else 0)


METHODS = ["arncg", "gns", "lbfgs", "newton-cg", "trust-ncg", "trust-krylov"]


def _minimized(ranks: Ranks) -> dict[str, Any]:
    fun = sum_over_ranks(_mine(ranks), ranks)
    results = {method: minimize(fun, vector(UNKNOWNS, seed=9), method=method, tol=1e-7) for method in METHODS}
    both = sum_over_ranks(_mine(ranks), ranks, batched=True)
    results["batched"] = minimize(both, vector(2, UNKNOWNS, seed=9), batched=True, tol=1e-7)
    stop = (lambda step: step.iteration == 2) if ranks.rank == 0 else None
    results["stopped"] = minimize(fun, vector(UNKNOWNS, seed=9), callback=stop, tol=1e-7)
    return {name: (result.x, str(result.status), result.n_iter) for name, result in results.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_method_of_minimize(size: int) -> None:
    fun = _loss(*_data())
    single = {method: minimize(fun, vector(UNKNOWNS, seed=9), method=method, tol=1e-7) for method in METHODS}
    first, *others = run(size, _minimized)
    for method, result in single.items():
        x, status, n_iter = first[method]
        assert (status, abs(n_iter - result.n_iter) <= 1) == ("converged", True), method
        torch.testing.assert_close(x, result.x, rtol=1e-5, atol=1e-6)
    batched = minimize(fun, vector(2, UNKNOWNS, seed=9), batched=True, tol=1e-7)
    torch.testing.assert_close(first["batched"][0], batched.x, rtol=1e-5, atol=1e-6)
    assert first["stopped"][1:] == ("stopped", 2)
    for other in others:  # bit for bit, else the ranks would part ways one day
        assert all(torch.equal(other[name][0], first[name][0]) and other[name][1:] == first[name][1:] for name in first)


def _fails(ranks: Ranks, case: str) -> Any:
    last = ranks.rank == ranks.size - 1

    def fun(x: Tensor) -> Tensor:
        if case == "raises" and last:
            raise ZeroDivisionError("no samples")
        return (x**4).sum(-1) if case != "shape" or not last else x

    x0 = vector(UNKNOWNS)
    if case == "x0" and last:
        x0[1] += 1e-14
    if case == "length" and last:
        x0 = x0[1:]
    seconds = 10.0 if case == "clock" and last else None
    return minimize(sum_over_ranks(fun, ranks), x0, max_seconds=seconds)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("raises", "no samples"),
        ("shape", "rank 2: sum_over_ranks: fun: expected a tensor of shape ()"),
        ("x0", "minimize: x0: expected the same numbers"),
        ("length", "number of unknowns: expected the same"),
        ("clock", "max_seconds: expected the same"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(case: str, message: str) -> None:
    for rank, error in enumerate(outcomes(3, _fails, case)):
        assert isinstance(error, Exception)
        assert message in str(error)
        assert not isinstance(error, RankError)
        assert case != "raises" or isinstance(error, ZeroDivisionError if rank == 2 else KantorError)


def _interrupted(ranks: Ranks) -> tuple[str, int]:
    def fun(x: Tensor) -> Tensor:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    def press(step: Any) -> None:
        if ranks.rank == 1 and step.iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)

    x0 = torch.tensor([-1.2, 1.0], dtype=F64)
    result = minimize(sum_over_ranks(fun, ranks), x0, callback=press, interrupt="return")
    return str(result.status), result.n_iter


def test_an_interrupt_on_one_rank_ends_all_at_the_same_step() -> None:
    one, two = run(2, _interrupted)
    assert one == two
    assert one[0] == "interrupted"
    assert one[1] in (3, 4)
