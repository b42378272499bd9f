"""Collective operations, their counters and their errors."""

from __future__ import annotations

import os
import time

import pytest
import torch

import ranks as processes
from kantor import RankError
from kantor._ranks import Ranks
from kantor.linalg import Callable, cg
from systems_in_shares import laplacian, sharded


def _operations(ranks: Ranks) -> dict[str, object]:
    mine = torch.full((3,), float(ranks.rank + 1), dtype=torch.float64)
    total = ranks.all_reduce_(mine.clone())
    most = ranks.all_reduce_(mine.clone(), "max")
    parts = ranks.all_gather(torch.arange(ranks.rank, dtype=torch.float64))  # rank 0 has none
    word = ranks.broadcast_object(f"from {ranks.rank}", ranks.size - 1)
    ranks.traffic.reset()
    after, before = (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    received = torch.zeros(2, dtype=torch.float64)
    if ranks.size > 1:
        ranks.exchange({after: mine[:2]}, {before: received})
    return {
        "total": total[0].item(),
        "most": most[0].item(),
        "lengths": [len(part) for part in parts],
        "word": word,
        "received": received[0].item(),
        "before": before,
        "messages": ranks.traffic.exchange.messages,
        "bytes": ranks.traffic.exchange.bytes,
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_operations(size: int) -> None:
    for rank, result in enumerate(processes.run(size, _operations)):
        assert result["total"] == size * (size + 1) / 2
        assert result["most"] == size
        assert result["lengths"] == list(range(size))
        assert result["word"] == f"from {size - 1}"
        assert result["received"] == (result["before"] + 1 if size > 1 else 0)
        assert (result["messages"], result["bytes"]) == ((1, 16) if size > 1 else (0, 0)), rank


def _fails_on(ranks: Ranks, culprit: int, kind: type[Exception]) -> str:
    with ranks.together():
        if ranks.rank == culprit:
            raise kind("b: got nan")
    return "went on"


@pytest.mark.parametrize("kind", [ValueError, TypeError])
def test_an_error_on_one_rank_is_an_error_on_all(kind: type[Exception]) -> None:
    for error in processes.outcomes(3, _fails_on, 1, kind):
        assert isinstance(error, kind)
        assert str(error) == "rank 1: b: got nan"
    assert processes.run(3, _fails_on, 7, kind) == ["went on"] * 3  # and the ranks still understand each other


def test_one_process_alone_needs_no_group() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.size) == (0, 1)
    x = torch.ones(2)
    assert ranks.all_reduce_(x) is x
    with pytest.raises(ValueError, match="^wrong$"), ranks.together():
        raise ValueError("wrong")
    assert ranks.traffic.all_reduce.messages == 0


def _leaves(ranks: Ranks, culprit: int, stalls_for: float) -> None:
    """One rank stalls, or dies, in the midst of a solve."""
    S = sharded(ranks, laplacian((30, 10)))
    calls = 0

    def product(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5 and ranks.rank == culprit:
            if not stalls_for:
                os._exit(3)
            time.sleep(stalls_for)
        return S.matvec(x)

    with torch.no_grad():
        cg(Callable(product, S.shape[0], ranks=ranks), torch.ones(S.shape[0], dtype=torch.float64), rtol=1e-10)


def test_a_rank_that_stalls_or_dies_is_an_error_on_the_others() -> None:
    pool = processes.Pool([20.0, 1.5, 20.0])
    try:
        stalled = pool.outcomes(2, _leaves, 1, 3.0, seconds=30)
        assert isinstance(stalled[0], RankError)
        assert "exchange failed" in str(stalled[0])
        assert "timeout" in str(stalled[0])
        dead = pool.outcomes(3, _leaves, 1, 0.0, seconds=30)
        assert isinstance(dead[0], RankError)
        assert isinstance(dead[2], RankError)
        assert dead[1] is None
    finally:
        pool.close()
