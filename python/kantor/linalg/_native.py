"""The torch operators of ``kantor.linalg``: matvec, cg, ic0_solve and csr_transpose.

Every native operator travels as ``(operands, layout, scales)``; csrc/linalg/operator.h documents the encoding. One
bilinear form per kind gives every derivative: with ``outer(operands, u, v)`` the gradient of ``u' A v`` with respect to
the operands,

* matvec ``y = A x``: gradients ``A' g`` and ``outer(g, x)``;
* cg ``x = A^-1 b`` (A symmetric): ``l = A^-1 g`` for b and ``-outer(l, x)`` for the operands, by implicit
  differentiation.

All operators but the low-rank ones, which are quadratic in their factors, are linear in their floating-point operands:
the tangent of A is A with tangents for operands. `tangent_product` has both cases.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import host, is_readable
from kantor._ops import Context, backend, declare
from kantor._ranks import Ranks, RankSums

DENSE, CSR, STENCIL, FACES, DIAGONAL, INCOMPLETE_CHOLESKY, LOW_RANK, POISSON, MULTIGRID = range(9)
# Integers after the kind, per term.
_META = {DENSE: 2, CSR: 3, STENCIL: 6, FACES: 4, DIAGONAL: 1, LOW_RANK: 2, POISSON: 3}

_GRIDS = (STENCIL, FACES, POISSON)

# Columns of the `info` output of cg: struct CgState in csrc/linalg/cg.h.
STATUS, ITERATIONS, RESIDUAL_NORM, B_NORM, CURVATURE, HISTORY_STRIDE, HISTORY_COUNT, RESTARTS = range(8)
INTERRUPTED, INDEFINITE_PRECONDITIONER, BAD_SCALE, BREAKDOWN = 7, 9, 10, 6


class Encoded(NamedTuple):
    """An operator as the native code takes it."""

    operands: list[Tensor]
    layout: list[int]
    scales: list[float]


class Term(NamedTuple):
    """One term of a sum: kind, its integers and its tensors."""

    kind: int
    meta: list[int]
    operands: list[Tensor]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.meta[0] * self.meta[1] * self.meta[2] if self.kind in _GRIDS else self.meta[0]

    @property
    def cols(self) -> int:
        """Number of columns."""
        return self.meta[1] if self.kind in (DENSE, CSR) else self.rows


def split_terms(operands: Sequence[Any], layout: Sequence[int]) -> list[Term]:
    """Undo the flattening of a sum of terms."""
    terms, at, used = [], 0, 0
    while at < len(layout):
        kind = layout[at]
        meta = list(layout[at + 1 : at + 1 + _META[kind]])
        counts = {DENSE: 1, CSR: 3, STENCIL: 1, FACES: meta[-1] + 1, DIAGONAL: 1, LOW_RANK: 2, POISSON: 1}
        count = counts[kind]
        terms.append(Term(kind, meta, list(operands[used : used + count])))
        at += 1 + len(meta)
        used += count
    return terms


def csr_rows(crow: Tensor, nnz: int) -> Tensor:
    """Row index of every stored entry."""
    return torch.repeat_interleave(torch.arange(crow.numel() - 1, device=crow.device), crow.diff(), output_size=nnz)


def _second_difference(v: Tensor, dim: int, neumann: bool) -> Tensor:
    """2 v - left - right along dim; outside the grid v is zero, or continues (Neumann)."""
    padding = v.narrow(dim, 0, 1), v.narrow(dim, v.shape[dim] - 1, 1)
    first, last = padding if neumann else (torch.zeros_like(padding[0]), torch.zeros_like(padding[1]))
    extended = torch.cat([first, v, last], dim)
    n = v.shape[dim]
    return 2 * v - extended.narrow(dim, 0, n) - extended.narrow(dim, 2, n)


def _outer_term(term: Term, scale: float, u: Tensor, v: Tensor) -> list[Tensor | None]:
    """Gradient of ``scale * sum_batch u' A v`` with respect to the term's operands; u (B, rows), v (B, cols)."""
    if term.kind == DENSE:
        return [scale * (u.mT @ v)]
    if term.kind == CSR:
        crow, col, _ = term.operands
        rows = csr_rows(crow, col.numel())
        return [None, None, scale * (u.mT.index_select(0, rows) * v.mT.index_select(0, col)).sum(-1)]
    if term.kind == POISSON:
        return [None]
    if term.kind == DIAGONAL:
        return [scale * (u * v).sum(0)]
    if term.kind == LOW_RANK:
        F, w = term.operands
        Fu, Fv = u @ F.mT, v @ F.mT
        return [scale * (w.unsqueeze(-1) * (Fu.mT @ v + Fv.mT @ u)), scale * (Fu * Fv).sum(0)]
    grid = term.meta[:3]
    U, V = u.reshape(-1, *grid), v.reshape(-1, *grid)
    if term.kind == STENCIL:
        parts = [V, *(_second_difference(V, dim, bool(term.meta[2 + dim])) for dim in (1, 2, 3))]
        return [scale * torch.stack([(U * part).sum() for part in parts])]
    dims = (1, 2, 3) if term.meta[3] == 3 else (1, 3)
    faces = []
    for dim in dims:
        pad = [0, 0] * (3 - dim) + [1, 1]
        du, dv = (torch.nn.functional.pad(w, pad).diff(dim=dim) for w in (U, V))
        faces.append(scale * (du * dv).sum(0))
    return [scale * (u * v).sum().reshape(1), *faces]


def outer(
    operands: Sequence[Tensor], layout: Sequence[int], scales: Sequence[float], u: Tensor, v: Tensor
) -> list[Any]:
    """Gradient of ``u' A v``, summed over the batch, with respect to each operand (None for integer ones)."""
    gradients: list[Any] = []
    for term, scale in zip(split_terms(operands, layout), scales, strict=True):
        u2, v2 = u.reshape(u.shape[:-1].numel(), term.rows), v.reshape(v.shape[:-1].numel(), term.cols)
        parts = _outer_term(term, scale, u2, v2)
        gradients += [g if g is None else g.reshape(t.shape) for g, t in zip(parts, term.operands, strict=True)]
    return gradients


