"""Preconditioners: incomplete Cholesky against a dense reference, Jacobi, and what they do for conjugate gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from devices import home
from kantor import KantorError, NumericalBreakdown
from kantor.linalg import CSR, Callable, Dense, Diagonal, LinearOperator, Stencil, cg, ic0, jacobi
from op_checks import same_bits, threads
from systems import F32, F64, csr_of, error, example_operators, random, random_faces, solve, spd

DTYPES = (F64, F32)


def incomplete_cholesky(matrix: Tensor) -> Tensor | None:
    """The textbook's IC(0): the Cholesky loops, entries outside the pattern left out. None at a bad pivot."""
    n = matrix.shape[0]
    L = torch.zeros(n, n, dtype=F64)
    for i in range(n):
        for j in range(i):
            if matrix[i, j] != 0:
                L[i, j] = (matrix[i, j] - L[i, :j] @ L[j, :j]) / L[j, j]
        pivot = matrix[i, i] - L[i, :i] @ L[i, :i]
        if not pivot > 0:
            return None
        L[i, i] = pivot.sqrt()
    return L


def reference(matrix: Tensor) -> tuple[Tensor, float]:
    """(L L')^-1 with the first shift of the diagonal that works, and that shift."""
    matrix = matrix.double().cpu()
    for shift in (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        L = incomplete_cholesky(matrix + shift * torch.diag(matrix.diagonal()))
        if L is not None:
            return torch.cholesky_inverse(L), shift
    raise AssertionError("no shift works")


def sparse_spd(n: int, density: float, seed: int) -> Tensor:
    """Symmetric, sparse, diagonally dominant."""
    generator = torch.Generator().manual_seed(seed)
    matrix = random(n, n, seed=seed) * (torch.rand(n, n, generator=generator) < density)
    matrix = matrix + matrix.T
    return matrix - torch.diag(matrix.diagonal()) + torch.diag(matrix.abs().sum(1) + 0.1)


def arrow(n: int) -> Tensor:
    """Full first row and column, so that every elimination would fill in everything."""
    matrix = torch.diag(torch.full((n,), float(n), dtype=F64))
    matrix[0, 1:] = matrix[1:, 0] = 1.0
    return matrix


# --- incomplete Cholesky ---


def examples() -> dict[str, LinearOperator]:
    operators = {kind: A for kind, A in example_operators().items() if A.is_native}
    return operators | {
        "stencil 3-D": Stencil((3, 4, 5), weights=(1.0, 2.0, 3.0)),
        "faces 3-D": Stencil.from_faces(random_faces((3, 2, 4)), 0.1),
        "sparse": csr_of(sparse_spd(40, 0.1, 0)),
        "permuted": csr_of(sparse_spd(40, 0.05, 1)),
        "arrow": csr_of(arrow(9)),
        "one": Dense(torch.tensor([[4.0]], dtype=F64)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(examples()))
def test_ic0_is_the_textbooks(kind: str, dtype: torch.dtype, device: str) -> None:
    A = examples()[kind].to(dtype).to_csr()
    A = CSR(A.crow.to(home(device)), A.col.to(home(device)), A.values.to(home(device)), A.shape)
    expected, shift = reference(A.dense())
    M = ic0(A)
    assert M.shift == shift
    assert (M.shape, M.dtype, M.is_native) == (A.shape, dtype, True)
    inverse = M.dense().double().cpu()
    assert error(inverse, expected) < 256 * torch.finfo(dtype).eps
    assert error(inverse, inverse.T) < 64 * torch.finfo(dtype).eps
    assert M.T.dense().equal(M.dense())
    r = random(3, 2, A.shape[0], dtype=dtype, device=home(device))
    assert same_bits([M.matvec(r)], [torch.stack([torch.stack([M.matvec(row) for row in rows]) for rows in r])])
    assert M.matvec(r[:0]).shape == (0, 2, A.shape[0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 25), st.floats(0, 0.5), st.integers(0, 10**6))
def test_ic0_of_any_pattern(n: int, density: float, seed: int) -> None:
    matrix = sparse_spd(n, density, seed)
    expected, _ = reference(matrix)
    assert error(ic0(csr_of(matrix)).dense(), expected) < 1e-12


def test_ic0_is_exact_without_fill() -> None:
    """On a tridiagonal matrix nothing is left out: one iteration."""
    A = Stencil((1, 50), weights=(0.0, 1.0))
    torch.testing.assert_close(ic0(A).dense(), torch.linalg.inv(A.dense()), rtol=1e-11, atol=1e-11)
    assert solve(A, random(50), M="ic0", rtol=1e-10).iterations == 1
    assert solve(Dense(spd(20)), random(20), M="ic0", rtol=1e-10).iterations <= 2


def test_ic0_breaks_down_and_shifts() -> None:
    """Kershaw's matrix: positive definite, but IC(0) meets a negative pivot."""
    kershaw = torch.tensor([[3.0, -2, 0, 2], [-2, 3, -2, 0], [0, -2, 3, -2], [2, 0, -2, 3]], dtype=F64)
    assert float(torch.linalg.eigvalsh(kershaw)[0]) > 0
    assert incomplete_cholesky(kershaw) is None
    M = ic0(csr_of(kershaw))
    expected, shift = reference(kershaw)
    assert M.shift == shift > 0
    assert error(M.dense(), expected) < 1e-13
    b = random(4)
    assert error(solve(kershaw, b, M=M, rtol=1e-12).x, torch.linalg.solve(kershaw, b)) < 1e-10


def test_ic0_refuses() -> None:
    with pytest.raises(NumericalBreakdown, match=r"ic0: A: the pivot of row \d+ is not positive.*jacobi") as caught:
        ic0(-Stencil((3, 3)))
    assert isinstance(caught.value, KantorError)
    with pytest.raises(ValueError, match=r"ic0: A: expected a square matrix, got \(3, 4\)"):
        ic0(random(3, 4))
    A = sparse_spd(6, 0.5, 0)
    A[1, 4] += 1
    with pytest.raises(ValueError, match=r"ic0: A is not symmetric: \|a_ij - a_ji\| = 1 at \(1, 4\)"):
        ic0(A)
    with pytest.raises(ValueError, match=r"ic0: A: row 2 has no diagonal entry"):
        ic0(torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 0]], dtype=F64))
    with pytest.raises(TypeError, match="Callable has no sparse form"):
        ic0(Callable(lambda x: x, 3))
    with pytest.raises(TypeError, match="as_operator"):
        ic0("A")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ic0_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Few large levels, where threads share a level, and many small ones, where one thread does it."""
    wide = csr_of(torch.eye(2)).to(dtype)
    n = 40_000
    rows = torch.arange(n)
    pairs = torch.arange(0, n - 1, 2)
    wide = CSR.from_coo(
        torch.cat([rows, pairs, pairs + 1]), torch.cat([rows, pairs + 1, pairs]),
        torch.cat([torch.full((n,), 3.0, dtype=dtype), torch.full((2 * len(pairs),), -1.0, dtype=dtype)]), (n, n),
    )  # fmt: skip
    for A in (wide, Stencil((40, 30, 40), dtype=dtype).to_csr()):
        M = ic0(A)
        r = random(2, A.shape[0], dtype=dtype)
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(M.matvec(r))
        assert same_bits(results[:1] * 2, results[1:])
    x = ic0(wide).matvec(random(2, n, dtype=dtype)).reshape(2, -1, 2)
    block = torch.linalg.inv(torch.tensor([[3.0, -1.0], [-1.0, 3.0]], dtype=dtype))
    torch.testing.assert_close(x, random(2, n, dtype=dtype).reshape(2, -1, 2) @ block)


# --- Jacobi ---


@pytest.mark.parametrize("kind", list(examples()))
def test_jacobi(kind: str) -> None:
    A = examples()[kind]
    torch.testing.assert_close(jacobi(A).values, 1 / A.dense().diagonal())


def test_jacobi_refuses() -> None:
    for bad in (0.0, -2.0):
        with pytest.raises(ValueError, match=rf"jacobi: A: diagonal entry 1 is {bad:g}"):
            jacobi(torch.diag(torch.tensor([1.0, bad, 1.0], dtype=F64)))
    with pytest.raises(TypeError, match="Callable: the diagonal is not known"):
        jacobi(Callable(lambda x: x, 3))


# --- in conjugate gradients ---


def preconditioners(A: LinearOperator) -> dict[str, Any]:
    inverse = 1 / A.diagonal()
    factor = ic0(A)
    return {
        "none": None,
        "jacobi": "jacobi",
        "ic0": "ic0",
        "ic0 operator": factor,
        "diagonal": Diagonal(inverse),
        "scaled": 3.0 * Diagonal(inverse),
        "sum": 0.5 * Diagonal(inverse) + Dense(torch.diag(0.5 * inverse)),
        "csr": Diagonal(inverse).to_csr(),
        "dense tensor": torch.diag(inverse),
        "callable": lambda r: inverse * r,
        "operator callable": Callable(lambda r: inverse * r, A.shape[0], device=A.device),
        "factor as a callable": factor.matvec,
        "polynomial": lambda r: 2 * inverse * r - inverse * A.matvec(inverse * r),
    }


@pytest.mark.parametrize("name", list(preconditioners(Stencil((2, 2)))))
def test_all_give_the_same_answer(name: str, device: str) -> None:
    A = Stencil((5, 6), weights=(1.0, 4.0), shift=0.2, device=home(device))
    b = random(3, 30, device=home(device))
    expected = torch.linalg.solve(A.dense().cpu(), b.cpu().T).T
    M = preconditioners(A)[name]
    result = solve(A, b, M=M, rtol=1e-12)
    assert error(result.x, expected) < 1e-10
    callable_too = solve(
        lambda x: A.matvec(x), b, M=preconditioners(A)[name] if name not in ("jacobi", "ic0") else ic0(A), rtol=1e-12
    )
    assert error(callable_too.x, expected) < 1e-10


def test_equal_preconditioners_take_equal_steps() -> None:
    A = Stencil.from_faces([face * 10 ** random(*face.shape, seed=5) for face in random_faces((20, 20))], 0.1)
    b = random(400)
    choices = preconditioners(A)
    counts = {name: solve(A, b, M=M, rtol=1e-8).iterations for name, M in choices.items()}
    diagonal = [counts[name] for name in ("jacobi", "diagonal", "scaled", "sum", "csr", "dense tensor", "callable")]
    assert max(diagonal) - min(diagonal) <= 1
    factored = [counts[name] for name in ("ic0", "ic0 operator", "factor as a callable")]
    assert max(factored) - min(factored) <= 1
    assert counts["ic0"] < counts["jacobi"] < counts["none"]


@pytest.mark.slow
def test_ic0_pays(size: str) -> None:
    """A third of the iterations on Poisson's equation, as the theory of IC(0) has it (a constant factor)."""
    A = Stencil((100, 100) if size == "small" else (60, 60, 60))
    b = random(A.shape[0])
    plain, factored = solve(A, b, rtol=1e-8), solve(A, b, rtol=1e-8, M="ic0")
    assert factored.iterations < 0.4 * plain.iterations
    assert error(factored.x, plain.x) < 1e-6


