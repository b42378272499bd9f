"""Sparse matrices: what is accepted, what is refused, what is sorted and summed, and Matrix Market files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kantor.linalg import CSR
from systems import F32, F64, csr_of, random, sparse

INDEX = (torch.int32, torch.int64)


def build(crow: Any, col: Any, values: Any, shape: Any = (3, 4), **changes: Any) -> CSR:
    return CSR(torch.tensor(crow), torch.tensor(col), torch.tensor(values, dtype=changes.get("dtype", F64)), shape)


# --- unsorted rows, duplicates, empty rows ---


@pytest.mark.parametrize("index", INDEX, ids=str)
def test_rows_are_sorted_and_duplicates_summed(index: torch.dtype) -> None:
    crow, col = torch.tensor([0, 3, 3, 7], dtype=index), torch.tensor([2, 0, 2, 3, 1, 3, 3], dtype=index)
    A = CSR(crow, col, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], dtype=F64), (3, 4))
    assert A.crow.tolist() == [0, 2, 2, 4]
    assert A.col.tolist() == [0, 2, 1, 3]
    assert A.values.tolist() == [2.0, 5.0, 16.0, 104.0]
    assert A.nnz == 4
    assert A.crow.dtype is torch.int32  # narrowed where the indices fit


def test_what_is_sorted_stays_as_it_is() -> None:
    values = random(3)
    A = CSR(torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 3, 1], dtype=torch.int32), values, (2, 4))
    assert A.values is values


triplets = st.integers(0, 8).flatmap(
    lambda rows: st.integers(0, 8).flatmap(
        lambda cols: st.tuples(
            st.just((rows, cols)),
            st.lists(
                st.tuples(st.integers(0, max(rows - 1, 0)), st.integers(0, max(cols - 1, 0)), st.floats(-10, 10)),
                max_size=30 if rows * cols else 0,
            ),
        )
    )
)


@settings(max_examples=100, deadline=None)
@given(triplets, st.sampled_from(INDEX), st.sampled_from([F32, F64]))
def test_any_sparse_matrix(case: Any, index: torch.dtype, dtype: torch.dtype) -> None:
    """Triplets in any order, with duplicates and empty rows: dense, transpose, diagonal and product all agree."""
    shape, entries = case
    rows = torch.tensor([i for i, _, _ in entries], dtype=index)
    cols = torch.tensor([j for _, j, _ in entries], dtype=index)
    values = torch.tensor([v for _, _, v in entries], dtype=dtype)
    expected = torch.zeros(shape, dtype=F64)
    for i, j, v in zip(rows.tolist(), cols.tolist(), values.tolist(), strict=True):
        expected[i, j] += v
    A = CSR.from_coo(rows, cols, values, shape)
    tolerance = {"rtol": 0, "atol": 1000 * torch.finfo(dtype).eps}
    torch.testing.assert_close(A.dense().double(), expected, **tolerance)
    torch.testing.assert_close(A.T.dense().double(), expected.T, **tolerance)
    torch.testing.assert_close(A.T.T.dense(), A.dense())
    torch.testing.assert_close(A.diagonal().double(), expected.diagonal(), **tolerance)
    for row in range(shape[0]):
        columns = A.col[A.crow[row] : A.crow[row + 1]].tolist()
        assert columns == sorted(set(columns))
    x = random(2, shape[1], dtype=dtype)
    torch.testing.assert_close(A.matvec(x).double(), x.double() @ expected.T, rtol=0, atol=1e5 * torch.finfo(dtype).eps)
    assert torch.equal(CSR.from_any(A.to_scipy()).dense(), A.dense())
    if shape[0] == shape[1]:
        relative, _ = A.asymmetry()
        largest = float(A.dense().abs().max()) if A.nnz else 0.0
        difference = float((A.dense() - A.dense().T).abs().max()) if A.nnz else 0.0
        assert relative == pytest.approx(difference / largest if largest else 0.0, rel=1e-6)


# --- conversions ---


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_from_torch(dtype: torch.dtype) -> None:
    matrix = sparse(6, 5).to(dtype)
    uncoalesced = torch.sparse_coo_tensor(
        torch.tensor([[1, 0, 1], [2, 1, 2]]), torch.tensor([1.0, 2.0, 3.0], dtype=dtype), check_invariants=True
    )
    for form, expected in (
        (matrix.to_sparse_csr(), matrix),
        (matrix.to_sparse(), matrix),
        (uncoalesced, uncoalesced.to_dense()),
    ):
        A = CSR.from_any(form)
        assert A.dtype is dtype
        torch.testing.assert_close(A.dense(), expected, rtol=0, atol=0)
    A = csr_of(matrix)
    assert CSR.from_any(A) is A


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "bsr", "lil", "dok", "dia"])
def test_from_scipy(form: str) -> None:
    sp = pytest.importorskip("scipy.sparse")
    matrix = sparse(6, 6)
    for make in (sp.csr_matrix, sp.csr_array):
        A = CSR.from_any(make(matrix.numpy()).asformat(form))
        torch.testing.assert_close(A.dense(), matrix, rtol=0, atol=0)
    for dtype, expected in (("int32", F64), ("bool", F64), ("float32", F32)):
        A = CSR.from_any(sp.csr_array(np.eye(3, dtype=dtype)))
        assert A.dtype is expected
        torch.testing.assert_close(A.dense(), torch.eye(3, dtype=expected))
    for wrong in ("complex128", "longdouble"):
        with pytest.raises(TypeError, match=r"CSR.from_any: expected float32 or float64 entries, got"):
            CSR.from_any(sp.csr_array(np.eye(3, dtype=wrong)))


def test_to_scipy_shares_structure() -> None:
    matrix = sparse(7, 4)
    np.testing.assert_array_equal(csr_of(matrix).to_scipy().toarray(), matrix.numpy())


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (torch.eye(3), TypeError, "expected a sparse tensor, got layout torch.strided; call A.to_sparse_csr()"),
        (
            torch.eye(3, dtype=torch.int64).to_sparse_csr(),
            TypeError,
            "CSR: values: expected dtype float32 or float64, got int64",
        ),
        (
            torch.eye(3, dtype=torch.complex64).to_sparse_csr(),
            TypeError,
            "complex64; complex systems are not supported",
        ),
        (torch.ones(2, 2, 2).to_sparse(), ValueError, "expected a matrix"),
        (np.eye(3), TypeError, "expected a torch or scipy sparse matrix, got ndarray"),
    ],
    ids=lambda value: None,
)
def test_from_any_refuses(wrong: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        CSR.from_any(wrong)


# --- structure that is wrong ---


@pytest.mark.parametrize(
    ("crow", "col", "match"),
    [
        ([0, 2, 1, 3], [0, 1, 2], r"crow: must start at 0, never decrease and end at 3; it fails at row 1"),
        ([1, 2, 2, 3], [0, 1, 2], r"crow: must start at 0.*fails at row 0"),
        ([0, 1, 2, 2], [0, 1, 2], r"crow: must start at 0.*end at 3"),
        ([0, 1, 2, 4], [0, 1, 2], r"crow: must start at 0.*end at 3"),
        ([0, 5, 2, 3], [0, 1, 2], r"crow: must start at 0.*fails at row 0"),
        ([0, -1, 2, 3], [0, 1, 2], r"crow: must start at 0.*fails at row 0"),
        ([0, 1, 2, 3], [0, 4, 2], r"col: entry 1 is 4, outside 0\.\.3"),
        ([0, 1, 2, 3], [0, 1, -1], r"col: entry 2 is -1, outside 0\.\.3"),
        ([0, 1, 2, 3], [0, 1, 2**40], r"index 1099511627776 is out of range"),
        ([0, 1, 2, 3], [0, 1, -(2**40)], r"index -1099511627776 is out of range"),
        ([0, 1, 3], [0, 1, 2], r"crow: expected 4 entries for 3 rows, got 3"),
        ([0, 1, 2, 3], [0, 1], r"col has 2 entries, values 3"),
        ([[0, 1, 2, 3]], [0, 1, 2], r"crow: expected one dimension, got shape \(1, 4\)"),
    ],
)
def test_corrupt_structure(crow: Any, col: Any, match: str) -> None:
    with pytest.raises(ValueError, match=rf"CSR: {match}"):
        build(crow, col, [1.0, 2.0, 3.0])


def test_wrong_values_and_types() -> None:
    good = ([0, 1, 2, 3], [0, 1, 2])
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=rf"CSR: values: entry 1 is {bad}; expected finite values"):
            build(*good, [1.0, bad, 2.0])
    crow, col, values = torch.tensor(good[0]), torch.tensor(good[1]), random(3)
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(TypeError, match=rf"CSR: crow: expected int32 or int64, got {str(dtype)[6:]}"):
            CSR(crow.to(dtype), col, values, (3, 4))
        with pytest.raises(TypeError, match=rf"CSR: col: expected int32 or int64, got {str(dtype)[6:]}"):
            CSR(crow, col.to(dtype), values, (3, 4))
    for dtype in (torch.float16, torch.int64, torch.complex64):
        with pytest.raises(TypeError, match=rf"CSR: values: expected dtype float32 or float64, got {str(dtype)[6:]}"):
            CSR(crow, col, values.to(dtype), (3, 4))
    with pytest.raises(ValueError, match=r"CSR: col is on meta, values on cpu; move one"):
        CSR(crow, col.to("meta"), values, (3, 4))
    with pytest.raises(TypeError, match=r"CSR: crow: expected a torch.Tensor, got list"):
        CSR(good[0], col, values, (3, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"CSR.from_coo: rows: expected 0..2, got 0..3"):
        CSR.from_coo(torch.tensor([0, 3]), torch.tensor([0, 1]), random(2), (3, 4))


def test_asymmetry_names_the_place() -> None:
    matrix = torch.diag(torch.tensor([4.0, 5.0, 6.0], dtype=F64))
    matrix[0, 2] = 3.0
    relative, where = csr_of(matrix).asymmetry()
    assert relative == 0.5
    assert where == "|a_ij - a_ji| = 3 at (0, 2)"
    with pytest.raises(ValueError, match=r"not square: \(3, 4\)"):
        csr_of(sparse(3, 4)).asymmetry()


def test_values_are_differentiable_through_sorting() -> None:
    values = random(5).requires_grad_()
    crow, col = torch.tensor([0, 3, 5]), torch.tensor([1, 0, 1, 0, 0])

    def dense(values: Tensor) -> Tensor:
        return CSR(crow, col, values, (2, 2)).dense()

    assert torch.autograd.gradcheck(dense, values)
    assert torch.autograd.gradcheck(lambda values: CSR(crow, col, values, (2, 2)).T.dense(), values)
    assert torch.autograd.gradcheck(lambda values: CSR(crow, col, values, (2, 2)).diagonal(), values)


# --- Matrix Market ---

HEADER = "%%MatrixMarket matrix coordinate "


def mtx(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("header", "entries", "expected"),
    [
        ("real general", "1 1 2.5\n3 1 -1\n2 3 4e-3\n", [[2.5, 0, 0], [0, 0, 4e-3], [-1, 0, 0]]),
        ("real symmetric", "1 1 2.5\n3 1 -1\n3 2 4\n", [[2.5, 0, -1], [0, 0, 4], [-1, 4, 0]]),
        ("real skew-symmetric", "2 1 2\n3 1 -1\n3 2 4\n", [[0, -2, 1], [2, 0, -4], [-1, 4, 0]]),
        ("integer general", "1 1 2\n3 1 -1\n2 3 4\n", [[2, 0, 0], [0, 0, 4], [-1, 0, 0]]),
        ("pattern symmetric", "1 1\n3 1\n3 2\n", [[1, 0, 1], [0, 0, 1], [1, 1, 0]]),
        ("real general", "1 1 1\n1 1 2\n3 3 4\n", [[3, 0, 0], [0, 0, 0], [0, 0, 4]]),
    ],
    ids=["general", "symmetric", "skew", "integer", "pattern", "duplicates"],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_mtx(tmp_path: Path, header: str, entries: str, expected: Any, zipped: bool) -> None:
    pytest.importorskip("scipy")
    text = f"{HEADER}{header}\n% a comment\n3 3 3\n{entries}"
    path = tmp_path / ("A.mtx.gz" if zipped else "A.mtx")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    for spelled in (path, str(path)):
        A = CSR.from_mtx(spelled)
        assert A.dtype is F64
        assert A.dense().tolist() == expected


def test_mtx_array(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    path = mtx(tmp_path / "A.mtx", "%%MatrixMarket matrix array real general\n2 3\n1\n2\n0\n4\n5\n6\n")
    assert CSR.from_mtx(path).dense().tolist() == [[1, 0, 5], [2, 4, 6]]


@pytest.mark.parametrize("form", ["csr", "coo"])
def test_mtx_round_trip(tmp_path: Path, form: str) -> None:
    io = pytest.importorskip("scipy.io")
    matrix = sparse(20, 20)
    matrix = matrix + matrix.T
    io.mmwrite(tmp_path / "A.mtx", csr_of(matrix).to_scipy().asformat(form), precision=17)
    torch.testing.assert_close(CSR.from_mtx(tmp_path / "A.mtx").dense(), matrix, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (f"{HEADER}real general\n3 3 3\n1 1 1\n2 2 2\n", "not a readable Matrix Market file"),
        (f"{HEADER}real general\n3 3 3\n1 1 1\n2 2 2\n3 3", "not a readable Matrix Market file"),
        (f"{HEADER}real general\n3 3 1\n4 1 1\n", "not a readable Matrix Market file"),
        (f"{HEADER}real general\n3 3 1\n1 1 abc\n", "not a readable Matrix Market file"),
        (f"{HEADER}real general\n3 3\n1 1 1\n", "not a readable Matrix Market file"),
        ("hello\n3 3 1\n1 1 1\n", "not a readable Matrix Market file"),
        ("", "not a readable Matrix Market file"),
        (f"{HEADER}complex general\n2 2 1\n1 1 1 2\n", "complex entries are not supported"),
        (f"{HEADER}real general\n2 2 1\n1 1 nan\n", "entry 0 is nan; expected finite values"),
    ],
    ids=["few entries", "cut line", "out of range", "letters", "no count", "no header", "empty", "complex", "nan"],
)
def test_mtx_that_is_broken(tmp_path: Path, text: str, match: str) -> None:
    pytest.importorskip("scipy")
    path = mtx(tmp_path / "broken.mtx", text)
    with pytest.raises(ValueError, match=match) as caught:
        CSR.from_mtx(path)
    assert "broken.mtx" in str(caught.value)


def test_mtx_that_is_cut_or_absent(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    packed = gzip.compress(f"{HEADER}real general\n3 3 1\n1 1 1\n".encode())
    (tmp_path / "cut.mtx.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "plain.mtx.gz").write_text(f"{HEADER}real general\n3 3 1\n1 1 1\n")
    for name in ("cut.mtx.gz", "plain.mtx.gz"):
        with pytest.raises(ValueError, match=f"{name}: not a readable Matrix Market file"):
            CSR.from_mtx(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"CSR.from_mtx: .*absent.mtx: no such file"):
        CSR.from_mtx(tmp_path / "absent.mtx")
