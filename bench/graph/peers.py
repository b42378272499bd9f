"""Graphs, timing and peers that the graph benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CORA = Path(__file__).resolve().parents[3] / "shared" / "data" / "graphs" / "cora.npz"


@dataclass(frozen=True)
class Sparse:
    """A sparse matrix by rows, with the transposed pattern."""

    rowptr: Tensor
    col: Tensor
    weight: Tensor
    transposed: tuple[Tensor, Tensor, Tensor]

    @property
    def n(self) -> int:
        """Number of nodes."""
        return self.rowptr.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.col.numel()

    @property
    def rows(self) -> Tensor:
        """Row of each entry."""
        return torch.repeat_interleave(torch.arange(self.n), self.rowptr.diff())

    def torch_csr(self, weight: Tensor | None = None) -> Tensor:
        """As torch's sparse matrix with int32 indices, which MKL takes as they are."""
        values = self.weight if weight is None else weight
        return torch.sparse_csr_tensor(self.rowptr, self.col, values, (self.n, self.n))


def sparse(rowptr: Tensor, col: Tensor, weight: Tensor) -> Sparse:
    """With its transpose."""
    return Sparse(rowptr, col, weight, torch.ops.kantor.csr_transpose(rowptr, col, rowptr.numel() - 1))


def neighbours(n: int, degree: int, reach: int | None) -> Sparse:
    """`degree` entries a row: anywhere, or in columns within `reach` of the row, as after a reordering."""
    generator = torch.Generator().manual_seed(0)
    if reach is None:
        col = torch.randint(n, (n, degree), generator=generator)
    else:
        col = torch.arange(n)[:, None] + torch.randint(-reach, reach + 1, (n, degree), generator=generator)
    col = col.clamp(0, n - 1).sort(1).values.flatten().int()
    rowptr = torch.arange(0, n * degree + 1, degree, dtype=torch.int32)
    return sparse(rowptr, col, torch.rand(n * degree, generator=generator) / degree)


def cora() -> Sparse:
    """Largest component of Cora with self loops, symmetrically normalised; a random graph of its size without the file.

    2485 nodes, 12623 entries.
    """
    if not CORA.exists():
        return neighbours(2485, 5, None)
    import scipy.sparse as sp

    with np.load(CORA, allow_pickle=True) as file:
        A = sp.csr_matrix((file["adj_data"], file["adj_indices"], file["adj_indptr"]), shape=file["adj_shape"])
    A = ((A + A.T) > 0).astype(np.float64)
    A.setdiag(0)
    label = sp.csgraph.connected_components(A)[1]
    kept = np.flatnonzero(label == np.bincount(label).argmax())
    A = A[kept][:, kept] + sp.identity(len(kept))
    scale = sp.diags(np.asarray(A.sum(1)).ravel() ** -0.5)
    W = (scale @ A @ scale).tocsr()
    W.eliminate_zeros()
    W.sort_indices()
    return sparse(*(torch.from_numpy(a).int() for a in (W.indptr, W.indices)), torch.from_numpy(W.data).float())


def best(calls: Sequence[Callable[[], object]], repeats: int, limit: float = 20.0) -> list[float]:
    """Least seconds of each call: processor time for one thread, which others on the machine disturb less, else real.

    They take turns, so that all meet the same machine; short ones are repeated more. A turn is two calls, since the
    first may have to wait for memory that the others have just given back.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    least = [float("inf")] * len(calls)
    begin, count = time.perf_counter(), 0
    while count < repeats or time.perf_counter() - begin < 1.0:
        for k, call in enumerate(calls):
            for _ in range(2):
                start = clock()
                call()
                least[k] = min(least[k], clock() - start)
        count += 1
        if time.perf_counter() - begin > limit:
            break
    return least


def copy_rate(megabytes: int = 256) -> float:
    """Bytes a second that copying a large tensor reads and writes, with torch's threads."""
    a = torch.zeros(megabytes << 20, dtype=torch.uint8)
    b = torch.empty_like(a).fill_(1)
    return 2 * a.numel() / best([lambda: b.copy_(a)], 5)[0]
