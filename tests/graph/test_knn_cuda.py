"""The CUDA code of exact nearest neighbours, on the emulator and on a GPU: the results of the CPU code, bit for bit.

Candidates are selected by rounded scores, in whatever order threads come; what is left is ordered by distances that
have the same bits everywhere.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from kantor.graph._neighbours import knn

F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=devices.DEVICES[1:])
def device(request: pytest.FixtureRequest) -> str:
    """Where CUDA code runs."""
    devices.require(request.param)
    return str(request.param)


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def grid(n: int, d: int) -> Tensor:
    """Many equal distances."""
    return normal(n, d).round()


def clusters(n: int, d: int) -> Tensor:
    """Three tight ones, far apart: scores are too coarse to tell neighbours from others."""
    return 5.0 * (torch.arange(n, dtype=F64)[:, None] % 3) + 1e-5 * normal(n, d)


def duplicates(n: int, d: int) -> Tensor:
    """All rows equal but one."""
    points = torch.ones(n, d, dtype=F64)
    points[n // 2] += 1
    return points


POINTS = {
    "normal": normal,
    "off centre": lambda n, d: 1e4 + normal(n, d),
    "grid": grid,
    "clusters": clusters,
    "duplicates": duplicates,
    "tiny": lambda n, d: 1e-25 * normal(n, d),
    "an outlier": lambda n, d: normal(n, d) * torch.where(torch.arange(n) == 3, 1e6, 1.0)[:, None],
}


def search(x: Tensor, k: int, device: str) -> tuple[Tensor, Tensor]:
    """Neighbours found on the device, brought back."""
    with devices.on(device):
        index, distance = knn(x.to(devices.home(device)), k)
    return index.cpu(), distance.cpu()


def assert_same(x: Tensor, k: int, device: str) -> None:
    index, distance = search(x, k, device)
    expected_index, expected_distance = knn(x, k)
    assert torch.equal(index, expected_index)
    assert torch.equal(distance, expected_distance)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("points", POINTS)
def test_points(points: str, dtype: torch.dtype, device: str) -> None:
    assert_same(POINTS[points](150, 5).to(dtype), 7, device)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("n", "d", "k"),
    [
        (2, 1, 1),  # nobody to choose from
        (6, 3, 5),
        (128, 8, 4),  # whole panels
        (129, 9, 4),  # one point more, one column more
        (200, 1, 20),
        (40, 1000, 3),
        (280, 2, 10),  # several panels, each split of them with a list of its own
    ],
)
def test_sizes(n: int, d: int, k: int, dtype: torch.dtype, device: str) -> None:
    assert_same(normal(n, d).to(dtype), k, device)


@pytest.mark.parametrize("points", ["normal", "duplicates"])
def test_many_neighbours(points: str, device: str) -> None:
    assert_same(POINTS[points](520, 2).float(), 512, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("n", "d", "k"), [(30_000, 16, 15), (5_000, 64, 100), (10_000, 3, 512)])
def test_large(n: int, d: int, k: int, dtype: torch.dtype) -> None:
    devices.require("cuda")
    assert_same(normal(n, d).to(dtype), k, "cuda")


def test_schedules_change_no_bit() -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    try:
        for points in ("normal", "grid", "duplicates"):
            x = POINTS[points](140, 4).float()
            for schedule in range(4):
                emulator.set_schedule(schedule)
                assert_same(x, 6, "emulated")
    finally:
        emulator.set_schedule(0)


def test_nothing_waits_for_the_device() -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    before = emulator.host_copies()
    search(normal(50, 3), 5, "emulated")
    assert emulator.host_copies() == before


@pytest.mark.parametrize("dtype", [F32, F64])
def test_values_that_are_not_finite(dtype: torch.dtype, device: str) -> None:
    """The caller has excluded them; here they may not hang, and their rows alone have no neighbours."""
    x = normal(60, 3).to(dtype)
    x[7, 1] = torch.nan
    x[9] = torch.inf
    fine = torch.tensor([i for i in range(60) if i not in (7, 9)])
    index, distance = search(x, 5, device)
    assert (index[[7, 9]] == -1).all()
    assert distance[[7, 9]].isnan().all()
    expected_index, expected_distance = knn(x[fine], 5)
    assert torch.equal(index[fine].long(), fine[expected_index.long()])
    assert torch.equal(distance[fine], expected_distance)


def test_too_many_neighbours(device: str) -> None:
    with pytest.raises(ValueError, match="expected at most 512 on CUDA, got 513"):
        search(normal(600, 2), 513, device)
