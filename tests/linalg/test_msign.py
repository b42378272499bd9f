"""Polar factors of batches of matrices: values, invariances, derivatives, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from kantor._ops import backend
from kantor.linalg import msign

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def normal(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed)).Q


def with_singular_values(values: Tensor, columns: int) -> Tensor:
    r = len(values)
    return orthogonal(r, 1) @ torch.diag(values) @ orthogonal(columns, 2)[:r]


SHAPES = [(1, 1), (3, 7), (9, 5), (17, 40), (64, 64), (33, 20), (70, 90)]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", SHAPES)
def test_more_steps_reach_the_exact_factor(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    A = normal(3, *shape, dtype=dtype)
    Q = msign(A.to(devices.home(device)), steps=14, dtype=dtype).cpu()
    eps = torch.finfo(dtype).eps
    smallest = torch.linalg.svdvals(A).min()
    condition = torch.linalg.matrix_norm(A).max() / smallest
    assert (Q - msign(A, method="svd")).abs().max() <= 20 * eps * condition + 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 2e-3), (F64, 2e-3), (BF16, 3e-2)])
@pytest.mark.parametrize("columns", [40, 100])
def test_polar_takes_relative_singular_values_to_one(columns: int, dtype: torch.dtype, tolerance: float) -> None:
    values = torch.logspace(-3, 0, 40, dtype=F64)
    A = with_singular_values(values, columns)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    started = S / (1.01 * torch.linalg.matrix_norm(A))
    Q = msign(A.to(F32) if dtype is BF16 else A.to(dtype), dtype=dtype).to(F64)
    factors = (U.mT @ Q @ Vh.mT).diagonal()
    assert (factors[started >= 1e-3] - 1).abs().max() <= tolerance


def test_wide_and_tall_agree_and_zero_stays_zero(device: str) -> None:
    A = normal(2, 6, 11, dtype=F32)
    A[1] = 0
    B = A.to(devices.home(device))
    wide, tall = msign(B).cpu(), msign(B.mT).cpu()
    assert torch.equal(wide, tall.mT)
    assert torch.equal(wide[1], torch.zeros(6, 11))
    assert torch.equal(msign(A[1], method="svd"), torch.zeros(6, 11))


@pytest.mark.parametrize("shape", [(16, 24), (70, 80)])
def test_a_batch_is_the_loop_bit_for_bit_and_threads_do_not_matter(shape: tuple[int, int]) -> None:
    A = normal(5, *shape, dtype=F32)
    whole = msign(A)
    assert torch.equal(whole, torch.stack([msign(one) for one in A]))
    if shape[0] > 64:
        return  # torch's own products
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, msign(A))
    finally:
        torch.set_num_threads(before)


def test_rotations_pass_through() -> None:
    B, Q, R = normal(12, 20), orthogonal(12, 3), orthogonal(20, 4)
    torch.testing.assert_close(msign(Q @ B @ R), Q @ msign(B) @ R, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon5_is_the_iteration_of_torch(shape: tuple[int, int]) -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz as peer

    A = normal(*shape, dtype=F32)
    theirs = peer(A, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = msign(A, method="muon5", dtype=BF16)
    assert (ours - theirs.float()).abs().max() <= 4 * torch.finfo(BF16).eps
    exact = msign(A, method="muon5")
    assert torch.linalg.svdvals(exact).min() > 0.6
    assert torch.linalg.svdvals(exact).max() < 1.2


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (2, 5, 3)])
def test_derivative_of_svd(shape: tuple[int, ...]) -> None:
    A = normal(*shape).requires_grad_()
    torch.autograd.gradcheck(lambda X: msign(X, method="svd"), A, check_forward_ad=True)


def test_derivative_where_singular_values_coincide() -> None:
    A = (2 * torch.eye(3, dtype=F64)).requires_grad_()
    torch.autograd.gradcheck(lambda X: msign(X, method="svd"), A)


def test_iterations_have_no_graph() -> None:
    assert not msign(normal(3, 4).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("A", "options", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "expected a torch.Tensor"),
        (torch.ones(3), {}, ValueError, r"shape \(\.\.\., r, c\)"),
        (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "float32"),
        (torch.full((2, 2), torch.nan), {}, ValueError, "finite"),
        (torch.ones(2, 2), {"method": "qr"}, ValueError, "polar, muon5, svd"),
        (torch.ones(2, 2), {"steps": 0}, ValueError, "from 1 to 32"),
        (torch.ones(2, 2), {"dtype": torch.int32}, TypeError, "bfloat16"),
        (torch.ones(2, 2), {"dtype": torch.float16}, ValueError, "CUDA"),
    ],
)
def test_bad_arguments(A: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        msign(A, **options)


@pytest.mark.parametrize("method", ["polar", "muon5", "svd"])
@pytest.mark.parametrize("shape", [(5, 7), (90, 70)])
def test_scale_does_not_matter(shape: tuple[int, int], method: str, device: str) -> None:
    """The squares of the last ones over- and underflow; 1e-41 is subnormal."""
    for dtype, scales in ((F32, (1e-41, 1e-30, 1e30)), (F64, (1e-300, 1e-200, 1e200))):
        A = normal(*shape, dtype=dtype).to(devices.home(device))
        expected = msign(A, method=method, dtype=dtype)
        tolerance = {F32: 1e-4, F64: 1e-10}[dtype]
        for scale in scales:
            Q = msign(A * scale, method=method, dtype=dtype)
            torch.testing.assert_close(Q, expected, rtol=0, atol=tolerance if scale > 1e-40 or dtype is F64 else 0.05)


def test_lower_rank_has_the_factor_of_its_own_space() -> None:
    x, y = normal(6, 1), normal(1, 9, seed=1)
    exact = x @ y / (x.norm() * y.norm())
    for method, tolerance in (("svd", 1e-14), ("polar", 2e-3)):
        torch.testing.assert_close(msign(x @ y, method=method), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("columns", "native"), [(448, True), (449, False)])
def test_the_limit_of_the_native_code_on_the_cpu(columns: int, native: bool) -> None:
    assert backend().msign_is_small(torch.empty(1, 64, columns)) is native
    A = normal(64, columns, dtype=F32)
    torch.testing.assert_close(msign(A, steps=10), msign(A, method="svd"), rtol=0, atol=1e-4)


def test_batching_compiling_and_operator_rules() -> None:
    A = normal(2, 4, 3)
    for method in ("polar", "svd"):
        batch = torch.vmap(lambda X, method=method: msign(X, method=method))(A)
        assert torch.equal(batch, msign(A, method=method))
    compiled: Any = torch.compile(lambda X: 2 * msign(X), backend="eager", fullgraph=True)
    assert torch.equal(compiled(A), 2 * msign(A))
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.kantor.msign.default, (A, "polar", None, None), test_utils=rules)


def test_derivatives_in_torch_func() -> None:
    A, E = normal(2, 4, 3), normal(2, 4, 3, seed=1)

    def along(X: Tensor, D: Tensor) -> Tensor:
        return (D * msign(X, method="svd")).sum()

    X = A.clone().requires_grad_()
    expected = torch.autograd.grad(along(X, E), X)[0]
    torch.testing.assert_close(torch.vmap(torch.func.grad(along))(A, E), expected)
    _, moved = torch.func.jvp(lambda X: msign(X, method="svd"), (A,), (E,))
    torch.testing.assert_close((moved * E).sum(), (expected * E).sum())
    torch.autograd.gradgradcheck(lambda X: msign(X, method="svd"), X)


def test_empty_batches() -> None:
    assert msign(torch.ones(0, 3, 4)).shape == (0, 3, 4)
    assert msign(torch.ones(2, 0, 4)).shape == (2, 0, 4)
