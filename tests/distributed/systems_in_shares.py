"""Systems for the tests of several ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from kantor._ranks import Ranks
from kantor.distributed import ShardedCSR
from kantor.linalg import CSR, Stencil

F64 = torch.float64
COUNTS = {1: None, 2: [50, 127], 3: [60, 0, 117], 4: [1, 90, 80, 6]}  # of 177 rows: uneven, and one rank without any


def matrix(n: int = 177, seed: int = 0) -> CSR:
    """Positive definite, with entries far from the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    count = 3 * n
    i, j = (torch.randint(0, n, (count,), generator=generator) for _ in range(2))
    v = torch.randn(count, dtype=F64, generator=generator)
    rows, cols = torch.cat([i, j]), torch.cat([j, i])
    values = torch.cat([v, v])
    size = torch.zeros(n, dtype=F64).index_add(0, rows, values.abs())
    diagonal = torch.arange(n)
    return CSR.from_coo(
        torch.cat([rows, diagonal]), torch.cat([cols, diagonal]), torch.cat([values, size + 0.1]), (n, n)
    )


def laplacian(shape: tuple[int, ...]) -> CSR:
    """Of a grid, with boundary."""
    return Stencil(shape, dtype=F64).to_csr()


def vector(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def sharded(ranks: Ranks, A: CSR, counts: list[int] | None = None) -> ShardedCSR:
    """The matrix that all ranks hold, cut."""
    return ShardedCSR.from_csr(A, ranks, counts=counts)
