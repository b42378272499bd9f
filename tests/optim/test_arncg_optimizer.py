"""Regularised Newton-CG as a torch optimiser."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kantor.optim import ARNCG, OptimizeStatus, minimize

F64 = torch.float64
X = torch.linspace(-1, 1, 40, dtype=F64).view(-1, 1)
Y = torch.sin(3 * X)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(F64)


def closure_of(net: nn.Module) -> Any:
    return lambda: (net(X) - Y).square().mean()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("preset", ["economy", "guarantee", "paper"])
def test_training_lowers_the_loss_at_every_step(preset: str) -> None:
    net = network()
    optimizer = ARNCG(net.parameters(), preset=preset)
    losses = [float(optimizer.step(closure_of(net))) for _ in range(25)]
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.n_hvp > 0


def test_steps_are_those_of_minimize() -> None:
    net = network()
    shapes = [p.shape for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    x0 = flat(net)

    def fun(z: Tensor) -> Tensor:
        parts = z.split([math.prod(shape) for shape in shapes])
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return (torch.func.functional_call(net, values, X) - Y).square().mean()

    seen: list[Tensor] = []
    with pytest.warns(RuntimeWarning, match="max_iter"):
        minimize(fun, x0, tol=0.0, max_iter=6, preset="guarantee", callback=lambda info: seen.append(info.x.clone()))
    optimizer = ARNCG(net.parameters(), preset="guarantee")
    for x in seen:
        optimizer.step(closure_of(net))
        torch.testing.assert_close(flat(net), x, rtol=1e-8, atol=1e-10)


def test_state_dict_round_trip_continues_the_run() -> None:
    whole, part = network(), network()
    optimizer, first = ARNCG(whole.parameters()), ARNCG(part.parameters())
    for _ in range(4):
        optimizer.step(closure_of(whole))
        first.step(closure_of(part))
    other = network(1)
    other.load_state_dict(part.state_dict())
    second = ARNCG(other.parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(4):
        optimizer.step(closure_of(whole))
        second.step(closure_of(other))
    assert torch.equal(flat(whole), flat(other))


def test_parameters_without_gradients_stay_and_unused_ones_are_allowed() -> None:
    net = network()
    net[0].weight.requires_grad_(False)
    frozen = net[0].weight.clone()
    unused = nn.Parameter(torch.ones(2, 3, dtype=F64))
    optimizer = ARNCG([*net.parameters(), unused])
    for _ in range(5):
        loss = optimizer.step(closure_of(net))
    assert torch.equal(net[0].weight, frozen)
    assert torch.equal(unused, torch.ones_like(unused))
    assert loss < closure_of(network())()


def test_groups_are_one_vector() -> None:
    net, same = network(), network()
    optimizer = ARNCG([{"params": net[0].parameters()}, {"params": net[2].parameters()}])
    reference = ARNCG(same.parameters())
    for _ in range(3):
        optimizer.step(closure_of(net))
        reference.step(closure_of(same))
    assert torch.equal(flat(net), flat(same))


def test_stationary_point_and_tolerance_are_told() -> None:
    p = nn.Parameter(torch.tensor([3.0, -2.0], dtype=F64))
    optimizer = ARNCG([p], tol=1e-6)
    for _ in range(30):
        optimizer.step(lambda: p.square().sum())
    assert optimizer.status is OptimizeStatus.CONVERGED
    before = p.detach().clone()
    optimizer.step(lambda: p.square().sum())
    assert torch.equal(p, before)


def test_leaves_a_saddle_and_keeps_parameters_on_failure() -> None:
    p = nn.Parameter(torch.tensor([0.0, 1e-6], dtype=F64))
    optimizer = ARNCG([p])
    for _ in range(40):
        optimizer.step(lambda: p[0] ** 2 - p[1] ** 2 + p[1] ** 4)
    assert abs(abs(float(p[1].detach())) - math.sqrt(0.5)) < 1e-6

    calls = 0

    def breaks() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("broken")
        return p.square().sum()

    before = p.detach().clone()
    with pytest.raises(KeyError, match="broken"):
        optimizer.step(breaks)
    assert torch.equal(p, before)


def test_nystrom_and_limits() -> None:
    net = network()
    optimizer = ARNCG(net.parameters(), preconditioner="nystrom", max_cg_iter=5)
    losses = [float(optimizer.step(closure_of(net))) for _ in range(15)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("closure", "error", "match"),
    [
        (None, TypeError, "closure"),
        (lambda p: 1.0, TypeError, "scalar tensor"),
        (lambda p: p, ValueError, "scalar tensor"),
        (lambda p: p.detach().sum(), RuntimeError, "no graph"),
        (lambda p: p.sum() / 0, RuntimeError, "not finite"),
    ],
)
def test_bad_closures_say_what_was_wrong(closure: Any, error: type[Exception], match: str) -> None:
    p = nn.Parameter(torch.ones(2, dtype=F64))
    with pytest.raises(error, match=match):
        ARNCG([p]).step(None if closure is None else lambda: closure(p))


def test_closure_that_calls_backward_is_told() -> None:
    p = nn.Parameter(torch.ones(2, dtype=F64))

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="without calling backward"):
        ARNCG([p]).step(closure)


@pytest.mark.parametrize(
    ("params", "options", "error", "match"),
    [
        ([torch.ones(2)], {}, ValueError, "requires a gradient"),
        ([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=F64))], {}, TypeError, "float64"),
        ([nn.Parameter(torch.ones(2, dtype=torch.float16))], {}, TypeError, "float32 or float64"),
        ([nn.Parameter(torch.ones(2))], {"theta": -1.0}, ValueError, "theta"),
        ([nn.Parameter(torch.ones(2))], {"preset": "fast"}, ValueError, "preset"),
        ([nn.Parameter(torch.ones(2))], {"lr": 1.0}, TypeError, "lr"),
        ([nn.Parameter(torch.ones(2))], {"max_cg_iter": 0}, ValueError, "max_cg_iter"),
        ([{"params": [nn.Parameter(torch.ones(2))], "lr": 1.0}], {}, ValueError, "per parameter group"),
    ],
)
def test_bad_parameters_say_what_was_wrong(
    params: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        ARNCG(params, **options)
