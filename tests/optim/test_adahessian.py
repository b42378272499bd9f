"""AdaHessian: its trajectory, its probes, its state, and what it does in a training loop."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from devices import home
from kantor.optim import AdaHessian
from kantor.optim.hessian_diagonal import rademacher

# Torch warns of backward(create_graph=True); the optimiser is what breaks that cycle.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward")
F64 = torch.float64
A = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]])
START = np.array([1.0, -0.7, 0.4])


def value(w: Tensor) -> Tensor:
    """The problem of three unknowns: w'Aw / 2 + sum cos w, in any dtype."""
    return 0.5 * w @ torch.as_tensor(A, dtype=w.dtype, device=w.device) @ w + w.cos().sum()


def signs(like: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(2, p.shape, generator=generator) * 2 - 1).to(p.dtype) for p in like]


def mlp(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)


def convolutional(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10),
    ).to(dtype)  # fmt: skip


X = torch.randn(12, 5, dtype=F64, generator=torch.Generator().manual_seed(3))
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(4))


def loss_of(net: nn.Module, dtype: torch.dtype = F64) -> Callable[[], Tensor]:
    return lambda: cross_entropy(net(X.to(dtype)), Y)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


# --- the trajectory ---


@pytest.mark.parametrize("power", [1.0, 0.5, 0.3, 0.0])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize(("period", "first"), [(1, 1), (2, 1), (2, 3)])
def test_trajectory_of_the_definition(power: float, decay: float, period: int, first: int) -> None:
    lr, b1, b2, eps = 0.1, 0.9, 0.99, 1e-4
    w, m, v, refreshes = START.copy(), np.zeros(3), np.zeros(3), 0
    p = nn.Parameter(torch.tensor(START))
    options = {"hessian_power": power, "update_period": period, "first_estimates": first}
    optimizer = AdaHessian([p], lr, (b1, b2), eps, decay, **options)
    for t in range(6):
        (z,) = signs([p], t)
        optimizer.step(lambda: value(p), probes=[z])
        g = A @ w - np.sin(w)
        if t < first or (t - first + 1) % period == 0:
            D = np.abs(z.numpy() * ((A - np.diag(np.cos(w))) @ z.numpy()))
            v = b2 * v + (1 - b2) * D**2
            refreshes += 1
        m = b1 * m + (1 - b1) * g
        den = (np.sqrt(v) / math.sqrt(1 - b2**refreshes)) ** power + eps
        w = w - lr * (m / (1 - b1 ** (t + 1)) / den + decay * w)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-12, atol=1e-13)


def published(
    net: nn.Module, probes: list[list[Tensor]], x: Tensor, y: Tensor, lr: float = 0.15, decay: float = 5e-4
) -> None:
    """Section 3 of the paper, line by line, with the authors' blocks for convolutional networks."""
    b1, b2, eps = 0.9, 0.999, 1e-4
    params = list(net.parameters())
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    for t, zs in enumerate(probes, 1):
        gs = torch.autograd.grad(cross_entropy(net(x), y), params, create_graph=True)
        hs = torch.autograd.grad(gs, params, zs)
        with torch.no_grad():
            for i, (p, g, h, z) in enumerate(zip(params, gs, hs, zs, strict=True)):
                D = (h * z).abs()
                if D.ndim == 4:
                    D = D.mean((2, 3), keepdim=True).expand_as(p)
                m[i] = b1 * m[i] + (1 - b1) * g
                v[i] = b2 * v[i] + (1 - b2) * D**2
                den = (v[i] / (1 - b2**t)).sqrt() + eps
                p -= lr * (m[i] / (1 - b1**t) / den + decay * p)


def test_trajectory_of_the_paper_on_a_convolutional_network(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 8, 8, dtype=F64, generator=generator).to(home(device))
    y = torch.randint(10, (32,), generator=generator).to(home(device))
    ours, theirs = convolutional(dtype=F64).to(x.device), convolutional(dtype=F64).to(x.device)
    probes = [[z.to(x.device) for z in signs(list(ours.cpu().parameters()), t)] for t in range(20)]
    ours.to(x.device)
    published(theirs, probes, x, y)
    optimizer = AdaHessian(ours.parameters(), 0.15, weight_decay=5e-4)
    for zs in probes:
        optimizer.step(lambda: cross_entropy(ours(x), y), probes=zs)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("package", "name"), [("torch_optimizer", "Adahessian"), ("pytorch_optimizer", "AdaHessian")])
