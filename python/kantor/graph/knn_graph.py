"""Graphs of nearest neighbours: from points to weights."""

from __future__ import annotations

import logging
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_tensor
from kantor.graph import _approximate, _weights
from kantor.graph._arguments import check_choice, check_count
from kantor.graph._native import knn
from kantor.graph.graph import Graph

_logger = logging.getLogger("kantor")

Weights = Literal["self_tuning", "gaussian", "binary", "distance"]
Symmetrize = Literal["auto", "mean", "max", "none"]
Normalize = Literal["auto", "sym", "row"] | None
Method = Literal["auto", "exact", "approximate"]

# "auto" searches approximately from so many points on, and coordinates in all: where n^2 d multiply-adds, some 250
# billion a second on a thread, take longer than the descent, some 0.2 ms a point. Measured on a CPU of two threads.
_MANY, _MANY_COORDINATES = 100_000, 64_000_000


def knn_graph(
    x: Tensor,
    k: int = 7,
    *,
    weights: Weights = "self_tuning",
    bandwidth_k: int = 4,
    sigma: float | None = None,
    symmetrize: Symmetrize = "auto",
    normalize: Normalize = "auto",
    method: Method = "auto",
    progress: bool = False,
) -> Graph:
    r"""Return the graph in which every point is connected to its nearest neighbours, by Euclidean distance ``d_ij``.

    Every point is its own nearest neighbour: of the `k` entries a row keeps the first is the self loop. Only the
    distances between points leave it out, since there it would be zero.

    ``weights="self_tuning"``
        ``w_ij = exp(-(d_ij / s_i)^2)``, ``s_i`` the distance from point i to its `bandwidth_k`-th nearest, itself
        included. Kept are the points strictly nearer than the k-th other one: k of them, and fewer where distances are
        equal. Then ``R^-1/2 w R^-1/2`` with the row sums R, and the mean with the transpose.
    ``weights="gaussian"``
        ``w_ij = exp(-(d_ij / sigma)^2)``; the k nearest, itself included; rows divided by their sums. Not symmetric.
    ``weights="binary"``
        One for each of the k nearest, itself included, also where only the other point holds this one for near; then
        ``D^-1/2 W D^-1/2``.
    ``weights="distance"``
        ``d_ij`` itself for the k nearest others, zero for duplicates, also where only the other point is so near.

    Parameters
    ----------
    x : Tensor (n, d)
        Points, float32 or float64, finite. Distances are taken as they come: scale the columns first.
    k : int
        Entries a row keeps, 1..n-1; the paper's ``n_top`` is k + 1 for "self_tuning" and k for "gaussian".
    weights : "self_tuning", "gaussian", "binary" or "distance"
        See above.
    bandwidth_k : int
        Which neighbour sets the scale, the point itself being the first; 1..n.
    sigma : float, optional
        Width for "gaussian". Default: the median over the points of the distance to the `bandwidth_k`-th nearest.
    symmetrize : "auto", "mean", "max" or "none"
        Combine W with its transpose by this function; missing entries are zero. "auto": as described above, and "none"
        for rows that sum to one.
    normalize : "auto", "sym", "row" or None
        ``D^-1/2 W D^-1/2``, ``D^-1 W``, or nothing; "auto": as described above. This comes after `symmetrize`, so that
        rows sum to one where they are asked to; only for "self_tuning", "sym" comes before it.
    method : "auto", "exact" or "approximate"
        How to search. "auto": exactly, but for 100 000 points or more with ``n d >= 6.4e7`` on the CPU, where an
        approximate search is faster: there with pynndescent (extra ``graph``) where it is installed, and exactly, with
        a record in the log, where it is not. The share of true neighbours an approximate search found, measured on
        1000 points, is ``graph.recall``.
    progress : bool
        Let the approximate search report its stages.

    Returns
    -------
    Graph
        Of n nodes, in the dtype and on the device of x. No derivative flows back to x.

    Raises
    ------
    TypeError
        x is no tensor, or not float32 or float64.
    ValueError
        x not of two dimensions, NaN or infinite; numbers out of range; an unknown word.
    ImportError
        ``method="approximate"`` without pynndescent.

    Notes
    -----
    The exact search costs n^2 d multiply-adds and O(n k) memory. The approximate one grows little faster than n, but
    its library compiles itself first, for tens of seconds in every process; it aims at a recall of 0.95 and says in
    the log where it stays below. Both are deterministic: equally near neighbours stand in the order of their numbers.

    Where a point has k duplicates or more no point is strictly nearer than the k-th other one: "self_tuning" leaves its
    row empty, and diffusion leaves the point alone. A record in the log counts such points; a larger k connects them.
    A scale ``s_i`` of zero, from fewer duplicates, is replaced by a small share of the median distance.

    Source: Zelnik-Manor & Perona, *Self-tuning spectral clustering*, NIPS 2004; Wang, Dou, Bao and Shi, *Diffusion
    Mechanism in Residual Neural Network: Theory and Applications*, IEEE TPAMI 46(2), 2024.

    Examples
    --------
    >>> import torch
    >>> from kantor.graph import knn_graph
    >>> x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    >>> graph = knn_graph(x, k=2, bandwidth_k=2)
    >>> graph.components()[0]
    2
    """
    name = "knn_graph"
    _check_points(name, x)
    n = len(x)
    check_choice(name, weights, "weights", get_args(Weights))
    check_choice(name, symmetrize, "symmetrize", get_args(Symmetrize))
    check_choice(name, method, "method", get_args(Method))
    if normalize is not None:
        check_choice(name, normalize, "normalize", ("auto", "sym", "row"))
    k, bandwidth_k = check_count(name, k, "k", 1), check_count(name, bandwidth_k, "bandwidth_k", 1)
    if k >= n:
        raise ValueError(f"{name}: k: expected 1..{n - 1}, fewer than the {n} points, got {k}")
    if bandwidth_k > n:
        raise ValueError(f"{name}: bandwidth_k: expected 1..{n}, at most the number of points, got {bandwidth_k}")
    if sigma is not None and not 0 < sigma < math.inf:
        raise ValueError(f"{name}: sigma: expected a positive number, got {sigma}")

    index, distance, recall = _neighbours(x.detach(), max(k, bandwidth_k - 1), method, progress)
    if not bool(distance.isfinite().all()):
        raise ValueError(f"{name}: x: expected distances within the range of {str(x.dtype)[6:]}; scale the columns")
    graph = Graph._trusted(*_entries(index, distance, weights, k, bandwidth_k, sigma))
    if normalize == "auto":
        normalize = {"self_tuning": "sym", "binary": "sym", "gaussian": "row"}.get(weights)  # type: ignore[assignment]
    if symmetrize == "auto":
        symmetrize = "none" if normalize == "row" else "max" if weights in ("binary", "distance") else "mean"
    if weights == "self_tuning" and normalize == "sym":
        graph, normalize = graph.normalized("sym"), None
    if symmetrize != "none":
        graph = graph.symmetrized(symmetrize)
    if normalize == "sym" or normalize == "row":
        graph = graph.normalized(normalize)
    graph.recall = recall
    return graph


