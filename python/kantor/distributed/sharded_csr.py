"""A sparse matrix whose rows are shared among processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kantor._ranks import Ranks
from kantor.distributed._halo import Halo
from kantor.distributed.shares import gather, shares, split
from kantor.linalg import CSR, Callable, LinearOperator
from kantor.linalg._native import csr_rows, write_matvec


class ShardedCSR(LinearOperator):
    """A square sparse matrix, cut into contiguous blocks of rows, one for each rank; vectors are cut alike.

    ``cg(A, b)`` and ``capped_cg(A, g)`` take it like any operator: each rank passes its rows of the vectors and gets
    its rows of the solution. ``M="jacobi"`` is the same preconditioner as on one process; ``M="ic0"`` factorises the
    block of each rank by itself (block Jacobi), so it weakens as the ranks become more.

    The entries of other ranks that a row needs, its *ghosts*, are found once, here. A product exchanges them, and
    multiplies what needs none while they are under way.

    Parameters
    ----------
    crow, col, values : Tensor
        This rank's rows, as in :class:`kantor.linalg.CSR`, with the columns of the whole matrix; there may be none.
    ranks : Ranks, optional
        Default: those of the default group.

    Attributes
    ----------
    shape : tuple of int
        ``(rows, rows)`` of this rank: the length of its vectors.
    n : int
        Rows of the whole matrix.
    begin : int
        The first row of this rank.
    counts : list of int
        Rows of every rank.
    nnz : int
        Entries of this rank.
    ghosts : int
        Vector entries that this rank receives for a product.
    own : CSR
        The block of this rank's rows and columns.

    Raises
    ------
    TypeError, ValueError
        On every rank, what :class:`kantor.linalg.CSR` raises on one, with the rank in the message.

    Notes
    -----
    Memory: the rows' entries, with columns as int32 where they fit. Traffic of a product: one message to each
    neighbour, together ``8 * ghosts`` bytes received in double precision. A solution is differentiable with respect to
    b and ``values``, rank by rank; backward is collective too. Deterministic for one number of ranks; another number
    adds in another order.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import ShardedCSR
    >>> from kantor.linalg import Stencil, cg
    >>> A = ShardedCSR.from_csr(Stencil((16, 16)).to_csr())
    >>> b = torch.ones(A.shape[0], dtype=torch.float64)
    >>> str(cg(A, b).status)
    'converged'
    """

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor, ranks: Ranks | None = None) -> None:
        ranks = Ranks() if ranks is None else ranks
        self.ranks = ranks
        rows = crow.numel() - 1 if isinstance(crow, Tensor) else -1
        self.counts = [row[0] for row in ranks.table(rows)]
        self.n, self.begin = sum(self.counts), sum(self.counts[: ranks.rank])
        end = self.begin + rows
        with ranks.together():
            local = CSR(crow, col, values, (rows, self.n))
        ranks.agree("ShardedCSR", **{"values: bytes of an entry": local.values.element_size()})
        self.shape, self.dtype, self.device = (rows, rows), local.dtype, local.device
        self.nnz = local.nnz
        row, column, entries = csr_rows(local.crow, local.nnz), local.col.long(), local.values
        inside = (column >= self.begin) & (column < end)
        outside = ~inside
        needed = torch.unique(column[outside])  # sorted, so those of one rank lie together
        self.ghosts = needed.numel()
        touched, position = torch.unique(row[outside], return_inverse=True)  # rows that need ghosts
        self._touched = touched.long()
        self.own = CSR.from_coo(row[inside], column[inside] - self.begin, entries[inside], (rows, rows))
        self._coupling = CSR.from_coo(
            position, torch.searchsorted(needed, column[outside]), entries[outside], (touched.numel(), self.ghosts)
        )
        self._halo = Halo(needed, self.counts, ranks)

    @classmethod
    def from_rows(cls, A: Any, ranks: Ranks | None = None) -> ShardedCSR:
        """Build from this rank's rows as a matrix ``(rows, n)``, anything that :meth:`CSR.from_any` takes."""
        ranks = Ranks() if ranks is None else ranks
        with ranks.together():
            local = CSR.from_any(A)
        total = int(ranks.sum(local.shape[0])[0])
        with ranks.together():
            if local.shape[1] != total:
                raise ValueError(
                    f"ShardedCSR.from_rows: A: expected {total} columns, as many as there are rows on all ranks, got "
                    f"{local.shape[1]}"
                )
        return cls(local.crow, local.col, local.values, ranks)

    @classmethod
    def from_csr(
        cls, A: Any, ranks: Ranks | None = None, *, counts: Sequence[int] | None = None, source: int | None = None
    ) -> ShardedCSR:
        """Cut a whole matrix into blocks of rows.

        Parameters
        ----------
        A : anything :meth:`CSR.from_any` takes
            Square. All ranks hold it, or `source` alone, and the others pass None.
        ranks : Ranks, optional
            Default: those of the default group.
        counts : sequence of int, optional
            Rows for each rank. Default: equal but for one.
        source : int, optional
            The rank that deals out the rows.
        """
        ranks = Ranks() if ranks is None else ranks
        return cls(*split_rows("ShardedCSR.from_csr", A, ranks, counts, source), ranks)

    # --- products ---

    @property
    def is_native(self) -> bool:
        """False: a product exchanges vector entries between native products."""
        return False

    @property
    def requires_grad(self) -> bool:
        """Whether the values do."""
        return self.own.values.requires_grad or self._coupling.values.requires_grad

    def _apply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.requires_grad):
            ghosts = self._halo.ghosts(x)
            y = self.own.matvec(x)
            # Also without ghosts of its own: backward is collective.
            return y.index_add(-1, self._touched, self._coupling.matvec(ghosts))
        return self.write_product(x, x.new_empty(x.shape))

    def write_product(self, x: Tensor, out: Tensor) -> Tensor:
        """Write ``A x`` to `out` and return that; no derivatives."""
        arrived = self._halo.start(x)
        write_matvec(self.own.encode(), x, out)
        ghosts = arrived()
        return out.index_add_(-1, self._touched, self._coupling.matvec(ghosts)) if self.ghosts else out

    def _apply_transposed(self, x: Tensor) -> Tensor:
        """``A' x``: what the coupling makes of x goes home to the ranks that own it."""
        y = self.own.T.matvec(x)
        if self.ghosts:
            ghosts = self._coupling.T.matvec(x.index_select(-1, self._touched))
        else:
            ghosts = x.new_zeros((*x.shape[:-1], 0))
        return y + self._halo.give_back(ghosts)

    # --- what solvers and preconditioners ask for ---

    @property
    def T(self) -> Callable:  # noqa: N802
        """The transposed matrix, shared alike."""
        return Callable(
            self._apply_transposed, self.shape[0], dtype=self.dtype, device=self.device, transpose=self._apply,
            ranks=self.ranks,
        )  # fmt: skip

    def diagonal(self) -> Tensor:
        """Return this rank's part of the main diagonal."""
        return self.own.diagonal()

    def entries(self) -> CSR:
        """Return the block of this rank's rows and columns: what a preconditioner of the block is made from."""
        return self.own

    def dense(self) -> Tensor:
        """Not available: a column belongs to all ranks."""
        raise TypeError("ShardedCSR has no dense form; gather the rows, or build the whole matrix on one process")

    def to(self, dtype: torch.dtype) -> ShardedCSR:
        """Convert the values."""
        other = object.__new__(ShardedCSR)
        other.__dict__.update(self.__dict__)
        other.own, other._coupling, other.dtype = self.own.to(dtype), self._coupling.to(dtype), dtype
        return other

    def asymmetry(self) -> tuple[float, str]:
        """Return a probe ``|u'Av - v'Au|`` relative to its terms, over all ranks."""
        return self._asymmetry_by_probe()

    def split(self, b: Tensor | None, source: int | None = None) -> Tensor:
        """Return this rank's share of vectors ``(..., n)``: of a tensor that all hold, or that `source` deals out."""
        assert self.ranks is not None
        return split(b, self.ranks, self.counts, source=source)

    def gather(self, x: Tensor, target: int | None = None) -> Tensor | None:
        """Return the whole vectors ``(..., n)`` from the shares, on every rank, or on `target` and None elsewhere."""
        assert self.ranks is not None
        return gather(x, self.ranks, target=target)

    def __repr__(self) -> str:
        assert self.ranks is not None
        dtype = str(self.dtype).removeprefix("torch.")
        rows = f"rows {self.begin}..{self.begin + self.shape[0] - 1}" if self.shape[0] else "no rows"
        return (
            f"ShardedCSR({self.n} x {self.n}, {dtype}, {self.device}; rank {self.ranks.rank} of {self.ranks.size}: "
            f"{rows}, {self.nnz} entries, {self.ghosts} ghosts)"
        )


