"""LANTON: its steps against plain loops and Muon, its noise estimates and factors, torch's conventions."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import devices
from kantor.linalg import msign
from kantor.optim import LANTON, AdaHessian, dual_norm, lmo, lmo_param_groups
from two_ranks import two_ranks

F32, F64 = torch.float32, torch.float64
Params = list[nn.Parameter]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = F64, device: str = "cpu") -> Params:
    return [nn.Parameter(normal(*shape, seed=i, dtype=dtype).to(device)) for i, shape in enumerate(shapes)]


def set_gradients(params: Params, step: int, scale: float = 1.0) -> list[Tensor]:
    grads = [scale * normal(*p.shape, seed=100 * step + i, dtype=p.dtype) for i, p in enumerate(params)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.device)
    return grads


# --- against loops ---

MIXED = [(6, 9), (9, 6), (4, 3, 2, 2), (8,), (70, 80), (5, 7)]
MIXED_KINDS = ["spectral", "sign", "spectral_conv", "rms", "spectral", "row"]


class Loop:
    """Algorithm 1, tensor by tensor."""

    def __init__(
        self, params: Params, kinds: list[str], *, lr: float, alpha: float, nesterov: bool, every: int
    ) -> None:
        self.X = [p.detach().clone() for p in params]
        self.kinds, self.lr, self.alpha, self.nesterov, self.every = kinds, lr, alpha, nesterov, every
        self.t = 0
        self.B: list[Tensor] = []
        self.before: list[Tensor] = []
        self.H: list[float] = []
        self.factors = [1.0] * len(params)

    def step(self, grads: list[Tensor], beta1: float = 0.95, beta2: float = 0.9, wd: float = 0.1) -> None:
        self.t += 1
        self.B = [beta1 * b + (1 - beta1) * g for b, g in zip(self.B, grads, strict=True)] if self.B else grads
        if self.t >= 2 and (self.t - 2) % self.every == 0:
            pairs = zip(grads, self.before, self.kinds, strict=True)
            new = [float(dual_norm(g - before, kind)) ** 2 for g, before, kind in pairs]
            b = beta2**self.every
            self.H = [b * h + (1 - b) * n for h, n in zip(self.H, new, strict=True)] if self.H else new
            a = [self.alpha / math.sqrt(self.alpha**2 + h) for h in self.H]
            for i, kind in enumerate(self.kinds):
                best = max(a[j] for j in range(len(a)) if self.kinds[j] == kind)
                self.factors[i] = max(math.sqrt(a[i] / best), 1e-2)
        if (self.t - 1) % self.every == 0:
            self.before = grads
        for i, (B, g, kind) in enumerate(zip(self.B, grads, self.kinds, strict=True)):
            rate = self.lr * self.factors[i]
            along = beta1 * B + (1 - beta1) * g if self.nesterov else B
            self.X[i] = (1 - rate * wd) * self.X[i] - rate * lmo(along, kind, method="svd")


@pytest.mark.parametrize(("nesterov", "every"), [(False, 1), (True, 3)])
def test_steps_are_those_of_the_loop(nesterov: bool, every: int, device: str) -> None:
    params = parameters(MIXED, device=devices.home(device))
    loop = Loop(
        [nn.Parameter(p.detach().cpu()) for p in params], MIXED_KINDS, lr=0.1, alpha=2.0, nesterov=nesterov, every=every
    )
    groups = [{"params": [p], "kind": kind} for p, kind in zip(params, MIXED_KINDS, strict=True)]
    optimizer = LANTON(
        groups, 0.1, alpha=2.0, scale=1.0, weight_decay=0.1, nesterov=nesterov, noise_every=every, msign_method="svd"
    )
    for step in range(5):
        loop.step(set_gradients(params, step))
        optimizer.step()
    for p, expected, factor in zip(params, loop.X, loop.factors, strict=True):
        torch.testing.assert_close(p.detach().cpu(), expected, rtol=1e-12, atol=1e-12)
        assert abs(float(optimizer.state[p]["factor"]) - factor) < 1e-12
    assert [float(optimizer.state[p]["noise"]) for p in params] == pytest.approx(loop.H, rel=1e-12)


@pytest.mark.parametrize("device_name", ["cpu", "emulated"])
def test_float32_steps_agree_everywhere(device_name: str) -> None:
    devices.require(device_name)
    shapes = [(40, 30), (10,), (3, 2, 3, 3), (20, 4100)] + [(2, 2)] * 40  # several chunks; several launches
    results = []
    for name in ("cpu", device_name):
        params = parameters(shapes, F32)
        optimizer = LANTON([(f"{'embed' if i % 2 else 'x'}.{i}", p) for i, p in enumerate(params)], 0.1, noise_every=1)
        with devices.on(name):
            for step in range(3):
                set_gradients(params, step)
                optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["muon5", "svd"])
def test_without_noise_it_is_muon(method: str) -> None:
    shape = (24, 40)
    ours, theirs = nn.Parameter(normal(*shape, dtype=F32)), nn.Parameter(normal(*shape, dtype=F32))
    ratio = shape[0] / shape[1]
    optimizer = LANTON(
        [ours], 0.02, kind="spectral", scale=math.sqrt(max(1.0, ratio) / ratio), weight_decay=0.1, nesterov=True,
        msign_method=method, matmul_dtype=torch.bfloat16, noise_adaptive=False,
    )  # fmt: skip
    muon = torch.optim.Muon([theirs], 0.02, weight_decay=0.1)
    expected, B = theirs.detach().double(), torch.zeros(shape, dtype=F64)
    for step in range(20):
        g = normal(*shape, seed=step + 1, dtype=F32)
        ours.grad, theirs.grad = g, g.clone()
        optimizer.step()
        muon.step()
        B = 0.95 * B + 0.05 * g.double()
        expected = (1 - 0.002) * expected - 0.02 * msign(0.95 * B + 0.05 * g.double(), method="svd")
        if step == 0:
            optimizer.state[ours]["momentum"].mul_(0.05)  # Muon's momentum starts at 0, ours at the first gradient
    if method == "svd":
        torch.testing.assert_close(ours.detach().double(), expected, rtol=0, atol=1e-6)
    else:
        moved = (theirs.detach() - normal(*shape, dtype=F32)).norm()
        assert (ours - theirs).norm() <= 1e-2 * moved


# --- noise ---


def test_factors_of_known_noise() -> None:
    params = parameters([(3,), (3,), (3,), (2, 2)])
    optimizer = LANTON(params, 1.0, alpha=0.5, noise_every=1, kind="auto")
    for p in params:
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[0] = 1.0
    optimizer.step()
    assert all(math.isnan(entry.noise) and entry.factor == 1 for entry in optimizer.noise_report().values())
    for i, p in enumerate(params):
        p.grad.view(-1)[1] = 2.0**i  # type: ignore[union-attr]
    optimizer.step()
    H = [3 * 4.0**i for i in range(3)]
    a = [0.5 / math.sqrt(0.25 + h) for h in H]
    report = optimizer.noise_report()
    assert [report[f"0.{i}"].noise for i in range(3)] == pytest.approx(H, rel=1e-12)
    assert [report[f"0.{i}"].factor for i in range(3)] == pytest.approx([math.sqrt(x / a[0]) for x in a], abs=1e-12)
    assert report["0.0"].factor == 1.0
    assert report["0.3"].factor == 1.0  # the only one of its kind
    assert report["0.3"].kind == "spectral"


def test_limits_of_alpha() -> None:
    for alpha, expected in ((1e9, [1.0, 1.0]), (1e-9, [1.0, 0.5])):
        params = parameters([(3,), (3,)])
        optimizer = LANTON(params, 1.0, alpha=alpha, noise_every=1)
        for step in range(2):
            for p, noise in zip(params, (1.0, 4.0), strict=True):
                p.grad = torch.tensor([1.0, step * noise, 0.0], dtype=F64)
            optimizer.step()
        factors = [entry.factor for entry in optimizer.noise_report().values()]
        assert factors == pytest.approx(expected, rel=1e-8)  # (1/16)^(1/4)


def test_min_factor_clips() -> None:
    params = parameters([(3,), (3,)])
    optimizer = LANTON(params, 1.0, noise_every=1, min_factor=0.9)
    for step in range(3):
        set_gradients(params, step)
        params[1].grad *= 1000  # type: ignore[operator]
        optimizer.step()
    assert optimizer.noise_report()["0.1"].factor == 0.9


def test_the_scale_of_the_loss_does_not_matter() -> None:
    results = []
    for scale in (1.0, 1000.0):
        params = parameters([(6, 5), (5, 5), (4,), (3,)], F32)
        optimizer = LANTON(params, 0.05, noise_every=1)
        for step in range(8):
            set_gradients(params, step, scale)
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in params]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("estimator", "method"), [("nuclear", "polar"), ("frobenius", "muon5")])
def test_noise_is_recovered(estimator: str, method: str) -> None:
    sigma = [10 ** (i / 4) for i in range(4)]
    shape = (24, 24)
    params = [nn.Parameter(torch.zeros(shape)) for _ in sigma]
    optimizer = LANTON(
        params, 0.0, alpha=1e-9, beta2=0.99, noise_every=1, noise_estimator=estimator, msign_method=method
    )
    generator = torch.Generator().manual_seed(0)
    # The Frobenius norm is scaled by the momentum's ratio of norms, which is that of the noise where that dominates.
    mean = torch.full(shape, float(estimator == "nuclear"))
    for _ in range(300):
        for p, s in zip(params, sigma, strict=True):
            p.grad = mean + s * torch.randn(shape, generator=generator)
        optimizer.step()
    H = [entry.noise for entry in optimizer.noise_report().values()]
    assert [math.sqrt(h / H[0]) for h in H] == pytest.approx(sigma, rel=0.05)
    factors = [entry.factor for entry in optimizer.noise_report().values()]
    assert factors == pytest.approx([s**-0.5 for s in sigma], rel=0.03)


def test_independent_gradients() -> None:
    params = parameters([(3,), (2, 3)])
    optimizer = LANTON(params, 0.1, second_gradient="independent", noise_every=2)
    grads = set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="second_grads"):
        optimizer.step()
    assert not optimizer.state
    second = [normal(*p.shape, seed=77 + i) for i, p in enumerate(params)]
    with pytest.raises(ValueError, match="expected shape"):
        optimizer.step(second_grads=[torch.ones(4), torch.ones(4)])
    with pytest.raises(ValueError, match="2 parameters"):
        optimizer.step(second_grads=second[:1])
    optimizer.step(second_grads=second)
    for p, g, s, kind in zip(params, grads, second, ("rms", "spectral"), strict=True):
        assert float(optimizer.state[p]["noise"]) == pytest.approx(float(dual_norm(g - s, kind)) ** 2, rel=5e-3)
        assert "previous" not in optimizer.state[p]
    set_gradients(params, 1)
    optimizer.step()  # measures every second step
    known = [optimizer.state[p]["noise"].clone() for p in params]
    optimizer.step(second_grads=[torch.full_like(p, torch.nan) for p in params])  # measured, but says nothing
    assert [optimizer.state[p]["noise"] for p in params] == known


def test_second_gradients_of_other_sorts() -> None:
    params = parameters([(3,)])
    set_gradients(params, 0)
    optimizer = LANTON(params, 0.1, second_gradient="independent")
    for second in (5, torch.ones(1, 3), [[1.0]], [torch.ones(3).to_sparse()], [torch.ones(3, dtype=torch.int64)]):
        with pytest.raises(TypeError, match="second_grads"):
            optimizer.step(second_grads=second)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no group uses them"):
        LANTON(params, 0.1).step(second_grads=[torch.ones(3)])


# --- torch's conventions ---


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))


def advance(net: nn.Module, optimizer: LANTON, first: int, last: int) -> None:
    for step in range(first, last):
        x = normal(16, 4, seed=step, dtype=F32)
        optimizer.zero_grad()
        (net(x).squeeze(-1) - x[:, 0] * x[:, 1]).square().mean().backward()
        optimizer.step()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in net.parameters()])


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_resumed_run_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    def made(net: nn.Module) -> LANTON:
        return LANTON(lmo_param_groups(net), 0.02, noise_every=3, weight_decay=0.01)

    whole, part, other = (network().to(dtype) for _ in range(3))
    for net in (whole, part, other):
        net.register_forward_pre_hook(lambda _, args: (args[0].to(dtype),))
    optimizer, first = made(whole), made(part)
    advance(whole, optimizer, 0, 9)
    advance(part, first, 0, 4)
    other.load_state_dict(part.state_dict())
    second = made(other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(other, second, 4, 9)
    assert torch.equal(flat(whole), flat(other))
    assert optimizer.noise_report() == second.noise_report()


def test_a_copied_optimiser_goes_on() -> None:
    net = network()
    optimizer = LANTON(lmo_param_groups(net), 0.02)
    advance(net, optimizer, 0, 3)
    twin_net, twin = copy.deepcopy((net, optimizer))
    advance(net, optimizer, 3, 6)
    advance(twin_net, twin, 3, 6)
    assert torch.equal(flat(net), flat(twin_net))


def test_the_state_of_another_model_is_refused() -> None:
    net, other = network(), nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer, stranger = LANTON(net.parameters(), 0.02), LANTON(other.parameters(), 0.02)
    advance(net, optimizer, 0, 2)
    with pytest.raises(ValueError, match="another model"):
        stranger.load_state_dict(optimizer.state_dict())
    assert not stranger.state


def test_the_state_of_another_optimiser_is_refused_and_nothing_is_lost() -> None:
    net = network()
    optimizer = LANTON(net.parameters(), 0.02)
    advance(net, optimizer, 0, 2)
    before = copy.deepcopy(optimizer.state_dict())
    adam = torch.optim.Adam(net.parameters())
    adam.step()
    of_adam = adam.state_dict()
    mixed = {"state": of_adam["state"], "param_groups": before["param_groups"]}
    bent = copy.deepcopy(before)
    bent["param_groups"][0]["kinds"][0] = "row_conv"
    for wrong, match in (
        (of_adam, "that of a LANTON, got a group without alpha"),
        (mixed, "parameter 0: expected a state of LANTON, got one without accepted, factor, momentum"),
        (bent, "parameter 0: kind: expected one of spectral"),
        (net.state_dict(), "'state' and 'param_groups'.*got '0.weight'"),
        ({}, "got nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(wrong)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["momentum"], before["state"][0]["momentum"])
    advance(net, optimizer, 2, 3)


@pytest.mark.parametrize(("make", "name"), [(lambda p: LANTON(p, 0.02), "momentum"), (lambda p: AdaHessian(p), "m")])
def test_hooks_see_and_change_what_is_loaded(make: Any, name: str) -> None:
    net = nn.Linear(4, 1).bfloat16()
    optimizer, other = make(net.parameters()), make(net.parameters())
    optimizer.step(lambda: (net(torch.ones(2, 4).bfloat16()) ** 2).sum())
    net(torch.ones(2, 4).bfloat16()).square().sum().backward(create_graph=True)
    optimizer.step()
    value = 1 + 2.0**-20  # more than bfloat16 holds

    def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0][name].fill_(value)
        return state_dict

    seen = []
    other.register_load_state_dict_pre_hook(before)
    other.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[net.weight][name][0, 0])))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [value]
    assert float(other.state[net.weight][name][0, 0]) == value


def test_later_parameters_have_their_own_state() -> None:
    params = parameters([(4, 4), (3,)])
    optimizer = LANTON(params[:1], 0.1, noise_every=2)
    set_gradients(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:], "lr": 0.01})
    set_gradients(params, 1)
    optimizer.step()
    assert [optimizer.state[p]["step"] for p in params] == [2, 1]
    assert math.isnan(optimizer.state[params[1]]["noise"])
    with pytest.raises(ValueError, match="spectral"):
        optimizer.add_param_group({"params": parameters([(2,)]), "kind": "spectral"})
    assert len(optimizer.param_groups) == 2


def test_schedulers_maximize_closures_and_versions() -> None:
    up, down = parameters([(3, 3), (3,)]), parameters([(3, 3), (3,)])
    climbing, falling = LANTON(up, 0.1, maximize=True), LANTON(down, 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(falling, 1, gamma=0.5)
    torch.optim.lr_scheduler.StepLR(climbing, 1, gamma=0.5)
    start = [p.detach().clone() for p in up]
    version = down[0]._version
    for g, p in zip(set_gradients(up, 0), down, strict=True):
        p.grad = g
    assert climbing.step(lambda: torch.tensor(3.0)) == 3.0
    falling.step()
    assert down[0]._version > version
    for a, b, x in zip(up, down, start, strict=True):
        torch.testing.assert_close(a.detach() - x, x - b.detach())
    before = [p.detach().clone() for p in down]
    schedule.step()
    falling.step()
    assert torch.allclose((before[1] - down[1]).norm(), 0.5 * (start[1] - before[1]).norm())


def test_gradients_that_are_missing_zero_or_not_finite() -> None:
    params = parameters([(3, 3), (4,), (3, 3), (2,)], F32)
    optimizer = LANTON(params, 0.1, noise_every=1)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    before = copy.deepcopy((params, [optimizer.state[p] for p in params]))
    set_gradients(params, 5)
    params[0].grad = None
    params[1].grad = torch.zeros(4)
    params[2].grad[1, 1] = torch.nan  # type: ignore[index]
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    for p, old, state in zip(params[:3], *before, strict=False):
        assert torch.equal(p, old)
        for name in ("momentum", "previous", "noise"):
            assert torch.equal(optimizer.state[p][name], state[name])
    assert not torch.equal(params[3], before[0][3])
    assert [int(optimizer.state[p]["skipped"]) for p in params] == [0, 0, 1, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params[2].grad[1, 1] = torch.inf  # type: ignore[index]
        optimizer.step()  # warned once
    set_gradients(params, 6)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


def test_a_first_gradient_that_is_not_finite_leaves_no_trace() -> None:
    params, others = parameters([(3, 3)], F32), parameters([(3, 3)], F32)
    optimizer, plain = LANTON(params, 0.1, noise_every=1), LANTON(others, 0.1, noise_every=1)
    params[0].grad = torch.full((3, 3), torch.nan)
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        plain.step()
    assert torch.equal(params[0], others[0])
    assert float(optimizer.state[params[0]]["noise"]) == float(plain.state[others[0]]["noise"])


def test_layouts_and_low_precision() -> None:
    for dtype in (F32, torch.bfloat16):
        straight, turned = parameters([(6, 4), (4, 3, 2, 2)], dtype), parameters([(6, 4), (4, 3, 2, 2)], dtype)
        turned[0].data = turned[0].data.T.contiguous().T
        turned[1].data = turned[1].data.to(memory_format=torch.channels_last)
        a, b = LANTON(straight, 0.1, noise_every=1), LANTON(turned, 0.1, noise_every=1)
        for step in range(3):
            for p, g in zip(turned, set_gradients(straight, step), strict=True):
                p.grad = g
            a.step()
            b.step()
        assert all(torch.equal(p, q) for p, q in zip(straight, turned, strict=True))
        assert a.state[straight[0]]["momentum"].dtype is F32


def test_grad_scaler_skips_overflow() -> None:
    net = network()
    optimizer = LANTON(lmo_param_groups(net), 0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    start = flat(net)
    for x, moves in ((torch.full((2, 4), torch.inf), False), (torch.ones(2, 4), True)):
        optimizer.zero_grad()
        scaler.scale(net(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(net), start) is not moves


def test_a_compiled_model_takes_the_same_steps() -> None:
    plain, net = network(), network()
    compiled: Any = torch.compile(net, backend="eager")
    advance(plain, LANTON(lmo_param_groups(plain), 0.02, noise_every=1), 0, 3)
    advance(compiled, LANTON(lmo_param_groups(compiled), 0.02, noise_every=1), 0, 3)
    torch.testing.assert_close(flat(net), flat(plain))


def test_threads_do_not_matter() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters([(64, 40), (50000,), (64, 40)], F32)
        optimizer = LANTON(params, 0.1, noise_every=1)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _rank(rank: int, folder: Path) -> None:
    net = network()
    parallel = nn.parallel.DistributedDataParallel(net)
    optimizer = LANTON(lmo_param_groups(net), 0.02, noise_every=1)
    for step in range(4):
        x = normal(16, 4, seed=step, dtype=F32)[8 * rank : 8 * rank + 8]
        optimizer.zero_grad()
        (parallel(x).squeeze(-1) - x[:, 0] * x[:, 1]).square().mean().backward()
        optimizer.step()
    torch.save(flat(net), folder / f"{rank}.pt")


def test_two_ranks_make_the_steps_of_one_process(tmp_path: Path) -> None:
    two_ranks(_rank, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    net = network()
    advance(net, LANTON(lmo_param_groups(net), 0.02, noise_every=1), 0, 4)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], flat(net), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": "median"}, "alpha"),
        ({"scale": 0.0}, "scale"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"noise_every": 0}, "noise_every"),
        ({"noise_estimator": "trace"}, "noise_estimator"),
        ({"second_gradient": "next"}, "second_gradient"),
        ({"min_factor": 2.0}, "min_factor"),
        ({"msign_steps": 0}, "msign_steps"),
        ({"msign_method": "qr"}, "method"),
        ({"kind": "nuclear"}, "kind"),
        ({"kind": "spectral_conv"}, "spectral_conv"),
        ({"matmul_dtype": torch.float16}, "matmul_dtype: float16"),
        ({"lr": "0.1"}, "lr"),
        ({"lr": torch.ones(2)}, "lr"),
        ({"kind": []}, "kind"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LANTON(parameters([(2, 2)]), **({"lr": 0.1} | options))


def test_gradients_and_parameters_of_other_sorts() -> None:
    with pytest.raises(NotImplementedError, match="complex"):
        LANTON([nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1)
    with pytest.raises(TypeError, match=r"params\[0\].*int64"):
        LANTON([torch.ones(2, dtype=torch.int64)], 0.1)
    with pytest.raises(ValueError, match="lazy"):
        LANTON(nn.LazyLinear(2).parameters(), 0.1)
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = LANTON(table.parameters(), 0.1)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state


# --- training ---


def eval_loss(
    lr: float, adaptive: bool, *, seeds: tuple[int, ...] = (0, 1), steps: int = 200, std: float = 0.02
) -> float:
    """Mean loss of the byte-level transformer of bench/optim/byte_model.py."""
    path = Path(__file__).parents[2] / "bench" / "optim" / "byte_model.py"
    spec = importlib.util.spec_from_file_location("byte_model", path)
    assert spec is not None
    assert spec.loader is not None
    byte_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(byte_model)

    def optimizers(model: nn.Module) -> list[LANTON]:
        return [LANTON(lmo_param_groups(model), lr, alpha=1e-12, msign_method="muon5", noise_adaptive=adaptive)]

    losses = [float(byte_model.train(optimizers, steps=steps, seed=seed, embedding_std=std)) for seed in seeds]
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_the_best_rate_is_no_worse_and_higher_ones_much_better(size: str) -> None:
    if size == "small":
        assert eval_loss(0.32, True, seeds=(0,), steps=60) < eval_loss(0.32, False, seeds=(0,), steps=60)
        return
    rates = (0.01, 0.02, 0.04, 0.08, 0.16)
    fixed, adaptive = ({lr: eval_loss(lr, on) for lr in rates} for on in (False, True))
    assert min(adaptive.values()) <= min(fixed.values()) + 0.01
    assert adaptive[0.08] <= fixed[0.08] - 0.1
    assert adaptive[0.16] <= fixed[0.16] - 0.2


@pytest.mark.slow
def test_with_embeddings_of_unit_variance_only_high_rates_gain(size: str) -> None:
    """There the best fixed rate is ahead of the best of LANTON: docs/algorithms/lanton.md has the table."""
    if size == "small":
        pytest.skip("half a minute: --size full")
    assert eval_loss(0.32, True, std=1.0) < eval_loss(0.32, False, std=1.0) - 0.1
