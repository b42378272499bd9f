"""Where the rows of a matrix are on a grid, found from which rows are linked and from their order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WASTE = 16  # cells of the grid per unknown beyond which the grid would cost more than it saves


class NotAGridError(ValueError):
    """The matrix is not that of a :class:`PoissonGrid`; the message says what gave it away."""


@dataclass(frozen=True)
class Links:
    """Entries above the diagonal, sorted by row: first < second, weight = -entry > 0."""

    first: Tensor
    second: Tensor
    weight: Tensor

    def sums(self, n: int) -> Tensor:
        """Sum of the weights at each row."""
        total = torch.zeros(n, dtype=torch.float64)
        return total.index_add(0, self.first, self.weight).index_add(0, self.second, self.weight)


def box(rows: Tensor, links: Links, n: int) -> Tensor | None:
    """Positions (m, d) in a box with all its n cells in C order, or None where the distances are not those of one."""
    strides = torch.unique(rows[links.second] - rows[links.first])[:4].tolist()
    sizes = [*strides[1:], n]
    if len(strides) not in (2, 3) or strides[0] != 1 or any(b % a for a, b in zip(strides, sizes, strict=True)):
        return None
    wraps = zip(strides, sizes, strict=True)
    return torch.stack([rows % size // stride for stride, size in reversed(list(wraps))], -1)


def fits(position: Tensor, links: Links) -> bool:
    """Whether links join neighbours, and all neighbours, and no two unknowns are in one cell."""
    step = position[links.second] - position[links.first]
    if not bool(((step.abs().sum(-1) == 1) & (step.sum(-1) == 1)).all()):
        return False
    taken = occupied(position)
    pairs = 0
    for axis, n in enumerate(taken.shape):
        pairs += int((taken.narrow(axis, 0, n - 1) & taken.narrow(axis, 1, n - 1)).sum())
    return int(taken.sum()) == len(position) and pairs == links.first.numel()


def occupied(position: Tensor) -> Tensor:
    """Whether there is an unknown, on the smallest grid from the origin that holds them all."""
    shape = [int(n) for n in position.max(0).values + 1]
    taken = torch.zeros(shape, dtype=torch.bool)
    taken[position.unbind(-1)] = True
    return taken


def masked(rows: Tensor, links: Links) -> Tensor:
    """Positions (m, d) of the unknowns of a masked grid in C order, each connected component in a box of its own."""
    try:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import breadth_first_order, connected_components
    except ImportError as error:
        raise NotAGridError('the unknowns do not fill a box, and for others scipy is needed, extra "cli"') from error

    m = rows.numel()
    start, upper, axis = _axes(rows, links)
    d = upper.shape[1]
    ends = links.first.numpy(), links.second.numpy()
    graph = coo_array((torch.ones(len(ends[0])).numpy(), ends), shape=(m, m))
    count, labels = connected_components(graph, directed=False)
    component = torch.from_numpy(labels).long()
    # A root above the first rows of all components makes one tree; positions add up along it, by pointer doubling.
    roots = torch.full((count,), m).scatter_reduce(0, component, torch.arange(m), "amin")
    ends = (torch.cat([links.first, torch.full((count,), m)]).numpy(), torch.cat([links.second, roots]).numpy())
    tree = coo_array((torch.ones(len(ends[0])).numpy(), ends), shape=(m + 1, m + 1)).tocsr()
    parent = torch.from_numpy(breadth_first_order(tree, m, directed=False)[1]).long()
    parent[roots], parent[m] = m, m
    child = (parent[:m] < m).nonzero().squeeze(-1)
    low, high = torch.minimum(child, parent[child]), torch.maximum(child, parent[child])
    slot = (upper[low] == high.unsqueeze(-1)).int().argmax(-1)
    position = torch.zeros(m + 1, d, dtype=torch.int64)
    position[child, axis[start[low] + slot]] = torch.where(child == high, 1, -1)
    while bool((parent < m).any()):
        position = position + position[parent]
        parent = parent[parent]

    position = position[:m]
    index = component.unsqueeze(-1).expand(-1, d)
    least = torch.zeros(count, d, dtype=torch.int64).scatter_reduce(0, index, position, "amin")
    position = position - least[component]
    extent = torch.zeros(count, d, dtype=torch.int64).scatter_reduce(0, index, position, "amax") + 1
    # One above the other along axis 0, two cells apart, so that none is beside the rim of another.
    heights = extent[:, 0] + 2
    position[:, 0] += (heights.cumsum(0) - heights)[component]
    cells = int(heights.sum()) * math.prod((extent[:, 1:].max(0).values + 2).tolist())
    if cells > _WASTE * m + 4096:
        raise NotAGridError(f"the grid would have {cells:,} cells for {m:,} unknowns, or the order is not that of one")
    return position


def _axes(rows: Tensor, links: Links) -> tuple[Tensor, Tensor, Tensor]:
    """Return where each row's links start, the rows they lead up to (m, d), and the axis of every link.

    In C order the neighbours above a row come in the order x, y, z, those below in the order z, y, x, and the neighbour
    in x is the next row. That settles rows with all their neighbours on one side, and those that lack x alone. Opposite
    sides of a square are parallel, which carries the answer on. What is left is guessed: x where it is the next row,
    else y.
    """
    m = rows.numel()
    above, below = torch.bincount(links.first, minlength=m), torch.bincount(links.second, minlength=m)
    d = max(2, int(above.max()), int(below.max()))
    if d > 3:
        raise NotAGridError(f"a row has links to {d} rows on one side of the diagonal, a grid at most 3")
    start = above.cumsum(0) - above
    slot = torch.arange(links.first.numel()) - start[links.first]
    upper = torch.full((m, d), -1)
    upper[links.first, slot] = links.second
    by_second = torch.argsort(links.second, stable=True)
    rank = torch.empty_like(slot)
    rank[by_second] = torch.arange(slot.numel()) - (below.cumsum(0) - below)[links.second[by_second]]

    axis = torch.full_like(slot, -1)
    next_row = rows[links.second] == rows[links.first] + 1
    for end, neighbours, known in ((links.second, below, rank), (links.first, above, d - 1 - slot)):
        lacks_x = torch.ones(m, dtype=torch.bool)
        lacks_x[end[next_row]] = False
        missing = d - neighbours[end]
        axis = torch.where(missing == 0, known, axis)
        # The axes above x, outermost last among the slots, first among the ranks.
        axis = torch.where((missing == 1) & lacks_x[end], known if end is links.second else known - 1, axis)
    one, other = _parallel(start, upper)
    while True:
        open_ends = (axis[one] < 0) != (axis[other] < 0)
        if not bool(open_ends.any()):
            break
        pair = torch.stack([one[open_ends], other[open_ends]])
        pair = torch.where(axis[pair[0]] < 0, pair.flip(0), pair)
        axis[pair[1]] = axis[pair[0]]
        undecided = (axis[one] < 0) | (axis[other] < 0)
        one, other = one[undecided], other[undecided]
    guess = torch.where(next_row, d - 1, d - 2)
    return start, upper, torch.where(axis < 0, guess, axis)


def _parallel(start: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of links that are opposite sides of a square: row i, two rows above it, and one above both."""
    d = upper.shape[1]
    pairs = []
    for a in range(d):
        for b in range(a + 1, d):
            i = (upper[:, b] >= 0).nonzero().squeeze(-1)
            via_a, via_b = upper[i, a], upper[i, b]
            for to_a in range(d):
                for to_b in range(d):
                    top = upper[via_a, to_a]
                    closed = (top >= 0) & (top == upper[via_b, to_b])
                    low, left, right = start[i[closed]], start[via_a[closed]], start[via_b[closed]]
                    pairs += [torch.stack([low + a, right + to_b]), torch.stack([low + b, left + to_a])]
    joined = torch.cat(pairs, 1)
    return joined[0], joined[1]
