"""Implicit derivatives of solutions: with respect to b and to all that an operator is made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable as CallableType
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from devices import home
from kantor.linalg import CSR, Callable, Dense, Diagonal, LinearOperator, Stencil, cg, ic0
from systems import F32, F64, csr_of, error, example_operators, expect, random, random_faces, solve, spd

RTOL = 1e-13
Build = CallableType[..., LinearOperator]


@dataclass(frozen=True)
class Family:
    """Operators that depend on parameters, symmetric positive definite for all of them."""

    parameters: tuple[Tensor, ...]
    build: Build


def symmetric_csr(lower: Tensor) -> CSR:
    """A matrix of pattern and diagonal dominance given, whose off-diagonal pairs share one parameter."""
    rows, cols = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 5, 5])
    index = torch.arange(6)
    all_rows, all_cols = torch.cat([index, rows, cols]), torch.cat([index, cols, rows])
    return CSR.from_coo(all_rows, all_cols, torch.cat([lower[:6], lower[6:], lower[6:]]), (6, 6))


def families() -> dict[str, Family]:
    eye = torch.eye(5, dtype=F64)
    csr = torch.cat([torch.full((6,), 4.0, dtype=F64), 0.3 * random(6)])
    d = random(6).abs() + 1
    return {
        "dense": Family((random(5, 5),), lambda W: Dense(W + W.mT + 8 * eye)),
        "csr": Family((csr,), symmetric_csr),
        "unsorted csr": Family(
            (torch.tensor([3.0, 0.5, 0.5, 1.0, 2.0], dtype=F64),),
            lambda v: CSR(torch.tensor([0, 3, 5]), torch.tensor([1, 0, 1, 1, 0]), torch.stack(
                [v[1], v[0], v[2], v[3] + v[4], v[1] + v[2]]), (2, 2)),
        ),
        "stencil 2-D": Family(
            (torch.tensor([1.0, 0.5], dtype=F64), torch.tensor(0.3, dtype=F64)),
            lambda w, s: Stencil((3, 4), weights=w, shift=s, boundary=("dirichlet", "neumann")),
        ),
        "stencil 3-D": Family(
            (torch.tensor([1.0, 0.5, 2.0], dtype=F64), torch.tensor(0.3, dtype=F64)),
            lambda w, s: Stencil((2, 3, 2), weights=w, shift=s, boundary=("neumann", "dirichlet", "neumann")),
        ),
        "one weight": Family((torch.tensor(1.5, dtype=F64),), lambda w: Stencil((3, 3), weights=w)),
        "faces 2-D": Family(
            (*random_faces((3, 4)), torch.tensor(0.5, dtype=F64)), lambda fy, fx, s: Stencil.from_faces((fy, fx), s)
        ),
        "faces 3-D": Family(
            (*random_faces((2, 1, 3)), torch.tensor(0.5, dtype=F64)), lambda *f: Stencil.from_faces(f[:3], f[3])
        ),
        "diagonal": Family((d,), Diagonal),
        "sum": Family(
            (csr, torch.tensor([1.0, 0.5], dtype=F64), d),
            lambda v, w, d: 0.5 * symmetric_csr(v) + 2.0 * (Stencil((2, 3), weights=w) + 0.25 * Diagonal(d)),
        ),
        "nonsymmetric terms": Family(
            (random(4, 4),), lambda W: Dense(W) + Dense(W).T + 8.0 * Dense(torch.eye(4, dtype=F64))
        ),
        "csr transposed": Family((csr,), lambda v: symmetric_csr(v).T),
    }  # fmt: skip


NAMES = tuple(families())


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def gradient_modes(second: bool = False) -> dict[str, Any]:
    if second:
        return {"check_fwd_over_rev": True, "check_batched_grad": True, "atol": 1e-4, "rtol": 1e-3}
    return {
        "check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True,
        "atol": 1e-6, "rtol": 1e-4,
    }  # fmt: skip


# --- against finite differences ---


@pytest.mark.parametrize("name", NAMES)
def test_first_derivatives(name: str) -> None:
    """Forward, reverse and batched, for two right-hand sides."""
    family = families()[name]
    n = family.build(*family.parameters).shape[0]
    inputs = leaves(random(2, n, seed=9), *family.parameters)
    function = lambda b, *parameters: solve(family.build(*parameters), b, rtol=RTOL).x  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, **gradient_modes())


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name: str) -> None:
    family = families()[name]
    n = family.build(*family.parameters).shape[0]
    inputs = leaves(random(n, seed=9), *family.parameters)
    function = lambda b, *parameters: solve(family.build(*parameters), b, rtol=RTOL).x  # noqa: E731
    assert torch.autograd.gradgradcheck(function, inputs, **gradient_modes(second=True))


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_products(name: str) -> None:
    """matvec is linear in the operator and in x."""
    family = families()[name]
    n = family.build(*family.parameters).shape[0]
    inputs = leaves(random(2, n, seed=9), *family.parameters)
    function = lambda x, *parameters: family.build(*parameters).matvec(x)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, **gradient_modes())
    assert torch.autograd.gradgradcheck(function, inputs, **gradient_modes(second=True))
    # Where a matrix came from: conversions are differentiable as well.
    for convert in (lambda A: A.dense(), lambda A: A.to_csr().dense(), lambda A: A.diagonal(), lambda A: A.T.dense()):
        assert torch.autograd.gradcheck(lambda *p, convert=convert: convert(family.build(*p)), inputs[1:])


@pytest.mark.parametrize("kind", ["dense", "csr"])
def test_derivatives_of_rectangular_products(kind: str) -> None:
    matrix = random(3, 5)
    if kind == "dense":
        inputs = leaves(random(2, 5), matrix)
        function: Any = lambda x, A: Dense(A).matvec(x)  # noqa: E731
    else:
        A = csr_of(matrix)
        inputs = leaves(random(2, 5), A.values)
        function = lambda x, values: CSR(A.crow, A.col, values, A.shape).matvec(x)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, **gradient_modes())
    assert torch.autograd.gradgradcheck(function, inputs)


# --- against torch.linalg.solve ---


@pytest.mark.parametrize(
    "options",
    [{}, {"M": "jacobi"}, {"M": "ic0"}, {"storage": F32}, {"M": lambda r: r / 2}, {"x0": True}],
    ids=["plain", "jacobi", "ic0", "float32 storage", "callable", "x0"],
)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_a_direct_solve(name: str, options: dict[str, Any], device: str) -> None:
    """The way to the solution, preconditioner, start and storage, leaves no trace in the gradient."""
    if device == "cuda":
        pytest.skip("the examples live on the CPU; see test_devices")
    family = families()[name]
    n = family.build(*family.parameters).shape[0]
    weights = random(3, n, seed=11)
    options = dict(options)
    if options.pop("x0", False):
        options["x0"] = random(3, n, seed=12).requires_grad_()
    inputs = leaves(random(3, n, seed=9), *family.parameters)
    result = solve(family.build(*inputs[1:]), inputs[0], rtol=1e-11, **options)
    actual = torch.autograd.grad((weights * result.x).sum(), inputs)
    x = torch.linalg.solve(family.build(*inputs[1:]).dense(), inputs[0].mT).mT
    expected = torch.autograd.grad((weights * x).sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert error(ours, theirs) < 1e-8
    assert "x0" not in options or options["x0"].grad is None


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_gradients_of_a_large_system(dtype: torch.dtype) -> None:
    """Above the size where threads share the work; bitwise the same in every run."""
    faces = [face.to(dtype) for face in random_faces((40, 30, 35))]
    b = random(40, 30, 35, dtype=dtype)
    runs = []
    for _ in range(2):
        inputs = leaves(b, *faces)
        result = solve(Stencil.from_faces(inputs[1:], 1.0), inputs[0], rtol=1e-12 if dtype is F64 else 1e-5)
        runs.append(torch.autograd.grad((result.x**2).sum(), inputs))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    # x = A(f)^-1 b is homogeneous: scaling faces and shift by 1 + e scales x by 1 / (1 + e).
    x = result.x.detach()
    slope = sum(float((grad * face).sum()) for grad, face in zip(runs[0][1:], faces, strict=True))
    shift = float(-(x * runs[0][0]).sum())  # d loss / d shift = -l'x
    assert slope + shift == pytest.approx(-2 * float((x**2).sum()), rel=1e-6 if dtype is F64 else 1e-3)


def test_gradient_of_grid_shaped_systems() -> None:
    b = random(2, 3, 4).requires_grad_()
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    solve(Stencil((3, 4), weights=w), b, rtol=RTOL).x.sum().backward()
    assert b.grad is not None
    assert b.grad.shape == b.shape
    assert w.grad is not None


def test_a_preconditioner_is_a_constant() -> None:
    family = families()["csr"]
    (values,) = leaves(*family.parameters)
    A = family.build(values)
    M = ic0(A)
    assert not any(t.requires_grad for t in M.encode().operands)
    assert not M.matvec(random(6)).requires_grad
    r = random(6).requires_grad_()
    assert torch.autograd.gradcheck(M.matvec, r, **gradient_modes())
    assert torch.autograd.gradgradcheck(M.matvec, r)


def test_no_gradient_where_none_is_wanted() -> None:
    b = random(20).requires_grad_()
    for kind, A in example_operators().items():
        with torch.no_grad():
            assert not solve(A, b, rtol=1e-8).x.requires_grad, kind
        assert not solve(A, b.detach(), rtol=1e-8).x.requires_grad, kind
        assert solve(A, b, rtol=1e-8).x.requires_grad, kind
    with torch.inference_mode():
        assert solve(Stencil((4, 5)), random(20)).x.is_inference()


def test_only_what_is_asked_for() -> None:
    W, b = leaves(random(5, 5), random(5))
    x = solve(Dense(W + W.T + 8 * torch.eye(5, dtype=F64)), b.detach(), rtol=RTOL).x
    assert torch.autograd.grad(x.sum(), W)[0].shape == (5, 5)
    result = solve(Dense((W + W.T).detach() + 8 * torch.eye(5, dtype=F64)), b, rtol=RTOL)
    assert torch.autograd.grad(result.x.sum(), b)[0].shape == (5,)
    assert not result.state["x0"].requires_grad
    assert not result.per_system_residual_norm.requires_grad


def test_gradients_accumulate_and_survive_retaining() -> None:
    (b,) = leaves(random(12))
    x = solve(Stencil((3, 4)), b, rtol=RTOL).x
    first = torch.autograd.grad(x.sum(), b, retain_graph=True)[0]
    x.sum().backward(retain_graph=True)
    x.sum().backward()
    assert b.grad is not None
    torch.testing.assert_close(b.grad, 2 * first)


def test_expanded_gradients() -> None:
    """sum() hands a gradient of stride zero to the adjoint solve."""
    (b,) = leaves(random(4, 12))
    x = solve(Stencil((3, 4)), b, rtol=RTOL).x
    (grad,) = torch.autograd.grad(x[:, :1].sum(), b, retain_graph=True)
    (summed,) = torch.autograd.grad(x.sum(), b)
    expected = torch.linalg.inv(Stencil((3, 4)).dense())
    torch.testing.assert_close(summed, expected.sum(0).expand(4, 12), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected[0].expand(4, 12), rtol=1e-10, atol=1e-12)


def test_scaled_systems_have_scaled_gradients() -> None:
    """The solve of b / 2^k behind the scenes is seen by no derivative."""
    A = Stencil((3, 4))
    for scale in (1e-200, 1e250):
        (b,) = leaves(random(12) * scale)
        (grad,) = torch.autograd.grad(solve(A, b, rtol=1e-12).x.sum(), b)
        expected = torch.linalg.inv(A.dense()).sum(0)
        assert error(grad, expected) < 1e-10


# --- forward mode ---


def test_dual_tensors() -> None:
    A = Stencil((3, 4))
    b, db = random(12), random(12, seed=1)
    with forward_ad.dual_level():
        result = solve(A, forward_ad.make_dual(b, db), rtol=RTOL)
        primal, tangent = forward_ad.unpack_dual(result.x)
    torch.testing.assert_close(primal, torch.linalg.solve(A.dense(), b))
    torch.testing.assert_close(tangent, torch.linalg.solve(A.dense(), db))
    assert "converged" in repr(result)


# --- Python operators: first order ---


def test_gradient_through_a_callable() -> None:
    """With respect to b and to whatever the function has captured."""
    W, b = leaves(random(5, 5), random(3, 5))
    shift = torch.tensor(8.0, dtype=F64, requires_grad=True)

    def product(x: Tensor) -> Tensor:
        return x @ (W + W.T) + shift * x

    for A in (product, Callable(product, 5), 2.0 * Callable(product, 5), Callable(product, 5) + Stencil((1, 5))):
        for M in (None, lambda r: r / 8):
            result = solve(A, b, rtol=1e-12, M=M)
            actual = torch.autograd.grad((result.x**2).sum(), (b, W, shift))
            matrix = W + W.T + shift * torch.eye(5, dtype=F64)
            if isinstance(A, LinearOperator) and not isinstance(A, Callable):
                matrix = 2 * matrix if len(getattr(A, "terms", ())) == 1 else matrix + Stencil((1, 5)).dense()
            x = torch.linalg.solve(matrix, b.T).T
            expected = torch.autograd.grad((x**2).sum(), (b, W, shift))
            for ours, theirs in zip(actual, expected, strict=True):
                assert error(ours, theirs) < 1e-8


def test_hessian_vector_products() -> None:
    """A Newton step by CG on autograd's own Hessian-vector products."""
    x = random(6).requires_grad_()
    target = random(6, seed=1)

    def loss(x: Tensor) -> Tensor:
        return ((x - target) ** 2).sum() + 0.1 * (x**4).sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    step = solve(
        lambda v: torch.autograd.grad(gradient, x, v, retain_graph=True)[0] if v.ndim == 1 else v,
        gradient.detach(), rtol=1e-12,
    ).x  # fmt: skip
    hessian = torch.autograd.functional.hessian(loss, x.detach())
    assert error(step, torch.linalg.solve(hessian, gradient.detach())) < 1e-10


