"""The discrete Poisson equation on a region of a picture.

Source: P. Perez, M. Gangnet, A. Blake, "Poisson image editing", ACM Transactions on Graphics 22(3), 2003; equation
numbers are theirs. Inside the region the unknown f has the Laplacian of a guidance field v, on the region's rim it
equals the picture: a sparse symmetric positive definite system with one unknown a pixel, the same for every colour
channel, so the three channels are one batch of right-hand sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kantor.linalg import CSR, Stencil

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kantor.demo.pictures import Image, Mask
    from kantor.linalg import LinearOperator


@dataclass(frozen=True)
class RegionSystem:
    """The Poisson equation (7) on the pixels of a region, any shape.

    ``matrix`` has one row for each pixel p of the region, in reading order: |N_p| on the diagonal, -1 for each
    neighbour in the region, where N_p are the up to four neighbours inside the picture. ``pixels`` are the flat
    indices of the region's pixels (n,); ``neighbours`` their neighbours' (n, 4), ``inside`` whether these are in the
    picture, ``known`` whether they are in the picture and outside the region.
    """

    matrix: CSR
    pixels: NDArray[np.int64]
    neighbours: NDArray[np.int64]
    inside: Mask
    known: Mask


def region_system(mask: Mask) -> RegionSystem:
    """Assemble equation (7) for the True pixels of ``mask`` (height, width). O(height * width).

    Where the region touches the picture's border the missing neighbours drop out (equation 8), which leaves the
    slope there free.

    Raises
    ------
    ValueError
        The region is empty, or covers the whole picture and so has no rim to take values from.
    """
    n = int(mask.sum())
    if n == 0 or n == mask.size:
        raise ValueError(f"region_system: mask must select some but not all pixels, got {n} of {mask.size}")
    height, width = mask.shape
    y, x = np.nonzero(mask)
    # Up, left, right, down: with the pixel itself in the middle, column numbers of each row come out ascending.
    neighbour_y = np.stack([y - 1, y, y, y + 1], axis=1)
    neighbour_x = np.stack([x, x - 1, x + 1, x], axis=1)
    inside = (neighbour_y >= 0) & (neighbour_y < height) & (neighbour_x >= 0) & (neighbour_x < width)
    neighbours = np.where(inside, neighbour_y * width + neighbour_x, 0)
    unknown = inside & mask.ravel()[neighbours]

    number = np.cumsum(mask.ravel()) - 1
    columns = np.insert(number[neighbours], 2, np.arange(n), axis=1)
    stored = np.insert(unknown, 2, True, axis=1)
    values = np.insert(np.full((n, 4), -1.0), 2, inside.sum(axis=1), axis=1)
    crow = np.concatenate([[0], np.cumsum(stored.sum(axis=1))])
    entries = torch.from_numpy(columns[stored]), torch.from_numpy(values[stored])
    matrix = CSR(torch.from_numpy(crow), *entries, (n, n))
    return RegionSystem(matrix, y * width + x, neighbours, inside, inside & ~unknown)


def right_hand_side(system: RegionSystem, target: Image, source: Image | None, *, mixed: bool = False) -> torch.Tensor:
    """Right-hand side of equation (7): sum of the known neighbours plus sum of v_pq, shape (3, n).

    Parameters
    ----------
    system : RegionSystem
        The region.
    target : array (height, width, 3)
        The picture that surrounds the region.
    source : array (height, width, 3) or None
        The picture whose gradients are imported, v_pq = g_p - g_q (equation 11), in ``target``'s coordinates;
        None for v = 0, the membrane that fills a hole smoothly (equation 2).
    mixed : bool
        Take the larger of the two pictures' gradients for each pair of pixels (equation 13).
    """
    f = target.reshape(-1, 3)
    b = np.where(system.known[..., None], f[system.neighbours], 0.0).sum(axis=1)
    if source is not None:
        g = source.reshape(-1, 3)
        v = g[system.pixels][:, None] - g[system.neighbours]
        if mixed:
            own = f[system.pixels][:, None] - f[system.neighbours]
            v = np.where(np.abs(own) > np.abs(v), own, v)
        b += np.where(system.inside[..., None], v, 0.0).sum(axis=1)
    return torch.from_numpy(np.ascontiguousarray(b.T))


def insert(system: RegionSystem, target: Image, x: torch.Tensor) -> Image:
    """``target`` with the region's pixels replaced by ``x`` (3, n), clipped to [0, 1]."""
    out = target.reshape(-1, 3).copy()
    out[system.pixels] = x.numpy().T
    return np.clip(out, 0.0, 1.0).reshape(target.shape)


def tileable(texture: Image) -> tuple[LinearOperator, torch.Tensor, Image]:
    """Poisson system that makes a rectangular texture seamless when repeated (their "seamless tiling").

    Opposite edges get their common mean, the inside keeps the texture's gradients. The region is a rectangle with
    all its rim known, so the matrix is the five-point stencil and is never stored.

    Returns
    -------
    tuple
        The operator, the right-hand side (3, height - 2, width - 2), and the texture with the new edges.
    """
    framed = texture.copy()
    framed[0] = framed[-1] = (texture[0] + texture[-1]) / 2
    framed[:, 0] = framed[:, -1] = (texture[:, 0] + texture[:, -1]) / 2
    framed[[0, 0, -1, -1], [0, -1, 0, -1]] = texture[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    inner = texture[1:-1, 1:-1]
    b = 4 * inner - texture[:-2, 1:-1] - texture[2:, 1:-1] - texture[1:-1, :-2] - texture[1:-1, 2:]
    b[0] += framed[0, 1:-1]
    b[-1] += framed[-1, 1:-1]
    b[:, 0] += framed[1:-1, 0]
    b[:, -1] += framed[1:-1, -1]
    return Stencil(inner.shape[:2]), torch.from_numpy(np.ascontiguousarray(np.moveaxis(b, -1, 0))), framed