def test_trajectory_of_other_packages(package: str, name: str) -> None:
    """On a sum of functions of one unknown each, where the estimate is exact whatever the probes."""
    peer = getattr(pytest.importorskip(package), name)
    centres = torch.tensor([-2.0, 0.3, 5.0, 1.0], dtype=F64)

    def fun(p: Tensor) -> Tensor:
        return ((p - centres).cosh() + 0.1 * p**4).sum()

    ours, theirs = (nn.Parameter(torch.zeros(4, dtype=F64)) for _ in range(2))
    optimizer = AdaHessian([ours], 0.1, eps=1e-4)
    other = peer([theirs], lr=0.1, betas=(0.9, 0.999), eps=1e-4, hessian_power=1.0)
    for _ in range(50):
        optimizer.step(lambda: fun(ours))
        theirs.grad = None
        fun(theirs).backward(create_graph=True)
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_both_ways_to_the_gradient_agree() -> None:
    by_closure, by_backward, in_closure = mlp(), mlp(), mlp()
    optimizers = [
        AdaHessian(net.parameters(), seed=1, update_period=2) for net in (by_closure, by_backward, in_closure)
    ]

    def backward() -> Tensor:
        optimizers[2].zero_grad()
        loss = loss_of(in_closure)()
        loss.backward(create_graph=optimizers[2].refresh_due)
        return loss

    for _ in range(5):
        first = optimizers[0].step(loss_of(by_closure))
        optimizers[1].zero_grad()
        loss_of(by_backward)().backward(create_graph=optimizers[1].refresh_due)
        assert optimizers[1].step() is None
        third = optimizers[2].step(backward)
        assert all(p.grad is None for p in by_closure.parameters())
        assert all(p.grad is not None and p.grad.grad_fn is None for p in in_closure.parameters())
        assert first is not None
        assert third is not None
        assert not first.requires_grad
        torch.testing.assert_close(first, third, rtol=1e-13, atol=0)
    torch.testing.assert_close(flat(by_closure), flat(by_backward), rtol=1e-12, atol=1e-14)
    assert torch.equal(flat(by_backward), flat(in_closure))


def test_delayed_curvature_has_the_denominators_of_a_constant_hessian() -> None:
    scales = torch.tensor([0.5, 3.0, 40.0], dtype=F64)
    ends = []
    for period in (1, 2, 5):
        p = nn.Parameter(torch.tensor(START))
        optimizer = AdaHessian([p], betas=(0.9, 0.99), update_period=period, first_estimates=1)
        for _ in range(12):
            optimizer.step(lambda p=p: 0.5 * (scales * p * p).sum())
        assert optimizer.state[p]["t_h"] == math.ceil(12 / period)
        ends.append(p.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-12, atol=0)


def test_scaled_unknowns_of_a_diagonal_hessian_take_scaled_steps() -> None:
    S = torch.tensor([1e-3, 0.2, 50.0], dtype=F64)
    curvature = torch.tensor([2.0, 0.3, 7.0], dtype=F64)

    def fun(theta: Tensor) -> Tensor:
        return 0.5 * (curvature * theta**2).sum() + (theta**4).sum()

    def run(make: Callable[[list[Tensor]], Any]) -> tuple[Tensor, Tensor]:
        theta = nn.Parameter(torch.tensor(START))
        phi = nn.Parameter(torch.tensor(START) / S)
        first, second = make([theta]), make([phi])
        for _ in range(30):
            for optimizer, p, scale in ((first, theta, torch.ones(3, dtype=F64)), (second, phi, S)):

                def closure(p: Tensor = p, scale: Tensor = scale) -> Tensor:
                    return fun(scale * p)

                if isinstance(optimizer, AdaHessian):
                    optimizer.step(closure)
                else:
                    optimizer.zero_grad()
                    closure().backward()
                    optimizer.step()
        return theta.detach(), S * phi.detach()

    theta, scaled = run(lambda params: AdaHessian(params, eps=0.0, seed=0))
    torch.testing.assert_close(theta, scaled, rtol=1e-12, atol=0)
    theta, scaled = run(lambda params: torch.optim.Adam(params, lr=0.1, eps=0.0))
    assert not torch.allclose(theta, scaled, rtol=0.1)