def test_callable_is_first_order_only() -> None:
    (b,) = leaves(random(5))
    x = solve(lambda v: 2 * v, b, rtol=1e-12).x
    (grad,) = torch.autograd.grad((x**2).sum(), b, create_graph=True)
    assert error(grad, b / 2) < 1e-12
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- when it cannot be right ---


def test_a_gradient_needs_symmetry() -> None:
    A = spd(6)
    A[1, 4] += 1e-3
    b = random(6)
    assert cg(A, b, rtol=1e-2).converged
    for form in (A, csr_of(A), Dense(A) + Diagonal(torch.ones(6, dtype=F64)), lambda v: v @ A.T):
        with pytest.raises(ValueError, match="cg: A is not symmetric"):
            cg(form, b.clone().requires_grad_(), rtol=1e-2)
    W = A.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"cg: A is not symmetric: \|a_ij - a_ji\| = 0.001 at \((1, 4|4, 1)\)"):
        cg(W, b, rtol=1e-2)


def test_an_adjoint_that_does_not_converge_warns() -> None:
    A = Stencil((20, 20))
    b = A.matvec(torch.ones(400, dtype=F64)).requires_grad_()
    x = solve(A, b, torch.ones(400, dtype=F64), rtol=1e-12, maxiter=3).x
    with pytest.warns(RuntimeWarning, match="derivative did not converge"):
        x.square().sum().backward()
    result = expect("maxiter", lambda: cg(A, b, rtol=1e-12, maxiter=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result.x.sum().backward()


def test_results_and_inputs_written_to_before_backward() -> None:
    """The solution may be written to like any tensor; where a gradient still needs the old values, autograd notices."""
    b, w = leaves(random(12), torch.ones(2, dtype=F64))
    x = solve(Stencil((3, 4), weights=w), b, rtol=RTOL).x
    assert not x._is_view()
    y = x * 1
    y.mul_(2)
    (grad,) = torch.autograd.grad(y.sum(), b, retain_graph=True)
    assert error(grad, 2 * torch.linalg.inv(Stencil((3, 4)).dense()).sum(0)) < 1e-10
    x.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()
    changed = w * 1
    x = solve(Stencil((3, 4), weights=changed), b, rtol=RTOL).x
    changed.mul_(2)  # the operator has its own copy of the coefficients
    assert torch.autograd.grad(x.sum(), b)[0].isfinite().all()


def test_devices(device: str) -> None:
    """The whole chain, forward and backward, on the device."""
    d = home(device)
    b, W = leaves(random(8, device=d), random(8, 8, device=d))
    A = Dense(W + W.T + 12 * torch.eye(8, dtype=F64, device=d)) + Stencil((2, 4), device=d)
    grads = torch.autograd.grad((solve(A, b, rtol=1e-12, M="jacobi").x ** 2).sum(), (b, W))
    expected = torch.autograd.grad((torch.linalg.solve(A.dense(), b) ** 2).sum(), (b, W))
    assert all(error(*pair) < 1e-10 for pair in zip(grads, expected, strict=True))
