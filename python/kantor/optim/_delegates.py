"""Minimisers that other libraries do well, behind the same door: SciPy's Newton methods and torch's L-BFGS."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor.optim._newton_system import norm
from kantor.optim._objective import Objective, Point
from kantor.optim._recorder import Callback, Interrupted, Limits, Recorder
from kantor.optim._result import OptimizeResult, OptimizeStatus

DELEGATED = ("trust-krylov", "trust-ncg", "newton-cg", "lbfgs")


class _Shared:
    """The function as a library sees it: everything at one point is computed once, and the best point is kept."""

    def __init__(self, objective: Objective, recorder: Recorder, tol: float) -> None:
        self.objective, self.recorder, self.tol = objective, recorder, tol
        self.point = self.best = objective.evaluate(objective.start)
        if not np.isfinite(self.point.f):
            raise ValueError(
                f"{objective.name}: fun: expected a finite value at x0, got {self.point.f}; begin where fun is defined"
            )
        G = norm(objective.gradient(self.point))
        if not np.isfinite(G):
            raise ValueError(f"{objective.name}: expected a finite gradient at x0, got norm {G}")
        self.error: BaseException | None = None  # of a callable, where a library would swallow it
        self.details = ""  # what the library said, or did
        self._accepted: Tensor | None = None
        self._linearised: tuple[Point, Any] | None = None

    def at(self, x: Tensor) -> Point:
        """The point x; a repeated one costs nothing."""
        if not torch.equal(x, self.point.x):
            self.point = self.objective.evaluate(x.clone())
            if not (np.isfinite(self.point.f) or bool(torch.isfinite(x).all())):
                self.details = "it asked for the value at a point that is not finite"
                raise Interrupted(OptimizeStatus.FAILED)
        return self.point

    def value(self, x: Tensor) -> float:
        """The value at x, infinite where it is no number: libraries shorten a step that leads up, not one into NaN."""
        f: float = self.at(x).f
        return f if np.isfinite(f) else np.inf

    def accept(self, x: Tensor) -> None:
        """The library stands at x: if it moved, record it; stop where the gradient is small enough, or at a limit."""
        if self._accepted is not None and torch.equal(x, self._accepted):
            return
        point = self.at(x)
        self._accepted = point.x
        G = norm(self.objective.gradient(point))
        if not np.isfinite(G):
            raise Interrupted(OptimizeStatus.NON_FINITE)
        if point.f <= self.best.f or self.tol >= G:
            self.best = point
        self.recorder.record(point.x, point.f, G)
        if self.tol >= G:
            raise Interrupted(OptimizeStatus.CONVERGED)
        self.recorder.check_limits(self.recorder.iterations)

    def product(self, x: Tensor, v: Tensor) -> Tensor:
        """Hessian times v at x."""
        if self.objective.n_hvp >= self.recorder.limits.max_hvp:
            raise Interrupted(OptimizeStatus.MAX_HVP)
        if self._linearised is None or not torch.equal(x, self._linearised[0].x):
            point = self.at(x)
            self.objective.gradient(point)
            self._linearised = point, self.objective.hessian(point)
            self.recorder.n_points += 1
        product: Tensor = self._linearised[1](v)
        if not bool(torch.isfinite(product.sum())):  # the inner loops of SciPy have no way out of these
            raise Interrupted(OptimizeStatus.NON_FINITE)
        return product


def minimize_delegated(
    objective: Objective,
    method: str,
    *,
    tol: float,
    limits: Limits,
    callback: Callback | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
    options: dict[str, Any] | None = None,
) -> OptimizeResult:
    """Run SciPy's or torch's minimiser on an objective, counted and stopped as Kantor's own are.

    ``tol`` bounds the Euclidean norm of the gradient whatever the library's own test is; `options` are the library's.
    """
    recorder = Recorder(objective, method, tol, limits, callback)
    shared = _Shared(objective, recorder, tol)
    try:
        with recorder.watching(progress, interrupt):
            shared.accept(objective.start)
            run = _lbfgs if method == "lbfgs" else _scipy
            shared.details = run(shared, method, dict(options or {}))
        status = OptimizeStatus.FAILED
    except Interrupted as over:
        status = over.status
    best = shared.best
    g = objective.gradient(best)
    G = norm(g)
    if status is OptimizeStatus.FAILED and tol >= G:
        status, shared.details = OptimizeStatus.CONVERGED, ""
    return recorder.result(best.x, best.f, g, G, status, recorder.iterations, {}, details=shared.details)


def _scipy(shared: _Shared, method: str, options: dict[str, Any]) -> str:
    try:
        from scipy.optimize import OptimizeWarning, minimize
    except ImportError as error:
        raise ImportError(f'minimize: method={method!r} needs SciPy: pip install "kantor[cli]"') from error
    objective, limits = shared.objective, shared.recorder.limits

    def vector(x: Any) -> Tensor:
        return torch.as_tensor(x).to(objective.device, objective.dtype)

    def array(x: Tensor) -> Any:
        return x.detach().cpu().numpy().astype(np.float64)

    def guarded(call: Callable[..., Any]) -> Callable[..., Any]:
        """SciPy takes some exceptions for its own (LinAlgError, StopIteration): keep them."""

        def guard(*args: Any) -> Any:
            try:
                return call(*args)
            except BaseException as error:
                shared.error = error
                raise

        return guard

    accept = guarded(lambda x: shared.accept(vector(x)))

    def callback(intermediate_result: Any) -> None:  # the name tells SciPy what to pass
        accept(intermediate_result.x)

    own = {"gtol": shared.tol} if method.startswith("trust") else {"xtol": 1e-300}
    with warnings.catch_warnings():
        for category in (RuntimeWarning, OptimizeWarning):  # what SciPy has to say is in the result
            warnings.filterwarnings("ignore", category=category, module=r"scipy\.")
        warnings.filterwarnings("error", "Unknown solver options", OptimizeWarning)
        try:
            answer: Any = minimize(  # type: ignore[call-overload]
                guarded(lambda x: shared.value(vector(x))),
                array(objective.start),
                jac=guarded(lambda x: array(objective.gradient(shared.at(vector(x))))),
                hessp=guarded(lambda x, v: array(shared.product(vector(x), vector(v)))),
                method=method,
                callback=callback,
                options={"maxiter": limits.max_iter, **own, **options},
            )
        except OptimizeWarning as error:
            raise TypeError(f"minimize: method={method!r}: {error}") from None
    if shared.error is not None:
        raise shared.error
    if answer.status == 1:  # SciPy counts rejected steps as well
        raise Interrupted(OptimizeStatus.MAX_ITER)
    # No look at answer.x: every step that SciPy accepted went through the callback.
    if answer.success:  # of the size of a step, say
        return "SciPy: its own test was met, tol was not"
    return f"SciPy: {answer.message}"


def _lbfgs(shared: _Shared, method: str, options: dict[str, Any]) -> str:
    x = shared.objective.start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=1, max_eval=30, tolerance_grad=0.0, tolerance_change=0.0,
        **{"line_search_fn": "strong_wolfe", **options},
    )  # fmt: skip

    def closure() -> Tensor:
        f = shared.value(x.detach())
        if np.isfinite(f):
            x.grad = shared.objective.gradient(shared.point).clone()
        else:  # the line search bisects where its interpolation has no numbers to go by
            x.grad = torch.full_like(x, np.nan)
        return torch.tensor(f, dtype=x.dtype, device=x.device)

    while True:
        before = x.detach().clone()
        optimizer.step(closure)
        if torch.equal(before, x.detach()):
            return "the line search made no step"
        if not bool(torch.isfinite(x).all()):
            return "the line search left the finite numbers"
        shared.accept(x.detach())