# --- blocks ---


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((2, 1, 2, 2), "auto", [2.5, 6.5]),
        ((2, 2, 2), "auto", [1.5, 3.5, 5.5, 7.5]),
        ((2, 1, 2, 2, 1), "auto", [2.5, 6.5]),
        ((8,), "auto", range(1, 9)),
        ((2, 4), "auto", range(1, 9)),
        ((2, 4), "row", [2.5, 6.5]),
        ((8,), "row", range(1, 9)),
        ((4, 2), 4, [2.5, 6.5]),
        ((8,), {1: 8}, [4.5]),
        ((2, 4), {1: 8, 2: "row"}, [2.5, 6.5]),
        ((2, 1, 2, 2), {1: 8}, [2.5, 6.5]),
    ],
)
def test_curvature_is_averaged_over_blocks(shape: tuple[int, ...], block: Any, expected: Any, device: str) -> None:
    h = torch.arange(1.0, 9, dtype=F64, device=home(device)).view(shape)
    p = nn.Parameter(torch.ones(shape, dtype=F64, device=home(device)))
    optimizer = AdaHessian([p], betas=(0.9, 0.0), block=block)
    optimizer.step(lambda: 0.5 * (h * p * p).sum())
    means = optimizer.state[p]["v"].sqrt().reshape(-1).tolist()
    assert means == pytest.approx(list(expected), rel=1e-14)


