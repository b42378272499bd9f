"""Inputs that once gave a silent wrong answer, and what they must do."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from kantor.linalg import CSR, Callable, Dense, Diagonal, Stencil, cg
from systems import F64, expect, random, spd


@pytest.fixture
def system() -> tuple[Tensor, Tensor, Tensor]:
    S, b = spd(20), random(20)
    return S, b, torch.linalg.solve(S, b)


def test_lazily_negated_operands(system: tuple[Tensor, Tensor, Tensor]) -> None:
    S, b, _ = system
    d = torch._neg_view(torch.full((20,), 5.0, dtype=F64))  # what z.conj().imag is
    A = Dense(S + 10 * torch.eye(20, dtype=F64)) + Diagonal(d)
    x = torch.linalg.solve(S + 5 * torch.eye(20, dtype=F64), b)
    torch.testing.assert_close(cg(A, b, rtol=1e-12).x, x)
    torch.testing.assert_close(cg(A, b, M=lambda r: r / 5, rtol=1e-12).x, x)


@pytest.mark.parametrize("options", [{"M": lambda r: r / 3}, {"storage": torch.float32}])
def test_forward_mode_with_callables_and_refinement(system: tuple[Tensor, Tensor, Tensor], options: dict) -> None:
    S, b, _ = system
    tangent = random(20)
    with forward_ad.dual_level():
        x = cg(S, forward_ad.make_dual(b, tangent), rtol=1e-12, **options).x
        dx = forward_ad.unpack_dual(x).tangent
    torch.testing.assert_close(dx, torch.linalg.solve(S, tangent), rtol=1e-8, atol=1e-10)
    dS = torch.eye(20, dtype=F64)
    with forward_ad.dual_level():
        x = cg(forward_ad.make_dual(S, dS), b, rtol=1e-12, **options).x
        dx = forward_ad.unpack_dual(x).tangent
    torch.testing.assert_close(dx, -torch.linalg.solve(S, torch.linalg.solve(S, b)), rtol=1e-8, atol=1e-10)


def test_a_failed_adjoint_of_a_callable_warns(system: tuple[Tensor, Tensor, Tensor]) -> None:
    S, b, x = system
    b = b.clone().requires_grad_()
    solution = cg(lambda v: v @ S, b, x0=x, rtol=1e-8, maxiter=1).x
    with pytest.warns(RuntimeWarning, match="gradient is inexact"):
        solution.sum().backward()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rtol", [0.9, 1.0, 2.0])
def test_a_loose_tolerance_does_not_loosen_the_gradient(
    system: tuple[Tensor, Tensor, Tensor], rtol: float, native: bool
) -> None:
    S, b, x = system
    b = b.clone().requires_grad_()
    cg(S if native else lambda v: v @ S, b, x0=x, rtol=rtol).x.sum().backward()
    torch.testing.assert_close(b.grad, torch.linalg.solve(S, torch.ones(20, dtype=F64)), rtol=1e-3, atol=1e-6)


def test_nan_does_not_become_zero(system: tuple[Tensor, Tensor, Tensor]) -> None:
    S, b, _ = system
    bad = b.clone()
    bad[3] = torch.nan
    A = Dense(S)
    compiled = torch.compile(lambda v: cg(A, v).x, backend="eager", fullgraph=True)
    assert bool(compiled(bad).isnan().any())
    batch = torch.stack([b, bad])
    x = torch.vmap(lambda v: cg(A, v).x)(batch)
    assert bool(x[1].isnan().any())
    assert bool(x[0].isfinite().all())
    leaf = b.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cg(A, leaf).x.backward(bad)
    assert leaf.grad is not None
    assert bool(leaf.grad.isnan().any())


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_symmetry_is_looked_at_anew_after_a_change(system: tuple[Tensor, Tensor, Tensor], kind: str) -> None:
    S, b, _ = system
    b = b.clone().requires_grad_()
    values = torch.nn.Parameter(S.clone() if kind == "dense" else S.flatten().clone())
    crow, col = torch.arange(0, 401, 20), torch.arange(20).repeat(20)
    A = Dense(values) if kind == "dense" else CSR(crow, col, values, (20, 20))
    cg(A, b).x.sum().backward()
    values.data.view(20, 20)[0, 5] += 1  # what an optimiser does
    with pytest.raises(ValueError, match="not symmetric"):
        cg(A, b)
    values.data.view(20, 20)[0, 5] -= 1
    cg(A, b)


def test_a_solve_inside_an_operator_leaves_the_callback_alone(system: tuple[Tensor, Tensor, Tensor]) -> None:
    S, b, x = system
    inner = Dense(torch.eye(20, dtype=F64) * 2)

    def product(v: Tensor) -> Tensor:
        leaf = torch.ones(20, dtype=F64, requires_grad=True)
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(cg(inner, leaf).x.sum(), leaf)
        return (v @ S) * 2 * grad

    seen: list[int] = []
    result = cg(product, b, rtol=1e-10, callback=lambda info: seen.append(info.iteration))
    torch.testing.assert_close(result.x, x)
    assert seen == list(range(1, result.iterations + 1))


def test_a_callable_that_reuses_its_output(system: tuple[Tensor, Tensor, Tensor]) -> None:
    S, b, x = system
    buffer = torch.empty(20, dtype=F64)
    torch.testing.assert_close(cg(lambda p: buffer.copy_(p @ S), b, rtol=1e-12).x, x)
    assert Callable(lambda p: buffer.copy_(p @ S), 20).asymmetry()[0] < 1e-14


def test_an_absolute_tolerance_covers_tiny_right_hand_sides(device: str) -> None:
    A = spd(20)
    b = torch.stack([random(20), random(20) * 1e-150])
    if device != "cuda":
        result = cg(A, b, rtol=0.0, atol=1e-8)
        assert result.converged
        assert not result.x[1].any()


def test_numpy_scalars_are_numbers(system: tuple[Tensor, Tensor, Tensor]) -> None:
    S, b, _ = system
    assert cg(S, b, rtol=np.float32(1e-3), maxiter=10**20).converged  # type: ignore[arg-type]
    expect_stop = cg(S, b, callback=lambda info: np.float64(info.residual_norm) < np.inf)  # type: ignore[arg-type, return-value]
    assert str(expect_stop.status) == "stopped"
    assert expect_stop.iterations == 1


def test_sums_take_grid_vectors() -> None:
    A = Stencil((5, 4))
    u = random(2, 5, 4)
    torch.testing.assert_close((2.0 * A + Diagonal(torch.ones(20, dtype=F64))).matvec(u), 2 * A.matvec(u) + u)
    with pytest.raises(ValueError, match="shape"):
        (A + Stencil((2, 10))).matvec(u)


def test_zero_curvature_of_an_indefinite_matrix_is_not_called_semidefinite() -> None:
    A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)
    result = expect("singular", lambda: cg(A, torch.tensor([1.0, 0.0], dtype=F64)))
    assert "indefinite" in result.message
    assert result.curvature == 0
