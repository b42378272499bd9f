"""What the minimisers of one problem have in common: history, limits, callback, progress, Ctrl-C, and the result."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kantor._progress import progress_bar
from kantor.optim._objective import Objective
from kantor.optim._result import OptimizeResult, OptimizeStatus


@dataclass(frozen=True)
class IterationInfo:
    """What a callback gets after every accepted step.

    Attributes
    ----------
    iteration : int
        Accepted steps so far.
    x : Tensor or ndarray
        The current point, of the kind and shape of x0; a copy is not made.
    fun, grad_norm : float or Tensor
        Value and gradient norm there; ``(B,)`` for batches.
    n_fun, n_grad, n_hvp : int
        Evaluations so far.
    """

    iteration: int
    x: Any
    fun: Any
    grad_norm: Any
    n_fun: int
    n_grad: int
    n_hvp: int


Callback = Callable[[IterationInfo], bool | None]


@dataclass(frozen=True)
class Limits:
    """When to stop without having converged."""

    max_iter: int
    max_hvp: float = math.inf
    max_seconds: float = math.inf


def warn_unless_converged(result: OptimizeResult, function: str) -> None:
    """Warn once when the tolerance was not reached, for the caller of the public function."""
    if not result.converged and result.status not in (OptimizeStatus.STOPPED, OptimizeStatus.INTERRUPTED):
        warnings.warn(f"{function}: {result.message}", RuntimeWarning, stacklevel=3)


class Interrupted(Exception):
    """Carries the status of a run that is over."""

    def __init__(self, status: OptimizeStatus) -> None:
        super().__init__(status)
        self.status = status


class Recorder:
    """History and limits of one run; ``own`` names the columns that only this method has."""

    def __init__(
        self,
        objective: Objective,
        method: str,
        tol: float,
        limits: Limits,
        callback: Callback | None,
        own: tuple[str, ...] = (),
    ) -> None:
        self.objective, self.method, self.tol, self.limits = objective, method, tol, limits
        self._callback = callback
        self._bar: Callable[[int, float, float], None] | None = None
        self._columns = ("fun", "grad_norm", "n_fun", "n_grad", "n_hvp", "seconds", *own)
        self._rows: list[tuple[Any, ...]] = []
        self._started = time.perf_counter()
        self.n_points = 0

    @contextmanager
    def watching(self, progress: bool, interrupt: Literal["raise", "return"]) -> Iterator[None]:
        """Around a run: the progress bar, and Ctrl-C as :class:`Interrupted` where it is to return."""
        with progress_bar(progress, self.method, self.tol, "gradient norm", "tol") as update:
            self._bar = update if progress else None
            try:
                yield
            except KeyboardInterrupt:
                if interrupt == "raise":
                    raise
                raise Interrupted(OptimizeStatus.INTERRUPTED) from None

    @property
    def iterations(self) -> int:
        """Accepted steps."""
        return len(self._rows) - 1

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def record(self, x: Any, f: Any, G: Any, *own: Any) -> None:
        """Keep a row for an accepted point, tell the callback; raise Interrupted when it is over."""
        objective = self.objective
        counts = objective.n_fun, objective.n_grad, objective.n_hvp
        self._rows.append((f, G, *counts, self.seconds, *own))
        if self._bar is not None:
            self._bar(self.iterations, float(np.max(np.asarray(G))), self.tol)
        if self._callback is not None and self.iterations > 0:
            answer = self._callback(IterationInfo(self.iterations, objective.restore(x), f, G, *counts))
            if isinstance(answer, bool | np.bool_) and answer:
                raise Interrupted(OptimizeStatus.STOPPED)

    def check_limits(self, n_iter: int) -> None:
        """Raise Interrupted when a limit is reached."""
        limits = self.limits
        if n_iter >= limits.max_iter:
            raise Interrupted(OptimizeStatus.MAX_ITER)
        if self.objective.n_hvp >= limits.max_hvp:
            raise Interrupted(OptimizeStatus.MAX_HVP)
        if limits.max_seconds < math.inf and self.seconds >= limits.max_seconds:
            raise Interrupted(OptimizeStatus.MAX_SECONDS)

    def history(self) -> dict[str, np.ndarray[Any, Any]]:
        """The columns as arrays; batches lead."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(self._columns)
        return {
            name: np.stack([np.asarray(value) for value in column], axis=-1) if column else np.empty(0)
            for name, column in zip(self._columns, columns, strict=True)
        }

    def result(
        self, x: Any, f: Any, g: Any, G: Any, status: OptimizeStatus, n_iter: int, state: dict[str, Any], **own: Any
    ) -> OptimizeResult:
        """The record of the run."""
        objective = self.objective
        own.setdefault("per_problem_status", [status])
        own.setdefault("per_problem_iterations", np.array([self.iterations], np.int64))
        return OptimizeResult(
            x=objective.restore(x),
            fun=f,
            grad=objective.restore(g),
            grad_norm=G,
            status=status,
            n_iter=n_iter,
            n_fun=objective.n_fun,
            n_grad=objective.n_grad,
            n_hvp=objective.n_hvp,
            n_points=self.n_points,
            history=self.history(),
            seconds=self.seconds,
            method=self.method,
            tol=self.tol,
            state={"x0": objective.restore(x), **state},
            **own,
        )
