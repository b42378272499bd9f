"""Poisson problems on voxel grids whose planes are shared among processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_float, host
from kantor._ranks import Ranks
from kantor.distributed._slabs import Halo, Planes, owned
from kantor.distributed.shares import gather, split
from kantor.linalg import PoissonGrid
from kantor.linalg._native import POISSON, Encoded, write_matvec
from kantor.linalg.poisson_grid import AIR, FLUID, SOLID

if TYPE_CHECKING:
    from kantor.distributed.multigrid import ShardedMultigrid


class ShardedPoissonGrid(PoissonGrid):
    """A :class:`kantor.linalg.PoissonGrid` cut into slabs along its first axis, one for each rank.

    ``cg(A, b)`` and ``capped_cg(A, g)`` take it like any operator: each rank passes its planes of the vectors and gets
    its planes of the solution. ``M="multigrid"`` is :class:`ShardedMultigrid`, which makes the same iterations as
    :class:`kantor.linalg.Multigrid` on one process; ``M="jacobi"`` too is the same; ``M="ic0"`` factorises the slab of
    each rank by itself.

    A product sends one plane to each neighbour, and multiplies inside the slab while it is under way. Components of the
    fluid are those of the whole grid, however often a slab cuts through them.

    Parameters
    ----------
    flags : Tensor
        This rank's planes, ``(planes, nx)`` or ``(planes, ny, nx)``, integers as in :class:`kantor.linalg.PoissonGrid`;
        there may be none. See :meth:`from_global` for the whole grid.
    ranks : Ranks, optional
        Default: those of the default group.
    spacing : float
        Grid spacing h.
    face_coef : sequence of Tensor, optional
        Coefficients of the faces of this rank's cells: along the first axis one more than planes, so that those between
        two ranks are given on both. Solutions have no derivatives with respect to them.
    dtype : torch.dtype, optional
        float32 or float64; default that of ``face_coef``, else float64.

    Attributes
    ----------
    shape : tuple of int
        ``(cells, cells)`` of this rank: the length of its vectors.
    grid : tuple of int
        The shape of this rank's part of vectors that are shaped like the grid.
    whole_grid : tuple of int
        That of the whole grid.
    n : int
        Cells of the whole grid.
    planes : range
        The planes of this rank.
    counts : list of int
        Planes of every rank.
    closed_components : tuple of Tensor and int
        As for the whole grid; the labels are those of this rank's cells.

    Raises
    ------
    TypeError, ValueError
        On every rank, what :class:`kantor.linalg.PoissonGrid` raises, with the rank in the message; and where the
        ranks' planes differ in shape or coefficients of a common face differ.

    Notes
    -----
    Memory: the planes' own, and a plane on either side. Traffic of a product: one plane to each neighbour.
    Deterministic for one number of ranks; another number adds inner products in another order.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import ShardedPoissonGrid
    >>> from kantor.linalg import cg
    >>> flags = torch.full((64, 64), 2)
    >>> flags[-1] = 3  # a free surface
    >>> A = ShardedPoissonGrid.from_global(flags)  # under torchrun: this rank's planes of it
    >>> b = torch.ones(A.grid, dtype=torch.float64)
    >>> cg(A, b, M="multigrid", rtol=1e-6).iterations <= 12
    True
    """

    ranks: Ranks

    def __init__(
        self,
        flags: Tensor,
        ranks: Ranks | None = None,
        *,
        spacing: float = 1.0,
        face_coef: Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.ranks = ranks = Ranks() if ranks is None else ranks
        with ranks.together():
            self._check_planes(flags, spacing, dtype)
        shapes = ranks.table(flags.ndim, flags.shape[0], *flags.shape[1:], *[0] * (3 - flags.ndim))
        with ranks.together():
            if any(shape[:1] + shape[2:] != shapes[0][:1] + shapes[0][2:] for shape in shapes):
                raise ValueError(
                    "ShardedPoissonGrid: flags: expected planes of one shape on all ranks, got "
                    f"{', '.join(str(tuple(shape[1 : 1 + shape[0]])) for shape in shapes)}"
                )
        ranks.agree("ShardedPoissonGrid", spacing=spacing, dtype=0 if dtype is None else dtype.itemsize)
        self.counts = [shape[1] for shape in shapes]
        self.spacing, self.device = float(spacing), flags.device
        self.flags = flags.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
        self.mask = self.flags == FLUID
        self.grid = tuple(flags.shape)
        self.whole_grid = (sum(self.counts), *self.grid[1:])
        self.shape = (flags.numel(), flags.numel())
        self.n = math.prod(self.whole_grid)
        self.num_unknowns = int(self.mask.sum())
        if ranks.sum(self.num_unknowns)[0] == 0:
            raise ValueError("ShardedPoissonGrid: flags: there is no fluid cell (2) on any rank: nothing to solve for")
        self._own = owned(self.counts)
        mine = self._own[ranks.rank]
        self.planes = range(mine.begin, mine.end)
        self._halo = Halo(ranks, self._own, [own.widened(1, 1, sum(self.counts)) for own in self._own])
        self._before, self._after = self._neighbour_planes(self.flags)
        self.cells = self._cells()
        self.closed_components = self._closed_components()
        self._component_sizes = ranks.all_reduce_(self._count_components())
        self.face_coef = self._common_coefficients(face_coef)
        self.dtype = dtype or (self.face_coef[0].dtype if self.face_coef else torch.float64)
        if self.face_coef is not None:
            self.face_coef = tuple(c.to(self.dtype) for c in self.face_coef)
        self._prepare_products()

    @classmethod
    def from_global(
        cls,
        flags: Tensor | None,
        ranks: Ranks | None = None,
        *,
        spacing: float = 1.0,
        face_coef: Sequence[Tensor] | None = None,
        dtype: torch.dtype | None = None,
        counts: Sequence[int] | None = None,
        source: int | None = None,
    ) -> ShardedPoissonGrid:
        """Cut a whole grid into slabs.

        Parameters
        ----------
        flags, face_coef : Tensor, sequence of Tensor
            Of the whole grid, as :class:`kantor.linalg.PoissonGrid` takes them. All ranks hold them, or `source` alone,
            and the others pass None.
        ranks, spacing, dtype
            As above.
        counts : sequence of int, optional
            Planes for each rank. Default: equal but for one.
        source : int, optional
            The rank that deals out the planes.
        """
        ranks = Ranks() if ranks is None else ranks
        mine = split(flags, ranks, counts, dim=0, source=source)
        number = 0 if face_coef is None else len(face_coef)
        if source is not None:
            number = int(ranks.broadcast_object(number, source))
        ranks.agree("ShardedPoissonGrid.from_global", face_coef=number)
        if number == 0:
            return cls(mine, ranks, spacing=spacing, dtype=dtype)
        planes = [row[0] for row in ranks.table(mine.shape[0])]
        along: list[Tensor | None] = [None] * number if face_coef is None else list(face_coef)
        parts = [_split_faces(along[0], ranks, planes, source)]
        parts += [split(c, ranks, planes, dim=0, source=source) for c in along[1:]]
        return cls(mine, ranks, spacing=spacing, face_coef=parts, dtype=dtype)

    # --- set-up ---

    def _check_planes(self, flags: Tensor, spacing: float, dtype: torch.dtype | None) -> None:
        # An empty slab is checked as if it had a plane.
        stand_in = flags
        if isinstance(flags, Tensor) and flags.ndim in (2, 3) and len(flags) == 0:
            stand_in = flags.new_zeros((1, *flags.shape[1:]))
        self._check_flags(stand_in)
        if not (isinstance(spacing, int | float) and 1e-18 <= spacing <= 1e18):
            raise ValueError(f"ShardedPoissonGrid: spacing: expected a number from 1e-18 to 1e18, got {spacing!r}")
        if dtype is not None:
            check_float(torch.empty(0, dtype=dtype), "ShardedPoissonGrid", "dtype")

    def _neighbour_planes(self, t: Tensor, outside: float = SOLID) -> tuple[Tensor, Tensor]:
        """The planes of `t` before and after this rank's, each (1, ...)."""
        arrived = self._start_planes(t.unsqueeze(0), outside)
        before, after = arrived()
        return before[0], after[0]

    def _start_planes(self, t: Tensor, outside: float = 0) -> Any:
        """Begin to fetch the planes of ``t (batch, planes, ...)`` before and after this rank's."""
        own = self._own[self.ranks.rank]
        rims = t.new_full((t.shape[0], 2, *t.shape[2:]), outside)
        sends = {
            rank: t[:, planes.begin - own.begin : planes.end - own.begin].contiguous()
            for rank, planes in self._halo.sends.items()
        }
        sides = {rank: int(planes.begin >= own.end) for rank, planes in self._halo.receives.items()}
        receives = {rank: rims.new_empty((t.shape[0], 1, *t.shape[2:])) for rank in sides}
        finish = self.ranks.start_exchange(sends, receives)

        def arrived() -> tuple[Tensor, Tensor]:
            finish()
            for rank, side in sides.items():
                rims[:, side : side + 1] = receives[rank]
            return rims[:, :1], rims[:, 1:]

        return arrived

    def _sides(self, axis: int) -> tuple[Tensor, Tensor]:
        if axis > 0:
            return super()._sides(axis)
        return torch.cat([self._before, self.flags]), torch.cat([self.flags, self._after])

    def _common_coefficients(self, face_coef: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
        """Checked, here and against the neighbours'."""
        given = 0 if face_coef is None else 1
        self.ranks.agree("ShardedPoissonGrid", **{"face_coef (given or not)": given})
        if face_coef is None:
            return None
        with self.ranks.together():
            coefficients = self._checked_coefficients(face_coef)
            if any(c.requires_grad for c in coefficients):
                raise ValueError(
                    "ShardedPoissonGrid: face_coef: solutions across processes have no derivatives with respect to "
                    "coefficients; call .detach()"
                )
        first = coefficients[0]
        self.ranks.agree("ShardedPoissonGrid", **{"face_coef (bytes of an entry)": first.dtype.itemsize})
        theirs, _ = self._neighbour_planes(first[1:], 0)  # the last faces of the rank before
        with self.ranks.together():
            read = (self._links(0) | self._openings(0))[:1]
            if self.planes and self.planes[0] > 0 and bool((read & (theirs != first[:1])).any()):
                raise ValueError(
                    "ShardedPoissonGrid: face_coef: the coefficients of the faces between this rank and the one before "
                    "differ; give both the same"
                )
        return coefficients

    def _prepare_products(self) -> None:
        """What native code has of the slab, and the coefficients of the faces between ranks, over h^2."""
        scale = 1 / self.spacing**2
        faces, _ = self.coefficients()
        self._coupling = (faces[0][0] * scale, faces[0][-1] * scale)
        if self.face_coef is None:
            self._encoded = Encoded([self._inner_cells()], [POISSON, *self._native_grid], [scale])
        else:  # a face on the rim counts in the diagonal alone
            self._encoded = super().encode()

    def _inner_cells(self) -> Tensor:
        """Cells without their links to other ranks' cells, of which native code knows nothing."""
        cells = self.cells.clone()
        if len(cells):
            cells[0, ..., 0] &= 255 - 1
            cells[-1, ..., 0] &= 255 - 2
        return cells

    def _closed_components(self) -> tuple[Tensor, int]:
        """Those of the whole grid: the slabs' components, joined where a face between ranks links them."""
        ranks = self.ranks
        cells = self._inner_cells()
        links = sum((cells[..., 0] >> bit) & 1 for bit in range(6))
        opened = torch.zeros_like(self.flags, dtype=torch.bool)
        for axis, n in enumerate(self.grid):
            opening = self._openings(axis)
            opened |= (opening.narrow(axis, 0, n) | opening.narrow(axis, 1, n)) & self.mask
        cells[..., 1] = links  # closed, every one of them: all get a label
        labels, count = torch.empty(self.grid, dtype=torch.int32), 0
        if len(cells):
            count = _C.closed_components(host(cells), labels, *self._native_grid)
        counts = [row[0] for row in ranks.table(count)]
        labels = labels.to(self.device)
        numbers = torch.where(labels >= 0, labels.long() + sum(counts[: ranks.rank]), -1)
        before, _ = self._neighbour_planes(numbers, -1)
        linked = self._links(0)[: min(1, len(cells))]
        pairs = torch.stack([before[: len(linked)][linked], numbers[:1][linked]], -1).unique(dim=0)
        edges = torch.cat(ranks.all_gather(pairs)).cpu()
        is_open = torch.zeros(sum(counts), dtype=torch.float64)
        is_open[numbers[opened].cpu().unique()] = 1
        ranks.all_reduce_(is_open, "max")
        root = _roots(sum(counts), edges)
        root_open = torch.zeros_like(is_open).scatter_reduce(0, root, is_open, "amax") > 0
        closed_roots = (root == torch.arange(len(root))) & ~root_open
        number = torch.where(closed_roots, closed_roots.cumsum(0) - 1, -1)[root]
        number = torch.cat([number, number.new_full((1,), -1)]).int().to(self.device)  # the last: none
        return number[numbers], int(closed_roots.sum())

    # --- products ---

    @property
    def is_native(self) -> bool:
        """False: a product exchanges planes between native products."""
        return False

    @property
    def requires_grad(self) -> bool:
        """False: solutions have derivatives with respect to b alone."""
        return False

    def encode(self) -> Encoded:
        """The slab's own part of the operator, without the faces between ranks off its diagonal."""
        return self._encoded

    def _apply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = SymmetricProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return self.write_product(x, x.new_empty(x.shape))

    def write_product(self, x: Tensor, out: Tensor) -> Tensor:
        """Write ``A x`` to `out` and return that; no derivatives."""
        shape = (math.prod(x.shape[:-1]), *self.grid)
        arrived = self._start_planes(x.reshape(shape))
        if len(self.flags):
            write_matvec(self.encode(), x if self.face_coef is None else self.confined(x), out)
        y = out.view(shape)
        for side, weight, neighbour in zip((0, -1), self._coupling, arrived(), strict=True):
            if len(self.flags):  # where, not a product: cells that are no unknowns may hold anything
                y[:, side] -= torch.where(weight > 0, weight * neighbour[:, 0], weight)
        return out

    # --- what solvers and preconditioners ask for ---

    def _component_sums(self, v: Tensor) -> Tensor:
        sums: Tensor = _TotalOverRanks.apply(super()._component_sums(v), self.ranks)  # type: ignore[no-untyped-call]
        return sums

    def _component(self, number: int) -> tuple[int, tuple[int, ...]]:
        cells = (self.closed_components[0] == number).nonzero()
        first = cells[0].tolist() if len(cells) else [-1] * len(self.grid)
        firsts = self.ranks.table(*first)
        rank = next(rank for rank, cell in enumerate(firsts) if cell[0] >= 0)
        return int(self._component_sizes[number]), (firsts[rank][0] + self._own[rank].begin, *firsts[rank][1:])

    def _multigrid(self, **options: Any) -> ShardedMultigrid:
        from kantor.distributed.multigrid import ShardedMultigrid

        return ShardedMultigrid(self, **options)

    def to_csr(self, *, compressed: bool = True) -> Any:
        """Not available: rows of the matrix reach into the slabs of other ranks."""
        raise TypeError(f"{self!r} has no sparse form of its own; make one from the whole grid, on one process")

    def dense(self) -> Tensor:
        """Not available: a column belongs to all ranks."""
        raise TypeError(f"{self!r} has no dense form; make one from the whole grid, on one process")

    def to(self, dtype: torch.dtype) -> ShardedPoissonGrid:
        """Convert the coefficients."""
        converted = super().to(dtype)
        assert isinstance(converted, ShardedPoissonGrid)
        converted._prepare_products()
        return converted

    def split(self, v: Tensor | None, source: int | None = None) -> Tensor:
        """Return this rank's planes of vectors ``(..., *whole_grid)``: that all hold, or that `source` deals out."""
        return split(v, self.ranks, self.counts, dim=-len(self.grid), source=source)

    def gather(self, x: Tensor, target: int | None = None) -> Tensor | None:
        """Return the whole ``(..., *whole_grid)`` from this rank's ``(..., *grid)``, on all ranks or on `target`."""
        self._check_grid_vector(x, "gather")
        if tuple(x.shape[-len(self.grid) :]) != self.grid:
            x = x.unflatten(-1, self.grid)
        return gather(x, self.ranks, dim=-len(self.grid), target=target)

    def whole(self) -> PoissonGrid:
        """Return the grid of all ranks as an operator of this process alone, on every rank. O(n) memory."""
        flags = torch.cat(self.ranks.all_gather(self.flags))
        if self.face_coef is None:
            return PoissonGrid(flags, spacing=self.spacing, dtype=self.dtype)
        first, *others = self.face_coef
        ends = self.ranks.all_gather(first[-1:])
        last = max(rank for rank, count in enumerate(self.counts) if count)
        coefficients = [torch.cat([*self.ranks.all_gather(first[:-1].contiguous()), ends[last]])]
        coefficients += [torch.cat(self.ranks.all_gather(c.contiguous())) for c in others]
        return PoissonGrid(flags, spacing=self.spacing, face_coef=coefficients, dtype=self.dtype)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = " x ".join(map(str, self.whole_grid))
        planes = f"planes {self.planes[0]}..{self.planes[-1]}" if self.planes else "no planes"
        rank = f"rank {self.ranks.rank} of {self.ranks.size}"
        return f"ShardedPoissonGrid({size}, {dtype}, {self.device}; {rank}: {planes}, {self.num_unknowns} unknowns)"


def _split_faces(c: Tensor | None, ranks: Ranks, planes: list[int], source: int | None) -> Tensor:
    """The faces of this rank along the first axis: one more than planes, the last being the next rank's first."""
    counts = [*planes[:-1], planes[-1] + 1]
    mine = split(c, ranks, counts, dim=0, source=source)
    own = owned(counts)
    wanted = [Planes(o.begin, o.begin + count + 1) for o, count in zip(own, planes, strict=True)]
    faces = mine.new_empty((planes[ranks.rank] + 1, *mine.shape[1:]))
    faces[: len(mine)] = mine
    Halo(ranks, own, wanted).fill(faces.unsqueeze(0), own[ranks.rank].begin)
    return faces


def _roots(n: int, edges: Tensor) -> Tensor:
    """Per node of a graph the least node of its component; edges (count, 2). Rounds: logarithmic in a path's length."""
    root = torch.arange(n)
    while True:
        ends = root[edges]  # hook the larger root of each edge under the smaller, then let every node look up its root
        least = ends.amin(-1)
        hooked = root.scatter_reduce(0, ends.reshape(-1), least.repeat_interleave(2), "amin")
        while not torch.equal(hooked, jumped := hooked[hooked]):
            hooked = jumped
        if torch.equal(hooked, root):
            return root
        root = hooked


class SymmetricProduct(torch.autograd.Function):
    """A x for a shared symmetric operator: its derivative is A again."""

    @staticmethod
    def forward(x: Tensor, A: Any) -> Tensor:
        y: Tensor = A._product(x)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        ctx.A = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.A._apply(grad), None


class _TotalOverRanks(torch.autograd.Function):
    """The sum over ranks, of which every rank has a copy; gradients of the copies add up alike."""

    @staticmethod
    def forward(t: Tensor, ranks: Ranks) -> Tensor:
        return ranks.all_reduce_(t.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Ranks], output: Tensor) -> None:
        ctx.ranks = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _TotalOverRanks.apply(grad, ctx.ranks), None  # type: ignore[no-untyped-call]


__all__ = ["AIR", "FLUID", "SOLID", "ShardedPoissonGrid"]
