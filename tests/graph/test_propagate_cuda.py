"""The CUDA code of diffusion, on the emulator and on a GPU, against the CPU code: every layout of the work.

A graph that fits into shared memory takes its steps there, in one launch; others take them one by one. Rows are read 16
bytes at a time where that is possible. Derivatives take their steps one by one, tile by tile of the columns.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import devices
from kantor.graph import _native

F32, F64 = torch.float32, torch.float64
Pattern = tuple[Tensor, Tensor]


@pytest.fixture(params=devices.DEVICES[1:])
def device(request: pytest.FixtureRequest) -> str:
    """Where CUDA code runs."""
    devices.require(request.param)
    return str(request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def pattern(n: int, most: int, seed: int = 0) -> Pattern:
    """Rows of 0 to `most` entries, not symmetric, every fourth row empty."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (n,), generator=generator)
    counts[::4] = 0
    rows = torch.repeat_interleave(torch.arange(n), counts)
    col = torch.randint(0, max(n, 1), (len(rows),), generator=generator)
    order = torch.argsort(rows * n + col)
    rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return rowptr.to(torch.int32), col[order].to(torch.int32)


def problem(n: int, d: int, dtype: torch.dtype, most: int = 5) -> tuple[Pattern, Tensor, Tensor, Tensor]:
    graph = pattern(n, most)
    edge, diagonal = 0.2 * normal(len(graph[1]), seed=1), 0.5 + 0.1 * normal(n, seed=2)
    return graph, edge.to(dtype), diagonal.to(dtype), normal(n, d, seed=3).to(dtype)


def run(
    graph: Pattern, edge: Tensor, diagonal: Tensor, x: Tensor, options: tuple[Any, ...], device: str, *, weights: bool
) -> list[Tensor]:
    """The result and the derivatives of its product with a fixed matrix, computed on the device, brought back."""
    home = devices.home(device)
    with devices.on(device):
        rowptr, col = (t.to(home) for t in graph)
        leaves = [t.detach().to(home).requires_grad_(weights or t is x) for t in (edge, diagonal, x)]
        y = _native.propagate(rowptr, col, *leaves, *options)
        grad = normal(*y.shape, seed=4).to(home, y.dtype)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [
            t.cpu() for t in (y.detach(), *torch.autograd.grad(y, wanted, grad, allow_unused=True)) if t is not None
        ]


def assert_same(problem: tuple[Pattern, Tensor, Tensor, Tensor], options: tuple[Any, ...], device: str) -> None:
    dtype = problem[1].dtype
    for weights in (False, True):
        actual = run(*problem, options, device, weights=weights)
        expected = run(*problem, options, "cpu", weights=weights)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            if a.numel():
                assert (a - b).abs().max() <= 32 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("d", [1, 3, 7, 8, 33, 64, 200])
def test_columns(d: int, dtype: torch.dtype, device: str) -> None:
    given = problem(40, d, dtype)
    for options in ((1,), (5,), (4, 0.2), (3, 0.0, 0.4, 77), (6, 0.1, 0.3, 2**62)):
        assert_same(given, options, device)


@pytest.mark.parametrize(("n", "d"), [(0, 3), (1, 1), (5, 0), (1, 9)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_small(n: int, d: int, steps: int, device: str) -> None:
    assert_same(problem(n, d, F64), (steps, 0.1, 0.2, 5), device)


@pytest.mark.parametrize(("d", "dtype"), [(3, F32), (4, F32), (2, F64)])
def test_beyond_shared_memory(d: int, dtype: torch.dtype, device: str) -> None:
    given = problem(6500, d, dtype, most=2)
    for options in ((3,), (2, 0.3), (3, 0.2, 0.4, 1)):
        assert_same(given, options, device)


def test_many_tiles_in_shared_memory(device: str) -> None:
    """Wide enough for tiles of two and of four pieces of 16 bytes, the last of them not full."""
    for d in (505, 1100):
        given = problem(9, d, F32)
        for options in ((2, 0.1), (3, 0.0, 0.5, 3)):
            actual, expected = (run(*given, options, where, weights=False) for where in (device, "cpu"))
            for a, b in zip(actual, expected, strict=True):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_large_blocks(device: str) -> None:
    """A million rows, most of them empty."""
    n = 2**20 + 5
    rows = torch.tensor([0, 1, 1023, 4096, n - 1])
    rowptr = torch.zeros(n + 1, dtype=torch.int32)
    rowptr[rows + 1] = 1
    graph = (rowptr.cumsum(0).to(torch.int32), torch.tensor([5, n - 1, 0, 7, 4095], dtype=torch.int32))
    weight, x = normal(5).float(), normal(n, 1).float()
    home = devices.home(device)
    with devices.on(device):
        y = _native.product(*(t.to(home) for t in (*graph, weight, x))).cpu()
    expected = torch.zeros_like(x)
    expected[rows, 0] = weight * x[graph[1].long(), 0]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("d", [4, 8])
def test_rows_that_are_not_aligned(d: int, device: str) -> None:
    (graph, edge, diagonal, x), home = problem(30, d, F32), devices.home(device)
    buffer = torch.zeros(30 * d + 1, dtype=F32, device=home)
    shifted = buffer[1:].view(30, d).copy_(x)
    with devices.on(device):
        rowptr, col, weights, diagonals = (t.to(home) for t in (*graph, edge, diagonal))
        for steps in (1, 3):
            y = _native.propagate(rowptr, col, weights, diagonals, shifted, steps).cpu()
            assert torch.allclose(y, _native.propagate(*graph, edge, diagonal, x, steps), atol=1e-5)
        product = _native.product(rowptr, col, weights, shifted).cpu()
        dots = _native.edge_dot(rowptr, col, shifted, shifted).cpu()
    assert torch.allclose(product, _native.product(*graph, edge, x), atol=1e-5)
    assert torch.allclose(dots, _native.edge_dot(*graph, x, x), atol=1e-5)


def test_the_same_masks_everywhere(device: str) -> None:
    """Without a graph, and 1 on the diagonal, steps only drop."""
    n, d = 50, 11
    empty = (torch.zeros(n + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    given = (empty, torch.zeros(0), torch.ones(n), torch.ones(n, d))
    for steps in (1, 2):
        actual, expected = (run(*given, (steps, 0.0, 0.5, 9), where, weights=False)[0] for where in (device, "cpu"))
        assert torch.equal(actual, expected)
        assert 0 < (actual == 0).double().mean() < 1


def test_schedules_change_no_bit() -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    results = []
    try:
        for schedule in range(4):
            emulator.set_schedule(schedule)
            results.append(run(*problem(60, 6, F32), (5, 0.1, 0.3, 4), "emulated", weights=True))
    finally:
        emulator.set_schedule(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_waits_for_the_device() -> None:
    devices.require("emulated")
    emulator: Any = importlib.import_module("kantor._emu")
    before = emulator.host_copies()
    run(*problem(20, 3, F64), (4, 0.1, 0.2, 3), "emulated", weights=True)
    assert emulator.host_copies() == before
