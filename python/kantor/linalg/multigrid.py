"""Multigrid cycles as preconditioners for Poisson problems on voxel grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import host
from kantor.linalg import _native
from kantor.linalg._native import MULTIGRID, Encoded
from kantor.linalg._operator import LinearOperator
from kantor.linalg.poisson_grid import PoissonGrid

_KINDS = ("grid", "grid", "graph", "exact", "factor")


class Multigrid(LinearOperator):
    """One geometric multigrid V-cycle for a :class:`PoissonGrid`: ``M ~ A^-1``, symmetric positive definite.

    Set up in a few passes over the grid, without matrix products, so that it pays even when the geometry changes at
    every step. Use it as ``cg(A, b, M=Multigrid(A))``; the number of iterations, about ten to 1e-6, does not grow with
    the grid.

    Coarse grids are rediscretised; the interpolation is linear and does not reach across walls. Where coarse cells
    would hold parts of the fluid that a wall one cell thick keeps apart, the coarser levels become graphs with a node
    for each part, and are cycled through twice.

    Parameters
    ----------
    A : PoissonGrid
        Any size (odd ones too), two or three dimensions, voxels or face coefficients.
    smoother : "rbgs", "jacobi" or "stencil"
        On grids: red-black Gauss-Seidel, damped Jacobi, or a learned stencil (see :class:`LearnedVCycle`). On graphs it
        is always red-black Gauss-Seidel.
    sweeps : int
        Sweeps of the smoother before and, in reverse order, after the correction of each grid.
    omega : float
        Damping of Jacobi.
    stencils : Tensor, optional
        With ``smoother="stencil"``: ``(levels, 3, 3)`` or ``(levels, 3, 3, 3)``, the kernels k of
        ``x += D^-1/2 (k * (D^-1/2 (b - A x)))``; the last serves all further levels.
    scales : Tensor, optional
        ``(levels,)``, factors of the coarse corrections; default one.
    walls : bool
        False: stay with grids whatever the walls. Faster to set up, slow to converge with thin walls.
    precision : torch.dtype
        Of the cycle itself, float32 or float64, whatever the precision of the vectors. float32 halves the traffic; the
        solution is as accurate.

    Attributes
    ----------
    levels : list of dict
        Kind (``"grid"``, ``"graph"``, ``"factor"``, ``"exact"``), shape and number of unknowns of each level.

    Raises
    ------
    TypeError
        `A` is not a PoissonGrid.
    ValueError
        Options out of range.

    Notes
    -----
    O(n) time and memory: two bytes a cell and about 3 words a coarse cell for the levels, two words a cell of
    workspace. Set up on the host. Deterministic: the same bits for any number of threads. The equations are in
    csrc/linalg/multigrid.h; for the geometric cycle as a preconditioner see McAdams, Sifakis, Teran, *A parallel
    multigrid Poisson solver for fluids simulation on large grids*, 2010.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Multigrid, PoissonGrid, cg
    >>> flags = torch.full((64, 64), 2)
    >>> flags[-1] = 3
    >>> flags[20:40, 30:35] = 0
    >>> A = PoissonGrid(flags)
    >>> b = torch.ones(64, 64, dtype=torch.float64)
    >>> cg(A, b, M=Multigrid(A), rtol=1e-6).iterations <= 12
    True
    """

    is_summand = False

    def __init__(
        self,
        A: PoissonGrid,
        *,
        smoother: Literal["rbgs", "jacobi", "stencil"] = "rbgs",
        sweeps: int = 1,
        omega: float = 0.8,
        stencils: Tensor | Sequence[Tensor] | None = None,
        scales: Tensor | Sequence[float] | None = None,
        walls: bool = True,
        precision: torch.dtype = torch.float32,
    ) -> None:
        kernels, factors = self._set_options(A, smoother, sweeps, omega, stencils, scales, walls, precision)
        if A.ranks is not None:
            raise TypeError(f"Multigrid: A: {A!r} is shared by processes; use kantor.distributed.ShardedMultigrid(A)")
        operands = [host(t) for t in A.encode().operands]
        self._exponent = 0
        if A.face_coef is None:
            operands[0] = operands[0].reshape(-1)
        else:  # brought to size one by a power of two, whatever the precision of the cycle can hold
            largest = max(float(t.abs().max()) for t in operands[1:])
            self._exponent = math.frexp(largest)[1] if largest > 0 else 0
            operands = [torch.ldexp(t, torch.tensor(-self._exponent)).contiguous() for t in operands]
        nz, ny, nx = A._native_grid
        arena, levels = _C.multigrid_setup(
            operands,
            nz,
            ny,
            nx,
            precision is torch.float32,
            walls,
            kernels,
            factors,
            0,
            torch.get_num_threads(),
        )
        self._arena = torch.from_numpy(arena).to(self.device)
        self._layout = self._encoded_layout(self.shape[0], levels)

    def _encoded_layout(self, n: int, levels: Sequence[int]) -> list[int]:
        """Of a hierarchy with n unknowns on its first level: csrc/linalg/preconditioner.h."""
        width = 4 if self.precision is torch.float32 else 8
        count = len(levels) // _C.level_layout_size
        return [MULTIGRID, n, width, int(self.smoother != "rbgs"), self.sweeps, count, *levels]

    def _set_options(
        self, A: PoissonGrid, smoother: str, sweeps: int, omega: float, stencils: Any, scales: Any, walls: bool,
        precision: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """Check and keep them; kernels (levels, 27) and factors (levels,) as native code takes them."""
        if not isinstance(A, PoissonGrid):
            raise TypeError(
                f"Multigrid: A: expected a PoissonGrid, got {type(A).__name__}; use M='ic0' for matrices and stencils, "
                "or make a PoissonGrid of cells (2) with air around them (3), where x is zero"
            )
        if smoother not in ("rbgs", "jacobi", "stencil"):
            raise ValueError(f"Multigrid: smoother: expected 'rbgs', 'jacobi' or 'stencil', got {smoother!r}")
        if not isinstance(sweeps, int) or not 1 <= sweeps <= 8:
            raise ValueError(f"Multigrid: sweeps: expected an integer from 1 to 8, got {sweeps!r}")
        if precision not in (torch.float32, torch.float64):
            raise ValueError(f"Multigrid: precision: expected torch.float32 or torch.float64, got {precision}")
        if not isinstance(omega, int | float) or not 0 < omega < 1:
            raise ValueError(f"Multigrid: omega: expected a number between 0 and 1, got {omega!r}")
        if (stencils is not None) != (smoother == "stencil"):
            raise ValueError("Multigrid: stencils: to be given with smoother='stencil', and only then")
        self.shape, self.dtype, self.device, self.grid = A.shape, A.dtype, A.device, A.grid
        self.smoother, self.sweeps, self.walls, self.precision = smoother, sweeps, walls, precision
        self.A = A
        kernels = None if smoother == "rbgs" else _kernels(stencils, omega, len(A.grid))
        factors = None if scales is None else torch.as_tensor(scales, dtype=torch.float64).detach().cpu().reshape(-1)
        if kernels is not None and factors is None:
            factors = torch.ones(len(kernels), dtype=torch.float64)
        for name, values in (("stencils", kernels), ("scales", factors)):
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(f"Multigrid: {name}: expected finite values")
        if factors is not None and len(factors) == 0:
            raise ValueError("Multigrid: scales: expected one a level, got none")
        if factors is not None and kernels is not None and len(factors) != len(kernels):
            raise ValueError(f"Multigrid: scales: expected {len(kernels)}, one a kernel, got {len(factors)}")
        return kernels, factors

    @property
    def levels(self) -> list[dict[str, object]]:
        """Kind, shape and number of unknowns of each level, the finest first."""
        return describe_levels(self._layout, len(self.A.grid))

    @property
    def has_walls(self) -> bool:
        """Whether thin walls made the coarser levels graphs."""
        return any(level["kind"] in ("graph", "factor") for level in self.levels)

    def encode(self) -> Encoded:
        """The levels' arrays."""
        return Encoded([self._arena], self._layout, [1.0])

    def _apply(self, x: Tensor) -> Tensor:
        operands, layout, _ = self.encode()
        result: Tensor = _native.multigrid(operands, layout, self.A.confined(x))
        # The native cycle is for grid spacing one and coefficients of size one: solvers care for no factor.
        return result * math.ldexp(self.A.spacing**2, -self._exponent)

    def safer(self) -> Multigrid | None:
        """A cycle that is positive definite where this one, by its stencils or second visits, is not, if there is one.

        Learned stencils give way to damped Jacobi, then second visits of graph levels (a W-cycle) to single ones.
        """
        if self.smoother == "stencil":
            return Multigrid(self.A, smoother="jacobi", sweeps=self.sweeps, walls=self.walls, precision=self.precision)
        single = visited_once(self._layout)
        if single == self._layout:
            return None
        other = self.to(self.dtype)
        other._layout = single
        return other

    @property
    def T(self) -> Multigrid:  # noqa: N802
        """Itself: the cycle is symmetric."""
        return self

    def to(self, dtype: torch.dtype) -> Multigrid:
        """Return the same cycle for vectors of another dtype."""
        converted = object.__new__(type(self))
        converted.__dict__.update(self.__dict__)
        converted.dtype, converted.A = dtype, self.A.to(dtype)
        return converted

    def __repr__(self) -> str:
        sizes = " > ".join(f"{level['size']}{' nodes' if level['kind'] == 'graph' else ''}" for level in self.levels)
        cycle = "W" if any(level["visits"] == 2 for level in self.levels) else "V"
        return f"Multigrid({self.smoother}, {cycle}-cycle, {self.sweeps} + {self.sweeps} sweeps, {sizes})"


