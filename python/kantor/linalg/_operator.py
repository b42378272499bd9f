"""Linear operators: the base class, sums and scalings, and the conversion of whatever a user has."""

from __future__ import annotations

import math
from collections.abc import Callable as CallableType
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_float, check_same, check_tensor
from kantor._ranks import Ranks
from kantor.linalg import _native
from kantor.linalg._native import Encoded

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    from kantor.linalg.csr import CSR


class LinearOperator:
    """A linear map on real vectors, applied through :meth:`matvec` or ``A @ x``.

    Sub-classes with ``is_native`` true are applied by native kernels, also inside solvers; they differ only in how they
    are encoded. Vectors are ``(..., n)``: leading dimensions are a batch. ``A @ X`` follows matrix algebra instead: the
    columns of a two-dimensional X are the vectors.

    Attributes
    ----------
    shape : tuple of int
        ``(rows, columns)``.
    dtype : torch.dtype
        Of the entries; vectors must match.
    device : torch.device
        Of the entries; vectors must match.
    ranks : Ranks or None
        The processes that share the operator: each has some rows of all vectors, and `shape` counts those of this
        process. Its products are collective, and solvers sum over the ranks.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Dense, Diagonal
    >>> A = 2 * Dense(torch.eye(2)) + Diagonal(torch.tensor([0.0, 1.0]))
    >>> A.shape, A.is_native, A.diagonal()
    ((2, 2), True, tensor([2., 3.]))
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    grid: tuple[int, ...] | None = None  # shape of grid-shaped vectors, where the operator lives on a grid
    ranks: Ranks | None = None

    # Whether native kernels know it as a term of a sum: preconditioners have passes of their own.
    is_summand = True

    @property
    def is_native(self) -> bool:
        """Whether native kernels apply this operator."""
        return True

    @property
    def requires_grad(self) -> bool:
        """Whether solutions may have derivatives with respect to the operator: of Python code nothing is known."""
        return not self.is_native or any(tensor.requires_grad for tensor in self.encode().operands)

    def encode(self) -> Encoded:
        """Return operands, layout and scales for the native code (csrc/linalg/operator.h)."""
        raise TypeError(f"{type(self).__name__} has no native form")

    def matvec(self, x: Tensor) -> Tensor:
        """Return ``A x`` for x of shape ``(..., columns)``, or ``(..., *grid)`` where the operator lives on a grid.

        Raises
        ------
        TypeError
            x is not a tensor or has another dtype.
        ValueError
            The last dimension or the device differs.
        """
        grid = self.grid
        if grid is not None and isinstance(x, Tensor) and x.ndim >= len(grid) and tuple(x.shape[-len(grid) :]) == grid:
            shaped: Tensor = self.matvec(x.flatten(-len(grid))).unflatten(-1, grid)
            return shaped
        self._check_vector(x, self.shape[1])
        return self._apply(x)

    def _apply(self, x: Tensor) -> Tensor:
        result: Tensor = _native.matvec(*self.encode(), x)
        return result

    def write_product(self, x: Tensor, out: Tensor) -> Tensor:
        """Write ``A x`` to `out`, shaped like it, and return that: what solvers call, with vectors that fit."""
        return out.copy_(self.matvec(x).reshape(out.shape))

    def _check_vector(self, x: Tensor, length: int) -> None:
        name = f"{type(self).__name__}.matvec"
        check_tensor(x, name, "x")
        check_float(x, name, "x")
        if x.device != self.device or x.dtype != self.dtype:
            check_same(name, [("the operator", torch.empty(0, dtype=self.dtype, device=self.device)), ("x", x)])
        if x.ndim == 0 or x.shape[-1] != length:
            hint = "; pass columns as A @ X, or rows" if x.ndim == 2 and x.shape[0] == length else ""
            raise ValueError(f"{name}: x: expected shape (..., {length}), got {tuple(x.shape)}{hint}")

    def __matmul__(self, x: Tensor) -> Tensor:
        check_tensor(x, f"{type(self).__name__} @ x", "x")
        if x.ndim > 2:
            raise ValueError(f"A @ x: expected one or two dimensions, got {x.ndim}; use A.matvec for batches")
        if x.shape[:1] != (self.shape[1],):
            raise ValueError(
                f"A @ x: x: expected shape ({self.shape[1]},) or ({self.shape[1]}, k), got {tuple(x.shape)}; use "
                "A.matvec for rows and for vectors shaped like a grid"
            )
        return self.matvec(x.mT).mT if x.ndim == 2 else self.matvec(x)

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The transposed operator."""
        raise TypeError(f"{type(self).__name__} has no transpose")

    def diagonal(self) -> Tensor:
        """Return the main diagonal, shape ``(n,)``."""
        raise TypeError(f"{type(self).__name__}: the diagonal is not known; pass a preconditioner operator instead")

    def dense(self) -> Tensor:
        """Return the matrix as a dense tensor ``(rows, columns)``. O(rows * columns) memory; differentiable."""
        return self.matvec(torch.eye(self.shape[1], dtype=self.dtype, device=self.device)).mT

    def to_csr(self) -> CSR:
        """Return the matrix in compressed sparse row form. Differentiable."""
        raise TypeError(f"{type(self).__name__} has no sparse form; build a CSR for methods that need the entries")

    def entries(self) -> CSR:
        """Return the matrix in compressed sparse row form, of the operator's own shape. Differentiable."""
        return self.to_csr()

    def to_scipy(self) -> ScipyOperator:
        """Return a ``scipy.sparse.linalg.LinearOperator`` on the host (needs scipy, extra ``cli``).

        Its products run here, all columns of a block at once, in the operator's dtype and on its device; their vectors
        are NumPy arrays. Operators without a transpose have no ``rmatvec``.
        """
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        def apply(operator: LinearOperator) -> tuple[CallableType[[Any], Any], CallableType[[Any], Any]]:
            def matmat(X: Any) -> Any:
                if X.dtype.kind == "c":
                    name = f"{type(self).__name__}.to_scipy"
                    raise TypeError(f"{name}: x: expected real numbers, got {X.dtype}; apply it to .real and .imag")
                rows = torch.tensor(X.T, dtype=operator.dtype, device=operator.device)  # a copy: X may be read-only
                return operator.matvec(rows).detach().cpu().numpy().T

            return lambda x: matmat(x.reshape(-1)), matmat

        matvec, matmat = apply(self)
        rmatvec = rmatmat = None
        with suppress(TypeError):  # unknown transpose: solvers for symmetric operators do not need it
            rmatvec, rmatmat = apply(self.T)
        dtype = str(self.dtype).removeprefix("torch.")
        return ScipyOperator(self.shape, matvec=matvec, rmatvec=rmatvec, matmat=matmat, rmatmat=rmatmat, dtype=dtype)

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Return the operator with its entries converted to another floating-point dtype."""
        raise TypeError(f"{type(self).__name__} cannot change its dtype")

    def admit(self, b: Tensor, name: str) -> Tensor:
        """Return the right-hand side ``(..., n)`` that a solver works on: `b`, or its part in the operator's range.

        Raises
        ------
        ValueError
            The system has no solution; the message starts with `name`, the solver's.
        """
        return b

    def settle(self, x: Tensor) -> Tensor:
        """Return the solution ``(..., n)`` that a solver hands out: `x`, or the one of several that is meant."""
        return x

    def asymmetry(self) -> tuple[float, str]:
        """Return how far the operator is from symmetric, relative to its entries, and where.

        Zero for forms that are symmetric by construction; ``max |a_ij - a_ji| / max |a_ij|`` for matrices; for
        callables a probe ``|u'Av - v'Au| / (|u||Av|)`` with fixed vectors.
        """
        return 0.0, ""

    def _asymmetry_by_probe(self) -> tuple[float, str]:
        before = 0
        if self.ranks is not None:
            before = sum(row[0] for row in self.ranks.table(self.shape[0])[: self.ranks.rank])
        steps = torch.arange(before + 1, before + self.shape[0] + 1, dtype=torch.float64, device=self.device)
        u, v = torch.sin(steps * 1.2345).to(self.dtype), torch.cos(steps * steps * 0.5432).to(self.dtype)
        with torch.no_grad():
            # Copies: the function may hand out the same memory each time.
            Au, Av = (self.matvec(w).to(torch.float64, copy=True) for w in (u, v))
        u, v = u.double(), v.double()
        sums = torch.stack([u @ u, v @ v, Au @ Au, Av @ Av, u @ Av, v @ Au])
        if self.ranks is not None:
            self.ranks.all_reduce_(sums)
        uu, vv, AuAu, AvAv, uAv, vAu = sums.tolist()
        size = math.sqrt(uu * AvAv) + math.sqrt(vv * AuAu)
        return (abs(uAv - vAu) / size if size > 0 else 0.0), "u'Av differs from v'Au for a probe u, v"

    def __add__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return Sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        if not isinstance(other, LinearOperator):
            return NotImplemented
        return Sum([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: object) -> LinearOperator:
        if isinstance(factor, Tensor) or not isinstance(factor, int | float):
            raise TypeError(
                "operator * factor: expected a Python number; to differentiate with respect to a factor scale the "
                "operator's tensors instead"
            )
        return Sum([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {dtype}, {self.device})"


class Sum(LinearOperator):
    """Weighted sum of operators; native when all of its terms are. Made by ``+``, ``-`` and ``*``."""

    terms: list[tuple[float, LinearOperator]]

    def __init__(self, terms: list[tuple[float, LinearOperator]]) -> None:
        flat: list[tuple[float, LinearOperator]] = []
        for scale, term in terms:
            flat += [(scale * s, t) for s, t in term.terms] if isinstance(term, Sum) else [(scale, term)]
        first = flat[0][1]
        for _, term in flat[1:]:
            if term.shape != first.shape:
                raise ValueError(f"operator sum: shapes differ: {first.shape} and {term.shape}")
            if term.dtype != first.dtype or term.device != first.device:
                raise TypeError(
                    f"operator sum: {first!r} and {term!r} differ in dtype or device; convert one with .to(dtype)"
                )
        self.terms = flat
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device
        self.ranks = next((term.ranks for _, term in flat if term.ranks is not None), None)
        grids = {term.grid for _, term in flat if term.grid is not None}
        self.grid = grids.pop() if len(grids) == 1 else None  # of two shapes neither is meant

    @property
    def is_native(self) -> bool:
        """Whether native kernels apply every term."""
        return all(term.is_native and term.is_summand for _, term in self.terms)

    @property
    def requires_grad(self) -> bool:
        """Whether a term does."""
        return any(term.requires_grad for _, term in self.terms)

    def encode(self) -> Encoded:
        """Concatenate the encodings of the terms."""
        encoded = Encoded([], [], [])
        for scale, term in self.terms:
            operands, layout, scales = term.encode()
            encoded.operands.extend(operands)
            encoded.layout.extend(layout)
            encoded.scales.extend(scale * s for s in scales)
        return encoded

    def admit(self, b: Tensor, name: str) -> Tensor:
        """As the operator itself does where this is a multiple of one; see :meth:`LinearOperator.admit`."""
        return self.terms[0][1].admit(b, name) if len(self.terms) == 1 else b

    def settle(self, x: Tensor) -> Tensor:
        """As the operator itself does where this is a multiple of one; see :meth:`LinearOperator.settle`."""
        return self.terms[0][1].settle(x) if len(self.terms) == 1 else x

    def _apply(self, x: Tensor) -> Tensor:
        if self.is_native:
            return super()._apply(x)
        result: Tensor = sum((scale * term.matvec(x) for scale, term in self.terms[1:]), self._first(x))
        return result

    def _first(self, x: Tensor) -> Tensor:
        scale, term = self.terms[0]
        return scale * term.matvec(x)

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """The transposed sum."""
        return Sum([(scale, term.T) for scale, term in self.terms])

    def diagonal(self) -> Tensor:
        """Return the sum of the terms' diagonals."""
        return torch.stack([scale * term.diagonal() for scale, term in self.terms]).sum(0)

    def to_csr(self) -> CSR:
        """Merge the terms' entries into one sparse matrix."""
        from kantor.linalg.csr import CSR

        parts = [(scale, term.entries()) for scale, term in self.terms]
        return CSR.from_coo(
            torch.cat([_native.csr_rows(part.crow, part.col.numel()) for _, part in parts]),
            torch.cat([part.col for _, part in parts]),
            torch.cat([scale * part.values for scale, part in parts]),
            self.shape,
        )

    def to(self, dtype: torch.dtype) -> LinearOperator:
        """Convert every term."""
        return Sum([(scale, term.to(dtype)) for scale, term in self.terms])

    def asymmetry(self) -> tuple[float, str]:
        """Return the largest asymmetry of the terms; when not small, that of the sum, where they may make up for it."""
        if self.ranks is not None:
            return self._asymmetry_by_probe()
        worst = max((term.asymmetry() for _, term in self.terms), key=lambda pair: pair[0])
        if worst[0] <= 1e2 * torch.finfo(self.dtype).eps:
            return worst
        try:
            return self.to_csr().asymmetry()
        except TypeError:  # a term without entries
            return self._asymmetry_by_probe()


