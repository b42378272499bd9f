"""Diffusion on a graph whose nodes are shared among ranks: the results of one process, and the bytes of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import devices
import ranks as processes
from kantor import StabilityError
from kantor._ops import emulated
from kantor._ranks import Ranks
from kantor.distributed import ShardedGraph
from kantor.graph import Graph, diffuse, from_edge_index, stability

N, D = 90, 5
COUNTS = {1: (90,), 2: (41, 49), 3: (50, 0, 40), 4: (17, 33, 1, 39)}


def _graph(dtype: torch.dtype = torch.float64) -> Graph:
    """Symmetric, with a self loop, a node without edges and edges far across."""
    generator = torch.Generator().manual_seed(1)
    ends = torch.randint(N - 1, (2, 220), generator=generator)
    weight = torch.rand(220, dtype=torch.float64, generator=generator)
    graph = from_edge_index(torch.cat([ends, ends.flip(0)], 1), N, torch.cat([weight, weight]), normalize=None)
    return Graph(graph.rowptr, graph.col, graph.weight.to(dtype))


def _one_way() -> Graph:
    generator = torch.Generator().manual_seed(2)
    return from_edge_index(torch.randint(N, (2, 300), generator=generator), N, torch.ones(300), normalize=None)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


SAME_BITS: dict[str, dict[str, Any]] = {
    "one step": {"num_steps": 1},
    "steps": {"num_steps": 7},
    "dropout": {"num_steps": 6, "dropout": 0.3, "seed": 5},
    "none": {"num_steps": 0},
}
TO_ROUNDING: dict[str, dict[str, Any]] = {
    "teleport": {"num_steps": 6, "teleport": 0.2, "dropout": 0.1, "seed": 5},
    "implicit": {"num_steps": 40, "method": "implicit"},
    "chebyshev": {"num_steps": 40, "method": "chebyshev"},
}
STEP = 0.05
LONG_STEP = 0.18  # stable for the energy, but values leave the range of their neighbours


def _alone() -> dict[str, Tensor]:
    graph, x = _graph(), _x(N, D)
    results = {name: diffuse(x, graph, STEP, **o) for name, o in (SAME_BITS | TO_ROUNDING).items()}
    results["batch"] = diffuse(_x(2, N, 3), graph, STEP, 4, dropout=0.5, seed=1)
    results["single"] = diffuse(x.float(), _graph(torch.float32), STEP, 5)
    results["one way"] = diffuse(x.float(), _one_way(), STEP, 5)
    results["long step"] = diffuse(x, graph, LONG_STEP, 5)
    return results


def _shared(ranks: Ranks) -> dict[str, Tensor | None]:
    graph = ShardedGraph.from_graph(_graph(), ranks, counts=COUNTS[ranks.size])
    x = graph.split(_x(N, D))
    results = {name: diffuse(x, graph, STEP, **o) for name, o in (SAME_BITS | TO_ROUNDING).items()}
    results["batch"] = diffuse(graph.split(_x(2, N, 3)), graph, STEP, 4, dropout=0.5, seed=1)
    single = ShardedGraph.from_graph(_graph(torch.float32), ranks, counts=COUNTS[ranks.size])
    results["single"] = diffuse(x.float(), single, STEP, 5)
    root = _one_way() if ranks.rank == 0 else None
    one_way = ShardedGraph.from_graph(root, ranks, counts=COUNTS[ranks.size], source=0)
    results["one way"] = diffuse(x.float(), one_way, STEP, 5)
    results["long step"] = diffuse(x, graph, LONG_STEP, 5)
    return {name: graph.gather(y) for name, y in results.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_same_as_one_process(size: int) -> None:
    alone = _alone()
    for results in processes.run(size, _shared):
        assert results.keys() == alone.keys()
        for name, y in results.items():
            if name in TO_ROUNDING:
                torch.testing.assert_close(y, alone[name], rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(y, alone[name]), name


def test_steps_are_long_enough_to_need_the_eigenvalue() -> None:
    report = stability(_graph(), LONG_STEP)
    assert report.energy_stable
    assert not report.max_principle


DERIVATIVES: dict[str, dict[str, Any]] = {
    "explicit": {"num_steps": 6, "dropout": 0.2, "teleport": 0.1, "seed": 4},
    "implicit": {"num_steps": 40, "method": "implicit"},
    "chebyshev": {"num_steps": 10, "method": "chebyshev"},
}


def _gradients(graph: Graph | ShardedGraph, x: Tensor, weight: Tensor) -> dict[str, Tensor | None]:
    """Of x alone, which keeps no states, and of all; `graph` has the weights `weight`."""
    results: dict[str, Tensor | None] = {}
    for name, options in DERIVATIVES.items():
        for trained in (False, True):
            x = x.detach().requires_grad_()
            step = torch.tensor(STEP, dtype=torch.float64, requires_grad=trained)
            weight.requires_grad_(trained).grad = None
            diffuse(x, graph, step, **options).square().sum().backward()
            results |= {f"{name}, {trained}": x.grad, f"{name}, {trained}, step": step.grad}
            results[f"{name}, {trained}, weight"] = weight.grad
    return results


def _shared_gradients(ranks: Ranks) -> dict[str, Tensor | None]:
    whole, counts = _graph(), COUNTS[ranks.size]
    begin = sum(counts[: ranks.rank])
    rowptr = whole.rowptr[begin : begin + counts[ranks.rank] + 1]
    entries = slice(int(rowptr[0]), int(rowptr[-1]))
    weight = whole.weight[entries].clone()
    graph = ShardedGraph(rowptr - rowptr[0], whole.col[entries], weight, ranks)
    results = _gradients(graph, graph.split(_x(N, D)), weight)
    gathered = {}
    for name, gradient in results.items():
        if gradient is not None and gradient.ndim:
            gradient = torch.cat(ranks.all_gather(gradient))
        gathered[name] = gradient
    return gathered


@pytest.mark.parametrize("size", [2, 3])
def test_derivatives(size: int) -> None:
    graph = _graph()
    alone = _gradients(graph, _x(N, D), graph.weight)
    for results in processes.run(size, _shared_gradients):
        for name, expected in alone.items():
            torch.testing.assert_close(results[name], expected, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def _bytes(ranks: Ranks) -> tuple[int, int]:
    graph = ShardedGraph.from_graph(_graph(), ranks, counts=COUNTS[ranks.size])
    x = graph.split(_x(N, D))
    diffuse(x, graph, STEP, 1)  # what is found once
    ranks.traffic.reset()
    diffuse(x, graph, STEP, 7)
    return ranks.traffic.exchange.bytes, graph.ghosts


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_a_step(size: int) -> None:
    """Each node travels once a step to every rank with an edge to it, with d columns of 8 bytes."""
    graph = _graph()
    rank_of = torch.repeat_interleave(torch.arange(size), torch.tensor(COUNTS[size]))
    reader, node = rank_of[graph.rows], graph.col.long()
    pairs = torch.unique(torch.stack([reader, node])[:, reader != rank_of[node]], dim=1)
    sent = torch.bincount(rank_of[pairs[1]], minlength=size)
    received = torch.bincount(pairs[0], minlength=size)
    results = processes.run(size, _bytes)
    assert [bytes_ for bytes_, _ in results] == (7 * D * 8 * sent).tolist()
    assert [ghosts for _, ghosts in results] == received.tolist()


def _unstable(ranks: Ranks) -> None:
    graph = ShardedGraph.from_graph(_graph(), ranks, counts=COUNTS[ranks.size])
    diffuse(graph.split(_x(N, D)), graph, 0.3, 2)


def _one_wrong(ranks: Ranks, what: str) -> None:
    graph = ShardedGraph.from_graph(_graph(), ranks, counts=COUNTS[ranks.size])
    x, last = graph.split(_x(N, D)), ranks.rank == ranks.size - 1
    if what == "rows":
        diffuse(x[1:] if last else x, graph, STEP, 2)
    elif what == "step":
        diffuse(x, graph, 2 * STEP if last else STEP, 2)
    elif what == "weight":
        weight = graph.weight.clone()
        weight[-1:] = -1.0 if last else 1.0
        pointers = torch.zeros(graph.num_nodes + 1, dtype=torch.int64)
        pointers[1:] = graph.num_edges
        ShardedGraph(pointers, torch.arange(graph.num_edges) % 9, weight, ranks)
    elif what == "matrix":
        diffuse(x, graph, STEP, 2, method="propagator")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rows", "rank 1: .*x: expected 49 rows"),
        ("step", "step: expected the same on every rank"),
        ("weight", "rank 1: .*not negative"),
        ("matrix", "propagator"),
    ],
)
def test_an_error_on_one_rank_is_one_on_all(what: str, message: str) -> None:
    for error in processes.outcomes(2, _one_wrong, what):
        with pytest.raises(ValueError, match=message):
            raise error


def test_unstable_steps_are_refused_on_all_ranks() -> None:
    for error in processes.outcomes(3, _unstable):
        with pytest.raises(StabilityError, match="expected at most 0.2"):
            raise error


def _emulated(ranks: Ranks) -> Tensor | None:
    graph = ShardedGraph.from_graph(_graph(), ranks, counts=COUNTS[ranks.size])
    with emulated():
        return graph.gather(diffuse(graph.split(_x(N, D)), graph, STEP, 3, dropout=0.3, seed=2))


def test_cuda_code() -> None:
    """On the emulator; one rank has no nodes."""
    devices.require("emulated")
    with emulated():
        one = diffuse(_x(N, D), _graph(), STEP, 3, dropout=0.3, seed=2)
    for y in processes.run(3, _emulated):
        torch.testing.assert_close(y, one, rtol=1e-13, atol=1e-13)
