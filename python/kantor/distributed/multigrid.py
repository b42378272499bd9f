"""The multigrid cycle on a grid whose planes are shared among processes.

The cycle is that of csrc/linalg/multigrid.h, and so are its kernels. On each of the finer levels a rank holds its
planes and the planes around them that a pass reaches, its ghosts, and does its part of the pass by itself, as threads
do within one process; with k sweeps a pass has 2 k + 2 stages, each of which reaches one plane further. So a level
takes two exchanges a cycle: of b on the way down, and of the coarser level's e on the way up. Levels below a threshold
are held, and computed, by every rank. No number that comes out depends on how the planes are shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kantor import _C
from kantor.distributed._slabs import Halo, Planes
from kantor.distributed.poisson_grid import ShardedPoissonGrid, SymmetricProduct
from kantor.linalg import Multigrid, _native
from kantor.linalg._native import Encoded
from kantor.linalg.multigrid import describe_levels, visited_once

_ARRAYS, _LABELS, _FIRST_NODES = 6, 5, 6  # LevelLayout and GridArrays in csrc/linalg/multigrid.h


@dataclass
class _Level:
    """What this rank has of a level that is cut: planes `held`, of which it owns `own`.

    ``grid`` is cells, or below, front, left and inverse diagonal, as native code takes them; ``nodes`` is empty, or the
    graph node of each cell and the first node of each plane of blocks.
    """

    own: list[Planes]  # of every rank
    held: Planes
    size: tuple[int, int, int]  # of the whole level
    grid: list[Tensor]
    nodes: list[Tensor]
    stencil: Tensor | None
    scale: float
    down: Halo  # of b
    up: Halo | None  # of e; None on the finest level

    def place(self, planes: Planes, first_coarse: int) -> list[int]:
        """Of a pass that makes `planes`, where the coarser vector starts with plane `first_coarse`."""
        begin = self.held.begin
        return [
            len(self.held), *self.size[1:], planes.begin - begin, planes.end - begin, begin // 2 - first_coarse
        ]  # fmt: skip


class ShardedMultigrid(Multigrid):
    """One geometric multigrid cycle for a :class:`ShardedPoissonGrid`: ``M ~ A^-1``, symmetric positive definite.

    The same cycle as :class:`kantor.linalg.Multigrid` makes of the whole grid, to the last bit, whatever the number of
    ranks and their shares; so ``cg(A, b, M=ShardedMultigrid(A))``, or ``M="multigrid"``, takes as many iterations.

    Fine levels are cut into the slabs of `A`; coarse levels, with `whole_below` cells or less, are on every rank, which
    collects their right-hand side once a cycle. Where walls one cell thick make the coarser levels graphs
    (``has_walls``), only the finest level is cut: all graph levels are on every rank.

    Parameters
    ----------
    A : ShardedPoissonGrid
        On the CPU.
    smoother, sweeps, omega, stencils, scales, walls, precision
        As for :class:`kantor.linalg.Multigrid`.
    whole_below : int
        Levels of at most this many cells are not cut.

    Attributes
    ----------
    levels : list of dict
        As for one process, and ``"cut"``: whether it is shared.

    Raises
    ------
    TypeError
        `A` is not a ShardedPoissonGrid.
    ValueError
        Options out of range; `A` on a GPU.

    Notes
    -----
    Memory: that of the cycle on one process over the number of ranks, for ``4 k + 2`` ghost planes or so more with k
    sweeps, and the levels that every rank has. With walls set-up collects the flags of the whole grid, and every rank
    builds all graph levels.

    Traffic of a cycle, per cut level and neighbour: ``4 k - 1`` planes of this level and up to ``k + 1`` of the next,
    in the precision of the cycle, two messages; and one gathering of the first level that is not cut.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import ShardedMultigrid, ShardedPoissonGrid
    >>> from kantor.linalg import cg
    >>> flags = torch.full((64, 64), 2)
    >>> flags[-1] = 3
    >>> A = ShardedPoissonGrid.from_global(flags)
    >>> b = torch.ones(A.grid, dtype=torch.float64)
    >>> cg(A, b, M=ShardedMultigrid(A, sweeps=2), rtol=1e-6).iterations <= 8
    True
    """

    A: ShardedPoissonGrid

    def __init__(
        self,
        A: ShardedPoissonGrid,
        *,
        smoother: Literal["rbgs", "jacobi", "stencil"] = "rbgs",
        sweeps: int = 1,
        omega: float = 0.8,
        stencils: Tensor | Sequence[Tensor] | None = None,
        scales: Tensor | Sequence[float] | None = None,
        walls: bool = True,
        precision: torch.dtype = torch.float32,
        whole_below: int = 2**15,
    ) -> None:
        if not isinstance(A, ShardedPoissonGrid):
            raise TypeError(f"ShardedMultigrid: A: expected a ShardedPoissonGrid, got {type(A).__name__}")
        if A.device.type != "cpu":
            raise ValueError(
                f"ShardedMultigrid: A: expected a grid on the CPU, got one on {A.device}; on GPUs use M='jacobi'"
            )
        if not isinstance(whole_below, int) or whole_below < 0:
            raise ValueError(f"ShardedMultigrid: whole_below: expected an integer >= 0, got {whole_below!r}")
        self.ranks = A.ranks
        with A.ranks.together():
            kernels, factors = self._set_options(A, smoother, sweeps, omega, stencils, scales, walls, precision)
        A.ranks.agree(
            "ShardedMultigrid", sweeps=sweeps, whole_below=whole_below, walls=walls, precision=precision.itemsize,
            smoother=("rbgs", "jacobi", "stencil").index(smoother),
        )  # fmt: skip
        self._kernels, self._factors = kernels, factors
        self._options: dict[str, Any] = {
            "smoother": smoother, "sweeps": sweeps, "omega": omega, "stencils": stencils, "scales": scales,
            "walls": walls, "precision": precision,
        }  # fmt: skip
        self.whole_below = max(whole_below, _C.multigrid_dense_limit)
        self._buffers: dict[int, _Buffers] = {}
        self._exponent = self._common_exponent()
        self._no_unknowns = ~A.mask.view(_slab(A))
        self._build()

    # --- set-up ---

    def _common_exponent(self) -> int:
        """Of the power of two that brings coefficients to size one."""
        if self.A.face_coef is None:
            return 0
        faces, d = self.A.coefficients()
        sizes = [float(t.abs().max()) if t.numel() else 0.0 for t in (*faces, d)]
        (largest,) = self.A.ranks.max(max(sizes))
        return math.frexp(largest)[1] if largest > 0 else 0

    def _build(self) -> None:
        """Cut levels while they are large, then one hierarchy of the rest for every rank."""
        A = self.A
        size = _whole_size(A)
        self._levels: list[_Level] = []
        own, read_above = A._own, [Planes(0, 0)] * A.ranks.size
        faces = None if A.face_coef is None else self._finest_faces()
        while math.prod(size) > self.whole_below:
            level, held_faces = self._cut(len(self._levels), size, own, read_above, faces)
            self._levels.append(level)
            faces, splits = self._coarsen(level, held_faces)
            if self.walls and _C.multigrid_walls_matter(int(A.ranks.sum(splits)[0]), *size):
                self._build_graphs()
                return
            size = _coarse_size(size)
            read_above = [self._read_up(o, size[0]) for o in own]
            own = _coarse_planes(own)
        if not self._levels:
            self._build_whole()
            return
        assert faces is not None
        nz, ny, nx = size
        parts = A.ranks.all_gather(faces.movedim(1, 0).contiguous(), [len(o) for o in own])
        below, front, left, d = torch.cat(parts).movedim(0, 1)
        pad = torch.nn.functional.pad
        operands = [d.new_zeros(1), pad(below, (0, 0, 0, 0, 0, 1)), pad(front, (0, 0, 0, 1)), pad(left, (0, 1)), d]
        if len(A.grid) == 2:
            del operands[2]
        arena, levels = _C.multigrid_setup(
            [t.contiguous() for t in operands], nz, ny, nx, self.precision is torch.float32, self.walls, self._kernels,
            self._factors, len(self._levels), torch.get_num_threads(),
        )  # fmt: skip
        if levels[_ARRAYS + _LABELS] >= 0:  # thin walls on a level that is not cut
            self._build_graphs()
            return
        self._rest = Encoded([torch.from_numpy(arena)], self._encoded_layout(nz * ny * nx, levels), [1.0])
        self._rest_counts = [len(o) * ny * nx for o in own]

    def _build_whole(self) -> None:
        """All levels on every rank."""
        whole = Multigrid(self.A.whole(), **self._options)
        self._rest = whole.encode()
        self._rest_counts = [count * math.prod(self.A.grid[1:]) for count in self.A.counts]

    def _build_graphs(self) -> None:
        """The finest level cut, the graphs below it on every rank."""
        A = self.A
        whole = Multigrid(A.whole(), **self._options)
        rows = torch.tensor(whole._layout[6:]).reshape(-1, _C.level_layout_size)
        nz, ny, nx = size = _whole_size(A)
        blocks = (nz + 1) // 2
        nodes_at, first_at = int(rows[0, _ARRAYS + _LABELS]), int(rows[0, _ARRAYS + _FIRST_NODES])
        labels = whole._arena[nodes_at : nodes_at + 4 * nz * ny * nx].view(torch.int32).view(nz, -1)
        first_nodes = whole._arena[first_at : first_at + 8 * (blocks + 1)].view(torch.int64)
        faces = None if A.face_coef is None else self._finest_faces()
        level, _ = self._cut(0, size, A._own, [Planes(0, 0)] * A.ranks.size, faces)
        held = level.held
        level.nodes = [
            labels[held.begin : held.end].clone(), first_nodes[held.begin // 2 : (held.end + 1) // 2 + 1].clone()
        ]  # fmt: skip
        self._levels = [level]
        ends = [int(first_nodes[(own.begin + 1) // 2]) for own in A._own] + [int(first_nodes[blocks])]
        self._rest_counts = torch.tensor(ends).diff().tolist()
        offsets = rows[1:, _ARRAYS:]
        begin = int(offsets[offsets >= 0].min())
        rows[1:, _ARRAYS:] = torch.where(offsets >= 0, offsets - begin, offsets)
        layout = self._encoded_layout(ends[-1], rows[1:].reshape(-1).tolist())
        self._rest = Encoded([whole._arena[begin:].clone()], layout, [1.0])

    def _finest_faces(self) -> Tensor:
        """Coefficients of this rank's planes: below, in front, left, and d, as (4, planes, ny, nx)."""
        coefficients, d = self.A.coefficients()
        _, ny, nx = _whole_size(self.A)
        planes = len(self.A.planes)
        below, left = coefficients[0][:planes], coefficients[-1][..., :nx]
        front = coefficients[1][:, :ny] if len(coefficients) == 3 else torch.zeros_like(d)
        stack = torch.stack([t.reshape(planes, ny, nx) for t in (below, front, left, d)])
        return torch.ldexp(stack, torch.tensor(-self._exponent)).to(self.precision)

    def _cut(
        self, number: int, size: tuple[int, int, int], own: list[Planes], read_above: list[Planes], faces: Tensor | None
    ) -> tuple[_Level, list[Tensor]]:
        """A level, from this rank's coefficients; and the coefficients of all planes held, for coarsening."""
        ranks, k = self.A.ranks, self.sweeps
        nz, ny, nx = size
        read = [self._made_down(o, nz).widened(2 * k + 1, 2 * k + 1, nz) for o in own]
        held = [r.around(above) for r, above in zip(read, read_above, strict=True)]
        held = [Planes(h.begin // 2 * 2, h.end) if len(h) else h for h in held]
        mine, inside = held[ranks.rank], own[ranks.rank]
        if faces is None:
            cells = torch.zeros((1, len(mine), ny, nx, 2), dtype=torch.uint8)
            cells[:, inside.begin - mine.begin : inside.end - mine.begin] = self.A.cells.view(1, len(inside), ny, nx, 2)
            Halo(ranks, own, held).fill(cells, mine.begin)
            grid = coefficients = [cells.reshape(-1)]
        else:  # and one plane more: what is below it is above the last one held
            wanted = [h.widened(0, 1, nz) for h in held]
            stack = faces.new_zeros((4, len(mine) + 1, ny, nx))
            stack[:, inside.begin - mine.begin : inside.end - mine.begin] = faces
            Halo(ranks, own, wanted).fill(stack, mine.begin)
            coefficients = _with_rims(stack)
            below, front, left, d = coefficients
            plane = ny * nx
            diagonal = d + (below[:-plane] + below[plane:]) + (front[:-nx] + front[nx:]) + (left[:-1] + left[1:])
            inverse = torch.where(diagonal > 0, 1 / diagonal, torch.zeros_like(diagonal))
            grid = [below, front, left, inverse]
        stencil, scale = None, 1.0
        if self._kernels is not None:
            stencil = self._kernels[min(number, len(self._kernels) - 1)].to(self.precision)
        if self._factors is not None:
            scale = float(self._factors[min(number, len(self._factors) - 1)])
        up = Halo(ranks, own, read_above) if number > 0 else None
        return _Level(own, mine, size, grid, [], stencil, scale, Halo(ranks, own, read), up), coefficients

    def _made_down(self, own: Planes, nz: int) -> Planes:
        """The planes that a rank makes on the way down: its own rounded to whole blocks, and what the way up reads."""
        if not len(own):
            return own
        more = 2 * (self.sweeps - 1)
        return Planes(own.begin // 2 * 2, (own.end + 1) // 2 * 2).widened(more, more, nz)

    def _read_up(self, own: Planes, coarse_nz: int) -> Planes:
        """The planes of the next level that the way up reads, to make those that a rank owns."""
        if not len(own):
            return own
        k = self.sweeps
        return Planes(max(0, (own.begin - 2 * k - 1) // 2), min(coarse_nz, (own.end + 2 * k) // 2 + 1))

    def _coarsen(self, level: _Level, coefficients: list[Tensor]) -> tuple[Tensor, int]:
        """The coefficients of this rank on the next level, and how often its blocks fall apart."""
        nz, ny, nx = _coarse_size((len(level.held), *level.size[1:]))
        own = _coarse_planes(level.own)[self.A.ranks.rank]
        n, plane, dtype = nz * ny * nx, ny * nx, self.precision
        coarse = [torch.empty(n + more, dtype=dtype) for more in (plane, nx, 1, 0)]
        shift = level.held.begin // 2
        splits = 0
        if n:
            splits = _C.multigrid_coarsen(
                coefficients, len(level.held), *level.size[1:], len(self._levels) - 1, own.begin - shift,
                own.end - shift, coarse, torch.get_num_threads(),
            )  # fmt: skip
        stack = torch.stack([t[:n].view(nz, ny, nx) for t in coarse])
        return stack[:, own.begin - shift : own.end - shift].contiguous(), splits

    # --- the cycle ---

    @property
    def is_native(self) -> bool:
        """False: the cycle exchanges planes between native passes."""
        return False

    def encode(self) -> Encoded:
        """Not available: the levels are shared by processes."""
        raise TypeError("ShardedMultigrid has no native form")

    def _apply(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = SymmetricProduct.apply(x, self)  # type: ignore[no-untyped-call]
            return y
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        return self.write_product(x, x.new_empty(x.shape))

    def write_product(self, x: Tensor, out: Tensor) -> Tensor:
        """Write ``M x`` to `out` and return that; no derivatives."""
        batch = math.prod(x.shape[:-1])
        if batch == 0:
            return out
        vectors = self._vectors(batch)
        r = self._own(0, vectors.b[0]) if self._levels else vectors.r
        r.copy_(x.reshape(r.shape))
        r.masked_fill_(self._no_unknowns, 0)  # which may hold anything
        if self._levels:
            for number in range(len(self._levels)):
                self._down(number, vectors)
            e = self._solve_rest(self._own_rest(vectors.b[-1]))
            for number in reversed(range(len(self._levels))):
                e = self._up(number, vectors, e)
            z = self._own(0, e)
        else:
            z = self._own_rest(self._solve_rest(r.view(batch, self.shape[0])))
        out.copy_(z.reshape(out.shape))
        # The native cycle is for grid spacing one and coefficients of size one.
        factor = math.ldexp(self.A.spacing**2, -self._exponent)
        return out if factor == 1 else out.mul_(factor)

    def _vectors(self, batch: int) -> _Buffers:
        """Memory of the cycle, kept for the next one of as many systems."""
        if batch not in self._buffers:
            slab, rest = (batch, *_slab(self.A)), sum(self._rest_counts)
            self._buffers = {batch: _Buffers.of(self._levels, slab, rest, self.precision, self.sweeps)}
        return self._buffers[batch]

    def _own(self, number: int, vector: Tensor) -> Tensor:
        """The planes of this rank of a vector on a cut level."""
        level = self._levels[number]
        own, begin = level.own[self.A.ranks.rank], level.held.begin
        return vector[:, own.begin - begin : own.end - begin]

    def _own_rest(self, b: Tensor) -> Tensor:
        """The part of this rank of a vector on the first level that all ranks have."""
        begin = sum(self._rest_counts[: self.A.ranks.rank])
        return b[:, begin : begin + self._rest_counts[self.A.ranks.rank]]

    def _down(self, number: int, v: _Buffers) -> None:
        """x = smooth from zero for b; b of the next level = R (b - A x)."""
        level = self._levels[number]
        level.down.fill(v.b[number], level.held.begin)
        own = level.own[self.A.ranks.rank]
        self._pass(number, self._made_down(own, level.size[0]), v, v.b[number + 1], up=False)

    def _up(self, number: int, v: _Buffers, coarse: Tensor) -> Tensor:
        """e = smooth from x + scale P e of the next level, `coarse`, in the reverse order."""
        if number + 1 < len(self._levels):
            below = self._levels[number + 1]
            assert below.up is not None
            below.up.fill(coarse, below.held.begin)
        self._pass(number, self._levels[number].own[self.A.ranks.rank], v, coarse, up=True)
        return v.e[number]

    def _pass(self, number: int, planes: Planes, v: _Buffers, coarse: Tensor, *, up: bool) -> None:
        if not len(planes):
            return
        level = self._levels[number]
        cut_below = number + 1 < len(self._levels)
        place = level.place(planes, self._levels[number + 1].held.begin if cut_below else 0)
        for b, x, e, c in zip(v.b[number], v.x[number], v.e[number], coarse, strict=True):
            _C.multigrid_pass(
                level.grid, level.nodes, level.stencil, level.scale, place, self.sweeps, up, b, x, e, c, v.work,
                torch.get_num_threads(),
            )  # fmt: skip

    def _solve_rest(self, own: Tensor) -> Tensor:
        """e of the first level that all ranks have, from each rank's part of b."""
        parts = self.A.ranks.all_gather(own.mT.contiguous(), self._rest_counts)
        e: Tensor = _native.multigrid(self._rest.operands, self._rest.layout, torch.cat(parts).mT.contiguous())
        return e

    # --- what users and solvers ask for ---

    @property
    def levels(self) -> list[dict[str, object]]:
        """Kind, shape, number of unknowns and visits of each level, the finest first, and whether it is cut."""
        dims = len(self.A.grid)
        cut: list[dict[str, object]] = [
            {
                "kind": "grid",
                "shape": level.size if dims == 3 else (level.size[0], level.size[2]),
                "size": math.prod(level.size),
                "visits": 1,
                "cut": True,
            }
            for level in self._levels
        ]
        return cut + [level | {"cut": False} for level in describe_levels(self._rest.layout, dims)]

    def safer(self) -> ShardedMultigrid | None:
        """As for one process: see ``kantor.linalg.Multigrid.safer``."""
        if self.smoother == "stencil":
            options = self._options | {"smoother": "jacobi", "stencils": None, "scales": None, "omega": 0.8}
            return ShardedMultigrid(self.A, whole_below=self.whole_below, **options)
        single = visited_once(self._rest.layout)
        if single == self._rest.layout:
            return None
        other = self.to(self.dtype)
        other._rest = self._rest._replace(layout=single)
        return other

    def to(self, dtype: torch.dtype) -> ShardedMultigrid:
        """Return the same cycle for vectors of another dtype."""
        converted = super().to(dtype)
        assert isinstance(converted, ShardedMultigrid)
        converted._buffers = {}
        return converted

    def __repr__(self) -> str:
        cut = f"{len(self._levels)} of {len(self.levels)} levels cut into slabs"
        if self.has_walls:
            cut += ", the graphs that thin walls make on every rank"
        return f"Sharded{super().__repr__()[:-1]}; rank {self.A.ranks.rank} of {self.A.ranks.size}: {cut})"


@dataclass
class _Buffers:
    """Vectors of the cut levels with their ghosts, ``(batch, planes, ny, nx)``; b goes one level further."""

    b: list[Tensor]
    x: list[Tensor]
    e: list[Tensor]
    r: Tensor  # where no level is cut: this rank's right-hand side
    work: Tensor

    @classmethod
    def of(cls, levels: list[_Level], slab: tuple[int, ...], rest: int, dtype: torch.dtype, sweeps: int) -> _Buffers:
        """Allocate them."""
        batch = slab[0]
        shapes = [(batch, len(level.held), *level.size[1:]) for level in levels]
        b, x, e = ([torch.zeros(shape, dtype=dtype) for shape in shapes] for _ in range(3))
        size = 0
        if levels:
            _, ny, nx = levels[0].size
            size = _C.multigrid_pass_workspace(ny, nx, sweeps, dtype.itemsize, torch.get_num_threads())
        r = torch.zeros((0 if levels else slab), dtype=dtype)
        return cls([*b, torch.zeros((batch, rest), dtype=dtype)], x, e, r, torch.empty(size, dtype=torch.uint8))


def _whole_size(A: ShardedPoissonGrid) -> tuple[int, int, int]:
    """The grid of all ranks as native code counts it."""
    nz, *others = A.whole_grid
    return (nz, others[0], others[1]) if len(others) == 2 else (nz, 1, others[0])


def _slab(A: ShardedPoissonGrid) -> tuple[int, int, int]:
    """Of the grid of this rank alone."""
    _, ny, nx = _whole_size(A)
    return len(A.planes), ny, nx


def _coarse_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    nz, ny, nx = ((n + 1) // 2 for n in size)
    return nz, ny, nx


def _coarse_planes(own: list[Planes]) -> list[Planes]:
    """A plane of the next level belongs to the rank that has the first of its two."""
    return [Planes((planes.begin + 1) // 2, (planes.end + 1) // 2) for planes in own]


def _with_rims(stack: Tensor) -> list[Tensor]:
    """Arrays as native code takes them from ``(4, planes + 1, ny, nx)``: csrc/linalg/multigrid.h, GridLevel."""
    below, front, left, d = stack
    nx = stack.shape[-1]
    ends = (front.new_zeros(nx), left.new_zeros(1))
    front, left = (torch.cat([t[:-1].reshape(-1), end]) for t, end in zip((front, left), ends, strict=True))
    return [below.reshape(-1), front, left, d[:-1].reshape(-1)]


__all__ = ["ShardedMultigrid"]
