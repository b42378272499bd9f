"""Diffusion on a graph: steps of the heat equation ``dx/dt = -(D - W) x``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kantor.graph._arguments import (
    SharedGraph,
    Similarity,
    check_choice,
    check_count,
    check_fit,
    check_fraction,
    check_points,
    check_similarity,
    check_step,
)
from kantor.graph._chebyshev import heat_kernel
from kantor.graph._recurrence import explicit_step, full_precision, recurrence
from kantor.graph.implicit_diffuse import implicit_diffuse
from kantor.graph.propagator import propagator
from kantor.graph.stability import MODES, Mode, check_stability, require_symmetric

METHODS = ("explicit", "implicit", "propagator", "chebyshev")
Method = Literal["explicit", "implicit", "propagator", "chebyshev"]


def diffuse(
    x: Tensor,
    graph: Similarity | SharedGraph,
    step: float | Tensor,
    num_steps: int,
    *,
    method: Method = "explicit",
    dropout: float = 0.0,
    teleport: float = 0.0,
    seed: int | None = None,
    stability: Mode = "error",
) -> Tensor:
    """Diffuse values on the nodes of a graph for the time ``step * num_steps``.

    One explicit step moves every node towards its neighbours, ``x_i <- x_i - step sum_j W_ij (x_i - x_j)``: with
    ``L = D - W``, where D has the row sums of W, the result is ``(I - step L)^num_steps x``.

    Parameters
    ----------
    x : Tensor
        ``(n, d)``, or ``(B, n, d)`` for a batch; float32 or float64. A value that is not finite spreads to the
        neighbours; method "implicit" refuses it.
    graph : Graph or Tensor, or ShardedGraph
        A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``, of the dtype and on the device of x. With a
        :class:`kantor.distributed.ShardedGraph` all its ranks call, each with its own rows of x.
    step : float or Tensor
        Length of a step, >= 0; may require a gradient.
    num_steps : int
        K >= 0; zero returns a copy.
    method : {"explicit", "implicit", "propagator", "chebyshev"}
        * explicit: K steps in one native call.
        * implicit: one backward Euler step over the whole time, ``(I + step num_steps L)^-1 x``, stable for any; see
          :func:`implicit_diffuse`, which also divides it. Symmetric weights.
        * propagator: the explicit steps, as one product with their matrix; see :func:`propagator`. Up to some thousand
          nodes.
        * chebyshev: the heat equation itself, ``exp(-step num_steps L) x``, to rounding, by some
          ``sqrt(step num_steps lambda_max)`` products, which derivatives keep all. Symmetric weights. Not inside
          torch.export, nor in torch.vmap over the weights or the step.
    dropout : float
        Probability p: before every step entries are set to zero with it, and the others divided by ``1 - p``. Explicit
        only.
    teleport : float
        a in [0, 1): ``x <- (1 - a) (I - step L) x + a x_0`` in every step, as in APPNP. Explicit only.
    seed : int, optional
        Of the dropout, >= 0. Default: drawn from torch's default generator, which torch.vmap does not allow.
    stability : {"error", "warn", "ignore"}
        What to do about explicit steps so long that values grow without bound; see :func:`stability`. A graph is looked
        at once. Not checked inside torch.compile and torch.vmap.

    Returns
    -------
    Tensor
        Shaped like x; differentiable with respect to x, the weights and the step.

    Raises
    ------
    TypeError
        x is no tensor of these dimensions and dtypes, graph none of these, step no number.
    ValueError
        x and graph differ in nodes, dtype or device; dense weights that are negative or not finite; weights that are
        not symmetric where the method wants them so; an argument out of range; an option that the method does not have.
    StabilityError
        An unstable step; the message gives the largest safe one.

    Warns
    -----
    ConvergenceWarning
        The linear solve of method "implicit" stopped short of its tolerance.

    Notes
    -----
    Explicit, on a graph: ``nnz d`` multiply-adds a step; memory O(n d) whatever K, also for the derivative with respect
    to x; those for weights and step keep some sqrt(K) states, second ones and those on dense weights all K. Without
    dropout, column sums are conserved for symmetric weights, and constants always. On a graph deterministic: the same
    bits for any number of threads. Dropout is the same on CPU and GPU, and on a graph and its dense weights. Under
    autocast everything here runs in single precision.

    Source: Wang, Dou, Bao and Shi, *Diffusion Mechanism in Residual Neural Network: Theory and Applications*, IEEE
    TPAMI 46(2), 2024; teleport: Gasteiger, Bojchevski and Günnemann, *Predict then Propagate*, ICLR 2019, equation 5.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import diffuse
    >>> path = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    >>> diffuse(torch.tensor([[4.0], [0.0], [0.0]]), path, step=0.25, num_steps=1).T
    tensor([[3., 1., 0.]])
    """
    if isinstance(graph, SharedGraph):
        return graph.diffuse(
            x, step, num_steps, method=method, dropout=dropout, teleport=teleport, seed=seed, stability=stability
        )
    x = check_points("diffuse", x)
    graph = check_similarity("diffuse", graph)
    check_fit("diffuse", x, graph)
    step = check_step("diffuse", step, like=graph)
    num_steps = check_count("diffuse", num_steps)
    dropout, teleport, seed = check_options(method, dropout, teleport, seed, stability)
    if num_steps == 0 or x.numel() == 0:
        return x.clone()

    if method == "implicit":
        return implicit_diffuse(x, graph, step * num_steps)[0]
    if method == "chebyshev":
        require_symmetric("diffuse", graph, "method 'chebyshev'")
        return heat_kernel(x, graph, step * num_steps)
    check_stability("diffuse", graph, step, stability, x)
    if method == "propagator":
        with full_precision(x):
            return propagator(graph, step, num_steps, stability="ignore") @ x
    if seed is None:
        seed = int(torch.randint(2**62, ())) if dropout else 0
    edge, diagonal = explicit_step(graph, step)
    if teleport:  # x <- (1 - a) (diagonal x + E x) + a x_0
        edge, diagonal = (1 - teleport) * edge, (1 - teleport) * diagonal
    return recurrence(x, graph, edge, diagonal, num_steps, teleport, dropout, seed)


def check_options(
    method: str, dropout: float, teleport: float, seed: int | None, stability: str
) -> tuple[float, float, int | None]:
    """Check what is no tensor; return dropout, teleport and seed."""
    check_choice("diffuse", method, "method", METHODS)
    check_choice("diffuse", stability, "stability", MODES)
    dropout = check_fraction("diffuse", dropout, "dropout")
    teleport = check_fraction("diffuse", teleport, "teleport")
    if seed is not None and (seed := check_count("diffuse", seed, "seed")) >= 2**63:
        raise ValueError(f"diffuse: seed: expected an integer below 2**63, got {seed}")
    for name, value in (("dropout", dropout), ("teleport", teleport)):
        if value and method != "explicit":
            raise ValueError(f"diffuse: {name}: expected 0 with method={method!r}, got {value}; use method='explicit'")
    return dropout, teleport, seed


__all__ = ["check_options", "diffuse"]
