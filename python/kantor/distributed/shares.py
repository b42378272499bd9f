"""Vectors between one process and many: contiguous shares, dealt out and collected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kantor._ranks import Ranks


def shares(n: int, size: int) -> list[int]:
    """How many of n rows each of `size` ranks takes: equal but for one.

    Examples
    --------
    >>> from kantor.distributed import shares
    >>> shares(10, 4)
    [2, 3, 2, 3]
    """
    return [n * (rank + 1) // size - n * rank // size for rank in range(size)]


def split(
    value: Tensor | None, ranks: Ranks, counts: Sequence[int] | None = None, *, dim: int = -1, source: int | None = None
) -> Tensor:
    """Return this rank's share of a tensor that all ranks hold, or that one rank deals out.

    Parameters
    ----------
    value : Tensor or None
        The whole. With `source` the other ranks pass None.
    ranks : Ranks
    counts : sequence of int, optional
        Rows for each rank. Default: :func:`shares`.
    dim : int
        The dimension that is cut; vectors are ``(..., n)``.
    source : int, optional
        The rank that alone holds the tensor.

    Raises
    ------
    ValueError
        On every rank, when the tensor is missing or the counts do not add up to its length.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import Ranks, split
    >>> split(torch.arange(3), Ranks())  # of one process: all
    tensor([0, 1, 2])
    """
    with ranks.together():
        holds = source is None or ranks.rank == source
        if holds and not isinstance(value, Tensor):
            raise ValueError(f"split: value: expected a tensor on this rank, got {type(value).__name__}")
        lengths: list[int] = []
        if value is not None and holds:
            lengths = list(counts) if counts is not None else shares(value.shape[dim], ranks.size)
            if len(lengths) != ranks.size or sum(lengths) != value.shape[dim] or min(lengths) < 0:
                raise ValueError(
                    f"split: counts: expected {ranks.size} numbers that add up to {value.shape[dim]}, got {lengths}"
                )
    if source is None:
        assert value is not None
        share: Tensor = value.split(lengths, dim)[ranks.rank].contiguous()
        return share
    header = (tuple(value.shape), value.dtype, value.device.type, lengths) if value is not None and holds else None
    shape, dtype, device, lengths = ranks.broadcast_object(header, source)
    if value is not None and holds:
        parts: list[Tensor] = [part.contiguous() for part in value.split(lengths, dim)]
        ranks.exchange({rank: part for rank, part in enumerate(parts) if rank != source}, {})
        return parts[source]
    mine = list(shape)
    mine[dim] = lengths[ranks.rank]
    part = torch.empty(mine, dtype=dtype, device=device)
    ranks.exchange({}, {source: part})
    return part


def gather(share: Tensor, ranks: Ranks, *, dim: int = -1, target: int | None = None) -> Tensor | None:
    """Put the shares together again, on every rank or on one.

    Parameters
    ----------
    share : Tensor
        This rank's part; the others may have other lengths in `dim`.
    ranks : Ranks
    dim : int
        The dimension that was cut.
    target : int, optional
        The only rank that gets the whole; the others get None. Default: all get it.

    Examples
    --------
    >>> import torch
    >>> from kantor.distributed import Ranks, gather
    >>> gather(torch.arange(3), Ranks())
    tensor([0, 1, 2])
    """
    lengths = [row[0] for row in ranks.table(share.shape[dim])]
    if target is None:
        parts = ranks.all_gather(share.movedim(dim, 0).contiguous())
        return torch.cat(parts).movedim(0, dim)
    if ranks.rank != target:
        ranks.exchange({target: share.contiguous()}, {})
        return None
    pieces: dict[int, Tensor] = {}
    for rank, length in enumerate(lengths):
        shape = list(share.shape)
        shape[dim] = length
        pieces[rank] = share if rank == target else share.new_empty(shape)
    ranks.exchange({}, {rank: piece for rank, piece in pieces.items() if rank != target})
    return torch.cat([pieces[rank] for rank in range(ranks.size)], dim)
