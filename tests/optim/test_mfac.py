"""M-FAC as an optimiser: its steps, the conventions of torch's optimisers, training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from devices import home
from kantor.optim import MFAC
from mfac_reference import F64, accuracy, classifier, dense, random, train
from two_ranks import two_ranks

X, Y = random(40, 3), random(40, 2, seed=1)


def network(seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def backward(net: nn.Module, k: int = 0) -> Tensor:
    """The gradient on one of four batches."""
    net.zero_grad()
    rows, dtype = slice(k % 4, None, 4), next(net.parameters()).dtype
    loss = (net(X[rows].to(dtype)) - Y[rows].to(dtype)).square().mean()
    loss.backward()
    return loss.detach()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def same(a: Any, b: Any) -> bool:
    """Whether nested states agree bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for k in range(first, first + steps):
        backward(net, k)
        optimizer.step()


@pytest.mark.parametrize("block", [None, 8])
def test_steps_are_those_of_the_definition(device: str, block: int | None) -> None:
    net, other = network().to(home(device)), network()
    groups = [
        {"params": list(net[0].parameters()), "lr": 0.02},
        {"params": list(net[2].parameters()), "weight_decay": 0.1, "momentum": 0.5},
    ]
    optimizer = MFAC(groups, lr=0.05, momentum=0.9, m=6, damping=0.1, block_size=block)
    theta, v, rows = flat(other), torch.zeros(32, dtype=F64), torch.zeros(6, 32, dtype=F64)
    lr, mu, decay = (torch.cat([torch.full((20,), a, dtype=F64), torch.full((12,), b, dtype=F64)]) for a, b in
                     ((0.02, 0.05), (0.9, 0.5), (0.0, 0.1)))  # fmt: skip
    for k in range(15):
        nn.utils.vector_to_parameters(theta, other.parameters())
        backward(other, k)
        g = torch.cat([p.grad.reshape(-1) for p in other.parameters() if p.grad is not None]) + decay * theta
        rows[k % 6] = g
        v = mu * v + (1 - mu) * torch.linalg.solve(dense(rows, 0.1, 6, block), g)
        theta = theta - lr * v
        backward_on = X.to(home(device)), Y.to(home(device))
        net.zero_grad()
        (net(backward_on[0][k % 4 :: 4]) - backward_on[1][k % 4 :: 4]).square().mean().backward()
        optimizer.step()
        torch.testing.assert_close(flat(net).cpu(), theta, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_checkpoint_continues_bit_by_bit(tmp_path: Path, storage: torch.dtype | None) -> None:
    options: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "m": 5, "damping": 0.1, "storage_dtype": storage}
    whole = network(dtype=torch.float32)
    optimizer = MFAC(whole.parameters(), **options)
    run(whole, optimizer, 7)
    torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    run(whole, optimizer, 7, 7)

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    part = network(1, dtype=torch.float32)
    part.load_state_dict(saved["net"])
    second = MFAC(part.parameters(), **options)
    second.load_state_dict(saved["optimizer"])
    run(part, second, 7, 7)
    assert torch.equal(flat(whole), flat(part))

    third = copy.deepcopy(second)
    assert same(third.state_dict(), second.state_dict())
    assert third.fisher is not second.fisher
    fresh = MFAC(network().parameters(), **options)
    second.load_state_dict(fresh.state_dict())  # before its first step
    assert second.fisher is None


