"""Adaptive regularised Newton-CG, for smooth and possibly nonconvex functions.

Source: Zhou, Xu, Li, Bao, Ding, Zhu, *A Regularized Newton Method for Nonconvex Optimization with Global and Local
Complexity Guarantees*, arXiv 2502.04799. The linear systems are :func:`kantor.linalg.capped_cg`'s.

:func:`arncg` is the algorithm, top to bottom, for one problem and in terms of numbers alone: it is a generator that
asks for what needs vectors (solve a system, try a step, measure a gradient, move). Whoever drives it owns the vectors:
one problem (:func:`drive`), a batch of problems in step with each other (``_batched.py``), or the parameters of a
module (``arncg_optimizer.py``).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch

from kantor.linalg.capped_cg import RULES, Rule
from kantor.optim._newton_system import Sketch, Solver, norm
from kantor.optim._objective import Objective
from kantor.optim._recorder import Callback, Interrupted, Limits, Recorder
from kantor.optim._result import OptimizeResult, OptimizeStatus


@dataclass(frozen=True)
class Options:
    """Parameters of the method, named as in the paper; see :func:`kantor.optim.minimize`.

    ``eta`` bounds the relative accuracy of a system, ``rule`` says when it is solved (:func:`kantor.linalg.capped_cg`),
    ``fallback`` is the paper's lambda, ``tau_minus``, ``tau_plus``, ``gamma`` rule the adaptation of M. Not in the
    paper: ``adaptation="model"`` lets M follow the quadratic model instead, ``inner`` is then the least limit of
    iterations in a system, and ``fast_reject`` raises M ever faster.
    """

    tol: float = 1e-5
    theta: float = 1.0
    policy: str = "gradient"
    rule: Rule = "truncated"
    eta: float = 0.01
    atol: float = math.inf
    fallback: float = 0.0
    fast_reject: bool = True
    mu: float = 0.3
    beta: float = 0.5
    m_max: int = 1
    gamma: float = 5.0
    tau_minus: float = 0.3
    tau_plus: float = 1.0
    M0: float = 1.0
    curvature_tol: float | None = None
    adaptation: Literal["decrease", "model"] = "decrease"
    inner: float = math.inf

    def __post_init__(self) -> None:
        """Raise ValueError for a parameter out of range."""
        ranges = {
            "tol": (self.tol >= 0, ">= 0"),
            "theta": (0 <= self.theta < math.inf, ">= 0"),
            "policy": (self.policy in ("gradient", "min_gradient"), "'gradient' or 'min_gradient'"),
            "rule": (self.rule in RULES, "'residual', 'step' or 'truncated'"),
            "eta": (0 < self.eta < 1, "in (0, 1)"),
            "atol": (self.atol > 0, "> 0"),
            "fallback": (0 <= self.fallback < math.inf, ">= 0"),
            "mu": (0 < self.mu < 0.5, "in (0, 1/2)"),
            "beta": (0 < self.beta < 1, "in (0, 1)"),
            "m_max": (isinstance(self.m_max, int) and self.m_max >= 0, "an integer >= 0"),
            "gamma": (1 < self.gamma < math.inf, "> 1"),
            "tau_minus": (self.tau_minus > 0, "> 0"),
            "tau_plus": (self.tau_plus > 0, "> 0"),
            "M0": (0 < self.M0 < math.inf, "> 0"),
            "adaptation": (self.adaptation in ("decrease", "model"), "'decrease' or 'model'"),
            "inner": (self.inner >= 1, ">= 1"),
            "curvature_tol": (self.curvature_tol is None or 0 < self.curvature_tol < math.inf, "> 0"),
        }
        for name, (fine, expected) in ranges.items():
            if not fine:
                raise ValueError(f"minimize: {name}: expected {expected}, got {getattr(self, name)!r}")


# Few Hessian-vector products; the paper's guarantees at the least cost; the authors' settings.
PRESETS = {
    "economy": Options(theta=0.5, adaptation="model", inner=20),
    "guarantee": Options(rule="step", eta=0.5, fast_reject=False),
    "paper": Options(rule="residual", eta=0.01, atol=0.01, fast_reject=False),
}


def options(preset: str, **changes: Any) -> Options:
    """Return a preset with the given parameters changed; None leaves one as it is."""
    if preset not in PRESETS:
        raise ValueError(f"minimize: preset: expected one of {', '.join(map(repr, PRESETS))}, got {preset!r}")
    known = {field.name for field in fields(Options)}
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"minimize: unexpected option {', '.join(unknown)}; the method has {', '.join(sorted(known))}")
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


@dataclass(slots=True)
class State:
    """What one step hands to the next; with the point it is all that resuming takes."""

    M: float  # estimate of the Lipschitz constant of the Hessian
    G_prev: float = math.nan  # gradient norm before the last step
    E: float = math.inf  # smallest gradient norm so far
    E_prev: float = math.inf  # and before the last step
    omega: float = math.nan
    limit: float = math.inf  # of iterations in one system


# --- what the algorithm asks for, and what it gets ---


class Solve(NamedTuple):
    """(H + 2 damping I) d = -g, by capped CG. Answer: :class:`Direction`."""

    damping: float
    rtol: float
    limit: float = math.inf  # of iterations
    probe: bool = False  # a random unit vector takes the place of g


class Direction(NamedTuple):
    """A solution (SOL), a direction of negative curvature (NC), or what there was at the limit (TERM)."""

    status: str
    norm: float  # |d|
    slope: float  # g'd
    curvature: float  # d'Hd / d'd
    preconditioned: bool = False


class Try(NamedTuple):
    """The value at x + step d. Answer: float."""

    step: float


class Measure(NamedTuple):
    """The gradient norm at the point tried last. Answer: float."""


class Move(NamedTuple):
    """Make the point tried last the current one. Answer: None."""


Request = Solve | Try | Measure | Move
Algorithm = Generator[Request, Any, OptimizeStatus]


# --- the algorithm ---


def arncg(f: float, G: float, s: State, o: Options, dtype: torch.dtype = torch.float64) -> Algorithm:
    """Minimise from a point with value f and gradient norm G; returns how it ended. `s` is kept up to date."""
    roundoff = torch.finfo(dtype).eps / 2
    if math.isnan(s.G_prev):
        s.G_prev = s.E = s.E_prev = G
        s.limit = o.inner
    f_start, unchanged = f, 0
    while True:
        if f < -1e20 * max(1.0, abs(f_start)):
            return OptimizeStatus.UNBOUNDED
        noise = 10 * roundoff * abs(f)
        stationary = o.tol >= G
        if stationary and o.curvature_tol is None:
            return OptimizeStatus.CONVERGED
        # The regulariser: omega_f alone gives the global rate, the factor delta^theta the quadratic local one.
        if o.policy == "gradient":
            omega_f, delta = math.sqrt(G), min(1.0, _ratio(G, s.G_prev))
        else:
            omega_f, delta = math.sqrt(s.E), _ratio(s.E, s.E_prev)
        omega, rejections = omega_f * delta**o.theta, 0
        while True:
            s.omega = omega
            if stationary:  # RON, procedure 2: is there curvature below -curvature_tol?
                d: Direction = yield Solve((o.curvature_tol or 0.0) / 2, 0.01, probe=True)
                if d.status not in ("NC", "BREAKDOWN"):
                    return OptimizeStatus.CONVERGED
            else:
                damping = max(math.sqrt(s.M) * omega, 1e-150)
                d = yield Solve(damping, min(o.eta, damping), s.limit)
            if d.status == "BREAKDOWN":
                return OptimizeStatus.NON_FINITE
            if d.norm < 2e-16 and 1e2 * o.tol < G:
                return OptimizeStatus.LINE_SEARCH if rejections else OptimizeStatus.STALLED
            search = _search_along_curvature if d.status == "NC" else _search_along_newton
            found = yield from search(f, G, d, omega, s, o, noise)
            if found is None:
                rejections += 1
                s.M *= o.gamma ** (rejections if o.fast_reject else 1)
                if s.M > 1e40:
                    s.M = 1e40
                    return OptimizeStatus.LINE_SEARCH
                continue
            if o.fallback > 0 and omega != omega_f and o.fallback * s.G_prev > G and G / o.fallback < found.G:
                omega = omega_f  # the gradient grew: this was too little regularisation
                continue
            break
        adapt = _adapt_to_model if o.adaptation == "model" else _adapt
        adapt(f, d, found, omega, omega_f, s, o)
        yield Move()
        unchanged = unchanged + 1 if (found.f, found.G) == (f, G) else 0
        s.G_prev, s.E_prev, s.E = G, s.E, min(s.E, found.G)
        f, G = found.f, found.G
        if unchanged >= 20:
            return OptimizeStatus.STALLED


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 1.0


class Found(NamedTuple):
    """An accepted point: value, gradient norm, step as a fraction of the direction."""

    f: float
    G: float
    fraction: float


Search = Generator[Request, Any, Found | None]


def _search_along_newton(f: float, G: float, d: Direction, omega: float, s: State, o: Options, noise: float) -> Search:
    """Armijo along a (partial) solution: from the full step, then from the length that theory grants."""
    if not d.slope < 0:
        return None
    short = math.sqrt(omega / (math.sqrt(s.M) * d.norm))
    for first in (1.0, short) if short < 1 else (1.0,):
        for m in range(o.m_max + 1):
            fraction = first * o.beta**m
            found = yield from _attempt(f, G, fraction, fraction, o.mu * fraction * d.slope, noise)
            if found is not None:
                return found
    return None


def _search_along_curvature(
    f: float, G: float, d: Direction, omega: float, s: State, o: Options, noise: float
) -> Search:
    """Along a direction of negative curvature: downhill, of length |curvature| / M, with cubic decrease."""
    length = abs(d.curvature) / s.M
    sign = -1.0 if d.slope >= 0 else 1.0
    for m in range(o.m_max + 1):
        fraction = o.beta**m
        decrease = -o.mu * s.M * fraction**2 * length**3
        found = yield from _attempt(f, G, sign * length * fraction / d.norm, fraction, decrease, noise)
        if found is not None:
            return found
    return None


def _attempt(f: float, G: float, step: float, fraction: float, decrease: float, noise: float) -> Search:
    """Accept a step that lowers f enough; where f is all rounding error, one that lowers the gradient."""
    f_new: float = yield Try(step)
    if not math.isfinite(f_new):
        return None
    lost_in_noise = abs(f_new - f) <= noise and -decrease <= noise
    if not (f_new <= f + decrease or lost_in_noise):
        return None
    G_new: float = yield Measure()
    if not math.isfinite(G_new) or (lost_in_noise and not f_new < f and G_new >= G):
        return None
    return Found(f_new, G_new, fraction)


def _adapt(f: float, d: Direction, found: Found, omega: float, omega_f: float, s: State, o: Options) -> None:
    """M grows where the decrease falls short of what it promised, shrinks where it exceeds that."""
    decrease, root = f - found.f, math.sqrt(s.M)
    full = d.status != "NC" and found.fraction == 1.0
    promised = omega**3
    if d.status == "NC":
        constant = (1 - 2 * o.mu) ** 2 * o.beta**2 * o.mu
    elif full:
        constant, promised = 4 * o.mu / 33, min(promised, found.G**2 / omega)
    else:
        constant = o.beta * o.mu
    if decrease > (4 * o.mu / 33 if full else o.mu) * o.tau_minus * o.tau_plus / root * omega_f**3:
        s.M = max(s.M / o.gamma, 1e-40)
    elif decrease < constant * o.tau_plus / root * promised:
        s.M = min(s.M * o.gamma, 1e40)


def _adapt_to_model(f: float, d: Direction, found: Found, omega: float, omega_f: float, s: State, o: Options) -> None:
    """For economy, not for the bounds: M follows how well the quadratic model predicted a full step.

    So does the effort put into a system: where its solution was cut short and the model still held, more of it is
    worth having.
    """
    if d.status == "NC" or found.fraction != 1.0:
        return _adapt(f, d, found, omega, omega_f, s, o)
    predicted = -d.slope - 0.5 * d.curvature * d.norm**2
    if predicted <= 1e-13 * abs(f):  # nothing can be told from rounding errors
        return None
    ratio = (f - found.f) / predicted
    if ratio > 0.75:
        s.M = max(s.M / 2, 1e-40)
    elif ratio < 0.5:
        s.M = min(s.M * 2, 1e40)
    if d.preconditioned:
        s.limit = o.inner  # the directions that a sketch leaves over are not worth more
    elif d.status == "TERM" and ratio > 0.9:
        s.limit *= 2
    elif ratio < 0.75:
        s.limit = max(s.limit / 2, o.inner)
    return None


def advance(algorithm: Algorithm, answer: Any) -> Request | OptimizeStatus:
    """The next request, or how it ended. A StopIteration that a user's function raises is not mistaken for the end."""
    try:
        return algorithm.send(answer)
    except StopIteration as finished:
        status: OptimizeStatus = finished.value
        return status


