"""Colours of one photograph onto another by optimal transport: for ``kantor transport`` and ``kantor demo``.

A photograph is a cloud of colours. A sample of the pixels of each is coupled; the barycentric map of the plan says what
becomes of a colour of the sample, and its formula makes sense for any other colour too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kantor.transport import TransportResult
from kantor.transport._cost import COSINE, SQEUCLIDEAN
from kantor.transport._extension import CHUNK_ENTRIES, softmax_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[np.float64]  # (h, w, 3), values in [0, 1]

_LEVELS = 65535  # colours are told apart to 16 bits a channel


def sample_colours(image: Image, count: int, random: np.random.Generator) -> Tensor:
    """Colours (k, 3) of ``count`` pixels drawn without replacement, or of all where there are no more."""
    colours = image.reshape(-1, 3)
    if len(colours) > count:
        colours = colours[random.choice(len(colours), count, replace=False)]
    return torch.from_numpy(np.ascontiguousarray(colours, dtype=np.float64))


def extend_map(result: TransportResult, points: Tensor, targets: Tensor) -> Tensor:
    """The barycentric map of a problem of points, at points that need not be its own.

    Parameters
    ----------
    result : TransportResult
        Of ``solve_sample(X, Y, ...)``.
    points : Tensor (k, d)
        Where the map is wanted.
    targets : Tensor (m, d)
        Y.

    Returns
    -------
    Tensor (k, d), float64
        ``sum_j w_j y_j`` with ``w`` the softmax of ``(g_j - c(x, y_j)) / reg``: a convex combination of the targets, at
        the problem's own points their barycentric images. O(k m d) time, 16 MB of memory.
    """
    assert not isinstance(result.cost, list)
    cost, reg = result.cost.detach(), result.reg
    g = result.potentials[1].detach().to(torch.float64)
    points, targets = points.to(torch.float64), targets.to(torch.float64)
    if cost.kind == SQEUCLIDEAN:
        return softmax_map(points, targets, g, reg)
    images = []
    for part in points.split(max(1, CHUNK_ENTRIES // len(targets))):
        x = torch.nn.functional.normalize(part, dim=-1) if cost.kind == COSINE else part
        tile = replace(cost, x=x.to(cost.dtype)).tile(0, len(part))
        images.append(torch.softmax((g - tile.to(torch.float64)) / reg, 1) @ targets)
    return torch.cat(images)


def recolour(image: Image, result: TransportResult, targets: Tensor) -> Image:
    """Every pixel's colour under :func:`extend_map`; equal colours are mapped once."""
    levels = np.rint(np.clip(image, 0.0, 1.0).reshape(-1, 3) * _LEVELS).astype(np.int64)
    codes, places = np.unique((levels[:, 0] << 32) | (levels[:, 1] << 16) | levels[:, 2], return_inverse=True)
    colours = np.stack([codes >> 32, (codes >> 16) & _LEVELS, codes & _LEVELS], axis=1) / _LEVELS
    mapped = extend_map(result, torch.from_numpy(colours), targets).numpy()
    return np.asarray(mapped[places.reshape(-1)].reshape(image.shape))
