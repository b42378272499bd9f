"""The scenes hold what they say, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor.datasets import poisson_scenes as scenes
from kantor.datasets.poisson_scenes import AIR, FLUID, SCENES, SOLID
from kantor.linalg import PoissonGrid

SHAPES = ((32, 32), (17, 24), (16, 16, 16), (14, 12, 17))


def fluid_components(flags: Tensor) -> int:
    """Number of connected components, by flooding."""
    left = {tuple(cell) for cell in (flags == FLUID).nonzero().tolist()}
    count = 0
    while left:
        count += 1
        front = [left.pop()]
        while front:
            cell = front.pop()
            for axis in range(flags.ndim):
                for step in (-1, 1):
                    other = (*cell[:axis], cell[axis] + step, *cell[axis + 1 :])
                    if other in left:
                        left.remove(other)
                        front.append(other)
    return count


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCENES)
def test_flags_are_flags_and_repeat(name: str, shape: tuple[int, ...]) -> None:
    flags = SCENES[name](shape)
    assert flags.dtype == torch.uint8
    assert tuple(flags.shape) == shape
    assert set(flags.unique().tolist()) <= {SOLID, FLUID, AIR}
    assert bool((flags == FLUID).any())
    assert torch.equal(flags, SCENES[name](list(shape)))
    assert PoissonGrid(flags).closed_components[1] == (1 if name == "pools" else 0)


def test_box_dirichlet_has_the_eigenvalues_of_the_sines() -> None:
    A = PoissonGrid(scenes.box_dirichlet((8, 7)))
    angles = [np.pi * np.arange(1, n - 1) / (n - 1) for n in (8, 7)]
    expected = 4 - 2 * np.cos(angles[0])[:, None] - 2 * np.cos(angles[1])
    found = np.linalg.eigvalsh(A.to_csr().dense().numpy())
    np.testing.assert_allclose(found, np.sort(expected.ravel()), rtol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (32, 32, 32), (64, 32)])
def test_the_sphere_is_round_and_in_the_middle(shape: tuple[int, ...]) -> None:
    flags = scenes.smoke_sphere(shape)
    solid = (flags == SOLID).nonzero().double()
    middle = torch.tensor(shape, dtype=torch.float64) / 2 - 0.5
    assert torch.allclose(solid.mean(0), middle)
    extents = solid.max(0).values - solid.min(0).values
    assert float(extents.max() - extents.min()) == 0
    assert abs(float(extents[0]) + 1 - 0.3 * min(shape)) <= 2
    assert bool((flags[-1] == AIR).all())
    assert not bool((flags[:-1] == AIR).any())


@pytest.mark.parametrize("scene", [scenes.smoke_balls, scenes.tank, scenes.labyrinth, scenes.droplets])
def test_seeds_give_different_scenes(scene: object) -> None:
    assert callable(scene)
    first, again, other = scene((32, 32), 1), scene((32, 32), seed=1), scene((32, 32), 2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_ball_moves_and_comes_back() -> None:
    start, later, back = (scenes.moving_ball((32, 32), t) for t in (0.0, 0.3, 1.0))
    assert torch.equal(start, back)
    assert not torch.equal(start, later)


@pytest.mark.parametrize("shape", [(21, 21), (24, 18), (9, 10, 11)])
@pytest.mark.parametrize("width", [1, 3])
def test_a_labyrinth_is_a_tree_of_corridors_with_one_opening(shape: tuple[int, ...], width: int) -> None:
    flags = scenes.labyrinth(shape, 3, width)
    assert fluid_components(flags) == 1
    assert int((flags == AIR).sum()) == width ** (len(shape) - 1)
    rooms = [(n - 1) // (width + 1) for n in shape]
    doors = int(np.prod(rooms)) - 1  # of a tree
    cells = int(np.prod(rooms)) * width ** len(shape) + doors * width ** (len(shape) - 1)
    assert int((flags == FLUID).sum()) == cells
    assert bool((flags[0] == SOLID).all())


def test_baffles_leave_one_winding_way() -> None:
    flags = scenes.baffles((48, 32), 5)
    walls = [row for row in range(48) if bool((flags[row] == SOLID).any())]
    assert len(walls) == 5
    for k, row in enumerate(walls):
        opening = (flags[row] != SOLID).nonzero().squeeze(1).tolist()
        assert opening == (list(range(28, 32)) if k % 2 == 0 else list(range(4)))
    assert fluid_components(flags) == 1


def test_pools_are_two_and_droplets_many() -> None:
    assert fluid_components(scenes.pools((20, 20))) == 2
    assert fluid_components(scenes.droplets((64, 64))) > 10


@pytest.mark.parametrize("shape", [(32,), (4, 4, 4, 4), (2, 32), (32.0, 32), ()])
@pytest.mark.parametrize("name", SCENES)
def test_bad_shapes(name: str, shape: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=f"{name}: shape: expected 2 or 3 integers"):
        SCENES[name](shape)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="labyrinth: width"):
        scenes.labyrinth((16, 16), width=0)
    with pytest.raises(ValueError, match="baffles: count"):
        scenes.baffles((16, 16), count=0)
    with pytest.raises(ValueError, match="droplets: count"):
        scenes.droplets((16, 16), count=-1)
    with pytest.raises(ValueError, match="moving_ball: t"):
        scenes.moving_ball((16, 16), float("nan"))
