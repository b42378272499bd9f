"""The convolutional network of deep conjugate directions, and direction maps: what networks become on one grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from kantor._checks import check_float, check_tensor
from kantor.linalg._conv_inference import PRECISIONS, PackedNet
from kantor.linalg.poisson_grid import PoissonGrid

COUNTS = {"64": (1, 3, 2), "128": (2, 5, 3)}
"""Residual pairs before pooling, on the coarse level and after upsampling, by variant."""


class DirectionMap:
    """A network on one grid: takes residuals, flat or shaped like the grid, and returns search directions.

    Made by the networks' ``bind(grid)``; what :func:`kantor.linalg.dcdm` takes for ``f``. No gradients: call the
    network itself for these.

    Attributes
    ----------
    grid : tuple of int
        Shape of the grid.
    name : str
        The network's description.
    """

    def __init__(self, grid: PoissonGrid, apply: Callable[[Tensor], Tensor], name: str) -> None:
        self.grid, self.name, self._apply = grid.grid, name, apply
        self._cells = grid.shape[0]

    def __call__(self, r: Tensor) -> Tensor:
        """Return the directions for residuals.

        Parameters
        ----------
        r : Tensor
            ``(..., *grid)`` or ``(..., n)``, float32 or float64. Cells that are not fluid are not read.

        Returns
        -------
        Tensor
            Of the shape and dtype of r; zero outside the fluid.

        Raises
        ------
        TypeError
            r is no tensor, or of another dtype.
        ValueError
            Its shape does not fit.
        """
        check_tensor(r, "DirectionMap", "r")
        check_float(r, "DirectionMap", "r")
        shaped = tuple(r.shape[-len(self.grid) :]) == self.grid
        if not shaped and (r.ndim == 0 or r.shape[-1] != self._cells):
            raise ValueError(
                f"DirectionMap: r: expected shape (..., {', '.join(map(str, self.grid))}) or (..., {self._cells}), "
                f"got {tuple(r.shape)}; bind the network to the grid of r"
            )
        with torch.no_grad():
            q = self._apply(r.detach() if shaped else r.detach().unflatten(-1, self.grid))
        return q.reshape(r.shape).to(r.dtype)

    def __repr__(self) -> str:
        return f"DirectionMap({self.name}, grid {' x '.join(map(str, self.grid))})"


class DirectionNet(nn.Module):
    """Network that maps a residual to a search direction, close to a multiple of ``A^-1 r`` once it is trained.

    Two convolutions, `pre` residual pairs, one more convolution, then the same at half the resolution (2x average
    pooling, `mid` pairs, nearest upsampling, sum), `post` pairs, and one weight a channel. Convolutions have three
    cells along each axis and zero padding; a pair is ``u + relu(conv(relu(conv(u))))``. Any size of grid: one pooling
    level sees 33 cells far ("64") or 53 ("128"), so that larger grids need more iterations.

    Parameters
    ----------
    dim : {3, 2}
        Of the grids.
    variant : {"64", "128"}
        Pairs (1, 3, 2) or (2, 5, 3): the networks that the paper trained at these sizes.
    channels : int
        Of all inner layers; native inference wants a multiple of 4.
    bias : bool
        Whether convolutions have biases, as the paper's. Without them ``f(c r) = c f(r)`` for c > 0.

    Attributes
    ----------
    counts : tuple of int
        ``(pre, mid, post)``.
    convolutions : torch.nn.ModuleList
        In the order in which they are applied.

    Raises
    ------
    ValueError
        An argument out of range.

    Notes
    -----
    97,216 parameters for "64" in 3-D and 152,512 for "128" (97,457 and 152,881 with biases); a third in 2-D. Weights
    are drawn from torch's global generator and saved by ``state_dict``. Train with
    :func:`kantor.linalg.train_direction_net`.

    Source: Kaneda, Akar, Chen, Kala, Hyde and Teran, *A Deep Conjugate Direction Method for Iteratively Solving Linear
    Systems*, ICML 2023, section 4.

    Examples
    --------
    >>> import torch
    >>> from kantor.datasets import poisson_scenes
    >>> from kantor.linalg import DirectionNet, PoissonGrid
    >>> net = DirectionNet(dim=2)
    >>> f = net.bind(PoissonGrid(poisson_scenes.smoke_sphere((32, 32))))
    >>> f(torch.ones(32, 32)).shape
    torch.Size([32, 32])
    """

    def __init__(
        self, dim: int = 3, variant: Literal["64", "128"] = "64", channels: int = 16, bias: bool = False
    ) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise ValueError(f"DirectionNet: dim: expected 2 or 3, got {dim!r}")
        if variant not in COUNTS:
            raise ValueError(f"DirectionNet: variant: expected '64' or '128', got {variant!r}")
        if not (isinstance(channels, int) and channels >= 1):
            raise ValueError(f"DirectionNet: channels: expected a positive integer, got {channels!r}")
        self.dim, self.variant, self.channels, self.bias = dim, variant, channels, bias
        self.counts = COUNTS[variant]
        conv = nn.Conv2d if dim == 2 else nn.Conv3d
        inner = 2 + 2 * sum(self.counts)
        self.convolutions = nn.ModuleList(
            [
                conv(1, channels, 3, padding=1, bias=bias),
                *(conv(channels, channels, 3, padding=1, bias=bias) for _ in range(inner)),
                conv(channels, 1, 1, bias=bias),
            ]
        )

    def forward(self, r: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return directions for residuals; differentiable.

        Parameters
        ----------
        r : Tensor
            ``(..., *grid)``, float32 or float64; computed in the dtype of the weights.
        mask : Tensor, optional
            ``(*grid)``: nonzero on fluid cells. r is not read elsewhere, and the result is zero there. Odd sizes are
            padded by one cell outside of the mask.

        Returns
        -------
        Tensor
            Of the shape and dtype of r.

        Raises
        ------
        TypeError
            r is no tensor of these dtypes.
        ValueError
            r has too few dimensions or does not fit the mask.
        """
        check_tensor(r, "DirectionNet", "r")
        check_float(r, "DirectionNet", "r")
        grid = tuple(r.shape[-self.dim :])
        if len(grid) < self.dim or (mask is not None and tuple(mask.shape) != grid):
            expected = f"(..., {', '.join(map(str, mask.shape))})" if mask is not None else f"at least {self.dim} sizes"
            raise ValueError(
                f"DirectionNet: r: expected shape {expected} for this {self.dim}-D network, got {tuple(r.shape)}"
            )
        inside = None if mask is None else mask != 0
        u = r.reshape(-1, 1, *grid).to(next(self.parameters()).dtype)
        u = u if inside is None else torch.where(inside, u, torch.zeros_like(u))
        q = self._network(functional.pad(u, [side for n in reversed(grid) for side in (0, n % 2)]))
        for axis, n in enumerate(grid, start=2):
            q = q.narrow(axis, 0, n)
        q = q if inside is None else torch.where(inside, q, torch.zeros_like(q))
        return q.reshape(r.shape).to(r.dtype)

    def _network(self, u: Tensor) -> Tensor:
        pool = functional.avg_pool2d if self.dim == 2 else functional.avg_pool3d
        layers = iter(self.convolutions)

        def pairs(u: Tensor, count: int) -> Tensor:
            for _ in range(count):
                v = functional.relu(next(layers)(u))
                u = u + functional.relu(next(layers)(v))
            return u

        pre, mid, post = self.counts
        u = next(layers)(u)
        u = pairs(functional.relu(next(layers)(u)), pre)
        fine = functional.relu(next(layers)(u))
        coarse = pairs(pool(fine, 2), mid)
        u = pairs(functional.interpolate(coarse, scale_factor=2, mode="nearest") + fine, post)
        q: Tensor = next(layers)(u)
        return q

    def bind(self, grid: PoissonGrid, precision: str = "float32") -> DirectionMap:
        """Return the network on one grid, for many applications: native inference with the weights as they are now.

        Parameters
        ----------
        grid : PoissonGrid
            Of this network's dimension, on the weights' device.
        precision : {"float32", "bfloat16", "tf32"}
            Of the inference; the last on CUDA only, elsewhere float32.

        Raises
        ------
        TypeError
            grid is no PoissonGrid.
        ValueError
            Another dimension, or an unknown precision.
        """
        check_bound("DirectionNet", self.dim, grid)
        if precision not in PRECISIONS:
            raise ValueError(f"DirectionNet.bind: precision: expected one of {PRECISIONS}, got {precision!r}")
        apply: Callable[[Tensor], Tensor]
        if self.channels % 4 == 0:
            apply = PackedNet(self, grid.mask, precision=precision)
        else:  # the native code has no kernels for these
            copy = DirectionNet(self.dim, self.variant, self.channels, self.bias).to(grid.device)
            copy.load_state_dict(self.state_dict())
            apply = partial(copy, mask=grid.mask)
        return DirectionMap(grid, apply, f"{self!r}, {precision}")

    def __repr__(self) -> str:
        return (
            f"DirectionNet({self.dim}-D, '{self.variant}', {self.channels} channels, {'' if self.bias else 'no '}bias)"
        )


def check_bound(name: str, dim: int, grid: object) -> None:
    """Raise unless `grid` is a PoissonGrid of dimension `dim`."""
    if not isinstance(grid, PoissonGrid):
        raise TypeError(f"{name}.bind: grid: expected a PoissonGrid, got {type(grid).__name__}; wrap the flags in one")
    if len(grid.grid) != dim:
        raise ValueError(
            f"{name}.bind: grid: expected {dim} dimensions, got the grid {grid.grid}; make the network with "
            f"dim={len(grid.grid)}"
        )


__all__ = ["COUNTS", "DirectionMap", "DirectionNet", "check_bound"]
