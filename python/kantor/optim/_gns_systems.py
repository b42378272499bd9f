"""The linear systems ``(H + lam B) d = -g`` of gradient-normalised smoothness, by the form of H."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_same
from kantor._errors import NumericalBreakdown
from kantor._result import SolveStatus
from kantor.linalg import Dense, Diagonal, LinearOperator, LowRank, as_operator, multishift_cg
from kantor.linalg.capped_cg import CappedSolver
from kantor.linalg.low_rank import ShiftedSolver
from kantor.optim._newton_system import dot
from kantor.optim.curvature import low_rank_form

DENSE_MOST = 2000  # unknowns up to which a matrix that is at hand is factored
FORM_MOST = 500  # and up to which one is formed by products
# Against division by zero alone: no length is small for every function.
TINY = 1e-30
SHIFTS = 8  # radii gamma, gamma / 2, ... that one sequence of multi-shift CG serves


@dataclass(frozen=True)
class Metric:
    """``B = L L'``: norms, and the variable ``L'x`` in which B is the identity ("white"). Empty: the identity."""

    diagonal: Tensor | None = None
    factor: Tensor | None = None  # L, lower triangular

    @classmethod
    def of(cls, metric: Any, like: Tensor) -> Metric:
        """From what a user gives: None, a diagonal, a matrix or an operator."""
        n = like.numel()
        if metric is None:
            return cls()
        if isinstance(metric, Diagonal):
            metric = metric.values
        elif not isinstance(metric, Tensor | np.ndarray):
            apply = metric if isinstance(metric, LinearOperator) else getattr(metric, "matvec", None)
            if not callable(getattr(metric, "matvec", None)):
                raise TypeError(
                    f"minimize_gns: metric: expected None, a diagonal ({n},), a matrix ({n}, {n}) or an operator, got "
                    f"{type(metric).__name__}"
                )
            metric = as_operator(apply, like=like).dense()
        metric = torch.as_tensor(metric).detach()
        check_same("minimize_gns", [("x0", like), ("metric", metric)])
        if tuple(metric.shape) not in ((n,), (n, n)):
            raise ValueError(f"minimize_gns: metric: expected shape ({n},) or ({n}, {n}), got {tuple(metric.shape)}")
        if metric.ndim == 1:
            if not bool((metric > 0).all() & torch.isfinite(metric).all()):
                raise ValueError(
                    f"minimize_gns: metric: expected a positive diagonal, shape ({n},), got {metric.min()}"
                )
            return cls(diagonal=metric)
        if not bool((metric - metric.mT).abs().max() <= 1e-6 * metric.abs().max()):
            raise ValueError(f"minimize_gns: metric: expected a symmetric matrix, shape ({n}, {n})")
        factor, info = torch.linalg.cholesky_ex(metric)
        if int(info) != 0:
            raise ValueError(
                f"minimize_gns: metric: expected a positive definite matrix, shape ({n}, {n}); Cholesky failed"
            )
        return cls(factor=factor)

    def whiten(self, v: Tensor) -> Tensor:
        """``L^-1 v``, of rows."""
        if self.diagonal is not None:
            return v / self.diagonal.sqrt()
        if self.factor is None:
            return v
        white: Tensor = torch.linalg.solve_triangular(self.factor, v.reshape(-1, v.shape[-1]).mT, upper=False).mT
        return white.reshape(v.shape)

    def unwhiten(self, v: Tensor) -> Tensor:
        """``L^-T v``, of rows."""
        if self.diagonal is not None:
            return v / self.diagonal.sqrt()
        if self.factor is None:
            return v
        white: Tensor = torch.linalg.solve_triangular(self.factor.mT, v.reshape(-1, v.shape[-1]).mT, upper=True).mT
        return white.reshape(v.shape)

    def solve(self, v: Tensor) -> Tensor:
        """``B^-1 v``."""
        return self.unwhiten(self.whiten(v))

    def norm(self, h: Tensor) -> float:
        """``(h'Bh)^1/2``."""
        if self.diagonal is not None:
            return math.sqrt(dot(h, self.diagonal * h))
        white: Tensor = h if self.factor is None else self.factor.mT @ h
        return math.sqrt(dot(white, white))

    def dual_norm(self, g: Tensor) -> float:
        """``(g'B^-1 g)^1/2``."""
        white = self.whiten(g)
        return math.sqrt(dot(white, white))

    def add_to(self, H: Tensor, lam: float) -> Tensor:
        """``H + lam B``, dense."""
        if self.factor is not None:
            return H + lam * (self.factor @ self.factor.mT)
        shifted = H.clone()
        shifted.diagonal().add_(lam if self.diagonal is None else lam * self.diagonal)
        return shifted


class Systems:
    """One point's systems for several radii; what they share is computed once."""

    def __init__(self, B: Metric, solver: str, capped: CappedSolver | None) -> None:
        if solver not in ("auto", "cholesky", "woodbury", "multishift", "cg"):
            raise ValueError(
                "minimize_gns: solver: expected 'auto', 'cholesky', 'woodbury', 'multishift' or 'cg', got "
                + repr(solver)
            )
        if capped is not None and (B.diagonal is not None or B.factor is not None):
            raise ValueError("minimize_gns: metric: negative_curvature=True works with the identity only")
        self._B, self._solver, self._capped = B, solver, capped
        self._H: LinearOperator | None = None
        self._kept: Any = None
        self._eigen: Any = None
        self._repeats = False
        self.n_solve = 0

    def prepare(self, H: LinearOperator, g: Tensor, G: float) -> None:
        """Take the operator of a new point; one that is the same as before keeps its factorisation."""
        self._repeats = H is self._H
        if not self._repeats:
            self._H, self._kept, self._eigen = H, None, None
        self._g, self._G = g, G
        self._many: list[Tensor | None] = []
        self._first_gamma: float | None = None
        self._low = low_rank_form(H)
        self._how = self._choose(H) if self._solver == "auto" else self._solver
        if self._how == "woodbury" and (self._low is None or (self._low[1] != 0 and self._has_metric)):
            raise ValueError(
                "minimize_gns: solver: 'woodbury' needs a low-rank curvature (LowRank, or sums of them), and the "
                "identity as metric where a multiple of the identity is added"
            )

    @property
    def _has_metric(self) -> bool:
        return self._B.diagonal is not None or self._B.factor is not None

    def _choose(self, H: LinearOperator) -> str:
        n = H.shape[0]
        if isinstance(H, Diagonal) and not bool(H.values.any()):
            return "zero"
        if self._low is not None and (self._low[1] == 0 or not self._has_metric) and self._low[0].rank <= n / 2:
            return "woodbury"
        if isinstance(H, Dense) or self._low is not None:
            return "cholesky" if n <= DENSE_MOST else "multishift"
        return "cholesky" if n <= FORM_MOST else "multishift"

    def step(self, lam: float, gamma: float) -> tuple[Tensor, float | None]:
        """The step d, and for one along negative curvature the decrease that it must bring.

        Raises
        ------
        NumericalBreakdown
            ``H + lam B`` is not positive definite.
        """
        self.n_solve += 1
        if self._capped is not None:
            return self._step_capped(lam, gamma)
        if self._how == "cholesky":
            return self._by_cholesky(lam), None
        if self._how == "woodbury":
            return self._by_woodbury(lam), None
        if self._how == "multishift":
            return self._by_multishift(gamma), None
        if self._how == "cg":
            return self._usable(self._by_krylov([lam])[0]), None
        return self._B.solve(self._g) / -lam, None

    def _by_cholesky(self, lam: float) -> Tensor:
        assert self._H is not None
        if self._kept is None:
            dense = self._H.dense()
            self._kept = (dense + dense.mT) / 2
        if not bool(torch.isfinite(self._kept).all()):
            return torch.full_like(self._g, math.nan)
        if self._repeats:  # the same matrix at every point: its eigenvectors make each further shift O(n^2)
            if self._eigen is None:
                self._eigen = torch.linalg.eigh(self._B.whiten(self._B.whiten(self._kept).mT))
            values, vectors = self._eigen
            if bool((values + lam <= 0).any()):
                raise NumericalBreakdown("minimize_gns: H + lam B is not positive definite")
            return -self._B.unwhiten(((self._B.whiten(self._g) @ vectors) / (values + lam)) @ vectors.mT)
        factor, info = torch.linalg.cholesky_ex(self._B.add_to(self._kept, lam))
        if int(info) != 0:
            raise NumericalBreakdown("minimize_gns: H + lam B is not positive definite")
        d: Tensor = torch.cholesky_solve(self._g.unsqueeze(-1), factor).squeeze(-1)
        return -d

    def _by_woodbury(self, lam: float) -> Tensor:
        assert self._low is not None
        low, shift = self._low
        if self._kept is None:
            white = low if self._B.factor is None else LowRank(self._B.whiten(low.factors), low.weights)
            self._kept = white.shifted_solver(self._B.diagonal)
        kept: ShiftedSolver = self._kept
        if self._B.factor is None:
            return -kept.solve(lam + shift, self._g)
        return -self._B.unwhiten(kept.solve(lam, self._B.whiten(self._g)))

    def _by_multishift(self, gamma: float) -> Tensor:
        """The radii gamma, gamma / 2, ... share one Krylov sequence: a further trial costs no product."""
        if self._first_gamma is None or round(math.log2(self._first_gamma / gamma)) >= SHIFTS:
            self._first_gamma = gamma
            self._many = self._by_krylov([self._G / (gamma / 2**i + TINY) for i in range(SHIFTS)])
        return self._usable(self._many[round(math.log2(self._first_gamma / gamma))])

    @staticmethod
    def _usable(d: Tensor | None) -> Tensor:
        if d is None:
            raise NumericalBreakdown("minimize_gns: H + lam B is not positive definite")
        return d

    def _by_krylov(self, shifts: list[float]) -> list[Tensor | None]:
        """The steps for several lam; None where the matrix is not positive definite."""
        assert self._H is not None
        H, B = self._H, self._B
        rtol = min(0.1, math.sqrt(self._G)) / 10
        answer = multishift_cg(
            lambda v: B.whiten(H.matvec(B.unwhiten(v))),
            B.whiten(self._g),
            torch.tensor(shifts, dtype=torch.float64),
            rtol=max(rtol, 10 * torch.finfo(self._g.dtype).eps),
        )
        steps: list[Tensor | None] = []
        for x, status in zip(answer.x, answer.statuses, strict=True):
            if status is SolveStatus.BREAKDOWN:
                steps.append(torch.full_like(x, math.nan))
            else:
                steps.append(None if status is SolveStatus.NEGATIVE_CURVATURE else -B.unwhiten(x))
        return steps

    def _step_capped(self, lam: float, gamma: float) -> tuple[Tensor, float | None]:
        assert self._capped is not None
        assert self._H is not None
        self._capped.solve(self._H.matvec, self._g, lam / 2, 0.5, rule="step")
        outcome, d = self._capped.outcome(), self._capped.d.clone()
        if outcome.status == "BREAKDOWN":
            return torch.full_like(d, math.nan), None
        if outcome.status != "NC":
            return d, None
        # gamma >= sqrt(2 |g| / L) makes 2 |g| / gamma^2 an estimate of the Lipschitz constant L of the Hessian.
        M = 2 * self._G / gamma**2
        length = abs(outcome.curvature) / M
        sign = -1.0 if dot(self._g, d) >= 0 else 1.0
        return d * (sign * length / math.sqrt(dot(d, d))), 0.3 * M * length**3