@pytest.mark.parametrize("block", [1, 3, 9, 30, 48, 1000, 12000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_passes_of_many_sizes(block: int, dtype: torch.dtype, device: str) -> None:
    """Lists of tensors of odd sizes, more than a chunk among them, against torch."""
    tolerance = 1e-13 if dtype == F64 else 2e-6
    generator = torch.Generator().manual_seed(block)
    counts = [1, 0, 5] if block > 100 else [1, 3, 0, 500]
    params = [nn.Parameter(torch.randn(n * block, dtype=dtype, generator=generator).to(home(device))) for n in counts]
    scales = [torch.randn(p.shape, dtype=F64, generator=generator).to(p.device) for p in params]
    expected = [p.detach().double() for p in params]
    optimizer = AdaHessian(params, lr=0.01, betas=(0.8, 0.9), block=block, weight_decay=0.1, hessian_power=0.5)
    for _ in range(2):
        optimizer.step(lambda: sum(0.5 * (s * p * p).sum() for s, p in zip(scales, params, strict=True)))  # type: ignore
    for p, w, s in zip(params, expected, scales, strict=True):
        m = torch.zeros_like(w)
        D = s.abs().view(-1, block).mean(1, keepdim=True).expand(-1, block).reshape(-1)
        for t in (1, 2):
            m = 0.8 * m + 0.2 * s * w
            w -= 0.01 * (m / (1 - 0.8**t) / (D.sqrt() + 1e-4) + 0.1 * w)
        torch.testing.assert_close(p.detach().double(), w, rtol=tolerance, atol=tolerance)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    ends = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(300, 9, 13, generator=generator))
        c = torch.randn(300, 9, 13, generator=generator)
        optimizer = AdaHessian([p], seed=0)
        for _ in range(3):
            optimizer.step(lambda p=p, c=c: (c * p.sin()).flatten().sum())
        ends.append(p.detach())
    torch.set_num_threads(2)
    assert torch.equal(*ends)


# --- probes ---


def test_probes_are_fair_signs_and_the_same_on_every_device(device: str) -> None:
    like = [torch.empty(n, device=home(device)) for n in (100_003, 4096, 1, 0)]
    counters = [(i, 7, 1) for i in range(4)]
    z = rademacher(like, 123, counters)
    assert all(bool((each.abs() == 1).all()) for each in z)
    assert abs(float(z[0].mean())) < 4 / math.sqrt(100_003)
    assert abs(float((z[0][:-1] * z[0][1:]).mean())) < 4 / math.sqrt(100_003)
    # Philox4x32-10 in Python's integers, bit by bit
    for k in (0, 1, 127, 128, 5000, 100_002):
        assert float(z[0][k]) == philox_sign(123, k, counters[0])
    (alone,) = rademacher([like[1].double()], 123, [counters[1]])
    assert torch.equal(alone.float(), z[1])


def philox_sign(seed: int, element: int, counter: tuple[int, int, int]) -> float:
    c = [element // 128, *counter]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return -1.0 if c[element % 128 // 32] >> (element % 32) & 1 else 1.0


def test_probes_belong_to_positions_not_to_groups() -> None:
    whole, parts = mlp(), mlp()
    first = AdaHessian(whole.parameters(), seed=5)
    pieces = [{"params": layer.parameters()} for layer in parts if isinstance(layer, nn.Linear)]
    second = AdaHessian(pieces, seed=5)
    other = mlp()
    third = AdaHessian(other.parameters(), seed=6)
    for _ in range(3):
        for optimizer, net in ((first, whole), (second, parts), (third, other)):
            optimizer.step(loss_of(net))
    assert torch.equal(flat(whole), flat(parts))
    assert not torch.equal(flat(whole), flat(other))


def test_seed_comes_from_a_generator() -> None:
    ends = []
    for seed in (1, 1, 2):
        net = mlp()
        optimizer = AdaHessian(net.parameters(), generator=torch.Generator().manual_seed(seed))
        optimizer.step(loss_of(net))
        ends.append(flat(net))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_samples_average_signed_products() -> None:
    """|mean z * Hz|, not mean |z * Hz|: with many samples the diagonal itself."""
    p = nn.Parameter(torch.zeros(3, dtype=F64))
    optimizer = AdaHessian([p], betas=(0.9, 0.0), n_samples=400, seed=0)
    optimizer.step(lambda: value(p))
    H = A - np.eye(3)
    error = optimizer.state[p]["v"].sqrt().numpy() - np.diag(H)
    deviation = np.sqrt((H**2).sum(1) - np.diag(H) ** 2)
    assert (np.abs(error) < 4 * deviation / 20).all()
    assert np.abs(error).max() > 0


# --- precision and layout ---


def test_float32_follows_float64() -> None:
    ends = []
    for dtype in (torch.float32, F64):
        p = nn.Parameter(torch.tensor(START, dtype=dtype))
        optimizer = AdaHessian([p], lr=0.05)
        for t in range(100):
            z = signs([p], t)
            optimizer.step(lambda p=p: value(p), probes=z)
        ends.append(p.detach().double())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_half_precision_keeps_its_state_in_float32() -> None:
    net = mlp(dtype=torch.bfloat16)
    optimizer = AdaHessian(net.parameters(), lr=0.15, seed=0)
    losses = [float(optimizer.step(loss_of(net, torch.bfloat16))) for _ in range(40)]  # type: ignore[arg-type]
    assert losses[-1] < 0.5 * losses[0]
    second = AdaHessian(net.parameters())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, second):
        for p, state in each.state.items():
            assert p.dtype == torch.bfloat16
            assert state["m"].dtype == state["v"].dtype == torch.float32
    p = next(net.parameters())
    assert torch.equal(optimizer.state[p]["m"], second.state[p]["m"])
    assert bool((optimizer.state[p]["m"] != optimizer.state[p]["m"].bfloat16().float()).any())


def test_parameters_in_another_order_of_memory(device: str) -> None:
    rows, last = convolutional(dtype=F64), convolutional(dtype=F64).to(memory_format=torch.channels_last)
    x = torch.randn(4, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0)).to(home(device))
    for net in (rows, last):
        net.to(home(device))
        optimizer = AdaHessian(net.parameters(), seed=0)
        for _ in range(3):
            optimizer.step(lambda net=net: net(x).square().sum())
    assert not last[2].weight.is_contiguous()
    torch.testing.assert_close(flat(rows), flat(last), rtol=1e-8, atol=1e-8)


