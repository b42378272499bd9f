"""Graph kernels on a GPU: Kantor beside cuSPARSE (torch.sparse), gather and scatter, and cdist with topk.

    python bench/graph/bench_graph_cuda.py [--only product diffusion knn]

`of copy` is the bandwidth of a device copy against the least traffic: for a product 8 bytes an entry, x and y once; for
a step the same. Peers are PyTorch: torch.sparse with int32 indices, backward by hand with the transpose stored; the
usual message passing, in which every entry's row is gathered and added to its node, backward by autograd; cdist and
topk in blocks. Backward is the gradient for x. Times are the least of several calls, between two events on the stream.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from kantor.bench.tables import Table
from kantor.graph import _native
from kantor.graph._neighbours import knn
from torch import Tensor

Case = tuple[str, int, int, int, int, str]
PRODUCTS = [(10**5, 15, 64, "local"), (10**6, 15, 64, "local"), (10**6, 15, 64, "random")]
# name, nodes, entries a row, columns, steps, order
DIFFUSIONS: list[Case] = [
    ("like Cora", 2485, 5, 1433, 20, "random"),
    ("like Cora, classes", 2485, 5, 7, 20, "random"),
    ("classes", 20_000, 12, 7, 20, "random"),
    ("features", 20_000, 12, 64, 20, "random"),
    ("large", 10**6, 15, 64, 10, "local"),
]
SEARCHES = [(10_000, 64, 15), (100_000, 64, 15), (100_000, 16, 50), (1_000_000, 16, 10)]


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The least time of a call, after one to warm up."""
    run()
    least = float("inf")
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        least = min(least, start.elapsed_time(end) / 1e3)
    return least


def copy_rate() -> float:
    """Bytes a second that a copy on the device reads and writes."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a))


class Graph:
    """Columns within 200 of the row's (local) or anywhere (random), weights such that a step of 1/2 is stable."""

    def __init__(self, n: int, degree: int, order: str) -> None:
        rows = torch.arange(n, device="cuda")[:, None]
        reach = 200 if order == "local" else n
        shifts = torch.randint(-reach, reach + 1, (n, degree), device="cuda")
        col = ((rows + shifts) % n).sort(dim=1).values
        self.n, self.nnz = n, n * degree
        self.rowptr = torch.arange(0, n * degree + 1, degree, dtype=torch.int32, device="cuda")
        self.col = col.flatten().to(torch.int32)
        self.weight = torch.rand(n * degree, device="cuda") / degree
        self.diagonal = 1 - 0.5 * self.weight.view(n, degree).sum(1)
        self.rows, self.long_col = rows.expand(n, degree).flatten(), self.col.long()
        self.transposed = transpose(self.rows, self.col, n)
        self.column_diagonal = self.diagonal[:, None]
        t_rowptr, t_col, permutation = self.transposed
        self.W = torch.sparse_csr_tensor(self.rowptr, self.col, self.weight, (n, n))
        self.t_W = torch.sparse_csr_tensor(t_rowptr, t_col, self.weight[permutation], (n, n))

    def product(self, x: Tensor) -> Tensor:
        return _native.product(self.rowptr, self.col, self.weight, x)

    def gather(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, self.rows, self.weight[:, None] * x[self.long_col])

    def diffuse(self, x: Tensor, steps: int) -> Tensor:
        edge = 0.5 * self.weight
        return _native.propagate(self.rowptr, self.col, edge, self.diagonal, x, steps, transposed=self.transposed)

    def loop(self, x: Tensor, steps: int, product: Callable[[Tensor], Tensor]) -> Tensor:
        for _ in range(steps):
            x = self.column_diagonal * x + 0.5 * product(x)
        return x


