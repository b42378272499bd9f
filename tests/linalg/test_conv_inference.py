"""Native inference of direction networks against torch's convolutions in float64."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kantor.linalg._conv_inference import PackedNet, direction_net

WIDEST = (512, 256, 128)  # bits of the vectors: the best kernels there are, AVX2's, the plain ones


class Net(nn.Module):
    """The network as its description has it, layer by layer."""

    def __init__(
        self, dim: int, channels: int, counts: tuple[int, int, int], *, bias: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.dim, self.counts, self.bias = dim, counts, bias
        conv: Any = nn.Conv3d if dim == 3 else nn.Conv2d
        inner = [conv(channels, channels, 3, padding=1, bias=bias) for _ in range(2 + 2 * sum(counts))]
        self.convolutions = nn.ModuleList(
            [conv(1, channels, 3, padding=1, bias=bias), *inner, conv(channels, 1, 1, bias=bias)]
        )

    def forward(self, r: Tensor, mask: Tensor | None = None) -> Tensor:
        """r (batch, *grid)."""
        grid, layers = r.shape[1:], iter(self.convolutions)
        keep = torch.ones(grid, dtype=r.dtype) if mask is None else (mask != 0).to(r.dtype)
        padding = [amount for n in reversed(grid) for amount in (0, n % 2)]

        def pairs(u: Tensor, count: int) -> Tensor:
            for _ in range(count):
                v = torch.relu(next(layers)(u))
                u = torch.relu(next(layers)(v)) + u
            return u

        a = next(layers)(nn.functional.pad(r * keep, padding).unsqueeze(1))
        a = pairs(torch.relu(next(layers)(a)), self.counts[0])
        b = torch.relu(next(layers)(a))
        pool: Any = nn.functional.avg_pool3d if self.dim == 3 else nn.functional.avg_pool2d
        u = nn.functional.interpolate(pairs(pool(b, 2), self.counts[1]), scale_factor=2, mode="nearest") + b
        u = pairs(u, self.counts[2])
        q = next(layers)(u).squeeze(1)
        return q[(slice(None), *(slice(0, n) for n in grid))] * keep


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def exact(net: Net, r: Tensor, mask: Tensor | None = None) -> Tensor:
    """q in float64, over the leading dimensions of r."""
    flat = r.double().reshape(-1, *r.shape[-net.dim :])
    return net.double()(flat, mask).reshape(r.shape)


def check(net: Net, r: Tensor, mask: Tensor | None = None, *, tolerance: float = 2e-6, **options: Any) -> Tensor:
    """Compare with float64, relative to the largest entry; returns what was computed."""
    q = PackedNet(net, mask, **options)(r)
    expected = exact(net, r, mask)
    assert q.shape == r.shape
    assert q.dtype == r.dtype
    assert float((q.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())
    return q


def balls(grid: tuple[int, ...], seed: int = 0) -> Tensor:
    """A mask with a large hole, and little fluid far from it."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    distance = sum(((x - n / 3) / n) ** 2 for x, n in zip(axes, grid, strict=True))
    generator = torch.Generator().manual_seed(seed)
    return (distance < 0.02) & (torch.rand(grid, generator=generator) < 0.8)


@pytest.mark.parametrize("widest", WIDEST)
@pytest.mark.parametrize("channels", [4, 8, 12, 16, 32])
@pytest.mark.parametrize(("dim", "grid"), [(3, (6, 10, 34)), (2, (18, 70))])
def test_agrees_with_torch(dim: int, grid: tuple[int, ...], channels: int, widest: int) -> None:
    net = Net(dim, channels, (1, 1, 1))
    check(net, torch.randn(2, *grid), _widest=widest)


@pytest.mark.parametrize("widest", WIDEST)
@pytest.mark.parametrize(
    "grid",
    [(1, 1, 1), (1, 1, 2), (2, 2, 2), (3, 1, 5), (5, 7, 9), (4, 4, 33), (1, 3, 65), (9, 2, 2), (6, 6, 6), (2, 2, 131)],
)
def test_any_size_in_three_dimensions(grid: tuple[int, int, int], widest: int) -> None:
    net = Net(3, 16, (1, 2, 1), bias=True)
    check(net, torch.randn(grid), _widest=widest)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (3, 5), (7, 40), (33, 67), (2, 300)])
def test_any_size_in_two_dimensions(grid: tuple[int, int]) -> None:
    check(Net(2, 16, (1, 2, 1), bias=True), torch.randn(3, *grid))


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 3, 2), (2, 5, 3)])
def test_paper_networks(dim: int, counts: tuple[int, int, int]) -> None:
    for bias in (False, True):
        check(Net(dim, 16, counts, bias=bias), torch.randn((20,) * dim))


