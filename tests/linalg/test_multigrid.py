"""Multigrid: symmetry and spectra against dense matrices, iteration counts on scenes of every kind, and all uses."""

from __future__ import annotations

import copy
import itertools
import pickle
import resource
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch
from torch import Tensor, func
from torch.library import opcheck

from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import Multigrid, PoissonGrid, Stencil, capped_cg, cg, dcdm, fcg
from op_checks import threads
from systems import F32, F64, error, random, solve

SOLID, FLUID, AIR = 0, 2, 3
NAMES = list(scenes.SCENES)


# --- scenes that a hierarchy has trouble with ---


def full(shape: Sequence[int]) -> Tensor:
    """Fluid between walls on all sides: closed."""
    return torch.full(tuple(shape), FLUID, dtype=torch.uint8)


def opened(shape: Sequence[int]) -> Tensor:
    """Fluid with a last layer of air, also where there is room for one cell only."""
    flags = full(shape)
    flags[-1] = AIR
    return flags


def spiral(n: int, width: int) -> Tensor:
    """One corridor around and around, walls one cell thick, air at its outer end."""
    flags = torch.zeros(n, n, dtype=torch.uint8)
    first, last, pitch = 0, n, width + 1
    while last - first > 2 * pitch:
        flags[first : first + width, first:last] = FLUID
        flags[first:last, last - width : last] = FLUID
        flags[last - width : last, first:last] = FLUID
        flags[first + pitch : last, first : first + width] = FLUID
        flags[first + pitch : first + pitch + width, first : first + pitch + width] = FLUID
        first, last = first + pitch, last - pitch
    flags[0, 0] = AIR
    return flags


