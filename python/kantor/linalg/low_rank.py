"""Matrices of low rank as operators, and the solution of systems that they shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._errors import NumericalBreakdown
from kantor.linalg._native import LOW_RANK, Encoded
from kantor.linalg._operator import LinearOperator
from kantor.linalg.dense import Dense

if TYPE_CHECKING:
    from kantor.linalg.csr import CSR


class LowRank(LinearOperator):
    """The matrix ``F' diag(w) F = sum_j w_j f_j f_j'``.

    Gauss-Newton and Fisher matrices have this form: rows of F are samples, w their weights. The matrix itself, n x n,
    is never formed. Products with it and solutions are differentiable with respect to F and w.

    Parameters
    ----------
    factors : Tensor
        F, ``(r, n)``, float32 or float64; any r.
    weights : Tensor, optional
        w, ``(r,)``, of any sign. Default: ones.

    Raises
    ------
    TypeError
        Not dense tensors, or not of one dtype, float32 or float64.
    ValueError
        Shapes that do not fit, mixed devices, NaN or infinite values.

    Notes
    -----
    A product costs 4 r n operations. Up to n = 4096 it reads F from memory once: the part of F whose products with x
    were formed is still in cache when it is added up. Above, twice. Sums are in double precision, and the same bits for
    any number of threads.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import LowRank
    >>> g = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)
    >>> LowRank(g).matvec(torch.ones(3, dtype=torch.float64))
    tensor([ 5., 10., 10.], dtype=torch.float64)
    """

    def __init__(self, factors: Tensor, weights: Tensor | None = None) -> None:
        check_tensor(factors, "LowRank", "factors")
        check_float(factors, "LowRank", "factors")
        if factors.ndim != 2:
            raise ValueError(f"LowRank: factors: expected shape (r, n), got {tuple(factors.shape)}")
        if weights is None:
            weights = factors.new_ones(factors.shape[0])
        check_tensor(weights, "LowRank", "weights")
        check_same("LowRank", [("factors", factors), ("weights", weights)])
        if weights.shape != factors.shape[:1]:
            raise ValueError(f"LowRank: weights: expected shape ({factors.shape[0]},), got {tuple(weights.shape)}")
        check_finite(factors, "LowRank", "factors")
        check_finite(weights, "LowRank", "weights")
        self.factors, self.weights = factors, weights
        self.shape = (factors.shape[1], factors.shape[1])
        self.dtype, self.device = factors.dtype, factors.device

    @property
    def rank(self) -> int:
        """Number of factors r, at least the rank of the matrix."""
        return self.factors.shape[0]

    def encode(self) -> Encoded:
        """One low-rank term."""
        return Encoded(
            [self.factors.contiguous(), self.weights.contiguous()], [LOW_RANK, self.shape[0], self.rank], [1.0]
        )

    @property
    def T(self) -> LowRank:  # noqa: N802
        """Itself."""
        return self

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return self.weights @ self.factors.square()

    def dense(self) -> Tensor:
        """Return the matrix, ``(n, n)``."""
        return (self.factors.mT * self.weights) @ self.factors

    def to_csr(self) -> CSR:
        """Return the matrix with all of its n x n entries in sparse form."""
        return Dense(self.dense()).to_csr()

    def to(self, dtype: torch.dtype) -> LowRank:
        """Convert the factors."""
        return LowRank(self.factors.to(dtype), self.weights.to(dtype))

    def shifted_solver(self, metric: Tensor | None = None) -> ShiftedSolver:
        """Prepare for ``(F' diag(w) F + shift B) x = b`` with many shifts; see :class:`ShiftedSolver`."""
        return ShiftedSolver(self, metric)


class ShiftedSolver:
    """Solves ``(F' diag(w) F + shift B) x = b`` for any ``shift > 0``, B the identity or diagonal and positive.

    By one eigendecomposition: with ``G = B^-1/2 F'`` of thin SVD ``U S V'``, the matrix is
    ``B^1/2 (U K U' + shift I) B^1/2`` with the small symmetric ``K = S V' diag(w) V S``, so that after O(n r min(n, r))
    work every further shift costs O(n min(n, r)) (Woodbury's formula, with its cancellation avoided).

    Parameters
    ----------
    A : LowRank
        The matrix.
    metric : Tensor, optional
        Diagonal of B, ``(n,)``. Default: the identity.
    """

    def __init__(self, A: LowRank, metric: Tensor | None = None) -> None:
        self._root = None if metric is None else metric.sqrt()
        G = A.factors if self._root is None else A.factors / self._root
        if A.rank == 1:
            length = G.norm()
            U = G.mT / torch.where(length > 0, length, torch.ones_like(length))
            K = (A.weights * length.square()).reshape(1, 1)
        elif A.rank < A.shape[0]:
            # The Gram matrix F F' would square the condition number; a QR factorisation does not.
            U, R = torch.linalg.qr(G.mT)
            K = (R * A.weights) @ R.mT
        else:
            U, K = None, (G.mT * A.weights) @ G
        values, vectors = torch.linalg.eigh(K)
        self._values = values
        self._basis = vectors if U is None else U @ vectors
        self._whole = U is None

    @property
    def eigenvalues(self) -> Tensor:
        """Of ``B^-1/2 F' diag(w) F B^-1/2``, beside zeros."""
        values: Tensor = self._values
        return values

    def solve(self, shift: float, b: Tensor) -> Tensor:
        """Return x; b is ``(..., n)``.

        Raises
        ------
        NumericalBreakdown
            The shifted matrix is not positive definite.
        """
        shifted = self._values + shift
        if not (shift > 0 or (self._whole and shift == 0)) or bool((shifted <= 0).any()):
            raise NumericalBreakdown(f"LowRank: the matrix shifted by {shift} is not positive definite")
        c = b if self._root is None else b / self._root
        along = c @ self._basis
        if self._whole:
            x: Tensor = (along / shifted) @ self._basis.mT
        else:
            x = c / shift + (along * (1 / shifted - 1 / shift)) @ self._basis.mT
        return x if self._root is None else x / self._root