def test_state_of_another_shape_is_refused_and_nothing_is_lost() -> None:
    net = network()
    optimizer = MFAC(net.parameters(), lr=0.01, momentum=0.9, m=5, damping=0.1)
    run(net, optimizer, 4)
    state = optimizer.state_dict()
    others = [MFAC(network().parameters(), m=6), MFAC(nn.Linear(3, 3).double().parameters())]
    before = copy.deepcopy(state)
    for other in others:
        with pytest.raises(ValueError, match=r"expected|parameter group"):
            other.load_state_dict(state)
        assert other.fisher is None
        assert not other.state
    used = MFAC(network().parameters(), m=6, damping=0.1)
    run(network(), used, 1)
    assert same(optimizer.state_dict(), before)
    turned = nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2), nn.Linear(1, 1)).double()  # 20 + 10 + 2 elements too
    adam = torch.optim.Adam(net.parameters())
    backward(net)
    adam.step()
    for saved, message in (
        (MFAC([*turned.parameters()][::-1], m=5, damping=0.1).state_dict() | {"fisher": state["fisher"]}, "group"),
        (adam.state_dict(), "expected the state of an MFAC, got one without fisher, mask"),
        (state | {"state": {0: {"momentum_buffer": torch.ones(3, 5)}}},
         r"params\[0\]: expected momentum of shape \(5, 3\), got \(3, 5\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert same(optimizer.state_dict(), before)


def test_maximize_is_the_mirror_image() -> None:
    nets = network(), network()
    optimizers = [MFAC(nets[k].parameters(), lr=0.01, m=5, damping=0.1, maximize=k == 1) for k in (0, 1)]
    for k in range(6):
        for net, optimizer, sign in zip(nets, optimizers, (1, -1), strict=True):
            backward(net, k)
            for p in net.parameters():
                assert p.grad is not None
                p.grad *= sign
            optimizer.step()
    torch.testing.assert_close(flat(nets[0]), flat(nets[1]), rtol=0, atol=0)


def test_closure_scheduler_clipping_scaler_and_compiled_models() -> None:
    net, plain = network(dtype=torch.float32), network(dtype=torch.float32)
    compiled = torch.compile(net, backend="eager")
    optimizer, reference = (MFAC(n.parameters(), lr=0.02, m=5, damping=0.1, momentum=0.5) for n in (net, plain))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (optimizer, reference)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = X.float(), Y.float()
    for _ in range(8):

        def closure() -> Tensor:
            plain.zero_grad()
            loss = (plain(x) - y).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            return loss

        assert reference.step(closure).requires_grad
        net.zero_grad()
        scaler.scale((compiled(x) - y).square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    torch.testing.assert_close(flat(net), flat(plain), rtol=1e-4, atol=1e-6)
    step = torch.compile(optimizer.step, backend="eager")  # falls back
    step()
    before = flat(net).clone()
    net.zero_grad()
    scaler.scale((compiled(x) * math.inf).sum()).backward()
    scaler.step(optimizer)  # skips
    assert torch.equal(flat(net), before)


def test_parameters_without_gradients_keep_their_value() -> None:
    net = network()
    optimizer = MFAC(net.parameters(), lr=0.01, m=4, damping=0.1, momentum=0.5)
    assert optimizer.step() is None  # no gradient at all
    run(net, optimizer, 3)
    kept = net[0].weight.detach().clone()
    for k in range(3):
        backward(net, k)
        net[0].weight.grad = None
        optimizer.step()
    assert torch.equal(net[0].weight, kept)
    frozen = network()
    frozen[0].requires_grad_(False)
    optimizer = MFAC(frozen.parameters(), lr=0.01, m=4, damping=0.1)
    run(frozen, optimizer, 2)
    assert torch.equal(frozen[0].weight, network()[0].weight)


@pytest.mark.parametrize("given", [True, False])
def test_sparse_mask_keeps_zeros(given: bool) -> None:
    net = network(dtype=torch.float32)
    with torch.no_grad():
        net[0].weight[:, 1] = 0
        net[2].weight[0, :] = 0
    masks = [p != 0 for p in net.parameters()]
    optimizer = MFAC(net.parameters(), lr=0.02, m=5, damping=0.01, momentum=0.9, weight_decay=0.1,
                     sparse_mask=[masks[0], None, masks[2], None] if given else True)  # fmt: skip
    start = flat(net).clone()
    run(net, optimizer, 12)
    assert not net[0].weight[:, 1].any()
    assert not net[2].weight[0].any()
    assert (flat(net) != start)[torch.cat([mask.reshape(-1) for mask in masks])].all()


def test_zero_gradient_and_bad_gradients_leave_everything_as_it_was() -> None:
    net = network()
    optimizer = MFAC(net.parameters(), lr=0.01, m=4, damping=0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(flat(net), flat(network()))
    run(net, optimizer, 2)
    before, state = flat(net).clone(), copy.deepcopy(optimizer.state_dict())
    backward(net)
    next(net.parameters()).grad[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="expected finite values, at most .* got NaN, infinity"):
        optimizer.step()
    next(net.parameters()).grad = torch.sparse_coo_tensor(
        torch.zeros(2, 1, dtype=torch.int64), [1.0], (5, 3), dtype=F64
    )
    with pytest.raises(TypeError, match=r"MFAC.step: expected dense gradients, got layout torch.sparse_coo"):
        optimizer.step()
    assert torch.equal(flat(net), before)
    assert same(optimizer.state_dict(), state)
    skipping = MFAC(net.parameters(), m=4, on_nonfinite="skip")
    next(net.parameters()).grad = torch.full((5, 3), math.inf, dtype=F64)
    skipping.step()
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "MFAC: lr: expected a number >= 0, got -1.0"),
        ({"momentum": 1.0}, ValueError, r"MFAC: momentum: expected a number in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, ValueError, "MFAC: weight_decay"),
        ({"damping": 0.0}, ValueError, "MFAC: damping: expected a finite number > 0"),
        ({"m": 0}, ValueError, "MFAC: m: expected an integer >= 1"),
        ({"storage_dtype": torch.int64}, TypeError, "MFAC: storage_dtype"),
        ({"sparse_mask": [torch.ones(2)]}, ValueError, "MFAC: sparse_mask: expected 4 masks, got 1"),
        ({"sparse_mask": [torch.ones(2)] * 4}, ValueError, r"sparse_mask\[0\]: expected shape \(5, 3\), got \(2,\)"),
        ({"max_bytes": 100}, MemoryError, "1024 gradients of 32 elements in float64"),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    net = network()
    with pytest.raises(kind, match=message):
        run(net, MFAC(net.parameters(), **options), 1)
    assert torch.equal(flat(net), flat(network()))


def test_mixed_parameters() -> None:
    with pytest.raises(TypeError, match=r"MFAC: params\[1\]: expected a real floating-point dtype"):
        parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))]
        parameters[0].grad = torch.ones(2)
        MFAC(parameters).step()
    with pytest.raises(ValueError, match=r"params\[0\] is on cpu, params\[1\] on meta"):
        parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
        parameters[0].grad = torch.ones(2)
        MFAC(parameters).step()
    half = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    for p in half:
        p.grad = torch.ones_like(p)
    MFAC(half, lr=0.1, m=2, damping=1.0).step()
    assert float(half[0][0]) == pytest.approx(1 - 0.1 / 3, rel=1e-6)  # F g = (1 + 4 / 2) g
    assert float(half[1][0]) == pytest.approx(1 - 0.1 / 3, rel=1e-2)
    optimizer = MFAC([half[0]], m=2)
    optimizer.step()
    with pytest.raises(ValueError, match="add_param_group"):
        optimizer.add_param_group({"params": [half[1]]})
    optimizer = MFAC([half[0]])
    with pytest.raises(ValueError, match="MFAC: lr: expected a number >= 0, got -1"):
        optimizer.add_param_group({"params": [half[1]], "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_half_precision_parameters_have_steps_in_single_precision() -> None:
    """What passes 65504 on the way to a step that does not."""
    p, options = nn.Parameter(torch.full((3,), 6e4, dtype=torch.float16)), {"lr": 1e-2, "m": 1, "momentum": 0.5}
    optimizer = MFAC([p], damping=1e-6, weight_decay=1e-3, **options)
    p.grad = torch.zeros_like(p)
    p.grad[0] = 6e4
    optimizer.step()
    assert torch.isfinite(p).all()
    p = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = MFAC([p], damping=1e-6, **options | {"lr": 1e-6})
    p.grad = torch.full_like(p, 0.5**11)  # F^-1 g = 2^-11 / (1e-6 + 2^-22)
    optimizer.step()
    buffer = optimizer.state[p]["momentum_buffer"]
    assert float(buffer) == pytest.approx(0.5 * 2**-11 / (1e-6 + 2**-22))
    assert buffer.dtype == torch.float32
    again = MFAC([p], damping=1e-6, **options)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[p]["momentum_buffer"], buffer)


# --- two processes ---


BLOCKS = (None, 8)


def _options(block: int | None) -> dict[str, Any]:
    return {"lr": 0.05, "m": 6, "damping": 0.1, "momentum": 0.5, "block_size": block}


def _rank(rank: int, folder: Path) -> None:
    for block in BLOCKS:
        net, sharded = network(), network()
        parallel = nn.parallel.DistributedDataParallel(net)
        whole = MFAC(parallel.parameters(), **_options(block))
        slices = MFAC(sharded.parameters(), **_options(block), process_group=torch.distributed.group.WORLD)
        for _ in range(10):
            parallel.zero_grad()
            (parallel(X[rank::2]) - Y[rank::2]).square().mean().backward()
            for p, q in zip(sharded.parameters(), net.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
            whole.step()
            slices.step()
        assert slices.fisher is not None
        assert slices.fisher.dim == 16
        assert float(slices.fisher.logdet()) == pytest.approx(float(whole.fisher.logdet()))  # type: ignore[union-attr]
        torch.save([flat(net), flat(sharded)], folder / f"{rank}{block}.pt")


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    two_ranks(_rank, tmp_path)
    for block in BLOCKS:
        net = network()
        optimizer = MFAC(net.parameters(), **_options(block))
        for _ in range(10):
            net.zero_grad()
            (net(X) - Y).square().mean().backward()
            optimizer.step()
        for rank in (0, 1):
            for found in torch.load(tmp_path / f"{rank}{block}.pt"):
                torch.testing.assert_close(found, flat(net), rtol=1e-6, atol=1e-8)


# --- training ---


@pytest.mark.slow
def test_digits(size: str) -> None:
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    seeds = (0, 1, 2) if size == "full" else (0,)
    damping = (1e-6, 1e-5, 1e-4, 1e-3) if size == "full" else (1e-4,)

    def mean(make: Any) -> float:
        results = []
        for seed in seeds:
            net = classifier(seed)
            assert math.isfinite(train(net, make(net), 8, seed=seed))
            results.append(accuracy(net))
        return sum(results) / len(results)

    adam = max(mean(lambda net, lr=lr: torch.optim.Adam(net.parameters(), lr)) for lr in (3e-3, 1e-2))
    for value in damping:
        ours = mean(lambda net, v=value: MFAC(net.parameters(), 3e-3, 0.9, m=64, damping=v))
        assert math.isfinite(ours)
        if value == 1e-4:
            assert ours >= adam - 0.01
            options: dict[str, Any] = {"m": 64, "damping": 1e-4, "storage_dtype": torch.bfloat16}
            narrow = mean(lambda net, o=options: MFAC(net.parameters(), 3e-3, 0.9, **o))
            assert narrow >= ours - 0.02
    torch.set_num_threads(2)