def test_dtypes_and_shapes_of_r() -> None:
    net, grid = Net(3, 8, (0, 1, 1)), (4, 5, 6)
    packed, r = PackedNet(net, grid=grid), torch.randn(2, 3, *grid, dtype=torch.float64)
    q = packed(r)
    assert q.dtype == torch.float64
    assert q.shape == r.shape
    assert torch.equal(packed(r.reshape(2, 3, -1)), q.reshape(2, 3, -1))
    assert torch.equal(packed(r.float()).double(), q)
    assert torch.equal(packed(r[0, 0]), q[0, 0])
    assert torch.equal(packed(r.transpose(0, 1)), q.transpose(0, 1))
    assert torch.equal(packed(r[:, :1].expand(2, 5, *grid)), q[:, :1].expand(2, 5, *grid))
    assert packed(r[:0]).shape == (0, 3, *grid)
    assert torch.equal(PackedNet(net)(r), q)


@pytest.mark.parametrize("dim", [2, 3])
def test_every_layer_counts(dim: int) -> None:
    """A change of any single weight or bias shows: none is ignored, moved or used twice."""
    net = Net(dim, 4, (1, 1, 1), bias=True).double()
    r = torch.randn((6, 7, 8)[-dim:])
    for convolution in net.convolutions:
        for parameter in (convolution.weight, convolution.bias):
            before = parameter.detach().clone()
            parameter += 0.2 * torch.randn_like(parameter)
            check(net, r)
            parameter.copy_(before)


