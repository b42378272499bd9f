"""The torch operators of ``kantor.transport``: transport_potentials and plan_solve, and the calls they make.

With potentials f, g of the plan ``P_ij = exp((f_i + g_j - C_ij) / eps)`` everything follows from one symmetric system,

    [diag(R)  P      ] [xi  ]   [u]        R = P1  (1 + eps / rho_a)
    [P'       diag(K)] [zeta] = [v],       K = P'1 (1 + eps / rho_b),

``plan_solve``: differentiating ``P1 = a``, ``P'1 = b`` (or the penalised marginals) gives the tangents (df, dg) as
its solution for ``u = eps da + (P o dC) 1 + d eps (P log P) 1``, and v alike; the adjoint is the same solve. With hard
marginals (1, -1) is in its null space: (f + s, g - s) is the same plan. Potentials are returned with a.f = b.g,
solutions of the system orthogonal to (1, -1).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._ops import Context, backend, declare
from kantor._ranks import Ranks
from kantor.transport._cost import Cost, Encoded
from kantor.transport._row_ranks import reductions

# Columns of the `info` output of transport_potentials.
STATUS, NEWTON, PASSES, SOLVES, CG, FACTORISATIONS, NEGATIVE, ENTRIES, ERROR, DUAL, SECONDS, STEPS, COUNT = range(13)
_FIELDS = (
    "status", "newton_steps", "passes", "solves", "cg_iterations", "factorisations", "negative_curvature",
    "most_entries", "error", "dual",
)  # fmt: skip


def history_length(count: int) -> int:
    """Steps kept of each of `count` problems; longer histories are thinned."""
    return max(32, min(2048, 2**17 // max(count, 1)))


INTERRUPTED = 5


def nothing_yet(cost: Cost) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials, info and history of a solve that was interrupted before it began."""
    f, g = (torch.zeros(k, dtype=torch.float64, device=cost.device) for k in cost.shape)
    info = torch.zeros(COUNT + 1, dtype=torch.float64)
    info[STATUS], info[ERROR] = INTERRUPTED, math.inf
    return f, g, info, torch.zeros(4, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Hooks:
    """What a call of the operator cannot carry in its schema."""

    monitor: Callable[[int, float, float], bool] | None = None
    return_on_interrupt: bool = False


hooks: ContextVar[Hooks] = ContextVar("kantor_transport_hooks", default=Hooks())  # noqa: B039 (frozen)


def run(
    method: str,
    costs: Sequence[Cost],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    eps: float,
    rho: tuple[float, float],
    relative: bool,
    start: Sequence[Tensor | None],
    options: Sequence[float],
    ranks: Ranks | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Solve problems side by side; weights and potentials are float64 on the CPU.

    Rows and columns without mass are left out; their potentials are -inf, and so their part of the plan is zero. With
    `ranks` there is one problem, and its rows are those of this rank.
    """

    def over_rows(value: Tensor) -> float:
        return float(value) if ranks is None else ranks.sum(float(value))[0]

    hard = math.isinf(rho[0]) and math.isinf(rho[1])
    tasks, kept, masses = [], [], []
    for cost, a_k, b_k, start_k in zip(costs, a, b, start, strict=True):
        if hard:  # of mass 1, to the last bit: float32 weights add up to others in float64
            masses.append(over_rows(a_k.sum()))
            a_k, b_k = a_k / masses[-1], b_k / b_k.sum()
        rows, columns = (None if bool((w > 0).all()) else (w > 0).nonzero().flatten() for w in (a_k, b_k))
        part = cost.select(rows, columns)
        a_part = a_k if rows is None else a_k[rows]
        b_part = b_k if columns is None else b_k[columns]
        f = torch.zeros(part.shape[0], dtype=torch.float64)
        g = torch.zeros(part.shape[1], dtype=torch.float64)
        if start_k is not None:
            g.copy_(start_k if columns is None else start_k[columns])
            g.nan_to_num_(0.0, 0.0, 0.0)
        low, high, forbidden = part.extent(ranks)
        if start_k is not None and hard:  # whatever it is, the start is a potential of this problem
            g -= (b_part * g.clamp(-1e300, 1e300)).sum()
            reach = 2 * (high - low) + 1000 * eps
            g.clamp_(-reach, reach)
        if eps < 1e-14 * (high - low):
            raise ValueError(
                f"transport: reg: expected 0, or at least 1e-14 of the range of the cost ({high - low:.3g}), below "
                f"which exponents have no digits left; got {eps:.3g}"
            )
        numbers = [eps, *rho, float(relative), low, high, float(forbidden)]
        tasks.append((tuple(part.encode()), a_part.contiguous(), b_part.contiguous(), numbers, f, g))
        kept.append((rows, columns))
    started = time.perf_counter()
    current = hooks.get()
    threads = torch.get_num_threads()
    if ranks is None:
        outcomes = backend().transport_solve(method, tasks, list(options), current.monitor, threads)
    else:
        with reductions(ranks, tasks[0][5].numel()) as parts:
            outcomes = backend().transport_solve(method, tasks, list(options), current.monitor, threads, parts)
    seconds = time.perf_counter() - started
    if not current.return_on_interrupt and any(outcome["status"] == INTERRUPTED for outcome in outcomes):
        raise KeyboardInterrupt
    info = torch.zeros(len(tasks), COUNT + 1, dtype=torch.float64)
    length = history_length(len(tasks))
    history = torch.zeros(len(tasks), 4, length, dtype=torch.float64)
    fs, gs = [], []
    for k, (outcome, (rows, columns), task) in enumerate(zip(outcomes, kept, tasks, strict=True)):
        info[k, : len(_FIELDS)] = torch.tensor([float(outcome[name]) for name in _FIELDS], dtype=torch.float64)
        table = np.stack([outcome[name] for name in ("seconds", "eps", "errors", "steps")])
        info[k, STEPS] = table.shape[1]
        stride = -(-table.shape[1] // length) or 1
        table = table[:, ::-1][:, ::stride][:, ::-1].copy()  # the last step is always there
        info[k, SECONDS], info[k, COUNT] = seconds, table.shape[1]
        history[k, :, : table.shape[1]] = torch.from_numpy(table)
        f, g = task[4], task[5]
        if hard:
            g = g + eps * math.log(masses[k])  # P times the mass
            shift = 0.5 * (torch.dot(task[2], g) - over_rows(torch.dot(task[1], f)))
            f, g = f + shift, g - shift
        fs.append(_restored(f, rows, a[k]))
        gs.append(_restored(g, columns, b[k]))
    return fs, gs, info, history


def _restored(potential: Tensor, kept: Tensor | None, weights: Tensor) -> Tensor:
    return potential if kept is None else torch.full_like(weights, -math.inf).index_copy(0, kept, potential)


def plan_of(C: Tensor, f: Tensor, g: Tensor, eps: Tensor | float) -> Tensor:
    """``exp((f + g - C) / eps)`` in float64; zero where a potential is -inf or the cost +inf."""
    return torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps)


def softmin(C: Tensor, g: Tensor, reg: float, *, transpose: bool = False) -> Tensor:
    """``f_i = -reg log sum_j exp((g_j - C_ij) / reg)``, float64, for g (m,) or (K, m); over rows with `transpose`.

    C is (n, m), float32 or float64. One pass over C for each g; deterministic.
    """
    n, m = C.shape
    single = g.ndim == 1
    batch = g.detach().reshape(-1, n if transpose else m).to("cpu", torch.float64).contiguous()
    out = torch.empty(batch.shape[0], m if transpose else n, dtype=torch.float64)
    cost = tuple(Cost.dense(C).encode())
    threads = torch.get_num_threads()
    zero, f, sums = (torch.zeros(k, dtype=torch.float64) for k in (n, n, m))
    for row, result in zip(batch, out, strict=True):
        if transpose:
            backend().transport_column_log_sums(cost, reg, row, result, threads)
        else:
            backend().transport_sweep(cost, reg, 700.0, row, zero, result, f, sums, 1, threads)
    out = -reg * out
    return (out[0] if single else out).to(C.device)


def sweep(
    cost: Encoded, reg: float, g: Tensor, log_a: Tensor, *, repeats: int = 1, cutoff: float = 60.0
) -> tuple[Tensor, Tensor]:
    """One iteration of Sinkhorn's method, `repeats` times over: (f, column sums) for g. For benchmarks."""
    n, m = log_a.numel(), g.numel()
    log_sums, f, sums = (torch.empty(k, dtype=torch.float64) for k in (n, n, m))
    backend().transport_sweep(
        tuple(cost), reg, cutoff, g, reg * log_a, log_sums, f, sums, repeats, torch.get_num_threads()
    )
    return f, sums


# --- transport_potentials ---------------------------------------------------------------------------------------------


def _potentials_forward(
    C: Tensor, a: Tensor, b: Tensor, eps: Tensor, start: Tensor | None, rho_a: float, rho_b: float, relative: bool,
    method: str, options: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    lead, (n, m) = C.shape[:-2], C.shape[-2:]
    count = math.prod(lead)
    weights = [w.expand(*lead, w.shape[-1]).reshape(count, -1).to("cpu", torch.float64) for w in (a, b)]
    starts = [None] * count if start is None else list(start.reshape(count, m).to("cpu", torch.float64))
    costs = [Cost.dense(matrix) for matrix in C.reshape(count, n, m)]
    fs, gs, info, history = run(
        method, costs, list(weights[0]), list(weights[1]), float(eps), (rho_a, rho_b), relative, starts, options
    )
    f = torch.stack(fs).reshape(*lead, n) if count else C.new_zeros(*lead, n, dtype=torch.float64)
    g = torch.stack(gs).reshape(*lead, m) if count else C.new_zeros(*lead, m, dtype=torch.float64)
    return f.to(C.device), g.to(C.device), info.reshape(*lead, -1), history.reshape(*lead, 4, -1)


def _potentials_fake(C: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead, (n, m) = C.shape[:-2], C.shape[-2:]
    info = torch.empty(*lead, COUNT + 1, dtype=torch.float64)
    history = torch.empty(*lead, 4, history_length(math.prod(lead)), dtype=torch.float64)
    f, g = C.new_empty(*lead, n, dtype=torch.float64), C.new_empty(*lead, m, dtype=torch.float64)
    return f, g, info, history


def _system(ctx: Context) -> tuple[Tensor, ...]:
    """P, P log P, R, K of plan_solve and the marginals."""
    C, _, _, eps, _, rho_a, rho_b, *_ = ctx.inputs
    f, g = ctx.outputs[:2]
    z = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps
    P = torch.exp(z)
    entropy = torch.where(P > 0, P * torch.where(P > 0, z, 0.0), 0.0)
    r, c = P.sum(-1), P.sum(-2)
    return P, entropy, r * (1 + eps / rho_a), c * (1 + eps / rho_b), r, c


def _share(marginal: Tensor, weights: Tensor, eps: Tensor, rho: float, relative: bool) -> Tensor:
    """What a relative change of a weight adds to the right-hand side of plan_solve, per unit of the weight."""
    power = 1 + eps / rho if relative and not math.isinf(rho) else 1.0
    return eps * power * torch.where(weights > 0, marginal / torch.where(weights > 0, weights, 1.0), 0.0)


def _eps_share(marginal: Tensor, weights: Tensor, eps: Tensor, rho: float, relative: bool) -> Tensor | float:
    """The same for eps, which enters the weights of a relative entropy."""
    if not relative or math.isinf(rho):
        return 0.0
    return eps / rho * torch.where(weights > 0, marginal * torch.log(torch.where(weights > 0, weights, 1.0)), 0.0)


def _potentials_backward(ctx: Context, grad_f: Tensor | None, grad_g: Tensor | None, *_: Any) -> tuple[Any, ...]:
    C, a, b, eps, _, rho_a, rho_b, relative, *_rest = ctx.inputs
    f, g = ctx.outputs[:2]
    P, entropy, R, K, r, c = _system(ctx)
    hard = math.isinf(rho_a) and math.isinf(rho_b)
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    u = torch.zeros_like(f) if grad_f is None else torch.where(torch.isfinite(f), grad_f, 0.0)
    v = torch.zeros_like(g) if grad_g is None else torch.where(torch.isfinite(g), grad_g, 0.0)
    grad_a = grad_b = 0.0
    if hard:  # the gauge a.f = b.g
        mass = (a64.sum(-1) + b64.sum(-1)).unsqueeze(-1)
        k = (u.sum(-1, keepdim=True) - v.sum(-1, keepdim=True)) / mass
        u, v = u - k * a64, v + k * b64
        grad_a, grad_b = -k * torch.where(a64 > 0, f, 0.0), k * torch.where(b64 > 0, g, 0.0)
    xi, zeta = plan_solve(P, R, K, u, v, hard)
    both = xi.unsqueeze(-1) + zeta.unsqueeze(-2)
    grad_a = grad_a + xi * _share(r, a64, eps, rho_a, relative)
    grad_b = grad_b + zeta * _share(c, b64, eps, rho_b, relative)
    grad_eps = (entropy * both).sum()
    grad_eps = grad_eps + (xi * _eps_share(r, a64, eps, rho_a, relative)).sum()
    grad_eps = grad_eps + (zeta * _eps_share(c, b64, eps, rho_b, relative)).sum()
    return (
        (P * both).to(C.dtype),
        _reduced(grad_a, a),
        _reduced(grad_b, b),
        grad_eps.to(eps.dtype),
        *[None] * 6,
    )


def _reduced(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over the dimensions along which a weight was shared by a batch."""
    return grad.sum_to_size(like.shape).to(like.dtype)


def _potentials_jvp(
    ctx: Context, dC: Tensor | None, da: Tensor | None, db: Tensor | None, d_eps: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    _, a, b, eps, _, rho_a, rho_b, relative, *_rest = ctx.inputs
    f, g = ctx.outputs[:2]
    P, entropy, R, K, r, c = _system(ctx)
    hard = math.isinf(rho_a) and math.isinf(rho_b)
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    u, v = torch.zeros_like(f), torch.zeros_like(g)
    if dC is not None:
        change = torch.where(P > 0, P * dC, 0.0)
        u, v = u + change.sum(-1), v + change.sum(-2)
    if da is not None:
        u = u + da * _share(r, a64, eps, rho_a, relative)
    if db is not None:
        v = v + db * _share(c, b64, eps, rho_b, relative)
    if d_eps is not None:
        u = u + d_eps * (entropy.sum(-1) + _eps_share(r, a64, eps, rho_a, relative))
        v = v + d_eps * (entropy.sum(-2) + _eps_share(c, b64, eps, rho_b, relative))
    df, dg = plan_solve(P, R, K, u, v, hard)
    df, dg = torch.where(a64 > 0, df, 0.0), torch.where(b64 > 0, dg, 0.0)
    if hard:
        moved = (b64 * dg).sum(-1) - (a64 * df).sum(-1)
        if da is not None:
            moved = moved - (da * torch.where(a64 > 0, f, 0.0)).sum(-1)
        if db is not None:
            moved = moved + (db * torch.where(b64 > 0, g, 0.0)).sum(-1)
        shift = (moved / (a64.sum(-1) + b64.sum(-1))).unsqueeze(-1)
        df, dg = df + shift, dg - shift
    return df, dg


transport_potentials = declare(
    "transport_potentials(Tensor C, Tensor a, Tensor b, Tensor eps, Tensor? start, float rho_a, float rho_b, "
    "bool relative, str method, float[] options) -> (Tensor f, Tensor g, Tensor info, Tensor history)",
    forward=_potentials_forward,
    fake=_potentials_fake,
    backward=_potentials_backward,
    jvp=_potentials_jvp,
    differentiable_outputs=2,
    save_outputs=True,
)


# --- plan_solve -------------------------------------------------------------------------------------------------------


def _solve_forward(P: Tensor, R: Tensor, K: Tensor, u: Tensor, v: Tensor, singular: bool) -> tuple[Tensor, Tensor]:
    lead, (n, m) = P.shape[:-2], P.shape[-2:]
    count = math.prod(lead)
    host = [
        t.expand(*lead, *t.shape[t.ndim - tail :]).reshape(count, *t.shape[t.ndim - tail :]).to("cpu", torch.float64)
        for t, tail in ((P, 2), (R, 1), (K, 1), (u, 1), (v, 1))
    ]
    xi, zeta = torch.empty(count, n, dtype=torch.float64), torch.empty(count, m, dtype=torch.float64)
    for k in range(count):
        plan, rows, columns, u_k, v_k = (t[k].contiguous() for t in host)
        if not bool(torch.isfinite(u_k).all() & torch.isfinite(v_k).all() & torch.isfinite(plan).all()):
            xi[k], zeta[k] = math.nan, math.nan
            continue
        # Relative to the lighter of row and column: a point of little mass has derivatives like any other.
        lighter = torch.minimum(rows.unsqueeze(-1), columns.unsqueeze(-2))
        sparse = torch.where(plan > 1e-17 * lighter, plan, 0.0).to_sparse_csr()
        one = torch.ones((), dtype=torch.float64)  # stands in for rows and columns without mass
        rows, columns = torch.where(rows > 0, rows, one), torch.where(columns > 0, columns, one)
        if singular:
            u_k, v_k = _orthogonal(u_k, v_k)
        _, residual, _ = backend().transport_linear_solve(
            sparse.crow_indices().long(), sparse.col_indices().int(), sparse.values().contiguous(), rows, columns,
            u_k.contiguous(), v_k.contiguous(), xi[k], zeta[k], 1e-13, 1000, torch.get_num_threads(),
        )  # fmt: skip
        if residual > 1e-6:
            warnings.warn(
                f"derivatives of a transport plan: the linear system was solved to a relative residual of "
                f"{residual:.0e} only; the derivatives are inexact",
                RuntimeWarning,
                stacklevel=2,
            )
        if singular:
            xi[k], zeta[k] = _orthogonal(xi[k], zeta[k])
    shape = u.shape[:-1] if u.ndim > len(lead) else lead
    return xi.reshape(*shape, n).to(P.device), zeta.reshape(*shape, m).to(P.device)


def _orthogonal(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v) without its part along (1, -1)."""
    part = (u.sum() - v.sum()) / (u.numel() + v.numel())
    return u - part, v + part


def _solve_fake(P: Tensor, R: Tensor, K: Tensor, u: Tensor, v: Tensor, singular: bool) -> tuple[Tensor, Tensor]:
    lead, (n, m) = P.shape[:-2], P.shape[-2:]
    return P.new_empty(*lead, n, dtype=torch.float64), P.new_empty(*lead, m, dtype=torch.float64)


def _solve_backward(ctx: Context, grad_xi: Tensor | None, grad_zeta: Tensor | None) -> tuple[Any, ...]:
    P, R, K, _, _, singular = ctx.inputs
    xi, zeta = ctx.outputs
    p, q = plan_solve(
        P, R, K,
        torch.zeros_like(xi) if grad_xi is None else grad_xi,
        torch.zeros_like(zeta) if grad_zeta is None else grad_zeta,
        singular,
    )  # fmt: skip
    grad_P = -(p.unsqueeze(-1) * zeta.unsqueeze(-2) + xi.unsqueeze(-1) * q.unsqueeze(-2))
    return grad_P, -p * xi, -q * zeta, p, q, None


def _solve_jvp(
    ctx: Context, dP: Tensor | None, dR: Tensor | None, dK: Tensor | None, du: Tensor | None, dv: Tensor | None, _: None
) -> tuple[Tensor, Tensor]:
    P, R, K, _, _, singular = ctx.inputs
    xi, zeta = ctx.outputs
    u = torch.zeros_like(xi) if du is None else du
    v = torch.zeros_like(zeta) if dv is None else dv
    if dP is not None:
        u = u - (dP @ zeta.unsqueeze(-1)).squeeze(-1)
        v = v - (dP.mT @ xi.unsqueeze(-1)).squeeze(-1)
    if dR is not None:
        u = u - dR * xi
    if dK is not None:
        v = v - dK * zeta
    result: tuple[Tensor, Tensor] = plan_solve(P, R, K, u, v, singular)
    return result


plan_solve = declare(
    "plan_solve(Tensor P, Tensor R, Tensor K, Tensor u, Tensor v, bool singular) -> (Tensor xi, Tensor zeta)",
    forward=_solve_forward,
    fake=_solve_fake,
    backward=_solve_backward,
    jvp=_solve_jvp,
    differentiable_outputs=2,
    save_outputs=True,
)
