"""Dense matrices as operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_tensor
from kantor.linalg._native import DENSE, Encoded
from kantor.linalg._operator import LinearOperator

if TYPE_CHECKING:
    from kantor.linalg.csr import CSR


class Dense(LinearOperator):
    """A dense matrix.

    Parameters
    ----------
    A : Tensor
        ``(rows, columns)``, float32 or float64; solutions are differentiable with respect to it. For large batches of
        vectors torch's own matrix product is faster than :meth:`matvec`, which reads the matrix once per vector.

    Raises
    ------
    TypeError
        Not a dense tensor, or not float32/float64.
    ValueError
        Not two-dimensional, or a value is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Dense
    >>> Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).matvec(torch.eye(2))  # two vectors
    tensor([[2., 1.],
            [1., 3.]])
    """

    def __init__(self, A: Tensor) -> None:
        check_tensor(A, "Dense", "A")
        if A.ndim != 2:
            raise ValueError(f"Dense: A: expected a matrix (rows, columns), got shape {tuple(A.shape)}")
        check_float(A, "Dense", "A")
        check_finite(A, "Dense", "A")
        self.matrix = A
        self.shape = (A.shape[0], A.shape[1])
        self.dtype, self.device = A.dtype, A.device
        self._asymmetry = 0.0, ""
        self._asymmetry_of: int | None = None  # the version of the values it was computed for

    def encode(self) -> Encoded:
        """One dense term."""
        return Encoded([self.matrix.contiguous()], [DENSE, *self.shape], [1.0])

    @property
    def T(self) -> Dense:  # noqa: N802
        """The transposed matrix."""
        return Dense(self.matrix.mT)

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return self.matrix.diagonal()

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        return self.matrix

    def to_csr(self) -> CSR:
        """Return the nonzero entries as a sparse matrix."""
        from kantor.linalg.csr import CSR

        rows, cols = self.matrix.detach().nonzero(as_tuple=True)
        return CSR.from_coo(rows, cols, self.matrix[rows, cols], self.shape)

    def to(self, dtype: torch.dtype) -> Dense:
        """Convert the entries."""
        return Dense(self.matrix.to(dtype))

    def asymmetry(self) -> tuple[float, str]:
        """Return ``max |a_ij - a_ji| / max |a_ij|`` and where; computed once."""
        # Values that are being trained change in place, and `.data` tells no one: looked at anew each time.
        version = None if self.matrix.requires_grad else self.matrix._version
        if version is None or version != self._asymmetry_of:
            self._asymmetry_of = version
            matrix = self.matrix.detach()
            difference = (matrix - matrix.mT).abs()
            largest = float(matrix.abs().max()) if matrix.numel() else 0.0
            where = int(difference.argmax()) if matrix.numel() else 0
            i, j = divmod(where, max(self.shape[1], 1))
            value = float(difference.reshape(-1)[where]) if matrix.numel() else 0.0
            self._asymmetry = (value / largest if largest > 0 else 0.0), f"|a_ij - a_ji| = {value:.3g} at ({i}, {j})"
        return self._asymmetry
