"""The linear recurrence behind all explicit steps, on graphs and on dense weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kantor._checks import is_readable
from kantor.graph import _native
from kantor.graph._arguments import Similarity
from kantor.graph.graph import Graph


def explicit_step(graph: Similarity, step: float | Tensor) -> tuple[Tensor, Tensor]:
    """One step ``I - step (D - W)`` as entries E on the graph's pattern and a diagonal; a graph keeps the latest."""
    if isinstance(step, Tensor) or not isinstance(graph, Graph) or not is_readable(graph.weight):
        return _make_step(graph, step)
    latest: dict[float, tuple[Tensor, Tensor]] = graph._once(graph._of_weight, "explicit_step", dict)
    parts = latest.get(step)
    if parts is None:
        with torch.inference_mode(False):  # whoever makes it, others may want derivatives
            parts = _make_step(graph, step)
        latest.clear()
        latest[step] = parts
    return parts


def _make_step(graph: Similarity, step: float | Tensor) -> tuple[Tensor, Tensor]:
    edge = step * (graph.weight if isinstance(graph, Graph) else graph)
    total = row_sums(graph, edge)
    diagonal = (1 - total).to(edge.dtype)
    if edge.dtype is torch.float32:
        # The rounding of the diagonal, the same in every step, would make probabilities drift: 3e-6 in 200 steps. So
        # the entries are scaled, by less than a rounding of one, until rows sum to one with the rounded diagonal.
        with torch.no_grad():
            scale = torch.where(total > 0, (1 - diagonal.double()) / total, 1).to(edge.dtype)
        edge = edge * (scale[graph.rows] if isinstance(graph, Graph) else scale[..., None])
    return edge, diagonal


def recurrence(
    x: Tensor,
    graph: Similarity,
    edge: Tensor,
    diagonal: Tensor,
    num_steps: int,
    teleport: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """``x <- diagonal x + E x + teleport x_0``, num_steps times, dropout before each; E has the graph's pattern."""
    if isinstance(graph, Graph):
        # A compiler takes the transpose that is known, or finds it itself.
        transposed = graph.transposed if is_readable(x) else graph._of_pattern.get("transposed")

        def propagate(columns: Tensor) -> Tensor:
            return _native.propagate(
                graph.rowptr, graph.col, edge, diagonal, columns, num_steps, teleport, dropout, seed, transposed
            )

        return on_columns(x, propagate)
    generator = torch.Generator(x.device).manual_seed(seed) if dropout else None
    y = x
    for _ in range(num_steps):
        if dropout:
            y = y * (torch.rand(y.shape, generator=generator, device=y.device) >= dropout) / (1 - dropout)
        y = torch.addcmul(edge @ y, diagonal[..., None], y)
        y = y + teleport * x if teleport else y
    return y


def row_sums(graph: Similarity, values: Tensor) -> Tensor:
    """Sums of the rows of a matrix with the graph's pattern, ``(n,)`` or ``(B, n)``, in double precision."""
    if not isinstance(graph, Graph):
        return values.sum(-1, dtype=torch.float64)
    ones = torch.ones(graph.num_nodes, 1, dtype=torch.float64, device=values.device)
    return _native.product(graph.rowptr, graph.col, values.double(), ones)[:, 0]


def on_columns(x: Tensor, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a map of ``(n, d)`` to x; on one graph the entries of a batch ``(B, n, d)`` are just more columns."""
    if x.ndim == 2:
        return apply(x)
    batch, _, width = x.shape
    result: Tensor = apply(x.movedim(0, 1).flatten(1)).unflatten(1, (batch, width)).movedim(1, 0)
    return result