def test_real_matrices() -> None:
    amg = pytest.importorskip("pyamg.gallery")
    for name in ("airfoil", "bar", "knot", "unit_cube"):
        A = CSR.from_any(amg.load_example(name)["A"].tocsr())
        b = random(A.shape[0])
        counts = [solve(A, b, M=M, rtol=1e-8).iterations for M in (None, "jacobi", "ic0")]
        assert counts[2] < counts[0]
        assert counts[2] < counts[1]


def test_the_preconditioner_sees_the_shape_of_b() -> None:
    A = Stencil((3, 4))
    shapes = []

    def watched(r: Tensor) -> Tensor:
        shapes.append(tuple(r.shape))
        return r.clone()

    solve(A, random(2, 3, 4), M=watched)
    assert set(shapes) == {(2, 12)}


@pytest.mark.parametrize(
    ("M", "error_type", "match"),
    [
        ("ilu", ValueError, "cg: M: expected 'jacobi', 'ic0', 'multigrid', an operator or a callable, got 'ilu'"),
        (3.0, TypeError, "as_operator: A: expected .*, got float"),
        (Diagonal(torch.ones(11, dtype=F64)), ValueError, r"cg: M: expected shape \(12, 12\), got \(11, 11\)"),
        (Diagonal(torch.ones(12, dtype=F32)), TypeError, "cg: M is .*float32.*, A is .*float64.*convert one"),
        (torch.ones(12, dtype=F64), ValueError, r"Dense: A: expected a matrix"),
        (lambda r: r[..., :3], ValueError, r"Callable: fn returned shape \(3,\), expected a tensor of shape \(12,\)"),
        (lambda r: r.float(), TypeError, "Callable: fn returned torch.float32"),
        (lambda r: None, ValueError, "Callable: fn returned NoneType"),
    ],
    ids=["name", "number", "size", "dtype", "vector", "short", "single", "none"],
)
def test_bad_preconditioners(M: Any, error_type: type[Exception], match: str) -> None:
    with pytest.raises(error_type, match=match):
        cg(Stencil((3, 4)), random(12), M=M)
