"""Voxel scenes for pressure Poisson problems: boxes, smoke around obstacles, water with free surfaces, mazes.

Every function takes the shape of a grid, ``(ny, nx)`` or ``(nz, ny, nx)``, and returns its flags: SOLID = 0, FLUID = 2,
AIR = 3, what :class:`kantor.linalg.PoissonGrid` takes. Axis 0 points up. Positions are relative: the centre of cell i
of n is ``(i + 1/2) / n``; lengths are relative to the shortest side, so that balls are round in any grid.

The first five are those of the measurements of deep conjugate directions; the others have what hierarchies and networks
that learned on the first ones have not seen: moving solids, walls one cell thick, many separate bodies of water, fluid
that touches no air.

Examples
--------
>>> from kantor.datasets import poisson_scenes
>>> poisson_scenes.open_box((4, 6))
tensor([[2, 2, 2, 2, 2, 2],
        [2, 2, 2, 2, 2, 2],
        [2, 2, 2, 2, 2, 2],
        [3, 3, 3, 3, 3, 3]], dtype=torch.uint8)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SOLID, FLUID, AIR = 0, 2, 3


def _grid(name: str, shape: Sequence[int], smallest: int = 4) -> tuple[int, ...]:
    grid = tuple(shape)
    if len(grid) not in (2, 3) or not all(isinstance(n, int) for n in grid) or min(grid) < smallest:
        raise ValueError(
            f"{name}: shape: expected 2 or 3 integers of at least {smallest}, got {shape!r}; a smaller scene has no "
            "room for what is in it"
        )
    return grid


def _centres(grid: tuple[int, ...]) -> list[Tensor]:
    """Relative positions of the cells' centres along each axis, ready to broadcast."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid]
    return [g.reshape([-1 if a == axis else 1 for a in range(len(grid))]) for axis, g in enumerate(axes)]


def _ball(grid: tuple[int, ...], centre: Sequence[float], radius: float) -> Tensor:
    """Whether the centre of each cell is in the ball."""
    distances = ((g - c) * (n / min(grid)) for g, c, n in zip(_centres(grid), centre, grid, strict=True))
    squared = sum((d.square() for d in distances), torch.zeros(()))
    return squared < radius**2


def _full(grid: tuple[int, ...], value: int) -> Tensor:
    return torch.full(grid, value, dtype=torch.uint8)


# --- the scenes of the measurements ---


def box_dirichlet(shape: Sequence[int]) -> Tensor:
    """Fluid with a layer of air, one cell thick, all around: eigenvectors are products of sines.

    Parameters
    ----------
    shape : sequence of int
        ``(ny, nx)`` or ``(nz, ny, nx)``, each at least 4.

    Returns
    -------
    Tensor
        Flags, uint8.

    Raises
    ------
    ValueError
        Not 2 or 3 sizes, or one too small.
    """
    grid = _grid("box_dirichlet", shape)
    flags = _full(grid, AIR)
    flags[tuple(slice(1, -1) for _ in grid)] = FLUID
    return flags


def open_box(shape: Sequence[int]) -> Tensor:
    """Fluid between walls, open above: the last layer of axis 0 is air. Arguments as for :func:`box_dirichlet`."""
    flags = _full(_grid("open_box", shape), FLUID)
    flags[-1] = AIR
    return flags


def smoke_sphere(shape: Sequence[int]) -> Tensor:
    """:func:`open_box` with a solid ball of radius 0.15 in the middle."""
    return _with_ball("smoke_sphere", shape, [0.5] * len(tuple(shape)), 0.15)


def smoke_balls(shape: Sequence[int], seed: int = 0) -> Tensor:
    """:func:`open_box` with six solid balls, centres in (0.15, 0.85), radii in (0.05, 0.12), of the seed's choice."""
    grid = _grid("smoke_balls", shape)
    generator = np.random.default_rng(seed)
    flags = open_box(grid)
    for _ in range(6):
        centre = generator.uniform(0.15, 0.85, len(grid))
        flags[_ball(grid, centre.tolist(), generator.uniform(0.05, 0.12))] = SOLID
    return flags