# --- one problem ---


def drive(
    objective: Objective,
    o: Options,
    limits: Limits,
    *,
    preconditioner: Any = "auto",
    state: State | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
) -> OptimizeResult:
    """Run the algorithm on one problem: the vectors and calls behind its requests."""
    point = objective.evaluate(objective.start)
    if not math.isfinite(point.f):
        raise ValueError(
            f"{objective.name}: fun: expected a finite value at x0, got {point.f}; begin where fun is defined"
        )
    g = objective.gradient(point)
    G = norm(g)
    if not math.isfinite(G):
        raise ValueError(f"{objective.name}: expected a finite gradient at x0, got norm {G}")
    s = State(o.M0) if state is None else state
    recorder = Recorder(objective, "arncg", o.tol, limits, callback, ("M", "omega"))
    if preconditioner == "auto" and o.adaptation != "model":
        preconditioner = None  # the other presets do as published
    solver, sketch = Solver(objective.start, o), Sketch(preconditioner)
    algorithm = arncg(point.f, G, s, o, objective.dtype)
    tried, answer, n_iter = point, None, 0
    hessian = None
    try:
        with recorder.watching(progress, interrupt):
            recorder.record(point.x, point.f, G, s.M, math.nan)
            while not isinstance(request := advance(algorithm, answer), OptimizeStatus):
                if type(request) is Try:
                    tried = objective.evaluate(torch.add(point.x, solver.d, alpha=request.step))
                    answer = tried.f
                elif type(request) is Measure:
                    G = norm(objective.gradient(tried))
                    answer = G
                elif type(request) is Solve:
                    recorder.check_limits(n_iter)
                    n_iter += 1
                    if hessian is None:
                        hessian = objective.hessian(point)
                        recorder.n_points += 1
                    M_inv = sketch.at(point.x, hessian, request.damping, objective.restore(point.x))
                    answer = solver.solve(hessian, point.g, request, limits.max_hvp - objective.n_hvp, M_inv)
                    sketch.note(objective.n_hvp)
                    if answer.status == "TERM" and objective.n_hvp >= limits.max_hvp:
                        recorder.check_limits(-1)  # cut short by the limit of products
                else:
                    point, hessian, answer = tried, None, None
                    recorder.record(point.x, point.f, G, s.M, s.omega)
            status = request
    except Interrupted as over:
        status = over.status
    g = objective.gradient(point)
    return recorder.result(point.x, point.f, g, norm(g), status, n_iter, {"resume": asdict(s)}, M=s.M)


def run(
    objective: Objective,
    o: Options,
    limits: Limits,
    *,
    resume: Any = None,
    preconditioner: Any = "auto",
    **watching: Any,
) -> OptimizeResult:
    """Run the algorithm on one problem or a batch of them, afresh or from the state of an earlier run."""
    from kantor.optim._batched import drive_batch

    if not objective.batched:
        state = None if resume is None else State(**resume)
        return drive(objective, o, limits, state=state, preconditioner=preconditioner, **watching)
    if preconditioner not in (None, "auto"):
        raise ValueError("minimize: preconditioner: not available with batched=True")
    states = None if resume is None else [State(**s) for s in resume]
    return drive_batch(objective, o, limits, states=states, **watching)
