"""Flexible conjugate gradients: what :func:`dcdm` and :func:`fcg` share.

The iteration itself is csrc/linalg/flexible_cg.h; here are the checks, the calls back into Python, and the Result.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable as CallableType
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_finite, check_float, check_same, check_tensor, host_array, is_readable
from kantor._ops import backend
from kantor._progress import progress_bar
from kantor._result import SolveResult, SolveStatus
from kantor.linalg import _native
from kantor.linalg._native import Encoded
from kantor.linalg._operator import LinearOperator, as_operator, require_one_process
from kantor.linalg.cg import _STATUSES, IterationInfo, _exponents, _history, _make_monitor, _scaled

PATIENCE = 5  # with the map: see csrc/linalg/flexible_cg.h

_NONE = Encoded([], [], [])
# Columns of the states behind those of cg: struct FlexibleState in csrc/linalg/flexible_cg.h.
_FALLBACKS, _REJECTION, _GIVEN_UP_AT = range(_C.cg_state_size, _C.cg_state_size + 3)
_REJECTIONS = {
    1: "it held NaN or infinity, or its product with A did",
    2: "it was zero",
    3: "it was a combination of the directions before it",
    4: "it was orthogonal to the residual",
    5: "its curvature was not positive",
    6: "its steps gained next to nothing",
    7: "the residual did not halve in 100 iterations",
}
_STALLED = 7
_logger = logging.getLogger("kantor")


@dataclass(frozen=True, repr=False)
class FlexibleResult(SolveResult):
    """Result of :func:`dcdm` and :func:`fcg`: a :class:`SolveResult`, and what became of the map's directions.

    Attributes
    ----------
    fallbacks : int
        Directions that were of no use and were replaced by the fallback's; of a batch, the largest number.
    breakdown : bool
        Whether the map was given up, for a system at least, and conjugate gradients went on with the fallback.
    reason : str
        Why, in words; empty when every direction was used.
    per_system_fallbacks : Tensor
        Of each system, int64.
    """

    fallbacks: int = 0
    breakdown: bool = False
    reason: str = ""
    per_system_fallbacks: Tensor | None = None

    def __repr__(self) -> str:
        text = super().__repr__()
        return f"{text}\n  {self.fallbacks} fallbacks: {self.reason}" if self.fallbacks else text


class Direction(NamedTuple):
    """Where directions come from: a native form, a function of a residual, or, with neither, the residual itself."""

    native: Encoded = _NONE
    function: CallableType[[Tensor], Any] | None = None
    flat: bool = False  # the function takes (..., n), else it takes the shape of b
    name: str = "f"

    @classmethod
    def of(cls, source: Any, name: str) -> Direction:
        """Of None, an operator, or any function."""
        if source is None:
            return cls(name=name)
        if not isinstance(source, LinearOperator):
            return cls(_NONE, source, False, name)
        return cls(source.encode(), name=name) if source.is_native else cls(_NONE, source.matvec, True, name)


@dataclass(frozen=True)
class Settings:
    """What tells the methods of the family apart."""

    name: str
    window: int  # directions that a new one is made orthogonal to
    notay: bool  # fewer of them now and then, after Notay
    normalised: bool  # the map gets r / |r|
    refresh_every: int  # iterations between two true residuals; 0: only at the end
    stall_after: int  # iterations without halving the residual after which the map is given up; 0: never


@dataclass(frozen=True)
class FlexibleProblem:
    """One solve, with b and x0 of shape (..., n)."""

    settings: Settings
    A: LinearOperator
    f: Direction
    fallback: Direction
    b: Tensor
    x0: Tensor | None
    shape: torch.Size  # of b as the user has it
    rtol: float
    atol: float
    maxiter: int

    def solve(self, monitor: CallableType[[int, float], bool] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x, directions of curvature not positive, states and histories.

        Where squares of b would under- or overflow, b times a power of two is solved for; no bit of x changes.
        """
        x0 = self.x0
        if x0 is not None and self.atol == 0:  # zero is the solution for zero, and no tolerance is met on the way
            x0 = torch.where((self.b == 0).all(-1, keepdim=True), torch.zeros_like(x0), x0)
        if self.b.numel() == 0:
            info = self.b.new_zeros((*self.b.shape[:-1], _C.flexible_state_size), dtype=torch.float64)
            info[..., _native.STATUS] = info[..., _native.HISTORY_STRIDE] = 1
            info[..., _GIVEN_UP_AT] = -1
            history = self.b.new_zeros((*self.b.shape[:-1], 2), dtype=torch.float64)
            return torch.zeros_like(self.b), torch.zeros_like(self.b), info, history
        exponents = _exponents(self.b, x0)
        limit = 40 if self.b.dtype is torch.float32 else 300
        if not bool((exponents.abs() > limit).any()):
            return self._run(self.b, x0, self.atol, monitor)
        if self.atol > 0:  # one tolerance for all systems allows one scale only
            exponents = torch.full_like(exponents, int(exponents.max()))
        atol = _scaled(torch.tensor(self.atol, dtype=torch.float64), -exponents.flatten()[0]).item()
        x0 = None if x0 is None else _scaled(x0, -exponents)
        x, direction, info, history = self._run(_scaled(self.b, -exponents), x0, atol, monitor)
        if bool((info[..., _native.STATUS] == _native.BAD_SCALE).any()):
            raise ValueError(
                f"{self.settings.name}: b: expected right-hand sides (and x0) of comparable size, got sizes that no "
                "common scale brings into the range of the dtype; solve them separately, or with rtol alone"
            )
        norms = [_native.RESIDUAL_NORM, _native.B_NORM]
        info[..., norms] = _scaled(info[..., norms], exponents)
        return _scaled(x, exponents), direction, info, _scaled(history, exponents)

    def _run(
        self, b: Tensor, x0: Tensor | None, atol: float, monitor: CallableType[[int, float], bool] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the native loop; it calls back for what is Python code."""
        A = self.A.encode() if self.A.is_native else _NONE
        A, f, fallback = (
            Encoded([t.detach().resolve_neg().contiguous() for t in e.operands], e.layout, e.scales)
            for e in (A, self.f.native, self.fallback.native)
        )
        f, fallback = _native.with_workspace(f, b), _native.with_workspace(fallback, b)
        settings, n = self.settings, b.shape[-1]
        b2 = b.resolve_neg().reshape(-1, n).contiguous()
        batch = b2.shape[0]
        window = min(settings.window, n, max(self.maxiter, 1))
        slots = max(window, 1) + 1
        x = _native.zeros(b2) if x0 is None else x0.resolve_neg().reshape(-1, n).clone()
        r = torch.empty_like(b2)
        ring = b2.new_empty(slots, 2, batch, n)  # p and A p of every slot
        direction = torch.zeros_like(b2)
        info = b2.new_zeros(batch, _C.flexible_state_size, dtype=torch.float64)
        directions = b2.new_zeros(batch, slots, _C.direction_scalars, dtype=torch.float64)
        history = b2.new_zeros(batch, _native.history_length(batch, self.maxiter), dtype=torch.float64)
        native = backend()
        workspace = b2.new_empty(native.flexible_workspace_bytes(batch), dtype=torch.uint8)
        projections = [_native.projections(e, None, batch, b2) for e in (A, f, fallback)]
        size = sum(p.numel() for p in projections if p is not None)

        def product(of_x: bool, slot: int) -> None:
            p, q = ring[slot]
            q.copy_(self.A.matvec((x if of_x else p).view(b.shape)).reshape(q.shape))

        def map_direction(slot: int) -> None:
            p, q = ring[slot]
            p.copy_(self._call(self.f, q))

        def fall_back(slot: int) -> None:
            ring[slot, 1].copy_(self._call(self.fallback, r.clone()))  # rare: a copy, which may be overwritten

        native.flexible_cg(
            A, f, fallback, b2, [x, r, ring, direction], x0 is None, [info, directions, history], workspace,
            b2.new_empty(size, dtype=torch.float64) if size else None, self.rtol, atol, self.maxiter,
            [window, settings.notay, settings.normalised, settings.refresh_every, PATIENCE, settings.stall_after],
            None if self.A.is_native else product,
            None if self.f.function is None else map_direction,
            None if self.fallback.function is None else fall_back,
            monitor, torch.get_num_threads(),
        )  # fmt: skip
        lead = b.shape[:-1]
        return x.view(b.shape), direction.view(b.shape), info.view(*lead, -1), history.view(*lead, -1)

    def _call(self, source: Direction, r: Tensor) -> Tensor:
        """The direction that a Python function gives for residuals r, (batch, n) like them."""
        assert source.function is not None
        shape = self.b.shape if source.flat else self.shape
        q = source.function(r.view(shape))
        where = f"{self.settings.name}: {source.name}"
        if not isinstance(q, Tensor):
            raise TypeError(f"{where}: expected it to return a tensor, got {type(q).__name__}")
        if q.shape != shape:
            raise ValueError(f"{where}: expected it to return shape {tuple(shape)}, like b, got {tuple(q.shape)}")
        if not q.is_floating_point():
            raise TypeError(f"{where}: expected it to return floating-point numbers, got {q.dtype}")
        if q.device != r.device:
            raise ValueError(f"{where}: expected it to return a tensor on {r.device}, got one on {q.device}")
        return self.A.settle(q.detach().reshape(r.shape).to(r.dtype))

    def attach_gradient(self, x: Tensor) -> Tensor:
        """Give the solution its implicit derivative: x + A^-1 (b - A x), whose second part is zero."""
        residual = self.b - self.A.matvec(x.detach())
        correction: Tensor = _ImplicitSolve.apply(residual, self)  # type: ignore[no-untyped-call]
        return x.detach() + correction


class _ImplicitSolve(torch.autograd.Function):
    """Zero in value, ``A^-1`` in derivative: solved by the same method, once."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, problem: FlexibleProblem) -> Tensor:
        ctx.problem = problem
        return torch.zeros_like(residual)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _derivative_solve(ctx.problem, grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _derivative_solve(ctx.problem, tangent)


def _derivative_solve(problem: FlexibleProblem, right: Tensor) -> Tensor:
    rtol = _native.derivative_rtol(problem.rtol, right.dtype)
    with torch.no_grad():
        derivative = replace(problem, b=problem.A.settle(right.detach()), x0=None, rtol=rtol, atol=0.0)
        x, _, info, _ = derivative.solve(None)
    if not bool((info[..., _native.STATUS] == 1).all()):
        warnings.warn(
            f"{problem.settings.name}: the solve for the derivative did not converge: the gradient is inexact. Raise "
            "maxiter or rtol.",
            RuntimeWarning,
            stacklevel=2,
        )
    return x


def admitted(name: str, A: Any, b: Any, x0: Any) -> tuple[LinearOperator, Tensor, CallableType[[Tensor], Tensor]]:
    """Check A, b and x0; return the operator, b as ``(..., n)``, and the way back to its shape."""
    check_tensor(b, name, "b")
    check_float(b, name, "b")
    operator = as_operator(A, like=b if b.ndim else None)
    require_one_process(operator, name)
    rows, cols = operator.shape
    if rows != cols:
        raise ValueError(f"{name}: A: expected a square operator, got {rows} x {cols}")
    grid = operator.grid
    flat = b
    restore: CallableType[[Tensor], Tensor] = lambda t: t  # noqa: E731
    if grid is not None and tuple(b.shape[-len(grid) :]) == grid:
        flat, restore = b.flatten(-len(grid)), lambda t: t.unflatten(-1, grid)
    elif b.ndim == 0 or b.shape[-1] != rows:
        expected = f"(..., {rows})" + (f" or (..., {', '.join(map(str, grid))})" if grid else "")
        hint = "; for right-hand sides in columns pass b.T" if b.ndim == 2 and b.shape[0] == rows else ""
        raise ValueError(f"{name}: b: expected shape {expected}, got {tuple(b.shape)}{hint}")
    if operator.device != b.device or operator.dtype != b.dtype:
        check_same(name, [("A", torch.empty(0, dtype=operator.dtype, device=operator.device)), ("b", b)])
    vectors = [b] if x0 is None else [b, x0]
    if x0 is not None:
        check_tensor(x0, name, "x0")
        check_same(name, [("b", b), ("x0", x0)])
        if x0.shape != b.shape:
            raise ValueError(f"{name}: x0: expected the shape of b, {tuple(b.shape)}, got {tuple(x0.shape)}")
    operands = operator.encode().operands if operator.is_native else []
    if any(not is_readable(t) or torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (*vectors, *operands)):
        raise TypeError(
            f"{name}: expected to run outside of torch.compile, vmap and torch.func, whose tensors have no values to "
            "look at; use cg there, or torch.autograd"
        )
    right = operator.admit(flat, name)
    check_finite(restore(right), name, "b")
    if x0 is not None:
        check_finite(restore(operator.settle(x0.reshape(flat.shape))), name, "x0")
    return operator, right, restore


def check_numbers(name: str, rtol: Any, atol: Any, counts: dict[str, Any], interrupt: Any) -> None:
    """Check tolerances, integers that may not be negative, and `interrupt`."""
    for label, value in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(value, int | float | np.floating | np.integer) and 0 <= value < math.inf):
            raise ValueError(f"{name}: {label}: expected a finite number >= 0, got {value!r}")
    for label, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise ValueError(f"{name}: {label}: expected an integer >= 0, got {value!r}")
    if interrupt not in ("raise", "return"):
        raise ValueError(f"{name}: interrupt: expected 'raise' or 'return', got {interrupt!r}")


def require_symmetric(name: str, A: LinearOperator, *, probe: bool) -> None:
    """Raise ValueError for an operator that is not symmetric.

    With `probe` by two products, ``u'Av`` against ``v'Au``: cheap, but blind to one entry among millions.
    """
    if probe:
        if type(A).asymmetry is LinearOperator.asymmetry:  # symmetric by construction
            return
        (relative, where), limit = A._asymmetry_by_probe(), 100 * torch.finfo(A.dtype).eps
    else:
        (relative, where), limit = A.asymmetry(), 1e3 * torch.finfo(A.dtype).eps
    if relative > limit:
        raise ValueError(
            f"{name}: A is not symmetric: {where} (by {relative:.2g} of its size). Symmetrise it as (A + A.T) / 2 if "
            "that is what you mean, or use a method for general matrices (GMRES, BiCGSTAB in scipy)"
        )


def solve(
    problem: FlexibleProblem,
    b: Tensor,
    restore: CallableType[[Tensor], Tensor],
    *,
    callback: CallableType[[IterationInfo], bool | None] | None,
    progress: bool,
    interrupt: Literal["raise", "return"],
    assume_symmetric: bool,
) -> FlexibleResult:
    """Solve, warn where that failed, and attach the derivative; `b` has the user's shape."""
    name, A = problem.settings.name, problem.A
    started = time.perf_counter()
    wants_gradient = torch.autograd.forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and (b.requires_grad or not A.is_native or any(t.requires_grad for t in A.encode().operands))
    )
    if wants_gradient and not assume_symmetric:
        require_symmetric(name, A, probe=False)
    with progress_bar(progress, name, problem.rtol) as bar:
        monitor = _make_monitor(callback, bar if progress else None, problem.rtol, problem.atol, problem.b)
        with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
            x0 = None if problem.x0 is None else problem.x0.detach()
            x, direction, info, history = replace(problem, b=problem.b.detach(), x0=x0).solve(monitor)
    table = host_array(info).reshape(-1, info.shape[-1])
    if interrupt == "raise" and bool((table[:, _native.STATUS] == _native.INTERRUPTED).any()):
        raise KeyboardInterrupt
    x = A.settle(problem.attach_gradient(x) if wants_gradient else x)
    seconds = time.perf_counter() - started
    result = _make_result(problem, restore, x, direction, table, host_array(history), seconds)
    if result.breakdown:
        _logger.warning("%s: %s", name, result.reason)
    if not result.converged and result.status is not SolveStatus.STOPPED:
        if result.status is not SolveStatus.INTERRUPTED and not assume_symmetric:
            require_symmetric(name, A, probe=False)
        warnings.warn(f"{name}: {result.message}", RuntimeWarning, stacklevel=3)
    return result


