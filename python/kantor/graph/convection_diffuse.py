"""Convection and diffusion on a graph: ``u_t = -div(V u) + div(W grad u)`` with a velocity on every edge."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_tensor, is_readable
from kantor._errors import StabilityError
from kantor.graph._arguments import (
    check_choice,
    check_count,
    check_fit,
    check_points,
    check_step,
)
from kantor.graph._recurrence import recurrence, row_sums
from kantor.graph.diffuse import diffuse
from kantor.graph.graph import Graph
from kantor.graph.stability import MODES, Mode, round_down

SCHEMES = ("upwind",)


def convection_diffuse(
    u: Tensor,
    graph: Graph,
    velocity: Tensor | None = None,
    *,
    step: float | Tensor,
    num_steps: int,
    scheme: str = "upwind",
    stability: Mode = "error",
) -> Tensor:
    """Move values along the edges of a graph while they diffuse: explicit steps with upwind fluxes.

    What leaves node i towards j, at the rate ``max(v_ij, 0) u_i``, arrives at j:
    ``u_i <- u_i + step sum_j [W_ij (u_j - u_i) + max(-v_ij, 0) u_j - max(v_ij, 0) u_i]``.

    Parameters
    ----------
    u : Tensor
        ``(n, d)``, or ``(B, n, d)`` for a batch; float32 or float64.
    graph : Graph
        n nodes, of the dtype and on the device of u. Edges that only carry have the weight zero, stored.
    velocity : Tensor, optional
        Velocity ``v_ij`` from i to j: ``(nnz,)`` in the order of ``graph.col``, or dense ``(n, n)``, zero where
        there is no edge. Antisymmetric, ``v_ij = -v_ji``; may require a gradient. Default: zero, pure diffusion, the
        same bits as :func:`diffuse`.
    step : float or Tensor
        Length of a step, >= 0; may require a gradient.
    num_steps : int
        >= 0.
    scheme : {"upwind"}
        First order, conservative and positive. It smears a moving front like a diffusion of ``|v| (1 - step |v|) / 2``.
    stability : {"error", "warn", "ignore"}
        What to do unless ``step max_i sum_j (W_ij + max(v_ij, 0)) <= 1`` (j != i): then positive values stay positive
        and, for symmetric weights, ``sum |u|`` never grows. Pure diffusion is judged as in :func:`diffuse`.

    Returns
    -------
    Tensor
        Shaped like u; differentiable with respect to u, the weights, the velocity and the step.

    Raises
    ------
    TypeError
        u or velocity is no tensor of these dimensions and dtypes, graph no Graph, step no number.
    ValueError
        u or velocity do not fit the graph; a velocity that is not antisymmetric (relative tolerance 1e-6) or not
        finite; an argument out of range.
    StabilityError
        An unstable step; the message gives the largest safe one.

    Notes
    -----
    Column sums are conserved for symmetric weights. Cost, memory and determinism are those of :func:`diffuse`.

    Source: extends Wang, Bao and Shi, *Convection-Diffusion Equation: A Theoretically Certified Framework for Neural
    Networks*, arXiv 2403.15726, from points to velocities on edges; first-order upwind differences: Courant, Isaacson
    and Rees 1952.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import Graph, convection_diffuse
    >>> edge = Graph(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), torch.zeros(2))
    >>> u = torch.tensor([[1.0], [0.0]])
    >>> convection_diffuse(u, edge, torch.tensor([1.0, -1.0]), step=0.25, num_steps=1).T
    tensor([[0.7500, 0.2500]])
    """
    u = check_points("convection_diffuse", u, "u")
    if not isinstance(graph, Graph):
        raise TypeError(
            f"convection_diffuse: graph: expected a kantor.graph.Graph, got {type(graph).__name__}; see "
            "kantor.graph.from_torch"
        )
    check_fit("convection_diffuse", u, graph, "u")
    step = check_step("convection_diffuse", step)
    num_steps = check_count("convection_diffuse", num_steps)
    check_choice("convection_diffuse", scheme, "scheme", SCHEMES)
    check_choice("convection_diffuse", stability, "stability", MODES)
    if velocity is None:
        return diffuse(u, graph, step, num_steps, stability=stability)
    outflow = _on_edges(velocity, graph)
    if num_steps == 0 or u.numel() == 0:
        return u.clone()
    if is_readable(outflow) and not outflow.requires_grad and not bool(outflow.any()):
        return diffuse(u, graph, step, num_steps, stability=stability)

    # What enters along an edge, E = step (W + max(-v, 0)), and what leaves: row sums of step (W + max(v, 0)).
    _check_step_length(graph, outflow, step, stability)
    edge = step * (graph.weight + (-outflow).clamp(min=0))
    diagonal = (1 - row_sums(graph, step * (graph.weight + outflow.clamp(min=0)))).to(u.dtype)
    return recurrence(u, graph, edge, diagonal, num_steps)


def _on_edges(velocity: Tensor, graph: Graph) -> Tensor:
    """The velocity of each stored entry, checked."""
    call = "convection_diffuse"
    velocity = check_tensor(velocity, call, "velocity")
    check_float(velocity, call, "velocity")
    for what, mine, its in (("device", velocity.device, graph.device), ("dtype", velocity.dtype, graph.dtype)):
        if mine != its:
            raise ValueError(f"{call}: velocity has {what} {mine}, graph {its}; convert one with .to({what})")
    n = graph.num_nodes
    if velocity.shape not in ((graph.num_edges,), (n, n)):
        raise ValueError(
            f"{call}: velocity: expected shape ({graph.num_edges},), one for each entry of graph.col, or ({n}, {n}), "
            f"got {tuple(velocity.shape)}"
        )
    check_finite(velocity, call, "velocity")
    values = velocity if velocity.ndim == 1 else velocity[graph.rows, graph.col.long()]
    if not is_readable(velocity):
        return values
    if velocity.ndim == 2 and int(velocity.count_nonzero()) != int(values.count_nonzero()):
        raise ValueError(
            f"{call}: velocity: expected zeros where the graph has no edge; store that edge, with the weight zero"
        )
    with torch.no_grad():
        difference, row, col = _worst_pair(values, graph)
        if difference > 1e-6 * float(values.abs().max()) if values.numel() else False:
            raise ValueError(
                f"{call}: velocity: expected v_ij = -v_ji, got v_ij + v_ji = {difference:.3g} at ({row}, {col}); for "
                "values v on a graph that holds both directions take v - v.T"
            )
    return values


def _worst_pair(values: Tensor, graph: Graph) -> tuple[float, int, int]:
    """``max |v_ij + v_ji|`` and where; an entry that is not stored counts as zero."""
    if not values.numel():
        return 0.0, 0, 0
    n, rows, cols = graph.num_nodes, graph.rows, graph.col.long()
    key, mirrored = rows * n + cols, cols * n + rows  # rows are sorted: so are the keys
    place = torch.searchsorted(key, mirrored).clamp(max=key.numel() - 1)
    opposite = torch.where(key[place] == mirrored, values[place], 0.0)
    worst = int((values + opposite).abs().argmax())
    return float((values + opposite)[worst].abs()), int(rows[worst]), int(cols[worst])


def _check_step_length(graph: Graph, outflow: Tensor, step: float | Tensor, mode: str) -> None:
    tensors = (outflow, graph.weight, *([step] if isinstance(step, Tensor) else []))
    if mode == "ignore" or not all(map(is_readable, tensors)):
        return
    with torch.no_grad():
        rate = float((row_sums(graph, graph.weight + outflow.clamp(min=0)) - graph.diagonal).max())
    value = float(step.detach() if isinstance(step, Tensor) else step)
    if value * rate <= 1 + 16 * torch.finfo(graph.dtype).eps:
        return
    message = (
        f"convection_diffuse: step: expected at most {round_down(1 / rate):.4g}, the largest safe step for this "
        f"velocity, got {value:.4g}: step * max_i sum_j (W_ij + max(v_ij, 0)) = {value * rate:.4g} > 1; take a smaller "
        "step with more num_steps, or pass stability='warn' or 'ignore'"
    )
    if mode == "error":
        raise StabilityError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


__all__ = ["convection_diffuse"]
