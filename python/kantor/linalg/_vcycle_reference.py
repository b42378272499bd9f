"""The V-cycle of csrc/linalg/multigrid.h in torch operations: training differentiates it, tests compare with it.

Levels are grids throughout; the graphs that the native hierarchy turns to behind thin walls are not here. Everything
works on batches: grids of shape ``(*grid)`` or ``(grids, 1, *grid)`` with vectors ``(..., batch, *grid)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from kantor.linalg.poisson_grid import PoissonGrid

Smoother = Literal["stencil", "jacobi", "rbgs"]

COARSEST_CELLS = 64  # a grid of no more cells is the last level, and is solved exactly
DAMPING = 0.8  # of the Jacobi smoother, which every stencil starts as


@dataclass(frozen=True)
class Neighbours:
    """The symmetric operator ``y_i = diagonal_i x_i - sum over faces of c_ij x_j`` on a grid.

    Attributes
    ----------
    diagonal : Tensor
        ``(..., *grid)``.
    faces : list of Tensor
        For each axis the coefficients of the faces inside the grid, one fewer than there are cells along it.
    """

    diagonal: Tensor
    faces: list[Tensor]

    @property
    def dim(self) -> int:
        """Number of axes, 2 or 3."""
        return len(self.faces)

    @property
    def grid(self) -> torch.Size:
        """Number of cells along each axis."""
        return self.diagonal.shape[-self.dim :]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply it."""
        y: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Product(torch.autograd.Function):
    """The product with coefficients that need no gradient; a symmetric matrix is its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Neighbours) -> Tensor:
        ctx.A = A
        y = A.diagonal * x
        for axis, c in enumerate(A.faces, start=-A.dim):
            n = c.shape[axis]
            y.narrow(axis, 0, n).addcmul_(c, x.narrow(axis, 1, n), value=-1)
            y.narrow(axis, 1, n).addcmul_(c, x.narrow(axis, 0, n), value=-1)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.A(gradient), None


@dataclass(frozen=True)
class Level:
    """One level of the hierarchy.

    Attributes
    ----------
    A : Neighbours
        Its matrix; zero rows where there is no unknown.
    inverse_root : Tensor
        ``D^-1/2`` with D the diagonal of A, zero where that is.
    S : Neighbours or None
        ``S = I - L / 4``, L the graph Laplacian of the links that cross the borders of blocks; None on the last level.
    inverse : Tensor or None
        On the last level, the pseudo-inverse of A, ``(..., cells, cells)``.
    even : Tensor
        Whether the sum of a cell's indices is even: the red cells.
    """

    A: Neighbours
    inverse_root: Tensor
    S: Neighbours | None
    inverse: Tensor | None
    even: Tensor


def dirichlet_factor(level: int) -> float:
    """``f`` of ``d' = f sum d``: the free surface is a cell away on level 0, and half a block less as cells grow."""
    return 1 / 1.5 if level == 0 else (2 ** (level - 1) + 0.5) / (2**level + 0.5)


def build_levels(faces: Sequence[Tensor], dirichlet: Tensor) -> list[Level]:
    """Return the hierarchy, finest level first.

    Parameters
    ----------
    faces : sequence of Tensor
        Face coefficients c between unknowns, one tensor an axis, with one more entry than cells along it.
    dirichlet : Tensor
        Dirichlet part d of the diagonal, ``(..., *grid)``.
    """
    faces = list(faces)
    levels: list[Level] = []
    while True:
        A = _matrix(faces, dirichlet)
        active = A.diagonal > 0
        inverse_root = torch.where(active, A.diagonal, torch.ones_like(A.diagonal)).rsqrt() * active
        axes = [torch.arange(n, device=dirichlet.device) for n in A.grid]
        even = torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0) % 2 == 0
        if math.prod(A.grid) <= COARSEST_CELLS:
            levels.append(Level(A, inverse_root, None, _pseudo_inverse(A), even))
            return levels
        levels.append(Level(A, inverse_root, _averaging(faces, active), None, even))
        dirichlet = dirichlet_factor(len(levels) - 1) * _sum_children(dirichlet, A.dim)
        faces = [_coarse_faces(c, axis, A.dim) for axis, c in enumerate(faces, start=-A.dim)]