def transposed(operands: Sequence[Tensor], layout: Sequence[int], scales: Sequence[float]) -> Encoded:
    """Encoding of the transposed operator; the other forms are symmetric."""
    new_operands: list[Tensor] = []
    new_layout: list[int] = []
    for term in split_terms(operands, layout):
        meta, tensors = term.meta, term.operands
        if term.kind == DENSE:
            meta, tensors = [meta[1], meta[0]], [tensors[0].mT.contiguous()]
        elif term.kind == CSR:
            crow, col, values = tensors
            t_crow, t_col, permutation = csr_transpose(crow, col, meta[1])
            meta, tensors = [meta[1], meta[0], meta[2]], [t_crow, t_col, values.index_select(0, permutation)]
        new_layout += [term.kind, *meta]
        new_operands += tensors
    return Encoded(new_operands, new_layout, list(scales))


def tangent_product(
    operands: Sequence[Tensor],
    tangents: Sequence[Tensor | None] | None,
    layout: Sequence[int],
    scales: Sequence[float],
    x: Tensor,
) -> Tensor | None:
    """Product of x with the tangent of A; None when no operand has one."""
    if tangents is None or all(t is None for t in tangents):
        return None
    result: Tensor | None = None
    linear = Encoded([], [], [])
    terms, d_terms = split_terms(operands, layout), split_terms(tangents, layout)
    for term, d_term, scale in zip(terms, d_terms, scales, strict=True):
        if all(t is None for t in d_term.operands):
            continue
        if term.kind == LOW_RANK:
            (F, w), (dF, dw) = term.operands, d_term.operands
            part = scale * _low_rank_tangent(F, w, dF, dw, x)
            result = part if result is None else result + part
            continue
        linear.operands.extend(
            value if not value.is_floating_point() else torch.zeros_like(value) if tangent is None else tangent
            for value, tangent in zip(term.operands, d_term.operands, strict=True)
        )
        linear.layout.extend([term.kind, *term.meta])
        linear.scales.append(scale)
    if linear.layout:
        product: Tensor = matvec(*linear, x)
        result = product if result is None else result + product
    return result


