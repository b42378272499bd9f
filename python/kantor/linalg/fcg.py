"""Flexible conjugate gradients: a preconditioner that may change from iteration to iteration."""

from __future__ import annotations

from collections.abc import Callable as CallableType
from typing import Any, Literal

from torch import Tensor

from kantor.linalg._operator import LinearOperator
from kantor.linalg.cg import IterationInfo
from kantor.linalg.flexible_cg import (
    Direction,
    FlexibleProblem,
    FlexibleResult,
    Settings,
    admitted,
    check_numbers,
    solve,
)
from kantor.linalg.preconditioners import as_preconditioner


def fcg(
    A: Any,
    b: Tensor,
    M: Any = None,
    x0: Tensor | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    k_prev: int = 20,
    truncation: Literal["standard", "notay"] = "standard",
    callback: CallableType[[IterationInfo], bool | None] | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
) -> FlexibleResult:
    """Solve ``A x = b`` for symmetric positive definite A with a preconditioner that need not be a fixed linear map.

    An inner iteration that stops early, a K-cycle, a nonlinear smoother: conjugate gradients lose their way with them,
    because their short recurrence trusts M to be fixed and symmetric. Here every new direction is made A-orthogonal to
    the newest `k_prev` explicitly.

    Parameters
    ----------
    A : LinearOperator, Tensor, sparse tensor, scipy sparse matrix or LinearOperator, or callable
        ``(n, n)``, symmetric positive definite; see :func:`as_operator`.
    b : Tensor
        ``(n,)``, or ``(..., n)`` for a batch solved at once, each system stopping by itself. On a grid operator also
        grid shaped, ``(..., nz, ny, nx)``. float32 or float64.
    M : None, "jacobi", "ic0", operator or callable
        Preconditioner. A function gets the residual, shaped like b, once an iteration, and returns as many
        floating-point numbers; the tensor that it gets is valid, and may be overwritten, during the call only.
    x0 : Tensor, optional
        Starting point, shaped like b. Default: zero.
    rtol, atol : float
        Stop when ``|b - A x| <= max(rtol |b|, atol)``, checked at the end on the true residual formed in double. With
        both 0 exactly `maxiter` iterations are made.
    maxiter : int, optional
        Default ``10 n``.
    k_prev : int
        Directions kept, 2 vectors of memory each.
    truncation : "standard" or "notay"
        Use all that are kept, or ``max(1, i mod (k_prev + 1))`` of them in iteration i: the restarts of Notay, for less
        work an iteration.
    callback, progress, interrupt
        As for :func:`cg`.

    Returns
    -------
    FlexibleResult
        ``x`` shaped like b, differentiable (implicitly, first order) with respect to b and the operator's tensors.
        A direction of M that holds NaN or infinity, is zero, orthogonal to the residual or made of the ones kept is
        replaced by the residual; after 5 in a row M is given up, and a warning is logged. ``fallbacks``, ``breakdown``
        and ``reason`` tell of that.

    Raises
    ------
    TypeError
        Wrong types or dtypes, mixed dtypes; inside torch.compile, vmap, torch.func.
    ValueError
        Shapes that do not fit, mixed devices, NaN or infinite values, numbers out of range; and a matrix that is not
        symmetric, when a derivative is asked for or the solve fails.

    Warns
    -----
    RuntimeWarning
        Once per call, when a system did not converge.

    Notes
    -----
    An iteration is one application of M, one product, and ``11 + 2 j`` words of memory traffic per unknown with j
    directions in use. Memory: ``2 k_prev + 4`` vectors. Deterministic when M is: the same bits for any number of
    threads. For a fixed linear M, symmetric positive definite, :func:`cg` makes the same iterates for less.

    Source: Notay, *Flexible conjugate gradients*, SIAM J. Sci. Comput. 22 (2000), algorithm FCG(m).

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Stencil, cg, fcg
    >>> A = Stencil((32, 32))
    >>> b = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> result = fcg(A, b, M=lambda r: cg(A, r, rtol=0.1).x)  # a preconditioner that is not linear
    >>> result.converged, result.iterations < 12
    (True, True)
    """
    operator, flat, restore = admitted("fcg", A, b, x0)
    limit = 10 * flat.shape[-1] if maxiter is None else maxiter
    check_numbers("fcg", rtol, atol, {"maxiter": limit, "k_prev": k_prev}, interrupt)
    if truncation not in ("standard", "notay"):
        raise ValueError(f"fcg: truncation: expected 'standard' or 'notay', got {truncation!r}")
    if isinstance(M, str | LinearOperator):
        M = as_preconditioner(M, operator, flat, "fcg: M")
    elif M is not None and not callable(M):
        raise TypeError(f"fcg: M: expected None, 'jacobi', 'ic0', an operator or a function, got {type(M).__name__}")
    problem = FlexibleProblem(
        settings=Settings("fcg", int(k_prev), truncation == "notay", False, 0, 0),
        A=operator,
        f=Direction.of(M, "M"),
        fallback=Direction.of(None, "residual"),
        b=flat,
        x0=None if x0 is None else operator.settle(x0.reshape(flat.shape)),
        shape=b.shape,
        rtol=float(rtol),
        atol=float(atol),
        maxiter=min(int(limit), 2**52),
    )
    return solve(problem, b, restore, callback=callback, progress=progress, interrupt=interrupt, assume_symmetric=False)
