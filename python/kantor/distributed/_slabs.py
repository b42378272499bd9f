"""Slabs of a grid: how its planes are shared among ranks, and the exchange of those next to a border."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kantor._ranks import Ranks


@dataclass(frozen=True)
class Planes:
    """Planes ``begin..end-1``."""

    begin: int
    end: int

    def __len__(self) -> int:
        return max(0, self.end - self.begin)

    def __and__(self, other: Planes) -> Planes:
        begin = max(self.begin, other.begin)
        return Planes(begin, max(begin, min(self.end, other.end)))

    def around(self, other: Planes) -> Planes:
        """The least range that holds both."""
        if not len(self) or not len(other):
            return self if len(self) else other
        return Planes(min(self.begin, other.begin), max(self.end, other.end))

    def widened(self, before: int, after: int, planes: int) -> Planes:
        """With more planes on both sides, as far as the grid goes; a range of none stays one."""
        return Planes(max(0, self.begin - before), min(planes, self.end + after)) if len(self) else self


def owned(counts: Sequence[int]) -> list[Planes]:
    """The planes of each rank, from how many there are."""
    result, begin = [], 0
    for count in counts:
        result.append(Planes(begin, begin + count))
        begin += count
    return result


class Halo:
    """An exchange of planes: every rank gets those that it wants and others own.

    Parameters
    ----------
    ranks : Ranks
    own : list of Planes
        Those of every rank: without gaps, in the order of the ranks.
    wanted : list of Planes
        By every rank; its own ones are left alone.
    """

    def __init__(self, ranks: Ranks, own: Sequence[Planes], wanted: Sequence[Planes]) -> None:
        self.ranks = ranks
        me = ranks.rank
        others = [rank for rank in range(ranks.size) if rank != me]
        self.sends = {rank: part for rank in others if len(part := own[me] & wanted[rank])}
        self.receives = {rank: part for rank in others if len(part := own[rank] & wanted[me])}

    @property
    def planes_sent(self) -> int:
        """By this rank, in one exchange."""
        return sum(map(len, self.sends.values()))

    def start(self, vectors: Tensor, first: int) -> Callable[[], None]:
        """Begin to fill in the planes of ``vectors (batch, planes, ...)``, the first of which is number `first`.

        The function that comes back waits for the end.
        """
        sends = {rank: _part(vectors, planes, first).contiguous() for rank, planes in self.sends.items()}
        targets = {rank: _part(vectors, planes, first) for rank, planes in self.receives.items()}
        receives = {rank: t if t.is_contiguous() else t.new_empty(t.shape) for rank, t in targets.items()}
        wait = self.ranks.start_exchange(sends, receives)

        def finish() -> None:
            wait()
            for rank, target in targets.items():
                if receives[rank] is not target:
                    target.copy_(receives[rank])

        return finish

    def fill(self, vectors: Tensor, first: int) -> None:
        """Exchange, and wait for it."""
        self.start(vectors, first)()


def _part(vectors: Tensor, planes: Planes, first: int) -> Tensor:
    return vectors[:, planes.begin - first : planes.end - first]
