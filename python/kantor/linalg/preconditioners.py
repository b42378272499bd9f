"""Preconditioners: operators that approximate the inverse."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import host, is_readable
from kantor._errors import NumericalBreakdown
from kantor.linalg import _native
from kantor.linalg._native import INCOMPLETE_CHOLESKY, Encoded
from kantor.linalg._operator import LinearOperator, as_operator
from kantor.linalg.callable import Callable
from kantor.linalg.diagonal import Diagonal
from kantor.linalg.poisson_grid import PoissonGrid

_SHIFTS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def jacobi(A: Any) -> Diagonal:
    """Return the Jacobi preconditioner ``M = diag(A)^-1``.

    Parameters
    ----------
    A : anything :func:`as_operator` takes
        Its diagonal must be known and positive.

    Raises
    ------
    ValueError
        A diagonal entry is zero or negative; the message names the row.
    TypeError
        The operator does not know its diagonal.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Dense, jacobi
    >>> jacobi(Dense(torch.tensor([[2.0, 1.0], [1.0, 4.0]]))).diagonal()
    tensor([0.5000, 0.2500])
    """
    operator = as_operator(A)
    diagonal = operator.diagonal().detach()
    if isinstance(operator, PoissonGrid):  # cells that are no unknowns have no diagonal
        inverse = 1 / diagonal
        return Diagonal(torch.where(diagonal > 0, inverse, torch.zeros_like(inverse)))
    if is_readable(diagonal) and bool((diagonal <= 0).any()):
        row = int((diagonal <= 0).nonzero()[0])
        raise ValueError(
            f"jacobi: A: diagonal entry {row} is {float(diagonal[row]):g}; a symmetric positive definite matrix has a "
            "positive diagonal"
        )
    return Diagonal(1 / diagonal)


class IncompleteCholesky(LinearOperator):
    """The operator ``(L L')^-1`` with L the incomplete Cholesky factor without fill; made by :func:`ic0`.

    Attributes
    ----------
    shift : float
        The diagonal of A was multiplied by ``1 + shift`` before the factorisation (0 unless it broke down without).
    levels : int
        Levels of the triangular solves: rows of one level are solved in parallel.
    """

    is_summand = False

    def __init__(self, encoded: Encoded, n: int, shift: float, dtype: torch.dtype, device: torch.device) -> None:
        self._encoded = encoded
        self.shape, self.dtype, self.device = (n, n), dtype, device
        self.shift = shift
        self.levels = encoded.layout[2]

    def encode(self) -> Encoded:
        """The factor, its transpose and their level schedule."""
        return self._encoded

    def _apply(self, x: Tensor) -> Tensor:
        operands, layout, _ = self._encoded
        result: Tensor = _native.ic0_solve(operands, layout, x)
        return result

    def to(self, dtype: torch.dtype) -> IncompleteCholesky:
        """Convert the factor."""
        operands = [t.to(dtype) if t.is_floating_point() else t for t in self._encoded.operands]
        return IncompleteCholesky(
            self._encoded._replace(operands=operands), self.shape[0], self.shift, dtype, self.device
        )

    @property
    def T(self) -> IncompleteCholesky:  # noqa: N802
        """Itself: the operator is symmetric."""
        return self


def ic0(A: Any) -> IncompleteCholesky:
    """Return the incomplete Cholesky preconditioner without fill, IC(0).

    ``A ~ L L'`` on the pattern of A's lower triangle (Meijerink & van der Vorst 1977). Where the factorisation meets a
    pivot that is not positive, the diagonal is scaled up and it starts again (Manteuffel 1980); ``.shift`` tells by how
    much. The solves are scheduled by levels and give the same bits for any number of threads.

    Parameters
    ----------
    A : anything :func:`as_operator` takes
        With known entries (CSR, dense, stencils, sums of these), symmetric.

    Raises
    ------
    ValueError
        Not square, not symmetric, or a diagonal entry is missing.
    TypeError
        The operator's entries are not known.
    NumericalBreakdown
        No shift up to 10 gave positive pivots: A is far from positive definite. Use ``jacobi``.

    Notes
    -----
    O(nnz * entries per row) once, on one host thread; each application reads the factor twice.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Stencil, cg, ic0
    >>> A, b = Stencil((64, 64)), torch.ones(64, 64, dtype=torch.float64)
    >>> cg(A, b).iterations > 2 * cg(A, b, M=ic0(A)).iterations
    True
    """
    operator = as_operator(A)
    matrix = operator.entries()
    n = matrix.shape[0]
    if matrix.shape[1] != n:
        raise ValueError(f"ic0: A: expected a square matrix, got {matrix.shape}")
    relative, where = matrix.asymmetry()
    if relative > 1e-6 if matrix.dtype == torch.float32 else relative > 1e-12:
        raise ValueError(f"ic0: A is not symmetric: {where}; symmetrise it as (A + A.T) / 2 if that is what you mean")
    if matrix.nnz >= 2**31 or n >= 2**31:
        raise ValueError("ic0: A: more than 2^31 entries; use jacobi")
    crow, col, values = (host(t) for t in (matrix.crow, matrix.col, matrix.values))
    rows = _native.csr_rows(crow, col.numel())
    lower = col <= rows
    counts = torch.bincount(rows[lower], minlength=n)
    l_crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    l_col, l_values = col[lower].int(), values[lower].contiguous()
    missing = torch.ones(n, dtype=torch.bool)
    missing[col[col == rows].long()] = False
    if bool(missing.any()):
        raise ValueError(f"ic0: A: row {int(missing.nonzero()[0])} has no diagonal entry")
    if operator.grid is not None:  # cells that are no unknowns have rows of zeros: they factor as the identity does
        sums = values.new_zeros(n).index_add(0, rows, values.abs())
        ends = l_crow[1:].long() - 1
        l_values[ends] = torch.where(sums == 0, torch.ones_like(sums), l_values[ends])
    factor = torch.empty_like(l_values)
    row = -1
    for shift in _SHIFTS:
        row = _C.ic0_factor(l_crow, l_col, l_values, shift, factor)
        if row < 0:
            break
    else:
        raise NumericalBreakdown(
            f"ic0: A: the pivot of row {row} is not positive even with the diagonal scaled by 11: A is not positive "
            "definite or far from diagonally dominant; use M='jacobi' or none"
        )
    pointers, order = torch.empty(n + 1, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    levels = int(_C.level_schedule(l_crow, l_col, pointers, order))
    l_crow, l_col, factor = _reorder(l_crow, l_col, factor, order.long())
    factor[l_crow[1:].long() - 1] = 1 / factor[l_crow[1:].long() - 1]
    u_crow, u_col, permutation = torch.empty_like(l_crow), torch.empty_like(l_col), torch.empty_like(l_col)
    _C.csr_transpose(l_crow, l_col, u_crow, u_col, permutation)
    upper = factor[permutation.long()]
    operands = [l_crow, l_col, factor, u_crow, u_col, upper, pointers[: levels + 1].clone(), order]
    encoded = Encoded([t.to(matrix.device) for t in operands], [INCOMPLETE_CHOLESKY, n, levels], [1.0])
    return IncompleteCholesky(encoded, n, shift, matrix.dtype, matrix.device)


def _reorder(crow: Tensor, col: Tensor, values: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a symmetric permutation; entries keep their order within a row, so that the diagonal stays last."""
    counts = crow.diff().long()[order]
    new_crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    within = torch.arange(col.numel()) - torch.repeat_interleave(new_crow[:-1], counts)
    source = torch.repeat_interleave(crow[:-1].long()[order], counts) + within
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel())
    return new_crow.int(), rank[col.long()[source]].int(), values[source].contiguous()


