"""Randomised preconditioning of shifted systems."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kantor.linalg._native import Encoded
from kantor.linalg._operator import LinearOperator, as_operator, require_one_process
from kantor.linalg.diagonal import Diagonal
from kantor.linalg.low_rank import LowRank


class NystromPreconditioner(LinearOperator):
    """Close to a multiple of ``(A + 2 damping I)^-1``; made by :func:`nystrom`.

    ``P^-1 v = (s + 2 damping) U diag(1 / (S + 2 damping)) U'v + (v - U U'v)`` with the sketch's largest eigenvalues S,
    eigenvectors U and s the smallest of S. Symmetric positive definite.

    Attributes
    ----------
    n_hvp : int
        Products with A that the sketch took.
    damping : float
        The damping.
    """

    def __init__(self, basis: Tensor, values: Tensor, damping: float, n_hvp: int) -> None:
        self.basis, self.values, self.damping, self.n_hvp = basis, values, damping, n_hvp
        self.shape = (basis.shape[0], basis.shape[0])
        self.dtype, self.device = basis.dtype, basis.device
        shifted = values + 2 * damping
        weights = shifted.min() / shifted - 1
        self._form = Diagonal(basis.new_ones(basis.shape[0])) + LowRank(basis.mT.contiguous(), weights)

    def encode(self) -> Encoded:
        """The identity and a low-rank term."""
        return self._form.encode()

    def diagonal(self) -> Tensor:
        """Return the main diagonal."""
        return self._form.diagonal()

    def to(self, dtype: torch.dtype) -> NystromPreconditioner:
        """Convert the sketch."""
        return NystromPreconditioner(self.basis.to(dtype), self.values.to(dtype), self.damping, self.n_hvp)

    @property
    def T(self) -> NystromPreconditioner:  # noqa: N802
        """Itself."""
        return self

    def with_damping(self, damping: float) -> NystromPreconditioner:
        """Return the preconditioner of the same sketch for another damping; no product with A is needed."""
        return NystromPreconditioner(self.basis, self.values, damping, self.n_hvp)


def nystrom(
    A: Any,
    rank: int,
    *,
    damping: float = 0.0,
    like: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NystromPreconditioner:
    """Sketch a symmetric operator and return a preconditioner for ``A + 2 damping I``.

    For matrices whose eigenvalues fall off fast: the `rank` largest are dealt with, and the condition number is that of
    the rest.

    Parameters
    ----------
    A : LinearOperator, Tensor, sparse tensor, scipy sparse matrix, or callable
        ``(n, n)``, symmetric; see :func:`as_operator`. Applied `rank` times, to one vector each; a native operator to
        all of them at once.
    rank : int
        Size of the sketch, 1 to n.
    damping : float
        >= 0.
    like : Tensor, optional
        A vector ``(n,)``, for a callable A.
    generator : torch.Generator, optional
        Of the random directions. Default: one with a fixed seed, so that results repeat.

    Returns
    -------
    NystromPreconditioner
        An operator for the argument ``M_inv`` of :func:`capped_cg` and ``M`` of :func:`cg`.

    Raises
    ------
    ValueError
        rank or damping out of range.

    Notes
    -----
    O(n rank) memory, O(n rank^2) work beside the products. Directions in which the sketch is not positive are shifted
    by twice the most negative eigenvalue, so that the result is positive definite for any A.

    Source: Frangella, Tropp & Udell, *Randomized Nyström preconditioning*, SIAM J. Matrix Anal. Appl. 44 (2023); the
    shift is that of Zhou et al., arXiv 2502.04799.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import cg, nystrom
    >>> A = torch.diag(torch.logspace(-1, 4, 200, dtype=torch.float64))
    >>> b = torch.ones(200, dtype=torch.float64)
    >>> plain, sketched = cg(A, b, rtol=1e-8), cg(A, b, rtol=1e-8, M=nystrom(A, 120))
    >>> bool(sketched.converged and sketched.iterations < plain.iterations / 2)
    True
    """
    operator = as_operator(A, like=like)
    require_one_process(operator, "nystrom")
    n = operator.shape[0]
    if not (isinstance(rank, int) and 1 <= rank <= n):
        raise ValueError(f"nystrom: rank: expected an integer from 1 to {n}, got {rank!r}")
    if not damping >= 0:
        raise ValueError(f"nystrom: damping: expected a number >= 0, got {damping!r}")
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        random = torch.randn(n, rank, dtype=torch.float64, generator=generator).to(operator.device, operator.dtype)
        test, _ = torch.linalg.qr(random)
        vectors = test.mT.contiguous()
        if operator.is_native:
            sketch = operator.matvec(vectors).mT
        else:  # one by one, and copied: the function may hand out the same memory each time
            sketch = torch.stack([operator.matvec(vector).clone() for vector in vectors], dim=1)
        if not bool(torch.isfinite(sketch).all()):
            raise ValueError("nystrom: A: expected finite products, got NaN or infinity")
        core = test.mT @ sketch
        core = (core + core.mT) / 2
        size = core.abs().max()
        lowest = torch.linalg.eigvalsh(core)[0]
        rounding = torch.finfo(core.dtype).eps * n**0.5 * size
        shift = rounding + (2 * lowest.abs() if bool(lowest < 0) else 0)
        factor = torch.linalg.cholesky(core + shift * torch.eye(rank, dtype=core.dtype, device=core.device))
        half = torch.linalg.solve_triangular(factor, (sketch + shift * test).mT, upper=False).mT
        basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
        values = (singular.square() - shift).clamp_min(0)
        tiny = torch.finfo(core.dtype).tiny
        values = values.clamp_min(float(torch.maximum(rounding, torch.as_tensor(tiny).to(rounding))))
    return NystromPreconditioner(basis, values, float(damping), rank)
