"""The CUDA code of direction networks: on the emulator and on a GPU, against torch in float64 and the CPU code."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from kantor.linalg._conv_inference import PackedNet
from test_conv_inference import Net, balls, exact

TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 2e-2}
SCHEDULES = (0, 1, 2, 3)


@pytest.fixture(params=devices.DEVICES[1:])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where CUDA code runs."""
    devices.require(request.param)
    with torch.no_grad():
        yield request.param


def apply(net: Net, r: Tensor, device: str, mask: Tensor | None = None, **options: Any) -> Tensor:
    """q, computed on the device, brought back."""
    home = devices.home(device)
    with devices.on(device):
        packed = PackedNet(net.to(home), None if mask is None else mask.to(home), **options)
        # What is not computed holds garbage from a call before.
        packed._workspaces.append(torch.full((2**23,), 255, dtype=torch.uint8, device=home))
        q = packed(r.to(home)).cpu()
    net.cpu()
    return q


def error(q: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry."""
    return float((q.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("channels", [4, 8, 16, 20, 32])
@pytest.mark.parametrize("grid", [(5, 9, 18), (1, 1, 2), (2, 17, 3), (11, 67), (1, 3)])
def test_agrees_with_torch(grid: tuple[int, ...], channels: int, precision: str, device: str) -> None:
    net = Net(len(grid), channels, (1, 1, 1), bias=True)
    r = torch.randn(2, *grid)
    assert error(apply(net, r, device, precision=precision), exact(net, r)) < TOLERANCE[precision]


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 3, 2), (2, 5, 3)])
def test_paper_networks(counts: tuple[int, int, int], device: str) -> None:
    net, r = Net(3, 16, counts), torch.randn(6, 10, 20)
    q = apply(net, r, device)
    assert error(q, exact(net, r)) < 1e-5
    assert error(q, PackedNet(net.float())(r).double()) < 1e-5


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("grid", [(20, 150), (9, 20, 36)])
def test_masks_and_skipping(grid: tuple[int, ...], precision: str, device: str) -> None:
    """A mask everywhere, and the same network with r and q masked by hand: all tiles are computed."""
    net, mask, r = Net(len(grid), 16, (0, 1, 1), bias=True), balls(grid), torch.randn(grid)
    q = apply(net, torch.where(mask, r, torch.nan), device, mask, precision=precision)
    assert torch.equal(q, apply(net, r * mask, device, precision=precision) * mask)
    assert error(q, exact(net, r, mask)) < TOLERANCE[precision]
    assert not apply(net.float(), r, device, torch.zeros(grid, dtype=torch.bool), precision=precision).any()


@pytest.mark.parametrize("precision", TOLERANCE)
def test_schedules_and_batches_change_no_bit(precision: str) -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    net, mask = Net(3, 16, (0, 1, 1)), balls((5, 9, 20))
    r = torch.randn(3, 5, 9, 20)
    results = []
    with devices.on("emulated"), torch.no_grad():
        packed = PackedNet(net, mask, precision=precision)
        for schedule in SCHEDULES:
            emulator.set_schedule(schedule)
            try:
                results += [packed(r), torch.stack([packed(one) for one in r])]
            finally:
                emulator.set_schedule(0)
    assert all(torch.equal(result, results[0]) for result in results)


def test_nothing_is_read_back(device: str) -> None:
    """No step of an inference waits for the device, so that it can be captured."""
    net, r = Net(2, 8, (0, 1, 1)), torch.randn(16, 20, device=devices.home(device))
    mask = torch.ones_like(r, dtype=torch.bool)
    if device == "emulated":
        emulator: Any = importlib.import_module("kantor._emu")
        before = emulator.host_copies()
        with devices.on(device):
            PackedNet(net, mask)(r)
        assert emulator.host_copies() == before
        return
    packed = PackedNet(net.to(r.device), mask)
    expected = packed(r)
    graph, still = torch.cuda.CUDAGraph(), torch.zeros_like(r)
    with torch.cuda.graph(graph):
        q = packed(still)
    still.copy_(r)
    graph.replay()
    assert torch.equal(q, expected)


def test_too_many_channels(device: str) -> None:
    net = Net(2, 36, (0, 1, 1)).to(devices.home(device))
    with (
        devices.on(device),
        pytest.raises(ValueError, match="channels: expected at most 32 on CUDA, got 36; move the network to the CPU"),
    ):
        PackedNet(net, grid=(4, 4))
