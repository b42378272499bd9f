"""AdaHessian on two processes that have half of the data each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from kantor.optim import AdaHessian
from two_ranks import RANKS, two_ranks

STEPS = 6
WAYS = ("closure", "wrapped", "backward")


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(16, 5, dtype=torch.float64, generator=generator)
    return net, x, torch.randint(3, (16,), generator=generator)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def train(way: str, x: Tensor, y: Tensor, net: nn.Module, seed: int) -> Tensor:
    """With two samples an estimate, and curvature renewed at every other step."""
    optimizer = AdaHessian(net.parameters(), 0.1, seed=seed, update_period=2, n_samples=2)
    for _ in range(STEPS):
        if way != "backward":
            optimizer.step(lambda: cross_entropy(net(x), y))
            continue
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward(create_graph=optimizer.refresh_due)
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                dist.all_reduce(p.grad)
                p.grad /= RANKS
        optimizer.step()
    return flat(net)


def work(rank: int, folder: Path) -> None:
    results = {}
    for way in WAYS:
        net, x, y = problem()
        half = slice(8 * rank, 8 * rank + 8)
        model = DistributedDataParallel(net) if way == "wrapped" else net
        results[way] = train(way, x[half], y[half], model, seed=3 + 10 * rank)  # that of rank 0 counts
    net, x, y = problem()
    alone = AdaHessian(net.parameters(), 0.1, seed=3, process_group=None)
    alone.step(lambda: cross_entropy(net(x), y))
    results["alone"] = flat(net)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_follow_one_process(way: str, ranks: list[dict[str, Tensor]]) -> None:
    net, x, y = problem()
    expected = train("closure", x, y, net, seed=3)
    for results in ranks:
        torch.testing.assert_close(results[way], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(ranks[0][way], ranks[1][way])


def test_without_a_process_group_ranks_are_alone(ranks: list[dict[str, Tensor]]) -> None:
    net, x, y = problem()
    optimizer = AdaHessian(net.parameters(), 0.1, seed=3)
    optimizer.step(lambda: cross_entropy(net(x), y))
    for results in ranks:
        torch.testing.assert_close(results["alone"], flat(net), rtol=1e-12, atol=0)