def _check_points(name: str, x: Tensor) -> None:
    check_tensor(x, name, "x")
    check_float(x, name, "x")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: x: expected shape (n, d), a row a point, d >= 1, got {tuple(x.shape)}")
    check_finite(x, name, "x")


def _neighbours(x: Tensor, count: int, method: Method, progress: bool) -> tuple[Tensor, Tensor, float | None]:
    """Indices and distances of the nearest others, nearest first, ``(n, count)``, and the recall if not exact."""
    approximate = method == "approximate"
    if method == "auto" and not x.is_cuda and len(x) >= _MANY and x.numel() >= _MANY_COORDINATES:
        approximate = _approximate.available()
        if not approximate:
            _logger.warning(
                "knn_graph: %d points are searched exactly, which takes n^2 distances; for an approximate search "
                'pip install "kantor[graph]"',
                len(x),
            )
    if approximate:
        return _approximate.approximate_knn(x, count, progress)
    return *knn(x, count), None


def _entries(
    index: Tensor, distance: Tensor, weights: Weights, k: int, bandwidth_k: int, sigma: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern and weights before they are normalised and made symmetric."""
    n = len(index)
    if weights == "self_tuning":
        weight, kept = _weights.self_tuning(distance, k, bandwidth_k)
        loops = distance[:, k - 1] > 0
        if alone := n - int(loops.sum()):
            _logger.warning(
                "knn_graph: %d points have k = %d duplicates or more: their rows of the graph are empty; raise k to "
                "connect them",
                alone,
                k,
            )
        return _weights.assemble(index, weight, kept, loops)
    if weights == "distance":
        index, distance = index[:, :k], distance[:, :k]
        return _weights.assemble(index, distance, torch.ones_like(index, dtype=torch.bool), None)
    index = index[:, : k - 1]
    if weights == "binary":
        weight = torch.ones(index.shape, dtype=distance.dtype, device=index.device)
    else:
        weight = _weights.gaussian(distance, bandwidth_k, sigma)[:, : k - 1]
    loops = torch.ones(n, dtype=torch.bool, device=index.device)
    return _weights.assemble(index, weight, torch.ones_like(index, dtype=torch.bool), loops)
