"""Low-rank operators, systems that they shift, and Nyström sketches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from devices import home
from kantor import NumericalBreakdown
from kantor.linalg import Diagonal, LowRank, capped_cg, cg, nystrom

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rank", "n"), [(1, 1), (1, 20), (5, 20), (20, 20), (60, 20)])
def test_low_rank_equals_its_matrix(rank: int, n: int) -> None:
    F, w, x = rand(rank, n), rand(rank, seed=1), rand(3, n, seed=2)
    A = LowRank(F, w)
    dense = F.T @ torch.diag(w) @ F
    torch.testing.assert_close(A.dense(), dense)
    torch.testing.assert_close(A.matvec(x), x @ dense)
    torch.testing.assert_close(A.matvec(x[0]), dense @ x[0])
    torch.testing.assert_close(A.diagonal(), dense.diagonal())
    torch.testing.assert_close((A + Diagonal(x[0])).dense(), dense + torch.diag(x[0]))
    assert A.T is A
    assert A.to(torch.float32).dtype is torch.float32


@pytest.mark.parametrize(("rank", "n"), [(1, 20), (5, 20), (20, 20), (60, 20)])
@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("shift", [1e-3, 1.0, 1e3])
def test_shifted_solver_equals_a_dense_solve(rank: int, n: int, with_metric: bool, shift: float) -> None:
    A = LowRank(rand(rank, n), rand(rank, seed=1).abs())
    metric = rand(n, seed=3).abs() + 0.5 if with_metric else None
    B = torch.eye(n, dtype=F64) if metric is None else torch.diag(metric)
    b = rand(2, n, seed=4)
    x = A.shifted_solver(metric).solve(shift, b)
    matrix = A.dense() + shift * B
    residual = (x @ matrix - b).norm()
    assert residual <= 1e-12 * (matrix.norm() * x.norm() + b.norm())


def test_shifted_solver_tells_an_indefinite_matrix() -> None:
    A = LowRank(rand(2, 5), torch.tensor([1.0, -1.0], dtype=F64))
    lowest = torch.linalg.eigvalsh(A.dense())[0].abs()
    solver = A.shifted_solver()
    solver.solve(float(1.1 * lowest), rand(5))
    with pytest.raises(NumericalBreakdown, match="not positive definite"):
        solver.solve(float(0.9 * lowest), rand(5))


def test_low_rank_inside_solvers() -> None:
    A = LowRank(rand(4, 30)) + Diagonal(rand(30, seed=1).abs() + 1)
    b = rand(30, seed=2)
    torch.testing.assert_close(cg(A, b, rtol=1e-12).x, torch.linalg.solve(A.dense(), b), rtol=1e-9, atol=1e-9)
    d = capped_cg(A, b, damping=1e-3, rule="step", rtol=1e-9).d
    torch.testing.assert_close(
        d, -torch.linalg.solve(A.dense() + 2e-3 * torch.eye(30, dtype=F64), b), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(("rank", "n"), [(1, 5000), (9, 5000), (3, 40), (300, 40)])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_solvers_agree_on_every_device(device: str, dtype: torch.dtype, rank: int, n: int) -> None:
    """Both ways to read the factors: once for few columns, twice for many."""
    F, w, d, b = rand(rank, n), rand(rank, seed=1).abs(), rand(n, seed=2).abs() + 1, rand(2, n, seed=3)
    A = LowRank(F.to(home(device), dtype), w.to(home(device), dtype)) + Diagonal(d.to(home(device), dtype))
    right = b.to(home(device), dtype)
    exact = (b @ F.T * w) @ F + d * b
    size = exact.abs().max()
    torch.testing.assert_close(
        A.matvec(right).cpu().double(), exact, rtol=0, atol=float(size) * (1e-13 if dtype is F64 else 1e-5)
    )
    solution = cg(A, right, rtol=1e-10 if dtype is F64 else 1e-4).x
    residual = A.matvec(solution) - right
    assert residual.norm() <= (1e-9 if dtype is F64 else 1e-3) * right.norm()
    step = capped_cg(A, right, damping=0.1, rule="step").d
    assert (A.matvec(step) + 0.2 * step + right).norm() <= 0.01 * step.norm()
    M = LowRank(1e-3 * F.to(right), w.to(right)) + Diagonal(1 / d.to(right))
    preconditioned = cg(A, right, M=M, rtol=1e-4)
    assert preconditioned.converged


def test_threads_do_not_change_a_bit() -> None:
    before = torch.get_num_threads()
    for rank, n in ((2, 70_000), (4000, 60)):
        A, x = LowRank(rand(rank, n), rand(rank, seed=1)), rand(3, n, seed=2)
        products = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products.append(A.matvec(x))
        torch.set_num_threads(before)
        assert torch.equal(*products)


@pytest.mark.parametrize("rank", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 4095, 4097, 16_385])
def test_edges_of_blocks(device: str, rank: int, n: int) -> None:
    """Rows shorter and longer than eight, columns on either side of where the factors are read once, no factor."""
    F, w, x = rand(rank, n), rand(rank, seed=1), rand(2, n, seed=2)
    A = LowRank(F.to(home(device)), w.to(home(device)))
    torch.testing.assert_close(A.matvec(x.to(home(device))).cpu(), (x @ F.T * w) @ F, rtol=1e-11, atol=1e-10)
    total = 2.0 * A - Diagonal(x[0].to(home(device))) - 0.5 * A
    torch.testing.assert_close(
        total.matvec(x.to(home(device))).cpu(), 1.5 * (x @ F.T * w) @ F - x * x[0], rtol=1e-11, atol=1e-10
    )


def test_derivatives_with_respect_to_factors_and_weights() -> None:
    F, w, b = rand(3, 6).requires_grad_(), rand(3, seed=1).abs().requires_grad_(), rand(6, seed=2).requires_grad_()
    d = torch.full((6,), 2.0, dtype=F64)

    def product(F: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return LowRank(F, w).matvec(b)

    def solution(F: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return cg(LowRank(F, w) + Diagonal(d), b, rtol=1e-14).x

    for function in (product, solution):
        assert torch.autograd.gradcheck(function, (F, w, b), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (F, w, b))
        dense = torch.func.jacfwd(function)(F, w, b)
        torch.testing.assert_close(dense, torch.func.jacrev(function)(F, w, b))


@pytest.mark.parametrize(
    ("factors", "weights", "error", "match"),
    [
        ([[1.0]], None, TypeError, "torch.Tensor"),
        (torch.ones(3), None, ValueError, r"\(r, n\)"),
        (torch.ones(2, 3, dtype=torch.int64), None, TypeError, "float32 or float64"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"\(2,\)"),
        (torch.ones(2, 3), torch.ones(2, dtype=F64), TypeError, "float64"),
        (torch.full((2, 3), torch.nan), None, ValueError, "finite"),
    ],
)
def test_low_rank_refuses_bad_input(factors: Tensor, weights: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LowRank(factors, weights)


# --- Nyström ---


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    Q, _ = torch.linalg.qr(rand(len(values), len(values), seed=seed))
    return (Q * values) @ Q.T


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_full_sketch_inverts(damping: float) -> None:
    A = spectrum(torch.logspace(-1, 2, 40, dtype=F64))
    P = nystrom(A, 40, damping=damping)
    product = P.dense() @ (A + 2 * damping * torch.eye(40, dtype=F64))
    torch.testing.assert_close(product, (0.1 + 2 * damping) * torch.eye(40, dtype=F64), rtol=1e-6, atol=1e-8)
    assert P.n_hvp == 40


def test_sketch_is_positive_definite_whatever_the_matrix() -> None:
    for seed in range(20):
        R = rand(30, 30, seed=seed)
        for rank in (1, 7, 30):
            P = nystrom(R + R.T, rank, damping=0.01).dense()
            torch.testing.assert_close(P, P.T, rtol=1e-10, atol=1e-12)
            assert torch.linalg.eigvalsh(P)[0] > 0


def test_damping_changes_for_free() -> None:
    calls = 0
    A = spectrum(torch.logspace(-3, 3, 50, dtype=F64))

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    P = nystrom(product, 10, like=A[0], damping=1.0)
    other = P.with_damping(0.1)
    assert calls == P.n_hvp == 10
    torch.testing.assert_close(other.dense(), nystrom(A, 10, damping=0.1).dense())


def test_sketch_saves_iterations() -> None:
    A, b = spectrum(torch.logspace(4, -6, 200, dtype=F64)), rand(200)
    settings = {"damping": 1e-3, "rule": "step", "rtol": 1e-3, "max_iter": 5000}
    plain = capped_cg(A, b, **settings)
    sketched = capped_cg(A, b, **settings, M_inv=nystrom(A, 60, damping=1e-3))
    assert str(plain.status) == str(sketched.status) == "SOL"
    assert sketched.n_iter + 60 < plain.n_iter / 2
    torch.testing.assert_close(sketched.d, plain.d, rtol=1e-2, atol=1e-2 * float(plain.d.abs().max()))


def test_sketch_is_applied_natively_on_every_device(device: str) -> None:
    A = spectrum(torch.logspace(3, -2, 200, dtype=F64)).to(home(device))
    b = rand(2, 200).to(home(device))
    P = nystrom(A, 60, damping=1e-2)
    assert P.is_native
    weights = (P.values + 2e-2).min() / (P.values + 2e-2) - 1
    by_hand = b + (b @ P.basis * weights) @ P.basis.mT
    torch.testing.assert_close(P.matvec(b), by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(P.diagonal(), P.dense().diagonal())
    assert P.T is P
    A += 2e-2 * torch.eye(200).to(A)
    plain, sketched = cg(A, b, rtol=1e-8), cg(A, b, rtol=1e-8, M=P)
    by_function = cg(A, b, rtol=1e-8, M=lambda r: r + (r @ P.basis * weights) @ P.basis.mT)
    assert plain.converged
    assert sketched.converged
    assert sketched.iterations < plain.iterations / 2
    assert abs(sketched.iterations - by_function.iterations) <= 2
    single = P.to(torch.float32)
    assert single.matvec(b.float()).dtype is torch.float32
    torch.testing.assert_close(single.matvec(b.float()).double(), by_hand, rtol=1e-4, atol=1e-4)


def test_native_operators_are_sketched_in_one_product() -> None:
    A = LowRank(rand(20, 50), rand(20, seed=1).abs()) + Diagonal(torch.full((50,), 0.1, dtype=F64))
    at_once, one_by_one = nystrom(A, 12), nystrom(A.matvec, 12, like=A.diagonal())
    torch.testing.assert_close(at_once.dense(), one_by_one.dense(), rtol=1e-8, atol=1e-8)
    assert at_once.n_hvp == one_by_one.n_hvp == 12


@pytest.mark.parametrize(("rank", "damping", "match"), [(0, 0.0, "rank"), (6, 0.0, "rank"), (2, -1.0, "damping")])
def test_nystrom_refuses_bad_input(rank: int, damping: float, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nystrom(torch.eye(5), rank, damping=damping)


def test_nystrom_tells_nan() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        nystrom(lambda v: v * torch.nan, 3, like=torch.ones(5))
