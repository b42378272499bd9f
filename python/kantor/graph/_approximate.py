"""Approximate nearest neighbours by a library, for numbers of points where n^2 distances are too many.

pynndescent finds the candidates: nearest-neighbour descent from random projection trees (Dong, Moses & Li 2011). Their
distances are formed anew here, and the share of true neighbours among them, the recall, is measured on a sample. It
hangs on how many candidates the search keeps a point. With k = 10 of 100 000 points of a Gaussian mixture: in 64
dimensions 11 candidates give 0.64, 20 give 0.89, 30 give 0.97 and 40 give 0.997, in 1, 1.5, 2 and 4 times the time; in
16 dimensions 11 give 0.94 and 20 give 0.996 in twice the time. So a search starts from 20 or 32, and is repeated with
half as many more where the sample says that too few were found.
"""

from __future__ import annotations

import logging
import math
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger("kantor")

_RECALL, _REPEATS = 0.95, 2  # aimed at, and how often more candidates are tried
_SAMPLE = 1000  # rows whose neighbours are searched exactly, to measure recall
_BLOCK, _GROUP = 2**22, 64  # numbers held at a time, members of a group


def available() -> bool:
    """Whether pynndescent can be imported."""
    return find_spec("pynndescent") is not None


def approximate_knn(x: Tensor, k: int, progress: bool) -> tuple[Tensor, Tensor, float]:
    """Indices and distances of about the k nearest other rows, as the exact search returns them, and the recall."""
    sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_SAMPLE].to(x.device)
    nearest = _exact(x, sample, k)[1]
    candidates = max(k + 10, 20 if x.shape[1] <= 32 else 32)
    for _ in range(1 + _REPEATS):
        index, distance = _search(x, k, min(candidates, len(x)), progress)
        reached = distance[sample] <= nearest[:, -1:] * (1 + 1e-5)  # by distance: equally near ones are as good
        recall = float(reached.double().mean())
        if recall >= _RECALL:
            break
        _logger.info("knn_graph: recall %.3f with %d candidates a point", recall, candidates)
        candidates += candidates // 2
    else:
        _logger.warning('knn_graph: recall %.3f only, after %d searches; pass method="exact"', recall, 1 + _REPEATS)
    return index.to(torch.int32), distance, recall


def _search(x: Tensor, k: int, candidates: int, progress: bool) -> tuple[Tensor, Tensor]:
    """The k nearest other rows among the candidates, in the order of (distance, index)."""
    n = len(x)
    found = torch.from_numpy(_descend(x, candidates, progress)).to(x.device).long()
    # The point itself is no neighbour, and a place that was not filled none either.
    found = torch.where((found < 0) | (found == torch.arange(n, device=x.device)[:, None]), n, found)
    found = found.sort(dim=1).values
    distance, order = torch.sort(_distances(x, found), dim=1, stable=True)
    index, distance = found.gather(1, order[:, :k]), distance[:, :k].contiguous()
    few = (~distance.isfinite()).any(1).nonzero()[:, 0]
    if few.numel():
        index[few], distance[few] = _exact(x, few, k)
    return index, distance


def _descend(x: Tensor, candidates: int, progress: bool) -> Any:
    """Candidates ``(n, candidates)`` as an array, with -1 where there are too few."""
    try:
        from pynndescent import NNDescent
    except ImportError as error:
        raise ImportError(
            'knn_graph: method="approximate" needs pynndescent: pip install "kantor[graph]"; or pass method="exact"'
        ) from error
    if x.dtype is torch.float64:  # the library computes in single precision: what is far out, or far off, fits in
        x = x - x.mean(0)
        x = x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
    points, threads = x.cpu().float().numpy(), torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to correctly find n_neighbors")  # _search fills these places
        descent = NNDescent(points, n_neighbors=candidates, random_state=0, n_jobs=threads, verbose=progress)
        return descent.neighbor_graph[0]


def _distances(x: Tensor, index: Tensor) -> Tensor:
    """Euclidean distances from each row to the rows `index`, formed in double; infinite for the index n."""
    result = torch.empty(index.shape, dtype=x.dtype, device=x.device)
    rows = max(1, _BLOCK // max(1, index.shape[1] * x.shape[1]))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        difference = x[part].double()[:, None] - x[index[part].clamp(max=len(x) - 1)].double()
        result[part] = torch.linalg.vector_norm(difference, dim=-1).to(x.dtype)
    return result.masked_fill_(index == len(x), math.inf)


def _exact(x: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and distances of the k nearest other rows, of a few rows: blocks of distances, the best k so far kept."""
    centred = x - x.mean(0)  # |y|^2 - 2 x.y then cancels less
    square = centred.square().sum(1)
    width = max(_GROUP, _BLOCK // _SAMPLE)
    found = []
    for some in rows.split(_SAMPLE):
        best = x.new_full((len(some), k), math.inf), some.new_zeros(len(some), k)
        for start in range(0, len(x), width):
            part = slice(start, start + width)
            near = torch.addmm(square[part], centred[some], centred[part].T, alpha=-2)
            inside = ((some >= start) & (some < start + width)).nonzero()[:, 0]
            near[inside, some[inside] - start] = math.inf
            distance, column = _smallest(near, k)
            merged = torch.cat([best[0], distance], 1).topk(k, largest=False)
            best = merged.values, torch.cat([best[1], column + start], 1).gather(1, merged.indices)
        found.append(best[1])
    index = torch.cat(found)
    difference = x[rows].double()[:, None] - x[index].double()
    distance, order = torch.sort(torch.linalg.vector_norm(difference, dim=-1).to(x.dtype), dim=1, stable=True)
    return index.gather(1, order), distance


def _smallest(near: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, or all, and their columns: they are in the k groups with the smallest minima."""
    groups = torch.nn.functional.pad(near, (0, -near.shape[1] % _GROUP), value=math.inf).unflatten(1, (_GROUP, -1))
    some = groups.amin(1).topk(min(k, groups.shape[2]), largest=False).indices[:, None]
    values = groups.gather(2, some.expand(-1, _GROUP, -1)).flatten(1)
    smallest = values.topk(min(k, values.shape[1]), largest=False)
    columns = (torch.arange(_GROUP, device=near.device)[:, None] * groups.shape[2] + some).flatten(1)
    return smallest.values, columns.gather(1, smallest.indices)
