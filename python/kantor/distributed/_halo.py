"""What a rank needs of the others' rows: found once, exchanged whenever it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kantor._ranks import Ranks


class Halo:
    """The rows `needed` (their global numbers, sorted) of vectors whose rows are shared out as `counts` tells.

    They come in the order of `needed`, and are called ghosts. The rows of a tensor lie in its dimension `dim`.
    """

    def __init__(self, needed: Tensor, counts: Sequence[int], ranks: Ranks) -> None:
        self.ranks, self.rows, self.size = ranks, counts[ranks.rank], needed.numel()
        owner = torch.searchsorted(torch.tensor(counts).cumsum(0), needed.cpu(), right=True)
        self.receives: list[int] = torch.bincount(owner, minlength=ranks.size).tolist()  # from each rank
        self.sends = [row[ranks.rank] for row in ranks.table(*self.receives)]  # to each rank
        wanted = needed.new_empty(sum(self.sends))
        ranks.exchange(
            {rank: part for rank, part in enumerate(needed.split(self.receives)) if rank != ranks.rank},
            {rank: part for rank, part in enumerate(wanted.split(self.sends)) if rank != ranks.rank},
        )
        self._chosen = wanted - sum(counts[: ranks.rank])  # which of its rows, in the order of the ranks

    def start(self, x: Tensor, dim: int = -1) -> Callable[[], Tensor]:
        """Send what others need of x; the function that comes back waits for the ghosts."""
        return self._begin(x.index_select(dim, self._chosen), self.sends, self.receives, dim)

    def ghosts(self, x: Tensor, dim: int = -1) -> Tensor:
        """Exchange, differentiably: the gradient goes the opposite way."""
        result: Tensor = _Ghosts.apply(x, self, dim)  # type: ignore[no-untyped-call]
        return result

    def give_back(self, ghosts: Tensor, dim: int = -1) -> Tensor:
        """The adjoint: sums, at the owner of each row, of what the ranks that have it as a ghost hand in."""
        shape = list(ghosts.shape)
        shape[dim] = self.rows
        returned = self._begin(ghosts, self.receives, self.sends, dim)()
        return ghosts.new_zeros(shape).index_add_(dim, self._chosen, returned)

    def _begin(self, outgoing: Tensor, sends: list[int], receives: list[int], dim: int) -> Callable[[], Tensor]:
        shape, me = list(outgoing.shape), self.ranks.rank
        parts = []
        for shape[dim] in receives:
            parts.append(outgoing.new_empty(shape))
        finish = self.ranks.start_exchange(
            {rank: part.contiguous() for rank, part in enumerate(outgoing.split(sends, dim)) if rank != me},
            {rank: part for rank, part in enumerate(parts) if rank != me},
        )

        def arrived() -> Tensor:
            finish()
            return torch.cat(parts, dim)

        return arrived


class _Ghosts(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, halo: Halo, dim: int) -> Tensor:
        return halo.start(x, dim)()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Halo, int], output: Tensor) -> None:
        _, ctx.halo, ctx.dim = inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.halo.give_back(grad, ctx.dim), None, None
