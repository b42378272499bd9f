"""The deep conjugate direction method: a network proposes directions, the iteration makes sure of the rest."""

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
    require_symmetric,
    solve,
)
from kantor.linalg.preconditioners import as_preconditioner, jacobi


def dcdm(
    A: Any,
    b: Tensor,
    f: Any,
    x0: Tensor | None = None,
    *,
    rtol: float = 1e-6,
    atol: float = 0.0,
    maxiter: int = 200,
    k_prev: int = 2,
    fallback: Any = None,
    true_residual_every: int = 10,
    callback: CallableType[[IterationInfo], bool | None] | None = None,
    progress: bool = False,
    interrupt: Literal["raise", "return"] = "raise",
    assume_symmetric: bool = False,
) -> FlexibleResult:
    """Solve ``A x = b`` for symmetric positive definite A along directions that any map f proposes.

    ``q = f(r / |r|)`` should be about ``A^-1 r``, up to its length: typically a network trained for that. It is made
    A-orthogonal to the newest directions, and the step along it minimises the error in the norm of A exactly. That
    error therefore never grows, whatever f returns; directions of no use are replaced.

    Stops when ``|b - A x| <= max(rtol |b|, atol)``, checked at the end on the true residual formed in double precision:
    a result that says it converged has.

    Parameters
    ----------
    A : LinearOperator, Tensor, sparse tensor, scipy sparse matrix or LinearOperator, or callable
        ``(n, n)``, symmetric positive definite; see :func:`as_operator`.
    b : Tensor
        ``(n,)``, or ``(..., n)`` for a batch solved at once, each system stopping by itself. On a grid operator also
        grid shaped, ``(..., nz, ny, nx)``. float32 or float64.
    f : callable or operator
        Called once an iteration, without gradients, on a tensor shaped like b, dtype and device of b, every system of
        length one. It returns as many floating-point numbers of any precision. The tensor that it gets is valid, and
        may be overwritten, during the call only. A native operator is applied without a call.
    x0 : Tensor, optional
        Starting point, shaped like b. Default: zero.
    rtol, atol : float
        Tolerances. With ``rtol=0, atol=0`` exactly `maxiter` iterations are made, unless the residual falls so far
        below rounding that its square vanishes.
    maxiter : int
        Limit of iterations.
    k_prev : int
        Previous directions that a new one is made orthogonal to: 2 as published. More need fewer iterations and more
        memory, 2 vectors each; 0 is steepest descent along f.
    fallback : None, "jacobi", "ic0", operator or callable
        Preconditioner, symmetric positive definite, whose direction replaces one of no use: one that holds NaN or
        infinity, is zero, has ``|p.r| < 1e-12 |p| |r|`` or ``p.Ap <= 0``, or is made of the previous ones. The previous
        directions are then forgotten. It also steps in after 5 steps that gain next to nothing. When it had to 5 times,
        without a good step of f between, or when 100 iterations did not halve the residual, f is given up: conjugate
        gradients go on with this preconditioner, and a warning is logged. Default: "jacobi" where the diagonal of A is
        known and positive, else the residual.
    true_residual_every : int
        Iterations after which the residual is formed anew, at the price of a product; 0: only at the end.
    callback : callable, optional
        ``callback(info)`` after every iteration, with ``info.iteration`` and ``info.residual_norm`` (the largest of the
        batch); returning True stops.
    progress : bool
        Show a progress bar (tqdm when installed, else log records).
    interrupt : "raise" or "return"
        What Ctrl-C does: raise KeyboardInterrupt, or return the last iterate with status INTERRUPTED.
    assume_symmetric : bool
        Do not look whether A is symmetric. Otherwise matrices are, by two products.

    Returns
    -------
    FlexibleResult
        ``x`` shaped like b, differentiable (implicitly, first order) with respect to b and the operator's tensors; the
        solve for the derivative uses f as well. ``fallbacks``, ``breakdown`` and ``reason`` tell how f did.

    Raises
    ------
    TypeError
        Wrong types or dtypes, mixed dtypes, f returns no floating-point tensor; inside torch.compile, vmap, torch.func.
    ValueError
        Shapes that do not fit, also that of what f returns; mixed devices; NaN or infinite values in b or x0; numbers
        out of range; a matrix that is not symmetric.

    Warns
    -----
    RuntimeWarning
        Once per call, when a system did not converge. Exceptions of f, A and the callback pass through.

    Notes
    -----
    An iteration is one call of f, one product, and ``11 + 2 k_prev`` words of memory traffic per unknown
    (csrc/linalg/flexible_cg_cpu.cpp). Memory: ``2 k_prev + 4`` vectors. Deterministic when f is: the same bits for any
    number of threads. With the identity as f and ``k_prev >= 1`` it is conjugate gradients; for a fixed symmetric
    positive definite f :func:`cg` with ``M=f`` makes the same iterates for less.

    Source: Kaneda, Akar, Chen, Kala, Hyde & Teran, *A Deep Conjugate Direction Method for Iteratively Solving Linear
    Systems*, ICML 2023, algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Stencil, dcdm
    >>> A = Stencil((32, 32))
    >>> b = torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> def smooth(r):  # a crude guess at A^-1 r: four pixels become one, and back
    ...     coarse = torch.nn.functional.avg_pool2d(r[None, None], 4)
    ...     return r + 10 * torch.nn.functional.interpolate(coarse, scale_factor=4)[0, 0]
    >>> result = dcdm(A, b, smooth)
    >>> result.converged, result.fallbacks
    (True, 0)
    >>> bool((A.matvec(result.x) - b).norm() <= 1e-6 * b.norm())
    True
    """
    operator, flat, restore = admitted("dcdm", A, b, x0)
    counts = {"maxiter": maxiter, "k_prev": k_prev, "true_residual_every": true_residual_every}
    check_numbers("dcdm", rtol, atol, counts, interrupt)
    if not callable(f) and not isinstance(f, LinearOperator):
        raise TypeError(f"dcdm: f: expected a function of a residual or an operator, got {type(f).__name__}")
    if isinstance(f, LinearOperator):
        as_preconditioner(f, operator, flat, "dcdm: f")  # checks shape, dtype and device
    if operator.is_native and not assume_symmetric:
        require_symmetric("dcdm", operator, probe=True)
    problem = FlexibleProblem(
        settings=Settings("dcdm", int(k_prev), False, True, int(true_residual_every), 100),
        A=operator,
        f=Direction.of(f, "f"),
        fallback=Direction.of(_fallback(fallback, operator, flat), "fallback"),
        b=flat,
        x0=None if x0 is None else operator.settle(x0.reshape(flat.shape)),
        shape=b.shape,
        rtol=float(rtol),
        atol=float(atol),
        maxiter=min(int(maxiter), 2**52),
    )
    return solve(
        problem, b, restore,
        callback=callback, progress=progress, interrupt=interrupt, assume_symmetric=assume_symmetric,
    )  # fmt: skip


def _fallback(fallback: Any, A: LinearOperator, b: Tensor) -> Any:
    if fallback is None:
        try:
            return jacobi(A)
        except (TypeError, ValueError):  # no diagonal, or not a positive one
            return None
    if isinstance(fallback, str | LinearOperator):
        return as_preconditioner(fallback, A, b, "dcdm: fallback")
    if not callable(fallback):
        raise TypeError(
            "dcdm: fallback: expected 'jacobi', 'ic0', an operator or a function of a residual, got "
            f"{type(fallback).__name__}"
        )
    return fallback
