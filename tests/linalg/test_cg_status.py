"""How a solve can end without a solution: what is said, what is returned, and that nothing is hidden."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from devices import home
from kantor import ConvergenceError, KantorError
from kantor.linalg import CSR, Callable, Dense, Diagonal, SolveResult, SolveStatus, Stencil, cg
from systems import F32, F64, csr_of, error, example_operators, expect, random, solve, spd, stencil_matrix


def assert_direction(result: SolveResult, A: Tensor, rtol: float = 1e-12) -> None:
    """The direction really has the curvature d'Ad / d'd that is reported."""
    assert result.direction is not None
    assert result.curvature is not None
    d, A = result.direction.detach().double().cpu().flatten(), A.double().cpu()
    assert float(d.norm()) > 0
    assert result.curvature == pytest.approx(float(d @ A @ d / (d @ d)), rel=rtol, abs=1e-15 * float(A.norm()))


# --- negative curvature ---


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("form", ["dense", "csr", "diagonal", "sum", "callable"])
def test_negative_curvature(form: str, dtype: torch.dtype, device: str) -> None:
    """One negative eigenvalue among many positive ones is found, and x is the last iterate before it."""
    d = torch.linspace(1, 10, 30, dtype=F64)
    d[7] = -2.0
    q = torch.linalg.qr(random(30, 30))[0] if form != "diagonal" else torch.eye(30, dtype=F64)
    matrix = q * d @ q.T
    matrix = ((matrix + matrix.T) / 2).to(home(device), dtype)
    forms: dict[str, Any] = {
        "dense": lambda: matrix,
        "csr": lambda: csr_of(matrix.cpu()) if device != "cuda" else CSR.from_any(matrix.to_sparse_csr()),
        "diagonal": lambda: Diagonal(matrix.diagonal().contiguous()),
        "sum": lambda: Dense(2 * matrix) - Dense(matrix),
        "callable": lambda: lambda x: x @ matrix,
    }
    b = random(30, dtype=dtype, device=home(device))
    result = expect("negative_curvature", lambda: cg(forms[form](), b, rtol=1e-10))
    assert_direction(result, matrix, 1e-9 if dtype is F64 else 1e-3)
    assert -2.01 <= result.curvature < 0  # type: ignore[operator]
    assert 0 < result.iterations < 30
    again = expect("maxiter", lambda: cg(forms[form](), b, rtol=0, maxiter=result.iterations))
    assert torch.equal(again.x, result.x)
    true = float((b.double() - matrix.double() @ result.x.double()).norm())
    assert result.residual_norm == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("curvature", [-1.0, -1e-12, -1e-200, -1e200])
def test_negative_curvature_in_the_first_iteration(curvature: float, device: str) -> None:
    A = torch.diag(torch.tensor([1.0, curvature], dtype=F64, device=home(device)))
    b = torch.tensor([0.0, 3.0], dtype=F64, device=home(device))
    result = expect("negative_curvature", lambda: cg(A, b))
    assert result.iterations == 0
    assert result.curvature == pytest.approx(curvature, rel=1e-14)
    assert torch.equal(result.direction, b)  # type: ignore[arg-type]
    assert not result.x.any()
    assert result.residual_norm == 3.0


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_tiny_negative_curvature_is_not_hidden(dtype: torch.dtype, device: str) -> None:
    """An eigenvalue of -1e-12 (-1e-5 in single precision) beside ones of size one is more than rounding."""
    small = -1e-12 if dtype is F64 else -1e-5
    A = torch.diag(torch.tensor([1.0, 2.0, small], dtype=dtype, device=home(device)))
    b = torch.ones(3, dtype=dtype, device=home(device))
    result = expect("negative_curvature", lambda: cg(A, b, rtol=1e-15))
    assert_direction(result, A, 1e-3)
    assert result.curvature == pytest.approx(small, rel=1e-3)
    assert result.iterations == 2


def test_negative_definite(device: str) -> None:
    A = Stencil((5, 6), device=home(device))
    b = random(5, 6, device=home(device))
    result = expect("negative_curvature", lambda: cg(-A, b))
    assert result.direction is not None
    assert result.direction.shape == b.shape
    assert_direction(result, -A.dense())
    assert result.iterations == 0


def test_negative_curvature_with_preconditioners() -> None:
    matrix = stencil_matrix((6, 6), (1.0, 1.0), ("dirichlet", "dirichlet"), -1.5)
    b = random(36)
    for M in (None, "jacobi", Diagonal(torch.full((36,), 0.3, dtype=F64)), lambda r: 2 * r):
        result = expect("negative_curvature", lambda M=M: cg(csr_of(matrix), b, M=M))
        assert_direction(result, matrix, 1e-10)


def test_negative_curvature_in_one_system_of_a_batch(device: str) -> None:
    """A is indefinite, but only one right-hand side meets the negative eigenvalue; the others are solved."""
    d = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=F64, device=home(device))
    b = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 2.0, 1.0, 3.0], [0.0, 5.0, 1.0, 0.0]], dtype=F64, device=home(device))
    result = expect("negative_curvature", lambda: cg(torch.diag(d), b, rtol=1e-12))
    assert [str(status) for status in result.per_system_status] == ["converged", "negative_curvature", "converged"]
    torch.testing.assert_close(result.x[[0, 2]], b[[0, 2]] / d, rtol=1e-12, atol=0)
    direction = result.direction
    assert direction is not None
    assert not direction[[0, 2]].any()
    curvature = float((direction[1] * d) @ direction[1] / (direction[1] @ direction[1]))
    assert curvature < 0
    assert result.curvature == pytest.approx(curvature, rel=1e-12)
    assert "1 of 3 systems failed" in result.message


def test_descent_direction() -> None:
    """In a minimisation of x'Ax/2 - b'x the direction goes downhill: d'b > 0."""
    A = spd(20) - 0.2 * torch.eye(20, dtype=F64)
    b = random(20)
    result = expect("negative_curvature", lambda: cg(A, b))
    direction = result.direction
    assert direction is not None
    assert float(direction @ (b - A @ result.x)) > 0
    assert float(direction @ b) > 0


