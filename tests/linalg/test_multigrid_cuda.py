"""The CUDA code of multigrid cycles: on the emulator and on a GPU, against the CPU code.

The emulator computes the same sums in the same order, and the same bits; a GPU contracts products and sums.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import Multigrid, PoissonGrid, capped_cg, cg
from systems import F32, F64, random

SCHEDULES = (0, 1, 2, 3)
PRECISIONS = [F32, F64]  # of the cycle


@pytest.fixture(params=devices.DEVICES[1:])
def device(request: pytest.FixtureRequest) -> str:
    """Where CUDA code runs."""
    devices.require(request.param)
    return str(request.param)


def open_water(grid: tuple[int, ...]) -> Tensor:
    """Free surfaces and random solids, among them single cells without any neighbour."""
    flags = torch.where(random(*grid, seed=1) > 1.0, 0, 2)
    flags[-1] = 3
    return flags


def coefficients(grid: tuple[int, ...], dtype: torch.dtype = F64) -> list[Tensor]:
    """Positive, of different magnitudes."""
    return [
        (0.7 * random(*(n + (a == axis) for a, n in enumerate(grid)), seed=axis)).exp().to(dtype)
        for axis in range(len(grid))
    ]


def problem(scene: Tensor, device: str, dtype: torch.dtype = F64, faces: bool = False) -> PoissonGrid:
    grid = tuple(scene.shape)
    face_coef = [c.to(devices.home(device)) for c in coefficients(grid, dtype)] if faces else None
    return PoissonGrid(scene.to(devices.home(device)), face_coef=face_coef, dtype=dtype)


def apply(M: Multigrid, r: Tensor, device: str) -> Tensor:
    """M r, computed on the device, brought back."""
    with devices.on(device):
        return M.matvec(r.to(devices.home(device))).cpu()


def difference(scene: Tensor, device: str, *, dtype: torch.dtype = F64, faces: bool = False, **options: Any) -> float:
    """Of M r there and on the CPU, relative to its largest entry, in a batch of two."""
    M = Multigrid(problem(scene, "cpu", dtype, faces), **options)
    r = random(2, *scene.shape, dtype=dtype)
    expected = M.matvec(r)
    assert expected.abs().max() > 0
    actual = apply(Multigrid(problem(scene, device, dtype, faces), **options), r, device)
    return float((actual - expected).double().abs().max() / expected.double().abs().max())


def tolerance(device: str, *dtypes: torch.dtype, amplified: float = 30) -> float:
    """What roundings may make of the result; long channels amplify them."""
    return 0.0 if device == "emulated" else amplified * max(torch.finfo(dtype).eps for dtype in dtypes)


def kinds(scene: Tensor, **options: Any) -> set[object]:
    return {level["kind"] for level in Multigrid(PoissonGrid(scene), **options).levels}


# --- one cycle ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("faces", [False, True])
@pytest.mark.parametrize(
    "grid", [(32, 48), (33, 47), (70, 3), (16, 16, 16), (9, 12, 15), (2, 3, 40), (5, 6), (3, 3, 3)]
)
def test_grids(grid: tuple[int, ...], faces: bool, dtype: torch.dtype, precision: torch.dtype, device: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "faces": faces, "precision": precision, "walls": False}
    assert difference(open_water(grid), device, **options) <= tolerance(device, dtype, precision)


@pytest.mark.parametrize("smoother", ["rbgs", "jacobi", "stencil"])
@pytest.mark.parametrize("sweeps", [1, 2, 3])
@pytest.mark.parametrize("grid", [(33, 47), (9, 12, 15)])
def test_smoothers(grid: tuple[int, ...], sweeps: int, smoother: str, device: str) -> None:
    """The stencils are not symmetric, so that before and after the correction they differ, and so do the levels."""
    options: dict[str, Any] = {"smoother": smoother, "sweeps": sweeps, "precision": F64}
    if smoother == "stencil":
        options["stencils"] = 0.1 * random(2, *[3] * len(grid))
        options["scales"] = torch.tensor([1.25, 0.75])
    for faces in (False, True):
        for walls in (False, True):
            assert difference(open_water(grid), device, faces=faces, walls=walls, **options) <= tolerance(device, F64)


WALLS: dict[str, tuple[Callable[[], Tensor], set[str]]] = {
    "baffles": (partial(scenes.baffles, (64, 64)), {"grid", "graph", "exact"}),
    "baffles, odd": (partial(scenes.baffles, (43, 61)), {"grid", "graph", "exact"}),
    "baffles in space": (partial(scenes.baffles, (15, 24, 26)), {"grid", "graph", "exact"}),
    "labyrinth": (partial(scenes.labyrinth, (63, 81)), {"grid", "factor"}),
    "labyrinth in space": (partial(scenes.labyrinth, (17, 15, 21)), {"grid", "factor"}),
    "gravel": (partial(open_water, (40, 50)), {"grid", "graph", "exact"}),
    "gravel in space": (partial(open_water, (15, 16, 17)), {"grid", "graph", "exact"}),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("faces", [False, True])
@pytest.mark.parametrize("name", WALLS)
def test_walls(name: str, faces: bool, precision: torch.dtype, device: str) -> None:
    """Graphs below the first grid, and factors."""
    scene, expected_kinds = WALLS[name]
    assert kinds(scene()) == expected_kinds
    allowed = tolerance(device, precision, amplified=1e4)
    assert difference(scene(), device, faces=faces, precision=precision) <= allowed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("grid", [(63, 81), (17, 15, 21)])
def test_factors_with_long_columns(grid: tuple[int, ...], precision: torch.dtype, device: str) -> None:
    """A labyrinth with loops: the lanes of a warp add up a column, in an order of their own."""
    scene = scenes.labyrinth(grid)
    opened = torch.rand(grid, generator=torch.Generator().manual_seed(0)) < 0.02
    scene[opened & (scene == 0)] = 2
    assert kinds(scene) == {"grid", "factor"}
    assert difference(scene, device, precision=precision) < 1e4 * torch.finfo(precision).eps


@pytest.mark.slow
def test_a_factor_beyond_shared_memory(device: str) -> None:
    scene = scenes.labyrinth((401, 401))
    sizes = [level["size"] for level in Multigrid(PoissonGrid(scene)).levels if level["kind"] == "factor"]
    assert sizes
    assert all(isinstance(n, int) and n > 24_576 for n in sizes)
    assert difference(scene, device) < 1e-5


@pytest.mark.parametrize("scene", [open_water((33, 47)), scenes.baffles((43, 61)), scenes.labyrinth((17, 15, 21))])
@pytest.mark.parametrize("smoother", ["rbgs", "jacobi"])
def test_schedules_and_batches_change_no_bit(scene: Tensor, smoother: Any) -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    M, r = Multigrid(PoissonGrid(scene), smoother=smoother), random(3, *scene.shape)
    results = []
    try:
        for schedule in SCHEDULES:
            emulator.set_schedule(schedule)
            results.append(apply(M, r, "emulated"))
            results.append(torch.stack([apply(M, vector, "emulated") for vector in r]))
    finally:
        emulator.set_schedule(0)
    assert all(torch.equal(z, results[0]) for z in results[1:])


def test_what_is_not_fluid_is_ignored(device: str) -> None:
    scene = open_water((20, 21))
    r, M = random(20, 21), Multigrid(problem(scene, device))
    z = apply(M, r, device)
    assert not z[scene != 2].any()
    assert torch.equal(apply(M, torch.where(scene == 2, r, 1e30), device), z)


# --- in solvers ---


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    "scene", [scenes.smoke_balls((48, 50)), scenes.tank((17, 20, 18)), scenes.baffles((43, 61)), scenes.pools((32, 32))]
)
@pytest.mark.parametrize("faces", [False, True])
def test_cg(scene: Tensor, dtype: torch.dtype, faces: bool, device: str) -> None:
    """The same iterates, batches included: each system stops by itself."""
    A = problem(scene, "cpu", dtype, faces)
    b = A.matvec(random(3, *scene.shape, dtype=dtype))  # what every grid can solve for, closed or not
    b[1] = 0
    rtol = 1e-9 if dtype is F64 else 1e-4
    expected = cg(A, b, M=Multigrid(A), rtol=rtol)
    there = problem(scene, device, dtype, faces)
    with devices.on(device):
        actual = cg(there, b.to(devices.home(device)), M=Multigrid(there), rtol=rtol)
    assert actual.converged
    assert int((actual.per_system_iterations.cpu() - expected.per_system_iterations).abs().max()) <= 1
    assert not actual.x[1].any()
    assert float((A.matvec(actual.x.cpu()) - b).norm()) < 3 * rtol * float(b.norm())
    assert float((actual.x.cpu() - expected.x).norm() / expected.x.norm()) < 1e3 * rtol


def test_capped_cg(device: str) -> None:
    scene = scenes.smoke_balls((32, 36))
    A, there = problem(scene, "cpu"), problem(scene, device)
    g = torch.where(A.mask, random(32, 36), 0.0).reshape(-1)
    expected = capped_cg(A, g, damping=0.1, max_iter=5, M_inv=Multigrid(A)).d
    with devices.on(device):
        actual = capped_cg(there, g.to(devices.home(device)), damping=0.1, max_iter=5, M_inv=Multigrid(there)).d
    assert float((actual.cpu() - expected).abs().max() / expected.abs().max()) < 1e-5
