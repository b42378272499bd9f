"""The front door of the minimisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch

from kantor._ranks import Ranks
from kantor.optim import arncg as _arncg
from kantor.optim._delegates import DELEGATED, minimize_delegated
from kantor.optim._objective import Objective
from kantor.optim._recorder import Callback, IterationInfo, Limits, warn_unless_converged
from kantor.optim._result import OptimizeResult
from kantor.optim.gns import minimize_gns

Method = Literal["arncg", "gns", "trust-krylov", "trust-ncg", "newton-cg", "lbfgs"]
METHODS = ("arncg", "gns", *DELEGATED)

# Arguments of scipy.optimize.minimize that have another name here, or none.
_IN_SCIPY = {
    "jac": "pass the gradient as grad=, or neither for torch's",
    "hess": "pass products of the Hessian with vectors as hvp=fn(x, v)",
    "hessp": "pass it as hvp=",
    "args": "bind them: lambda x: fun(x, *args)",
    "bounds": "there are no constraints; substitute the unknowns, or use scipy.optimize.minimize",
    "constraints": "there are none; substitute the unknowns, or use scipy.optimize.minimize",
    "options": "pass them one by one",
    "maxiter": "it is called max_iter",
}


def minimize(
    fun: Callable[[Any], Any],
    x0: Any,
    *,
    method: Method = "arncg",
    grad: Callable[[Any], Any] | None = None,
    hvp: Callable[[Any, Any], Any] | None = None,
    tol: float = 1e-5,
    max_iter: int | None = None,
    max_hvp: int | None = None,
    max_seconds: float | None = None,
    preset: Literal["economy", "guarantee", "paper"] = "economy",
    theta: float | None = None,
    policy: Literal["gradient", "min_gradient"] | None = None,
    fallback: float | None = None,
    rule: Literal["residual", "step", "truncated"] | None = None,
    preconditioner: Any = "auto",
    curvature_tol: float | None = None,
    batched: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
    resume: dict[str, Any] | None = None,
    **options: Any,
) -> OptimizeResult:
    """Minimise a smooth function, convex or not.

    The default method is regularised Newton-CG: it needs Hessian-vector products, never the Hessian; leaves saddle
    points and maxima along the negative curvature that its linear solver meets; and has no constant to tune.

    Parameters
    ----------
    fun : callable
        ``fun(x)``: a scalar; with ``batched=True`` one for each problem, shape ``(B,)``.
    x0 : Tensor, ndarray or sequence of floats
        Starting point, of any shape; float64 (recommended) or float32. The callables get x in its kind, shape, dtype
        and device: torch tensors for a tensor, else NumPy arrays.
    method : str
        ``"arncg"``: regularised Newton-CG (Zhou et al., arXiv 2502.04799). ``"gns"``: :func:`minimize_gns`.
        ``"trust-krylov"``, ``"trust-ncg"``, ``"newton-cg"``: SciPy's. ``"lbfgs"``: torch's, with strong Wolfe search.
    grad, hvp : callable, optional
        ``grad(x)``, and ``hvp(x, v)``, the product of the Hessian at x with v. Default: automatic differentiation,
        which needs x0 to be a tensor and fun to be made of torch operations.
    tol : float
        Stop when the Euclidean norm of the gradient is at most this.
    max_iter, max_hvp, max_seconds : optional
        Limits: steps (default 100 000), Hessian-vector products, wall-clock time. What is found is returned.
    preset : {"economy", "guarantee", "paper"}
        For ``arncg``. ``"economy"``: fewest Hessian-vector products, systems solved loosely, ``|r| <= min(1/2, sqrt|g|)
        |g|``. ``"guarantee"``: all complexity bounds of the paper, at the least cost. ``"paper"``: the authors'
        settings.
    theta, policy, fallback, rule : optional
        For ``arncg``, instead of the preset's: the exponent of the local phase, which gradient norms regularise, the
        paper's lambda, and the stopping rule of :func:`kantor.linalg.capped_cg`.
    preconditioner : "auto", None, "nystrom" or callable
        For ``arncg``: ``"nystrom"`` sketches the Hessian (60 products every 20 steps); a callable gets x and returns an
        operator or function close to the inverse of the Hessian there. ``"auto"`` begins to sketch, with the preset
        "economy", where the systems at 20 points in a row took more than 30 products each.
    curvature_tol : float, optional
        For ``arncg``: at a stationary point look for curvature below minus this (capped CG from a random vector), and
        leave along it. Default: a small gradient is enough.
    batched : bool
        The first dimension of x0 counts independent problems, which are solved at once (``arncg`` only).
    callback : callable, optional
        ``callback(info)`` after every accepted step with ``info.iteration, x, fun, grad_norm, n_fun, n_grad, n_hvp``;
        returning True stops. With :func:`kantor.distributed.sum_over_ranks` it may be given on one rank alone, and
        stops all.
    progress : bool
        Show a progress bar (tqdm when installed, else log records).
    interrupt : "raise" or "return"
        What Ctrl-C does: raise KeyboardInterrupt, or return the last iterate with status INTERRUPTED.
    resume : dict, optional
        What an earlier result's ``state`` holds: ``minimize(fun, **result.state)`` goes on where it ended.
    **options
        Further parameters of the method: for ``arncg`` ``eta, atol, fast_reject, mu, beta, m_max, gamma, tau_minus,
        tau_plus, M0, adaptation, inner``; for ``gns`` those of :func:`minimize_gns`; for the others the library's own.

    Returns
    -------
    OptimizeResult
        The best point, its value and gradient, status, counts and history. Never raises for a run that did not
        converge; ``result.check()`` does.

    Raises
    ------
    TypeError
        x0 is not real floating point; a callable is missing or returns something else than a tensor.
    ValueError
        Shapes or dtypes that do not fit, fun or gradient not finite at x0, options out of range.
    RuntimeError
        fun cannot be differentiated twice by torch and hvp is missing.

    Warns
    -----
    RuntimeWarning
        Once per call, when the tolerance was not reached.

    Notes
    -----
    Exceptions raised inside a callable leave through this function as they are. Memory for ``arncg``: about 10 vectors
    and the graph of one evaluation. Complexity of ``arncg`` with ``preset="guarantee"``: a gradient norm of eps after
    O(eps^-3/2) points and O~(eps^-7/4) products, without knowing a Lipschitz constant. Deterministic on the CPU.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import minimize
    >>> def rosenbrock(x):
    ...     return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
    >>> result = minimize(rosenbrock, torch.zeros(10, dtype=torch.float64), tol=1e-8)
    >>> str(result.status)
    'converged'
    >>> bool((result.x - 1).abs().max() < 1e-8)
    True
    """
    if method not in METHODS:
        raise ValueError(f"minimize: method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if foreign := [name for name in options if name in _IN_SCIPY and (name != "maxiter" or method not in DELEGATED)]:
        raise TypeError(f"minimize: unexpected argument {foreign[0]}: {_IN_SCIPY[foreign[0]]}")
    limits = _limits(tol, max_iter, max_hvp, max_seconds)
    if interrupt not in ("raise", "return"):
        raise ValueError(f"minimize: interrupt: expected 'raise' or 'return', got {interrupt!r}")
    own: dict[str, Any] = {"theta": theta, "policy": policy, "fallback": fallback, "rule": rule}
    own |= {"curvature_tol": curvature_tol, "preconditioner": None if preconditioner == "auto" else preconditioner}
    if method != "arncg":
        own |= {"resume": resume, "batched": batched or None, "preset": None if preset == "economy" else preset}
        if given := [name for name, value in own.items() if value is not None]:
            raise ValueError(f"minimize: {', '.join(given)}: for method='arncg' only, got method={method!r}")
    ranks: Ranks | None = getattr(fun, "ranks", None)
    if ranks is not None:
        callback = _callback_of_ranks(ranks, x0, callback, max_seconds)
    with nullcontext() if ranks is None else ranks.deferred_interrupts():
        if method == "gns":
            result = minimize_gns(
                fun, x0, grad=grad, hvp=hvp, tol=tol, max_iter=limits.max_iter, max_hvp=limits.max_hvp,
                max_seconds=limits.max_seconds, callback=callback, progress=progress, interrupt=interrupt, **options,
            )  # fmt: skip
        elif method == "arncg":
            chosen = _arncg.options(
                preset,
                tol=tol,
                theta=theta,
                policy=policy,
                fallback=fallback,
                rule=rule,
                curvature_tol=curvature_tol,
                **options,
            )
            objective = Objective("minimize", fun, x0, grad, hvp, batched=batched)
            result = _arncg.run(
                objective, chosen, limits, preconditioner=preconditioner, resume=resume, callback=callback,
                progress=progress, interrupt=interrupt,
            )  # fmt: skip
        else:
            objective = Objective("minimize", fun, x0, grad, hvp, second_order=method != "lbfgs")
            result = minimize_delegated(
                objective, method, tol=tol, limits=limits, callback=callback, progress=progress, interrupt=interrupt,
                options=options,
            )  # fmt: skip
    if method != "gns":  # which has warned
        warn_unless_converged(result, "minimize")
    return result


def _callback_of_ranks(ranks: Ranks, x0: Any, callback: Callback | None, max_seconds: Any) -> Callback:
    """The callback of a function that is summed over ranks: what ends one of them ends all at the same step.

    Raises ValueError on every rank where they would part ways: x0 that differs, or a clock that decides.
    """
    start = torch.as_tensor(x0).detach().reshape(-1).double()
    ranks.agree("minimize", max_seconds=max_seconds is not None, **{"x0: number of unknowns": start.numel()})
    if max_seconds is not None:
        raise ValueError("minimize: max_seconds: expected None, for the ranks' clocks differ; use max_iter or max_hvp")
    both = ranks.all_reduce_(torch.cat([start, -start]), "max")
    if not torch.equal(both[: start.numel()], -both[start.numel() :]) and bool(both.isfinite().all()):
        raise ValueError("minimize: x0: expected the same numbers on every rank; seed the generators alike")

    def shared(info: IterationInfo) -> bool:
        answer = None if callback is None else callback(info)
        stop, interrupted = ranks.max(isinstance(answer, bool | np.bool_) and bool(answer), ranks.interrupted)
        if interrupted:
            ranks.interrupted = False
            raise KeyboardInterrupt
        return bool(stop)

    return shared


def _limits(tol: Any, max_iter: Any, max_hvp: Any, max_seconds: Any) -> Limits:
    if not (isinstance(tol, int | float | np.floating) and 0 <= tol < math.inf):
        raise ValueError(f"minimize: tol: expected a finite number >= 0, got {tol!r}")
    for name, value in (("max_iter", max_iter), ("max_hvp", max_hvp)):
        if value is not None and not (isinstance(value, int | np.integer) and value >= 0):
            raise ValueError(f"minimize: {name}: expected an integer >= 0, got {value!r}")
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"minimize: max_seconds: expected a number > 0, got {max_seconds!r}")
    return Limits(
        100_000 if max_iter is None else int(max_iter),
        math.inf if max_hvp is None else int(max_hvp),
        math.inf if max_seconds is None else float(max_seconds),
    )
