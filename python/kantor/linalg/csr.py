"""Sparse matrices in compressed sparse row form as operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_float, check_tensor, host, is_readable
from kantor.linalg import _native
from kantor.linalg._native import Encoded
from kantor.linalg._operator import LinearOperator


class CSR(LinearOperator):
    """A sparse matrix: row i has the columns ``col[crow[i]:crow[i+1]]`` and the values ``values[crow[i]:crow[i+1]]``.

    The structure is checked once, here; indices are kept as int32 where they fit. Rows that are not sorted are sorted
    and duplicate entries added up. Solutions are differentiable with respect to ``values``.

    Parameters
    ----------
    crow, col : Tensor
        ``(rows + 1,)`` and ``(nnz,)``, int32 or int64.
    values : Tensor
        ``(nnz,)``, float32 or float64, finite.
    shape : tuple of int
        ``(rows, columns)``.

    Raises
    ------
    TypeError
        Wrong dtypes.
    ValueError
        Lengths that do not fit, row pointers that decrease, columns out of range, NaN or infinite values, tensors on
        different devices. The message names the first offender.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import CSR
    >>> A = CSR(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]), torch.tensor([2.0, 1.0, 3.0]), (2, 2))
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([2., 4.])
    """

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        rows, cols = (int(s) for s in shape)
        for name, tensor in (("crow", crow), ("col", col), ("values", values)):
            check_tensor(tensor, "CSR", name)
            if tensor.ndim != 1:
                raise ValueError(f"CSR: {name}: expected one dimension, got shape {tuple(tensor.shape)}")
            if tensor.device != values.device:
                raise ValueError(
                    f"CSR: {name} is on {tensor.device}, values on {values.device}; move one with .to(device)"
                )
        for name, tensor in (("crow", crow), ("col", col)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"CSR: {name}: expected int32 or int64, got {str(tensor.dtype).removeprefix('torch.')}")
        check_float(values, "CSR", "values")
        if crow.numel() != rows + 1:
            raise ValueError(f"CSR: crow: expected {rows + 1} entries for {rows} rows, got {crow.numel()}")
        if col.numel() != values.numel():
            raise ValueError(f"CSR: col has {col.numel()} entries, values {values.numel()}; they must match")
        index = torch.int32 if max(rows, cols, values.numel()) < 2**31 - 64 else torch.int64
        self.shape, self.dtype, self.device = (rows, cols), values.dtype, values.device
        self.crow, self.col, self.values = self._narrow(crow, index), self._narrow(col, index), values
        self._asymmetry = 0.0, ""
        self._asymmetry_of: int | None = None  # the version of the values it was computed for
        if not is_readable(values):
            self.halo = max(self.shape)  # inside torch.compile or vmap: the structure is trusted, its bandwidth unknown
            return
        report = self._check()
        if not report["sorted"]:
            self._sort()
            report = self._check()
        self.halo = int(report["halo"])

    @staticmethod
    def _narrow(indices: Tensor, dtype: torch.dtype) -> Tensor:
        if indices.dtype != dtype and indices.numel():
            low, high = int(indices.min()), int(indices.max())
            if dtype == torch.int32 and not -(2**31) <= low <= high < 2**31:
                raise ValueError(f"CSR: index {high if high >= 2**31 else low} is out of range")
        return indices.to(dtype).contiguous()

    def _check(self) -> dict[str, Any]:
        report: dict[str, Any] = _C.csr_check(host(self.crow), host(self.col), host(self.values), self.shape[1])
        if (row := report["bad_row"]) >= 0:
            raise ValueError(
                f"CSR: crow: must start at 0, never decrease and end at {self.col.numel()}; it fails at row {row}"
            )
        if (entry := report["bad_entry"]) >= 0:
            raise ValueError(f"CSR: col: entry {entry} is {int(self.col[entry])}, outside 0..{self.shape[1] - 1}")
        if (entry := report["nonfinite_entry"]) >= 0:
            raise ValueError(
                f"CSR: values: entry {entry} is {float(self.values.detach()[entry])}; expected finite values"
            )
        return report

    def _sort(self) -> None:
        """Sort every row by column and add up duplicates; differentiable in the values."""
        key = _native.csr_rows(self.crow, self.col.numel()).long() * self.shape[1] + self.col.long()
        unique, inverse = torch.unique(key, return_inverse=True)
        self.values = self.values.new_zeros(unique.numel()).index_add(0, inverse, self.values)
        rows = torch.div(unique, max(self.shape[1], 1), rounding_mode="floor")
        counts = torch.bincount(rows, minlength=self.shape[0])
        index = self.col.dtype
        self.col = (unique - rows * self.shape[1]).to(index)
        self.crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(index)

    @classmethod
    def from_coo(cls, rows: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> CSR:
        """Build from triplets in any order; duplicates are added up. Differentiable in the values."""
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < shape[0]):
            raise ValueError(
                f"CSR.from_coo: rows: expected 0..{shape[0] - 1}, got {int(rows.min())}..{int(rows.max())}"
            )
        order = torch.argsort(rows, stable=True)
        counts = torch.bincount(rows.long(), minlength=shape[0])
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(crow, cols[order], values[order], shape)

    @classmethod
    def from_any(cls, A: Any) -> CSR:
        """Build from a torch sparse tensor (COO, CSR, CSC, BSR, BSC), or a scipy sparse matrix or array.

        Differentiable in the values of a torch tensor. What is stored is an entry, also a zero inside a block.

        Raises
        ------
        TypeError
            Another type, or entries that are not real floating point (integers are converted to float64).
        """
        if isinstance(A, CSR):
            return A
        if isinstance(A, Tensor):
            if A.ndim != 2:
                raise ValueError(f"CSR.from_any: expected a matrix, got shape {tuple(A.shape)}")
            if A.layout is torch.sparse_csr:
                return cls(A.crow_indices(), A.col_indices(), A.values(), (A.shape[0], A.shape[1]))
            if A.layout is torch.sparse_csc:
                return cls(A.ccol_indices(), A.row_indices(), A.values(), (A.shape[1], A.shape[0])).T
            if A.layout in (torch.sparse_bsr, torch.sparse_bsc):
                A = A.to_sparse_coo()
            if A.layout is torch.sparse_coo:
                A = A.coalesce()
                return cls.from_coo(A.indices()[0], A.indices()[1], A.values(), (A.shape[0], A.shape[1]))
            raise TypeError(f"CSR.from_any: expected a sparse tensor, got layout {A.layout}; call A.to_sparse_csr()")
        if not hasattr(A, "tocsr"):
            raise TypeError(f"CSR.from_any: expected a torch or scipy sparse matrix, got {type(A).__name__}")
        if len(A.shape) != 2:
            raise ValueError(f"CSR.from_any: expected a matrix, got shape {tuple(A.shape)}")
        matrix = A.tocsr()
        if matrix.dtype.kind in "iub":
            matrix = matrix.astype("float64")
        if matrix.dtype.kind != "f" or matrix.dtype.itemsize not in (4, 8):
            raise TypeError(f"CSR.from_any: expected float32 or float64 entries, got {matrix.dtype}")
        crow, col, values = (torch.from_numpy(array) for array in (matrix.indptr, matrix.indices, matrix.data))
        return cls(crow, col, values, (matrix.shape[0], matrix.shape[1]))

    @classmethod
    def from_mtx(cls, path: str | Path) -> CSR:
        """Read a Matrix Market file, ``.mtx`` or ``.mtx.gz`` (needs scipy, extra ``cli``). Values become float64.

        Raises
        ------
        FileNotFoundError
            No such file.
        ValueError
            Truncated, corrupt, complex or without numerical values; the message names the file.
        """
        try:
            from scipy.io import mmread
            from scipy.sparse import coo_array
        except ImportError as error:
            raise ImportError('CSR.from_mtx needs scipy: pip install "kantor[cli]"') from error
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"CSR.from_mtx: {path}: no such file")
        try:
            matrix = mmread(path)
        except Exception as error:  # scipy's reader raises many types; all of them mean an unreadable file
            raise ValueError(
                f"CSR.from_mtx: {path}: not a readable Matrix Market file: {_without_stop(error)}; expected text that "
                "begins with '%%MatrixMarket matrix coordinate real symmetric' or the like; scipy.io.mmwrite(path, A) "
                "writes it"
            ) from error
        if matrix.dtype.kind == "c":
            raise ValueError(f"CSR.from_mtx: {path}: complex entries are not supported; split real and imaginary parts")
        try:
            return cls.from_any(coo_array(matrix).astype("float64"))
        except ValueError as error:
            raise ValueError(f"CSR.from_mtx: {path}: {error}") from error

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.col.numel()

    def encode(self) -> Encoded:
        """One CSR term."""
        return Encoded([self.crow, self.col, self.values.contiguous()], [_native.CSR, *self.shape, self.halo], [1.0])

    @property
    def T(self) -> CSR:  # noqa: N802
        """The transposed matrix; differentiable in the values. O(nnz)."""
        crow, col, permutation = _native.csr_transpose(self.crow, self.col, self.shape[1])
        return CSR(crow, col, self.values.index_select(0, permutation), (self.shape[1], self.shape[0]))

    def diagonal(self) -> Tensor:
        """Return the main diagonal; missing entries are zero."""
        on_diagonal = (_native.csr_rows(self.crow, self.nnz) == self.col).nonzero().squeeze(-1)
        n = min(self.shape)
        return self.values.new_zeros(n).index_add(0, self.col[on_diagonal], self.values[on_diagonal])

    def dense(self) -> Tensor:
        """Return the matrix as a dense tensor."""
        index = (_native.csr_rows(self.crow, self.nnz), self.col.long())
        return self.values.new_zeros(self.shape).index_put(index, self.values)

    def to_csr(self) -> CSR:
        """Return itself."""
        return self

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.csr_array`` on the host (needs scipy, extra ``cli``)."""
        from scipy.sparse import csr_array

        values, col, crow = (t.detach().cpu().numpy() for t in (self.values, self.col, self.crow))
        return csr_array((values, col, crow), shape=self.shape)

    def to(self, dtype: torch.dtype) -> CSR:
        """Convert the values."""
        return CSR(self.crow, self.col, self.values.to(dtype), self.shape)

    def asymmetry(self) -> tuple[float, str]:
        """Return ``max |a_ij - a_ji| / max |a_ij|`` and where; a missing entry counts as zero. Computed once."""
        # Values that are being trained change in place, and `.data` tells no one: looked at anew each time.
        version = None if self.values.requires_grad else self.values._version
        if version is None or version != self._asymmetry_of:
            self._asymmetry_of = version
            if self.shape[0] != self.shape[1]:
                raise ValueError(f"CSR.asymmetry: the matrix is not square: {self.shape}")
            values = host(self.values)
            difference, i, j = _C.csr_asymmetry(host(self.crow), host(self.col), values)
            largest = max(float(values.max()), -float(values.min())) if values.numel() else 0.0
            relative = difference / largest if largest > 0 else 0.0
            self._asymmetry = relative, f"|a_ij - a_ji| = {difference:.3g} at ({i}, {j})"
        return self._asymmetry

    def __repr__(self) -> str:
        return super().__repr__()[:-1] + f", {self.nnz} entries)"


def _without_stop(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
