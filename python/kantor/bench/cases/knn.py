"""Exact nearest neighbours of every point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from kantor.bench.case import OWN, Peer, Problem

TITLE = "Exact nearest neighbours of a mixture of ten Gaussians, float32"
SIZES = {"tiny": ((200, 4, 3),), "small": ((6000, 16, 10),), "full": ((10_000, 16, 15), (30_000, 64, 15))}  # n, d, k
BLOCK = 2048  # rows of distances that exist at a time
TREE_DIMENSIONS = 20  # in more, a tree visits everything

Search = Callable[[], tuple[Any, Any]]  # indices, distances


def points(n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A mixture of ten Gaussians."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(10, d, generator=generator)
    return (centres[torch.randint(10, (n,), generator=generator)] + torch.randn(n, d, generator=generator)).to(dtype)


def kantor(x: Tensor, k: int) -> Search:
    """Kantor's exact search."""
    from kantor.graph._neighbours import knn

    return lambda: knn(x, k)


def faiss(x: Tensor, k: int) -> Search:
    """IndexFlatL2, from float32 points on the CPU."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    array = x.numpy()

    def search() -> tuple[Any, Any]:
        index = faiss.IndexFlatL2(array.shape[1])
        index.add(array)
        squares, found = index.search(array, k + 1)
        return found[:, 1:], squares[:, 1:] ** 0.5

    return search


def cdist(x: Tensor, k: int) -> Search:
    """All distances in blocks of rows, then the least."""

    def search() -> tuple[Any, Any]:
        parts = []
        for first in range(0, len(x), BLOCK):
            distance = torch.cdist(x[first : first + BLOCK], x)
            distance.diagonal(first).fill_(torch.inf)
            parts.append(distance.topk(k, largest=False))
        return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])

    return search


def sklearn(x: Tensor, k: int) -> Search:
    """NearestNeighbors by brute force."""
    from sklearn.neighbors import NearestNeighbors
    from threadpoolctl import threadpool_limits

    threads = torch.get_num_threads()

    def search() -> tuple[Any, Any]:
        with threadpool_limits(threads):
            distance, index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x.numpy()).kneighbors()
        return index, distance

    return search


def tree(x: Tensor, k: int) -> Search:
    """cKDTree."""
    from scipy.spatial import cKDTree

    def search() -> tuple[Any, Any]:
        distance, index = cast(Any, cKDTree(x.numpy())).query(x.numpy(), k + 1, workers=torch.get_num_threads())
        return index[:, 1:], distance[:, 1:]

    return search


def wrong(x: Tensor, index: Tensor, distance: Tensor) -> int:
    """Neighbours of a sample that are farther than the k-th nearest in float64, or whose distance is off by 1e-3."""
    rows = torch.linspace(0, len(x) - 1, 64).long()
    sample, k = x[rows].double(), index.shape[1]
    exact = torch.cat([torch.cdist(row[None], x.double()) for row in sample])
    exact.scatter_(1, rows[:, None], torch.inf)
    last = exact.topk(k, largest=False).values[:, -1:]
    found = exact.gather(1, index[rows].long())
    return int(((found > last * (1 + 1e-12)) | ((distance[rows] - found).abs() > 1e-3 * found)).sum())


# --- the case ---


def _peer(name: str, library: str, call: Callable[[Tensor, int], Search], configuration: str, *needs: str) -> Peer:
    devices = ("cpu", "cuda") if name in ("kantor", "cdist") else ("cpu",)
    return Peer(name, library, configuration, lambda task: call(*task), needs, devices)


PEERS = {
    peer.name: peer
    for peer in (
        _peer("kantor", OWN, kantor, "the search of knn_graph(x, k)"),
        _peer("faiss", "faiss", faiss, "IndexFlatL2", "faiss"),
        _peer("cdist", "torch", cdist, f"cdist and topk, {BLOCK} rows at a time"),
        _peer("sklearn", "scikit-learn", sklearn, "NearestNeighbors(algorithm='brute')", "sklearn", "threadpoolctl"),
        _peer("tree", "SciPy", tree, "cKDTree.query(workers=threads)", "scipy"),
    )
}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """Points, dimensions, neighbours; the tree in few dimensions only."""
    low = tuple(PEERS)
    high = tuple(name for name in PEERS if name != "tree")
    return tuple(
        Problem(f"n = {n}, d = {d}, k = {k}", "wrong of 64 points", 0.0, suits=low if d <= TREE_DIMENSIONS else high)
        for n, d, k in SIZES[size]
    )


def make(problem: str, device: str) -> tuple[Tensor, int]:
    """The points and k."""
    n, d, k = (int(part.split(" = ")[1]) for part in problem.split(", "))
    return points(n, d).to(device), k


def judge(task: tuple[Tensor, int], answer: Any) -> dict[str, Any]:
    """Wrong neighbours of a sample; the operations of a search by all distances, which a tree may undercut."""
    x, _ = task
    found = (torch.as_tensor(part).cpu() for part in answer)
    return {"accuracy": float(wrong(x.cpu(), *found)), "flops": 2.0 * len(x) ** 2 * x.shape[1]}