def rings(n: int, width: int) -> Tensor:
    """Concentric square walls, one cell thick, a gap in each, on alternate sides."""
    flags = full((n, n))
    for k, r in enumerate(range(width, n // 2 - 1, width + 1)):
        for wall in (
            (r, slice(r, n - r)),
            (n - 1 - r, slice(r, n - r)),
            (slice(r, n - r), r),
            (slice(r, n - r), -1 - r),
        ):
            flags[wall] = SOLID
        if k % 2:
            flags[r, r + 1 : r + 1 + max(1, width // 2)] = FLUID
        else:
            flags[n - 1 - r, n - 2 - r : n - 1 - r] = FLUID
    flags[0, 0] = AIR
    return flags


def comb(shape: Sequence[int], period: int) -> Tensor:
    """Teeth one cell thick from below, deep slots between, open above."""
    flags = opened(shape)
    flags[:-3, ..., period - 1 :: period] = SOLID
    return flags


def checkers(shape: Sequence[int], edge: int) -> Tensor:
    """Solid and fluid blocks by turns: from two cells on they touch at corners only, and are closed."""
    index = torch.from_numpy(np.indices(tuple(shape)) // edge)
    flags = torch.where(index.sum(0) % 2 == 1, SOLID, FLUID).to(torch.uint8)
    flags[-1] = AIR
    return flags


def stairs(shape: Sequence[int]) -> Tensor:
    """A slope of steps."""
    index = np.indices(tuple(shape))
    flags = opened(shape)
    flags[torch.from_numpy(index[0] / shape[0] < 0.7 * index[-1] / shape[-1])] = SOLID
    flags[-1] = AIR
    return flags


def diagonal_walls(shape: Sequence[int], period: int, holes: bool) -> Tensor:
    """Diagonal walls one cell thick, which are tight although their cells touch at corners only; or with holes."""
    index = np.indices(tuple(shape))
    wall = torch.from_numpy((index[0] + index[-1]) % period == 0)
    if holes:
        wall[..., ::17] = False
    flags = opened(shape)
    flags[wall] = SOLID
    flags[-1] = AIR
    return flags


def rooms(shape: Sequence[int], width: int, seed: int = 0) -> Tensor:
    """Rooms in rows, a door one cell wide in six walls out of ten; some are closed."""
    generator = np.random.default_rng(seed)
    flags = full(shape)
    for axis in range(len(shape)):
        flags[tuple(slice(width, None, width + 1) if a == axis else slice(None) for a in range(len(shape)))] = SOLID
    for axis in range(len(shape)):
        for room in itertools.product(*[range(n // (width + 1)) for n in shape]):
            door = [k * (width + 1) + int(generator.integers(width)) for k in room]
            door[axis] = room[axis] * (width + 1) + width
            if generator.random() < 0.6 and door[axis] < shape[axis] - 1:
                flags[tuple(door)] = FLUID
    flags[-1] = AIR
    return flags


def porous(shape: Sequence[int], share: float, seed: int = 0) -> Tensor:
    """Solid cells at random."""
    draws = np.random.default_rng(seed).random(tuple(shape))
    flags = torch.from_numpy(np.where(draws < share, SOLID, FLUID).astype(np.uint8))
    flags[-1] = AIR
    flags.view(-1)[0] = FLUID
    return flags


def plates(shape: Sequence[int], count: int = 12, seed: int = 0) -> Tensor:
    """Plates half as large as the box and one cell thick, anywhere, along any axis."""
    generator = np.random.default_rng(seed)
    flags = opened(shape)
    for _ in range(count):
        axis = int(generator.integers(len(shape)))
        first = [int(generator.integers(max(1, n // 2))) for n in shape]
        cut = [slice(k, k + n // 2) for k, n in zip(first, shape, strict=True)]
        at = int(generator.integers(1, shape[axis] - 1))
        cut[axis] = slice(at, at + 1)
        flags[tuple(cut)] = SOLID
    return flags


def mixed(shape: Sequence[int], solid: float, air: float, seed: int = 0) -> Tensor:
    """Solid and air at random."""
    draws = np.random.default_rng(seed).random(tuple(shape))
    flags = np.where(draws < solid, SOLID, np.where(draws < solid + air, AIR, FLUID)).astype(np.uint8)
    flags.flat[0] = FLUID
    return torch.from_numpy(flags)


HARD_2D: dict[str, Callable[[int], Tensor]] = {
    **{f"spiral {w}": lambda n, w=w: spiral(n, w) for w in (1, 3, 8)},
    **{f"rings {w}": lambda n, w=w: rings(n, w) for w in (1, 3, 8)},
}
HARD: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    **{f"maze {w}": lambda shape, w=w: scenes.labyrinth(shape, 1, w) for w in (1, 3, 5, 8)},
    "baffles 3": lambda shape: scenes.baffles(shape, 3),
    "baffles 11": lambda shape: scenes.baffles(shape, 11),
    **{f"comb {p}": lambda shape, p=p: comb(shape, p) for p in (2, 3, 4, 7)},
    **{f"checkers {e}": lambda shape, e=e: checkers(shape, e) for e in (1, 2, 3, 5)},
    "stairs": stairs,
    "closed": full,
    **{f"diagonals {p}": lambda shape, p=p: diagonal_walls(shape, p, False) for p in (3, 8, 20)},
    **{f"diagonals with holes {p}": lambda shape, p=p: diagonal_walls(shape, p, True) for p in (3, 5, 8, 20)},
    **{f"rooms {w}": lambda shape, w=w: rooms(shape, w) for w in (1, 2, 3, 5, 8)},
    **{f"porous {s}": lambda shape, s=s: porous(shape, s) for s in (0.1, 0.2, 0.3, 0.38, 0.42, 0.5, 0.65)},
    **{f"plates {s}": lambda shape, s=s: plates(shape, seed=s) for s in (0, 1, 2)},
    **{f"mixed {s}": lambda shape, s=s: mixed(shape, s, 0.05) for s in (0.05, 0.15, 0.25)},
}


def right_hand_side(A: PoissonGrid, *lead: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """White noise in the range of A: the mean of every closed component is taken off."""
    b = random(*lead, *A.grid, seed=seed) * A.mask
    labels, count = A.closed_components
    index = labels.flatten().long() + 1
    sizes = torch.bincount(index, minlength=count + 1).to(F64)
    sums = torch.zeros(*lead, count + 1, dtype=F64).index_add(-1, index, b.flatten(len(lead)))
    means = sums / sizes.clamp_min(1)
    means[..., 0] = 0
    return ((b.flatten(len(lead)) - means[..., index]).reshape(b.shape) * A.mask).to(dtype)


def iterations(flags: Tensor, **options: Any) -> int:
    """Of cg to 1e-6; the residual is as promised."""
    A = PoissonGrid(flags)
    b = right_hand_side(A)
    result = cg(A, b, M=Multigrid(A, **options), rtol=1e-6, maxiter=500)
    assert result.converged, (result.status, Multigrid(A, **options).levels)
    assert (A.matvec(result.x) - b).norm() <= 1.001e-6 * b.norm()
    return result.iterations


def coefficients(shape: Sequence[int], seed: int = 0, spread: float = 1.0) -> list[Tensor]:
    """Independent, uniform between 1/2 and 1/2 + spread."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.rand([n + (a == axis) for a, n in enumerate(shape)], generator=generator, dtype=F64) * spread + 0.5
        for axis in range(len(shape))
    ]


def faces_of(k: Tensor) -> list[Tensor]:
    """Harmonic means of the coefficients of cells."""
    faces = []
    for axis, n in enumerate(k.shape):
        wide = torch.cat([k.narrow(axis, 0, 1), k, k.narrow(axis, n - 1, 1)], axis)
        before, after = wide.narrow(axis, 0, n + 1), wide.narrow(axis, 1, n + 1)
        faces.append(2 * before * after / (before + after))
    return faces


# --- symmetric and positive definite ---


def spectrum(A: PoissonGrid, M: Multigrid) -> tuple[float, float, float]:
    """How far M is from symmetric; smallest and largest eigenvalue of M A on the range of A."""
    mask = A.mask.flatten()
    dense = M.dense()
    assert not dense[~mask].any()
    assert not dense[:, ~mask].any()
    dense = dense[mask][:, mask]
    values, vectors = torch.linalg.eigh(A.to_csr().dense())
    keep = values > 1e-10 * values[-1]
    root = vectors[:, keep] * values[keep].sqrt()
    found = torch.linalg.eigvalsh(root.T @ dense @ root)
    return error(dense.T, dense), float(found[0]), float(found[-1])


OPTIONS: dict[str, dict[str, Any]] = {
    "rbgs": {},
    "two sweeps": {"sweeps": 2},
    "jacobi": {"smoother": "jacobi"},
    "no walls": {"walls": False},
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("form", ["voxels", "faces"])
def test_spectra_on_small_scenes(form: str, options: str) -> None:
    """Symmetric to 1e-10, and eigenvalues of M A in (0, 2), on all the scenes of 16^2."""
    for name, scene in scenes.SCENES.items():
        flags = scene((16, 16))
        A = PoissonGrid(flags, face_coef=None if form == "voxels" else coefficients((16, 16)))
        asymmetry, smallest, largest = spectrum(A, Multigrid(A, precision=F64, **OPTIONS[options]))
        assert asymmetry < 1e-10, name
        assert smallest > (0.05 if options != "no walls" else 0.0), (name, smallest)
        assert largest < (2.0 if options != "no walls" else 2.5), (name, largest)


@pytest.mark.parametrize("options", list(OPTIONS))
def test_definite_whatever_the_walls(options: str) -> None:
    """Never indefinite; what is above 2 here and there costs an iteration or two."""
    for name, scene in HARD.items():
        for shape in ((16, 16), (23, 19), (8, 8, 9)):
            if name in ("baffles 11", "maze 8") and (name, shape) != ("maze 8", (16, 16)):  # no room
                continue
            A = PoissonGrid(scene(shape))
            asymmetry, smallest, largest = spectrum(A, Multigrid(A, precision=F64, **OPTIONS[options]))
            assert asymmetry < 1e-10, (name, shape)
            assert smallest > (0.02 if options != "no walls" else 0.0), (name, shape, smallest)
            assert largest < 4.0, (name, shape, largest)


def test_definite_in_mazes_with_graphs_of_many_levels() -> None:
    """Cycles that visit a level twice are only as definite as what they end in."""
    for width, n, seed in ((2, 32, 0), (2, 32, 1), (2, 40, 2), (3, 36, 0), (4, 48, 2), (5, 40, 0)):
        A = PoissonGrid(scenes.labyrinth((n, n), seed, width))
        _, smallest, largest = spectrum(A, Multigrid(A, precision=F64))
        assert smallest > 0.1, (width, n, seed, smallest)
        assert largest < 2.0, (width, n, seed, largest)


@pytest.mark.xfail(reason="rooms with doors of one cell: second visits make the cycle indefinite; cg goes on without")
def test_definite_in_rooms_of_three_dimensions() -> None:
    """Too large for dense matrices: the eigenvalue of M A that is largest in size, by power iteration."""
    for width, seed in ((6, 2), (3, 0)):
        A = PoissonGrid(rooms((64, 64, 64), width, seed))
        M = Multigrid(A, precision=F64)
        x = right_hand_side(A)
        for _ in range(20):
            y = A.matvec(x)
            z = M.matvec(y)
            eigenvalue = float((y * z).sum() / (x * y).sum())
            x = z / z.norm()
        assert 0 < eigenvalue < 3, (width, seed, eigenvalue)


def test_a_stencil_smoother() -> None:
    """The transposed stencil smooths after the correction: symmetric for any kernel; omega delta is damped Jacobi."""
    A = PoissonGrid(scenes.smoke_balls((17, 22)))
    delta = torch.zeros(1, 3, 3, dtype=F64)
    delta[0, 1, 1] = 0.7
    jacobi, stencil = (
        Multigrid(A, precision=F64, **options)
        for options in ({"smoother": "jacobi", "omega": 0.7}, {"smoother": "stencil", "stencils": delta})
    )
    r = right_hand_side(A)
    assert torch.equal(jacobi.matvec(r), stencil.matvec(r))
    skew = delta + 0.05 * random(3, 3, 3)
    M = Multigrid(A, smoother="stencil", stencils=skew, scales=[0.9, 1.1, 1.0], precision=F64)
    asymmetry, smallest, _ = spectrum(A, M)
    assert asymmetry < 1e-12
    assert smallest > 0
    cube = PoissonGrid(scenes.smoke_balls((9, 10, 11)))
    kernel = torch.zeros(2, 3, 3, 3, dtype=F64)
    kernel[:, 1, 1, 1] = 0.7
    kernel += 0.02 * random(2, 3, 3, 3)
    asymmetry, smallest, _ = spectrum(cube, Multigrid(cube, smoother="stencil", stencils=kernel, precision=F64))
    assert asymmetry < 1e-12
    assert smallest > 0


def test_a_stencil_smoother_against_plain_torch() -> None:
    """Two levels by hand: smooth, restrict, solve exactly, correct, smooth."""
    shape = (10, 12)  # 30 blocks: the next level is the last
    flags = scenes.open_box(shape)
    A = PoissonGrid(flags)
    k = 0.6 * torch.eye(3, dtype=F64) / 3 + 0.1 * random(3, 3).abs()
    M = Multigrid(A, smoother="stencil", stencils=k[None], precision=F64)
    assert [level["kind"] for level in M.levels] == ["grid", "exact"]
    D = A.diagonal().reshape(shape)
    root = torch.where(D > 0, D, torch.ones_like(D)).rsqrt() * A.mask

    def smooth(x: Tensor, b: Tensor, kernel: Tensor) -> Tensor:
        s = (root * (b - A.matvec(x)))[None, None]
        return x + root * torch.nn.functional.conv2d(s, kernel[None, None], padding=1)[0, 0]

    def prolongate(e: Tensor) -> Tensor:
        """A quarter of the difference to the partner across the block's border, along each axis, where linked."""
        u = e.repeat_interleave(2, 0).repeat_interleave(2, 1) * A.mask
        out = u.clone()
        for y, x in itertools.product(*map(range, shape)):
            for q in ((y - 1 if y % 2 == 0 else y + 1, x), (y, x - 1 if x % 2 == 0 else x + 1)):
                inside = 0 <= q[0] < shape[0] and 0 <= q[1] < shape[1]
                if inside and A.mask[y, x] and A.mask[q]:
                    out[y, x] += (u[q] - u[y, x]) / 4
        return out

    coarse_shape = (5, 6)
    units = torch.eye(30, dtype=F64).reshape(30, *coarse_shape)
    P = torch.stack([prolongate(e).flatten() for e in units], 1)
    # Rediscretised: links c' = sum c / 2; d' = d / 1.5: air one fine cell away, then one cell and a half.
    coarse = torch.zeros(30, 30, dtype=F64)
    index = torch.arange(30).reshape(coarse_shape)
    for y, x in itertools.product(*map(range, coarse_shape)):
        for q in ((y + 1, x), (y, x + 1)):
            if q[0] < 5 and q[1] < 6:
                width = 2 if q[0] > y or y < 4 else 1  # the last block has one row of fluid: half a link
                c = width / 2
                i, j = index[y, x], index[q]
                coarse[i, i] += c
                coarse[j, j] += c
                coarse[i, j] -= c
                coarse[j, i] -= c
        if y == 4:
            coarse[index[y, x], index[y, x]] += 2 / 1.5
    b = random(*shape) * A.mask
    x = smooth(torch.zeros(shape, dtype=F64), b, k)
    e = torch.linalg.solve(coarse, P.T @ (b - A.matvec(x)).flatten())
    x = smooth(x + (P @ e).reshape(shape), b, k.flip(0, 1))
    assert error(M.matvec(b), x) < 1e-12


# --- iteration counts ---


@pytest.mark.parametrize("name", NAMES)
def test_iterations_on_the_scenes(name: str) -> None:
    counts = [iterations(scenes.SCENES[name](shape)) for shape in ((64, 64), (256, 256), (32, 32, 32))]
    assert max(counts) <= 13, counts


@pytest.mark.parametrize("name", NAMES)
def test_iterations_do_not_grow(name: str) -> None:
    """At 64^3 as at 16^3."""
    small, large = (iterations(scenes.SCENES[name]((n, n, n))) for n in (16, 64))
    assert large <= max(1.5 * small, 12)


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.parametrize("name", list(HARD_2D))
def test_iterations_in_spirals(name: str, n: int) -> None:
    assert iterations(HARD_2D[name](n)) <= 16


# What is not solved: doors and pores of one cell in three dimensions, whose conductance a coarse grid underestimates.
NARROW = pytest.mark.xfail(reason="17 to 22 iterations at 32^3: openings of one cell in three dimensions")


def _marked(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=NARROW) if n in ("rooms 5", "rooms 8", "porous 0.65") else n for n in names]


@pytest.mark.parametrize("name", _marked(list(HARD)))
def test_iterations_on_hard_scenes(name: str) -> None:
    counts = {shape: iterations(HARD[name](shape)) for shape in ((64, 64), (128, 128), (256, 256), (32, 32, 32))}
    assert max(counts.values()) <= 16, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", _marked([*NAMES, *HARD]))
def test_iterations_on_large_grids(name: str, size: str) -> None:
    shapes = ((1024, 1024), (64, 64, 64), (128, 128, 128)) if size == "full" else ((40, 40, 40),)
    scene = scenes.SCENES.get(name) or HARD[name]
    counts = {shape: iterations(scene(shape)) for shape in shapes}
    assert max(counts.values()) <= 16, counts


def test_iterations_in_mazes_of_many_seeds() -> None:
    for seed, width in itertools.product(range(4), (1, 2, 3, 5, 6, 8, 9, 12)):
        for shape in ((192, 160), (33, 47, 40)):
            count = iterations(scenes.labyrinth(shape, seed, width))
            assert count <= 16, (seed, width, shape, count)


ODD_SHAPES = [
    (7, 200), (200, 7), (300, 3), (3, 300), (1, 1000), (1000, 1), (65, 65), (63, 63), (2, 333),
    (17, 17, 17), (33, 20, 7), (1, 1, 500), (500, 1, 1), (1, 500, 1), (2, 2, 500), (5, 300, 5), (1, 64, 64),
    (64, 1, 64), (64, 64, 1), (127, 3, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_iterations_on_odd_grids(shape: tuple[int, ...]) -> None:
    sides = full(shape)
    sides[..., -1] = AIR
    for flags in (full(shape), opened(shape), sides, porous(shape, 0.2) if shape[0] > 1 else full(shape)):
        if bool((flags == FLUID).any()):
            assert iterations(flags) <= 12


def test_tiny_grids() -> None:
    """Small enough to be solved exactly: one or two iterations."""
    for shape in (*itertools.product(range(1, 6), repeat=2), *itertools.product(range(1, 5), repeat=3)):
        for flags in (full(shape), opened(shape), mixed(shape, 0.2, 0.2), mixed(shape, 0.4, 0.0)):
            if bool((flags == FLUID).any()):
                assert iterations(flags) <= 2, shape


def test_more_sweeps_and_other_smoothers() -> None:
    flags = scenes.smoke_balls((128, 128))
    once, twice, jacobi = (iterations(flags, **o) for o in ({}, {"sweeps": 2}, {"smoother": "jacobi"}))
    assert twice < once < jacobi <= 20
    assert iterations(flags, smoother="jacobi", omega=0.6) <= 24


def test_walls_matter() -> None:
    """Levels that know walls one cell thick, and levels that do not."""
    for flags in (scenes.labyrinth((128, 128), 0, 3), scenes.baffles((128, 128), 11), spiral(128, 3)):
        A = PoissonGrid(flags)
        assert Multigrid(A).has_walls
        assert not Multigrid(A, walls=False).has_walls
        assert iterations(flags) <= 16
        assert iterations(flags, walls=False) > 30
    for name in ("open_box", "smoke_balls", "tank", "dam"):  # nothing thin: the same levels
        A = PoissonGrid(scenes.SCENES[name]((64, 64)))
        assert not Multigrid(A).has_walls
        r = right_hand_side(A)
        assert torch.equal(Multigrid(A).matvec(r), Multigrid(A, walls=False).matvec(r))


def test_levels() -> None:
    A = PoissonGrid(scenes.open_box((65, 40)))
    levels = Multigrid(A).levels
    assert [level["shape"] for level in levels] == [(65, 40), (33, 20), (17, 10), (9, 5)]
    assert [level["kind"] for level in levels] == ["grid", "grid", "grid", "exact"]
    assert "2600 > 660" in repr(Multigrid(A))
    assert "nodes" in repr(Multigrid(PoissonGrid(scenes.labyrinth((64, 64), 0, 3))))


# --- coefficients ---


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (32, 32, 32)], ids=str)
def test_iterations_with_coefficients(shape: tuple[int, ...]) -> None:
    flags = scenes.smoke_balls(shape)
    waves = torch.stack(torch.meshgrid(*[torch.linspace(0, 6, n, dtype=F64) for n in shape], indexing="ij")).sum(0)
    cases = {
        "ones": [torch.ones_like(c) for c in coefficients(shape)],
        "uniform": coefficients(shape),
        "smooth": faces_of(torch.exp(2 * torch.sin(waves))),
        "small": [1e-30 * c for c in coefficients(shape)],
        "large": [1e30 * c for c in coefficients(shape)],
        "a little anisotropic": [torch.full_like(c, 1.0 + axis) for axis, c in enumerate(coefficients(shape))],
    }
    counts = {}
    for name, c in cases.items():
        A = PoissonGrid(flags, face_coef=c)
        counts[name] = solve(A, right_hand_side(A), M=Multigrid(A), rtol=1e-6).iterations
    assert max(counts.values()) <= 16, counts
    maze = PoissonGrid(scenes.labyrinth(shape, 0, 3), face_coef=coefficients(shape))
    assert solve(maze, right_hand_side(maze), M=Multigrid(maze), rtol=1e-6).iterations <= 16


def test_coefficients_of_one_are_voxels() -> None:
    for flags in (scenes.smoke_balls((33, 28)), scenes.labyrinth((33, 28), 0, 2), scenes.tank((9, 8, 12))):
        A = PoissonGrid(flags, spacing=0.25)
        B = PoissonGrid(flags, spacing=0.25, face_coef=[torch.ones_like(c) for c in coefficients(flags.shape)])
        r = right_hand_side(A)
        assert error(Multigrid(B, precision=F64).matvec(r), Multigrid(A, precision=F64).matvec(r)) < 1e-13


@pytest.mark.parametrize(
    "jump",
    [1e3, pytest.param(1e6, marks=pytest.mark.xfail(reason="coefficients that jump by 1e6: no better than Jacobi"))],
)
def test_jumps_converge(jump: float) -> None:
    """No goal for the count: it beats Jacobi, and the result is right."""
    blocks = torch.from_numpy(np.where(np.random.default_rng(0).random((8, 8)) < 0.5, 1.0, jump))
    k = blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
    A = PoissonGrid(scenes.smoke_balls((64, 64)), face_coef=faces_of(k))
    b = right_hand_side(A)
    result, plain = (solve(A, b, M=M, rtol=1e-6, maxiter=20_000) for M in (Multigrid(A), "jacobi"))
    assert result.iterations < plain.iterations
    for factor in (10.0, 100.0):
        A = PoissonGrid(
            scenes.smoke_balls((64, 64)),
            face_coef=[torch.full_like(c, factor if axis else 1.0) for axis, c in enumerate(coefficients((64, 64)))],
        )
        result, plain = (solve(A, b * A.mask, M=M, rtol=1e-6) for M in (Multigrid(A), "jacobi"))
        assert result.iterations < plain.iterations


@pytest.mark.parametrize("size", [1e-45, 1e39, 1e-200, 1e200])
def test_coefficients_out_of_range_of_single_precision(size: float) -> None:
    """The cycle computes in float32 whatever the operator does."""
    flags = scenes.smoke_balls((32, 32))
    A = PoissonGrid(flags, face_coef=[size * c for c in coefficients((32, 32))])
    assert solve(A, right_hand_side(A), M=Multigrid(A), rtol=1e-6).iterations <= 12


@pytest.mark.parametrize("spacing", [1e-3, 1.0, 1e6])
def test_spacing(spacing: float) -> None:
    flags = scenes.smoke_balls((32, 32))
    A = PoissonGrid(flags, spacing=spacing)
    reference = PoissonGrid(flags)
    b = right_hand_side(A)
    result = solve(A, b, M=Multigrid(A), rtol=1e-6)
    expected = solve(reference, b, M=Multigrid(reference), rtol=1e-6)
    assert abs(result.iterations - expected.iterations) <= 1
    assert error(result.x / spacing**2, expected.x) < 1e-5
    assert error(Multigrid(A).matvec(b) / spacing**2, Multigrid(reference).matvec(b)) < 1e-6


def test_sizes_of_vectors() -> None:
    """Tiny and huge right-hand sides, also in a batch."""
    A = PoissonGrid(scenes.smoke_balls((32, 32)))
    M, b = Multigrid(A), right_hand_side(A)
    expected = solve(A, b, M=M, rtol=1e-6)
    for factor in (1e-30, 1e30, 1e-60, 1e60, 1e-150, 1e150):
        result = solve(A, factor * b, M=M, rtol=1e-6)
        assert result.iterations <= expected.iterations + 1, factor
        assert error(result.x / factor, expected.x) < 1e-5
    assert not solve(A, 0 * b, M=M).x.any()


# --- precision ---


def test_precisions() -> None:
    """Vectors and cycle in single and double precision: 2 x 2."""
    double = PoissonGrid(scenes.smoke_balls((64, 64)))
    b = right_hand_side(double)
    exact = spla.spsolve(double.to_csr().to_scipy().tocsc(), b[double.mask].numpy())
    for dtype, precision in itertools.product((F32, F64), (F32, F64)):
        A = double.to(dtype)
        M = Multigrid(A, precision=precision)
        z = M.matvec(b.to(dtype))
        assert z.dtype is dtype
        assert error(z, Multigrid(double, precision=F64).matvec(b)) < (1e-12 if dtype is precision is F64 else 1e-5)
        rtol = 1e-4 if dtype is F32 else 1e-10
        x = solve(A, b.to(dtype), M=M, rtol=rtol).x
        assert error(x[A.mask], torch.from_numpy(exact)) < (3e-2 if dtype is F32 else 1e-7)
    refined = solve(double, b, M=Multigrid(double), rtol=1e-10, storage=F32)
    assert error(refined.x[double.mask], torch.from_numpy(exact)) < 1e-7


def test_change_of_dtype() -> None:
    A = PoissonGrid(scenes.smoke_balls((20, 24)))
    M = Multigrid(A)
    single = M.to(F32)
    assert (single.dtype, single.A.dtype, M.dtype, M.A.dtype) == (F32, F32, F64, F64)
    r = right_hand_side(A)
    assert error(single.matvec(r.float()), M.matvec(r)) < 1e-6
    with pytest.raises(TypeError, match="float32"):
        M.matvec(r.float())
    with pytest.raises(TypeError, match="dtype"):
        cg(A.to(F32), r.float(), M=M)


# --- closed components, batches, other cells ---


@pytest.mark.parametrize("shape", [(64, 64), (20, 24, 22)], ids=str)
def test_closed_components(shape: tuple[int, ...]) -> None:
    for flags in (scenes.pools(shape), full(shape), rooms(shape, 3), porous(shape, 0.45), checkers(shape, 3)):
        A = PoissonGrid(flags)
        assert A.closed_components[1] > 0
        b = right_hand_side(A, 2)
        result = solve(A, b, M=Multigrid(A), rtol=1e-9)
        matrix = A.to_csr().to_scipy()
        residual = b[..., A.mask].numpy() - (matrix @ result.x[..., A.mask].numpy().T).T
        assert np.linalg.norm(residual, axis=1).max() <= 1e-9 * float(b.norm())
        labels = A.closed_components[0]
        for k in range(min(A.closed_components[1], 5)):
            assert result.x[..., labels == k].mean(-1).abs().max() < 1e-12


def test_batches() -> None:
    A = PoissonGrid(scenes.labyrinth((40, 41), 0, 3))
    M = Multigrid(A)
    r = right_hand_side(A, 2, 3)
    z = M.matvec(r)
    for k in itertools.product(range(2), range(3)):
        assert torch.equal(M.matvec(r[k]), z[k])
    assert torch.equal(M.matvec(r.flatten(2)), z.flatten(2))
    assert torch.equal(M.matvec(r.mT.contiguous().mT), z)
    assert torch.equal(M.matvec(torch._neg_view(-r)), z)
    assert M.matvec(r[:0]).shape == (0, 3, 40, 41)
    r[1, 1] = 0
    result = solve(A, r, M=M, rtol=1e-9)
    for k in itertools.product(range(2), range(3)):
        assert error(result.x[k], solve(A, r[k], M=M, rtol=1e-9).x) < 1e-8
    assert not result.x[1, 1].any()


@pytest.mark.parametrize("options", [{}, {"smoother": "jacobi"}, {"precision": F64}], ids=str)
def test_other_cells_are_ignored(options: dict[str, Any]) -> None:
    for shape, flags in (((20, 24), scenes.smoke_balls((20, 24))), ((40, 41), scenes.labyrinth((40, 41), 0, 3)),
                         ((5, 5), mixed((5, 5), 0.3, 0.2))):  # fmt: skip
        for c in (None, coefficients(shape)):
            A = PoissonGrid(flags, face_coef=c)
            M, r = Multigrid(A, **options), right_hand_side(A)
            expected = M.matvec(r)
            assert not expected[~A.mask].any()
            for junk in (1.0, float("inf"), float("nan")):
                spoiled = torch.where(A.mask, r, torch.full_like(r, junk))
                if junk == 1.0:
                    assert torch.equal(M.matvec(spoiled), expected), shape
                assert error(solve(A, spoiled, M=M, rtol=1e-9).x, solve(A, r, M=M, rtol=1e-9).x) < 1e-12


# --- in all solvers ---


@pytest.mark.parametrize(
    "flags", [scenes.smoke_balls((48, 40)), scenes.labyrinth((48, 40), 0, 3)], ids=["balls", "maze"]
)
def test_in_every_solver(flags: Tensor) -> None:
    A = PoissonGrid(flags)
    M, b = Multigrid(A), right_hand_side(A)
    expected = torch.from_numpy(spla.spsolve(A.to_csr().to_scipy().tocsc(), b[A.mask].numpy()))
    result = fcg(A, b, M=M, rtol=1e-9)
    assert result.iterations <= 18
    assert error(result.x[A.mask], expected) < 1e-7
    result = dcdm(A, b, M, rtol=1e-9)
    assert result.iterations <= 18
    assert error(result.x[A.mask], expected) < 1e-7
    result = dcdm(A, b, lambda r: torch.zeros_like(r), fallback=M, rtol=1e-9)
    assert result.converged
    assert result.iterations <= 30
    assert error(result.x[A.mask], expected) < 1e-7
    result = cg(A, b, M=lambda r: M.matvec(r), rtol=1e-9)
    assert error(result.x[A.mask], expected) < 1e-7
    capped = capped_cg(A, b.flatten(), damping=1e-12, rtol=1e-9, M_inv=M)
    assert error(-capped.d.reshape(A.grid)[A.mask], expected) < 1e-6
    shifted = cg(A + 0.01 * PoissonGrid(flags), b, M=M, rtol=1e-9)
    assert error(1.01 * shifted.x[A.mask], expected) < 1e-7


def test_scaled_into_a_sum() -> None:
    """Preconditioners of a kind of their own do not add up to native ones; they either work or say so."""
    A = PoissonGrid(scenes.smoke_balls((20, 24)))
    M, r = Multigrid(A), right_hand_side(A)
    try:
        z = (2.0 * M).matvec(r)
    except (TypeError, ValueError):
        return
    assert error(z, 2 * M.matvec(r)) < 1e-12
    assert error(solve(A, r, M=2.0 * M, rtol=1e-8).x, solve(A, r, M=M, rtol=1e-8).x) < 1e-6


# --- derivatives and transforms ---


def test_gradients() -> None:
    """Of solves with multigrid: those of solves without, also second order and forward."""
    flags = scenes.labyrinth((20, 24), 0, 3)
    c = [c.requires_grad_() for c in coefficients((20, 24))]
    A = PoissonGrid(flags, face_coef=c)
    b = right_hand_side(A).requires_grad_()
    with_M, without = (
        torch.autograd.grad(solve(A, b, M=M, rtol=1e-12).x.square().sum(), (b, *c)) for M in (Multigrid(A), None)
    )
    for pair in zip(with_M, without, strict=True):
        assert error(*pair) < 1e-8
    hessian_products = []
    for M in (Multigrid(A), None):
        (g,) = torch.autograd.grad(solve(A, b, M=M, rtol=1e-12).x.pow(3).sum(), b, create_graph=True)
        hessian_products.append(torch.autograd.grad(g.square().sum(), (b, *c)))
    for pair in zip(*hessian_products, strict=True):
        assert error(*pair) < 1e-7
    tangent = right_hand_side(A, seed=3)
    M = Multigrid(A)
    _, product = func.jvp(lambda b: cg(A, b, M=M, rtol=1e-12).x, (b.detach(),), (tangent,))
    assert error(product, solve(A, tangent, rtol=1e-12).x) < 1e-8


def test_the_cycle_is_linear_and_differentiable() -> None:
    A = PoissonGrid(scenes.smoke_balls((9, 10)))
    M = Multigrid(A, precision=F64)
    assert torch.autograd.gradcheck(M.matvec, (random(2, 9, 10).requires_grad_(),), check_forward_ad=True)
    assert error(M.matvec(3.0 * random(9, 10)), 3.0 * M.matvec(random(9, 10))) < 1e-13
    rows = random(3, 9, 10)
    assert torch.equal(torch.vmap(M.matvec)(rows), M.matvec(rows))


def test_vmap_and_compile() -> None:
    torch._dynamo.reset()
    A = PoissonGrid(scenes.labyrinth((20, 24), 0, 3))
    M, rows = Multigrid(A), right_hand_side(A, 3)
    expected = solve(A, rows, M=M, rtol=1e-10).x
    assert error(torch.vmap(lambda b: cg(A, b, M=M, rtol=1e-10).x)(rows), expected) < 1e-8
    gradient = func.grad(lambda b: cg(A, b, M=M, rtol=1e-10).x.square().sum())
    assert error(torch.vmap(gradient)(rows), torch.stack([gradient(row) for row in rows])) < 1e-8
    for step in (lambda b: cg(A, b, M=M, rtol=1e-10).x, M.matvec):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert error(compiled(rows), step(rows)) < 1e-8


def test_operator_checks() -> None:
    A = PoissonGrid(scenes.smoke_balls((20, 24)))
    M = Multigrid(A)
    operands, layout, _ = M.encode()
    r = right_hand_side(A, 2).flatten(1).requires_grad_()
    opcheck(torch.ops.kantor.multigrid.default, (operands, layout, r))
    opcheck(torch.ops.kantor.cg.default, (*A.encode(), *M.encode(), r.detach(), None, 1e-8, 0.0, 100))


# --- reuse, reproducibility ---


@pytest.mark.parametrize("options", [{}, {"smoother": "jacobi"}, {"sweeps": 2, "precision": F64}], ids=str)
def test_threads_change_no_bit(options: dict[str, Any]) -> None:
    """Of set-up, cycle and solve."""
    for flags in (scenes.smoke_balls((300, 261)), scenes.labyrinth((300, 260), 0, 3), rooms((40, 41, 43), 4),
                  opened((40_000, 2)), porous((3, 3, 9_000), 0.1)):  # fmt: skip
        A = PoissonGrid(flags)
        r, results = right_hand_side(A, 2), []
        for count in (1, 2, 3):
            with threads(count):
                M = Multigrid(A, **options)
                results.append((M.matvec(r), cg(A, r, M=M, rtol=1e-6).x, *M.encode().operands[:1]))
        for other in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("counts", [(1, 8), (8, 1)])
def test_threads_may_change_between_calls(counts: tuple[int, int]) -> None:
    """Between set-up, solve and the backward pass."""
    A = PoissonGrid(scenes.smoke_balls((300, 200)))
    b = right_hand_side(A).requires_grad_()
    with threads(counts[0]):
        M = Multigrid(A)
        encoded = M.encode()
        x = solve(A, b, M=M, rtol=1e-8).x
    with threads(counts[1]):
        z = torch.ops.kantor.multigrid(encoded.operands, encoded.layout, b.detach().flatten())
        (gradient,) = torch.autograd.grad(x.sum(), b)
    assert torch.equal(z.reshape(A.grid), M.matvec(b.detach()))
    assert error(gradient, solve(A, A.mask.to(F64), M=M, rtol=1e-8).x) < 1e-6


def test_many_calls_give_the_same() -> None:
    A = PoissonGrid(scenes.labyrinth((64, 64), 0, 3))
    M, r = Multigrid(A), right_hand_side(A)
    first = M.matvec(r)
    for k in range(3):
        M.matvec(right_hand_side(A, seed=k + 1))
        Multigrid(PoissonGrid(scenes.smoke_balls((64, 64)))).matvec(r)
        assert torch.equal(M.matvec(r), first)
    assert torch.equal(Multigrid(A).matvec(r), first)


def test_python_threads() -> None:
    """One preconditioner in four threads at once, forward and backward."""
    A = PoissonGrid(scenes.labyrinth((96, 96), 0, 3))
    M = Multigrid(A)
    rows = [right_hand_side(A, seed=k) for k in range(4)]
    expected = [(M.matvec(r), cg(A, r, M=M, rtol=1e-9).x) for r in rows]
    failures: list[Any] = []

    def work(k: int) -> None:
        for _ in range(5):
            b = rows[k].clone().requires_grad_()
            x = cg(A, b, M=M, rtol=1e-9).x
            x.square().sum().backward()
            if not (torch.equal(M.matvec(rows[k]), expected[k][0]) and torch.equal(x, expected[k][1])):
                failures.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_copies() -> None:
    A = PoissonGrid(scenes.labyrinth((40, 41), 0, 3))
    M, r = Multigrid(A), right_hand_side(A)
    for other in (copy.copy(M), copy.deepcopy(M), pickle.loads(pickle.dumps(M))):
        assert torch.equal(other.matvec(r), M.matvec(r))
        assert repr(other) == repr(M)
        assert torch.equal(cg(A, r, M=other).x, cg(A, r, M=M).x)
    del A
    assert torch.equal(Multigrid(PoissonGrid(scenes.labyrinth((40, 41), 0, 3))).matvec(r), M.matvec(r))


# --- resources ---


@pytest.mark.slow
def test_memory(size: str) -> None:
    """Two bytes a cell, three words a coarse cell, and room to work: far less than the vectors of the solver."""
    n = 160 if size == "full" else 96
    A = PoissonGrid(scenes.open_box((n, n, n)), dtype=F32)
    b = right_hand_side(A, dtype=F32)
    _ = A.closed_components
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    M = Multigrid(A)
    arena = M.encode().operands[0].numel() / n**3
    M.matvec(b)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / n**3
    assert arena < 6
    assert grown < 40  # the arena, its copy while it grows, the workspace and the result


@pytest.mark.slow
def test_beats_a_direct_solver(size: str) -> None:
    """Set-up and solve against a sparse factorisation of the same grid."""
    n = 256 if size == "full" else 128
    flags = scenes.smoke_balls((n, n))
    b = right_hand_side(PoissonGrid(flags))
    ratios = []
    for _ in range(3):
        started = time.process_time()
        A = PoissonGrid(flags)
        x = solve(A, b, M=Multigrid(A), rtol=1e-8).x
        ours = time.process_time() - started
        matrix, right = A.to_csr().to_scipy().tocsc(), b[A.mask].numpy()
        started = time.process_time()
        expected = spla.spsolve(matrix, right)
        ratios.append((time.process_time() - started) / ours)
    assert error(x[A.mask], torch.from_numpy(expected)) < 1e-6
    assert max(ratios) > 2


# --- errors ---


def test_errors() -> None:
    A = PoissonGrid(scenes.smoke_balls((16, 16)))
    kernel = torch.zeros(1, 3, 3, dtype=F64)
    with pytest.raises(TypeError, match="Multigrid: A: expected a PoissonGrid, got Stencil; use M='ic0'"):
        Multigrid(Stencil((4, 4)))  # type: ignore[arg-type]
    options: list[tuple[dict[str, Any], str]] = [
        ({"smoother": "sor"}, "smoother: expected 'rbgs', 'jacobi' or 'stencil', got 'sor'"),
        ({"sweeps": 0}, "sweeps: expected an integer from 1 to 8, got 0"),
        ({"sweeps": 9}, "sweeps: expected an integer from 1 to 8, got 9"),
        ({"sweeps": 1.0}, "sweeps: expected an integer from 1 to 8, got 1.0"),
        ({"precision": torch.float16}, "precision: expected torch.float32 or torch.float64, got torch.float16"),
        ({"omega": 0.0}, "omega: expected a number between 0 and 1, got 0.0"),
        ({"omega": 1.0}, "omega: expected a number between 0 and 1"),
        ({"omega": float("nan")}, "omega: expected a number between 0 and 1, got nan"),
        ({"omega": "1"}, "omega: expected a number between 0 and 1, got '1'"),
        ({"smoother": "stencil"}, "stencils: to be given with smoother='stencil', and only then"),
        ({"stencils": kernel}, "stencils: to be given with smoother='stencil', and only then"),
        ({"smoother": "stencil", "stencils": kernel[0]}, r"stencils: expected shape \(levels, 3, 3\), got \(3, 3\)"),
        ({"smoother": "stencil", "stencils": kernel[:0]}, r"stencils: expected shape .* got \(0, 3, 3\)"),
        ({"smoother": "stencil", "stencils": kernel / 0}, "stencils: expected finite values"),
        ({"smoother": "stencil", "stencils": kernel, "scales": [1.0, 1.0]}, "scales: expected 1, one a kernel, got 2"),
        ({"scales": [float("nan")]}, "scales: expected finite values"),
        ({"scales": []}, "scales: expected"),
    ]
    for given, text in options:
        with pytest.raises((TypeError, ValueError), match=f"Multigrid: {text}"):
            Multigrid(A, **given)
    M = Multigrid(A)
    with pytest.raises(ValueError, match=r"Multigrid.matvec: x: expected shape \(..., 256\), got \(16, 15\)"):
        M.matvec(random(16, 15))
    with pytest.raises(TypeError, match="Multigrid.matvec"):
        M.matvec(random(16, 16).long())
    with pytest.raises(ValueError, match=r"cg: M: expected shape \(324, 324\), got \(256, 256\)"):
        cg(PoissonGrid(scenes.smoke_balls((18, 18))), random(18, 18), M=M)
    for name in ("ilu", "vcycle"):
        with pytest.raises(ValueError, match="cg: M: expected"):
            cg(A, random(16, 16), M=name)