# --- singular matrices ---


@pytest.mark.parametrize("M", [None, "jacobi"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("grid", [(8, 8), (16, 17), (5, 6, 7)])
def test_singular_and_consistent(grid: tuple[int, ...], dtype: torch.dtype, M: Any, device: str) -> None:
    """Pure Neumann with a right-hand side of mean zero: solved, up to the constant."""
    A = Stencil(grid, boundary="neumann", dtype=dtype, device=home(device))
    exact = random(*grid, device=home(device))
    b = A.to(F64).matvec(exact)
    b = (b - b.mean()).to(dtype)
    result = solve(A, b, M=M, rtol=1e-10 if dtype is F64 else 1e-4)
    x = result.x.double()
    assert error(x - x.mean(), exact - exact.mean()) < (1e-7 if dtype is F64 else 1e-2)


@pytest.mark.parametrize("M", [None, "jacobi"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("grid", [(8, 8), (16, 17), (40, 40), (5, 6, 7)])
def test_singular_and_inconsistent(grid: tuple[int, ...], dtype: torch.dtype, M: Any, device: str) -> None:
    """The commonest mistake with Neumann problems has a name of its own, and the direction is the null vector."""
    A = Stencil(grid, boundary="neumann", dtype=dtype, device=home(device))
    for form in (A, A.to_csr()):
        b = random(form.shape[0], dtype=dtype, device=home(device)) + 0.5
        result = expect("singular", lambda form=form, b=b: cg(form, b, M=M, rtol=1e-8 if dtype is F64 else 1e-4))
        assert result.iterations < form.shape[0]
        direction = result.direction
        assert direction is not None
        assert error(direction, direction.mean().expand_as(direction)) < (1e-4 if dtype is F64 else 0.05)
        assert abs(result.curvature or 0.0) < 100 * torch.finfo(dtype).eps
        assert "null space" in result.message


def test_singular_in_the_first_iteration(device: str) -> None:
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=F64, device=home(device)))
    result = expect("singular", lambda: cg(A, torch.tensor([0.0, 1.0], dtype=F64, device=home(device))))
    assert (result.iterations, result.curvature) == (0, 0.0)
    assert not result.x.any()
    expect("singular", lambda: cg(torch.zeros(3, 3, dtype=F64), torch.ones(3, dtype=F64)))


@pytest.mark.parametrize("rank", [1, 3, 15, 19])
def test_singular_dense(rank: int) -> None:
    factor = random(20, rank, seed=1)
    A = factor @ factor.T
    b = random(20)
    assert_direction(expect("singular", lambda: cg(A, b, rtol=1e-10)), A, 10)
    result = solve(A, A @ b, rtol=1e-9)
    assert error(A @ result.x, A @ b) < 1e-9


def test_singular_matrix_of_finite_elements() -> None:
    amg = pytest.importorskip("pyamg.gallery")
    A = CSR.from_any(amg.load_example("unit_square")["A"].tocsr())
    b = random(A.shape[0])
    expect("singular", lambda: cg(A, b + 1, rtol=1e-10))
    solve(A, A.matvec(b), rtol=1e-10)


@pytest.mark.parametrize("condition", [1e6, 1e10, 1e14])
def test_badly_scaled_is_not_singular(condition: float) -> None:
    """Tiny curvature alone proves nothing: these systems have solutions, and CG finds them."""
    d = torch.tensor([1.0, 1 / condition], dtype=F64)
    result = solve(Diagonal(d), torch.ones(2, dtype=F64), rtol=1e-8)
    assert error(result.x, 1 / d) < 1e-6
    tiny = solve(Diagonal(d[1:] * 1e-30), torch.ones(1, dtype=F64))
    assert tiny.x.item() == pytest.approx(1e30 * condition)


# --- rounding ---


def test_stagnation_in_single_precision(device: str) -> None:
    """A tolerance below the rounding level is given up soon, with a residual that could hardly be smaller."""
    A = Stencil((20, 20), dtype=F32, device=home(device))
    b = random(400, dtype=F32, device=home(device))
    result = expect("stagnated", lambda: cg(A, b, rtol=1e-12))
    assert result.iterations < 800
    assert result.relative_residual < 1e-5
    exact = torch.linalg.solve(A.to(F64).dense().cpu(), b.double().cpu())
    assert error(result.x, exact) < 1e-4
    assert "rounding level" in result.message


def test_converged_means_the_true_residual() -> None:
    """Where the recurrence drifts away from b - A x, it is the latter that counts."""
    for seed in range(5):
        A = spd(150, 1e7, seed).float()
        A = (A + A.T) / 2
        b = random(150, dtype=F32, seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = cg(A, b, rtol=3e-4, maxiter=20000)
        true = float((b.double() - A.double() @ result.x.double()).norm() / b.double().norm())
        assert result.relative_residual == pytest.approx(true, rel=1e-3)
        assert result.converged == (true <= 3e-4)


def test_breakdown(device: str) -> None:
    """NaN or infinity from user code."""
    b = torch.ones(4, dtype=F64, device=home(device))
    for bad in (float("nan"), float("inf")):
        calls = []

        def product(x: Tensor, bad: float = bad, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return (
                torch.where(torch.arange(4, device=x.device) == 2, bad, x)
                if len(calls) > 1
                else x * torch.arange(1, 5, device=x.device)
            )

        with torch.no_grad():
            result = expect("breakdown", lambda product=product: cg(product, b, rtol=1e-12))
        assert bool(torch.isfinite(result.x).all())
        with torch.no_grad():
            expect("breakdown", lambda bad=bad: cg(Stencil((2, 2), device=home(device)), b, M=lambda r: bad * r))


def test_overflow_inside_is_a_breakdown() -> None:
    A = Diagonal(torch.tensor([1e200, 2e200], dtype=F64))
    result = expect("breakdown", lambda: cg(A, torch.tensor([1.0, 1e120], dtype=F64)))
    assert "overflow" in result.message


@pytest.mark.parametrize(
    "M",
    [
        Diagonal(torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=F64)),
        Dense(torch.diag(torch.tensor([1.0, -5.0, 1.0, 1.0], dtype=F64))),
        lambda r: -r,
        lambda r: 0 * r,
        Callable(lambda r: r * torch.tensor([1.0, -5.0, 1.0, 1.0], dtype=F64), 4),
    ],
    ids=["diagonal", "dense", "negative", "zero", "callable"],
)
def test_indefinite_preconditioner(M: Any, device: str) -> None:
    if device == "cuda":
        pytest.skip("the preconditioners live on the CPU")
    b = torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=F64)
    result = expect("indefinite_preconditioner", lambda: cg(Stencil((2, 2)), b, M=M))
    assert result.iterations == 0
    assert "not positive definite" in result.message
    assert result.direction is None


def test_nonsymmetric_matrix_fails_with_the_reason() -> None:
    A = spd(10)
    A[2, 7] += 1.0
    b = random(10)
    for form in (A, csr_of(A), Dense(A) + Stencil((2, 5)), lambda x: x @ A.T):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"cg: A is not symmetric: .*symmetrise it as \(A \+ A.T\) / 2"),
        ):
            cg(form, b, rtol=1e-13, maxiter=50)
    with pytest.raises(ValueError, match=r"\|a_ij - a_ji\| = 1 at \((2, 7|7, 2)\)"):
        cg(A, b, rtol=1e-13, maxiter=50)
    assert cg(A, 0 * b).converged  # a solve that succeeds does not look


