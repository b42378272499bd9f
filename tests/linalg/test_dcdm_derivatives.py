"""Implicit derivatives of solutions by dcdm and fcg."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexible_reference import network
from kantor.linalg import CSR, Dense, Diagonal, LinearOperator, PoissonGrid, Stencil, cg, dcdm, fcg
from systems import F64, error, random, random_faces, spd

Build = Callable[..., LinearOperator]


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def symmetric_csr(values: Tensor) -> CSR:
    rows, cols = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 5, 5])
    index = torch.arange(6)
    all_rows, all_cols = torch.cat([index, rows, cols]), torch.cat([index, cols, rows])
    return CSR.from_coo(all_rows, all_cols, torch.cat([values[:6] + 4, 0.3 * values[6:], 0.3 * values[6:]]), (6, 6))


def families() -> dict[str, tuple[tuple[Tensor, ...], Build]]:
    flags = torch.full((3, 4), 2)
    flags[0, 1:3] = 3
    flags[2, 1] = 0
    faces = [torch.rand(n, generator=torch.Generator().manual_seed(k)).double() + 0.5 for k, n in enumerate((16, 15))]
    return {
        "dense": ((random(5, 5),), lambda W: Dense(W + W.mT + 8 * torch.eye(5, dtype=F64))),
        "csr": ((random(12),), symmetric_csr),
        "stencil": ((torch.tensor([1.0, 0.5], dtype=F64),), lambda w: Stencil((3, 4), weights=w, shift=0.3)),
        "faces": ((*random_faces((3, 4)),), lambda fy, fx: Stencil.from_faces((fy, fx), 0.5)),
        "diagonal": ((random(6),), lambda d: Diagonal(d.abs() + 1)),
        "voxels": (
            (faces[0].view(4, 4), faces[1].view(3, 5)),
            lambda cy, cx: PoissonGrid(flags, face_coef=(cy, cx)),
        ),
    }


METHODS: dict[str, Callable[..., Any]] = {
    "dcdm": lambda A, b: dcdm(A, b, network(b.shape[-1], gain=0.1), rtol=1e-13, k_prev=8),
    "dcdm, no map": lambda A, b: dcdm(A, b, lambda r: r * torch.nan, rtol=1e-13),
    "fcg": lambda A, b: fcg(A, b, "jacobi", rtol=1e-13),
}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(families()))
def test_first_derivatives(name: str, method: str) -> None:
    parameters, build = families()[name]
    n = build(*parameters).shape[0]
    b = random(2, n, seed=9)
    function = lambda b, *p: METHODS[method](build(*p), b).x  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves(b, *parameters), check_forward_ad=True, atol=1e-6, rtol=1e-4)


def test_same_gradient_as_conjugate_gradients() -> None:
    A = Stencil((12, 12))
    for solver in (lambda b: dcdm(A, b, lambda r: r, rtol=1e-12), lambda b: cg(A, b, rtol=1e-12)):
        (b,) = leaves(random(144))
        x = solver(b).x
        x.square().sum().backward()
        grad = b.grad
        assert grad is not None
        assert error(grad, cg(A, 2 * x.detach(), rtol=1e-12).x) < 1e-9


def test_callable_operators() -> None:
    (matrix, b) = leaves(spd(20), random(20))
    x = dcdm(lambda v: v @ matrix, b, torch.sign, rtol=1e-12, maxiter=500).x
    weights = random(20, seed=4)
    (x @ weights).backward()
    adjoint = torch.linalg.solve(matrix.detach(), weights)
    assert b.grad is not None
    assert matrix.grad is not None
    assert error(b.grad, adjoint) < 1e-8
    assert error(matrix.grad, -torch.outer(x.detach(), adjoint)) < 1e-8


def test_the_derivative_uses_the_map() -> None:
    A, (b,) = Stencil((12, 12)), leaves(random(144))
    calls = 0

    def f(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return r

    result = dcdm(A, b, f)
    assert calls == result.iterations
    result.x.sum().backward()
    assert calls > result.iterations + 5
    with torch.no_grad():
        assert not dcdm(A, b, f).x.requires_grad
    assert not dcdm(A, b.detach(), f).x.requires_grad


def test_forward_mode() -> None:
    A, b, tangent = Stencil((6, 6)), random(36), random(36, seed=2)
    with forward_ad.dual_level():
        x = dcdm(A, forward_ad.make_dual(b, tangent), torch.sign, rtol=1e-12).x
        dx = forward_ad.unpack_dual(x).tangent
    assert error(dx, cg(A, tangent, rtol=1e-12).x) < 1e-9


def test_an_inexact_derivative_warns() -> None:
    A, (b,) = Stencil((12, 12)), leaves(random(144))
    x0 = cg(A, b.detach(), rtol=1e-10).x
    x = dcdm(A, b, torch.sign, x0=x0, maxiter=2).x
    with pytest.warns(RuntimeWarning, match="dcdm: the solve for the derivative did not converge"):
        x.sum().backward()


def test_second_derivatives_are_refused() -> None:
    A, (b,) = Stencil((4, 4)), leaves(random(16))
    (gradient,) = torch.autograd.grad(dcdm(A, b, torch.sign).x.square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_matrix_that_is_not_symmetric_has_no_implicit_derivative() -> None:
    (b,) = leaves(random(10))
    matrix = spd(10)
    matrix[2, 3] += 1e-9  # too little for a probe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="not symmetric"):
            dcdm(matrix, b, torch.sign)
