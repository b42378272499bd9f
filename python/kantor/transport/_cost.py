"""The cost of a transport problem: a matrix, or points and a function of two of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kantor import _C
from kantor._ops import backend
from kantor._ranks import Ranks

DENSE, SQEUCLIDEAN, EUCLIDEAN, LP, COSINE, CALLBACK = range(6)
KINDS = {"sqeuclidean": SQEUCLIDEAN, "euclidean": EUCLIDEAN, "l1": LP, "lp": LP, "cosine": COSINE}
_TILE_ENTRIES = 1 << 21  # of a tile computed by a function

TileFunction = Callable[[Tensor, Tensor], Tensor]


def is_tracked(*tensors: Tensor) -> bool:
    """Whether derivatives, of whatever mode, are being taken with respect to one of them."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(wrapped(t) or forward_ad.unpack_dual(t).tangent is not None for t in tensors) if _levels() else False


def _levels() -> bool:
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


class Encoded(NamedTuple):
    """A cost as the native code takes it (csrc/bind/transport.cpp)."""

    operands: list[Tensor]
    layout: list[int]
    power: float
    fill: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Cost:
    """A matrix `matrix` (n, m), or points `x` (n, d), `y` (m, d) with `kind`, `p`, or `function` for tiles of rows."""

    kind: int
    matrix: Tensor | None = None
    x: Tensor | None = None
    y: Tensor | None = None
    p: float = 2.0
    function: TileFunction | None = None

    @staticmethod
    def dense(matrix: Tensor) -> Cost:
        """Cost of a matrix."""
        return Cost(DENSE, matrix=matrix)

    @staticmethod
    def points(x: Tensor, y: Tensor, cost: str | TileFunction, p: float = 2.0) -> Cost:
        """Cost of points."""
        if callable(cost):
            return Cost(CALLBACK, x=x, y=y, function=cost)
        return Cost(KINDS[cost], x=x, y=y, p=1.0 if cost == "l1" else p)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        if self.matrix is not None:
            return self.matrix.shape[0], self.matrix.shape[1]
        assert self.x is not None
        assert self.y is not None
        return self.x.shape[0], self.y.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix or the points."""
        tensor = self.x if self.matrix is None else self.matrix
        assert tensor is not None
        return tensor.dtype

    @property
    def device(self) -> torch.device:
        """Of the matrix or the points."""
        tensor = self.x if self.matrix is None else self.matrix
        assert tensor is not None
        return tensor.device

    def detach(self) -> Cost:
        """The same without derivatives."""
        matrix, x, y = (None if t is None else t.detach() for t in (self.matrix, self.x, self.y))
        return Cost(self.kind, matrix, x, y, self.p, self.function)

    def select(self, rows: Tensor | None, columns: Tensor | None) -> Cost:
        """Some of the rows and columns, given by their (CPU) indices; None for all."""
        if rows is None and columns is None:
            return self

        def take(t: Tensor | None, index: Tensor | None, dim: int) -> Tensor | None:
            return t if t is None or index is None else t.index_select(dim, index.to(t.device))

        matrix = take(take(self.matrix, rows, 0), columns, 1)
        return Cost(self.kind, matrix, take(self.x, rows, 0), take(self.y, columns, 0), self.p, self.function)

    def tile(self, first: int, last: int) -> Tensor:
        """Rows first..last-1 of the cost as a tensor; differentiable."""
        if self.matrix is not None:
            return self.matrix[first:last]
        assert self.x is not None
        assert self.y is not None
        x, y = self.x[first:last], self.y
        if self.function is not None:
            tile = self.function(x, y)
            if not isinstance(tile, Tensor) or tile.shape != (x.shape[0], y.shape[0]):
                got = tuple(tile.shape) if isinstance(tile, Tensor) else type(tile).__name__
                raise ValueError(
                    f"solve_sample: cost: expected a function of tiles of shapes (k, d) and (m, d) to return a tensor "
                    f"(k, m) = {(x.shape[0], y.shape[0])}, got {got}"
                )
            return tile
        if self.kind == COSINE:
            return 1 - _directions(x) @ _directions(y).mT
        difference = x.unsqueeze(1) - y.unsqueeze(0)
        if self.kind == SQEUCLIDEAN:
            return difference.square().sum(-1)
        if self.kind == EUCLIDEAN:
            distance: Tensor = torch.linalg.vector_norm(difference, dim=-1)
            return distance
        size = difference.abs()
        if self.p < 1:  # infinitely steep at 0: where points meet the derivative is taken as 0
            return torch.where(size > 0, torch.where(size > 0, size, 1.0).pow(self.p), 0.0).sum(-1)
        return size.pow(self.p).sum(-1)

    def tile_rows(self) -> int:
        """Rows of one tile, so that it has about two million entries."""
        n, m = self.shape
        return max(1, min(n, _TILE_ENTRIES // max(m, 1)))

    def extent(self, ranks: Ranks | None = None) -> tuple[float, float, bool]:
        """Smallest and largest finite cost, or bounds of them for points, and whether some are infinite; found once.

        With `ranks` of the rows of all, who look together where one has not.
        """
        missing = "_extent" not in self.__dict__
        if ranks is not None:
            missing = ranks.max(missing)[0] > 0
        if missing:
            object.__setattr__(self, "_extent", self._find_extent(ranks))
        known: tuple[float, float, bool] = self.__dict__["_extent"]
        return known

    def _find_extent(self, ranks: Ranks | None) -> tuple[float, float, bool]:
        if self.matrix is not None or self.function is not None:
            if ranks is None:
                return self._scan()
            with ranks.together():
                low, high, infinite = self._scan()
            is_nan = math.isnan(low)  # which a maximum may lose
            minus_low, high, some, wrong = ranks.max(-math.inf if is_nan else -low, high, infinite, is_nan)
            return math.nan if wrong else -minus_low, high, some > 0
        if self.kind == COSINE:
            return 0.0, 2.0, False
        assert self.x is not None
        assert self.y is not None
        x, y = self.x.detach().double(), self.y.detach().double()
        box = torch.cat([x, y[:1]])  # there may be no x
        top = torch.cat([box.amax(0), -box.amin(0)])  # the corner of all x, and the opposite one with its sign turned
        if ranks is not None:
            top = ranks.all_reduce_(top.to(ranks.device), "max").to(x.device)
        highest, lowest = top[: x.shape[1]], -top[x.shape[1] :]
        sides = torch.maximum(highest, y.amax(0)) - torch.minimum(lowest, y.amin(0))
        if self.kind == SQEUCLIDEAN:
            high = float(sides.square().sum())
        elif self.kind == EUCLIDEAN:
            high = float(sides.norm())
        else:
            high = float(sides.pow(self.p).sum())
        return 0.0, high, False

    def _scan(self) -> tuple[float, float, bool]:
        """Go through the tiles."""
        low, high, infinite = math.inf, -math.inf, False
        n, step = self.shape[0], self.tile_rows()
        for first in range(0, n, step):
            with torch.no_grad():
                tile = self.tile(first, min(n, first + step))
            least, most = (float(t) for t in torch.aminmax(tile))
            if least == -math.inf:
                return least, most, infinite
            if math.isinf(most):
                infinite = True
                finite = tile[torch.isfinite(tile)]
                least, most = (float(t) for t in torch.aminmax(finite)) if finite.numel() else (math.inf, -math.inf)
            if math.isnan(least):
                return math.nan, math.nan, infinite
            low, high = min(low, least), max(high, most)
        return low, high, infinite

    def encode(self) -> Encoded:
        """For the native code; a callable writes its tiles into one buffer. CUDA code gets a workspace."""
        n, m = self.shape
        native = backend()
        size = native.transport_workspace_bytes(n, m) if self.device.type == "cuda" or native is not _C else 0
        if self.matrix is not None:
            operands, layout, power = [self.matrix.detach().contiguous()], [DENSE, n, m, 0, 0], 2.0
        elif self.function is None:
            assert self.x is not None
            assert self.y is not None
            x, y = self.x.detach(), self.y.detach()
            if self.kind == COSINE:
                x, y = _directions(x), _directions(y)
            operands = [x.contiguous(), y.mT.contiguous()]
            layout, power = [self.kind, n, m, self.x.shape[1], 0], self.p
        else:
            assert self.x is not None
            rows = self.tile_rows()
            operands, layout, power = [self.x.new_empty(rows, m)], [CALLBACK, n, m, 0, rows], 2.0
        fill = None
        if self.function is not None:
            buffer, cost = operands[0], self.detach()

            def fill(first: int, last: int) -> None:
                with torch.no_grad():
                    buffer[: last - first].copy_(cost.tile(first, last))

        if size:
            operands.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        return Encoded(operands, layout, power, fill)


def _directions(points: Tensor) -> Tensor:
    return torch.nn.functional.normalize(points, dim=-1)


def check_cost_name(cost: Any, p: float, function: str) -> None:
    """Raise unless `cost` is a known name or callable and the exponent makes sense."""
    if not callable(cost) and cost not in KINDS:
        names = ", ".join(repr(name) for name in KINDS)
        raise ValueError(f"{function}: cost: expected {names} or a callable, got {cost!r}")
    if cost == "lp" and not (isinstance(p, int | float) and 0 < p < math.inf):
        raise ValueError(f"{function}: p: expected a finite number > 0, got {p!r}")
