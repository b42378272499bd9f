"""Steps of the heat equation on a graph, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor.bench.case import OWN, Peer, Problem, Run
from kantor.graph import Graph, diffuse, from_scipy

TITLE = "20 diffusion steps on a graph and their gradient for x, float32"
SIZES = {"tiny": ((60, 4, 3),), "small": ((5000, 12, 32),), "full": ((20_000, 12, 16), (20_000, 12, 64))}  # n, deg, d
STEPS = 20
TOLERANCE = 1e-4  # of float32, after 20 steps

Step = Callable[[Tensor], Tensor]


class Task:
    """A symmetric graph, values x (n, d) on its nodes, weights of the sum that is differentiated, and what is right."""

    def __init__(self, n: int, degree: int, d: int, near: bool, device: str) -> None:
        import scipy.sparse as sp

        generator = torch.Generator().manual_seed(0)
        if near:  # as after a reordering
            col = torch.arange(n)[:, None] + torch.randint(-200, 201, (n, degree // 2), generator=generator)
        else:
            col = torch.randint(n, (n, degree // 2), generator=generator)
        row = torch.arange(n)[:, None].expand_as(col)
        weight = torch.rand(col.shape, dtype=torch.float64, generator=generator) / degree
        entries = (weight.flatten().numpy(), (row.flatten().numpy(), col.clamp(0, n - 1).flatten().numpy()))
        W = sp.csr_array(sp.coo_array(entries, shape=(n, n)))
        W = sp.csr_array(W + W.T).astype(np.float32)  # the sums are what every library is given
        self.weights: Any = W
        self.step = 0.9 / float(W.sum(1).max())
        self.x = torch.randn(n, d, generator=generator)
        self.probe = torch.randn(n, d, generator=generator)
        exact = W.astype(np.float64)
        laplacian = sp.diags_array(exact.sum(1)) - exact
        self.exact = [self.x.numpy().astype(np.float64), self.probe.numpy().astype(np.float64)]
        for _ in range(STEPS):  # symmetric: the gradient is the same steps on the probe
            self.exact = [y - self.step * (laplacian @ y) for y in self.exact]
        self.x, self.probe = self.x.to(device), self.probe.to(device)

    def csr(self, matrix: Any) -> Tensor:
        """A scipy matrix as torch's, with int32 indices, which MKL takes as they are, and float32 values."""
        matrix = matrix.tocsr()
        matrix.sort_indices()
        parts = (matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32), matrix.data.astype(np.float32))
        crow, col, values = (torch.from_numpy(part).to(self.x.device) for part in parts)
        return torch.sparse_csr_tensor(crow, col, values, matrix.shape, check_invariants=False)

    def stepper(self) -> Any:
        """``I - step L`` as a scipy matrix."""
        import scipy.sparse as sp

        W = self.weights.astype(np.float64)
        return sp.diags_array(1 - self.step * W.sum(1)) + self.step * W


def _both(task: Task, steps: Step) -> Run:
    def run() -> tuple[Tensor, Tensor]:
        leaf = task.x.detach().requires_grad_()
        y = steps(leaf)
        return y.detach(), torch.autograd.grad(y, leaf, task.probe)[0]

    return run


def _kantor(task: Task) -> Run:
    graph: Graph = from_scipy(task.weights).to(task.x.device)
    return _both(task, lambda x: diffuse(x, graph, task.step, STEPS))


def _torch(task: Task) -> Run:
    """One fused call a step, ``P x``, on MKL or cuSPARSE."""
    P = task.csr(task.stepper())

    def steps(x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = P @ x
        return x

    return _both(task, steps)


def _torch_by_hand(task: Task) -> Run:
    """The gradient written out: P is symmetric, so that autograd need not transpose it."""
    P = task.csr(task.stepper())

    def run() -> tuple[Tensor, Tensor]:
        y, gradient = task.x, task.probe
        for _ in range(STEPS):
            y, gradient = P @ y, P @ gradient
        return y, gradient

    return run


def _pyg(task: Task, sparse: bool) -> Run:
    from torch_geometric.nn import APPNP

    layer = APPNP(STEPS, 0.0, normalize=False)
    P = task.stepper()
    if sparse:
        matrix = task.csr(P)
        return _both(task, lambda x: layer(x, matrix))
    P = P.tocoo()
    edges = torch.from_numpy(np.stack([P.col, P.row]).astype(np.int64)).to(task.x.device)
    weight = torch.from_numpy(P.data.astype(np.float32)).to(task.x.device)
    return _both(task, lambda x: layer(x, edges, weight))


_EVERYWHERE = ("cpu", "cuda")
_PYG = ("torch_geometric", "scipy")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("kantor", OWN, "diffuse(x, graph, step, 20)", _kantor, ("scipy",), _EVERYWHERE),
        Peer("torch", "torch", "P @ x, CSR int32, autograd", _torch, ("scipy",), _EVERYWHERE),
        Peer("torch-by-hand", "torch", "the same, gradient by hand", _torch_by_hand, ("scipy",), _EVERYWHERE),
        Peer("appnp", "PyG", "APPNP(20, 0), edge_index", lambda task: _pyg(task, False), _PYG, _EVERYWHERE),
        Peer("appnp-sparse", "PyG", "APPNP(20, 0), torch CSR", lambda task: _pyg(task, True), _PYG, _EVERYWHERE),
    )
}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """Neighbours anywhere, and near the node as after a reordering."""
    return tuple(
        Problem(f"{where}, n = {n}, degree {degree}, d = {d}", "relative error", TOLERANCE, needs=("scipy",))
        for n, degree, d in SIZES[size]
        for where in ("random", "near")
    )


def make(problem: str, device: str) -> Task:
    """The graph that a name stands for."""
    where, n, degree, d = problem.split(", ")
    return Task(int(n[4:]), int(degree[7:]), int(d[4:]), where == "near", device)


def judge(task: Task, answer: Any) -> dict[str, Any]:
    """Largest error of result and gradient; the bytes of reading entries and x and writing x, once a step."""
    error = 0.0
    for found, exact in zip(answer, task.exact, strict=True):
        error = max(error, float(np.abs(found.cpu().double().numpy() - exact).max() / np.abs(exact).max()))
    n, d = task.x.shape
    one_step = 8 * task.weights.nnz + 2 * 4 * n * d
    return {"accuracy": error, "bytes": 2 * STEPS * one_step, "working_set": one_step}