def split_rows(
    call: str, A: Any, ranks: Ranks, counts: Sequence[int] | None, source: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, columns and values of this rank's rows of a matrix that all hold, or `source` alone."""
    header: tuple[list[int], list[int], torch.dtype] | None = None
    matrix: CSR | None = None
    with ranks.together():
        if source is None or ranks.rank == source:
            matrix = CSR.from_any(A)
            if matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"{call}: expected a square matrix, got {matrix.shape}")
            rows = list(counts) if counts is not None else shares(matrix.shape[0], ranks.size)
            if len(rows) != ranks.size or sum(rows) != matrix.shape[0] or min(rows) < 0:
                raise ValueError(
                    f"{call}: counts: expected {ranks.size} numbers that add up to {matrix.shape[0]}, got {rows}"
                )
            ends = torch.tensor([0, *rows]).cumsum(0)
            entries = matrix.crow.long().cpu()[ends].diff().tolist()
            header = (rows, entries, matrix.dtype)
    if source is not None:
        header = ranks.broadcast_object(header, source)
    assert header is not None
    rows, entries, _ = header
    lengths = None if matrix is None else matrix.crow.diff()
    length = split(lengths, ranks, rows, source=source)
    col = split(None if matrix is None else matrix.col, ranks, entries, source=source)
    values = split(None if matrix is None else matrix.values, ranks, entries, source=source)
    crow = torch.cat([length.new_zeros(1), length.cumsum(0)])
    return crow, col, values