def _make_result(
    problem: FlexibleProblem,
    restore: CallableType[[Tensor], Tensor],
    x: Tensor,
    direction: Tensor,
    table: np.ndarray[Any, Any],
    history: np.ndarray[Any, Any],
    seconds: float,
) -> FlexibleResult:
    statuses = [_STATUSES[int(s)] for s in table[:, _native.STATUS]]
    residuals, b_norms = table[:, _native.RESIDUAL_NORM], table[:, _native.B_NORM]
    iterations = table[:, _native.ITERATIONS].astype(np.int64)
    fallbacks = table[:, _FALLBACKS].astype(np.int64)
    worst = int(np.nan_to_num(residuals, nan=math.inf).argmax()) if statuses else 0
    no_step = [s in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR) for s in statuses]
    shaped = restore(x)
    return FlexibleResult(
        x=shaped,
        status=next((s for s in statuses if s is not SolveStatus.CONVERGED), SolveStatus.CONVERGED),
        iterations=int(iterations.max(initial=0)),
        residual_norm=float(residuals.max(initial=0)),
        relative_residual=float((residuals / np.where(b_norms > 0, b_norms, 1)).max(initial=0)),
        history=_history(table, history, worst),
        seconds=seconds,
        method=problem.settings.name,
        tolerance=max(problem.rtol * float(b_norms[worst]), problem.atol) if statuses else 0.0,
        per_system_status=statuses,
        per_system_iterations=torch.from_numpy(iterations),
        per_system_residual_norm=torch.from_numpy(residuals.copy()),
        direction=restore(direction) if any(no_step) else None,
        curvature=float(table[no_step.index(True), _native.CURVATURE]) if any(no_step) else None,
        state={"x0": shaped.detach()},
        fallbacks=int(fallbacks.max(initial=0)),
        breakdown=bool((table[:, _GIVEN_UP_AT] >= 0).any()),
        reason=_reason(problem.f.name, table),
        per_system_fallbacks=torch.from_numpy(fallbacks),
    )


def _reason(name: str, table: np.ndarray[Any, Any]) -> str:
    """What went wrong with the directions of the map called `name`, for the worst system."""
    if not table[:, _FALLBACKS].any():
        return ""
    given_up = table[:, _GIVEN_UP_AT] >= 0
    row = table[given_up.argmax() if given_up.any() else table[:, _FALLBACKS].argmax()]
    last = _REJECTIONS[int(row[_REJECTION])]
    if given_up.any():
        why = f"{PATIENCE} of its directions having been of no use (the last: {last})"
        if row[_REJECTION] == _STALLED:
            why = f"because {last}"
        return (
            f"{name} was given up after iteration {int(row[_GIVEN_UP_AT])}, {why}; conjugate gradients went on with "
            "the fallback"
        )
    count = int(row[_FALLBACKS])
    return f"the fallback replaced {count} direction{'s' if count > 1 else ''} of {name} (the last: {last})"
