"""Storage of the last m gradients, and the two native passes over them: csrc/optim/mfac.h."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kantor._ops import backend

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8)
# Largest magnitude in a row of these; each row has a scale, so that small gradients do not vanish. bfloat16 has the
# exponents of float32 and needs none.
_LARGEST = {torch.float16: 1.0, torch.int8: 127.0}
_LINE = 64  # elements to which rows are padded with zeros, for loads of whole packets
_PAGE = 1 << 22  # elements of a page in double precision on a device: 32 MiB
_HOST_PAGE = 1 << 19  # 4 MiB: near the caches, and memory that the allocator keeps


class GradientWindow:
    """Rows ``G (m, dim)`` in a storage dtype, of which products within blocks of columns are formed in double.

    Parameters
    ----------
    m, dim : int
        Rows, columns.
    block : int
        Columns of a block; ``dim`` for one block.
    storage_dtype : dtype
        One of STORAGE.
    device : device
        Where the rows are.
    """

    def __init__(self, m: int, dim: int, block: int, storage_dtype: torch.dtype, device: torch.device) -> None:
        self.m, self.dim, self.block = m, dim, block
        self.blocks = -(-dim // block)
        self.rows = torch.zeros(m, padded(dim), dtype=storage_dtype, device=device)
        self.scales = torch.ones(m, dtype=torch.float64, device=device) if storage_dtype in _LARGEST else None
        # The type of vectors that go with it.
        self.dtype = torch.float64 if storage_dtype == torch.float64 else torch.float32
        # Of elements: what the storage holds, and what has products that fit into double precision.
        held = torch.finfo(self.dtype if self.scales is not None else storage_dtype).max
        self.limit = min(held, math.sqrt(torch.finfo(torch.float64).max / dim))
        self._workspace = torch.empty(backend().mfac_workspace(m, dim, block), dtype=torch.float64, device=device)

    def insert(self, slot: int, g: Tensor, largest: float) -> Tensor:
        """Replace row `slot` by ``g (dim,)``, of magnitude at most `largest`; return its products with all rows.

        Products are ``(blocks, m)`` and belong to the row as it is stored. G is read once.
        """
        inverse = 1.0
        if self.scales is not None:
            scale = _scale(largest, self.rows.dtype)
            self.scales[slot], inverse = scale, 1 / scale
        products = self._products(g.reshape(1, -1), slot, inverse)[0]
        return products if self.scales is None else products.mul_(self.scales * self.scales[slot])

    def fill(self, grads: Tensor, first: int = 0) -> None:
        """Set rows from `first` on to ``grads (n, dim)``."""
        rows = self.rows[first : first + len(grads), : self.dim]
        if self.scales is None:
            rows.copy_(grads)
            return
        low, high = torch.aminmax(grads, dim=1)
        for slot, largest in enumerate(torch.maximum(-low, high).tolist()):
            self.scales[first + slot] = scale = _scale(largest, self.rows.dtype)
            row = grads[slot].float() * (1 / scale)
            rows[slot].copy_(row.round_() if self.rows.dtype == torch.int8 else row)

    def products(self, x: Tensor) -> Tensor:
        """``(k, blocks, m)`` in double: the rows' products with ``x (k, dim)`` on each block."""
        products = self._products(x, -1, 1.0)
        return products if self.scales is None else products.mul_(self.scales)

    def _products(self, x: Tensor, slot: int, inverse_scale: float) -> Tensor:
        out = torch.empty(len(x), self.blocks, self.m, dtype=torch.float64, device=x.device)
        x, workspace, threads = x.contiguous(), self._workspace, torch.get_num_threads()
        for some in self._parts(len(x)):
            backend().mfac_products(self.rows, self.block, slot, inverse_scale, x[some], out[some], workspace, threads)
        return out

    def combine(self, c: Tensor, scale: float = 0.0, x: Tensor | None = None) -> Tensor:
        """``scale x + G'c`` for ``c (k, blocks, m)``, as ``(k, dim)``; summed in double and rounded once."""
        y = torch.empty(len(c), self.dim, dtype=self.dtype, device=self.rows.device)
        c = (c if self.scales is None else c * self.scales).contiguous()
        x, threads = y if x is None else x.contiguous(), torch.get_num_threads()
        for some in self._parts(len(c)):
            backend().mfac_combine(self.rows, self.block, c[some], scale, x[some], y[some], threads)
        return y

    def _parts(self, count: int) -> list[slice]:
        """Of many vectors, those of one native call: Ctrl-C waits for its end."""
        step = max(1, (1 << 30) // self.rows.numel())
        return [slice(begin, begin + step) for begin in range(0, count, step)]

    def gram(self) -> Tensor:
        """``(blocks, m, m)`` in double: the products of the rows among each other."""
        gram = torch.zeros(self.blocks, self.m, self.m, dtype=torch.float64, device=self.rows.device)
        work = gram.new_empty(backend().mfac_gram_workspace(self.m, self.dim, self.block))
        if backend().mfac_gram(self.rows, self.dim, self.block, gram, work, torch.get_num_threads()):
            return gram if self.scales is None else gram.mul_(torch.outer(self.scales, self.scales))
        for block, _, page in self.pages():
            for begin, end in strips(self.m):  # the lower triangle
                target = gram[block : block + len(page), begin:end, :end]
                target.baddbmm_(page[:, begin:end], page[:, :end].mT)
        for begin, end in strips(self.m):
            gram[:, :begin, begin:end] = gram[:, begin:end, :begin].mT
        return gram

    def covariance(self) -> Tensor:
        """``(blocks, block, block)`` in double: the products of the columns of a block among each other."""
        A = torch.zeros(self.blocks, self.block, self.block, dtype=torch.float64, device=self.rows.device)
        for block, _, page in self.pages():
            torch.bmm(page.mT, page, out=A[block : block + len(page)])
        return A

    def row(self, slot: int) -> Tensor:
        """Row `slot` by blocks, ``(blocks, block)`` in double, with zeros behind its end."""
        row = self.rows[slot, : self.dim].to(torch.float64)
        return self.by_blocks(row if self.scales is None else row * self.scales[slot])

    def by_blocks(self, x: Tensor) -> Tensor:
        """``(..., dim)`` as ``(..., blocks, block)``."""
        x = torch.nn.functional.pad(x, (0, self.blocks * self.block - self.dim))
        return x.view(*x.shape[:-1], self.blocks, self.block)

    def pages(self) -> Iterator[tuple[int, int, Tensor]]:
        """Iterate over ``(first block, first column, (n, m, columns) in double)``: n whole blocks, or a part of one.

        What a short last block lacks is zero.
        """
        most = _PAGE if self.rows.is_cuda else _HOST_PAGE
        width = max(_LINE, most // self.m, min(self.block, self.m))  # blocks up to m are never cut
        if self.block > width:
            for block in range(self.blocks):
                end = min(self.dim, (block + 1) * self.block)
                for begin in range(block * self.block, end, width):
                    yield block, begin, self.columns(begin, min(end, begin + width)).unsqueeze(0)
            return
        count = width // self.block
        for block in range(0, self.blocks, count):
            n = min(count, self.blocks - block)
            page = self.columns(block * self.block, min(self.dim, (block + n) * self.block))
            page = torch.nn.functional.pad(page, (0, n * self.block - page.shape[1]))
            yield block, block * self.block, page.view(self.m, n, self.block).transpose(0, 1)

    def columns(self, begin: int, end: int) -> Tensor:
        """``(m, end - begin)`` in double."""
        page = self.rows[:, begin:end].to(torch.float64)
        return page if self.scales is None else page.mul_(self.scales.unsqueeze(1))


def _scale(largest: float, dtype: torch.dtype) -> float:
    if largest == 0:
        return 1.0
    if dtype == torch.float16:  # a power of two: no rounding beside that of the storage
        return math.ldexp(1.0, min(max(math.frexp(largest)[1], -100), 126))  # float32 has the inverse of it
    return max(largest, 1e-30) / _LARGEST[dtype]


def largest_of(x: Tensor) -> float:
    """Largest magnitude of elements; NaN or infinity where one is. One pass, and one wait for a device."""
    low, high = torch.stack(torch.aminmax(x)).tolist()
    return float(max(-low, high))  # both are NaN where an element is


def strips(m: int) -> list[tuple[int, int]]:
    """Ranges of the rows of a triangular matrix: product by product up to the diagonal costs little over a half."""
    length = max(64, -(-m // 4))
    return [(begin, min(m, begin + length)) for begin in range(0, m, length)]


def padded(dim: int) -> int:
    """Elements from one row to the next."""
    return -(-dim // _LINE) * _LINE
