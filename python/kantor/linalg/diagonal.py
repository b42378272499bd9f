"""Diagonal matrices as operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_tensor
from kantor.linalg._native import DIAGONAL, Encoded
from kantor.linalg._operator import LinearOperator

if TYPE_CHECKING:
    from kantor.linalg.csr import CSR


class Diagonal(LinearOperator):
    """The matrix ``diag(d)``.

    Parameters
    ----------
    d : Tensor
        ``(n,)``, float32 or float64; solutions are differentiable with respect to it.

    Raises
    ------
    TypeError
        Not a dense tensor, or not float32/float64.
    ValueError
        Not one-dimensional, or a value is NaN or infinite.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Diagonal
    >>> Diagonal(torch.tensor([1.0, 2.0])) @ torch.tensor([3.0, 3.0])
    tensor([3., 6.])
    """

    def __init__(self, d: Tensor) -> None:
        check_tensor(d, "Diagonal", "d")
        if d.ndim != 1:
            raise ValueError(f"Diagonal: d: expected shape (n,), got {tuple(d.shape)}")
        check_float(d, "Diagonal", "d")
        check_finite(d, "Diagonal", "d")
        self.values = d
        self.shape = (d.numel(), d.numel())
        self.dtype, self.device = d.dtype, d.device

    def encode(self) -> Encoded:
        """One diagonal term."""
        return Encoded([self.values.contiguous()], [DIAGONAL, self.shape[0]], [1.0])

    @property
    def T(self) -> Diagonal:  # noqa: N802
        """Itself."""
        return self

    def diagonal(self) -> Tensor:
        """Return ``d``."""
        return self.values

    def to_csr(self) -> CSR:
        """Return the diagonal as a sparse matrix."""
        from kantor.linalg.csr import CSR

        index = torch.arange(self.shape[0], device=self.device)
        return CSR.from_coo(index, index, self.values, self.shape)

    def to(self, dtype: torch.dtype) -> Diagonal:
        """Convert the entries."""
        return Diagonal(self.values.to(dtype))
