"""Capped conjugate gradients as the paper has them: float64, every iterate kept, one product with p an iteration.

An oracle for csrc/linalg/capped_cg.h, written from Royer, O'Neill & Wright's algorithm 1 and independent of it:
products are formed directly, and test 4 looks at the stored iterates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Reference:
    """The answer, and what there was on the way."""

    status: str
    d: Tensor
    iterations: int
    hnorm: float
    alphas: list[float] = field(default_factory=list)
    rhos: list[float] = field(default_factory=list)
    iterates: list[Tensor] = field(default_factory=list)  # y_0, y_1, ..., y_j
    steps: list[Tensor] = field(default_factory=list)  # alpha_k p_k
    trial: Tensor | None = None  # y_j + alpha_j p_j


def capped_reference(
    H: Tensor,
    g: Tensor,
    eps: float,
    zeta: float = 0.01,
    *,
    rule: str = "residual",
    atol: float = math.inf,
    max_iter: int | None = None,
    hnorm: float = 0.0,
    precondition: Callable[[Tensor], Tensor] | None = None,
    log_T_shift: float = 0.0,
) -> Reference:
    """Solve ``(H + 2 eps I) d = -g`` or find curvature below -eps, line by line as published."""
    Hb = H + 2 * eps * torch.eye(len(g), dtype=g.dtype)
    limit = 2 * len(g) if max_iter is None else max_iter
    y, r = torch.zeros_like(g), g.clone()
    z = r if precondition is None else precondition(r)
    p, M = -z, hnorm
    out = Reference("", y, 0, M, iterates=[y])

    def grow(*vectors: Tensor) -> None:
        nonlocal M
        for v in vectors:
            if v.norm() > 0:
                M = max(M, float((H @ v).norm() / v.norm()))

    def down(v: Tensor) -> bool:
        return bool(v @ Hb @ v < eps * v.square().sum())

    def small() -> bool:
        norm = float(r.norm())
        kappa = (M + 2 * eps) / eps
        bounds = {
            "residual": zeta / (3 * kappa) * float(g.norm()),
            "step": 0.5 * eps * zeta * float(y.norm()),
            "truncated": min(0.5, math.sqrt(float(g.norm()))) * float(g.norm()),
        }
        return norm <= bounds[rule] and norm < atol

    def end(status: str, d: Tensor, j: int) -> Reference:
        out.status, out.d, out.iterations, out.hnorm = status, d, j, M
        return out

    grow(p)
    if down(p):
        return end("NC", p, 0)
    j = 0
    while True:
        alpha = float((r @ z) / (p @ Hb @ p))
        if len(out.alphas) == j:
            out.alphas.append(alpha)
            out.rhos.append(float(r @ r))
        out.steps.append(alpha * p)
        y = y + alpha * p
        out.iterates.append(y)
        r_new = r + alpha * (Hb @ p)
        z_new = r_new if precondition is None else precondition(r_new)
        beta = float((r_new @ z_new) / (r @ z))
        r, z = r_new, z_new
        j += 1
        p = -z + beta * p
        grow(y, p, z)
        if down(y):
            return end("NC", y, j)
        if small():
            return end("SOL", y, j)
        if down(p):
            return end("NC", p, j)
        out.alphas.append(float((r @ z) / (p @ Hb @ p)))
        out.rhos.append(float(r @ r))
        last = out.alphas[j] * p
        out.trial = y + last
        kappa = (M + 2 * eps) / eps
        tau = math.sqrt(kappa) / (math.sqrt(kappa) + 1)
        log_T = math.log(4) + 4 * math.log(kappa) - 2 * math.log(1 - math.sqrt(tau)) + log_T_shift
        if precondition is None and math.log(float(r.norm() / g.norm())) > 0.5 * log_T + 0.5 * j * math.log(tau):
            for earlier in out.iterates[:j]:
                if down(out.trial - earlier):
                    return end("NC", out.trial - earlier, j)
        if j >= limit:
            out.steps.append(last)
            return end("TERM", y, j)
