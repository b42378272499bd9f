"""Conjugate gradients.

The iteration itself is csrc/linalg/cg.h; here are the checks, the choice of path, and the Result.

* Native operator, native preconditioner: one torch operator, ``torch.ops.kantor.cg``, with implicit derivatives.
* Anything given as Python code: the same native loop, which calls back once per iteration.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable as CallableType
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_finite, check_float, check_same, check_tensor, host_array, is_readable
from kantor._progress import progress_bar
from kantor._ranks import Ranks, largest, together
from kantor._result import History, SolveResult, SolveStatus
from kantor.linalg import _native
from kantor.linalg._native import Encoded, Hooks, hooks, run_cg
from kantor.linalg._operator import LinearOperator, as_operator
from kantor.linalg.diagonal import Diagonal
from kantor.linalg.multigrid import Multigrid
from kantor.linalg.preconditioners import as_preconditioner

_logger = logging.getLogger("kantor")

_STATUSES = {
    1: SolveStatus.CONVERGED,
    2: SolveStatus.MAXITER,
    3: SolveStatus.NEGATIVE_CURVATURE,
    4: SolveStatus.SINGULAR,
    5: SolveStatus.STAGNATED,
    6: SolveStatus.BREAKDOWN,
    7: SolveStatus.INTERRUPTED,
    8: SolveStatus.STOPPED,
    9: SolveStatus.INDEFINITE_PRECONDITIONER,
}
_NONE = Encoded([], [], [])


@dataclass(frozen=True)
class IterationInfo:
    """What a callback gets after every iteration.

    Attributes
    ----------
    iteration : int
        Iterations made so far.
    residual_norm : float
        Residual norm of the recurrence, the largest of a batch.
    """

    iteration: int
    residual_norm: float


def cg(
    A: Any,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    M: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    callback: CallableType[[IterationInfo], bool | None] | None = None,
    progress: bool = False,
    storage: torch.dtype | None = None,
    interrupt: Literal["raise", "return"] = "raise",
) -> SolveResult:
    """Solve ``A x = b`` for symmetric positive definite A by preconditioned conjugate gradients.

    Stops when ``|b - A x| <= max(rtol |b|, atol)``, checked at the end on the true residual formed in double precision:
    a result that says it converged has. Negative curvature ``d'Ad < 0`` is a result of its own, with the direction.

    Parameters
    ----------
    A : LinearOperator, Tensor, sparse tensor, scipy sparse matrix or LinearOperator, or callable
        ``(n, n)``, symmetric positive definite; see :func:`as_operator`. With an operator of
        :mod:`kantor.distributed` every rank calls with its own rows of b and x0, and gets its rows of x.
    b : Tensor
        ``(n,)``, or ``(..., n)`` for a batch solved at once, each system stopping by itself. On a grid operator also
        grid shaped, ``(..., nz, ny, nx)``. float32 or float64.
    x0 : Tensor, optional
        Starting point, shaped like b. Default: zero.
    M : None, "jacobi", "ic0", "multigrid", operator or callable
        Preconditioner, an approximation of the inverse of A, symmetric positive definite. "multigrid" is for a
        :class:`PoissonGrid`; see :class:`Multigrid`.
    rtol, atol : float
        Tolerances. With ``rtol=0, atol=0`` exactly `maxiter` iterations are made, unless the residual
        falls so far below rounding that its square vanishes.
    maxiter : int, optional
        Default ``10 n``.
    callback : callable, optional
        ``callback(info)`` after every iteration, with ``info.iteration`` and ``info.residual_norm`` (the largest of the
        batch); returning True stops.
    progress : bool
        Show a progress bar (tqdm when installed, else log records).
    storage : torch.dtype, optional
        ``torch.float32``: iterate in single precision inside a loop of iterative refinement in double. Same final
        accuracy, about half the memory traffic. A and b must be float64.
    interrupt : "raise" or "return"
        What Ctrl-C does: raise KeyboardInterrupt, or return the last iterate with status INTERRUPTED. It lands between
        two iterations.

    Returns
    -------
    SolveResult
        ``x`` shaped like b, differentiable (implicitly) with respect to b and the operator's tensors.

    Raises
    ------
    TypeError
        Wrong types or dtypes, mixed dtypes.
    ValueError
        Shapes that do not fit, mixed devices, NaN or infinite values, tolerances out of range; and a matrix that is not
        symmetric, when a derivative is asked for or the solve fails.

    Warns
    -----
    RuntimeWarning
        Once per call, when a system did not converge.

    Notes
    -----
    Memory: x, r, p, q and, with a preconditioner other than Jacobi, z. Traffic per unknown and iteration: 8 words for
    stencils, 10 and the matrix for CSR (csrc/linalg/cg_cpu.cpp). Deterministic: the same bits for any number of
    threads. Derivatives of a callable A are first order only. The solves for derivatives use `rtol`, or 1e-5 where it
    is looser.

    Source: Hestenes & Stiefel 1952; Saad, *Iterative Methods for Sparse Linear Systems*, 2nd ed., algorithm 9.1.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import Stencil, cg
    >>> A = Stencil((32, 32))
    >>> b = torch.ones(32, 32, dtype=torch.float64)
    >>> result = cg(A, b, rtol=1e-10)
    >>> str(result.status)
    'converged'
    >>> bool((A.matvec(result.x) - b).norm() <= 1e-10 * b.norm())
    True
    """
    ranks: Ranks | None = getattr(A, "ranks", None)
    with together(ranks):
        check_tensor(b, "cg", "b")
        check_float(b, "cg", "b")
        operator = as_operator(A, like=b if b.ndim else None)
        flat, restore = _flatten(operator, b)
        _check_arguments(operator, b, x0, rtol, atol, maxiter, storage, interrupt)
    flat = operator.admit(flat, "cg")
    start = None if x0 is None else operator.settle(x0.reshape(flat.shape))
    preconditioner = as_preconditioner(M, operator, flat)
    unknowns = flat.shape[-1]
    if ranks is not None:
        unknowns = int(ranks.sum(unknowns)[0])
        _require_agreement(ranks, flat, start, preconditioner, rtol, atol, maxiter, storage)
    limit = 10 * unknowns if maxiter is None else min(int(maxiter), 2**62)
    problem = _Problem(operator, preconditioner, flat, start, float(rtol), float(atol), limit)

    if not all(is_readable(tensor) for tensor in problem.tensors):
        x, direction, _, _ = problem.solve_traced()
        return _unchecked(restore(operator.settle(x)))
    if not problem.is_native and any(map(torch._C._functorch.is_functorch_wrapped_tensor, problem.tensors)):
        raise TypeError(
            "cg: inside torch.func operator and preconditioner must be native; torch.autograd takes callables"
        )

    started = time.perf_counter()
    wants_gradient = torch.is_grad_enabled() and (b.requires_grad or operator.requires_grad)
    wants_gradient = wants_gradient or torch.autograd.forward_ad._current_level >= 0
    if ranks is not None:
        wants_gradient = bool(ranks.max(wants_gradient)[0])
    if wants_gradient or torch._C._are_functorch_transforms_active():
        _require_symmetric(operator)
    with progress_bar(progress, "cg", rtol) as bar:
        monitor = _make_monitor(callback, bar if progress else None, rtol, atol, flat, ranks)
        token = hooks.set(Hooks(monitor, interrupt == "return"))
        try:
            with nullcontext() if ranks is None else ranks.deferred_interrupts():
                x, direction, info, history = problem.solve(storage, wants_gradient)
                while (safer := problem.with_safer_preconditioner(info)) is not None:
                    problem = safer
                    x, direction, info, history = problem.solve(storage, wants_gradient)
                if ranks is not None and bool((info[..., _native.STATUS] == _native.INTERRUPTED).any()):
                    ranks.interrupted = False  # it has been answered
        finally:
            hooks.reset(token)
    x = operator.settle(x)
    result = _make_result(operator, b, restore, x, direction, info, history, rtol, atol, time.perf_counter() - started)
    if not result.converged and result.status is not SolveStatus.STOPPED:
        if result.status is not SolveStatus.INTERRUPTED:
            _require_symmetric(operator)
        warnings.warn(f"cg: {result.message}", RuntimeWarning, stacklevel=2)
    return result


@dataclass(frozen=True)
class _Problem:
    """One solve, with b and x0 of shape (..., n)."""

    A: LinearOperator
    M: LinearOperator | None
    b: Tensor
    x0: Tensor | None
    rtol: float
    atol: float
    maxiter: int

    @property
    def is_native(self) -> bool:
        return self.A.is_native and (self.M is None or self.M.is_native) and self.ranks is None

    @property
    def ranks(self) -> Ranks | None:
        return self.A.ranks

    def with_safer_preconditioner(self, info: Tensor) -> _Problem | None:
        """The same problem, where the preconditioner turned out indefinite and knows a safer form of itself."""
        indefinite = (info.detach()[..., _native.STATUS] == _native.INDEFINITE_PRECONDITIONER).any()
        if not isinstance(self.M, Multigrid) or not bool(indefinite):
            return None
        safer = self.M.safer()
        if safer is None:
            return None
        _logger.warning("cg: M: %r is not positive definite here; going on with %r", self.M, safer)
        return replace(self, M=safer)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the native code gets to see."""
        operators = [operator for operator in (self.A, self.M) if operator is not None and operator.is_native]
        vectors = [self.b] if self.x0 is None else [self.b, self.x0]
        return [*vectors, *(tensor for operator in operators for tensor in operator.encode().operands)]

    def solve_traced(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inside torch.compile, export or vmap: the operator alone, no value is looked at."""
        if not self.is_native:
            raise TypeError("cg: inside torch.compile or torch.vmap the operator and preconditioner must be native")
        if self.atol > 0:  # one tolerance for all systems: they stay as they are
            return self._native(self.b, self.x0, self.atol, self.maxiter)
        size = _native.sizes(self.b)
        x0 = None if self.x0 is None else self.x0 / size
        x, direction, info, history = self._native(self.b / size, x0, 0.0, self.maxiter)
        return x * size, direction, info, history

    def solve(self, storage: torch.dtype | None, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        refine = storage not in (None, self.b.dtype) and (self.b.numel() > 0 or self.ranks is not None)
        if self.is_native and not refine:
            return self._in_range(self._native)
        with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            x, direction, info, history = self._refined(storage) if refine else self._in_range(self._called)
        return (self._attach_gradient(x) if wants_gradient else x), direction, info, history

    def _native(self, b: Tensor, x0: Tensor | None, atol: float, maxiter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        M = _NONE if self.M is None else self.M.encode()
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _native.cg(
            *self.A.encode(), *M, b, x0, self.rtol, atol, maxiter
        )
        return result

    def _called(self, b: Tensor, x0: Tensor | None, atol: float, maxiter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The native loop with Python callbacks for what is not native."""
        apply = None if self.A.is_native else self.A.write_product
        precondition = None if self.M is None or self.M.is_native else self.M.write_product
        A = self.A.encode() if apply is None else _NONE
        M = _NONE if self.M is None or precondition is not None else self.M.encode()
        return run_cg(A, M, b, x0, self.rtol, atol, maxiter, apply=apply, precondition=precondition, ranks=self.ranks)

    def _start(self) -> Tensor | None:
        """x0, or zero for the systems whose solution is zero: no relative tolerance could be met on the way there."""
        if self.x0 is None or self.atol > 0:
            return self.x0
        nonzero = self.b.ne(0).any(-1, keepdim=True)
        if self.ranks is not None:
            nonzero = self.ranks.all_reduce_(nonzero.double(), "max") > 0
        return torch.where(nonzero, self.x0, torch.zeros_like(self.x0))

    def _norms(self, v: Tensor) -> Tensor:
        """Norms of vectors (..., n) over all ranks, in their dtype."""
        if self.ranks is None:
            norms: Tensor = v.norm(dim=-1)
            return norms
        return self.ranks.all_reduce_(v.double().square().sum(-1)).sqrt().to(v.dtype)

    def _in_range(self, solver: CallableType[..., Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solve; where squares of b under- or overflow, solve for b times a power of two instead."""
        x0 = self._start()
        if self._leaves_the_range_of_the_cycle():
            return self._rescaled(solver, x0, torch.ones_like(self.b[..., :1], dtype=torch.bool))
        x, direction, info, history = solver(self.b, x0, self.atol, self.maxiter)
        if bool((info[..., _native.STATUS] >= _native.BREAKDOWN).any()):
            self._check_finite(x0)
        bad = info.detach()[..., _native.STATUS, None] == _native.BAD_SCALE
        if not bool(bad.any()):
            return x, direction, info, history
        return self._rescaled(solver, x0, bad)

    def _check_finite(self, x0: Tensor | None) -> None:
        with together(self.ranks):
            check_finite(self.b, "cg", "b")
            if x0 is not None:
                check_finite(x0, "cg", "x0")

    def _leaves_the_range_of_the_cycle(self) -> bool:
        """Whether a preconditioner of single precision would see residuals of double vectors vanish or overflow."""
        if not isinstance(self.M, Multigrid) or self.M.precision is self.b.dtype or self.b.dtype is torch.float32:
            return False
        sizes = _native.sizes(largest(self.b.detach(), self.ranks))
        return bool(((sizes < 2.0**-60) | (sizes > 2.0**60)).any() and sizes.isfinite().all())

    def _rescaled(
        self, solver: CallableType[..., Any], x0: Tensor | None, bad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Solve with the systems that are marked brought to size one."""
        exponents = torch.where(bad, _exponents(self.b, x0, self.ranks), 0)
        if self.atol > 0:  # one tolerance for all systems allows one scale only
            exponents = torch.full_like(exponents, int(exponents[bad].max()))
        atol = _scaled(torch.tensor(self.atol, dtype=torch.float64), -exponents.flatten()[0]).item()
        x, direction, info, history = solver(
            _scaled(self.b, -exponents), None if x0 is None else _scaled(x0, -exponents), atol, self.maxiter
        )
        if bool((info[..., _native.STATUS] == _native.BAD_SCALE).any()):
            raise ValueError(
                "cg: b: expected right-hand sides (and x0) of comparable size, got sizes that no common scale brings "
                "into the range of the dtype; solve them separately, with rtol alone, or start from zero"
            )
        norms = [_native.RESIDUAL_NORM, _native.B_NORM]
        info = info.clone()
        info[..., norms] = _scaled(info[..., norms], exponents)
        return _scaled(x, exponents), direction, info, _scaled(history, exponents)

    def _refined(self, storage: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Iterative refinement: corrections by cg in `storage` precision, residuals in the dtype of b."""
        assert storage is not None
        A = self.A.to(storage)
        M = None if self.M is None else self.M.to(storage)
        x0 = self._start()
        self._check_finite(x0)
        exponents = _exponents(
            self.b, x0, self.ranks
        )  # every system is solved at size one, out of reach of under- and overflow
        b = _scaled(self.b, -exponents)
        x = torch.zeros_like(b) if x0 is None else _scaled(x0, -exponents)
        b_norm = self._norms(b)
        atol = _scaled(torch.full_like(b_norm, self.atol).unsqueeze(-1), -exponents).squeeze(-1)
        target = torch.maximum(self.rtol * b_norm, atol)
        residual = b - self.A.matvec(x) if x0 is not None else b
        norm = self._norms(residual)
        if bool((norm <= target).all()):
            return self._in_range(self._native if self.is_native else self._called)
        used = 0
        direction = torch.zeros_like(b)
        info = b.new_zeros((*norm.shape, _C.cg_state_size))
        info[..., _native.HISTORY_COUNT] = info[..., _native.HISTORY_STRIDE] = 1
        legs = [(norm.unsqueeze(-1), info)]
        while True:
            try:
                scale = torch.where(norm > 0, norm, torch.ones_like(norm)).unsqueeze(-1)
                needed = torch.where(norm > target, target / (2 * norm), torch.ones_like(norm)).amin().item()
                inner_rtol = min(max(needed, 16 * torch.finfo(storage).eps), 1.0)
                inner = _Problem(A, M, (residual / scale).to(storage), None, inner_rtol, 0.0, self.maxiter - used)
                with _shifted_monitor(used, float(_scaled(scale, exponents).max())):
                    correction, direction, info, history = inner._in_range(
                        inner._native if inner.is_native else inner._called
                    )
                used += int(info[..., _native.ITERATIONS].max())
                legs.append((history * scale, info))
                x = x + correction.to(x.dtype) * scale
                residual = b - self.A.matvec(x)
                previous, norm = norm, self._norms(residual)
                met, status = norm <= target, info[..., _native.STATUS]
                # A leg that stagnates has reached the rounding level of `storage`; the next starts from a new residual.
                ended = (status > 2) & (status != 5)
                gained = bool((norm < 0.5 * previous)[~met].all())
                if bool(met.all()) or used >= self.maxiter or not gained or bool(ended.any()):
                    break
            except KeyboardInterrupt:  # in Python code; in native code it ends the leg
                if not hooks.get().return_on_interrupt:
                    raise
                norm = self._norms(b - self.A.matvec(x))
                met, status = norm <= target, torch.full_like(norm, _native.INTERRUPTED)
                ended = torch.ones_like(met)
                break
        info = info.clone()
        unmet = torch.where(ended, status, 2.0 if used >= self.maxiter else 5.0)
        info[..., _native.STATUS] = torch.where(met, 1.0, unmet)
        info[..., _native.ITERATIONS], info[..., _native.RESTARTS] = used, len(legs) - 2
        info[..., _native.RESIDUAL_NORM], info[..., _native.B_NORM] = norm, b_norm
        norms = [_native.RESIDUAL_NORM, _native.B_NORM]
        info[..., norms] = _scaled(info[..., norms], exponents)
        merged, stride = _merge_histories(legs)
        info[..., _native.HISTORY_COUNT], info[..., _native.HISTORY_STRIDE] = merged.shape[-1], stride
        return _scaled(x, exponents), direction.to(x.dtype), info, _scaled(merged, exponents)

    def _attach_gradient(self, x: Tensor) -> Tensor:
        """Give the solution its implicit derivative: x + A^-1 (b - A x), whose second part is zero."""
        if self.A.is_native and self.ranks is None:
            M = self.M.encode() if self.M is not None and self.M.is_native else _NONE
            result: tuple[Tensor, ...] = _native.cg(*self.A.encode(), *M, self.b, x.detach(), self.rtol, self.atol, 0)
            return result[0]
        residual = self.b - self.A.matvec(x.detach())
        correction: Tensor = _CallableSolve.apply(residual, self)  # type: ignore[no-untyped-call]
        return x.detach() + correction


class _CallableSolve(torch.autograd.Function):
    """Zero in value, ``A^-1`` in derivative: the adjoint solve runs in backward."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, problem: _Problem) -> Tensor:
        ctx.problem = problem
        return torch.zeros_like(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        problem: _Problem = ctx.problem
        rtol = _native.derivative_rtol(problem.rtol, grad.dtype)
        adjoint = _Problem(problem.A, problem.M, grad, None, rtol, 0.0, problem.maxiter or 10 * grad.shape[-1])
        with _native.derivative_solve():
            x, _, info, _ = adjoint._in_range(adjoint._called)
        _native.warn_if_inexact(info)
        return x, None


def _exponents(b: Tensor, x0: Tensor | None, ranks: Ranks | None = None) -> Tensor:
    """Per system the power of two next to its largest entry, shape (..., 1); 0 for a system of zeros."""
    size = largest(b.detach(), ranks)
    if x0 is not None:
        size = torch.maximum(size, largest(x0.detach(), ranks))
    return torch.frexp(size).exponent


def _scaled(t: Tensor, exponents: Tensor) -> Tensor:
    """t times powers of two, in two steps: the power itself may be out of range."""
    exponents = exponents.to(t.dtype)  # so that no version of torch forms the power in single precision
    half = torch.div(exponents, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(t, half), exponents - half)


@contextmanager
def _shifted_monitor(iterations: int, scale: float) -> Iterator[None]:
    """Inside, the monitor sees a part of a solve, which starts after `iterations` and whose residuals are scaled."""
    outer = hooks.get()
    monitor = outer.monitor
    shifted = None if monitor is None else lambda k, norm: monitor(iterations + k, norm * scale)
    token = hooks.set(Hooks(shifted, outer.return_on_interrupt))
    try:
        yield
    finally:
        hooks.reset(token)


def _merge_histories(legs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """One history per system from the legs of a refinement, and its stride; a waiting system repeats its last norm."""
    parts = []
    for number, (history, info) in enumerate(legs):
        steps = torch.arange(min(number, 1), int(info[..., _native.ITERATIONS].max()) + 1, device=history.device)
        slots = torch.div(steps, info[..., _native.HISTORY_STRIDE].unsqueeze(-1), rounding_mode="floor")
        last = info[..., _native.HISTORY_COUNT].unsqueeze(-1) - 1
        parts.append(history.gather(-1, torch.minimum(slots, last).long()))
    merged = torch.cat(parts, -1)
    stride = 1 + (merged.shape[-1] - 1) // 4096
    return merged[..., ::stride], stride


def _flatten(operator: LinearOperator, b: Tensor) -> tuple[Tensor, CallableType[[Tensor], Tensor]]:
    """b as (..., n), and the way back to its shape."""
    rows, cols = operator.shape
    if rows != cols:
        raise ValueError(f"cg: A: expected a square operator, got {rows} x {cols}")
    grid = operator.grid
    if grid is not None and b.ndim >= len(grid) and all(b.shape[-k] == grid[-k] for k in range(1, len(grid) + 1)):
        return b.flatten(-len(grid)), lambda t: t.unflatten(-1, grid)
    if b.ndim == 0 or b.shape[-1] != rows:
        expected = f"(..., {rows})" + (f" or (..., {', '.join(map(str, grid))})" if grid else "")
        hint = "; for right-hand sides in columns pass b.T" if b.ndim == 2 and b.shape[0] == rows else ""
        raise ValueError(f"cg: b: expected shape {expected}, got {tuple(b.shape)}{hint}")
    return b, lambda t: t


def _check_arguments(
    A: LinearOperator, b: Tensor, x0: Any, rtol: float, atol: float, maxiter: Any, storage: Any, interrupt: str
) -> None:
    if A.device != b.device or A.dtype != b.dtype:
        check_same("cg", [("A", torch.empty(0, dtype=A.dtype, device=A.device)), ("b", b)])
    if x0 is not None:
        check_tensor(x0, "cg", "x0")
        check_same("cg", [("b", b), ("x0", x0)])
        if x0.shape != b.shape:
            raise ValueError(f"cg: x0: expected the shape of b, {tuple(b.shape)}, got {tuple(x0.shape)}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(value, int | float | np.floating | np.integer) and 0 <= value < math.inf):
            raise ValueError(f"cg: {name}: expected a finite number >= 0, got {value!r}")
    if maxiter is not None and (not isinstance(maxiter, int | np.integer) or maxiter < 0):
        raise ValueError(f"cg: maxiter: expected an integer >= 0, got {maxiter!r}")
    if storage is not None and not (storage is torch.float32 and b.dtype is torch.float64) and storage is not b.dtype:
        raise ValueError(f"cg: storage: expected torch.float32 with a float64 system, got {storage} with {b.dtype}")
    if interrupt not in ("raise", "return"):
        raise ValueError(f"cg: interrupt: expected 'raise' or 'return', got {interrupt!r}")


def _require_agreement(
    ranks: Ranks, b: Tensor, x0: Tensor | None, M: LinearOperator | None, rtol: float, atol: float, maxiter: Any,
    storage: Any,
) -> None:  # fmt: skip
    """Whatever decides how many sums are exchanged, and when, must be the same on all ranks."""
    form = 0 if M is None else 1 if isinstance(M, Diagonal) else 2
    ranks.agree(
        "cg", **{"b: number of systems": math.prod(b.shape[:-1]), "x0 (given or not)": x0 is not None},
        M=form, rtol=rtol, atol=atol, maxiter=-1 if maxiter is None else maxiter, storage=storage is torch.float32,
    )  # fmt: skip


def _require_symmetric(A: LinearOperator) -> None:
    """Looked at only when it matters: for the adjoint solve, and to explain a failure."""
    relative, where = A.asymmetry()
    if relative > 1e3 * torch.finfo(A.dtype).eps:
        raise ValueError(
            f"cg: A is not symmetric: {where}. Conjugate gradients need a symmetric matrix; symmetrise it as "
            "(A + A.T) / 2 if that is what you mean, or use a method for general matrices (GMRES, BiCGSTAB in scipy)"
        )


def _make_monitor(
    callback: CallableType[[IterationInfo], bool | None] | None, bar: Any, rtol: float, atol: float, b: Tensor,
    ranks: Ranks | None = None,
) -> CallableType[[int, float], bool] | None:  # fmt: skip
    watched = callback is not None or bar is not None
    if ranks is not None:  # one rank that watches makes all of them look, so that they look at the same iterations
        watched = bool(ranks.max(watched)[0])
    if not watched:
        return None
    target = atol
    if bar is not None or ranks is not None:
        squares = b.detach().double().square().sum(-1)
        if ranks is not None:
            ranks.all_reduce_(squares)
        target = max(rtol * math.sqrt(float(squares.max())), atol) if squares.numel() else atol

    def monitor(iteration: int, residual_norm: float) -> bool:
        if bar is not None:
            bar(iteration, residual_norm, target)
        answer = None if callback is None else callback(IterationInfo(iteration, residual_norm))
        return isinstance(answer, bool | np.bool_) and bool(answer)

    return monitor


def _unchecked(x: Tensor) -> SolveResult:
    """Result of a traced solve, whose numbers cannot be read."""
    empty = torch.empty(0)
    history = History(np.empty(0, np.int64), np.empty(0))
    nan = math.nan
    return SolveResult(x, SolveStatus.UNCHECKED, -1, nan, nan, history, nan, "cg", nan, [], empty, empty)


def _make_result(
    A: LinearOperator, b: Tensor, restore: CallableType[[Tensor], Tensor], x: Tensor, direction: Tensor, info: Tensor,
    history: Tensor, rtol: float, atol: float, seconds: float,
) -> SolveResult:  # fmt: skip
    table = host_array(info).reshape(-1, info.shape[-1])
    statuses = [_STATUSES[int(s)] for s in table[:, _native.STATUS]]
    status = next((s for s in statuses if s is not SolveStatus.CONVERGED), SolveStatus.CONVERGED)
    residuals, b_norms = table[:, _native.RESIDUAL_NORM], table[:, _native.B_NORM]
    iterations = table[:, _native.ITERATIONS].astype(np.int64)
    worst = int(np.nan_to_num(residuals, nan=math.inf).argmax()) if statuses else 0
    no_step = np.array([s in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR) for s in statuses], dtype=bool)
    curvature = None
    if no_step.any():
        curvature = float(table[no_step.argmax(), _native.CURVATURE])
        mask = torch.from_numpy(no_step).reshape(direction.shape[:-1]).unsqueeze(-1).to(direction.device)
        direction = torch.where(mask, direction, torch.zeros_like(direction))
    shaped = restore(x)
    return SolveResult(
        x=shaped,
        status=status,
        iterations=int(iterations.max(initial=0)),
        residual_norm=float(residuals.max(initial=0)),
        relative_residual=float((residuals / np.where(b_norms > 0, b_norms, 1)).max(initial=0)),
        history=_history(table, host_array(history), worst),
        seconds=seconds,
        method="cg",
        tolerance=max(rtol * float(b_norms[worst]), atol) if len(statuses) else 0.0,
        per_system_status=statuses,
        per_system_iterations=torch.from_numpy(iterations),
        per_system_residual_norm=torch.from_numpy(residuals.copy()),
        direction=restore(direction) if curvature is not None else None,
        curvature=curvature,
        state={"x0": shaped.detach()},
    )


def _history(table: np.ndarray[Any, Any], history: np.ndarray[Any, Any], system: int) -> History:
    if not len(table):
        return History(np.empty(0, np.int64), np.empty(0))
    count, stride = int(table[system, _native.HISTORY_COUNT]), int(table[system, _native.HISTORY_STRIDE])
    norms = history.reshape(len(table), -1)[system, :count].copy()
    return History(np.arange(count, dtype=np.int64) * max(stride, 1), norms)
