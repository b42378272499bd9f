"""Capped conjugate gradients: solve a shifted symmetric system, or prove negative curvature.

The iteration itself is csrc/linalg/capped_cg.h. Here are the checks, the Result, and the one rare branch that the
native code leaves to its caller: test 4's look at a suspected direction.

* :func:`capped_cg` is the public function.
* :class:`CappedSolver` holds the vectors for many solves of one size: the entry of the minimisers, without checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable as CallableType
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._ops import backend
from kantor._ranks import Ranks, RankSums, largest, together
from kantor._result import Status
from kantor.linalg import _native
from kantor.linalg._native import Encoded
from kantor.linalg._operator import LinearOperator, as_operator
from kantor.linalg.preconditioners import as_preconditioner

Rule = Literal["residual", "step", "truncated"]
RULES = ("residual", "step", "truncated")
_NONE = Encoded([], [], [])

# Columns of the states: struct CappedState in csrc/linalg/capped_cg.h.
_DAMPING, _RTOL, _ATOL, _LIMIT, _HNORM, _LOG_T_SHIFT = range(6)  # settings, in the order of `solve`
_STATUS, _ITERATIONS, _PRODUCTS, _RESIDUAL_NORM, _CURVATURE, _ALONG_P, _SUSPECT, _TEST4_OFF = range(6, 14)
_YY, _Y_HY, _PP = 18, 19, 20  # y'y, y'Hy, p'p; the direction is y or p
_RUNNING, _NC, _TERM, _INTERRUPTED, _IS_SUSPECT = 0, 2, 3, 5, 6


class CappedCGStatus(Status):
    """How a capped solve ended: ``str(status)`` is the plain word, ``status.advice`` what it means."""

    SOL = (
        "SOL",
        "d solves (H + 2 damping I) d = -g to the accuracy asked; it is a descent direction.",
    )
    NC = (
        "NC",
        "d'Hd < -damping |d|^2: H is not positive semidefinite, and d is the proof.",
    )
    TERM = (
        "TERM",
        "The iteration limit was reached first: d is the last iterate. Raise max_iter or loosen rtol.",
    )
    BREAKDOWN = (
        "BREAKDOWN",
        "The products or the preconditioner gave NaN or infinity, or the square of a vector overflowed.",
    )
    INDEFINITE_PRECONDITIONER = (
        "INDEFINITE_PRECONDITIONER",
        "The preconditioner gave r'Mr <= 0: it is not positive definite.",
    )


_STATUSES = {
    1: CappedCGStatus.SOL,
    2: CappedCGStatus.NC,
    3: CappedCGStatus.TERM,
    4: CappedCGStatus.BREAKDOWN,
    7: CappedCGStatus.INDEFINITE_PRECONDITIONER,
}


@dataclass(frozen=True, repr=False)
class CappedCGResult:
    """Result of :func:`capped_cg`. For a batch the scalars describe the first system that is no solution, if any.

    Attributes
    ----------
    status : CappedCGStatus
        SOL, NC, TERM, BREAKDOWN or INDEFINITE_PRECONDITIONER.
    d : Tensor
        The direction, shaped like g.
    n_iter : int
        Iterations, of the longest system.
    n_hvp : int
        Products with H; each serves the whole batch.
    residual_norm : float
        ``|(H + 2 damping I) y + g|`` of the last iterate, by the recurrence.
    curvature : float
        ``d'Hd / d'd``.
    hnorm : float
        Lower estimate of the norm of H: the largest ratio ``|Hv| / |v|`` seen.
    per_system_status : list of CappedCGStatus
        One entry per right-hand side.
    per_system_iterations, per_system_residual_norm, per_system_curvature, per_system_hnorm : ndarray
        Of each, ``(B,)``.
    """

    status: CappedCGStatus
    d: Tensor
    n_iter: int
    n_hvp: int
    residual_norm: float
    curvature: float
    hnorm: float
    per_system_status: list[CappedCGStatus]
    per_system_iterations: np.ndarray[Any, Any]
    per_system_residual_norm: np.ndarray[Any, Any]
    per_system_curvature: np.ndarray[Any, Any]
    per_system_hnorm: np.ndarray[Any, Any]

    def __repr__(self) -> str:
        count = len(self.per_system_status)
        batch = f" x {count} right-hand sides" if count > 1 else ""
        rows = [
            ("status", self.status.value),
            ("unknowns", f"{self.d.shape[-1]:,}{batch}"),
            ("iterations", f"{self.n_iter:,}"),
            ("products", f"{self.n_hvp:,}"),
            ("|Hd + 2 eps d + g|", f"{self.residual_norm:.3e}"),
            ("d'Hd / d'd", f"{self.curvature:.3e}"),
            ("|H| at least", f"{self.hnorm:.3e}"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"capped_cg on {str(self.d.dtype).removeprefix('torch.')} ({self.d.device})"]
        return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows), f"  {self.status.advice}"])


class Outcome(NamedTuple):
    """One system's numbers from :meth:`CappedSolver.solve`; its direction is the solver's ``d``."""

    status: str
    n_iter: int
    residual_norm: float
    curvature: float
    hnorm: float
    length: float  # of the direction


class CappedSolver:
    """The vectors of capped CG for systems of one size, reused from solve to solve.

    Parameters
    ----------
    like : Tensor
        Shape ``(n,)`` or ``(B, n)``, dtype and device of the right-hand sides.
    ranks : Ranks, optional
        The processes that share the vectors' rows; n counts those of this process.
    """

    def __init__(self, like: Tensor, ranks: Ranks | None = None) -> None:
        self.shape, self._ranks = like.shape, ranks
        self._batch, self._n = (1, like.numel()) if like.ndim == 1 else like.shape
        shape = (self._batch, self._n)
        self._y, self._Hy, self._r, self._p, self._Hp = (_native.zeros(like.new_empty(shape)) for _ in range(5))
        self._z: Tensor | None = None  # with a preconditioner
        self._q: Tensor | None = None  # with a native operator on CUDA, or incomplete Cholesky
        self._host = torch.zeros(self._batch, _C.capped_state_size, dtype=torch.float64)
        self._table = self._host.numpy()
        self._unknowns = self._n if ranks is None else int(ranks.sum(self._n)[0])
        self._sums = None if ranks is None else RankSums(ranks, self._batch, like)
        self._workspace = like.new_empty(0, dtype=torch.uint8)
        self._arrays = like.new_empty(0, dtype=torch.float64)
        self._r_view, self._y_view, self._p_view = (v.view(self.shape) for v in (self._r, self._y, self._p))
        self.d = self._y_view
        self.n_hvp = 0  # of the last solve
        self.log_T_shift = 0.0  # for tests of test 4

    def solve(
        self,
        H: Encoded | CallableType[[Tensor], Tensor],
        g: Tensor,
        damping: Any,
        rtol: Any,
        *,
        rule: Rule = "residual",
        atol: Any = math.inf,
        hnorm: Any = 0.0,
        max_iter: Any = None,
        M_inv: LinearOperator | None = None,
        check_every: int | None = None,
    ) -> None:
        """Solve; :attr:`d` then holds the directions and :meth:`outcome` the numbers, both until the next solve.

        A callable H gets the same tensor, with other contents, at every call; it is not copied. Numbers are floats or
        ``(B,)``. A system whose g is zero is left out. Exceptions of callables leave as they are.
        """
        table = self._table
        limit = 2 * self._unknowns if max_iter is None else max_iter
        for column, value in enumerate((damping, rtol, atol, limit, hnorm, self.log_T_shift)):
            table[:, column] = value
        limit = int(np.max(limit))
        on_cuda = self._r.is_cuda
        every = check_every or (8 if on_cuda else 1)
        native = backend()
        encoded = H if isinstance(H, Encoded) else None
        z, precondition, M = self._r, None, _NONE
        if M_inv is not None:
            z = self._z = torch.empty_like(self._r) if self._z is None else self._z
            if M_inv.is_native:
                M = _native.with_workspace(M_inv.encode(), self._r)
            else:
                r_view, z_view, apply = self._r.view(self.shape), z.view(self.shape), M_inv.matvec

                def precondition() -> None:
                    z_view.copy_(apply(r_view))

        if encoded is not None or M.layout:
            self._q = torch.empty_like(self._r) if self._q is None else self._q
        # Test 4 is off beyond 2 n iterations, since without rounding there are n at most.
        length = 4 * self._batch * (min(limit, 2 * self._unknowns) + 1)
        if self._arrays.numel() < length:
            # Memory that is not touched costs nothing: the arrays fill up to the iterations made.
            self._arrays = torch.empty(length, dtype=torch.float64, device=self._r.device)
        if self._workspace.numel() == 0:
            size = native.capped_workspace_bytes(self._batch)
            self._workspace = torch.empty(size, dtype=torch.uint8, device=self._r.device)
        projections = _native.projections(encoded or _NONE, M, self._batch, self._r)
        arrays = self._arrays[:length]
        vectors = [self._y, self._Hy, self._r, self._p, self._Hp, z, self._q if self._q is not None else self._r]
        states = self._host.to(self._r.device) if on_cuda else self._host
        calls, self._extra_products = 0, 0
        resume = False
        while True:
            calls += native.capped_cg(
                *(encoded or _NONE), *M, g.reshape(self._r.shape), vectors, states, arrays, self._workspace,
                projections, RULES.index(rule), every, resume, None if encoded else H,
                z.view(self.shape) if M_inv is not None else self._r_view, precondition,
                None if self._sums is None else self._sums.sums, self._sums, torch.get_num_threads(),
            )  # fmt: skip
            if on_cuda:
                self._host.copy_(states)
            statuses = table[:, _STATUS].tolist()
            if _INTERRUPTED in statuses:
                raise KeyboardInterrupt
            if _IS_SUSPECT not in statuses or not self._settle(statuses, H, g, arrays.view(self._batch, 4, -1)):
                break
            resume = True
            if on_cuda:
                states.copy_(self._host)
        self.n_hvp = self._extra_products + (int(table[:, _PRODUCTS].max(initial=0)) if encoded else calls)
        if self._batch == 1:
            self.d = self._p_view if table[0, _ALONG_P] else self._y_view
        else:
            mask = torch.from_numpy(table[:, _ALONG_P] != 0).to(self._r.device).unsqueeze(-1)
            self.d = torch.where(mask, self._p, self._y)

    def outcome(self, k: int = 0) -> Outcome:
        """The numbers of system k."""
        row = self._table[k].tolist()
        status = _STATUSES[int(row[_STATUS])]
        length = math.sqrt(row[_PP if row[_ALONG_P] else _YY])
        return Outcome(status.value, int(row[_ITERATIONS]), row[_RESIDUAL_NORM], row[_CURVATURE], row[_HNORM], length)

    def _settle(self, statuses: list[float], H: Any, g: Tensor, arrays: Tensor) -> bool:
        """Test 4's branch: rebuild y_i and look at y+ - y_i, which is accepted only if it is what the scan said.

        Returns whether a system runs on. O(n) memory; i + 1 products.
        """
        table = self._table
        running = False
        for k in (k for k, status in enumerate(statuses) if status == _IS_SUSPECT):
            i, j, damping = int(table[k, _SUSPECT]), int(table[k, _ITERATIONS]), float(table[k, _DAMPING])
            alphas, squares = arrays[k, :2, : j + 1].tolist()
            r = g.reshape(self._r.shape)[k]
            y, p, Hp = (torch.zeros_like(r) for _ in range(3))
            for step in range(i):  # rounded like the iteration, lest y+ - y_i be lost in the difference of two runs
                beta = squares[step] / squares[step - 1] if step else 0.0
                Hr = self._product(H, r, k)
                p = beta * p - r
                Hp = beta * Hp - Hr
                y = y + alphas[step] * p
                r = r + alphas[step] * (Hp + 2 * damping * p)
            d = self._y[k] + alphas[j] * self._p[k] - y
            Hd = self._product(H, d, k)
            square, product = self._sums_of_products(d, d, Hd)
            curvature = product / square
            if curvature < -damping:
                self._p[k] = d
                table[k, _STATUS], table[k, _ALONG_P], table[k, _CURVATURE], table[k, _PP] = _NC, 1, curvature, square
            elif j >= table[k, _LIMIT]:
                table[k, _STATUS], table[k, _CURVATURE] = _TERM, table[k, _Y_HY] / table[k, _YY]
            else:  # rounding: the residual is large, but no direction says why
                table[k, _STATUS], table[k, _TEST4_OFF] = _RUNNING, 1
                running = True
        return running

    def _sums_of_products(self, d: Tensor, *others: Tensor) -> list[float]:
        """``d'v`` in double for each of the other vectors, over all ranks."""
        sums = torch.stack([torch.dot(d.double(), v.double()) for v in others])
        if self._ranks is not None:
            self._ranks.all_reduce_(sums)
        result: list[float] = sums.tolist()
        return result

    def _product(self, H: Any, v: Tensor, k: int) -> Tensor:
        """H v for system k of the batch."""
        self._extra_products += 1
        rows = torch.zeros_like(self._y)
        rows[k] = v
        full = _native.matvec(*H, rows) if isinstance(H, Encoded) else H(rows.view(self.shape))
        product: Tensor = full.reshape(self._y.shape)[k]
        return product


