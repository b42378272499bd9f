"""Weights of a nearest-neighbour graph from distances: which neighbours a point keeps, and how strongly it holds them.

All of it on ``(n, m)`` tensors, a row a point, its neighbours in order of distance; no derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kantor.graph._pattern import pointers


def self_tuning(distance: Tensor, k: int, bandwidth_k: int) -> tuple[Tensor, Tensor]:
    """``exp(-(d_ij / s_i)^2)`` for the neighbours strictly nearer than the k-th: weights, and which are kept."""
    kept = distance < distance[:, k - 1 : k]
    positive = distance[distance > 0]
    # A scale of zero, from duplicates, becomes a small share of the median distance; without any distance, one.
    tiny = 1e-6 if distance.dtype is torch.float64 else 1e-4
    floor = tiny * float(positive.median()) if positive.numel() else 1.0
    return torch.exp(-(distance / _scale(distance, bandwidth_k).clamp(min=floor)[:, None]).square()), kept


def gaussian(distance: Tensor, bandwidth_k: int, sigma: float | None) -> Tensor:
    """``exp(-(d_ij / sigma)^2)``, with the median scale of the points where sigma is None."""
    if sigma is None:
        sigma = float(_scale(distance, bandwidth_k).median())
    if sigma == 0:  # so many duplicates: they alone are near
        return (distance == 0).to(distance.dtype)
    return torch.exp(-(distance / sigma).square())


def _scale(distance: Tensor, bandwidth_k: int) -> Tensor:
    """Distance to the `bandwidth_k`-th nearest point, the point itself being the first."""
    return distance[:, bandwidth_k - 2] if bandwidth_k > 1 else torch.zeros_like(distance[:, 0])


def assemble(index: Tensor, weight: Tensor, kept: Tensor, loops: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, columns and weights of the entries that are kept, and of self loops of weight one where asked for.

    Every row is sorted by column: m entries at a time, no sort over all of them.
    """
    n = len(index)
    index = index.long()
    if loops is not None:
        index = torch.cat([torch.arange(n, device=index.device)[:, None], index], 1)
        weight = torch.cat([weight.new_ones(n, 1), weight], 1)
        kept = torch.cat([loops[:, None], kept], 1)
    column, order = torch.where(kept, index, n).sort(dim=1)
    kept = column < n
    return pointers(kept.sum(1)), column[kept].to(torch.int32), weight.gather(1, order)[kept]