def test_autograd_notices_that_parameters_changed() -> None:
    p = nn.Parameter(torch.ones(3, dtype=F64))
    kept = (p * p).sum()
    AdaHessian([p]).step(lambda: value(p))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


# --- a training loop ---


def test_no_graph_outlives_a_step() -> None:
    net = mlp(dtype=torch.float32)
    optimizer = AdaHessian(net.parameters(), lr=0.01)

    def live() -> int:
        tensors = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        return sum(t.numel() * t.element_size() for t in tensors)

    gc.collect()
    gc.disable()  # what needs the collector is a leak
    try:
        sizes = []
        for number in range(1, 201):
            optimizer.zero_grad()
            loss_of(net, torch.float32)().backward(create_graph=True)
            optimizer.step()
            assert all(p.grad is not None and p.grad.grad_fn is None for p in net.parameters())
            if number in (10, 200):
                sizes.append(live())
    finally:
        gc.enable()
    assert sizes[0] == sizes[1]


def test_saved_state_continues_bit_by_bit() -> None:
    whole, part = mlp(), mlp()
    optimizer, first = (AdaHessian(net.parameters(), n_samples=2, update_period=3, seed=9) for net in (whole, part))
    for _ in range(4):
        optimizer.step(loss_of(whole))
        first.step(loss_of(part))
    other = mlp(1)
    other.load_state_dict(part.state_dict())
    second = AdaHessian(other.parameters(), lr=1.0)
    saved = first.state_dict()
    second.load_state_dict(saved)
    for _ in range(10):
        optimizer.step(loss_of(whole))
        second.step(loss_of(other))
    assert torch.equal(flat(whole), flat(other))
    assert saved["state"][0]["t"] == 4  # and what was loaded has not changed
    assert torch.equal(saved["state"][0]["m"], first.state[next(part.parameters())]["m"])
    duplicate = copy.deepcopy(second)
    assert duplicate.param_groups[0]["update_period"] == 3


def test_state_of_other_parameters_is_refused_and_nothing_is_lost() -> None:
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    optimizer, other = AdaHessian([p]), AdaHessian([q])
    for each, parameter in ((optimizer, p), (other, q)):
        each.step(lambda parameter=parameter: parameter.pow(4).sum())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"params\[0\]: expected a state of shape \(2, 3\), got \(3, 2\)"):
        optimizer.load_state_dict(other.state_dict())
    blocks = AdaHessian([p], block=2)
    blocks.step(lambda: p.pow(4).sum())
    saved = blocks.state_dict()
    saved["param_groups"][0]["block"] = 3
    with pytest.raises(ValueError, match="v with 2 entries"):
        optimizer.load_state_dict(saved)
    sgd = torch.optim.SGD([p], momentum=0.9)
    p.grad = torch.ones_like(p)
    sgd.step()
    saved = sgd.state_dict()
    with pytest.raises(ValueError, match="group without"):
        optimizer.load_state_dict(saved)
    saved["param_groups"] = copy.deepcopy(before["param_groups"])
    with pytest.raises(ValueError, match="state of AdaHessian, got one without age, idle, m, t, t_h, v"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["m"], before["state"][0]["m"])