def capped_cg(
    A: Any,
    g: Tensor,
    *,
    damping: float | Tensor,
    rtol: float | Tensor = 0.01,
    atol: float | Tensor = math.inf,
    rule: Rule = "residual",
    max_iter: int | None = None,
    hnorm: float | Tensor = 0.0,
    M_inv: Any = None,
    check_every: int | None = None,
    debug: bool = False,
) -> CappedCGResult:
    """Solve ``(H + 2 damping I) d = -g`` for symmetric H of any definiteness, or find curvature below ``-damping``.

    The inner solver of Newton methods for nonconvex functions: where ordinary conjugate gradients break down or run on
    without noticing, this one stops with a direction d that proves ``d'Hd < -damping |d|^2``.

    Parameters
    ----------
    A : LinearOperator, Tensor, sparse tensor, scipy sparse matrix or LinearOperator, or callable
        H, ``(n, n)``, symmetric; see :func:`as_operator`. A callable maps ``(..., n)``, shaped like g, to the same.
        The tensor that it gets is valid during the call only. With an operator of :mod:`kantor.distributed` every
        rank calls with its own rows of g and gets its rows of d.
    g : Tensor
        ``(n,)``, or ``(B, n)`` for a batch of systems that stop one by one. float32 or float64, finite, not zero.
    damping : float or Tensor
        eps > 0, for all systems or ``(B,)``.
    rtol : float or Tensor
        Accuracy zeta in (0, 1), for all systems or ``(B,)``.
    atol : float or Tensor
        A solution has ``|r| < atol`` in addition.
    rule : {"residual", "step", "truncated"}
        When a residual r is small enough: ``|r| <= zeta / (3 kappa) |g|`` with ``kappa = (|H| + 2 eps) / eps``, as
        published; ``|r| <= eps zeta / 2 |d|``, which is all that the theory needs, with fewer iterations; or
        ``|r| <= min(1/2, sqrt|g|) |g|``, cheap, without a complexity bound.
    max_iter : int, optional
        Default ``2 n``.
    hnorm : float or Tensor
        A lower estimate of the norm of H, if one is known.
    M_inv : None, "jacobi", "ic0", operator or callable
        Preconditioner, an approximation of ``(H + 2 eps I)^-1``, symmetric positive definite. Test 4 is off with it.
    check_every : int, optional
        Iterations between two looks at a GPU (default 8; the CPU looks after each).
    debug : bool
        Probe H for symmetry first, at the cost of two products.

    Returns
    -------
    CappedCGResult
        SOL: ``d'(H + 2 eps I)d >= eps |d|^2``, ``g'd < 0``, and with the rules "residual" and "step"
        ``|(H + 2 eps I) d + g| <= eps zeta |d| / 2``. NC: ``d'Hd < -eps |d|^2``. When ``H >= -eps I`` it is SOL in
        exact arithmetic. Not differentiable: d is detached.

    Raises
    ------
    TypeError
        Wrong types or dtypes, mixed dtypes.
    ValueError
        g with NaN, infinity or a zero system; damping, rtol, atol, hnorm or max_iter out of range; shapes or devices
        that do not fit.
    RuntimeError
        With `debug`, H is not symmetric.

    Notes
    -----
    At most ``min(n, O(sqrt(kappa) log(kappa / zeta)))`` iterations in exact arithmetic, one product each, and 14 words
    of memory traffic per unknown beside it. Memory: 5 vectors and 4 numbers an iteration. Sums are accumulated in
    double precision in an order that depends on the size alone: any number of threads gives the same bits.

    Source: Royer, O'Neill & Wright, *A Newton-CG algorithm with complexity guarantees for smooth unconstrained
    optimization*, Math. Prog. 180 (2020), algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg import capped_cg
    >>> H = torch.diag(torch.tensor([3.0, 1.0, -0.5], dtype=torch.float64))
    >>> g = torch.ones(3, dtype=torch.float64)
    >>> result = capped_cg(H, g, damping=0.1)
    >>> str(result.status)
    'NC'
    >>> d = result.d
    >>> bool(d @ H @ d < -0.1 * d @ d)
    True
    >>> str(capped_cg(H, g, damping=0.6).status)
    'SOL'
    """
    ranks: Ranks | None = getattr(A, "ranks", None)
    with together(ranks):
        operator, numbers = _checked(A, g, damping, rtol, atol, rule, max_iter, hnorm, check_every)
    if debug:
        relative, where = operator.asymmetry()
        if relative > max(1e-6, 1e2 * torch.finfo(g.dtype).eps):
            raise RuntimeError(f"capped_cg: A is not symmetric: {where}; the difference is {relative:.3g} of its terms")
    with torch.no_grad():
        g = g.detach().resolve_neg().contiguous()
        most = largest(g, ranks)
        # A power of two brings g to size one: its square neither under- nor overflows, and no bit of d changes.
        size = torch.exp2(torch.frexp(most).exponent.double() - 1)
        if bool((most == 0).any()):
            raise ValueError(
                "capped_cg: g: expected a vector that is not zero; at a stationary point there is no direction"
            )
        preconditioner = as_preconditioner(M_inv, operator, g, "capped_cg: M_inv")
        if ranks is None:
            return _scaled_solve(operator, g, size, numbers, rule, max_iter, preconditioner, check_every)
        systems = 1 if g.ndim == 1 else g.shape[0]
        ranks.agree("capped_cg", **{"g: number of systems": systems})
        ranks.agree(
            "capped_cg",
            rule=RULES.index(rule), max_iter=-1 if max_iter is None else max_iter,
            M_inv=preconditioner is not None, check_every=check_every or 0,
            **{
                f"{name} of system {k}": number
                for name, value in numbers.items()
                for k, number in enumerate(np.broadcast_to(value, systems).tolist())
            },
        )  # fmt: skip
        with ranks.deferred_interrupts():
            return _scaled_solve(operator, g, size, numbers, rule, max_iter, preconditioner, check_every)