def _low_rank_tangent(F: Tensor, w: Tensor, dF: Tensor | None, dw: Tensor | None, x: Tensor) -> Tensor:
    """``(dF' diag(w) F + F' diag(w) dF + F' diag(dw) F) x``."""
    c = x @ F.mT
    parts = [] if dF is None else [(c * w) @ dF, (x @ dF.mT * w) @ F]
    if dw is not None:
        parts.append((c * dw) @ F)
    return torch.stack(parts).sum(0)


def with_workspace(M: Encoded, like: Tensor) -> Encoded:
    """The encoding of a preconditioner with the scratch memory that its kind needs, made for one run.

    The operands of an operator may be kept for a derivative and used by several threads at once; scratch may not.
    """
    if M.layout[:1] != [MULTIGRID]:
        return M
    size = backend().multigrid_workspace(M.layout, torch.get_num_threads())
    return M._replace(operands=[*M.operands, like.new_empty(size, dtype=torch.uint8)])


def projections(A: Encoded, M: Encoded | None, batch: int, like: Tensor) -> Tensor | None:
    """Workspace for the low-rank terms of an operator and a preconditioner; None where there are none."""
    layouts = [A.layout] if M is None else [A.layout, M.layout]
    sums = [layout for layout in layouts if layout[:1] not in ([INCOMPLETE_CHOLESKY], [MULTIGRID])]
    size = sum(backend().projections_size(layout) for layout in sums if LOW_RANK in layout)
    return like.new_empty(batch * size, dtype=torch.float64) if size else None


# --- matvec -----------------------------------------------------------------------------------------------------------


