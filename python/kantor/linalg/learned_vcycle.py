"""A multigrid V-cycle whose smoothers are learned."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kantor._checks import check_float, check_tensor
from kantor.linalg._vcycle_reference import (
    DAMPING,
    Level,
    Smoother,
    levels_of,
    scaled_residual_step,
    v_cycle,
)
from kantor.linalg.multigrid import Multigrid
from kantor.linalg.poisson_grid import PoissonGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

LEVELS = 6  # with parameters of their own; deeper ones use those of the last


class LearnedVCycle(nn.Module):
    """Geometric multigrid with learned smoothers: ``M ~ A^-1`` for :class:`PoissonGrid`, linear and symmetric.

    On level l a sweep is ``x += D^-1/2 (k_l * (D^-1/2 (b - A x)))`` with D the diagonal of A and a stencil ``k_l`` of
    3**dim numbers; after the coarse correction, scaled by ``g_l``, the transposed sweep follows. So M is symmetric, and
    positive definite as long as each sweep contracts in the norm of A. Plain conjugate gradients take it:
    ``cg(A, b, M=LearnedVCycle(2).bind(A))``.

    60 parameters in two dimensions, 168 in three. Those that come with the package were trained for minutes on seven
    scenes of 64 x 64 or 32 x 32 x 32 cells and serve grids of any size and shape; retrain them for your own geometry
    with :func:`train_vcycle`.

    Parameters
    ----------
    dim : int
        2 or 3.
    smoother : {"stencil", "jacobi", "rbgs"}
        Learned stencils; damped Jacobi, the same with ``k_l = 0.8`` at the centre; or red-black Gauss-Seidel. Only the
        first has parameters.
    nu : int
        Sweeps before and after the correction.
    pretrained : bool
        Start with the weights that come with the package (for ``nu = 1``). False: with damped Jacobi and ``g_l = 1``.

    Attributes
    ----------
    stencils : Parameter
        ``k_l``, float64, ``(6, 3, 3)`` or ``(6, 3, 3, 3)``. Levels beyond the sixth use the last.
    scales : Parameter
        ``g_l``, float64, ``(6,)``.

    Raises
    ------
    ValueError
        An argument out of range.

    Notes
    -----
    :meth:`bind` is native and what solvers should get; :meth:`forward` is the same cycle in torch operations, for
    derivatives. They differ where thin walls split coarse cells: there the native levels become graphs.

    The hierarchy is that of :class:`Multigrid`; a learned smoother in it follows the learned multigrid of Greenfeld et
    al., *Learning to Optimize Multigrid PDE Solvers*, 2019, in spirit. Ours are the symmetric scaling, the loss and the
    condition that keeps M positive definite (docs, *The learned V-cycle*).

    Examples
    --------
    >>> import torch
    >>> from kantor.datasets import poisson_scenes
    >>> from kantor.linalg import LearnedVCycle, PoissonGrid, cg
    >>> A = PoissonGrid(poisson_scenes.smoke_balls((128, 128)))
    >>> b = torch.randn(128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> cg(A, b, M=LearnedVCycle(2).bind(A), rtol=1e-6).iterations <= 9
    True
    """

    stencils: Tensor
    scales: Tensor

    def __init__(self, dim: int, smoother: Smoother = "stencil", nu: int = 1, pretrained: bool = True) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise ValueError(f"LearnedVCycle: dim: expected 2 or 3, got {dim!r}")
        if smoother not in ("stencil", "jacobi", "rbgs"):
            raise ValueError(f"LearnedVCycle: smoother: expected 'stencil', 'jacobi' or 'rbgs', got {smoother!r}")
        if not (isinstance(nu, int) and 1 <= nu <= 8):
            raise ValueError(f"LearnedVCycle: nu: expected an integer from 1 to 8, got {nu!r}")
        self.dim, self.smoother, self.nu = dim, smoother, nu
        stencils = torch.zeros((LEVELS, 3**dim), dtype=torch.float64)
        stencils[:, 3**dim // 2] = DAMPING
        stencils = stencils.unflatten(1, [3] * dim)
        scales = torch.ones(LEVELS, dtype=torch.float64)
        if smoother == "stencil":
            if pretrained:
                weights = _shipped_weights(dim)
                stencils = torch.tensor(weights["stencils"], dtype=torch.float64)
                scales = torch.tensor(weights["scales"], dtype=torch.float64)
            self.stencils, self.scales = nn.Parameter(stencils), nn.Parameter(scales)
        else:
            self.register_buffer("stencils", stencils, persistent=False)
            self.register_buffer("scales", scales, persistent=False)

    def forward(self, grid: PoissonGrid, r: Tensor) -> Tensor:
        """Return ``M r``; differentiable in r and the parameters.

        Parameters
        ----------
        grid : PoissonGrid
            Of this dimension. Its levels are built at each call, without gradients to its coefficients.
        r : Tensor
            ``(..., *grid)`` or ``(..., n)``, float32 or float64: the precision of the cycle.

        Raises
        ------
        TypeError
            grid is no PoissonGrid, or r no tensor of these dtypes.
        ValueError
            Dimension, shape or device do not fit.
        """
        self._check_grid("LearnedVCycle", grid)
        check_tensor(r, "LearnedVCycle", "r")
        check_float(r, "LearnedVCycle", "r")
        flat = tuple(r.shape[-self.dim :]) != grid.grid
        if (flat and (r.ndim == 0 or r.shape[-1] != grid.shape[0])) or r.device != grid.device:
            raise ValueError(
                f"LearnedVCycle: r: expected shape (..., {', '.join(map(str, grid.grid))}) on {grid.device}, got "
                f"{tuple(r.shape)} on {r.device}"
            )
        shaped = r.unflatten(-1, grid.grid) if flat else r
        shaped = torch.where(grid.mask, shaped, torch.zeros_like(shaped))
        levels = levels_of(grid, r.dtype)
        stencils, scales = self.stencils.to(r), self.scales.to(r)
        z = v_cycle(levels, stencils, scales, shaped, smoother=self.smoother, nu=self.nu) * grid.spacing**2
        return z.flatten(-self.dim) if flat else z

    def bind(self, grid: PoissonGrid, *, walls: bool = True, precision: torch.dtype = torch.float32) -> Multigrid:
        """Return the native cycle for a grid, with the parameters as they are now.

        Parameters
        ----------
        grid : PoissonGrid
            Of this dimension.
        walls, precision
            As for :class:`Multigrid`.

        Raises
        ------
        TypeError
            grid is no PoissonGrid.
        ValueError
            Another dimension.
        """
        self._check_grid("LearnedVCycle.bind", grid)
        options: dict[str, Any] = {"sweeps": self.nu, "walls": walls, "precision": precision}
        if self.smoother == "stencil":
            options |= {"stencils": self.stencils.detach().clone(), "scales": self.scales.detach().clone()}
        return grid._multigrid(smoother=self.smoother, **options)

    def contraction(self, grid: PoissonGrid, iterations: int = 50) -> list[float]:
        """Return for each level below which there is another the largest eigenvalue of a sweep's ``N A``.

        A sweep contracts in the norm of A if it is between 0 and 2, and M is positive definite if all do. It may well
        be if some do not: what a sweep on a coarse level enlarges, those on finer levels reduce.

        Parameters
        ----------
        grid : PoissonGrid
            Of this dimension.
        iterations : int
            Of the power method; the results are lower bounds, good to a few per cent after 50.

        Raises
        ------
        TypeError
            grid is no PoissonGrid.
        ValueError
            Another dimension.
        """
        self._check_grid("LearnedVCycle.contraction", grid)
        if self.smoother == "rbgs":
            raise ValueError("LearnedVCycle.contraction: Gauss-Seidel always contracts: nothing to estimate")
        generator = torch.Generator().manual_seed(0)
        largest = []
        with torch.no_grad():
            for index, level in enumerate(levels_of(grid, torch.float64)[:-1]):
                k = self.stencils[min(index, LEVELS - 1)].to(grid.device)
                v = torch.randn(level.A.grid, dtype=torch.float64, generator=generator).to(grid.device)
                for _ in range(iterations):
                    v = power_step(level, k, v)
                largest.append(float(sweep_eigenvalue(level, k, v)))
        return largest

    def _check_grid(self, name: str, grid: object) -> None:
        if not isinstance(grid, PoissonGrid):
            raise TypeError(f"{name}: grid: expected a PoissonGrid, got {type(grid).__name__}; wrap the flags in one")
        if len(grid.grid) != self.dim:
            raise ValueError(
                f"{name}: grid: expected {self.dim} dimensions, got the grid {grid.grid}; make the cycle with "
                f"dim={len(grid.grid)}"
            )

    def __repr__(self) -> str:
        return f"LearnedVCycle({self.dim}-D, {self.smoother}, {self.nu} + {self.nu} sweeps)"


def power_step(level: Level, k: Tensor, v: Tensor) -> Tensor:
    """``N A v`` with ``N = D^-1/2 K D^-1/2`` the sweep of stencil k, divided by its norm."""
    w = scaled_residual_step(level, k, level.A(v))
    dims = tuple(range(-level.A.dim, 0))
    return w / w.square().sum(dims, keepdim=True).sqrt().clamp_min(torch.finfo(w.dtype).tiny)


def sweep_eigenvalue(level: Level, k: Tensor, v: Tensor) -> Tensor:
    """The Rayleigh quotient of ``N A`` at v in the inner product of A, ``v'ANAv / v'Av``; zero where ``v'Av`` is."""
    dims = tuple(range(-level.A.dim, 0))
    Av = level.A(v)
    quotient: Tensor = (Av * scaled_residual_step(level, k, Av)).sum(dims) / (v * Av).sum(dims).clamp_min(1e-30)
    return quotient


def _shipped_weights(dim: int) -> dict[str, Sequence[Any]]:
    """The file weights/vcycle_2d.json or vcycle_3d.json; made by bench/linalg/train_vcycle.py."""
    text = resources.files("kantor.linalg").joinpath("weights", f"vcycle_{dim}d.json").read_text(encoding="utf-8")
    weights: dict[str, Sequence[Any]] = json.loads(text)
    return weights


__all__ = ["LearnedVCycle"]