def _checked(
    A: Any, g: Any, damping: Any, rtol: Any, atol: Any, rule: str, max_iter: Any, hnorm: Any, check_every: Any
) -> tuple[LinearOperator, dict[str, Any]]:
    """The operator, and the numbers of every system; raises as :func:`capped_cg` says."""
    check_tensor(g, "capped_cg", "g")
    check_float(g, "capped_cg", "g")
    empty = g.shape[:-1].numel() == 0 or (g.numel() == 0 and getattr(A, "ranks", None) is None)
    if g.ndim not in (1, 2) or empty:
        raise ValueError(f"capped_cg: g: expected shape (n,) or (B, n), not empty, got {tuple(g.shape)}")
    check_finite(g, "capped_cg", "g")
    operator = as_operator(A, like=g)
    n = g.shape[-1]
    if operator.shape != (n, n):
        raise ValueError(f"capped_cg: A: expected shape {(n, n)} for g of shape {tuple(g.shape)}, got {operator.shape}")
    if operator.device != g.device or operator.dtype != g.dtype:
        check_same("capped_cg", [("A", torch.empty(0, dtype=operator.dtype, device=operator.device)), ("g", g)])
    if rule not in RULES:
        raise ValueError(f"capped_cg: rule: expected one of {', '.join(map(repr, RULES))}, got {rule!r}")
    for name, count, least in (("max_iter", max_iter, 0), ("check_every", check_every, 1)):
        if count is not None and not (isinstance(count, int | np.integer) and count >= least):
            raise ValueError(f"capped_cg: {name}: expected an integer >= {least}, got {count!r}")
    systems = 1 if g.ndim == 1 else g.shape[0]
    return operator, {
        "damping": _numbers(damping, "damping", systems, lambda v: (v > 0) & (v < math.inf), "> 0"),
        "rtol": _numbers(rtol, "rtol", systems, lambda v: (v > 0) & (v < 1), "in (0, 1)"),
        "atol": _numbers(atol, "atol", systems, lambda v: v > 0, "> 0"),
        "hnorm": _numbers(hnorm, "hnorm", systems, lambda v: (v >= 0) & (v < math.inf), ">= 0 and finite"),
    }