def describe_levels(layout: Sequence[int], dims: int) -> list[dict[str, object]]:
    """Of an encoded hierarchy: see :attr:`Multigrid.levels`."""
    rows = torch.tensor(layout[6:]).reshape(-1, _C.level_layout_size).tolist()
    described = []
    for kind, nz, ny, nx, visits, *_ in rows:
        shape = (nx,) if kind in (2, 4) else (nz, ny, nx) if dims == 3 else (nz, nx)
        size = nz * ny * nx
        described.append({"kind": _KINDS[kind], "shape": shape, "size": size, "visits": visits})
    return described


def visited_once(layout: Sequence[int]) -> list[int]:
    """An encoded hierarchy without second visits."""
    single = list(layout)
    single[6 + 4 :: _C.level_layout_size] = [1] * single[5]
    return single


def _kernels(stencils: Tensor | Sequence[Tensor] | None, omega: float, dims: int) -> Tensor:
    """Kernels as (levels, 27) in the native grid's axes: a two-dimensional one lies in the plane (z, x)."""
    if stencils is None:
        stencils = torch.zeros((1, *[3] * dims), dtype=torch.float64)
        stencils[(0, *[1] * dims)] = omega
    if not isinstance(stencils, Tensor):
        stencils = torch.stack([torch.as_tensor(k) for k in stencils])
    if stencils.ndim != dims + 1 or stencils.shape[1:] != (3,) * dims or len(stencils) == 0:
        raise ValueError(
            f"Multigrid: stencils: expected shape (levels, {', '.join(['3'] * dims)}), got {tuple(stencils.shape)}"
        )
    kernels = stencils.detach().to("cpu", torch.float64)
    if dims == 2:
        kernels = torch.nn.functional.pad(kernels.unsqueeze(2), (0, 0, 1, 1))
    return kernels.reshape(len(kernels), 27).contiguous()
