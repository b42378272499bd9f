"""What the diffusion methods check of their arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_tensor, is_readable
from kantor._ranks import Ranks
from kantor.graph.graph import Graph

Similarity = Graph | Tensor
"""A graph of n nodes, or dense weights ``(n, n)`` or ``(B, n, n)``: one matrix for each entry of a batch."""


@runtime_checkable
class SharedGraph(Protocol):
    """A graph of several processes, which diffuses by itself: :class:`kantor.distributed.ShardedGraph`."""

    ranks: Ranks

    def diffuse(self, x: Tensor, step: float | Tensor, num_steps: int, **options: Any) -> Tensor:
        """:func:`kantor.graph.diffuse` on this rank's rows of x."""
        ...


def check_points(call: str, x: object, name: str = "x") -> Tensor:
    """Return x if it is ``(n, d)`` or ``(B, n, d)``, float32 or float64; autocast's halves as float32."""
    points = check_tensor(x, call, name)
    if points.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(points.device.type):
        points = points.float()  # as torch does with its operators that want full precision
    if points.ndim not in (2, 3):
        raise TypeError(
            f"{call}: {name}: expected shape (n, d) or (B, n, d), got {tuple(points.shape)}; a single column is "
            f"{name}[:, None]"
        )
    check_float(points, call, name)
    return points


def check_similarity(call: str, graph: object) -> Similarity:
    """Return the graph, or the dense weights if they are square, finite and nonnegative."""
    if isinstance(graph, Graph):
        return graph
    if not isinstance(graph, Tensor):
        raise TypeError(
            f"{call}: graph: expected a kantor.graph.Graph or dense weights, got {type(graph).__name__}; see "
            "kantor.graph.knn_graph and kantor.graph.from_edge_index"
        )
    if graph.layout is not torch.strided:
        raise TypeError(f"{call}: graph: expected dense weights, got layout {graph.layout}; use graph.from_torch")
    if graph.ndim not in (2, 3) or graph.shape[-1] != graph.shape[-2]:
        raise ValueError(f"{call}: graph: expected weights (n, n) or (B, n, n), got {tuple(graph.shape)}")
    check_float(graph, call, "graph")
    check_finite(graph, call, "graph")
    if is_readable(graph) and bool((graph < 0).any()):
        where = tuple(int(i) for i in (graph < 0).nonzero()[0])
        raise ValueError(f"{call}: graph: expected weights >= 0, got {graph.detach()[where].item()} at {where}")
    return graph


def check_fit(call: str, x: Tensor, graph: Similarity, name: str = "x") -> None:
    """Raise unless x lives on the nodes of the graph, with its dtype and device."""
    for what, mine, its in (("device", x.device, graph.device), ("dtype", x.dtype, graph.dtype)):
        if mine != its:
            raise ValueError(f"{call}: {name} has {what} {mine}, graph {its}; convert one with .to({what})")
    nodes = graph.num_nodes if isinstance(graph, Graph) else graph.shape[-1]
    if x.shape[-2] != nodes:
        raise ValueError(f"{call}: {name}: expected {nodes} rows, one for each node of the graph, got {x.shape[-2]}")
    if isinstance(graph, Tensor) and graph.ndim == 3 and (x.ndim != 3 or x.shape[0] != graph.shape[0]):
        raise ValueError(
            f"{call}: {name}: expected shape ({graph.shape[0]}, {nodes}, d) for a batch of weights, got "
            f"{tuple(x.shape)}"
        )


def check_step(call: str, step: object, name: str = "step", like: Similarity | None = None) -> float | Tensor:
    """Return the step, nonnegative and finite: a float, or a tensor without dimensions, of use beside `like`."""
    if isinstance(step, Tensor):
        check_float(step, call, name)
        if step.numel() != 1:
            raise ValueError(f"{call}: {name}: expected one number, got shape {tuple(step.shape)}")
        step = step.reshape(())
        if like is not None and step.device != like.device and step.device.type != "cpu":
            raise ValueError(
                f"{call}: {name} is on {step.device}, the graph on {like.device}; move one with .to(device)"
            )
        if not is_readable(step):
            return step
    elif isinstance(step, bool) or not hasattr(step, "__float__"):
        raise TypeError(f"{call}: {name}: expected a number, got {type(step).__name__}")
    try:
        value = float(step.detach() if isinstance(step, Tensor) else step)
    except TypeError as error:  # arrays of several numbers
        raise TypeError(f"{call}: {name}: expected a number, got {type(step).__name__}") from error
    if not (0 <= value < math.inf):
        raise ValueError(f"{call}: {name}: expected a finite number >= 0, got {value}")
    return step if isinstance(step, Tensor) else value


def check_count(call: str, value: object, name: str = "num_steps", least: int = 0) -> int:
    """Return an integer >= `least`."""
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(f"{call}: {name}: expected an integer >= {least}, got {value!r}")
    return count


def check_fraction(call: str, value: object, name: str) -> float:
    """Return a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{call}: {name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def check_choice(call: str, value: object, name: str, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the words."""
    if value not in choices:
        raise ValueError(f"{call}: {name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