def _matvec_forward(operands: list[Tensor], layout: list[int], scales: list[float], x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], split_terms(operands, layout)[0].rows)
    work = None
    if LOW_RANK in layout:
        work = projections(Encoded(operands, layout, scales), None, x.numel() // max(x.shape[-1], 1), x)
    backend().matvec(operands, layout, scales, x, y, work, torch.get_num_threads())
    return y


def write_matvec(A: Encoded, x: Tensor, out: Tensor) -> Tensor:
    """Write ``A x`` to memory that is there; without low-rank terms."""
    backend().matvec(*A, x.resolve_neg().contiguous(), out, None, torch.get_num_threads())
    return out


def _matvec_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    operands, layout, scales, x = ctx.inputs
    need_operands, _, _, need_x = ctx.needs
    grad_x = matvec(*transposed(operands, layout, scales), grad) if need_x else None
    return outer(operands, layout, scales, grad, x) if any(need_operands) else None, None, None, grad_x


def _matvec_jvp(ctx: Context, d_operands: Any, d_layout: None, d_scales: None, dx: Tensor | None) -> Tensor:
    operands, layout, scales, x = ctx.inputs
    result: Tensor | None = None if dx is None else matvec(operands, layout, scales, dx)
    product = tangent_product(operands, d_operands, layout, scales, x)
    if product is not None:
        result = product if result is None else result + product
    assert result is not None
    return result


matvec = declare(
    "matvec(Tensor[] operands, int[] layout, float[] scales, Tensor x) -> Tensor",
    forward=_matvec_forward,
    fake=lambda operands, layout, scales, x: x.new_empty(*x.shape[:-1], split_terms(operands, layout)[0].rows),
    backward=_matvec_backward,
    jvp=_matvec_jvp,
    batched=("x",),
)


# --- csr_transpose ----------------------------------------------------------------------------------------------------


def _csr_transpose_forward(crow: Tensor, col: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    host_crow, host_col = host(crow), host(col)  # a one-off on the structure; not worth a kernel
    t_crow, t_col, permutation = host_crow.new_empty(cols + 1), torch.empty_like(host_col), torch.empty_like(host_col)
    _C.csr_transpose(host_crow, host_col, t_crow, t_col, permutation)
    return t_crow.to(crow.device), t_col.to(crow.device), permutation.to(crow.device)


csr_transpose = declare(
    "csr_transpose(Tensor crow, Tensor col, int cols) -> (Tensor t_crow, Tensor t_col, Tensor permutation)",
    forward=_csr_transpose_forward,
    fake=lambda crow, col, cols: (crow.new_empty(cols + 1), torch.empty_like(col), torch.empty_like(col)),
)


# --- cg ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hooks:
    """What a call of the cg operator cannot carry in its schema; set around one call by `kantor.linalg.cg`."""

    monitor: Callable[[int, float], bool] | None = None
    return_on_interrupt: bool = False


hooks: ContextVar[Hooks] = ContextVar("kantor_cg_hooks", default=Hooks())  # noqa: B039 (frozen)


def history_length(batch: int, maxiter: int) -> int:
    """Residual norms kept per system: all of them up to a few thousand, fewer for large batches."""
    return max(2, min(maxiter + 1, 4096, max(64, 2**18 // max(batch, 1))))


def run_cg(
    A: Encoded,
    M: Encoded,
    b: Tensor,
    x0: Tensor | None,
    rtol: float,
    atol: float,
    maxiter: int,
    *,
    apply: Callable[[Tensor, Tensor], Tensor] | None = None,
    precondition: Callable[[Tensor, Tensor], Tensor] | None = None,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the native loop on b (..., n); ``apply(x, out)`` and ``precondition(r, out)`` stand in for A and M.

    With `ranks` all vectors hold this rank's rows, of which there may be none.
    """
    shape, n = b.shape, b.shape[-1]
    if b.numel() == 0 and (ranks is None or 0 in shape[:-1]):  # no system, or systems without unknowns
        x, p, info, history = _cg_fake(*A, *M, b, x0, rtol, atol, maxiter)
        info = info.zero_()
        info[..., STATUS] = info[..., HISTORY_STRIDE] = 1
        return x, p, info, history.zero_()
    # Native code reads memory as it is: no lazy negation.
    A, M = (Encoded([t.resolve_neg() for t in e.operands], e.layout, e.scales) for e in (A, M))
    batch = math.prod(shape[:-1])
    b2 = b.resolve_neg().reshape(batch, n).contiguous()
    # The results are no views: autograd forbids to write into a view that an operator made.
    x = zeros(b) if x0 is None else x0.resolve_neg().clone(memory_format=torch.contiguous_format)
    p = zeros(b)  # zero, not empty: it is returned, also for systems that take no step
    r, q = torch.empty_like(b2), torch.empty_like(b2)
    z = r if not M.layout and precondition is None else torch.empty_like(b2)
    info = b2.new_zeros((*shape[:-1], _C.cg_state_size), dtype=torch.float64)
    history = b2.new_zeros((*shape[:-1], history_length(batch, maxiter)), dtype=torch.float64)
    native = backend()
    workspace = b2.new_empty(native.cg_workspace_bytes(batch), dtype=torch.uint8)

    def apply_callback(to_x: bool) -> None:
        assert apply is not None
        apply(x if to_x else p, q.view(shape))

    def precondition_callback() -> None:
        assert precondition is not None
        precondition(r.view(shape), z.view(shape))

    M = with_workspace(M, b2)
    sums = None if ranks is None else RankSums(ranks, batch, b2)
    current = hooks.get()
    native.cg(
        *A, *M, b2, x, [r, p.view(b2.shape), q, z], x0 is None, info, history, workspace,
        projections(A, M, batch, b2), rtol, atol, maxiter,
        None if apply is None else apply_callback,
        None if precondition is None else precondition_callback,
        current.monitor, None if sums is None else sums.sums, sums, torch.get_num_threads(),
    )  # fmt: skip
    if not current.return_on_interrupt and bool((info[..., STATUS] == INTERRUPTED).any()):
        raise KeyboardInterrupt
    return x, p, info, history


def zeros(like: Tensor) -> Tensor:
    """Zeros shaped like a vector; on the CPU made by native code, which asks for huge pages."""
    if like.is_cuda:
        return like.new_zeros(like.shape)
    out = like.new_empty(like.shape)
    _C.zero_fill(out, torch.get_num_threads())
    return out


def _cg_forward(
    operands: list[Tensor], layout: list[int], scales: list[float],
    m_operands: list[Tensor], m_layout: list[int], m_scales: list[float],
    b: Tensor, x0: Tensor | None, rtol: float, atol: float, maxiter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    A, M = Encoded(operands, layout, scales), Encoded(m_operands, m_layout, m_scales)
    return run_cg(A, M, b, x0, rtol, atol, maxiter)


def _cg_fake(operands: Any, layout: Any, scales: Any, mo: Any, ml: Any, ms: Any, b: Tensor, *options: Any) -> Any:
    length = history_length(b.numel() // max(b.shape[-1], 1), options[-1])
    lead = b.shape[:-1]
    return (
        b.new_empty(b.shape),
        b.new_empty(b.shape),
        b.new_empty((*lead, _C.cg_state_size), dtype=torch.float64),
        b.new_empty((*lead, length), dtype=torch.float64),
    )


def _sizes_forward(b: Tensor) -> Tensor:
    if b.shape[-1] == 0:
        return b.new_ones((*b.shape[:-1], 1))
    largest = b.abs().amax(-1, keepdim=True)
    exponent = (torch.frexp(largest).exponent - 1).to(largest.dtype)  # 2 ** exponent <= largest: never out of range
    power = torch.where(largest == 0, torch.ones_like(largest), torch.exp2(exponent))
    return torch.where(largest.isfinite(), power, largest)  # NaN stays NaN


# Per system the power of two below the largest entry of b, or one, shape (..., 1): b over it is safe from under- and
# overflow, and no bit of it changes. A constant for
# all derivatives, and an operator of its own because torch's first vmap can neither detach nor take a maximum.
sizes: Callable[..., Tensor] = declare(
    "sizes(Tensor b) -> Tensor",
    forward=_sizes_forward,
    fake=lambda b: b.new_empty((*b.shape[:-1], 1)),
    backward=lambda ctx, grad: (None,),
    jvp=lambda ctx, db: None,
    batched=("b",),
)


def derivative_rtol(rtol: float, dtype: torch.dtype) -> float:
    """Tolerance of a solve for a derivative: that of the solution, but never loose, and not its absolute one."""
    return min(rtol, 1e-5) if rtol > 0 else 10 * torch.finfo(dtype).eps


@contextmanager
def derivative_solve() -> Iterator[None]:
    """Inside, solves do not report to the callback and progress bar of a solve around them."""
    token = hooks.set(Hooks())
    try:
        yield
    finally:
        hooks.reset(token)


def warn_if_inexact(info: Tensor) -> None:
    """Warn when a solve for a derivative failed."""
    if is_readable(info) and not bool((info[..., STATUS] == 1).all()):
        warnings.warn(
            "cg: the solve for the derivative did not converge: the gradient is inexact. Raise maxiter or rtol.",
            RuntimeWarning,
            stacklevel=3,
        )


def _derivative_solve(inputs: Sequence[Any], right: Tensor) -> Tensor:
    """``A^-1 right`` for a derivative, with the options of the call that is differentiated."""
    operands, layout, scales, m_operands, m_layout, m_scales, _, _, rtol, _, maxiter = inputs
    limit = maxiter if maxiter > 0 else 10 * right.shape[-1]
    size = sizes(right)
    with derivative_solve():
        solved: tuple[Tensor, ...] = cg(
            operands, layout, scales, m_operands, m_layout, m_scales,
            right / size, None, derivative_rtol(rtol, right.dtype), 0.0, limit,
        )  # fmt: skip
    x, _, info, _ = solved
    warn_if_inexact(info)
    return x * size


def _cg_backward(ctx: Context, grad: Tensor) -> tuple[Any, ...]:
    operands, layout, scales, *_ = ctx.inputs
    adjoint = _derivative_solve(ctx.inputs, grad)
    gradients = None
    if any(ctx.needs[0]):
        gradients = [g if g is None else -g for g in outer(operands, layout, scales, adjoint, ctx.outputs[0])]
    return gradients, None, None, None, None, None, adjoint, None, None, None, None


def _cg_jvp(ctx: Context, d_operands: Any, *tangents: Any) -> Tensor:
    operands, layout, scales, *_ = ctx.inputs
    x, db = ctx.outputs[0], tangents[5]
    right = torch.zeros_like(x) if db is None else db
    product = tangent_product(operands, d_operands, layout, scales, x)
    if product is not None:
        right = right - product
    return _derivative_solve(ctx.inputs, right)


cg = declare(
    "cg(Tensor[] operands, int[] layout, float[] scales, Tensor[] m_operands, int[] m_layout, float[] m_scales, "
    "Tensor b, Tensor? x0, float rtol, float atol, int maxiter) "
    "-> (Tensor x, Tensor direction, Tensor info, Tensor history)",
    forward=_cg_forward,
    fake=_cg_fake,
    backward=_cg_backward,
    jvp=_cg_jvp,
    batched=("b", "x0"),
    save_outputs=True,
)


# --- ic0_solve --------------------------------------------------------------------------------------------------------


def _ic0_solve_forward(operands: list[Tensor], layout: list[int], r: Tensor) -> Tensor:
    z = torch.empty_like(r)
    if r.numel():
        backend().ic0_solve(operands, layout, r, r.new_empty(layout[1]), z, torch.get_num_threads())
    return z


ic0_solve: Callable[..., Tensor] = declare(
    "ic0_solve(Tensor[] operands, int[] layout, Tensor r) -> Tensor",
    forward=_ic0_solve_forward,
    fake=lambda operands, layout, r: r.new_empty(r.shape),
    # M = (L L')^-1 is symmetric; the factor itself is not differentiated.
    backward=lambda ctx, grad: (None, None, ic0_solve(*ctx.inputs[:2], grad)),
    jvp=lambda ctx, d_operands, d_layout, dr: ic0_solve(*ctx.inputs[:2], dr),
    batched=("r",),
)


# --- multigrid --------------------------------------------------------------------------------------------------------


def _multigrid_forward(operands: list[Tensor], layout: list[int], r: Tensor) -> Tensor:
    z = torch.empty(r.shape, dtype=r.dtype, device=r.device)
    if r.numel():
        M = with_workspace(Encoded(operands, layout, [1.0]), r)
        backend().multigrid_apply(M.operands, layout, r, z, torch.get_num_threads())
    return z


multigrid: Callable[..., Tensor] = declare(
    "multigrid(Tensor[] operands, int[] layout, Tensor r) -> Tensor",
    forward=_multigrid_forward,
    fake=lambda operands, layout, r: r.new_empty(r.shape),
    # The cycle is symmetric; the levels are not differentiated.
    backward=lambda ctx, grad: (None, None, multigrid(*ctx.inputs[:2], grad)),
    jvp=lambda ctx, d_operands, d_layout, dr: multigrid(*ctx.inputs[:2], dr),
    batched=("r",),
)
