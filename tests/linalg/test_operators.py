"""Every form of operator against its dense matrix: products, transposes, diagonals, conversions, algebra."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from devices import home
from kantor.linalg import CSR, Callable, Dense, Diagonal, LinearOperator, Stencil, as_operator
from op_checks import same_bits, threads
from systems import (
    BOUNDARIES,
    F32,
    F64,
    KINDS,
    NATIVE_KINDS,
    csr_of,
    example_operators,
    face_matrix,
    random,
    random_faces,
    sparse,
    stencil_matrix,
)

DTYPES = (F64, F32)


def assert_product(
    operator: LinearOperator, matrix: Tensor, batch: tuple[int, ...] = (), sizes: Tensor | None = None
) -> None:
    """A x within rounding of the exact product: an error of a few eps |A| |x| in every entry.

    `sizes` stands in for |A| where its entries are differences of larger terms.
    """
    x = random(*batch, operator.shape[1], seed=7, dtype=operator.dtype, device=operator.device.type)
    actual = operator.matvec(x)
    assert actual.shape == (*batch, operator.shape[0])
    assert actual.dtype == operator.dtype
    exact, vectors = matrix.double().cpu(), x.double().cpu()
    magnitude = exact.abs() if sizes is None else sizes
    allowed = 16 * torch.finfo(operator.dtype).eps * (vectors.abs() @ magnitude.T) + 1e-300
    assert bool(((actual.double().cpu() - vectors @ exact.T).abs() <= allowed).all())


def assert_agrees(operator: LinearOperator, matrix: Tensor, sizes: Tensor | None = None) -> None:
    """All that an operator offers, against its matrix; conversions are exact up to one rounding per entry."""
    matrix = matrix.cpu()
    tolerance = {"rtol": 16 * torch.finfo(operator.dtype).eps, "atol": 16 * torch.finfo(operator.dtype).eps}
    expected = matrix.to(operator.dtype)
    assert operator.shape == tuple(matrix.shape)
    for batch in ((), (1,), (3,), (2, 3), (0,)):
        assert_product(operator, matrix, batch, sizes)
    torch.testing.assert_close(operator.dense().cpu(), expected, **tolerance)
    if not operator.is_native:
        return
    if matrix.shape[0] == matrix.shape[1]:
        torch.testing.assert_close(operator.diagonal().cpu(), expected.diagonal(), **tolerance)
    torch.testing.assert_close(operator.to_csr().dense().cpu(), expected, **tolerance)
    assert_product(operator.to_csr(), matrix, (), sizes)
    assert_product(operator.T, matrix.T, (), sizes)
    torch.testing.assert_close(operator.T.T.dense().cpu(), expected, **tolerance)
    x = random(operator.shape[1], 3, dtype=operator.dtype, device=operator.device.type)
    torch.testing.assert_close(operator @ x, operator.matvec(x.T).T)
    torch.testing.assert_close(operator @ x[:, 0], operator.matvec(x[:, 0]))


# --- forms ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 2), (7, 7), (5, 9), (9, 5), (1, 4), (4, 1), (40, 70), (0, 0), (3, 0), (0, 3)]
)
def test_dense(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    matrix = random(*shape, dtype=dtype, device=home(device))
    assert_agrees(Dense(matrix), matrix)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (9, 9), (30, 11), (11, 30), (80, 80), (0, 0), (3, 0), (0, 3)])
def test_csr(shape: tuple[int, int], dtype: torch.dtype, index: torch.dtype, device: str) -> None:
    matrix = sparse(*shape).to(dtype)
    operator = csr_of(matrix, index)
    on_device = [t.to(home(device)) for t in (operator.crow.to(index), operator.col.to(index), operator.values)]
    assert_agrees(CSR(*on_device, shape), matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 7), (7, 1), (5, 6)])
def test_stencil_2d(grid: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    for boundary in product(BOUNDARIES, repeat=2):
        operator = Stencil(grid, weights=(1.5, 0.25), boundary=boundary, shift=0.5, dtype=dtype, device=home(device))
        sizes = stencil_matrix(grid, (1.5, 0.25), ("dirichlet",) * 2, 0.5).abs()
        assert_agrees(operator, stencil_matrix(grid, (1.5, 0.25), boundary, 0.5), sizes)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 2), (3, 1, 4), (3, 4, 5)])
def test_stencil_3d(grid: tuple[int, int, int], device: str) -> None:
    for number, boundary in enumerate(product(BOUNDARIES, repeat=3)):
        dtype = DTYPES[number % 2]
        weights, shift = (1.5, 0.25, 3.0), -0.5
        operator = Stencil(grid, weights=weights, boundary=boundary, shift=shift, dtype=dtype, device=home(device))
        sizes = stencil_matrix(grid, weights, ("dirichlet",) * 3, abs(shift)).abs()
        assert_agrees(operator, stencil_matrix(grid, weights, boundary, shift), sizes)


def test_stencil_defaults() -> None:
    matrix = stencil_matrix((3, 4), (1.0, 1.0), ("dirichlet", "dirichlet"), 0.0)
    assert Stencil((3, 4)).dtype is F64
    torch.testing.assert_close(Stencil((3, 4)).dense(), matrix)
    torch.testing.assert_close(Stencil((3, 4), weights=torch.tensor(2.0, dtype=F32)).dense(), 2 * matrix.float())
    neumann = Stencil((3, 4), boundary="neumann")
    torch.testing.assert_close(neumann.matvec(torch.ones(3, 4, dtype=F64)), torch.zeros(3, 4, dtype=F64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (4, 5), (1, 1, 1), (2, 1, 2), (1, 2, 1), (3, 4, 5)])
def test_faces(grid: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    faces = [face.to(home(device), dtype) for face in random_faces(grid)]
    shift = torch.tensor(0.75, dtype=dtype, device=home(device))
    assert_agrees(Stencil.from_faces(faces, shift), face_matrix(faces, 0.75))


def test_unit_faces_are_the_constant_stencil(device: str) -> None:
    grid = (3, 4, 5)
    shapes = [[n + (a == axis) for a, n in enumerate(grid)] for axis in range(3)]
    faces = [torch.ones(shape, dtype=F64, device=home(device)) for shape in shapes]
    stencil = Stencil(grid, device=home(device))
    assert_product(Stencil.from_faces(faces), stencil.dense())
    for axis, face in enumerate(faces):  # zero on the border: Neumann
        face.narrow(axis, 0, 1).zero_()
        face.narrow(axis, grid[axis], 1).zero_()
    assert_product(Stencil.from_faces(faces), Stencil(grid, boundary="neumann", device=home(device)).dense())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 33])
def test_diagonal(n: int, dtype: torch.dtype, device: str) -> None:
    d = random(n, dtype=dtype, device=home(device))
    assert_agrees(Diagonal(d), torch.diag(d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_callable(dtype: torch.dtype, device: str) -> None:
    matrix = random(6, 6, dtype=dtype, device=home(device))
    operator = Callable(lambda x: x @ matrix.mT, 6, dtype=dtype, device=home(device), transpose=lambda x: x @ matrix)
    assert_agrees(operator, matrix)
    assert_product(operator.T, matrix.mT)
    assert not operator.is_native


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_symmetric(kind: str, device: str) -> None:
    operator = example_operators(device=home(device))[kind]
    assert_agrees(operator, operator.dense().detach())
    assert operator.asymmetry()[0] < 1e-14
    torch.testing.assert_close(operator.T.dense(), operator.dense(), rtol=1e-13, atol=1e-13)


# --- algebra ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_algebra(dtype: torch.dtype, device: str) -> None:
    """Sums of all forms, nested, scaled, negated and transposed; general matrices where the form allows."""
    d = home(device)
    stencil = Stencil((3, 4), weights=(1.0, 2.0), boundary=("neumann", "dirichlet"), dtype=dtype, device=d)
    faces = Stencil.from_faces([face.to(d, dtype) for face in random_faces((3, 4))])
    dense, diagonal = random(12, 12, dtype=dtype, device=d), random(12, seed=1, dtype=dtype, device=d)
    other = sparse(12, 12).to(dtype)
    csr = csr_of(other, torch.int32)
    csr = CSR(csr.crow.to(d), csr.col.to(d), csr.values.to(d), csr.shape)
    S, F, D, C = (t.double().cpu() for t in (stencil.dense(), faces.dense(), dense, other))
    G = torch.diag(diagonal).double().cpu()
    cases: list[tuple[LinearOperator, Tensor]] = [
        (-stencil, -S),
        (2 * csr, 2 * C),
        (csr * 0.5, 0.5 * C),
        (0 * Dense(dense), 0 * D),
        (stencil + faces, S + F),
        (stencil - csr, S - C),
        (Dense(dense) + Diagonal(diagonal) + stencil + faces + csr, D + G + S + F + C),
        (2 * (csr + 3 * (Dense(dense) - stencil)) - 4 * Diagonal(diagonal), 2 * (C + 3 * (D - S)) - 4 * G),
        ((csr - Dense(dense)).T, (C - D).T),
        (-(-(csr.T + stencil)), C.T + S),  # noqa: B002 (twice the unary minus)
        (csr - csr, 0 * C),
    ]
    for operator, matrix in cases:
        assert operator.is_native
        assert_agrees(operator, matrix)


def test_sum_of_many_terms(device: str) -> None:
    """More terms than one kernel argument holds."""
    terms = [Diagonal(random(10, seed=k, device=home(device))) for k in range(11)]
    total = terms[0] + terms[1]
    for term in terms[2:]:
        total = total + term
    expected = torch.diag(torch.stack([term.values for term in terms]).sum(0))
    torch.testing.assert_close(total.dense(), expected)


def test_sum_with_a_callable() -> None:
    stencil = Stencil((3, 4))
    mixed = 2.0 * stencil - Callable(lambda x: 3 * x, 12, transpose=lambda x: 3 * x)
    assert not mixed.is_native
    assert_product(mixed, 2 * stencil.dense() - 3 * torch.eye(12, dtype=F64), (2,))
    assert_product(mixed.T, 2 * stencil.dense() - 3 * torch.eye(12, dtype=F64))


def test_sums_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: \(12, 12\) and \(3, 3\)"):
        Stencil((3, 4)) + Diagonal(torch.ones(3, dtype=F64))
    with pytest.raises(TypeError, match=r"float64[\s\S]*float32[\s\S]*dtype"):
        Stencil((3, 4)) + Stencil((3, 4), dtype=F32)
    for wrong in (torch.ones(12, 12), 3.0):
        with pytest.raises(TypeError):
            Stencil((3, 4)) + wrong  # type: ignore[operator]
    with pytest.raises(TypeError, match="Python number"):
        Stencil((3, 4)) * torch.tensor(2.0)  # type: ignore[operator]


# --- vectors ---


def test_grid_shaped_vectors() -> None:
    stencil = Stencil((2, 3, 4))
    x = random(5, 2, 3, 4)
    flat = stencil.matvec(x.reshape(5, 24))
    assert torch.equal(stencil.matvec(x), flat.reshape(5, 2, 3, 4))
    assert torch.equal(stencil.matvec(x[0]), flat[0].reshape(2, 3, 4))


def test_matmul_takes_columns_and_nothing_else() -> None:
    stencil = Stencil((4, 4), weights=(1.0, 10.0))
    X = random(16, 3)
    torch.testing.assert_close(stencil @ X, stencil.dense() @ X)
    for wrong in (random(4, 4), random(3, 16), random(2, 16, 3), random(15), torch.tensor(1.0, dtype=F64)):
        with pytest.raises(ValueError, match=r"A @ x"):
            stencil @ wrong


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_layout_of_the_vector_does_not_matter(kind: str, device: str) -> None:
    operator = example_operators(device=home(device))[kind]
    x = random(4, 20, device=home(device))
    expected = operator.matvec(x)
    padded = torch.stack([x, x], -1)[..., 0]
    assert not padded.is_contiguous()
    for view in (padded, x.T.contiguous().T, torch._neg_view(-x)):
        assert torch.equal(operator.matvec(view), expected)
    assert torch.equal(operator.matvec(x[:1].expand(4, 20)), expected[:1].expand(4, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_batches_change_no_bit(dtype: torch.dtype) -> None:
    """Above the serial threshold, with one to four threads, one by one and as a batch."""
    grid = (33, 34, 35)
    stencil = Stencil(grid, weights=(1.0, 2.0, 3.0), boundary=("neumann", "dirichlet", "neumann"), dtype=dtype)
    faces = Stencil.from_faces([face.to(dtype) for face in random_faces(grid)])
    n = stencil.shape[0]
    operators = [stencil, faces, stencil.to_csr(), Diagonal(random(n, dtype=dtype)), 2 * stencil - faces]
    operators.append(Dense(random(300, 400, dtype=dtype)))
    for operator in operators:
        x = random(3, operator.shape[1], dtype=dtype)
        results = []
        for count in (1, 2, 3, 4):
            with threads(count):
                results.append(operator.matvec(x))
        results.append(torch.stack([operator.matvec(row) for row in x]))
        assert all(same_bits([results[0]], [other]) for other in results[1:]), operator


@pytest.mark.parametrize("kind", KINDS)
def test_bad_vectors(kind: str) -> None:
    operator = example_operators()[kind]
    for wrong in (random(19), random(20, 1), random(20, 2), random(0), torch.tensor(1.0, dtype=F64)):
        with pytest.raises(ValueError, match=r"matvec: x: expected shape \(\.\.\., 20\), got \("):
            operator.matvec(wrong)
    with pytest.raises(TypeError, match=r"matvec: the operator is float64, x is float32; convert"):
        operator.matvec(random(20, dtype=F32))
    for dtype in (torch.float16, torch.int64, torch.complex128):
        with pytest.raises(TypeError, match=rf"matvec: x: expected dtype float32 or float64, got {str(dtype)[6:]}"):
            operator.matvec(torch.ones(20, dtype=dtype))
    with pytest.raises(ValueError, match=r"matvec: the operator is on cpu, x on meta"):
        operator.matvec(torch.ones(20, dtype=F64, device="meta"))
    with pytest.raises(TypeError, match=r"matvec: x: expected a torch.Tensor, got ndarray"):
        operator.matvec(np.ones(20))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"matvec: x: expected a dense tensor, got layout torch.sparse_coo"):
        operator.matvec(random(20).to_sparse())


# --- conversions ---


@pytest.mark.parametrize("kind", KINDS)
def test_to_scipy(kind: str) -> None:
    sla = pytest.importorskip("scipy.sparse.linalg")
    operator = example_operators()[kind]
    matrix = operator.dense()
    other = sla.aslinearoperator(operator.to_scipy())
    x = random(20, 3).numpy()
    np.testing.assert_allclose(other.matvec(x[:, 0]), matrix.numpy() @ x[:, 0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(other.matmat(x), matrix.numpy() @ x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(other.rmatvec(x[:, 0]), matrix.numpy().T @ x[:, 0], rtol=1e-12, atol=1e-12)
    back = as_operator(other)
    assert_product(back, matrix, (2,))
    assert_product(back.T, matrix.T)


def test_to_scipy_of_a_rectangle_and_of_single_precision() -> None:
    pytest.importorskip("scipy")
    matrix = random(3, 5, dtype=F32)
    other = Dense(matrix).to_scipy()
    assert (other.shape, other.dtype) == ((3, 5), np.dtype("float32"))
    np.testing.assert_allclose(other.matvec(np.ones(5)), matrix.sum(1).numpy(), rtol=1e-6)
    np.testing.assert_allclose(other.rmatvec(np.ones(3)), matrix.sum(0).numpy(), rtol=1e-5)
    assert csr_of(matrix).to_scipy().dtype == np.dtype("float32")


@pytest.mark.parametrize("kind", KINDS)
def test_change_of_dtype(kind: str) -> None:
    operator = example_operators()[kind]
    single = operator.to(F32)
    assert (single.dtype, single.shape, single.is_native) == (F32, operator.shape, operator.is_native)
    torch.testing.assert_close(single.dense(), operator.dense().float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.T.dense(), operator.T.dense().float(), rtol=1e-5, atol=1e-5)
    assert operator.dtype is F64


def test_as_operator() -> None:
    matrix = random(4, 4)
    stencil = Stencil((2, 2))
    assert as_operator(stencil) is stencil
    assert isinstance(as_operator(matrix), Dense)
    for form in (matrix.to_sparse(), matrix.to_sparse_csr()):
        operator = as_operator(form)
        assert isinstance(operator, CSR)
        torch.testing.assert_close(operator.dense(), matrix)
    operator = as_operator(lambda x: 2 * x, like=torch.ones(3, 7, dtype=F32))
    assert (operator.shape, operator.dtype) == ((7, 7), F32)
    with pytest.raises(TypeError, match=r"as_operator: a bare callable has no size; wrap it"):
        as_operator(lambda x: x)
    for wrong in (3, "A", None, np.eye(2), [[1.0]]):
        with pytest.raises(TypeError, match=r"as_operator: A: expected .*, got"):
            as_operator(wrong)


def test_what_an_operator_does_not_know() -> None:
    operator: Any = Callable(lambda x: x, 3)
    with pytest.raises(TypeError, match="no transpose; pass transpose="):
        operator.T  # noqa: B018
    for method in (operator.diagonal, operator.to_csr, operator.encode):
        with pytest.raises(TypeError, match="Callable"):
            method()
    with pytest.raises(TypeError, match="expected a callable, got int"):
        Callable(3, 3)  # type: ignore[arg-type]
    for wrong in (lambda x: x[..., :1], lambda x: x.numpy()):
        with pytest.raises(ValueError, match=r"Callable: fn returned .*, expected a tensor of shape \(3,\)"):
            Callable(wrong, 3).matvec(torch.ones(3, dtype=F64))
    with pytest.raises(TypeError, match=r"Callable: fn returned torch.float32"):
        Callable(lambda x: x.float(), 3).matvec(torch.ones(3, dtype=F64))


def test_printing() -> None:
    assert repr(Stencil((2, 3))) == "Stencil(6 x 6, float64, cpu)"
    assert repr(csr_of(torch.eye(3))) == "CSR(3 x 3, float32, cpu, 3 entries)"
    assert "float32" in repr(2 * Dense(torch.eye(3)))


def test_a_grid_of_one_number_is_told_what_a_shape_is():
    with pytest.raises(TypeError, match=r"Stencil: shape: expected two or three numbers such as \(64, 64\), got int"):
        Stencil(30)
    line = Stencil((1, 5), weights=(0.0, 1.0)).to_csr().to_scipy().toarray()  # what the message advises
    np.testing.assert_array_equal(line, 2 * np.eye(5) - np.eye(5, k=1) - np.eye(5, k=-1))
