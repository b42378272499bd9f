"""One sparse product, and one fused diffusion step, with 15 entries a row and 64 columns: Kantor beside torch's best.

    OMP_WAIT_POLICY=PASSIVE python bench/graph/bench_product.py [--threads 1 2] [--sizes 100000 1000000] [--columns 64]

``embedding_bag(mode="sum", per_sample_weights=w)`` is the fastest product that torch has on a CPU; MKL's CSR and the
usual gathering of messages (``index_add``) stand beside it. Near: columns within 200 of the row, as after a reordering
of the nodes; random: anywhere. `floor` is the part of the bandwidth of a large copy in the same run that a product
reaches, counting 8 bytes an entry, x once and y once; in random order more must be moved, and `gathered` counts a row
of x for every entry. With --reused, torch's results are kept in memory already mapped: it starts itself anew with
MALLOC_MMAP_THRESHOLD_. Least times, processor time for one thread, calls in turn; ratios say how many times longer the
peer takes.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from kantor.bench.tables import Table
from kantor.graph import _native
from peers import best, copy_rate, neighbours
from torch import Tensor
from torch.nn.functional import embedding_bag


def compare(n: int, reach: int | None, d: int, threads: int, repeats: int, table: Table) -> None:
    """One row of the table."""
    torch.set_num_threads(threads)
    graph = neighbours(n, 15, reach)
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    pattern, weight, diagonal = (graph.rowptr, graph.col), graph.weight, torch.rand(n)
    W, offsets = graph.torch_csr(), graph.rowptr[:-1]

    def product() -> Tensor:
        return _native.product(*pattern, weight, x)

    def step() -> Tensor:
        return _native.propagate(*pattern, weight, diagonal, x, 1)

    def bag() -> Tensor:
        return embedding_bag(graph.col, x, offsets, mode="sum", per_sample_weights=weight)

    def gather(rows: Tensor, col: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, rows, weight[:, None] * x[col])

    assert torch.allclose(product(), bag(), rtol=1e-4, atol=1e-4)
    ours, fused, embedding, mkl = best([product, step, bag, lambda: W @ x], repeats)
    scatter = ""
    if n <= 10**5:  # beyond, its messages alone take gigabytes
        rows, col = graph.rows, graph.col.long()
        scatter = f"{best([lambda: gather(rows, col)], 2)[0] / ours:.1f}"
    rate, size = copy_rate(), x.element_size() * d
    entries = 8 * graph.nnz
    table.add(
        n, "random" if reach is None else "near", threads, f"{ours * 1e3:.2f}", f"{fused / ours:.2f}",
        f"{embedding / ours:.2f}", f"{mkl / ours:.2f}", scatter, f"{(entries + 2 * n * size) / ours / rate:.2f}",
        f"{(entries + (graph.nnz + n) * size) / ours / rate:.2f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6])
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--reused", action="store_true")
    arguments = parser.parse_args()
    if arguments.reused and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    warnings.simplefilter("ignore")  # torch: sparse CSR is in beta
    columns = (
        "n", "order", "threads", "product ms", "step / product", "embedding_bag", "MKL CSR", "index_add", "floor",
        "gathered",
    )  # fmt: skip
    memory = "results in reused memory" if arguments.reused else "fresh results"
    table = Table(f"15 entries a row, {arguments.columns} columns, float32, {memory}", columns)
    for threads in arguments.threads:
        for n in arguments.sizes:
            for reach in (200, None):
                repeats = arguments.repeats if n <= 10**5 else max(3, arguments.repeats // 3)
                compare(n, reach, arguments.columns, threads, repeats, table)
        table.rule()
    table.print()


if __name__ == "__main__":
    main()
