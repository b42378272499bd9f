"""K explicit diffusion steps: Kantor beside torch's sparse matrices and PyG's APPNP, and what gradients cost.

    OMP_WAIT_POLICY=PASSIVE python bench/graph/bench_diffuse.py [--threads 1 2] [--repeats 20]

Cora is the citation graph (a random one of its size where the file is absent); d = 1433 is its features, d = 7 its
classes. `loop` is ``x = x - step * (L @ x)`` with torch.sparse CSR and int32 indices, `addmm` the same as one fused
call, ``torch.addmm(x, L, x, alpha=-step)``, both on MKL. Backward is the gradient for x. `weights` adds gradients for
all edges and for the diagonal; its peer gathers messages and adds them up (autograd has no such gradient for CSR here
that is not slower). Least times, processor time for one thread, calls in turn; ratios say how many times longer the
peer takes.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from kantor.bench.tables import Table
from kantor.graph import _native
from peers import Sparse, best, cora, neighbours
from torch import Tensor

STEP, STEPS = 0.25, 20


def laplacian(graph: Sparse) -> Tensor:
    """``L = D - W`` as torch's CSR matrix."""
    import scipy.sparse as sp

    W = sp.csr_matrix((graph.weight.numpy(), graph.col.numpy(), graph.rowptr.numpy()))
    L = (sp.diags(np.asarray(W.sum(1)).ravel()) - W).tocsr()
    L.sort_indices()
    parts = (torch.from_numpy(L.indptr).int(), torch.from_numpy(L.indices).int(), torch.from_numpy(L.data).float())
    return torch.sparse_csr_tensor(*parts, (graph.n, graph.n))


def with_backward(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """Forward, and the gradient of a weighted sum for x."""
    probe = torch.randn_like(x)

    def both() -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(run(leaf), leaf, probe)

    return both


def appnp(graph: Sparse) -> Callable[[Tensor], Tensor] | None:
    """PyG's layer with the same graph and number of steps, if PyG is there."""
    try:
        from torch_geometric.nn import APPNP
    except ImportError:
        return None
    layer = APPNP(STEPS, 0.1, normalize=False)
    edges = torch.stack([graph.col.long(), graph.rows])
    return lambda x: layer(x, edges, graph.weight)


def weights_by_gathering(graph: Sparse, x: Tensor) -> Callable[[], object]:
    """Gradients for edges and diagonal by plain autograd."""
    rows, col = graph.rows, graph.col.long()
    probe = torch.randn_like(x)

    def run() -> object:
        edge, diagonal = (STEP * graph.weight).requires_grad_(), torch.full((graph.n,), 0.5).requires_grad_()
        y = x
        for _ in range(STEPS):
            y = (diagonal[:, None] * y).index_add(0, rows, edge[:, None] * y[col])
        return torch.autograd.grad(y, (edge, diagonal), probe)

    return run


def compare(name: str, graph: Sparse, d: int, threads: int, repeats: int, table: Table, extras: bool) -> None:
    """One row of the table."""
    torch.set_num_threads(threads)
    x = torch.randn(graph.n, d, generator=torch.Generator().manual_seed(1))
    degree = torch.zeros(graph.n).index_add(0, graph.rows, graph.weight)
    edge, diagonal = STEP * graph.weight, 1 - STEP * degree
    pattern, L = (graph.rowptr, graph.col), laplacian(graph)

    def ours(x: Tensor, edge: Tensor = edge, diagonal: Tensor = diagonal, dropout: float = 0.0) -> Tensor:
        return _native.propagate(*pattern, edge, diagonal, x, STEPS, 0.0, dropout, 7, graph.transposed)

    def loop(x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = x - STEP * (L @ x)
        return x

    def addmm() -> Tensor:
        y = x
        for _ in range(STEPS):
            y = torch.addmm(y, L, y, alpha=-STEP)
        return y

    def weights() -> object:
        leaves = edge.detach().requires_grad_(), diagonal.detach().requires_grad_()
        return torch.autograd.grad(ours(x, *leaves), leaves, torch.ones_like(x))

    assert torch.allclose(ours(x), addmm(), rtol=1e-3, atol=1e-4)
    forward, both, other, looped = best(
        [lambda: ours(x), with_backward(ours, x), addmm, with_backward(loop, x)], repeats
    )
    dropped, weighted = best([lambda: ours(x, dropout=0.25), weights], max(3, repeats // 4))
    layer = appnp(graph) if extras else None
    slow = [with_backward(layer, x)] if layer else []
    if extras:
        slow.append(weights_by_gathering(graph, x))
    peers = best(slow, 2, limit=30.0) if slow else []
    table.add(
        name, d, threads, f"{forward * 1e3:.3f}", f"{both * 1e3:.3f}", f"{other / forward:.2f}",
        f"{looped / both:.2f}", f"{peers[0] / both:.1f}" if layer else "", f"{dropped / forward:.2f}",
        f"{weighted / both:.2f}", f"{peers[-1] / weighted:.1f}" if peers else "",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # torch: sparse CSR is in beta
    columns = (
        "graph", "d", "threads", "forward ms", "with backward ms", "addmm / forward", "loop / both", "APPNP / both",
        "dropout / forward", "weights / both", "gathering / weights",
    )  # fmt: skip
    table = Table(f"{STEPS} diffusion steps, float32", columns)
    for threads in arguments.threads:
        for name, graph, d, extras in (
            ("Cora", cora(), 1433, True),
            ("Cora", cora(), 7, True),
            ("20000 x 12, random", neighbours(20_000, 12, None), 64, False),
            ("20000 x 12, near", neighbours(20_000, 12, 200), 64, False),
        ):
            compare(name, graph, d, threads, arguments.repeats if d != 1433 else 5, table, extras)
        table.rule()
    table.print()


if __name__ == "__main__":
    main()
