"""The reductions over ranks that the native algorithms of transport call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from kantor._ranks import Ranks

_LEAST_NUMBERS = 1 << 16  # of the memory: sparse plans travel through it piece by piece

Reductions = tuple[Tensor, Callable[[int], None], Callable[[int], None], int, int]


@contextmanager
def reductions(ranks: Ranks, columns: int) -> Iterator[Reductions]:
    """Memory, its sum and its maximum over ranks, rank and size, as csrc/bind/transport.cpp takes them.

    Ctrl-C waits inside for the next reduction, which tells the other ranks; an error inside is raised on all.
    """
    memory = torch.zeros(max(columns, ranks.size, _LEAST_NUMBERS) + 64, dtype=torch.float64)

    def reduce(count: int, op: Literal["sum", "max"]) -> None:
        if ranks.interrupted:  # the first number counts the ranks that are
            memory[0] += 1
            ranks.interrupted = False
        there = memory[:count].to(ranks.device)
        ranks.all_reduce_(there, op)
        memory[:count] = there

    with ranks.deferred_interrupts(), ranks.together():
        yield memory, lambda count: reduce(count, "sum"), lambda count: reduce(count, "max"), ranks.rank, ranks.size
