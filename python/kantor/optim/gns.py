"""Gradient-regularised Newton with approximate Hessians, ruled by one radius.

Source: Semenov, Jaggi & Doikov, *Gradient-Normalized Smoothness for Optimization with Approximate Hessians*, arXiv
2506.13710. A step solves ``(H + lam B) d = -g`` with ``lam = |g| / gamma``; gamma, the radius within which H predicts
the change of the gradient well relative to the gradient's size, doubles when a step is accepted and halves when it is
not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from kantor._errors import NumericalBreakdown
from kantor.linalg import Diagonal, LinearOperator
from kantor.linalg.capped_cg import CappedSolver
from kantor.optim._gns_systems import TINY, Metric, Systems
from kantor.optim._objective import Objective, Point
from kantor.optim._recorder import Callback, Interrupted, Limits, Recorder, warn_unless_converged
from kantor.optim._result import OptimizeResult, OptimizeStatus
from kantor.optim.curvature import Products, as_curvature_operator

GAMMA_MIN = TINY


def minimize_gns(
    fun: Callable[[Any], Any],
    x0: Any,
    *,
    curvature: Any = "hessian",
    grad: Callable[[Any], Any] | None = None,
    hvp: Callable[[Any, Any], Any] | None = None,
    metric: Any = None,
    gamma0: float = 1.0,
    tol: float = 1e-8,
    max_iter: int = 1000,
    max_trials: int = 40,
    solver: Literal["auto", "cholesky", "woodbury", "multishift", "cg"] = "auto",
    negative_curvature: bool = False,
    f_star: float | None = None,
    tol_f: float = 0.0,
    callback: Callback | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
    max_hvp: float = math.inf,
    max_seconds: float = math.inf,
) -> OptimizeResult:
    """Minimise with any symmetric approximation of the Hessian, by gradient-normalised smoothness.

    For generalised linear models, softmax models, nonlinear equations and least squares, where curvature is cheap but
    inexact. No constant of the function is asked for, and none of how bad the approximation is: the same steps attain
    the rate of each problem class.

    Parameters
    ----------
    fun : callable
        ``fun(x)``: a scalar.
    x0 : Tensor, ndarray or sequence of floats
        Starting point, of any shape, float32 or float64; callables get x in its kind.
    curvature : str or callable
        ``"hessian"`` (products by `hvp` or automatic differentiation), ``"zero"``, or a function of x that returns an
        operator or a dense symmetric matrix ``(n, n)``, such as those of :mod:`kantor.optim.curvature`.
    grad, hvp : callable, optional
        As for :func:`minimize`.
    metric : Tensor or operator, optional
        B, which measures steps: the diagonal ``(n,)``, or a matrix ``(n, n)``, symmetric positive definite. Default:
        the identity.
    gamma0 : float
        First radius, > 0.
    tol : float
        Stop when ``|g|_* = (g'B^-1 g)^1/2`` is at most this.
    max_iter : int
        Limit of accepted steps.
    max_trials : int
        Steps tried at one point before giving up.
    solver : str
        ``"cholesky"``: dense, one factorisation a trial. ``"woodbury"``: for low-rank operators, one factorisation a
        point. ``"multishift"``: conjugate gradients for several radii at once, products only. ``"cg"``: products only,
        one radius at a time. ``"auto"``: by the form of the operator.
    negative_curvature : bool
        Solve by capped CG and walk along negative curvature where it is met. Otherwise an indefinite system counts as a
        rejected trial.
    f_star, tol_f : float, optional
        Stop also when ``f - f_star <= tol_f``.
    callback, progress, interrupt
        As for :func:`minimize`.
    max_hvp, max_seconds : float
        Limits.

    Returns
    -------
    OptimizeResult
        With ``gamma``, ``n_solve`` and ``history["gamma"]``. Never raises for a run that did not converge.

    Raises
    ------
    TypeError, ValueError
        As :func:`minimize`; a metric that is not symmetric positive definite or of the wrong shape; a curvature that is
        not symmetric; gamma0 or tol out of range.

    Notes
    -----
    An iteration takes one operator and on average two solves. Every accepted step has
    ``f - f_new >= |g_new|_*^2 / (8 lam)``.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature, minimize_gns
    >>> A = torch.randn(200, 20, dtype=torch.float64)
    >>> fun = lambda x: torch.logsumexp(A @ x, 0)
    >>> exact = curvature.logsumexp(A, torch.zeros(200, dtype=torch.float64))
    >>> result = minimize_gns(fun, torch.ones(20, dtype=torch.float64), curvature=exact)
    >>> result.converged
    True
    """
    _check(gamma0=(gamma0, 0 < gamma0 < math.inf, "> 0"), tol=(tol, 0 <= tol < math.inf, ">= 0"),
           max_trials=(max_trials, max_trials >= 1, ">= 1"), max_iter=(max_iter, max_iter >= 0, ">= 0"),
           tol_f=(tol_f, tol_f >= 0, ">= 0"))  # fmt: skip
    if interrupt not in ("raise", "return"):
        raise ValueError(f"minimize_gns: interrupt: expected 'raise' or 'return', got {interrupt!r}")
    products = curvature == "hessian" if isinstance(curvature, str) else False
    objective = Objective("minimize_gns", fun, x0, grad, hvp, second_order=products)
    make = _curvature(curvature, objective)
    B = Metric.of(metric, objective.start)
    systems = Systems(B, solver, CappedSolver(objective.start) if negative_curvature else None)
    point = objective.evaluate(objective.start)
    if not math.isfinite(point.f):
        raise ValueError(f"minimize_gns: fun: expected a finite value at x0, got {point.f}; begin where fun is defined")
    G = B.dual_norm(objective.gradient(point))
    if not math.isfinite(G):
        raise ValueError(f"minimize_gns: expected a finite gradient at x0, got norm {G}")
    recorder = Recorder(objective, "gns", tol, Limits(max_iter, max_hvp, max_seconds), callback, ("gamma",))
    gamma, f_start = float(gamma0), point.f
    try:
        with recorder.watching(progress, interrupt):
            recorder.record(point.x, point.f, G, gamma)
            while True:
                if tol >= G or (f_star is not None and point.f - f_star <= tol_f):
                    raise Interrupted(OptimizeStatus.CONVERGED)
                if point.f < -1e20 * max(1.0, abs(f_start)):
                    raise Interrupted(OptimizeStatus.UNBOUNDED)
                recorder.check_limits(recorder.iterations)
                recorder.n_points += 1
                try:
                    H = make(point)
                except NumericalBreakdown:
                    raise Interrupted(OptimizeStatus.NON_FINITE) from None
                systems.prepare(H, point.g, G)
                found, gamma = _search(objective, systems, B, point, G, gamma, max_trials)
                if isinstance(found, OptimizeStatus):
                    raise Interrupted(found)
                point = found
                G = B.dual_norm(point.g)
                recorder.record(point.x, point.f, G, gamma)
    except Interrupted as over:
        status = over.status
    g = objective.gradient(point)
    result = recorder.result(
        point.x, point.f, g, B.dual_norm(g), status, recorder.iterations, {"gamma0": gamma}, gamma=gamma,
        n_solve=systems.n_solve,
    )  # fmt: skip
    warn_unless_converged(result, "minimize_gns")
    return result


def _search(
    objective: Objective, systems: Systems, B: Metric, point: Point, G: float, gamma: float, max_trials: int
) -> tuple[Point | OptimizeStatus, float]:
    """Halve gamma until a step is good enough; the new point or why there is none, and the next gamma (algorithm 1)."""
    failure = OptimizeStatus.NON_FINITE  # until something finite is seen
    noise = 10 * torch.finfo(objective.dtype).eps / 2 * max(1.0, abs(point.f))
    for _ in range(max_trials):
        lam = G / (gamma + TINY)
        try:
            d, downward = systems.step(lam, gamma)
        except NumericalBreakdown:  # H + lam B is not positive definite
            failure = OptimizeStatus.LINE_SEARCH
            gamma /= 2
            continue
        if not bool(torch.isfinite(d).all()):
            gamma /= 2
            continue
        tried = objective.evaluate(point.x + d)
        decrease = point.f - tried.f
        if math.isfinite(tried.f) and (decrease >= -noise):
            G_new = B.dual_norm(objective.gradient(tried))
            needed = downward if downward is not None else G_new**2 / (8 * lam)
            lost = abs(decrease) <= noise  # all rounding: the gradient decides, and must move
            if math.isfinite(G_new) and decrease >= needed and decrease > 0 and not (lost and G_new > G):
                return tried, max(2 * gamma, GAMMA_MIN)
            if lost and G_new < G:  # gamma stays
                return tried, gamma
            if lost and (G_new == G or torch.equal(tried.x, point.x)):
                return OptimizeStatus.STALLED, gamma
            failure = OptimizeStatus.STALLED if lost else OptimizeStatus.LINE_SEARCH
        elif math.isfinite(tried.f):
            failure = OptimizeStatus.LINE_SEARCH
        gamma = max(gamma / 2, GAMMA_MIN)
    return failure, gamma


def _curvature(curvature: Any, objective: Objective) -> Callable[[Point], LinearOperator]:
    """The operator at a point."""
    if curvature == "zero":
        none = Diagonal(torch.zeros_like(objective.start))
        return lambda point: none
    if isinstance(curvature, str):
        if curvature != "hessian":
            raise ValueError(f"minimize_gns: curvature: expected 'hessian', 'zero' or a callable, got {curvature!r}")
        return lambda point: Products(objective.hessian_rows(point), point.x)
    if not callable(curvature):
        raise TypeError(f"minimize_gns: curvature: expected a name or a callable, got {type(curvature).__name__}")
    return lambda point: as_curvature_operator(curvature(objective.restore(point.x.clone())), point.x, "minimize_gns")


def _check(**values: tuple[Any, bool, str]) -> None:
    for name, (value, fine, expected) in values.items():
        if not fine:
            raise ValueError(f"minimize_gns: {name}: expected a number {expected}, got {value!r}")


# --- the radius itself ---


def gradient_normalized_smoothness(
    fun: Callable[[Tensor], Tensor],
    x: Tensor,
    curvature: Any,
    *,
    metric: Any = None,
    n_dir: int = 64,
    generator: torch.Generator | None = None,
) -> float:
    """Estimate gamma(x), the radius of trust in a curvature at a point, from above.

    ``gamma(x) = max c`` with ``|grad f(x + h) - g - H h|_* <= |g|_* |h| / c`` for all ``|h| <= c``: the larger, the
    longer the steps that :func:`minimize_gns` can take there.

    Parameters
    ----------
    fun : callable
        A scalar function in torch operations.
    x : Tensor
        The point, of any shape.
    curvature : str or callable
        As for :func:`minimize_gns`.
    metric : Tensor or operator, optional
        B, as there.
    n_dir : int
        Random directions tried, beside the gradient's; more make the estimate smaller, and better.
    generator : torch.Generator, optional
        Of the directions. Default: a fixed seed.

    Returns
    -------
    float
        The estimate; infinity where nothing up to ``1e12`` contradicts (an exact Hessian of a quadratic), zero at a
        stationary point.

    Notes
    -----
    Bisection on log c, 60 steps of four radii in every direction: O(240 n_dir) gradients.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import gradient_normalized_smoothness
    >>> x = torch.ones(2, dtype=torch.float64)
    >>> gradient_normalized_smoothness(lambda x: x.square().sum(), x, "hessian")  # a quadratic
    inf
    """
    if not (isinstance(n_dir, int) and n_dir >= 1):
        raise ValueError(f"gradient_normalized_smoothness: n_dir: expected an integer >= 1, got {n_dir!r}")
    objective = Objective("gradient_normalized_smoothness", fun, x)
    point = objective.evaluate(objective.start)
    g = objective.gradient(point)
    H = _curvature(curvature, objective)(point)
    B = Metric.of(metric, objective.start)
    G = B.dual_norm(g)
    if G == 0:
        return 0.0
    generator = generator or torch.Generator().manual_seed(0)
    random = torch.randn(n_dir, objective.n, dtype=torch.float64, generator=generator).to(g)
    directions = [B.solve(g), -B.solve(g), *(B.unwhiten(z) for z in random)]

    def largest(u: Tensor, most: float) -> float:
        """The largest c <= most that this direction does not contradict."""
        u = u / B.norm(u)
        Hu = H.matvec(u)

        def holds(c: float) -> bool:
            for s in (c, c / 2, c / 4, c / 8):
                tried = objective.evaluate(point.x + s * u)
                change = objective.gradient(tried) - g - s * Hu
                if not B.dual_norm(change) <= G * s / c * (1 + 1e-12):
                    return False
            return True

        if holds(most):
            return most
        low, high = math.log(1e-14), math.log(most)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(math.exp(middle)) else (low, middle)
        return math.exp(low)

    estimate = 1e12
    for u in directions:
        estimate = min(estimate, largest(u, estimate))
    return math.inf if estimate == 1e12 else estimate
