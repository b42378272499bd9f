"""The network of variable stencils: linear, masked, as the paper draws it, and its own backward against autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kantor.datasets import poisson_scenes
from kantor.linalg import PoissonGrid, VariableStencilNet
from kantor.linalg.poisson_grid import AIR, FLUID, SOLID
from kantor.linalg.variable_stencil_net import variable_stencil
from systems import F32, F64, random

GRIDS = {2: (16, 24), 3: (8, 12, 8)}
ODD = {2: (13, 7), 3: (7, 5, 6)}


def network(dim: int, levels: int = 2) -> VariableStencilNet:
    torch.manual_seed(0)
    net = VariableStencilNet(dim, levels)
    with torch.no_grad():
        for parameter in net.parameters():  # far from the initial copy
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def scene(grid: tuple[int, ...]) -> PoissonGrid:
    return PoissonGrid(poisson_scenes.smoke_sphere(grid))


def by_unfolding(stencil: Tensor, x: Tensor) -> Tensor:
    """Every cell's neighbourhood laid out, then multiplied."""
    windows = functional.pad(x, [1, 1] * (x.ndim - 1))
    for axis in range(1, x.ndim):
        windows = windows.unfold(axis, 3, 1)
    neighbours = windows.reshape(*x.shape, -1)
    return (neighbours * stencil.movedim(0, -1)).sum(-1)


def plain(net: VariableStencilNet, r: Tensor, flags: Tensor) -> Tensor:
    """The paper's recursion on a grid whose sizes the levels divide."""
    pool = functional.avg_pool2d if net.dim == 2 else functional.avg_pool3d
    mode = "bilinear" if net.dim == 2 else "trilinear"
    images = [torch.stack([flags == kind for kind in (AIR, FLUID, SOLID)]).to(r.dtype)]
    for _ in range(net.levels):
        images.append(pool(images[-1], 2))

    def descend(level: int, x: Tensor) -> Tensor:
        x = by_unfolding(net.down[level](images[level]), x)
        if level == net.levels:
            return x
        coarse = descend(level + 1, pool(x[:, None], 2)[:, 0])
        finer = functional.interpolate(coarse[:, None], scale_factor=2, mode=mode)[:, 0]
        own, other = (net.scales[2 * level + k](images[level]).mean() for k in (0, 1))
        return own * x + other * by_unfolding(net.up[level](images[level]), finer)

    fluid = flags == FLUID
    return descend(0, r * fluid) * fluid


def test_parameter_count_of_the_paper() -> None:
    assert sum(p.numel() for p in VariableStencilNet(3, 4).parameters()) == 20_582


@pytest.mark.parametrize("dim", [2, 3])
def test_equals_the_recursion(dim: int) -> None:
    net, grid = network(dim).double(), scene(GRIDS[dim])
    r = random(3, *grid.grid)
    torch.testing.assert_close(net(r, grid.flags), plain(net, r, grid.flags))


@pytest.mark.parametrize("dim", [2, 3])
def test_stencils_and_their_derivatives(dim: int) -> None:
    grid = (4, 5) if dim == 2 else (3, 4, 2)
    stencil, x = random(3**dim, *grid).requires_grad_(), random(2, *grid, seed=1).requires_grad_()
    torch.testing.assert_close(variable_stencil(stencil, x), by_unfolding(stencil, x))
    assert torch.autograd.gradcheck(variable_stencil, (stencil, x))
    assert torch.autograd.gradcheck(lambda x: variable_stencil(stencil.detach(), x), (x,))
    assert torch.autograd.gradcheck(lambda s: variable_stencil(s, x.detach()), (stencil,))


@pytest.mark.parametrize("dim", [2, 3])
def test_linear_in_the_residual(dim: int) -> None:
    net, grid = network(dim).double(), scene(ODD[dim])
    r, s = random(*grid.grid), random(*grid.grid, seed=1)
    combined = net(2 * r - 3 * s, grid.flags)
    torch.testing.assert_close(combined, 2 * net(r, grid.flags) - 3 * net(s, grid.flags), rtol=1e-10, atol=1e-10)
    assert bool((net(torch.zeros_like(r), grid.flags) == 0).all())


