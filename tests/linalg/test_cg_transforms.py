"""Conjugate gradients under torch.func, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func

import kantor
from kantor.linalg import CSR, Dense, Diagonal, LinearOperator, SolveStatus, Stencil, cg
from kantor.linalg import Callable as CallableOperator
from systems import F32, F64, error, example_operators, random, random_faces, solve, spd

NATIVE = tuple(kind for kind, operator in example_operators().items() if operator.is_native)
TIGHT = {"rtol": 1e-13}


def solution(A: Any, b: Tensor, **options: Any) -> Tensor:
    return cg(A, b, **TIGHT, **options).x


# --- torch.func with respect to b ---


@pytest.mark.parametrize("M", [None, "jacobi", "ic0"])
@pytest.mark.parametrize("kind", NATIVE)
def test_vmap_is_the_loop(kind: str, M: str | None) -> None:
    A = example_operators()[kind]
    b = random(3, 20)
    expected = torch.stack([solution(A, row, M=M) for row in b])
    for dim in (0, 1):
        actual = torch.vmap(lambda row: solution(A, row, M=M), in_dims=dim)(b if dim == 0 else b.T.contiguous())
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    nested = torch.vmap(torch.vmap(lambda row: solution(A, row, M=M)))(b[None].expand(2, 3, 20))
    torch.testing.assert_close(nested, expected.expand(2, 3, 20), rtol=1e-10, atol=1e-12)


def test_vmap_over_starts_and_with_tolerances() -> None:
    A = Stencil((4, 5))
    b, x0 = random(20), random(3, 20, seed=1)
    actual = torch.vmap(lambda start: cg(A, b, start, rtol=0.0, maxiter=2).x)(x0)
    expected = torch.stack([torch.ops.kantor.cg(*A.encode(), [], [], [], b, start, 0.0, 0.0, 2)[0] for start in x0])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    loose = torch.vmap(lambda row: cg(A, row, rtol=0.0, atol=1e-2).x)(random(3, 20))
    assert bool(((random(3, 20) - A.matvec(loose)).norm(dim=-1) <= 1e-2).all())


def test_result_of_a_traced_solve_says_so() -> None:
    results: list[Any] = []

    def traced(row: Tensor) -> Tensor:
        results.append(cg(Stencil((4, 5)), row))
        return results[0].x

    torch.vmap(traced)(random(3, 20))
    assert results[0].status is SolveStatus.UNCHECKED
    assert not results[0].converged
    assert "only x is known" in results[0].message


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_vmap_of_any_size_of_numbers(dtype: torch.dtype) -> None:
    """Where no status can be looked at, tiny and huge right-hand sides must work all the more."""
    A = Stencil((4, 5), dtype=dtype)
    b = random(4, 20, dtype=dtype)
    scales = torch.tensor([1e-30, 1.0, 1e30, 0.0], dtype=dtype)[:, None]
    if dtype is F64:
        scales = scales**8
    x = torch.vmap(lambda row: cg(A, row, rtol=1e-6).x)(b * scales)
    assert not x[3].any()
    for k in range(3):
        assert error(A.matvec(x[k] / scales[k]), b[k]) < 1e-4


@pytest.mark.parametrize("kind", NATIVE)
def test_jacobians_and_hessians_in_b(kind: str) -> None:
    A = example_operators()[kind]
    b = random(20)
    inverse = torch.linalg.inv(A.dense())
    inverse = (inverse + inverse.T) / 2
    x = inverse @ b
    tolerance = {"rtol": 1e-8, "atol": 1e-9 * float(inverse.norm())}
    for jacobian in (func.jacrev, func.jacfwd):
        torch.testing.assert_close(jacobian(lambda b: solution(A, b))(b), inverse, **tolerance)
    hessian = func.hessian(lambda b: (solution(A, b) ** 3).sum())(b)
    expected = inverse @ torch.diag(6 * x) @ inverse
    torch.testing.assert_close(hessian, expected, rtol=1e-7, atol=1e-8 * float(expected.norm()))
    gradient = func.grad(lambda b: (solution(A, b) ** 2).sum())
    torch.testing.assert_close(gradient(b), 2 * inverse @ x, **tolerance)
    rows = random(3, 20)
    torch.testing.assert_close(torch.vmap(gradient)(rows), 2 * rows @ inverse @ inverse, rtol=1e-7, atol=1e-7)
    _, tangent = func.jvp(lambda b: solution(A, b), (b,), (rows[0],))
    torch.testing.assert_close(tangent, inverse @ rows[0], **tolerance)


# --- torch.func with respect to the operator ---


def parametrised() -> dict[str, tuple[Tensor, Callable[[Tensor], LinearOperator]]]:
    eye = torch.eye(6, dtype=F64)
    csr = Stencil((2, 3), shift=1.0).to_csr()
    fy, fx = random_faces((2, 3))
    return {
        "dense": (random(6, 6), lambda W: Dense(W + W.mT + 8 * eye)),
        "dense tensor": (random(6, 6), lambda W: W + W.mT + 8 * eye),  # type: ignore[dict-item,return-value]
        "csr": (random(1)[0].abs() + 1, lambda s: CSR(csr.crow, csr.col, s * csr.values, csr.shape)),
        "stencil": (torch.tensor([1.0, 2.0], dtype=F64), lambda w: Stencil((2, 3), weights=w)),
        "shift": (torch.tensor(0.5, dtype=F64), lambda s: Stencil((2, 3), boundary="neumann", shift=s)),
        "faces": (fy, lambda f: Stencil.from_faces((f, fx), 0.1)),
        "diagonal": (random(6).abs() + 1, Diagonal),
        "sum": (random(6).abs() + 1, lambda d: Stencil((2, 3)) + 2.0 * Diagonal(d)),
    }


@pytest.mark.parametrize("name", list(parametrised()))
def test_derivatives_in_the_operator(name: str) -> None:
    """grad, jacrev, jacfwd, hessian and vmap of them, against torch.linalg.solve."""
    parameter, build = parametrised()[name]
    b = random(6)

    def ours(p: Tensor) -> Tensor:
        return solution(build(p), b)

    def theirs(p: Tensor) -> Tensor:
        A = build(p)
        return torch.linalg.solve(A if isinstance(A, Tensor) else A.dense(), b)

    tolerance = {"rtol": 1e-7, "atol": 1e-9}
    with torch.no_grad():
        expected = func.jacrev(theirs)(parameter)
    torch.testing.assert_close(func.jacrev(ours)(parameter), expected, **tolerance)
    torch.testing.assert_close(func.jacfwd(ours)(parameter), expected, **tolerance)
    cubes = [lambda p, f=f: (f(p) ** 3).sum() for f in (ours, theirs)]
    torch.testing.assert_close(func.grad(cubes[0])(parameter), func.grad(cubes[1])(parameter), **tolerance)
    torch.testing.assert_close(func.hessian(cubes[0])(parameter), func.hessian(cubes[1])(parameter), **tolerance)
    many = torch.stack([parameter, 1.1 * parameter, 1.3 * parameter])
    torch.testing.assert_close(torch.vmap(ours)(many), torch.stack([theirs(p) for p in many]), **tolerance)
    gradients = torch.stack([func.grad(cubes[1])(p) for p in many])
    torch.testing.assert_close(torch.vmap(func.grad(cubes[0]))(many), gradients, **tolerance)


@pytest.mark.parametrize("M", ["jacobi"])
def test_vmap_over_matrices_and_right_hand_sides(M: str) -> None:
    A = torch.stack([spd(8, seed=k) for k in range(3)])
    b = random(3, 8)
    actual = torch.vmap(lambda A, b: solution(A, b, M=M))(A, b)
    assert error(actual, torch.linalg.solve(A, b)) < 1e-10


def test_storage_under_transforms() -> None:
    A = Stencil((4, 5))
    b = random(20)
    gradient = func.grad(lambda b: cg(A, b, rtol=1e-11, storage=F32).x.sum())(b)
    assert error(gradient, torch.linalg.inv(A.dense()).sum(0)) < 1e-9
    x = torch.vmap(lambda b: cg(A, b, rtol=1e-11, storage=F32).x)(b[None])
    assert error(x, torch.linalg.solve(A.dense(), b)) < 1e-9


def test_callables_do_not_go_with_torch_func() -> None:
    b = random(20)
    A = Stencil((4, 5))
    for form, M in ((lambda x: 2 * x, None), (CallableOperator(lambda x: 2 * x, 20), None), (A, lambda r: 1 * r)):
        with pytest.raises(TypeError, match="cg: inside torch.func operator and preconditioner must be native"):
            func.grad(lambda b, form=form, M=M: cg(form, b, M=M).x.sum())(b)
        with pytest.raises(TypeError, match="cg: inside torch.compile or torch.vmap .* must be native"):
            torch.vmap(lambda b, form=form, M=M: cg(form, b, M=M).x)(b[None])


def test_a_failing_solve_under_grad_warns() -> None:
    with pytest.warns(RuntimeWarning, match="maxiter"):
        func.grad(lambda b: cg(Stencil((9, 9)), b, maxiter=3).x.sum())(random(81))


# --- torch.compile ---


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "stencil": lambda: Stencil((4, 5)),
    "csr": lambda: Stencil((4, 5)).to_csr(),
    "dense": lambda: Dense(spd(20)),
    "diagonal": lambda: Diagonal(random(20).abs() + 1),
    "faces": lambda: Stencil.from_faces(random_faces((4, 5)), 0.1),
    "sum": lambda: Stencil((4, 5)) + 2.0 * Dense(spd(20)),
}


@pytest.mark.parametrize("M", [None, "jacobi operator", "ic0 operator"])
@pytest.mark.parametrize("kind", list(OPERATORS))
def test_compile_the_solver(kind: str, M: str | None) -> None:
    """kantor.linalg.cg itself, in one graph, forward and backward."""
    A = OPERATORS[kind]()
    preconditioner = {None: None, "jacobi operator": kantor.linalg.jacobi, "ic0 operator": kantor.linalg.ic0}[M]
    M_ = None if preconditioner is None else preconditioner(A)

    def loss(b: Tensor) -> Tensor:
        return (2 * cg(A, 3 * b, M=M_, rtol=1e-12).x ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    b = random(20).requires_grad_()
    for _ in range(2):
        expected, actual = (torch.autograd.grad(f(b), b)[0] for f in (loss, compiled))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(compiled(b), loss(b), rtol=1e-9, atol=1e-12)


def test_compile_with_parameters_of_the_operator() -> None:
    def loss(W: Tensor, b: Tensor) -> Tensor:
        return cg(Dense(W + W.mT + 20 * torch.eye(6, dtype=F64)), b, **TIGHT).x.square().sum()

    W, b = random(6, 6).requires_grad_(), random(6).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(W, b), (W, b)) for f in (compiled, loss))
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


def test_compile_follows_new_shapes() -> None:
    A = Stencil((4, 5))
    compiled = torch.compile(lambda b: cg(A, b, rtol=1e-12).x, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3, 7):
        b = random(batch, 20)
        assert error(compiled(b), solve(A, b, rtol=1e-12).x) < 1e-10


def test_compile_the_operators() -> None:
    """torch.ops.kantor.*, as graphs see them."""
    A = Stencil((4, 5)).to_csr()
    M = kantor.linalg.ic0(A)
    operands, layout, scales = A.encode()
    m_operands, m_layout, m_scales = M.encode()

    def work(b: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.kantor.matvec(operands, layout, scales, b)
        z = torch.ops.kantor.ic0_solve(m_operands, m_layout, y)
        x, _, info, _ = torch.ops.kantor.cg(
            operands, layout, scales, m_operands, m_layout, m_scales, y + z, None, 1e-12, 0.0, 100
        )
        return x, z, info[..., 0]

    b = random(2, 20)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(b), work(b), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_export() -> None:
    class Solver(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            A = Stencil((4, 5)).to_csr()
            self.crow, self.col = (torch.nn.Buffer(t) for t in (A.crow, A.col))
            self.values = torch.nn.Parameter(A.values)
            self.halo = A.halo

        def forward(self, b: Tensor) -> Tensor:
            operands = [self.crow, self.col, self.values]
            layout = [1, 20, 20, self.halo]
            x: Tensor = torch.ops.kantor.cg(operands, layout, [1.0], [], [], [], b, None, 1e-12, 0.0, 200)[0]
            return x

    b = random(3, 20)
    program = torch.export.export(Solver(), (b,))
    assert any(node.target is torch.ops.kantor.cg.default for node in program.graph.nodes)
    assert error(program.module()(b), torch.linalg.solve(Stencil((4, 5)).dense(), b.T).T) < 1e-10


def test_export_the_solver() -> None:
    class Solver(torch.nn.Module):
        def forward(self, b: Tensor) -> Tensor:
            return cg(Stencil((4, 5)), b, rtol=1e-12).x

    b = random(3, 20)
    program = torch.export.export(Solver(), (b,))
    assert error(program.module()(b), torch.linalg.solve(Stencil((4, 5)).dense(), b.T).T) < 1e-10


def test_fake_tensors_tell_shapes() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        b = torch.empty(3, 4, 5, dtype=F64)
        x = cg(Stencil((4, 5)), b).x
    assert (x.shape, x.dtype) == ((3, 4, 5), F64)