def _multigrid(A: LinearOperator) -> LinearOperator:
    from kantor.linalg.multigrid import Multigrid

    return A._multigrid() if isinstance(A, PoissonGrid) else Multigrid(A)  # type: ignore[arg-type]  # says what it takes


def as_preconditioner(M: Any, A: LinearOperator, like: Tensor, name: str = "cg: M") -> LinearOperator | None:
    """Resolve the argument `name` of a solver: None, a name, an operator or a callable."""
    if A.ranks is not None:
        solver, _, argument = name.partition(": ")
        kind = 0 if M is None else 2 + zlib.crc32(M.encode()) if isinstance(M, str) else 1
        A.ranks.agree(solver, **{argument: kind})
    if M is None:
        return None
    if isinstance(M, str):
        builders = {"jacobi": jacobi, "ic0": ic0, "multigrid": _multigrid}
        if M not in builders:
            raise ValueError(f"{name}: expected 'jacobi', 'ic0', 'multigrid', an operator or a callable, got {M!r}")
        if M == "multigrid" or A.ranks is None:
            return builders[M](A)
        with A.ranks.together():  # of this rank's rows and columns alone: block Jacobi
            return (
                builders[M](A)
                if A.shape[0] or M == "jacobi"
                else Callable(torch.clone, 0, dtype=A.dtype, device=A.device)
            )
    if M is jacobi or M is ic0 or (isinstance(M, type) and issubclass(M, LinearOperator)):
        given = getattr(M, "__name__", "")
        hint = f"{given}(A)" + (f" or {given!r}" if given in ("jacobi", "ic0") else "")
        raise TypeError(f"{name}: expected an operator, got what makes one, {given}; pass {hint}")
    operator = as_operator(M, like=like)
    if operator.shape != A.shape:
        raise ValueError(f"{name}: expected shape {A.shape}, got {operator.shape}")
    if operator.dtype != A.dtype or operator.device != A.device:
        raise TypeError(f"{name} is {operator!r}, A is {A!r}: dtype and device must match; convert one with .to(dtype)")
    return operator