@pytest.mark.parametrize("widest", WIDEST)
@pytest.mark.parametrize("grid", [(20, 40), (31, 129), (12, 20, 40), (9, 11, 70), (40, 20, 36)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_skipping_changes_no_bit(grid: tuple[int, ...], precision: str, widest: int) -> None:
    """A mask everywhere, and the same network with r and q masked by hand: all blocks are computed."""
    net, mask = Net(len(grid), 16, (1, 1, 1), bias=True), balls(grid)
    r = torch.randn(grid)
    masked = PackedNet(net, mask, precision=precision, _widest=widest)
    whole = PackedNet(net, grid=grid, precision=precision, _widest=widest)
    # What blocks were skipped over holds garbage from a call before.
    masked._workspaces.append(torch.full((2**25,), 255, dtype=torch.uint8))
    q = masked(r)
    assert torch.equal(q, whole(r * mask) * mask)
    assert torch.equal(masked(r), q)
    if precision == "float32":
        check(net, r, mask, _widest=widest)


def test_mask_dtypes_and_a_mask_without_fluid() -> None:
    net, mask = Net(2, 8, (0, 1, 1)), balls((16, 20))
    r = torch.randn(16, 20)
    q = PackedNet(net, mask)(r)
    assert torch.equal(PackedNet(net, mask.to(torch.uint8) * 2)(r), q)
    assert not q[~mask].any()
    assert q[mask].any()
    assert not PackedNet(net, torch.zeros(16, 20, dtype=torch.bool))(r).any()


def test_cells_outside_of_the_mask_are_not_read() -> None:
    net, mask = Net(3, 8, (0, 1, 1)), balls((8, 9, 10))
    r = torch.randn(8, 9, 10)
    poisoned = torch.where(mask, r, torch.nan)
    assert torch.equal(PackedNet(net, mask)(poisoned), PackedNet(net, mask)(r))


@pytest.mark.parametrize("channels", [4, 8, 16, 32])
@pytest.mark.parametrize("grid", [(40, 66), (12, 14, 34)])
def test_bfloat16(grid: tuple[int, ...], channels: int) -> None:
    net = Net(len(grid), channels, (1, 3, 2))
    q = check(net, torch.randn(2, *grid), precision="bfloat16", tolerance=2e-2)
    plain = PackedNet(net, precision="bfloat16", _widest=256)(torch.zeros(grid))
    assert not plain.any()
    assert torch.isfinite(q).all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("grid", [(64, 96), (26, 18, 40), (64, 4, 6)])
def test_threads_change_no_bit(grid: tuple[int, ...], precision: str) -> None:
    net, r = Net(len(grid), 16, (1, 1, 1)), torch.randn(2, *grid)
    packed = PackedNet(net, balls(grid) | (torch.rand(grid) < 0.3), precision=precision)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        try:
            results.append(packed(r))
        finally:
            torch.set_num_threads(2)
    assert all(torch.equal(result, results[0]) for result in results)


def test_homogeneous_without_biases() -> None:
    """f(c r) = c f(r) for c > 0; exactly, for powers of two."""
    net, r = Net(3, 16, (1, 1, 1)), torch.randn(6, 8, 10)
    packed = PackedNet(net)
    assert torch.equal(packed(4 * r), 4 * packed(r))
    torch.testing.assert_close(packed(3 * r), 3 * packed(r), rtol=1e-4, atol=1e-6)


def test_nan_spreads_no_further_than_it_reaches() -> None:
    net, r = Net(2, 8, (0, 1, 1)), torch.randn(64, 64)
    r[5, 5] = torch.nan
    q = PackedNet(net)(r)
    assert q[5, 5].isnan()
    assert torch.equal(q.isnan(), exact(net, r).isnan())


def test_weights_are_copied() -> None:
    net, r = Net(2, 8, (0, 1, 1)), torch.randn(8, 8)
    packed = PackedNet(net)
    before = packed(r)
    net.convolutions[1].weight.zero_()
    assert torch.equal(packed(r), before)


def test_workspace_is_reused() -> None:
    packed = PackedNet(Net(2, 8, (0, 1, 1)), grid=(8, 8))
    packed(torch.randn(8, 8))
    (workspace,) = packed._workspaces
    packed(torch.randn(8, 8))
    assert packed._workspaces[0] is workspace
    assert len(packed._workspaces) == 1


def test_operator_has_fake_and_vmap() -> None:
    packed = PackedNet(Net(2, 8, (0, 1, 1)), grid=(8, 10))
    layout, prepared = packed._layout((8, 10)), packed._prepare((8, 10))
    r, empty = torch.randn(3, 8, 10), torch.empty(0, dtype=torch.uint8)
    arguments = (prepared, None, empty, layout)
    torch.library.opcheck(direction_net, (r, *arguments), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(torch.func.vmap(lambda row: direction_net(row, *arguments))(r), packed(r))


def test_repr_says_what_it_is() -> None:
    packed = PackedNet(Net(2, 8, (0, 1, 1)), balls((8, 10)))
    assert repr(packed) == "PackedNet(dim=2, channels=8, counts=(0, 1, 1), 8x10, masked, float32)"


def changed(**attributes: Any) -> Net:
    net = Net(2, 8, (0, 1, 1))
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PackedNet(changed(), precision="float16"), ValueError, "precision: expected one of"),
        (lambda: PackedNet(changed(dim=4)), ValueError, "expected dim 2 or 3, got 4"),
        (lambda: PackedNet(changed(counts=(0, 0, 1))), ValueError, "mid and post positive"),
        (lambda: PackedNet(changed(counts=(1, 1, 1))), ValueError, "expected 10 convolutions"),
        (lambda: PackedNet(Net(2, 6, (0, 1, 1))), ValueError, "multiple of 4 up to 1024, got 6"),
        (lambda: PackedNet(changed(dim=3)), ValueError, "weight of convolution 0: expected shape (8, 1, 3, 3, 3)"),
        (lambda: PackedNet(changed(), grid=(4, 4, 4)), ValueError, "expected 2 sizes for a 2-D network"),
        (lambda: PackedNet(changed(), grid=(4, 0)), ValueError, "expected positive sizes"),
        (lambda: PackedNet(changed(), torch.ones(4, 4)), TypeError, "mask: expected dtype bool or uint8"),
        (lambda: PackedNet(changed(), torch.ones(4, dtype=torch.bool)), ValueError, "2 sizes"),
        (lambda: PackedNet(changed(), torch.ones(4, 4).bool(), grid=(4, 6)), ValueError, "give one of them"),
        (lambda: PackedNet(changed(), [[1]]), TypeError, "mask: expected a torch.Tensor, got list"),
    ],
)
def test_bad_networks(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


def test_weights_must_be_finite() -> None:
    net = changed()
    net.convolutions[3].weight[1, 2, 0, 1] = torch.inf
    with pytest.raises(ValueError, match=re.escape("weight of convolution 3: expected finite values, got inf")):
        PackedNet(net)


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        ([1.0], TypeError, "r: expected a torch.Tensor"),
        (torch.ones(8, 10, dtype=torch.int64), TypeError, "expected dtype float32 or float64, got int64"),
        (torch.ones(8, 10).bfloat16(), TypeError, "expected dtype float32 or float64, got bfloat16"),
        (torch.ones(8, 11), ValueError, "expected shape (..., 8, 10) or (..., 80), got (8, 11)"),
        (torch.ones(()), ValueError, "expected shape"),
        (torch.ones(8, 10, device="meta"), ValueError, "r is on meta"),
    ],
)
def test_bad_arguments(r: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PackedNet(changed(), grid=(8, 10))(r)


def test_gradients_are_refused() -> None:
    packed, r = PackedNet(changed()), torch.randn(8, 10, requires_grad=True)
    packed(r)  # under no_grad nobody asks for one
    with torch.enable_grad(), pytest.raises(ValueError, match="call r.detach()"):
        packed(r)
    with torch.enable_grad(), pytest.raises(ValueError, match="at least 2 dimensions"):
        packed(torch.randn(80))


def test_control_c_ends_a_long_inference() -> None:
    packed, r = PackedNet(Net(3, 32, (5, 1, 9))), torch.randn(128, 128, 64)

    def raise_signal() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=raise_signal)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            packed(r)
    thread.join()
    assert len(packed._workspaces) == 1