def _matrix(faces: Sequence[Tensor], dirichlet: Tensor) -> Neighbours:
    """``sum over faces of c (x_i - x_j), plus d x_i``."""
    inner = []
    for axis, c in enumerate(faces, start=-len(faces)):
        n = c.shape[axis] - 1
        dirichlet = dirichlet + c.narrow(axis, 0, n) + c.narrow(axis, 1, n)
        inner.append(c.narrow(axis, 1, n - 1))
    return Neighbours(dirichlet, inner)


def _averaging(faces: Sequence[Tensor], active: Tensor) -> Neighbours:
    """``S = I - L / 4`` on the unknowns; blocks begin at even cells, so that even faces cross their borders."""
    crossing = []
    for axis, c in enumerate(faces, start=-len(faces)):
        is_border = torch.arange(c.shape[axis], device=c.device) % 2 == 0
        crossing.append((c > 0).to(c.dtype) * is_border.reshape(-1, *[1] * (-axis - 1)))
    L = _matrix(crossing, torch.zeros(active.shape, dtype=faces[0].dtype, device=active.device))
    return Neighbours(active.to(L.diagonal.dtype) - L.diagonal / 4, [-c / 4 for c in L.faces])


def _pseudo_inverse(A: Neighbours) -> Tensor:
    """Of the matrix itself, formed in double precision."""
    n = math.prod(A.grid)
    double = Neighbours(A.diagonal.double(), [c.double() for c in A.faces])
    units = torch.eye(n, dtype=torch.float64, device=A.diagonal.device).reshape(n, *A.grid)
    dense = double(units.expand(*A.diagonal.shape[: -A.dim][:-1], *units.shape)).flatten(-A.dim)
    inverse: Tensor = torch.linalg.pinv(dense, rtol=1e-10, hermitian=True)
    return inverse.to(A.diagonal.dtype)


def _sum_children(x: Tensor, dim: int, but: int | None = None) -> Tensor:
    """Sum over the two cells of every block along each axis but one; a missing second cell counts as zero."""
    for axis in range(-dim, 0):
        if axis != but:
            x = _even_size(x, axis).unflatten(axis, (-1, 2)).sum(axis)
    return x


def _even_size(x: Tensor, axis: int) -> Tensor:
    """With a zero appended along an axis of odd size."""
    return functional.pad(x, [0, 0] * (-axis - 1) + [0, 1]) if x.shape[axis] % 2 else x


def _coarse_faces(c: Tensor, axis: int, dim: int) -> Tensor:
    """``c' = sum c / 2`` over the fine faces that lie in a coarse one; what is beyond a missing cell is closed."""
    if c.shape[axis] % 2 == 0:
        c = functional.pad(c, [0, 0] * (-axis - 1) + [0, 1])
    every_second = torch.arange(0, c.shape[axis], 2, device=c.device)
    return _sum_children(c.index_select(axis, every_second), dim, but=axis) / 2


def prolong(level: Level, e: Tensor) -> Tensor:
    """``P e = S Q e``: every cell takes its block's value, then averages with linked cells of the next blocks."""
    assert level.S is not None
    for axis, n in enumerate(level.A.grid, start=-level.A.dim):
        e = e.repeat_interleave(2, axis).narrow(axis, 0, n)
    return level.S(e)


def restrict(level: Level, r: Tensor) -> Tensor:
    """``R r = Q' S r``, the transpose of :func:`prolong`."""
    assert level.S is not None
    return _sum_children(level.S(r), level.A.dim)


