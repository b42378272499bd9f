"""Sums over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kantor.optim._multi_tensor import buckets


def shared(value: int, device: torch.device, ranks: Any) -> int:
    """The value of the group's first rank."""
    tensor = torch.tensor(value, device=device)
    dist.broadcast(tensor, dist.get_global_rank(ranks, 0), group=ranks)
    return int(tensor)


def mean_over_ranks(values: list[Tensor | None], parameters: list[Tensor], ranks: Any) -> list[Tensor | None]:
    """Means over the ranks that take a missing one for zero; None where it is missing on all."""
    there = torch.tensor([float(value is not None) for value in values], device=parameters[0].device)
    dist.all_reduce(there, group=ranks)
    used = [i for i, count in enumerate(there.tolist()) if count > 0]
    result: list[Tensor | None] = [None] * len(values)
    for some in buckets(used, lambda i: (parameters[i].device, parameters[i].dtype)).values():
        parts = [torch.zeros_like(parameters[i]) if (u := values[i]) is None else u for i in some]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=ranks)
        flat /= dist.get_world_size(ranks)
        for i, part in zip(some, flat.split([part.numel() for part in parts]), strict=True):
            result[i] = part.view(parameters[i].shape)
    return result


def all_finite(values: list[Tensor | None], ranks: Any) -> bool:
    """Whether all values are, on all ranks."""
    tensors = [value for value in values if value is not None]
    if not tensors:
        return True
    bad = torch.zeros((), device=tensors[0].device)
    for value in tensors:
        bad += (~torch.isfinite(value).all()).to(bad)
    if ranks is not None:
        dist.all_reduce(bad, group=ranks)
    return float(bad) == 0
