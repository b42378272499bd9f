"""Flexible conjugate gradients against a dense reference, against cg, and where cg fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from devices import home
from flexible_reference import ends, network, numpy_of, quietly, reference
from kantor.linalg import Dense, Diagonal, SolveStatus, Stencil, cg, fcg, ic0
from systems import F32, F64, KINDS, error, example_operators, random, spd


@pytest.mark.parametrize("truncation", ["standard", "notay"])
@pytest.mark.parametrize("k_prev", [0, 1, 2, 5, 20])
def test_equals_the_reference(k_prev: int, truncation: Any) -> None:
    A, b, f = spd(40), random(40, seed=3), network(40)
    states = reference(A.numpy(), b.numpy(), numpy_of(f), k_prev, normalised=False, notay=truncation == "notay")
    next(states)
    for k in range(1, 17):
        x = quietly(lambda k=k: fcg(A, b, f, k_prev=k_prev, truncation=truncation, rtol=0.0, maxiter=k)).x  # type: ignore[misc]
        assert error(x, torch.from_numpy(next(states))) < 1e-8


@pytest.mark.parametrize("M", [None, "jacobi", "ic0", "matrix", "function"])
@pytest.mark.parametrize("k_prev", [1, 20])
def test_a_fixed_linear_preconditioner_makes_it_conjugate_gradients(M: Any, k_prev: int, device: str) -> None:
    A = Stencil((12, 13), weights=(1.0, 0.3), shift=0.01, device=home(device))
    b = random(156, device=home(device))
    if M in ("matrix", "function"):
        inverse = torch.linalg.inv(A.dense().cpu() + 0.5 * torch.eye(156, dtype=F64)).to(home(device))
        M = Dense((inverse + inverse.T) / 2) if M == "matrix" else lambda r: r @ inverse
    expected = cg(A, b, M=M, rtol=1e-9)
    result = fcg(A, b, M, k_prev=k_prev, rtol=1e-9)
    assert result.converged
    assert abs(result.iterations - expected.iterations) <= 1
    assert result.fallbacks == 0
    count = min(25, len(expected.history))
    np.testing.assert_allclose(
        result.history.residual_norms[:count], expected.history.residual_norms[:count], rtol=1e-7
    )


def inner_solves(A: Stencil) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Preconditioners that are no fixed linear map."""

    def changing_accuracy() -> Callable[[Tensor], Tensor]:
        calls = 0

        def inner(r: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return cg(A, r, rtol=(0.5, 0.05)[calls % 2]).x

        return inner

    smooth = Stencil((30, 30), shift=0.05)

    def rotating() -> Callable[[Tensor], Tensor]:
        sweeps = 0

        def inner(r: Tensor) -> Tensor:  # a good preconditioner, then a poor one
            nonlocal sweeps
            sweeps += 1
            return cg(smooth, r, rtol=1e-3).x if sweeps % 2 else r / 4

        return inner

    return {
        "inner solves of changing accuracy": changing_accuracy,
        "two in turn": rotating,
        "not linear": lambda: lambda r: cg(A, r + 0.2 * r.abs().mean() * torch.tanh(r / r.abs().max()), rtol=0.1).x,
    }


@pytest.mark.parametrize("name", list(inner_solves(Stencil((3, 3)))))
def test_variable_preconditioners(name: str) -> None:
    A, b = Stencil((30, 30)), random(900)
    make = inner_solves(A)[name]
    flexible = fcg(A, b, make(), rtol=1e-10)
    assert flexible.converged
    assert flexible.fallbacks == 0
    assert error(A.matvec(flexible.x), b) <= 1e-10
    plain = quietly(lambda: cg(A, b, M=make(), rtol=1e-10, maxiter=500))
    assert not plain.converged or plain.iterations > 1.2 * flexible.iterations, (plain, flexible)


def test_kept_directions_pay() -> None:
    """One direction is enough for a fixed linear map; for one that is not symmetric it is not."""
    A, b = Stencil((30, 30)), random(900)
    shifted = torch.linalg.inv(A.dense() + 0.1 * torch.eye(900, dtype=F64))
    M = lambda r: shifted @ (r + 0.3 * torch.roll(r, 1))  # noqa: E731
    counts = [fcg(A, b, M, k_prev=k, rtol=1e-8, maxiter=2000).iterations for k in (0, 1, 4, 20)]
    assert counts[0] > counts[2]
    assert counts[1] > counts[2] >= counts[3]
    restarted = fcg(A, b, M, k_prev=20, truncation="notay", rtol=1e-8)
    assert restarted.converged


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_operator(kind: str, dtype: torch.dtype, device: str) -> None:
    A = example_operators(dtype, home(device))[kind]
    b = random(2, 3, 20, dtype=dtype, device=home(device))
    solution = torch.linalg.solve(example_operators()[kind].dense(), b.cpu().double().view(6, 20).T).T
    preconditioners: list[Any] = [
        None,
        ic0(Stencil((4, 5), dtype=dtype, device=home(device))),
        lambda r: r + 0.1 * r.abs(),
    ]
    for M in preconditioners:
        with torch.no_grad():
            result = fcg(A, b, M, rtol=1e-10 if dtype is F64 else 1e-4)
        assert result.converged
        assert error(result.x.reshape(6, 20), solution) < (1e-7 if dtype is F64 else 3e-2)


@pytest.mark.parametrize("truncation", ["standard", "notay"])
def test_devices_agree(truncation: Any, device: str) -> None:
    A, b, f = Stencil((10, 10)), random(3, 100), network(100, gain=0.1)
    expected = fcg(A, b, f, k_prev=11, truncation=truncation, rtol=1e-10)
    on_device = Stencil((10, 10), device=home(device))
    result = fcg(
        on_device, b.to(home(device)), lambda r: f(r.cpu()).to(r.device), k_prev=11, truncation=truncation, rtol=1e-10
    )
    assert result.per_system_iterations.tolist() == expected.per_system_iterations.tolist()
    torch.testing.assert_close(result.x.cpu(), expected.x, rtol=1e-9, atol=1e-10)


def test_threads_do_not_change_a_bit() -> None:
    A, b = Stencil((300, 300)), random(90_000)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(quietly(lambda: fcg(A, b, lambda r: r + 0.1 * r.abs(), maxiter=25)))
        results.append(quietly(lambda: fcg(A, b, "ic0", maxiter=25)))
    torch.set_num_threads(before)
    assert torch.equal(results[0].x, results[2].x)
    assert torch.equal(results[1].x, results[3].x)


def test_a_preconditioner_of_no_use(caplog: pytest.LogCaptureFixture, device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))
    plain = fcg(A, b, rtol=1e-9)
    assert fcg(A, b, lambda r: -r, rtol=1e-9).iterations == plain.iterations  # no preconditioner of cg, yet of use
    with caplog.at_level(logging.WARNING, logger="kantor"):
        result = fcg(A, b, lambda r: r * torch.nan, rtol=1e-9)
    assert result.converged
    assert result.breakdown
    assert result.iterations <= plain.iterations + 12
    assert "M was given up" in result.reason
    assert len(caplog.records) == 1


