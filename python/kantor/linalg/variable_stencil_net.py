"""The linear network of neural-preconditioned Poisson solvers: stencils on several levels, chosen by the geometry."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor._checks import check_float, check_tensor
from kantor.linalg.direction_net import DirectionMap, check_bound
from kantor.linalg.poisson_grid import AIR, FLUID, SOLID, PoissonGrid


class Stencils(NamedTuple):
    """What the geometry makes of a :class:`VariableStencilNet`: see :meth:`VariableStencilNet.stencils`.

    Attributes
    ----------
    down : list of Tensor
        For each level, the coarsest included, a stencil at every cell, ``(3**dim, *grid)``.
    up : list of Tensor
        The same for the way back, for each level but the coarsest.
    scales : list of tuple of Tensor
        For each level but the coarsest, how much of its own and of the coarser level's is summed.
    mask : Tensor
        Fluid cells of the padded grid.
    """

    down: list[Tensor]
    up: list[Tensor]
    scales: list[tuple[Tensor, Tensor]]
    mask: Tensor


class VariableStencilNet(nn.Module):
    """Network linear in the residual and conditioned on the geometry: a V-cycle without smoothing iterations.

    Each block S applies at every cell its own stencil, which one convolution forms from the flags around the cell (air,
    fluid and solid, averaged on coarser levels). With `levels` L::

        x_0 = S r,   x_l = S avgpool(x_(l-1))   for l = 1 .. L
        x_(l-1) = c_0 x_(l-1) + c_1 S interpolate(x_l)   for l = L .. 1

    where c_0 and c_1 are means over the level of one more convolution of the flags each.

    Parameters
    ----------
    dim : {3, 2}
        Of the grids.
    levels : int
        Number of halvings, L >= 1.

    Raises
    ------
    ValueError
        An argument out of range.

    Notes
    -----
    20,582 parameters for 4 levels in 3-D. Weights are drawn from torch's global generator, small ones around stencils
    that copy; saved by ``state_dict``. An application of a bound network reads ``2 * 3**dim`` stencil entries a cell:
    limited by memory. Train with :func:`kantor.linalg.train_direction_net`, loss ``"residual"``.

    Source: Lan, Palmer, Zhou and Teran, *A Neural-Preconditioned Poisson Solver for Mixed Dirichlet and Neumann
    Boundary Conditions*, ICML 2024, arXiv 2310.00177, section 4.

    Examples
    --------
    >>> import torch
    >>> from kantor.datasets import poisson_scenes
    >>> from kantor.linalg import PoissonGrid, VariableStencilNet
    >>> net = VariableStencilNet(dim=2, levels=3)
    >>> f = net.bind(PoissonGrid(poisson_scenes.smoke_sphere((32, 32))))
    >>> r = torch.randn(32, 32)
    >>> bool((f(2 * r) - 2 * f(r)).norm() <= 1e-5 * f(r).norm())
    True
    """

    def __init__(self, dim: int = 3, levels: int = 4) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise ValueError(f"VariableStencilNet: dim: expected 2 or 3, got {dim!r}")
        if not (isinstance(levels, int) and levels >= 1):
            raise ValueError(f"VariableStencilNet: levels: expected a positive integer, got {levels!r}")
        self.dim, self.levels = dim, levels
        conv = nn.Conv2d if dim == 2 else nn.Conv3d
        self.down = nn.ModuleList([conv(3, 3**dim, 3, padding=1) for _ in range(levels + 1)])
        self.up = nn.ModuleList([conv(3, 3**dim, 3, padding=1) for _ in range(levels)])
        self.scales = nn.ModuleList([conv(3, 1, 3, padding=1) for _ in range(2 * levels)])
        with torch.no_grad():
            copy = torch.zeros(3**dim)
            copy[3**dim // 2] = 1.0
            for block in (*self.down, *self.up):
                for name, value in block.named_parameters():
                    value.copy_(0.1 * value if name == "weight" else copy)
            for block in self.scales:
                for name, value in block.named_parameters():
                    value.copy_(0.1 * value if name == "weight" else torch.ones(1))

    def stencils(self, flags: Tensor) -> Stencils:
        """Return what depends on the geometry alone; differentiable in the weights.

        Parameters
        ----------
        flags : Tensor
            ``(*grid)``: SOLID = 0, FLUID = 2, AIR = 3. Padded with SOLID to multiples of ``2**levels``.

        Raises
        ------
        ValueError
            Flags of another dimension.
        """
        check_tensor(flags, "VariableStencilNet", "flags")
        if flags.ndim != self.dim:
            raise ValueError(
                f"VariableStencilNet: flags: expected {self.dim} dimensions, got shape {tuple(flags.shape)}; make the "
                "network for the dimension of the grid"
            )
        pool = functional.avg_pool2d if self.dim == 2 else functional.avg_pool3d
        flags = functional.pad(flags, self._padding(tuple(flags.shape)), value=SOLID)
        image = torch.stack([flags == AIR, flags == FLUID, flags == SOLID]).to(next(self.parameters()).dtype)
        down, up, scales = [], [], []
        for level in range(self.levels):
            down.append(self.down[level](image))
            up.append(self.up[level](image))
            own, coarser = self.scales[2 * level : 2 * level + 2]
            scales.append((own(image).mean(), coarser(image).mean()))
            image = pool(image, 2)
        down.append(self.down[self.levels](image))
        return Stencils(down, up, scales, flags == FLUID)

    def _padding(self, grid: tuple[int, ...]) -> list[int]:
        return [side for n in reversed(grid) for side in (0, -n % 2**self.levels)]

    def forward(self, r: Tensor, flags: Tensor) -> Tensor:
        """Return directions for residuals; differentiable, linear in r.

        Parameters
        ----------
        r : Tensor
            ``(..., *grid)``, float32 or float64; computed in the dtype of the weights. Read on fluid cells only.
        flags : Tensor
            ``(*grid)``: SOLID = 0, FLUID = 2, AIR = 3.

        Returns
        -------
        Tensor
            Of the shape and dtype of r; zero outside the fluid.

        Raises
        ------
        TypeError
            r is no tensor of these dtypes.
        ValueError
            Shapes that do not fit.
        """
        return self.apply_stencils(r, self.stencils(flags), tuple(flags.shape))

    def apply_stencils(self, r: Tensor, stencils: Stencils, grid: tuple[int, ...]) -> Tensor:
        """Return the directions, from what :meth:`stencils` returned for the grid."""
        check_tensor(r, "VariableStencilNet", "r")
        check_float(r, "VariableStencilNet", "r")
        if tuple(r.shape[-self.dim :]) != grid:
            raise ValueError(
                f"VariableStencilNet: r: expected shape (..., {', '.join(map(str, grid))}), got {tuple(r.shape)}"
            )
        pool = functional.avg_pool2d if self.dim == 2 else functional.avg_pool3d
        mode = "bilinear" if self.dim == 2 else "trilinear"
        x = functional.pad(r.reshape(-1, *grid).to(stencils.down[0].dtype), self._padding(grid))
        x = torch.where(stencils.mask, x, torch.zeros_like(x))
        levels = [variable_stencil(stencils.down[0], x)]
        for stencil in stencils.down[1:]:
            levels.append(variable_stencil(stencil, pool(levels[-1].unsqueeze(1), 2).squeeze(1)))
        x = levels.pop()
        for stencil, (own, coarser) in zip(reversed(stencils.up), reversed(stencils.scales), strict=True):
            finer = functional.interpolate(x.unsqueeze(1), scale_factor=2, mode=mode, align_corners=False).squeeze(1)
            x = own * levels.pop() + coarser * variable_stencil(stencil, finer)
        x = torch.where(stencils.mask, x, torch.zeros_like(x))
        for axis, n in enumerate(grid, start=1):
            x = x.narrow(axis, 0, n)
        return x.reshape(r.shape).to(r.dtype)

    def bind(self, grid: PoissonGrid) -> DirectionMap:
        """Return the network on one grid, for many applications: the stencils of all cells are formed once.

        Parameters
        ----------
        grid : PoissonGrid
            Of this network's dimension, on the weights' device.

        Raises
        ------
        TypeError
            grid is no PoissonGrid.
        ValueError
            Another dimension.

        Notes
        -----
        The stencils take ``2 * 3**dim`` words a cell and a seventh (2-D: a third) more for the coarser levels.
        """
        check_bound("VariableStencilNet", self.dim, grid)
        with torch.no_grad():
            stencils = self.stencils(grid.flags)
        return DirectionMap(grid, lambda r: self.apply_stencils(r, stencils, grid.grid), repr(self))

    def __repr__(self) -> str:
        return f"VariableStencilNet({self.dim}-D, {self.levels} levels)"


def variable_stencil(stencil: Tensor, x: Tensor) -> Tensor:
    """Apply at every cell its own 3^d stencil: ``y_i = sum_o stencil[o, i] x[i + o]``, zero outside the array.

    Parameters
    ----------
    stencil : Tensor
        ``(3**dim, *grid)``, offsets in C order.
    x : Tensor
        ``(batch, *grid)``.
    """
    result: Tensor = _VariableStencil.apply(stencil, x)  # type: ignore[no-untyped-call]
    return result


class _VariableStencil(torch.autograd.Function):
    """Sums in place, forward and backward: autograd's own would keep a product for each of the 3^d offsets."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, stencil: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(stencil, x)
        y = torch.zeros_like(x)
        for k, window in _windows(functional.pad(x, [1, 1] * (x.ndim - 1))):
            y.addcmul_(stencil[k], window)
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gy,) = grads
        stencil, x = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_stencil, needs_x = ctx.needs_input_grad  # type: ignore[attr-defined]
        g_stencil = torch.empty_like(stencil) if needs_stencil else None
        padding = [1, 1] * (x.ndim - 1)
        g_padded = torch.zeros_like(functional.pad(x, padding)) if needs_x else None
        if g_stencil is not None:
            for k, window in _windows(functional.pad(x, padding)):
                torch.sum(gy * window, 0, out=g_stencil[k])
        if g_padded is None:
            return g_stencil, None
        for k, window in _windows(g_padded):
            window.addcmul_(stencil[k], gy)
        return g_stencil, g_padded[(slice(None), *(slice(1, -1) for _ in padding[::2]))]


def _windows(padded: Tensor) -> list[tuple[int, Tensor]]:
    """The 3^d views of a padded batch ``(batch, *grid + 2)``, shifted by each offset."""
    sizes = [n - 2 for n in padded.shape[1:]]
    views = []
    for k, offset in enumerate(product(range(3), repeat=len(sizes))):
        window = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
        views.append((k, padded[(slice(None), *window)]))
    return views


__all__ = ["Stencils", "VariableStencilNet", "variable_stencil"]