def test_sum_of_nonsymmetric_terms_may_be_symmetric() -> None:
    W = random(8, 8)
    parts = Dense(W) + Dense(W).T + csr_of(W) + csr_of(W).T + Diagonal(torch.full((8,), 30.0, dtype=F64))
    assert parts.asymmetry()[0] < 1e-14
    b = random(8).requires_grad_()
    solve(parts, b, rtol=1e-10).x.sum().backward()
    assert error(b.grad, torch.linalg.solve(parts.dense(), torch.ones(8, dtype=F64))) < 1e-8  # type: ignore[arg-type]
    with_callable = Dense(W) + Callable(lambda x: x @ W, 8) + Diagonal(torch.full((8,), 20.0, dtype=F64))
    assert with_callable.asymmetry()[0] < 1e-14
    assert (Dense(W) + Callable(lambda x: x, 8)).asymmetry()[0] > 1e-3


# --- what is done about it ---


def test_one_warning_and_check_raises() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = cg(Stencil((9, 9)), random(2, 81), maxiter=3)
    assert [(w.category, w.filename == __file__) for w in caught] == [(RuntimeWarning, True)]
    with pytest.raises(
        ConvergenceError, match="cg: 2 of 2 systems failed; the first: maxiter: .*raise maxiter"
    ) as raised:
        result.check()
    assert raised.value.result is result
    assert isinstance(raised.value, KantorError)
    assert isinstance(raised.value, RuntimeError)