def tank(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Water with a wavy surface: air where ``g0 > 0.55 + 0.15 sin(3 pi g1 + phase)``; the phase is 1 for seed 0."""
    grid = _grid("tank", shape)
    phase = 1.0 if seed == 0 else np.random.default_rng(seed).uniform(0, 2 * math.pi)
    g = _centres(grid)
    air = (g[0] > 0.55 + 0.15 * torch.sin(3 * math.pi * g[1] + phase)).expand(grid)
    return torch.where(air, _full(grid, AIR), _full(grid, FLUID))


# --- scenes that nothing was trained on ---


def dam(shape: Sequence[int]) -> Tensor:
    """A breaking dam: a column of water, a film of it on the floor as far as a solid block, air elsewhere."""
    grid = _grid("dam", shape, 8)
    up, along = _centres(grid)[0], _centres(grid)[-1]
    water = ((up < 0.75) & (along < 0.45)) | ((up < 0.12) & (along < 0.7)).expand(grid)
    block = ((up < 0.3) & ((along - 0.65).abs() < 0.07)).expand(grid)
    flags = torch.where(water.expand(grid), _full(grid, FLUID), _full(grid, AIR))
    flags[block] = SOLID
    return flags


def moving_ball(shape: Sequence[int], t: float = 0.0) -> Tensor:
    """:func:`open_box` with a solid ball of radius 0.15 that goes round the middle once while t goes from 0 to 1."""
    if not (isinstance(t, int | float) and math.isfinite(t)):
        raise ValueError(f"moving_ball: t: expected a finite number, got {t!r}")
    centre = [0.5] * len(tuple(shape))
    if len(centre) > 1:
        centre[0] += 0.25 * math.sin(2 * math.pi * t)
        centre[-1] += 0.25 * math.cos(2 * math.pi * t)
    return _with_ball("moving_ball", shape, centre, 0.15)


def labyrinth(shape: Sequence[int], seed: int = 0, width: int = 1) -> Tensor:
    """A maze: corridors `width` cells wide, walls one cell thick, exactly one way between any two places, one opening.

    Parameters
    ----------
    shape : sequence of int
        ``(ny, nx)`` or ``(nz, ny, nx)``, each at least ``width + 2``.
    seed : int
        Of the walls.
    width : int
        Width of the corridors in cells. Cells that are left over where ``width + 1`` does not divide the size less one
        are solid.

    Returns
    -------
    Tensor
        Flags, uint8. The opening, air, is in the wall above the first room of the topmost layer.

    Raises
    ------
    ValueError
        Not 2 or 3 sizes, or one too small; width below 1.
    """
    if not (isinstance(width, int) and width >= 1):
        raise ValueError(f"labyrinth: width: expected an integer of at least 1, got {width!r}")
    grid = _grid("labyrinth", shape, width + 2)
    pitch = width + 1
    rooms = tuple((n - 1) // pitch for n in grid)
    flags = _full(grid, SOLID)
    spans = [[slice(1 + k * pitch, 1 + k * pitch + width) for k in range(count)] for count in rooms]
    for room in np.ndindex(*rooms):
        flags[tuple(spans[axis][k] for axis, k in enumerate(room))] = FLUID
    for room, axis in _spanning_tree(rooms, np.random.default_rng(seed)):
        door = [spans[a][k] for a, k in enumerate(room)]
        door[axis] = slice(door[axis].stop, door[axis].stop + 1)
        flags[tuple(door)] = FLUID
    mouth = [spans[a][0] for a in range(len(grid))]
    mouth[0] = slice(rooms[0] * pitch, rooms[0] * pitch + 1)
    flags[tuple(mouth)] = AIR
    return flags


def _spanning_tree(rooms: tuple[int, ...], generator: np.random.Generator) -> list[tuple[tuple[int, ...], int]]:
    """Doors of a maze, as (room, axis to the next room): Kruskal's algorithm with doors in random order."""
    index = np.arange(math.prod(rooms)).reshape(rooms)
    pairs = []
    for axis, count in enumerate(rooms):
        here, there = (index.take(range(first, first + count - 1), axis).ravel() for first in (0, 1))
        pairs.append(np.stack([here, there, np.full_like(here, axis)], 1))
    parent = list(range(index.size))

    def root(room: int) -> int:
        while parent[room] != room:
            parent[room] = parent[parent[room]]
            room = parent[room]
        return room

    tree = []
    for here, there, axis in generator.permutation(np.concatenate(pairs)).tolist():
        one, other = root(here), root(there)
        if one != other:
            parent[one] = other
            tree.append((tuple(int(k) for k in np.unravel_index(here, rooms)), axis))
    return tree


def baffles(shape: Sequence[int], count: int = 5) -> Tensor:
    """:func:`open_box` divided into a winding channel by walls one cell thick, open in turn on the right and the left.

    Parameters
    ----------
    shape : sequence of int
        ``(ny, nx)`` or ``(nz, ny, nx)``, each at least ``2 (count + 1)``.
    count : int
        Number of walls, evenly spread along axis 0; each leaves an eighth of the last axis, or one cell, open.

    Raises
    ------
    ValueError
        Not 2 or 3 sizes, or one too small; count below 1.
    """
    if not (isinstance(count, int) and count >= 1):
        raise ValueError(f"baffles: count: expected an integer of at least 1, got {count!r}")
    grid = _grid("baffles", shape, 2 * (count + 1))
    flags = open_box(grid)
    gap = max(1, grid[-1] // 8)
    for k in range(count):
        closed = slice(None, -gap) if k % 2 == 0 else slice(gap, None)
        flags[round((k + 1) * grid[0] / (count + 1)), ..., closed] = SOLID
    return flags


def droplets(shape: Sequence[int], seed: int = 0, count: int = 60) -> Tensor:
    """Balls of water in air, radii in (0.01, 0.06), at least one cell each; some overlap.

    Parameters
    ----------
    shape : sequence of int
        ``(ny, nx)`` or ``(nz, ny, nx)``, each at least 4.
    seed : int
        Of centres and radii.
    count : int
        Number of balls.

    Raises
    ------
    ValueError
        Not 2 or 3 sizes, or one too small; count below 1.
    """
    if not (isinstance(count, int) and count >= 1):
        raise ValueError(f"droplets: count: expected an integer of at least 1, got {count!r}")
    grid = _grid("droplets", shape)
    generator = np.random.default_rng(seed)
    flags = _full(grid, AIR)
    for _ in range(count):
        centre = generator.uniform(0.0, 1.0, len(grid))
        flags[_ball(grid, centre.tolist(), generator.uniform(0.01, 0.06))] = FLUID
        flags[tuple(int(c * n) for c, n in zip(centre, grid, strict=True))] = FLUID
    return flags


def pools(shape: Sequence[int]) -> Tensor:
    """Two pools with a wall between: one open above, one full to the lid.

    No air touches the second: its pressure is known up to a constant, and right-hand sides must sum to zero over it.
    """
    grid = _grid("pools", shape)
    flags = _full(grid, FLUID)
    middle = grid[-1] // 2
    flags[(2 * grid[0] + 2) // 3 :, ..., :middle] = AIR
    flags[..., middle] = SOLID
    return flags


def _with_ball(name: str, shape: Sequence[int], centre: Sequence[float], radius: float) -> Tensor:
    grid = _grid(name, shape)
    flags = open_box(grid)
    flags[_ball(grid, centre, radius)] = SOLID
    return flags


SCENES: dict[str, Callable[[Sequence[int]], Tensor]] = {
    scene.__name__: scene
    for scene in (
        box_dirichlet,
        open_box,
        smoke_sphere,
        smoke_balls,
        tank,
        dam,
        moving_ball,
        labyrinth,
        baffles,
        droplets,
        pools,
    )
}
"""All of them by name, with the arguments beside the shape at their defaults."""

__all__ = ["AIR", "FLUID", "SCENES", "SOLID", *SCENES]