def _scaled_solve(
    operator: LinearOperator, g: Tensor, size: Tensor, numbers: dict[str, Any], rule: Rule, max_iter: int | None,
    preconditioner: LinearOperator | None, check_every: int | None,
) -> CappedCGResult:  # fmt: skip
    """Solve for g / size where squares of g might be out of range, and scale back."""
    largest, smallest = float(size.max()), float(size.min())
    safe = (
        (1e-15 if g.dtype is torch.float32 else 1e-120)
        < smallest
        <= largest
        < (1e15 if g.dtype is torch.float32 else 1e120)
    )
    if safe:
        size = torch.ones_like(size)
    factor = size.to(g.dtype)
    scaled = g / factor
    solver = CappedSolver(g, operator.ranks)
    scale = size.squeeze(-1).cpu().numpy()
    with np.errstate(over="ignore"):
        atol = numbers["atol"] / scale
    if not safe and rule == "truncated":  # it looks at the size of g, which the scaled system has no more
        squares = scaled.double().square().sum(-1)
        if operator.ranks is not None:
            operator.ranks.all_reduce_(squares)
        norm = squares.sqrt().cpu().numpy()
        atol = np.fmin(atol, np.nextafter(norm * np.fmin(0.5, np.sqrt(norm) * np.sqrt(scale)), math.inf))
    product = torch.empty_like(scaled)
    solver.solve(
        operator.encode() if operator.is_native else lambda v: _product(operator, v, product),
        scaled, numbers["damping"], numbers["rtol"], rule=rule, atol=atol,
        hnorm=numbers["hnorm"], max_iter=max_iter, M_inv=preconditioner, check_every=check_every,
    )  # fmt: skip
    systems = [solver.outcome(k) for k in range(1 if g.ndim == 1 else g.shape[0])]
    statuses = [CappedCGStatus[s.status] for s in systems]
    shown = next((k for k, s in enumerate(statuses) if s is not CappedCGStatus.SOL), 0)
    residuals = np.array([s.residual_norm for s in systems]) * scale
    return CappedCGResult(
        status=statuses[shown],
        d=solver.d * factor,
        n_iter=max(s.n_iter for s in systems),
        n_hvp=solver.n_hvp,
        residual_norm=float(residuals[shown]),
        curvature=systems[shown].curvature,
        hnorm=systems[shown].hnorm,
        per_system_status=statuses,
        per_system_iterations=np.array([s.n_iter for s in systems]),
        per_system_residual_norm=residuals,
        per_system_curvature=np.array([s.curvature for s in systems]),
        per_system_hnorm=np.array([s.hnorm for s in systems]),
    )


def _numbers(
    value: Any, name: str, systems: int, fine: CallableType[[Any], Any], expected: str
) -> np.ndarray[Any, Any] | float:
    """A float for all systems, or one for each."""
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
    if isinstance(value, str | bytes) or value is None:
        raise TypeError(f"capped_cg: {name}: expected a number or a tensor, got {type(value).__name__}")
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (systems,)):
        raise ValueError(f"capped_cg: {name}: expected a number or shape ({systems},), got shape {array.shape}")
    if not np.all(fine(array)):
        raise ValueError(f"capped_cg: {name}: expected a number {expected}, got {value!r}")
    return float(array) if array.ndim == 0 else array


def _product(operator: LinearOperator, v: Tensor, out: Tensor) -> Tensor:
    """The product with an operator in Python: where it lies, or in memory of ours where ranks take part."""
    return plain(operator.matvec(v)) if operator.ranks is None else operator.write_product(v, out)


def plain(product: Tensor) -> Tensor:
    """The tensor with memory that native code may read: neither a lazy negation nor one of autograd's lazy zeros."""
    return product.clone() if product.is_neg() or product._is_zerotensor() else product