def test_statuses_speak() -> None:
    for status in SolveStatus:
        assert str(status) == status.value == f"{status}"
        assert status == status.value
        assert len(status.advice) > 20
    assert {str(status) for status in SolveStatus} >= {
        "converged", "maxiter", "negative_curvature", "singular", "stagnated", "breakdown", "interrupted", "stopped",
    }  # fmt: skip


def test_printing_a_failure() -> None:
    result = expect("negative_curvature", lambda: cg(-Stencil((3, 3)), torch.ones(9, dtype=F64)))
    text = repr(result)
    assert "negative_curvature" in text
    assert "curvature        -" in text or "curvature" in text
    assert result.status.advice in text
    batch = expect("maxiter", lambda: cg(Stencil((9, 9)), random(2, 81), maxiter=3))
    assert "81 x 2 right-hand sides" in repr(batch)


def test_results_copy_and_pickle() -> None:
    results = [
        solve(example_operators()["csr"], random(2, 20)),
        expect("negative_curvature", lambda: cg(-Stencil((3, 3)), torch.ones(9, dtype=F64))),
    ]
    for result in results:
        for other in (pickle.loads(pickle.dumps(result)), copy.copy(result), copy.deepcopy(result)):
            assert torch.equal(other.x, result.x)
            assert repr(other) == repr(result)
            assert other.per_system_status == result.per_system_status
    with pytest.raises(AttributeError):
        results[0].x = results[1].x  # type: ignore[misc]
    with pytest.raises(ConvergenceError) as caught:
        results[1].check()
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert torch.equal(again.result.x, results[1].x)
