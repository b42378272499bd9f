"""The empirical Fisher matrix by its definition, M-FAC's published recursions, and a digit classifier."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

F64 = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def dense(G: Tensor, damping: float, divisor: int, block: int | None = None) -> Tensor:
    """F, in double."""
    G = G.to(F64)
    F = G.T @ G / divisor
    if block is not None:
        which = torch.arange(G.shape[1]) // block
        F = F * (which[:, None] == which)
    return F + damping * torch.eye(G.shape[1], dtype=F64)


def inverse(G: Tensor, damping: float, divisor: int) -> Tensor:
    """``F^-1`` to the last digits, by the singular values of G."""
    _, s, Vt = torch.linalg.svd(G.to(F64), full_matrices=False)
    eigenvalues = 1 / (damping + s.square() / divisor)
    if len(G) >= G.shape[1]:
        return (Vt.T * eigenvalues) @ Vt
    return torch.eye(G.shape[1], dtype=F64) / damping + (Vt.T * (eigenvalues - 1 / damping)) @ Vt


def inverse_times_row(G: Tensor, damping: float, divisor: int, row: int) -> Tensor:
    """``F^-1 g_row``, within the span."""
    U, s, Vt = torch.linalg.svd(G.to(F64), full_matrices=False)
    return (U[row] * s / (damping + s.square() / divisor)) @ Vt


def correlated(m: int = 64, d: int = 4000, norm: float = 10.0) -> Tensor:
    """Gradients of one length around a common direction, as those of successive steps are."""
    G = random(1, d) + 0.3 * random(m, 20, seed=1) @ random(20, d, seed=2) / math.sqrt(20) + 0.1 * random(m, d, seed=3)
    return norm * G / G.norm(dim=1, keepdim=True)


def recursion(G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The published static form: v_i = F_{i-1}^-1 g_i and q_i = m + g_i'v_i, one rank after the other."""
    m = len(G)
    V, q = torch.empty_like(G), G.new_empty(m)
    for i in range(m):
        V[i] = G[i] / damping - ((V[:i] @ G[i]) / q[:i]) @ V[:i]
        q[i] = m + G[i] @ V[i]
    return V, q


class Dynamic:
    """The published dynamic form: coefficients D and B from an LU factorisation without pivoting."""

    def __init__(self, G: Tensor, damping: float) -> None:
        self.G, self.damping, m = G, damping, len(G)
        U = m * torch.eye(m, dtype=G.dtype, device=G.device) + G @ G.T / damping
        for k in range(m - 1):
            U[k + 1 :] -= torch.outer(U[k + 1 :, k] / U[k, k], U[k])
        self.q = U.diagonal().clone()
        self.D = U.triu() - m * torch.eye(m, dtype=G.dtype, device=G.device)
        self.B = torch.eye(m, dtype=G.dtype, device=G.device) / damping
        for i in range(1, m):
            self.B[i, :i] = (-self.D[:i, i] / self.q[:i]) @ self.B[:i, :i]

    def ihvp(self, x: Tensor) -> Tensor:
        """``F^-1 x``."""
        y = self.G @ x / self.damping
        for i in range(1, len(y)):
            y[i] -= self.D[:i, i] @ (y[:i] / self.q[:i])
        return x / self.damping - self.G.T @ (self.B.T @ (y / self.q))


# --- handwritten digits: 1400 to train on, 397 to test with ---


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    X = torch.from_numpy(data.data).float() / 16
    y = torch.from_numpy(data.target).long()
    return X[:1400], y[:1400], X[1400:], y[1400:]


def classifier(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, batch: int = 64, seed: int = 0) -> float:
    """Train; return the last epoch's mean loss."""
    X, y, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    mean = 0.0
    for _ in range(epochs):
        batches = torch.randperm(len(X), generator=generator).split(batch)
        mean = 0.0
        for index in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(X[index]), y[index])
            loss.backward()
            optimizer.step()
            mean += loss.item() / len(batches)
    return mean


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    _, _, X, y = digits()
    return float((net(X).argmax(1) == y).double().mean())


def gradients(net: nn.Module, weights: list[Tensor], m: int = 128, batch: int = 16, seed: int = 0) -> Tensor:
    """Gradients for some weights on m small batches, ``(m, d)``."""
    X, y, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(m):
        index = torch.randint(len(X), (batch,), generator=generator)
        loss = nn.functional.cross_entropy(net(X[index]), y[index])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)
