"""The convolutional direction network: its size, its symmetries, masks, odd sizes, and what it becomes on a grid."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kantor.datasets import poisson_scenes
from kantor.linalg import DirectionNet, PoissonGrid
from systems import F32, F64, random

GRIDS = {2: (24, 18), 3: (8, 10, 12)}
ODD = {2: (13, 8), 3: (7, 5, 6)}


def network(dim: int, seed: int = 0, **options: Any) -> DirectionNet:
    torch.manual_seed(seed)
    return DirectionNet(dim, **options)


def scene(grid: tuple[int, ...]) -> PoissonGrid:
    return PoissonGrid(poisson_scenes.smoke_sphere(grid))


def plain(net: DirectionNet, r: Tensor, mask: Tensor) -> Tensor:
    """The network as the paper draws it, on one even-sized residual; layers by number."""
    weights = [(c.weight, c.bias) for c in net.convolutions]
    conv, pool = (
        (functional.conv2d, functional.avg_pool2d) if net.dim == 2 else (functional.conv3d, functional.avg_pool3d)
    )

    def layer(k: int, u: Tensor) -> Tensor:
        return conv(u, *weights[k], padding=weights[k][0].shape[-1] // 2)

    def pair(k: int, u: Tensor) -> Tensor:
        return layer(k + 1, layer(k, u).relu()).relu() + u

    a = layer(1, layer(0, (r * mask)[None, None])).relu()
    a = pair(2, a)
    b = layer(4, a).relu()
    c = pair(9, pair(7, pair(5, pool(b, 2))))
    for axis in range(2, c.ndim):
        c = c.repeat_interleave(2, axis)
    return layer(15, pair(13, pair(11, c + b)))[0, 0] * mask


@pytest.mark.parametrize(
    ("variant", "bias", "count"),
    [("64", True, 97_457), ("64", False, 97_216), ("128", True, 152_881), ("128", False, 152_512)],
)
def test_parameter_counts_of_the_paper(variant: Any, bias: bool, count: int) -> None:
    net = DirectionNet(3, variant, bias=bias)
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(net.convolutions) == 4 + 2 * sum(net.counts)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_equals_the_layers_written_out(dim: int, bias: bool) -> None:
    net = network(dim, bias=bias).double()
    mask = scene(GRIDS[dim]).mask
    r = random(*mask.shape)
    torch.testing.assert_close(net(r, mask), plain(net, r, mask))


@pytest.mark.parametrize("dim", [2, 3])
def test_homogeneous_without_biases(dim: int) -> None:
    net = network(dim).double()
    r = random(*GRIDS[dim])
    torch.testing.assert_close(net(3.7 * r), 3.7 * net(r), rtol=1e-10, atol=1e-12)
    assert torch.equal(net(4 * r), 4 * net(r))  # a power of two: to the bit


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_only_the_fluid_is_read_and_written(dim: int, bias: bool) -> None:
    net, mask = network(dim, bias=bias), scene(ODD[dim]).mask
    r = random(2, *mask.shape, dtype=F32)
    spoilt = torch.where(mask, r, torch.full_like(r, torch.nan))
    q = net(r, mask)
    assert torch.equal(q, net(spoilt, mask))
    assert bool((q[:, ~mask] == 0).all())
    assert bool((q[:, mask] != 0).any())


@pytest.mark.parametrize("dim", [2, 3])
def test_odd_sizes_are_padded_by_a_solid_cell(dim: int) -> None:
    net, grid = network(dim).double(), ODD[dim]
    padding = [side for n in reversed(grid) for side in (0, n % 2)]
    mask = scene(grid).mask
    r = random(*grid)
    padded = net(functional.pad(r, padding), functional.pad(mask, padding))
    torch.testing.assert_close(net(r, mask), padded[tuple(slice(n) for n in grid)])


@pytest.mark.parametrize(("dim", "size"), [(2, 96), (3, 80)])
def test_translation_by_the_pooling_length(dim: int, size: int) -> None:
    """Away from walls a residual moved by two cells gives the direction moved by two cells."""
    net = network(dim, channels=4)
    r = torch.zeros((size,) * dim)
    middle = tuple(slice(size // 2 - 3, size // 2 + 3) for _ in range(dim))
    r[middle] = random(*(6,) * dim, dtype=F32)
    with torch.no_grad():
        moved = net(r.roll(2, 0))
        torch.testing.assert_close(moved, net(r).roll(2, 0))


@pytest.mark.parametrize("dim", [2, 3])
def test_batches_and_dtypes(dim: int) -> None:
    net = network(dim)
    r = random(2, 3, *ODD[dim])
    q = net(r)
    assert q.shape == r.shape
    assert q.dtype == F64
    torch.testing.assert_close(q[1, 2], net(r[1, 2]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(q.float(), net(r.float()), rtol=1e-5, atol=1e-7)


def test_gradients_of_residual_and_weights() -> None:
    net = network(2, channels=2).double()
    mask = scene((5, 6)).mask
    r = random(2, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, *_: net(r, mask), (r, *net.parameters()), atol=1e-6)


# --- on a grid ---


@pytest.mark.parametrize("channels", [4, 16, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_bound_equals_forward(dim: int, bias: bool, channels: int) -> None:
    net, grid = network(dim, bias=bias, channels=channels), scene(ODD[dim])
    f = net.bind(grid)
    r = random(2, *grid.grid)
    expected = net.double()(r, grid.mask).detach()
    q = f(r)
    assert q.dtype == F64
    assert not q.requires_grad
    assert float((q - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(f(r.flatten(1)), q.flatten(1))
    assert f(r.float()).dtype == F32
    torch.testing.assert_close(f(r[0]), q[0], rtol=1e-5, atol=1e-6)


def test_bound_keeps_its_weights_and_leaves_r_alone() -> None:
    net, grid = network(2), scene((16, 16))
    f = net.bind(grid)
    r = random(16, 16).requires_grad_()
    copy, before = r.detach().clone(), f(r)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(f(r), before)
    assert torch.equal(r, copy)


def test_state_dict_and_repr() -> None:
    net = network(2, variant="128", channels=8, bias=True)
    stored = io.BytesIO()
    torch.save(net.state_dict(), stored)
    stored.seek(0)
    other = network(2, seed=1, variant="128", channels=8, bias=True)
    other.load_state_dict(torch.load(stored, weights_only=True))
    r = random(8, 8, dtype=F32)
    assert torch.equal(net(r), other(r))
    assert repr(net) == "DirectionNet(2-D, '128', 8 channels, bias)"
    assert repr(DirectionNet(3)) == "DirectionNet(3-D, '64', 16 channels, no bias)"
    assert repr(net.bind(scene((8, 8)))) == f"DirectionMap({net!r}, float32, grid 8 x 8)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 1}, "dim: expected 2 or 3"),
        ({"variant": "32"}, "variant: expected '64' or '128'"),
        ({"channels": 0}, "channels: expected a positive integer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DirectionNet: {message}"):
        DirectionNet(**options)


def test_errors() -> None:
    net, flat = network(2), scene((16, 16))
    with pytest.raises(ValueError, match="DirectionNet.bind: grid: expected 2 dimensions"):
        net.bind(scene((8, 8, 8)))
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        DirectionNet(3).bind(flat)
    with pytest.raises(TypeError, match="expected a PoissonGrid, got Tensor"):
        net.bind(flat.flags)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision"):
        net.bind(flat, precision="float8")
    with pytest.raises(ValueError, match="at least 2 sizes"):
        net(torch.ones(16))
    with pytest.raises(ValueError, match=r"expected shape \(..., 16, 16\)"):
        net(torch.ones(8, 8), flat.mask)
    with pytest.raises(TypeError, match="expected dtype float32 or float64"):
        net(torch.ones(8, 8, dtype=torch.int64))
    f = net.bind(flat)
    with pytest.raises(ValueError, match=r"expected shape \(..., 16, 16\) or \(..., 256\), got \(8, 8\)"):
        f(torch.ones(8, 8))
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor"):
        f([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="float16"):
        f(torch.ones(16, 16, dtype=torch.float16))
