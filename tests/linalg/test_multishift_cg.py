"""Conjugate gradients for many shifts against separate solves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from devices import home
from kantor._ops import backend, emulated
from kantor.linalg import SolveStatus, Stencil, cg, multishift_cg

F64 = torch.float64
SHIFTS = torch.tensor([4.0, 0.0, 1e-3, 128.0, 0.5], dtype=F64)


def matrix(n: int = 60, condition: float = 1e4, seed: int = 0) -> Tensor:
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)))
    return (Q * torch.logspace(0, float(np.log10(condition)), n, dtype=F64)) @ Q.T


def rand(n: int) -> Tensor:
    return torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(1))


def test_equals_dense_solves_and_separate_cg() -> None:
    A, b = matrix(condition=1e2), rand(60)
    result = multishift_cg(A, b, SHIFTS, rtol=1e-12)
    assert result.converged
    assert result.x.shape == (5, 60)
    eye = torch.eye(60, dtype=F64)
    for shift, x in zip(SHIFTS, result.x, strict=True):
        torch.testing.assert_close(x, torch.linalg.solve(A + shift * eye, b), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(x, cg(A + shift * eye, b, rtol=1e-12).x, rtol=1e-8, atol=1e-8)


def test_one_sequence_of_products_serves_all() -> None:
    calls = 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    A, b = matrix(), rand(60)
    result = multishift_cg(product, b, SHIFTS, rtol=1e-8)
    seed = multishift_cg(A, b, SHIFTS[1:2], rtol=1e-8)
    assert calls == result.iterations <= 1.05 * seed.iterations


def test_native_operator_and_reported_residuals() -> None:
    A = Stencil((12, 12))
    b = rand(144)
    result = multishift_cg(A, b, SHIFTS, rtol=1e-9)
    for shift, x, reported in zip(SHIFTS, result.x, result.residual_norms, strict=True):
        true = (b - A.matvec(x) - shift * x).norm()
        assert true <= 1.01e-9 * b.norm() + 1e-13
        assert reported <= 1e-9 * b.norm()


def test_shifts_that_leave_it_indefinite_are_told_apart() -> None:
    A, b = matrix(condition=100.0) - 10 * torch.eye(60, dtype=F64), rand(60)
    shifts = torch.tensor([0.0, 5.0, 9.5, 20.0], dtype=F64)  # positive definite above 9
    result = multishift_cg(A, b, shifts, rtol=1e-10)
    assert result.statuses[:2] == [SolveStatus.NEGATIVE_CURVATURE] * 2
    assert result.statuses[2:] == [SolveStatus.CONVERGED] * 2
    eye = torch.eye(60, dtype=F64)
    for k in (2, 3):
        torch.testing.assert_close(result.x[k], torch.linalg.solve(A + shifts[k] * eye, b), rtol=1e-6, atol=1e-6)
    assert "2 negative_curvature" in repr(result)


def test_limit_zero_right_hand_side_and_float32() -> None:
    A, b = matrix(condition=10.0), rand(60)
    short = multishift_cg(A, b, SHIFTS, rtol=1e-12, maxiter=3)
    assert short.iterations == 3
    assert SolveStatus.MAXITER in short.statuses
    assert multishift_cg(A, torch.zeros_like(b), SHIFTS).converged
    single = multishift_cg(A.float(), b.float(), SHIFTS, rtol=1e-5)
    assert single.converged
    assert single.x.dtype is torch.float32


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_devices_agree(device: str, dtype: torch.dtype) -> None:
    A, b = matrix(condition=1e2).to(dtype), rand(60).to(dtype)
    rtol = 1e-10 if dtype is F64 else 1e-4
    with_cpu = multishift_cg(A, b, SHIFTS, rtol=rtol)
    for operator in (A.to(home(device)), lambda v: A.to(home(device)) @ v):
        result = multishift_cg(operator, b.to(home(device)), SHIFTS, rtol=rtol)
        assert result.converged
        tolerance = 1e-9 if dtype is F64 else 2e-3
        torch.testing.assert_close(result.x.cpu(), with_cpu.x, rtol=tolerance, atol=tolerance)
    indefinite = multishift_cg(
        (A - 10 * torch.eye(60)).to(home(device), dtype), b.to(home(device)), torch.tensor([0.0, 30.0])
    )
    assert indefinite.statuses == [SolveStatus.NEGATIVE_CURVATURE, SolveStatus.CONVERGED]


def test_threads_do_not_change_a_bit() -> None:
    A, b = Stencil((300, 300)), rand(90_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(multishift_cg(A, b, SHIFTS, rtol=1e-6))
    torch.set_num_threads(before)
    assert torch.equal(results[0].x, results[1].x)


@pytest.mark.parametrize("schedule", range(3))
def test_emulator_schedules_give_one_answer(schedule: int) -> None:
    A, b = matrix(condition=50.0), rand(60)
    with emulated():
        backend().set_schedule(schedule)
        try:
            result = multishift_cg(A, b, SHIFTS, rtol=1e-9)
        finally:
            backend().set_schedule(0)
    torch.testing.assert_close(result.x, multishift_cg(A, b, SHIFTS, rtol=1e-9).x, rtol=1e-9, atol=1e-9)


def test_interrupt_in_a_callable() -> None:
    def product(v: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        multishift_cg(product, rand(4), SHIFTS)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_squares_that_leave_the_range_do_no_harm(scale: float) -> None:
    A, b = Stencil((12, 12), shift=1.0), rand(144)
    expected = multishift_cg(A, b, SHIFTS, rtol=1e-10)
    result = multishift_cg(A, b * scale, SHIFTS, rtol=1e-10)
    assert result.converged
    assert result.iterations == expected.iterations
    torch.testing.assert_close(result.x / scale, expected.x, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.residual_norms / scale, expected.residual_norms, rtol=0.1)
    absolute = multishift_cg(A, b * scale, SHIFTS, rtol=0.0, atol=1e-6 * scale)
    assert bool((absolute.residual_norms <= 1e-6 * scale).all())


def test_status_tells_of_the_true_residual() -> None:
    """A condition of 10^7 makes the recurrence drift away from the true residual."""
    A, b = matrix(condition=1e7), rand(60)
    shifts = torch.tensor([0.0, 1.0, 1e3], dtype=F64)
    target = 1e-10 * float(b.norm())
    by_recurrence = multishift_cg(lambda v: A @ v, b, shifts, rtol=1e-10, maxiter=5000)
    assert by_recurrence.converged  # it says
    true = [float((b - A @ x - s * x).norm()) for s, x in zip(shifts, by_recurrence.x, strict=True)]
    assert max(true) > target  # or this test shows nothing
    result = multishift_cg(A, b, shifts, rtol=1e-10, maxiter=5000)
    for shift, x, status, norm in zip(shifts, result.x, result.statuses, result.residual_norms, strict=True):
        assert norm == pytest.approx(float((b - A @ x - shift * x).norm()), rel=0.2)
        assert (norm <= target) == (status is SolveStatus.CONVERGED)
    assert result.residual_norms.max() < 10 * max(true)  # both are of the size of rounding
    assert result.iterations <= 4 * by_recurrence.iterations
    reachable = multishift_cg(A, b, shifts, rtol=2e-9, maxiter=5000)
    assert reachable.converged


def test_exceptions_of_a_callable_come_out() -> None:
    def product(v: Tensor) -> Tensor:
        raise RuntimeError("out of budget")

    with pytest.raises(RuntimeError, match="out of budget"):
        multishift_cg(product, rand(4), SHIFTS)


def test_nan_is_a_breakdown() -> None:
    result = multishift_cg(lambda v: v * torch.nan, rand(4), SHIFTS)
    assert set(result.statuses) == {SolveStatus.BREAKDOWN}


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"b": torch.ones(2, 3, dtype=F64)}, ValueError, "b: expected shape"),
        ({"b": torch.ones(3, dtype=torch.int64)}, TypeError, "float32 or float64"),
        ({"b": torch.tensor([1.0, torch.nan, 1.0], dtype=F64)}, ValueError, "finite"),
        ({"b": torch.ones(3)}, TypeError, "float32"),
        ({"shifts": torch.zeros(0)}, ValueError, "shifts"),
        ({"shifts": torch.tensor([torch.inf])}, ValueError, "finite"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"maxiter": -1}, ValueError, "maxiter"),
    ],
)
def test_bad_input_says_what_was_wrong(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"A": torch.eye(3, dtype=F64), "b": torch.ones(3, dtype=F64), "shifts": torch.ones(2)} | arguments
    with pytest.raises(error, match=match):
        multishift_cg(given.pop("A"), given.pop("b"), given.pop("shifts"), **given)