def test_options_of_groups_schedulers_and_maximize() -> None:
    p, q = (nn.Parameter(torch.tensor(START)) for _ in range(2))
    optimizer = AdaHessian([{"params": [p], "lr": 0.0}, {"params": [q], "maximize": True}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        before = value(q).detach()
        optimizer.step(lambda: value(p) + value(q))
        assert value(q) > before
        scheduler.step()
    assert torch.equal(p.detach(), torch.tensor(START))
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 / 8)
    minimise = nn.Parameter(torch.tensor(START))
    AdaHessian([minimise], lr=0.1, seed=0).step(lambda: -value(minimise))
    maximise = nn.Parameter(torch.tensor(START))
    AdaHessian([maximise], lr=0.1, seed=0, maximize=True).step(lambda: value(maximise))
    torch.testing.assert_close(minimise, maximise, rtol=0, atol=0)


def test_clipped_gradients_keep_their_curvature() -> None:
    net = mlp()
    optimizer = AdaHessian(net.parameters(), seed=0)
    loss_of(net)().backward(create_graph=True)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    optimizer.step()
    state = optimizer.state[net[0].weight]
    same = mlp()
    reference = AdaHessian(same.parameters(), seed=0)
    reference.step(loss_of(same))
    expected = reference.state[same[0].weight]
    torch.testing.assert_close(state["v"], expected["v"], rtol=1e-10, atol=0)
    torch.testing.assert_close(state["m"], expected["m"] * (1e-3 / (norm.detach() + 1e-6)), rtol=1e-10, atol=0)


@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_losses(unscale: bool) -> None:
    plain, scaled = mlp(), mlp()
    first, second = (AdaHessian(net.parameters(), seed=0) for net in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for _ in range(5):
        first.step(loss_of(plain))
        second.zero_grad()
        scaler.scale(loss_of(scaled)()).backward(create_graph=True)
        if unscale:
            scaler.unscale_(second)
            scaler.step(second, grad_scale=scaler.get_scale())
        else:
            scaler.step(second)
        scaler.update()
    torch.testing.assert_close(flat(plain), flat(scaled), rtol=1e-10, atol=1e-12)
    before, state = flat(scaled), copy.deepcopy(second.state_dict())
    second.zero_grad()
    scaler.scale(loss_of(scaled)() * math.inf).backward(create_graph=True)
    scaler.step(second)
    assert second.last_step_skipped
    assert torch.equal(flat(scaled), before)
    assert second.state_dict()["state"][0]["t"] == state["state"][0]["t"]
    assert all(p.grad is not None and p.grad.grad_fn is None for p in scaled.parameters())


def test_unscaled_gradients_need_the_scale_of_their_graph() -> None:
    net = mlp()
    optimizer, scaler = AdaHessian(net.parameters()), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(net)()).backward(create_graph=True)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="grad_scale"):
        scaler.step(optimizer)


def test_values_that_are_not_finite() -> None:
    p = nn.Parameter(torch.ones(3, dtype=F64))
    optimizer = AdaHessian([p], skip_nonfinite=True)
    optimizer.step(lambda: value(p))
    before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
    optimizer.step(lambda: value(p) * math.nan)
    assert optimizer.last_step_skipped
    assert torch.equal(p.detach(), before)
    after = optimizer.state_dict()["state"][0]
    assert all(torch.equal(torch.as_tensor(after[k]), torch.as_tensor(v)) for k, v in state["state"][0].items())
    optimizer.step(lambda: value(p))
    assert not optimizer.last_step_skipped
    assert bool(torch.isfinite(p).all())
    steep = nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([steep], skip_nonfinite=True)
    optimizer.step(lambda: 1e25 * steep.square().sum())  # finite, but not its square
    assert optimizer.last_step_skipped
    assert not optimizer.state
    taken = AdaHessian([p])
    taken.step(lambda: value(p) * math.nan)
    assert bool(torch.isnan(p).all())


def test_parameters_without_gradient_or_curvature() -> None:
    used, linear, idle = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(3))
    frozen = nn.Parameter(torch.ones(2, dtype=F64), requires_grad=False)
    optimizer = AdaHessian([used, linear, idle, frozen], lr=0.1, weight_decay=0.5, max_update=3.0)
    for _ in range(3):
        optimizer.step(lambda: used.pow(4).sum() + 5 * linear.sum())
    for p in (idle, frozen):
        assert torch.equal(p.detach(), torch.ones(2, dtype=F64))
        assert not optimizer.state.get(p)
    expected = 1.0
    for _ in range(3):  # m / eps is beyond the bound
        expected -= 0.1 * (3.0 + 0.5 * expected)
    torch.testing.assert_close(linear.detach(), torch.full((2,), expected, dtype=F64))
    unbounded = nn.Parameter(torch.ones(2, dtype=F64))
    AdaHessian([unbounded], lr=0.1).step(lambda: 5 * unbounded.sum())
    torch.testing.assert_close(unbounded.detach(), torch.full((2,), 1 - 0.1 * 5 / 1e-4, dtype=F64))
    still = nn.Parameter(torch.ones(2, dtype=F64))
    AdaHessian([still], lr=0.1, eps=0.0).step(lambda: 5 * still.sum())
    assert torch.equal(still.detach(), torch.ones(2, dtype=F64))
    nothing = AdaHessian([nn.Parameter(torch.ones(2))])
    assert nothing.step() is None