def test_statuses_and_ends(device: str) -> None:
    A = Stencil((9, 9), device=home(device))
    b = random(81, device=home(device))
    assert ends("maxiter", lambda: fcg(A, b, maxiter=3)).iterations == 3
    assert ends("maxiter", lambda: fcg(A, b, rtol=0.0, maxiter=30)).iterations == 30
    assert ends("negative_curvature", lambda: fcg(-A, b)).curvature < 0  # type: ignore[operator]
    assert fcg(A, 0 * b).iterations == 0
    assert fcg(A, b, callback=lambda info: info.iteration == 4).status is SolveStatus.STOPPED
    assert fcg(A, b, x0=fcg(A, b, rtol=1e-12).x).iterations == 0
    assert fcg(A, b * 1e-250, rtol=1e-6).converged
    assert str(fcg(A, b)).startswith("fcg on float64")


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"truncation": "none"}, ValueError, "fcg: truncation: expected 'standard' or 'notay', got 'none'"),
        ({"k_prev": -1}, ValueError, "fcg: k_prev: expected an integer >= 0"),
        ({"k_prev": 1.5}, ValueError, "fcg: k_prev"),
        ({"M": "amg"}, ValueError, "fcg: M: expected 'jacobi', 'ic0'"),
        ({"M": 3}, TypeError, "fcg: M: expected None, 'jacobi', 'ic0', an operator or a function, got int"),
        ({"M": Diagonal(torch.ones(5, dtype=F64))}, ValueError, "fcg: M: expected shape"),
        ({"M": lambda r: r[:5]}, ValueError, "fcg: M: expected it to return shape"),
        ({"b": torch.ones(4, dtype=F64)}, ValueError, "fcg: b: expected shape"),
        ({"rtol": -1.0}, ValueError, "fcg: rtol"),
        ({"maxiter": -1}, ValueError, "fcg: maxiter"),
    ],
)
def test_bad_arguments(options: dict[str, Any], exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        fcg(**{"A": Stencil((9, 9)), "b": random(81), **options})


def test_not_symmetric_is_told_when_it_fails() -> None:
    matrix = spd(30)
    matrix[2, 7] += 5
    with pytest.raises(ValueError, match="fcg: A is not symmetric"):
        fcg(matrix, random(30), maxiter=4)
