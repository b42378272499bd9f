"""Points, graphs and signals for methods that learn from few labels. The same arguments give the same numbers."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def two_moons(n: int = 1000, noise: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two interleaved half circles of radius one with normal noise: points (n, 2), float32, and classes (n,).

    n is even: half of the points each.
    """
    random = np.random.RandomState(seed)
    angle = np.linspace(0, np.pi, n // 2)
    upper = np.stack([np.cos(angle), np.sin(angle)], 1)
    points = np.concatenate([upper, [1.0, 0.5] - upper]) + noise * random.standard_normal((2 * (n // 2), 2))
    return torch.from_numpy(points).float(), torch.arange(2).repeat_interleave(n // 2)


def four_discs() -> tuple[Tensor, Tensor]:
    """Discs of radius 3/4 at the corners of a square of edge 2: points (400, 2), float64, and which disc (400,).

    Opposite corners are one class in the problem called XOR: ``disc % 2``.
    """
    random = np.random.RandomState(42)
    radius = np.sqrt(random.uniform(0, 0.75**2, 400))
    angle = np.pi * random.uniform(0, 2, 400)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    x[100:300] += 2
    y[100:200] += 2
    y[300:400] += 2
    disc = np.repeat([0, 2, 1, 3], 100)
    return torch.from_numpy(np.stack([x, y], 1)), torch.from_numpy(disc)


@dataclass(frozen=True)
class Snapshots:
    """Values of the nodes of a graph over time, most of them not observed.

    Attributes
    ----------
    weights : Tensor (n, n)
        Symmetric, float32.
    values : Tensor (time, n)
        Mean 0 and variance 1 at every node.
    observed : Tensor (time, n)
        Which of them are known, bool.
    """

    weights: Tensor
    values: Tensor
    observed: Tensor


def heat_snapshots(
    nodes: int = 129, times: int = 200, hidden: float = 0.9, noise: float = 0.1, seed: int = 0
) -> Snapshots:
    """Heat that spreads on a random geometric graph from sources that come and go, with noise, most of it hidden.

    A stand-in for regional case numbers with gaps. Weights are Gaussian of the distance below 1/5, normalised as
    ``R^-1/2 w R^-1/2``; sources are autoregressive.
    """
    random = np.random.RandomState(seed)
    place = random.rand(nodes, 2)
    distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
    w = np.exp(-((distance / 0.08) ** 2)) * (distance < 0.2)
    np.fill_diagonal(w, 0.0)
    sums = w.sum(1)
    root = np.where(sums > 0, 1 / np.sqrt(np.where(sums > 0, sums, 1)), 0.0)
    w = root[:, None] * w * root
    eigenvalues, vectors = np.linalg.eigh(np.diag(w.sum(1)) - w)
    flow = (vectors * np.exp(-0.5 * eigenvalues)) @ vectors.T
    heat, source, history = random.standard_normal(nodes), np.zeros(nodes), []
    for _ in range(50 + times):
        source = 0.9 * source + 0.3 * random.standard_normal(nodes)
        heat = flow @ (0.98 * heat + source)
        history.append(heat)
    values = np.array(history[50:])
    values = values + noise * values.std() * random.standard_normal(values.shape)
    values = (values - values.mean(0)) / values.std(0)
    observed = random.rand(times, nodes) >= hidden
    return Snapshots(torch.from_numpy(w).float(), torch.from_numpy(values).float(), torch.from_numpy(observed))


@dataclass(frozen=True)
class CitationGraph:
    """Documents, the words in them, who cites whom, and what they are about.

    Attributes
    ----------
    x : Tensor (n, d)
        Words, sparse CSR, float32: one where a document has the word, divided by the number of its words.
    edge_index : Tensor (2, m)
        Citations in both directions, int64, without loops and duplicates.
    labels : Tensor (n,)
        Classes, int64.
    class_names : list of str
        Empty where the file has none.
    """

    x: Tensor
    edge_index: Tensor
    labels: Tensor
    class_names: list[str]


def read_citation_graph(path: str | os.PathLike[str]) -> CitationGraph:
    """Read a citation graph from the ``.npz`` files of Shchur et al., such as ``cora.npz``.

    Parameters
    ----------
    path : path
        An archive with ``adj_data, adj_indices, adj_indptr, adj_shape``, the same with ``attr_``, and ``labels``.

    Raises
    ------
    FileNotFoundError
        No such file; nothing is ever downloaded.
    ValueError
        An archive without these entries.

    Notes
    -----
    Source of the format: Shchur et al., *Pitfalls of Graph Neural Network Evaluation*, 2018. Their experiments use the
    largest connected component: ``graph.largest_component()`` of the graph made with
    :func:`kantor.graph.from_edge_index`.
    """
    # Names of classes are arrays of objects in some of these files: those are left aside, nothing is unpickled.
    with np.load(path, allow_pickle=False) as archive:
        needed = [f"{part}_{name}" for part in ("adj", "attr") for name in ("indices", "indptr", "shape")]
        if missing := [name for name in [*needed, "labels"] if name not in archive.files]:
            raise ValueError(f"read_citation_graph: {path}: expected an entry {missing[0]!r}, got {archive.files}")
        citations = _coordinates(archive, "adj")
        words = _coordinates(archive, "attr")
        documents, vocabulary = (int(size) for size in archive["attr_shape"])
        labels = torch.from_numpy(archive["labels"].astype(np.int64))
        names: list[str] = []
        if "class_names" in archive.files:
            try:
                names = [str(name) for name in archive["class_names"]]
            except ValueError:
                names = []
    i, j = citations[:, citations[0] != citations[1]]
    pair = np.unique(np.concatenate([i * documents + j, j * documents + i]))
    edge_index = torch.from_numpy(np.stack(np.divmod(pair, documents)))
    place = np.unique(words[0] * vocabulary + words[1])
    row, column = np.divmod(place, vocabulary)
    count = np.bincount(row, minlength=documents)
    with warnings.catch_warnings():  # torch calls its sparse tensors beta
        warnings.simplefilter("ignore")
        x = torch.sparse_csr_tensor(
            torch.from_numpy(np.concatenate([[0], np.cumsum(count)])),
            torch.from_numpy(column),
            torch.from_numpy((1 / count[row]).astype(np.float32)),
            (documents, vocabulary),
            check_invariants=True,
        )
    return CitationGraph(x, edge_index, labels, names)


def _coordinates(archive: Any, part: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows and columns of the entries that are not zero, ``(2, nnz)``."""
    pointers = archive[f"{part}_indptr"].astype(np.int64)
    rows = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
    columns = archive[f"{part}_indices"].astype(np.int64)
    kept = archive[f"{part}_data"] != 0 if f"{part}_data" in archive.files else np.ones(len(columns), dtype=bool)
    return np.stack([rows[kept], columns[kept]])


__all__ = ["CitationGraph", "Snapshots", "four_discs", "heat_snapshots", "read_citation_graph", "two_moons"]
