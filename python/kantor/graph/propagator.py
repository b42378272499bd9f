"""The matrix of K explicit diffusion steps, ``P = (I - step L)^K``."""

from __future__ import annotations

import torch
from torch import Tensor

from kantor.graph._arguments import Similarity, check_count, check_similarity, check_step
from kantor.graph._recurrence import explicit_step, recurrence
from kantor.graph.graph import Graph
from kantor.graph.stability import Mode, check_stability

_DENSE_SPEED = 4.0  # multiplications that a dense product makes in the time of one of a sparse product, about


def propagator(
    graph: Similarity,
    step: float | Tensor,
    num_steps: int,
    rows: Tensor | None = None,
    *,
    stability: Mode = "error",
) -> Tensor:
    """Return the matrix ``P = (I - step (D - W))^num_steps``, or some of its rows.

    Worth it where the same steps are made again and again on up to some thousand nodes: form P once, multiply by it in
    every epoch. A loss on few labelled nodes needs only their rows.

    Parameters
    ----------
    graph : Graph or Tensor
        A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``, for a batch of small problems at once.
    step : float or Tensor
        Length of a step, >= 0; may require a gradient.
    num_steps : int
        K >= 0.
    rows : Tensor, optional
        ``(m,)`` indices of nodes. Default: all.
    stability : {"error", "warn", "ignore"}
        What to do about an unstable step; see :func:`stability`.

    Returns
    -------
    Tensor
        ``(n, n)`` or ``(B, n, n)``, dense; with `rows` ``(m, n)`` or ``(B, m, n)``. Differentiable with respect to the
        weights and the step.

    Raises
    ------
    TypeError
        graph is neither, step no number, rows no integers.
    ValueError
        Weights that are not square, negative or not finite; a step or number of steps out of range.
    IndexError
        rows out of range.
    StabilityError
        An unstable step.

    Notes
    -----
    Repeated squaring, ``2 n^3 log2 K`` multiply-adds, or K products of the rows wanted with the weights, whichever is
    cheaper. Deterministic.

    Source: Wang, Dou, Bao and Shi, IEEE TPAMI 46(2), 2024, equation of the diffusion block, taken to the power K.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import propagator
    >>> weights = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> propagator(weights, step=0.25, num_steps=2)
    tensor([[0.6250, 0.3750],
            [0.3750, 0.6250]])
    """
    graph = check_similarity("propagator", graph)
    step = check_step("propagator", step)
    num_steps = check_count("propagator", num_steps)
    nodes = graph.num_nodes if isinstance(graph, Graph) else graph.shape[-1]
    rows = None if rows is None else _check_rows(rows, nodes)
    check_stability("propagator", graph, step, stability, graph.weight if isinstance(graph, Graph) else graph)
    wanted = nodes if rows is None else rows.numel()
    squarings = max(num_steps.bit_length() - 1, 0) + max(num_steps.bit_count() - 1, 0)
    if isinstance(graph, Graph):
        if num_steps * wanted * graph.num_edges * _DENSE_SPEED < squarings * nodes**3:
            return _by_sparse_products(graph, step, num_steps, rows)
        graph = graph.dense()
    edge, diagonal = explicit_step(graph, step)
    one_step = torch.diag_embed(diagonal) + edge
    if rows is not None and num_steps * wanted < squarings * nodes:
        result = torch.eye(nodes, dtype=graph.dtype, device=graph.device)[rows].expand(*graph.shape[:-2], -1, -1)
        for _ in range(num_steps):
            result = result @ one_step
        return result.clone() if num_steps == 0 else result
    power: Tensor = torch.linalg.matrix_power(one_step, num_steps)
    return power if rows is None else power.index_select(-2, rows)


def _by_sparse_products(graph: Graph, step: float | Tensor, num_steps: int, rows: Tensor | None) -> Tensor:
    """Rows of P as columns of its transpose: the recurrence with ``W'`` on unit vectors."""
    units = torch.eye(graph.num_nodes, dtype=graph.dtype, device=graph.device)
    units = units if rows is None else units[:, rows]
    edge, diagonal = explicit_step(graph, step)
    return recurrence(units, graph.T, edge[graph.transposed.permutation], diagonal, num_steps).T


def _check_rows(rows: Tensor, nodes: int) -> Tensor:
    rows = torch.as_tensor(rows)
    if rows.dtype not in (torch.int32, torch.int64) or rows.ndim != 1:
        raise TypeError(
            f"propagator: rows: expected a vector of integers, got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    if rows.numel() and not -nodes <= int(rows.min()) <= int(rows.max()) < nodes:
        raise IndexError(f"propagator: rows: expected 0..{nodes - 1}, got {int(rows.min())}..{int(rows.max())}")
    return rows.long() % max(nodes, 1)


__all__ = ["propagator"]
