"""Sums over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kantor._ranks import Ranks
from kantor.optim._multi_tensor import buckets


def shared(value: int, device: torch.device, ranks: Any) -> int:
    """The value of the group's first rank."""
    return int(Ranks(ranks).broadcast_(torch.tensor([value], device=device)))


def mean_over_ranks(values: list[Tensor | None], parameters: list[Tensor], ranks: Any) -> list[Tensor | None]:
    """Means over the ranks that take a missing one for zero; None where it is missing on all."""
    group = Ranks(ranks)
    there = torch.tensor([float(value is not None) for value in values], device=parameters[0].device)
    group.all_reduce_(there)
    used = [i for i, count in enumerate(there.tolist()) if count > 0]
    result: list[Tensor | None] = [None] * len(values)
    for some in buckets(used, lambda i: (parameters[i].device, parameters[i].dtype)).values():
        parts = [torch.zeros_like(parameters[i]) if (u := values[i]) is None else u for i in some]
        flat = torch.cat([part.reshape(-1) for part in parts])
        group.all_reduce_(flat).div_(group.size)
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
        Ranks(ranks).all_reduce_(bad)
    return float(bad) == 0