@pytest.mark.parametrize("dim", [2, 3])
def test_only_the_fluid_is_read_and_written(dim: int) -> None:
    net, grid = network(dim), scene(ODD[dim])
    r = random(2, *grid.grid, dtype=F32)
    q = net(r, grid.flags)
    assert torch.equal(q, net(torch.where(grid.mask, r, torch.full_like(r, torch.nan)), grid.flags))
    assert bool((q[:, ~grid.mask] == 0).all())
    assert bool((q[:, grid.mask] != 0).any())


@pytest.mark.parametrize("dim", [2, 3])
def test_odd_sizes_are_padded_with_solid(dim: int) -> None:
    net, grid = network(dim).double(), scene(ODD[dim])
    padding = [side for n in reversed(grid.grid) for side in (0, -n % 4)]
    r = random(*grid.grid)
    padded = net(functional.pad(r, padding), functional.pad(grid.flags, padding, value=SOLID))
    torch.testing.assert_close(net(r, grid.flags), padded[tuple(slice(n) for n in grid.grid)])


def test_geometry_matters() -> None:
    net, r = network(2), random(16, 16, dtype=F32)
    flags = poisson_scenes.open_box((16, 16))
    closed = flags.clone()
    closed[-1] = SOLID
    assert not torch.allclose(net(r, flags), net(r, closed))


def test_translation_away_from_walls() -> None:
    """Of a residual moved by the coarsest level's cell, in fluid all around."""
    net = network(2, levels=2)
    r = torch.zeros(96, 96)
    r[44:52, 44:52] = random(8, 8, dtype=F32)
    flags = torch.full((96, 96), FLUID)
    torch.testing.assert_close(net(r.roll(4, 0), flags), net(r, flags).roll(4, 0))


@pytest.mark.parametrize("dim", [2, 3])
def test_bound_equals_forward_and_keeps_its_weights(dim: int) -> None:
    net, grid = network(dim), scene(ODD[dim])
    f = net.bind(grid)
    r = random(2, *grid.grid)
    expected = net(r, grid.flags).detach()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    q = f(r)
    assert q.dtype == F64
    torch.testing.assert_close(q, expected)
    assert torch.equal(f(r.flatten(1)), q.flatten(1))


def test_state_dict_and_repr() -> None:
    net, other = network(2), VariableStencilNet(2, 2)
    other.load_state_dict(net.state_dict())
    r, flags = random(8, 8, dtype=F32), poisson_scenes.open_box((8, 8))
    assert torch.equal(net(r, flags), other(r, flags))
    assert repr(net) == "VariableStencilNet(2-D, 2 levels)"
    assert repr(net.bind(PoissonGrid(flags))) == "DirectionMap(VariableStencilNet(2-D, 2 levels), grid 8 x 8)"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dim": 4}, "dim: expected 2 or 3"), ({"levels": 0}, "levels: expected a positive integer")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"VariableStencilNet: {message}"):
        VariableStencilNet(**options)


def test_errors() -> None:
    net, flags = network(2), poisson_scenes.open_box((16, 16))
    with pytest.raises(ValueError, match="VariableStencilNet.bind: grid: expected 2 dimensions"):
        net.bind(scene((8, 8, 8)))
    with pytest.raises(TypeError, match="expected a PoissonGrid"):
        net.bind(flags)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="flags: expected 2 dimensions"):
        net(torch.ones(8, 8, 8), poisson_scenes.open_box((8, 8, 8)))
    with pytest.raises(ValueError, match=r"r: expected shape \(..., 16, 16\)"):
        net(torch.ones(8, 8), flags)
    with pytest.raises(TypeError, match="float32 or float64"):
        net(torch.ones(16, 16, dtype=torch.int64), flags)