def transpose(rows: Tensor, col: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern of the transpose, and where its entries are in the graph."""
    permutation = torch.sort(col, stable=True).indices
    counts = torch.bincount(col, minlength=n)
    rowptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return rowptr, rows[permutation].to(torch.int32), permutation.to(torch.int32)


def ratio(time: float | None, own: float) -> str:
    return "-" if time is None else f"{time / own:.2f}x"


def attempt(run: Callable[[], object], repeats: int = 3) -> float | None:
    """The time of a peer; None where it fails or has no memory."""
    try:
        return seconds(run, repeats)
    except RuntimeError:
        torch.cuda.empty_cache()
        return None


def products(rate: float) -> None:
    """One sparse product."""
    table = Table("product W x, float32", ("n", "a row", "columns", "order", "us", "of copy", "cuSPARSE", "gather"))
    for n, degree, d, order in PRODUCTS:
        graph, x = Graph(n, degree, order), torch.randn(n, d, device="cuda")
        own = seconds(lambda g=graph, x=x: g.product(x))
        share = (8 * graph.nnz + 8 * n * d) / own / rate
        sparse = attempt(lambda g=graph, x=x: g.W @ x)
        gather = attempt(lambda g=graph, x=x: g.gather(x))
        table.add(
            n, degree, d, order, f"{1e6 * own:.0f}", f"{100 * share:.0f}%", ratio(sparse, own), ratio(gather, own)
        )
    table.notes.append("cuSPARSE, gather: their time as a multiple of Kantor's")
    table.print()


def diffusions(rate: float) -> None:
    """K steps, and with the gradient for x."""
    table = Table(
        "K diffusion steps, float32",
        ("", "n", "entries", "columns", "K", "", "us", "of copy", "cuSPARSE loop", "gather loop"),
    )
    for name, n, degree, d, steps, order in DIFFUSIONS:
        graph, x = Graph(n, degree, order), torch.randn(n, d, device="cuda", requires_grad=True)
        grad = torch.randn(n, d, device="cuda")
        traffic = steps * (8 * graph.nnz + 8 * n * d)
        gather_fits = graph.nnz * d * steps < 5e9  # autograd keeps every message

        def own(backward: bool, g: Graph = graph, x: Tensor = x, k: int = steps, grad: Tensor = grad) -> None:
            y = g.diffuse(x if backward else x.detach(), k)
            if backward:
                torch.autograd.grad(y, x, grad)

        def sparse(backward: bool, g: Graph = graph, x: Tensor = x, k: int = steps, grad: Tensor = grad) -> None:
            g.loop(x.detach(), k, lambda z: g.W @ z)
            if backward:
                g.loop(grad, k, lambda z: g.t_W @ z)

        def gather(backward: bool, g: Graph = graph, x: Tensor = x, k: int = steps, grad: Tensor = grad) -> None:
            y = g.loop(x if backward else x.detach(), k, g.gather)
            if backward:
                torch.autograd.grad(y, x, grad)

        for label, backward in (("forward", False), ("and backward", True)):
            time = seconds(partial(own, backward))
            peers = [attempt(partial(sparse, backward)), attempt(partial(gather, backward)) if gather_fits else None]
            share = (2 if backward else 1) * traffic / time / rate
            figures = (f"{1e6 * time:.0f}", f"{100 * share:.0f}%", *(ratio(peer, time) for peer in peers))
            table.add(name, n, graph.nnz, d, steps, label, *figures)
    table.notes.append("of copy above 100%: from the second-level cache or shared memory")
    table.print()


def cdist_topk(x: Tensor, k: int, queries: int) -> None:
    """The k nearest of some rows, block by block."""
    block = max(1, 2**28 // len(x))
    for first in range(0, queries, block):
        rows = x[first : min(first + block, queries)]
        torch.topk(torch.cdist(rows, x), k + 1, largest=False)


def searches() -> None:
    """Exact nearest neighbours."""
    table = Table("k nearest neighbours, float32", ("n", "d", "k", "ms", "TFLOP/s", "cdist + topk", "memory MB"))
    for n, d, k in SEARCHES:
        x = torch.randn(n, d, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        own = seconds(lambda x=x, k=k: knn(x, k), repeats=2)
        memory = (torch.cuda.max_memory_allocated() - before - n * k * 8) / 1e6
        queries = min(n, 10_000)
        peer = attempt(lambda x=x, k=k, q=queries: cdist_topk(x, k, q), repeats=1)
        scaled = None if peer is None else peer * n / queries
        rate = 2 * n * n * d / own / 1e12
        table.add(n, d, k, f"{1e3 * own:.1f}", f"{rate:.1f}", ratio(scaled, own), f"{memory:.0f}")
    table.notes.append("cdist + topk: its time for 10,000 rows, scaled, as a multiple of Kantor's")
    table.print()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("product", "diffusion", "knn"))
    wanted = parser.parse_args().only or ("product", "diffusion", "knn")
    if not torch.cuda.is_available():
        sys.exit("bench_graph_cuda.py: torch sees no CUDA device")
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse")  # torch's, about its own state
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name(0)}, device copy {rate / 1e12:.2f} TB/s")
    if "product" in wanted:
        products(rate)
    if "diffusion" in wanted:
        diffusions(rate)
    if "knn" in wanted:
        searches()


if __name__ == "__main__":
    main()
