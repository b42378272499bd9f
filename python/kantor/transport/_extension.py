"""The barycentric map of a plan between points, as a formula that any point can be put into."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 21  # of the costs that are looked at together: 16 MB


def softmax_map(points: Tensor, targets: Tensor, potential: Tensor, reg: float) -> Tensor:
    """``sum_j w_j y_j`` with ``w`` the softmax of ``(g_j - |x - y_j|^2) / reg``: ``(k, d)`` for the points ``(k, d)``.

    At the points of the problem itself these are their barycentric images, since ``P_ij / a_i`` is that softmax; where
    it is put elsewhere it is a convex combination of the targets too. float64; O(k m d) time, 16 MB of memory.
    """
    scaled = (2 / reg) * targets.mT
    # |x|^2 is the same for the whole row, so that the softmax does not see it: one product does.
    shift = (potential - targets.square().sum(1)) / reg
    parts = points.split(max(1, CHUNK_ENTRIES // len(targets)))
    return torch.cat([torch.softmax(torch.addmm(shift, part, scaled), 1) @ targets for part in parts])


__all__ = ["CHUNK_ENTRIES", "softmax_map"]
