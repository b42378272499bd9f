"""A picture of a graph: its nodes, coloured by class, on top of its edges."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kantor._checks import check_finite, check_tensor, host_array
from kantor.plotting import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from kantor.graph.graph import Graph

_UNKNOWN = "#b5b5b5"
_SINGLE = "#0b5c8a"
_LAID_OUT = 16, 5000  # numbers of nodes for which t-SNE is worth its seconds


def plot_graph(
    graph: Graph, positions: Tensor | np.ndarray[Any, Any] | None, labels: Any, ax: Axes | None, edges: int
) -> Axes:
    """Draw a graph; see :meth:`kantor.graph.Graph.plot`."""
    n = graph.num_nodes
    if positions is not None:
        positions = check_tensor(torch.as_tensor(positions), "Graph.plot", "positions")
        check_finite(positions, "Graph.plot", "positions")
    if positions is not None and (positions.ndim != 2 or positions.shape[0] != n or positions.shape[1] < 2):
        raise ValueError(
            f"Graph.plot: positions: expected shape ({n}, d) with d >= 2, got {tuple(positions.shape)}; one row a node"
        )
    if labels is not None and len(labels) != n:
        raise ValueError(f"Graph.plot: labels: expected {n} labels, one a node, got {len(labels)}")
    ax = axes_or_new(ax, 5.4, 5.0)
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    places = _spectral(graph) if positions is None else _flat(host_array(positions).astype(np.float64))
    rows, cols, weight = host_array(graph.rows), host_array(graph.col), host_array(graph.weight)
    once = np.flatnonzero((rows < cols) if graph.symmetric else (rows != cols))
    drawn = once[np.argsort(-weight[once], kind="stable")[: max(0, edges)]]
    if drawn.size and weight[drawn[0]] > 0:
        colours = np.tile([0.45, 0.45, 0.45, 1.0], (len(drawn), 1))
        colours[:, 3] = np.clip(0.6 * weight[drawn] / weight[drawn[0]], 0.05, 0.6)
        segments = np.stack([places[rows[drawn]], places[cols[drawn]]], 1)
        ax.add_collection(LineCollection(list(segments), colors=colours, linewidths=0.6, zorder=1))
    size = float(np.clip(4000 / max(n, 1), 2, 24))
    names = [None if _is_unknown(label) else label for label in _plain(labels)] if labels is not None else []
    classes = sorted({name for name in names if name is not None}, key=lambda name: (str(type(name)), name))
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    number = {name: i for i, name in enumerate(classes)}
    which = np.array([number.get(name, -1) for name in names]) if names else np.zeros(n, dtype=int)
    for i in range(-1, max(len(classes), 1)):
        colour = _UNKNOWN if i < 0 else palette(i % palette.N) if classes else _SINGLE
        mask = which == i
        if mask.any():
            label = "unknown" if i < 0 else str(classes[i]) if classes else None
            x, y = places[mask].T
            ax.scatter(x, y, s=size, color=colour, linewidths=0, zorder=2 if i < 0 else 3, label=label)
    if 1 <= len(classes) <= 20:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=max(1.0, 4 / size**0.5))
    ax.autoscale_view()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return ax


def _plain(labels: Any) -> list[Any]:
    return list(labels.tolist()) if hasattr(labels, "tolist") else list(labels)


def _is_unknown(label: Any) -> bool:
    return label is None or label != label or label == -1


def _flat(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Points in the plane: themselves, or their two principal components."""
    if points.shape[1] == 2:
        return points
    centred = points - points.mean(0)
    axes: np.ndarray[Any, Any] = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]
    flat: np.ndarray[Any, Any] = centred @ (axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]]))
    return flat


def _spectral(graph: Graph) -> np.ndarray[Any, Any]:
    """Places in the plane by scikit-learn: ten eigenvectors of the graph, laid out by t-SNE if that takes seconds."""
    try:
        from sklearn.manifold import TSNE, SpectralEmbedding
    except ImportError as error:
        raise ImportError(
            'Graph.plot: positions that are not given need scikit-learn: pip install "kantor[demo]"'
        ) from error
    n = graph.num_nodes
    if n < 4:  # too few for eigenvectors: a line, or a triangle
        angle = 2 * np.pi * np.arange(n) / max(n, 1)
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    both = _LAID_OUT[0] <= n <= _LAID_OUT[1]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        embedding = SpectralEmbedding(min(10, n // 2) if both else 2, affinity="precomputed", random_state=0)
        places: np.ndarray[Any, Any] = embedding.fit_transform(graph.symmetrized().to_scipy().astype(np.float64))
    if both:
        places = places / np.maximum(places.std(0), 1e-12)
        places = TSNE(perplexity=min(30.0, n / 4), random_state=0).fit_transform(places)
    return places
