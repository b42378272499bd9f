"""The torch operator of exact nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from kantor._ops import backend, declare


def _forward(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    threads = torch.get_num_threads()
    index, distance = _results(x, k)
    workspace = torch.empty(backend().knn_workspace_bytes(x, k, threads), dtype=torch.uint8, device=x.device)
    backend().knn(x, index, distance, workspace, threads)
    return index, distance


def _results(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), k), dtype=torch.int32), x.new_empty((len(x), k))


_knn = declare("knn(Tensor x, int k) -> (Tensor, Tensor)", forward=_forward, fake=_results)


def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` nearest other rows of every row of x.

    Parameters
    ----------
    x : Tensor (n, d)
        float32 or float64; the caller has looked for NaN and infinity: a row without k finite distances gets the index
        -1 and the distance NaN in place of those that it lacks. No derivative flows back.
    k : int
        1..n-1; on CUDA at most ``kantor._C.knn_largest_k``.

    Returns
    -------
    index : Tensor (n, k)
        int32. Rows are ordered by distance in double precision, equal distances by index: the same for any number of
        threads.
    distance : Tensor (n, k)
        Euclidean, in the dtype of x; exactly zero for duplicates.

    Raises
    ------
    TypeError
        Wrong dtype.
    ValueError
        Wrong shape or k; squares of differences must stay within the range of float64, which nobody checks.

    Notes
    -----
    n^2 d multiply-adds; memory for a copy of x, and up to a megabyte a thread for usual k.
    """
    index, distance = _knn(x.detach(), k)
    return index, distance
