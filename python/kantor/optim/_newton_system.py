"""The linear systems of a Newton method: capped conjugate gradients with reused vectors and a preconditioner."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kantor.linalg import Callable as CallableOperator
from kantor.linalg import LinearOperator, NystromPreconditioner, as_operator, nystrom
from kantor.linalg.capped_cg import CappedSolver, Rule

if TYPE_CHECKING:
    from kantor.optim.arncg import Direction, Options, Solve


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product, accumulated in double."""
    return float(torch.dot(a, b) if a.dtype is torch.float64 else torch.dot(a.double(), b.double()))


def norm(a: Tensor) -> float:
    """Euclidean norm, accumulated in double."""
    return math.sqrt(dot(a, a))


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows, on the CPU."""
    return (a.double() * b.double()).sum(-1).cpu()


def row_norms(a: Tensor) -> Tensor:
    """Norms of the rows, on the CPU."""
    return row_dots(a, a).sqrt()


class Solver:
    """Solves systems of one size; ``d`` holds the last directions until the next solve."""

    def __init__(self, like: Tensor, o: Options) -> None:
        self._capped = CappedSolver(like)
        self._rule: Rule = o.rule
        self._atol = o.atol
        self._like = like
        self._random: Tensor | None = None

    @property
    def d(self) -> Tensor:
        """The directions, shaped like the gradient."""
        return self._capped.d

    def solve(
        self, hessian: Callable[[Tensor], Tensor], g: Tensor, request: Solve, budget: float, M_inv: Any
    ) -> Direction:
        """One system; at most `budget` products."""
        right = self._probe() if request.probe else g
        limit = self._limit(request.limit, budget)
        self._run(hessian, right, request.damping, request.rtol, limit, request.probe, M_inv)
        outcome, d = self._capped.outcome(), self._capped.d
        if outcome.status == "INDEFINITE_PRECONDITIONER":
            raise ValueError("minimize: preconditioner: expected a positive definite one, got r'Mr <= 0")
        return _direction(outcome.status, outcome.length, dot(g, d), outcome.curvature, M_inv is not None)

    def solve_batch(
        self, hessian: Callable[[Tensor], Tensor], g: Tensor, requests: list[Solve | None], budget: float
    ) -> list[Direction]:
        """One system for each problem; those without a request are left out by a zero right-hand side."""
        asking = torch.tensor([request is not None for request in requests], device=g.device).unsqueeze(-1)
        probing = torch.tensor([request is not None and request.probe for request in requests], device=g.device)
        right = torch.where(probing.unsqueeze(-1), self._probe(), g) if bool(probing.any()) else g
        damping = np.array([1.0 if request is None else request.damping for request in requests])
        rtol = np.array([0.5 if request is None else request.rtol for request in requests])
        limits = np.array([0 if request is None else self._limit(request.limit, budget) for request in requests])
        right = torch.where(asking, right, torch.zeros_like(g))
        self._run(hessian, right, damping, rtol, limits, bool(probing.any()), None)
        outcomes = [self._capped.outcome(k) for k in range(len(requests))]
        return [
            _direction(outcome.status, outcome.length, slope, outcome.curvature)
            for outcome, slope in zip(outcomes, row_dots(g, self.d).tolist(), strict=True)
        ]

    def _run(self, hessian: Any, right: Tensor, damping: Any, rtol: Any, limit: Any, tight: bool, M_inv: Any) -> None:
        self._capped.solve(
            hessian, right, damping, rtol, rule="residual" if tight else self._rule,
            atol=math.inf if tight else self._atol, max_iter=limit, M_inv=M_inv,
        )  # fmt: skip

    def _limit(self, asked: float, budget: float) -> int:
        return int(max(0, min(2 * self._like.shape[-1] + 2, asked, budget - 1)))

    def _probe(self) -> Tensor:
        """Random vectors of norm one, the same in every run."""
        if self._random is None:
            generator = torch.Generator().manual_seed(0)
            v = torch.randn(self._like.shape, dtype=self._like.dtype, generator=generator).to(self._like.device)
            self._random = v / v.norm(dim=-1, keepdim=True)
        return self._random


def _direction(status: str, length: float, slope: float, curvature: float, preconditioned: bool = False) -> Direction:
    from kantor.optim.arncg import Direction

    return Direction(status, length, slope, curvature, preconditioned)


class Sketch:
    """The preconditioner of a run: none, a Nyström sketch renewed every 20 points, or the user's at every point.

    The choice "auto" begins to sketch when the systems at 20 points took more than 30 products each.
    """

    RANK, RENEW, HARD = 60, 20, 600

    def __init__(self, choice: Any) -> None:
        if not (choice in (None, "auto", "nystrom") or callable(choice)):
            raise ValueError(
                f"minimize: preconditioner: expected None, 'auto', 'nystrom' or a callable, got {choice!r}"
            )
        self._choice = choice
        self._x: Tensor | None = None
        self._age = self.RENEW
        self._operator: LinearOperator | None = None
        self._products: list[int] = []  # counts at the last points

    def note(self, products: int) -> None:
        """How many products the run has taken by now."""
        if self._products:
            self._products[-1] = products

    def at(
        self, x: Tensor, hessian: Callable[[Tensor], Tensor], damping: Any, shown: Any = None
    ) -> LinearOperator | None:
        """The preconditioner for systems at x, which the user's function sees as `shown`."""
        if self._choice is None:
            return None
        if x is not self._x:
            self._x = x
            self._age += 1
            self._products = [*self._products[-self.RENEW :], self._products[-1] if self._products else 0]
            if callable(self._choice):
                self._operator = as_operator(self._choice(x if shown is None else shown), like=x)
            elif self._age >= self.RENEW and (self._choice == "nystrom" or self._is_hard(x.numel())):
                self._age = 0
                H = CallableOperator(hessian, x.numel(), dtype=x.dtype, device=x.device)
                self._operator = nystrom(H, min(self.RANK, x.numel()))
        made = self._operator
        return made.with_damping(damping) if isinstance(made, NystromPreconditioner) else made

    def _is_hard(self, n: int) -> bool:
        if self._operator is not None:
            return True
        if n < 4 * self.RANK or len(self._products) <= self.RENEW:
            return False
        return self._products[-2] - self._products[0] > self.HARD