def test_a_late_parameter_waits_for_curvature() -> None:
    early, late = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
    optimizer = AdaHessian([early, late], update_period=2, first_estimates=1)
    optimizer.step(lambda: early.pow(4).sum())
    optimizer.step(lambda: early.pow(4).sum() + late.pow(4).sum())
    assert torch.equal(late.detach(), torch.ones(2, dtype=F64))
    optimizer.step(lambda: early.pow(4).sum() + late.pow(4).sum())
    assert optimizer.state[late]["t"] == optimizer.state[late]["t_h"] == 1
    assert bool((late < 1).all())


def test_no_parameter_is_left_without_curvature() -> None:
    """Whichever has a gradient when: a new one beside a frozen one, and one that is used between estimates only."""
    first, later = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
    optimizer = AdaHessian([first, later], 0.05, update_period=5, first_estimates=1)
    for _ in range(7):
        optimizer.step(lambda: first.pow(4).sum())
    first.requires_grad_(False)
    due = []
    for _ in range(16):
        due.append(optimizer.refresh_due)
        optimizer.step(lambda: first.pow(4).sum() + later.pow(4).sum())
    assert optimizer.state[later]["t"] == 15
    assert due == [i == 1 or (i > 1 and i % 5 == 1) for i in range(16)]
    even, odd = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
    optimizer = AdaHessian([even, odd], update_period=2, first_estimates=1)
    for i in range(12):
        optimizer.step(lambda p=(even, odd)[i % 2]: p.pow(4).sum())
    assert all(optimizer.state[p]["t_h"] >= optimizer.state[p]["t"] / 2 > 2 for p in (even, odd))


