"""Sparsity patterns in compressed sparse row form: building, transposing, joining, cutting; plain torch, O(nnz).

Rows are sorted by column and hold no column twice. ``key(i, j) = i n + j`` is one number for a place of the matrix, and
the entries of a pattern are in ascending order of their keys: to join two patterns is to merge two sorted lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kantor.graph._native import rows_of
from kantor.linalg import _native as linalg


class Transposed(NamedTuple):
    """Pattern of the transposed matrix: its entry e has the weight ``weight[permutation[e]]`` of the original."""

    rowptr: Tensor
    col: Tensor
    permutation: Tensor


def pointers(counts: Tensor) -> Tensor:
    """Row pointers from the number of entries in each row, int32."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def transpose(rowptr: Tensor, col: Tensor) -> Transposed:
    """Pattern of the transpose; the very same tensors where the pattern is symmetric."""
    t_rowptr, t_col, permutation = linalg.csr_transpose(rowptr, col, rowptr.numel() - 1)
    if torch.equal(t_rowptr, rowptr) and torch.equal(t_col, col):
        t_rowptr, t_col = rowptr, col  # read once from memory, not twice, where both are walked
    return Transposed(t_rowptr, t_col, permutation)


def coalesce(rows: Tensor, cols: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row pointers, columns and weights of triplets in any order; duplicates are added up. One sort."""
    key, order = torch.sort(rows.long() * n + cols.long(), stable=True)
    weight = weight.index_select(0, order)
    unique, which = torch.unique_consecutive(key, return_inverse=True)
    if unique.numel() < key.numel():
        weight = weight.new_zeros(unique.numel()).index_add(0, which, weight)
    rows = torch.div(unique, max(n, 1), rounding_mode="floor")
    return pointers(torch.bincount(rows, minlength=n)), (unique - rows * n).to(torch.int32), weight


def insert_diagonal(rowptr: Tensor, col: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the missing places on the diagonal: new pattern, where each old entry goes, where the diagonal is (n,)."""
    n, rows = rowptr.numel() - 1, rows_of(rowptr)
    node = torch.arange(n, device=col.device)
    missing = torch.ones(n, dtype=torch.bool, device=col.device).index_fill(0, rows[rows == col], False)
    inserted = torch.cat([missing.new_zeros(1, dtype=torch.long), missing.cumsum(0)])  # in the rows before
    new_rowptr = (rowptr + inserted).to(torch.int32)
    place = torch.arange(col.numel(), device=col.device) + inserted[rows] + (missing[rows] & (col > rows))
    diagonal = new_rowptr[:-1] + torch.bincount(rows[col < rows], minlength=n)
    new_col = col.new_empty(col.numel() + int(inserted[-1]))
    new_col[place] = col
    new_col[diagonal] = node.to(col.dtype)
    return new_rowptr, new_col, place, diagonal


def union(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Join two patterns ``(rowptr, col)``, a not empty or both: the new one, and where the entries of each go in it."""
    n = a[0].numel() - 1
    key_a, key_b = (rows_of(rowptr).mul_(n).add_(col) for rowptr, col in (a, b))
    at = torch.searchsorted(key_a, key_b)  # entries of a before each of b
    new = key_a.index_select(0, at.clamp(max=len(key_a) - 1)) != key_b
    # In the merged list an entry stands behind all of a before it and all that is new in b before it.
    new_before = torch.bincount(at[new], minlength=key_a.numel() + 1).cumsum(0)[: key_a.numel()]
    place_a = torch.arange(key_a.numel(), device=at.device) + new_before
    place_b = at + new.cumsum(0) - new.long()
    col = a[1].new_empty(key_a.numel() + int(new.sum()))
    col[place_a], col[place_b] = a[1], b[1]
    counts = a[0].diff() + torch.bincount(rows_of(b[0])[new], minlength=n)
    return pointers(counts), col, place_a, place_b


def select(rowptr: Tensor, col: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns `nodes` of a pattern, in their order: the new pattern, and which old entry each is."""
    n, m = rowptr.numel() - 1, nodes.numel()
    start, counts = rowptr[:-1].long()[nodes], rowptr.diff().long()[nodes]
    rows = torch.repeat_interleave(torch.arange(m, device=col.device), counts)
    offset = start - (counts.cumsum(0) - counts)
    entries = torch.arange(rows.numel(), device=col.device) + offset[rows]
    renamed = torch.full((n,), -1, device=col.device)
    renamed[nodes] = torch.arange(m, device=col.device)
    cols = renamed[col[entries].long()]
    kept = cols >= 0
    entries, rows, cols = entries[kept], rows[kept], cols[kept]
    order = torch.argsort(rows * m + cols)
    return pointers(torch.bincount(rows, minlength=m)), cols[order].to(torch.int32), entries[order]


def components(rowptr: Tensor, col: Tensor, transposed: Transposed) -> tuple[int, Tensor]:
    """Count the connected components and label each node; directed edges connect both ways. O(nnz log n).

    Every node points to a node of its component with a smaller number, or to itself. A round offers to each node, and
    to the one it points to, the smallest grandparent of its neighbours, and halves all paths; when nothing changes all
    point to the smallest node of their component (Zhang, Azad & Hu, *FastSV: a distributed-memory connected component
    algorithm with fast convergence*, 2020).
    """
    n = rowptr.numel() - 1
    # Doubles hold node numbers exactly, and have a minimum over rows.
    directions = [(rowptr.long(), col)]
    if transposed.col is not col:
        directions.append((transposed.rowptr.long(), transposed.col))
    parent = torch.arange(n, device=col.device)
    while col.numel():
        grandparent = parent[parent]
        offer = grandparent.double()
        for offsets, neighbours in directions:
            nearby = grandparent.double().index_select(0, neighbours)
            offer = torch.minimum(offer, torch.segment_reduce(nearby, "min", offsets=offsets, initial=n))
        better = torch.minimum(grandparent, offer.long()).scatter_reduce(0, parent, offer.long(), "amin")
        better = torch.minimum(better, better[better])
        if torch.equal(better, parent):
            break
        parent = better
    roots, labels = torch.unique(parent, return_inverse=True)
    return roots.numel(), labels