def require_one_process(A: LinearOperator, name: str) -> None:
    """Raise TypeError where the rows are shared among processes and the method would sum over its own only."""
    if A.ranks is not None:
        raise TypeError(
            f"{name}: A: {A!r} is shared by {A.ranks.size} processes; across them there are cg and capped_cg"
        )


def as_operator(A: Any, *, like: Tensor | None = None) -> LinearOperator:
    """Return ``A`` as a :class:`LinearOperator`.

    Parameters
    ----------
    A : LinearOperator, Tensor, torch sparse tensor, scipy sparse matrix or array, LinearOperator, or callable
        Dense tensors are ``(rows, columns)``; torch's sparse layouts are COO, CSR, CSC, BSR and BSC. A callable takes
        and returns ``(..., n)``; `like` tells its size.
    like : Tensor, optional
        A vector ``(..., n)``: size, dtype and device of a callable, and of scipy's operators.

    Raises
    ------
    TypeError
        A is none of these, or not real floating point.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import as_operator
    >>> as_operator(torch.eye(3))
    Dense(3 x 3, float32, cpu)
    """
    from kantor.linalg.callable import Callable
    from kantor.linalg.csr import CSR
    from kantor.linalg.dense import Dense

    if isinstance(A, LinearOperator):
        return A
    if isinstance(A, Tensor):
        return Dense(A) if A.layout is torch.strided else CSR.from_any(A)
    module = type(A).__module__
    if module.startswith("scipy.sparse.linalg") or (module.startswith("scipy") and hasattr(A, "rmatvec")):
        return Callable.from_scipy(A, like=like)
    if module.startswith("scipy.sparse") or hasattr(A, "tocsr"):
        return CSR.from_any(A)
    hint = ""
    if isinstance(A, np.ndarray):
        hint = "; call torch.from_numpy(A)"
    elif hasattr(A, "laplacian"):  # kantor.graph.Graph
        hint = "; a graph has several matrices: take .laplacian() or .adjacency()"
    elif hasattr(A, "edge_index"):  # of torch_geometric
        hint = "; call kantor.graph.from_pyg(A), and .laplacian() or .adjacency() of that"
    elif callable(A):
        if like is None:
            raise TypeError("as_operator: a bare callable has no size; wrap it as kantor.linalg.Callable(fn, n)")
        return Callable(A, like.shape[-1], dtype=like.dtype, device=like.device)
    raise TypeError(
        "as_operator: A: expected a tensor, a kantor operator, a scipy sparse matrix or LinearOperator, or a callable, "
        f"got {type(A).__name__}{hint}"
    )