def test_compiled_models() -> None:
    net, compiled = mlp(), mlp()
    first, second = AdaHessian(net.parameters(), seed=0), AdaHessian(compiled.parameters(), seed=0)
    model = torch.compile(compiled, backend="eager")
    for _ in range(3):
        first.step(loss_of(net))
        second.step(lambda: cross_entropy(model(X), Y))
    torch.testing.assert_close(flat(net), flat(compiled), rtol=1e-12, atol=1e-14)
    model = torch.compile(mlp(), backend="aot_eager")
    with pytest.raises(RuntimeError, match="backend='eager'"):
        AdaHessian(model.parameters()).step(lambda: cross_entropy(model(X), Y))


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -0.1}, "lr: expected a number >= 0, got -0.1"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"betas": (1.0, 0.9)}, r"betas: .* got \(1.0, 0.9\)"),
        ({"betas": (0.9, -0.1)}, "betas"),
        ({"hessian_power": 1.5}, "hessian_power"),
        ({"update_period": 0}, "update_period"),
        ({"first_estimates": 0}, "first_estimates"),
        ({"n_samples": 0}, "n_samples"),
        ({"max_update": 0.0}, "max_update"),
        ({"lr": "0.1"}, "lr: expected a number >= 0, got '0.1'"),
        ({"betas": ("a", "b")}, "betas"),
        ({"process_group": "all"}, "process_group"),
        ({"seed": -1}, "seed"),
        ({"block": 4}, r"params\[0\]: block: expected a divisor of the 6 entries of shape \(2, 3\), got 4"),
        ({"block": "column"}, "block"),
        ({"block": {2: 5}}, "block"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdaHessian([nn.Parameter(torch.ones(2, 3))], **options)


def test_bad_parameters_and_gradients() -> None:
    real, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(NotImplementedError, match=r"params\[1\]"):
        AdaHessian([real, other])
    with pytest.raises(RuntimeError, match=r"params\[0\].*dense"):
        AdaHessian([nn.Parameter(torch.eye(2).to_sparse())])
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = AdaHessian(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"params\[0\].*sparse=False"):
        optimizer.step()
    with pytest.raises(ValueError, match="update_period.*same for all groups"):
        AdaHessian([{"params": [real], "update_period": 2}])
    optimizer = AdaHessian([real])
    with pytest.raises(NotImplementedError):
        optimizer.add_param_group({"params": [other]})
    assert len(optimizer.param_groups) == 1


def test_missing_graphs_name_both_ways() -> None:
    net = mlp()
    optimizer = AdaHessian(net.parameters())
    loss_of(net)().backward()
    with pytest.raises(RuntimeError, match=r"step\(closure\).*create_graph=True"):
        optimizer.step()
    with pytest.raises(ValueError, match="scalar"):
        optimizer.step(lambda: net(X))
    with pytest.raises(TypeError, match="scalar"):
        optimizer.step(lambda: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="probes: expected a list"):
        optimizer.step(loss_of(net), probes=iter([X]))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no graph"):
        optimizer.step(lambda: net(X).sum().detach())
    for probes, match in (
        ([torch.ones(3)], "8 tensors, got 1"),
        ([torch.ones(1, dtype=F64)] * 8, r"probes\[0\]: expected \(8, 5\)"),
        ([torch.ones(p.shape) for p in net.parameters()], "float32"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.step(loss_of(net), probes=probes)
    assert all(not state for state in optimizer.state.values())


def test_attention_is_told_of_a_way_out() -> None:
    q = nn.Parameter(torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    optimizer = AdaHessian([q])

    def closure() -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q).square().sum()

    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(.*MATH\)"):
        optimizer.step(closure)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert optimizer.step(closure) is not None


def test_copies_average_over_the_same_ranks() -> None:
    optimizer = AdaHessian([nn.Parameter(torch.ones(2))], process_group=None)
    assert copy.deepcopy(optimizer)._process_group is None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_operation_without_second_derivative_is_named() -> None:
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdaHessian([("fine", p), ("coarse", q)])
    with pytest.raises(RuntimeError, match=r"params\[1\] \(coarse\).*once_differentiable"):
        optimizer.step(lambda: p.pow(4).sum() + Once.apply(q).square().sum())
    assert torch.equal(p, torch.ones(2))


# --- the figures of the paper's kind ---


@pytest.mark.slow
def test_training_on_digits(size: str, request: pytest.FixtureRequest) -> None:
    """Both rates end below 0.05; the better is as good as the best of Adam's."""
    datasets = pytest.importorskip("sklearn.datasets")
    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # small: a second thread only waits
    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)

    def train(make: Callable[[Any], Any], seed: int, epochs: int) -> tuple[float, float]:
        net = convolutional(seed)
        optimizer = make(net.parameters())
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for batch in torch.randperm(1400, generator=generator).split(128):

                def closure(batch: Tensor = batch) -> Tensor:
                    return cross_entropy(net(x[batch]), y[batch])

                if isinstance(optimizer, AdaHessian):
                    optimizer.step(closure)
                else:
                    optimizer.zero_grad()
                    closure().backward()
                    optimizer.step()
        with torch.no_grad():
            loss = float(cross_entropy(net(x[:1400]), y[:1400]))
            return loss, float((net(x[1400:]).argmax(1) == y[1400:]).double().mean())

    if size == "small":
        loss, accuracy = train(lambda params: AdaHessian(params, 0.15, seed=0), 0, 5)
        assert loss < 0.1
        assert accuracy > 0.88
        return
    for seed in range(2):
        ours = [train(lambda params, lr=lr: AdaHessian(params, lr, seed=0), seed, 15) for lr in (0.05, 0.15)]
        adams = [train(lambda params, lr=lr: torch.optim.Adam(params, lr), seed, 15) for lr in (0.001, 0.003, 0.01)]
        assert max(loss for loss, _ in ours) < 0.05
        assert min(loss for loss, _ in ours) <= 2 * min(loss for loss, _ in adams)
        assert max(accuracy for _, accuracy in ours) >= max(accuracy for _, accuracy in adams) - 0.01
    for lr in (0.05, 0.1, 0.15):  # a fifth of the estimates
        each, fifth = (
            sum(
                train(lambda params, lr=lr, p=p: AdaHessian(params, lr, seed=0, update_period=p), s, 15)[0]
                for s in range(3)
            )
            for p in (1, 5)
        )
        assert fifth <= 1.3 * each, lr