def _correlate(k: Tensor, x: Tensor) -> Tensor:
    """``y_i = sum over offsets o of k_o x_(i + o)``, zero outside the grid; k is ``(3, 3)`` or ``(3, 3, 3)``."""
    conv = functional.conv2d if k.ndim == 2 else functional.conv3d
    return conv(x.reshape(-1, 1, *x.shape[-k.ndim :]), k[None, None], padding=1).reshape(x.shape)


def scaled_residual_step(level: Level, k: Tensor, residual: Tensor) -> Tensor:
    """``D^-1/2 (k * (D^-1/2 residual))``."""
    return level.inverse_root * _correlate(k, level.inverse_root * residual)


def _red_black_sweep(level: Level, colours: Sequence[Tensor], b: Tensor, x: Tensor | None) -> Tensor:
    """Solve the rows of each colour in turn."""
    x = torch.zeros_like(b) if x is None else x
    for colour in colours:
        x = x + colour * level.inverse_root**2 * (b - level.A(x))
    return x


def v_cycle(
    levels: Sequence[Level],
    stencils: Sequence[Tensor] | Tensor | None,
    scales: Sequence[Tensor] | Tensor,
    r: Tensor,
    *,
    smoother: Smoother = "stencil",
    nu: int = 1,
) -> Tensor:
    """Return ``M r``: one V-cycle on ``A z = r`` from a zero start.

    ::

        x_l  = nu sweeps of x += D^-1/2 (k_l * (D^-1/2 (b_l - A x))), from zero
        x_l += g_l P e_(l+1),   e_(l+1) = the cycle for b_(l+1) = R (b_l - A x_l)
        x_l += nu sweeps with k_l flipped, which is the transposed sweep

    and on the last level ``x = A^+ b``.

    Parameters
    ----------
    levels : sequence of Level
        From :func:`build_levels`.
    stencils : sequence of Tensor or None
        ``k_l`` of 3**dim entries; the last serves all further levels. None with red-black Gauss-Seidel.
    scales : sequence of Tensor
        ``g_l``, likewise.
    r : Tensor
        ``(..., batch, *grid)``; zero where there are no unknowns.
    smoother : str
        "rbgs": each sweep solves the red rows, then the black ones (after the correction in the opposite order).
    nu : int
        Sweeps before and after.
    """

    def sweep(index: int, b: Tensor, x: Tensor | None, transposed: bool) -> Tensor:
        level = levels[index]
        if smoother == "rbgs":
            colours = [level.even, ~level.even]
            return _red_black_sweep(level, colours[::-1] if transposed else colours, b, x)
        assert stencils is not None
        k = stencils[min(index, len(stencils) - 1)]
        step = scaled_residual_step(
            level, k.flip(tuple(range(k.ndim))) if transposed else k, b if x is None else b - level.A(x)
        )
        return step if x is None else x + step

    def cycle(index: int, b: Tensor) -> Tensor:
        level = levels[index]
        if level.inverse is not None:
            e: Tensor = (b.flatten(-level.A.dim) @ level.inverse).unflatten(-1, level.A.grid)  # it is symmetric
            return e
        x = sweep(index, b, None, transposed=False)
        for _ in range(nu - 1):
            x = sweep(index, b, x, transposed=False)
        e = cycle(index + 1, restrict(level, b - level.A(x)))
        x = x + scales[min(index, len(scales) - 1)] * prolong(level, e)
        for _ in range(nu):
            x = sweep(index, b, x, transposed=True)
        return x

    return cycle(0, r)


def levels_of(grid: PoissonGrid, dtype: torch.dtype | None = None) -> list[Level]:
    """Return the hierarchy of a grid; its matrix is the grid's times ``spacing**2``."""
    faces, dirichlet = grid.coefficients()
    dtype = dtype or grid.dtype
    return build_levels([c.detach().to(dtype) for c in faces], dirichlet.detach().to(dtype))
