"""Implicit derivatives of value, plan, potentials and points, and the solver under torch's transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch.autograd import gradcheck, gradgradcheck

import measures
import op_checks
from kantor.transport import (
    TransportStatus,
    _native,
    _value,
    doubly_stochastic,
    sinkhorn_divergence,
    solve,
    solve_sample,
)
from measures import F32, F64, error, normal, uniform, weights
from op_checks import Arguments, OpCase, Rand

N, M = 4, 3
TIGHT: dict[str, Any] = {"tol": 1e-14, "max_iter": 200}
KINDS = pytest.mark.parametrize("kind", ["entropy", "kl"])
STRENGTHS: dict[str, Any] = {
    "hard": None,
    "penalised": (0.7, 1.5),
    "rows hard": (None, 0.5),
    "columns hard": (0.5, None),
}
STRENGTH = pytest.mark.parametrize("strength", list(STRENGTHS))


@pytest.fixture(autouse=True)
def rounding_level() -> Any:
    """A tolerance of 1e-14 may end at the rounding level, with a warning."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="solve", category=RuntimeWarning)
        yield


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.clone().requires_grad_() for t in tensors)


def problem(n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    return uniform(n, m), weights(n), weights(m, seed=1)


def solution(
    C: Tensor, a: Tensor, b: Tensor, reg: Tensor | float, strength: str = "hard", kind: str = "entropy"
) -> Any:
    """The solve, with weights of one mass whatever finite differences do to them."""
    rho = STRENGTHS[strength]
    if rho is None:
        a, b = a / a.sum(), b / b.sum()
    elif strength == "rows hard":
        b = 1.5 * b
    return solve(C, a, b, reg=reg, unbalanced=rho, reg_type=kind, **TIGHT)


OUTPUTS: dict[str, Callable[[Any], Any]] = {
    "value": lambda result: result.value,
    "plan": lambda result: result.plan,
    "potentials": lambda result: result.potentials,
    "value_linear": lambda result: result.value_linear,
}


# --- against finite differences ---


@KINDS
@STRENGTH
@pytest.mark.parametrize("output", list(OUTPUTS))
def test_gradcheck(output: str, strength: str, kind: str) -> None:
    """First derivatives in C, a, b and reg: reverse and forward."""
    C, a, b = problem()
    reg = torch.tensor(0.3, dtype=F64)
    assert gradcheck(
        lambda *args: OUTPUTS[output](solution(*args, strength, kind)),
        leaves(C, a, b, reg),
        eps=1e-5,
        atol=1e-6,
        rtol=1e-6,
        check_forward_ad=True,
    )


@KINDS
@STRENGTH
@pytest.mark.parametrize("output", list(OUTPUTS))
def test_gradgradcheck(output: str, strength: str, kind: str) -> None:
    """Second derivatives: reverse over reverse, and forward over reverse."""
    C, a, b = problem(3, 2)
    reg = torch.tensor(0.3, dtype=F64)
    assert gradgradcheck(
        lambda *args: OUTPUTS[output](solution(*args, strength, kind)),
        leaves(C, a, b, reg),
        eps=1e-5,
        atol=1e-5,
        rtol=1e-5,
        check_fwd_over_rev=True,
    )


@STRENGTH
def test_batched_gradients(strength: str) -> None:
    C, a, b = problem()
    assert gradcheck(
        lambda C, a, b: solution(C, a, b, 0.3, strength).plan,
        leaves(C, a, b),
        eps=1e-5,
        atol=1e-6,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


def test_batches_of_problems() -> None:
    """Shared and own weights; reg is shared."""
    C = torch.stack([uniform(N, M, seed=seed) for seed in range(2)])
    a, b = weights(N), torch.stack([weights(M, seed=seed) for seed in range(2)])
    reg = torch.tensor(0.2, dtype=F64)

    def call(C: Tensor, a: Tensor, b: Tensor, reg: Tensor) -> tuple[Tensor, ...]:
        result = solve(C, a / a.sum(), b / b.sum(-1, keepdim=True), reg=reg, **TIGHT)
        return result.value, result.plan, *result.potentials, result.value_linear

    assert gradcheck(call, leaves(C, a, b, reg), eps=1e-5, atol=1e-6, check_forward_ad=True)
    alone = leaves(C[1], a, b[1])
    together = leaves(C, a, b)
    solve(*alone, reg=0.2, **TIGHT).plan.square().sum().backward()
    solve(*together, reg=0.2, **TIGHT).plan[1].square().sum().backward()
    assert together[0].grad is not None
    torch.testing.assert_close(together[0].grad[1], alone[0].grad, rtol=1e-10, atol=1e-14)
    assert not together[0].grad[0].any()
    torch.testing.assert_close(together[1].grad, alone[1].grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", list(measures.SUITE))
@pytest.mark.parametrize("reg", [1e-1, 1e-2, 1e-3])
def test_larger_problems(name: str, reg: float) -> None:
    """Directional derivatives of every output against central differences, on the suite."""
    p = measures.SUITE[name]()
    n, m = p.C.shape
    direction = normal(n, m, seed=3)
    row = normal(n, seed=4) * p.a
    column = normal(m, seed=5) * p.b
    row, column = row - p.a * row.sum(), column - p.b * column.sum()
    if name == "random" and reg < 1e-2:  # nearly an assignment, whose parts next to no mass joins: none in the weights
        row, column = 0 * row, 0 * column
    weight = normal(n, m, seed=6)

    def outputs(t: Tensor) -> tuple[Tensor, Tensor]:
        size = 0.1 * reg  # relative to the scale on which the plan changes
        result = solve(p.C + t * size * direction, p.a + 0.1 * t * row, p.b + 0.1 * t * column, reg=reg, tol=1e-13)
        return result.value, (result.plan * weight).sum() * n

    h = 1e-3
    t = torch.zeros((), dtype=F64, requires_grad=True)
    ahead, behind = ([float(x.detach()) for x in outputs(torch.tensor(s, dtype=F64))] for s in (h, -h))
    for output, high, low in zip(outputs(t), ahead, behind, strict=True):
        (slope,) = torch.autograd.grad(output, t, retain_graph=True)
        size = max(abs(float(slope)), 1e-4 * float(output.detach().abs()))
        assert float(slope) == pytest.approx((high - low) / (2 * h), rel=2e-4, abs=1e-4 * size)


def test_envelope_theorem() -> None:
    """dC = P, da = f, db = g up to a constant, d reg = sum P log P."""
    p = measures.clouds()
    C, a, b, reg = leaves(p.C, p.a, p.b, torch.tensor(0.01, dtype=F64))
    result = solve(C, a, b, reg=reg, tol=1e-12)
    grad_C, grad_a, grad_b, grad_reg = torch.autograd.grad(result.value, (C, a, b, reg))
    P = result.plan.detach()
    torch.testing.assert_close(grad_C, P, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_a, result.potentials[0].detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad_b, result.potentials[1].detach(), rtol=1e-12, atol=1e-14)
    assert float(grad_reg) == pytest.approx(measures.entropy(P), rel=1e-10)


def test_derivative_of_the_plan_by_a_dense_solve() -> None:
    """dL/dC = P o (xi + zeta - G) / reg with [diag r, P; P', diag c] [xi; zeta] = [(P o G) 1; (P o G)' 1]."""
    p = measures.clouds(20, 15)
    reg, G = 0.05, normal(20, 15, seed=2)
    (C,) = leaves(p.C)
    result = solve(C, p.a, p.b, reg=reg, tol=1e-14)
    (grad,) = torch.autograd.grad((result.plan * G).sum(), C)
    P = result.plan.detach()
    top = torch.cat([torch.diag(P.sum(1)), P], 1)
    system = torch.cat([top, torch.cat([P.T, torch.diag(P.sum(0))], 1)])
    right = torch.cat([(P * G).sum(1), (P * G).sum(0)])
    both = torch.linalg.lstsq(system, right, driver="gelsd").solution
    expected = P * (both[:20, None] + both[20:] - G) / reg
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
    # Marginals that stay: rows and columns of the derivative sum to what moves nothing.
    assert float(grad.sum().abs()) < 1e-10 * float(grad.abs().sum())


def test_unrolled_iterations_agree() -> None:
    """torch's own derivative of five hundred iterations of Sinkhorn."""
    C, a, b = problem(8, 6)
    reg, G = 0.1, normal(8, 6, seed=2)
    unrolled = leaves(C, a, b)
    g = torch.zeros(6, dtype=F64)
    for _ in range(500):
        f = reg * (unrolled[1].log() - torch.logsumexp((g - unrolled[0]) / reg, 1))
        g = reg * (unrolled[2].log() - torch.logsumexp((f[:, None] - unrolled[0]) / reg, 0))
    expected = torch.autograd.grad((measures.plan(unrolled[0], f, g, reg) * G).sum(), unrolled)
    implicit = leaves(C, a, b)
    actual = torch.autograd.grad((solve(*implicit, reg=reg, **TIGHT).plan * G).sum(), implicit)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-8, atol=1e-11)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):  # up to a constant: masses must stay equal
        torch.testing.assert_close(got - got.mean(), wanted - wanted.mean(), rtol=1e-8, atol=1e-10)


# --- points ---


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1", "lp", "cosine", "callable"])
def test_points(cost: str) -> None:
    """All outputs, to second order, where the problem is small enough to be solved as a matrix."""
    X, Y, a, b = normal(3, 2), normal(2, 2, seed=1), weights(3), weights(2, seed=1)
    reg = torch.tensor(0.5, dtype=F64)
    options: dict[str, Any] = {"cost": cost, "p": 3.0, **TIGHT}
    if cost == "callable":
        options["cost"] = lambda x, y: torch.log1p(measures.squared(x, y))

    def call(X: Tensor, Y: Tensor, a: Tensor, b: Tensor, reg: Tensor) -> tuple[Tensor, ...]:
        result = solve_sample(X, Y, a / a.sum(), b / b.sum(), reg=reg, **options)
        return result.value, result.plan, *result.potentials, result.value_linear, result.apply(Y)

    arguments = leaves(X, Y, a, b, reg)
    assert gradcheck(call, arguments, eps=1e-5, atol=1e-6, check_forward_ad=True)
    assert gradgradcheck(lambda *args: call(*args)[0], arguments, eps=1e-5, atol=1e-5)


@STRENGTH
@KINDS
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1", "lp", "cosine", "callable"])
def test_points_beyond_a_matrix(cost: str, kind: str, strength: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large problems: the gradient of the value is taken tile by tile, and is the gradient of the small way."""
    import sys

    module = sys.modules["kantor.transport.solve_sample"]
    X, Y, a, b = normal(40, 2), normal(30, 2, seed=1), weights(40), weights(30, seed=1)
    if strength != "hard":
        b = 1.3 * b
    reg = torch.tensor(0.3, dtype=F64)
    options: dict[str, Any] = {"cost": cost, "p": 3.0, "tol": 1e-13, "reg_type": kind}
    options["unbalanced"] = STRENGTHS[strength]
    if cost == "callable":
        options["cost"] = lambda x, y: torch.log1p(measures.squared(x, y))
    gradients = []
    for limit in (1 << 24, 0):
        monkeypatch.setattr(module, "_DENSE_NUMBERS", limit)
        arguments = leaves(X, Y, a, b, reg)
        result = solve_sample(*arguments[:4], reg=arguments[4], **options)
        gradients.append(torch.autograd.grad(3 * result.value, arguments))
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_gradient_of_points_is_the_displacement() -> None:
    """For |x - y|^2: dX = 2 a (x - barycentric map)."""
    X, Y, a = normal(50, 3), normal(60, 3, seed=1), weights(50)
    (x,) = leaves(X)
    result = solve_sample(x, Y, a, reg=0.1, tol=1e-12)
    (grad,) = torch.autograd.grad(result.value, x)
    expected = 2 * a[:, None] * (X - result.barycentric_map().detach())
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


def test_points_that_coincide_have_finite_derivatives() -> None:
    X = normal(6, 2)
    for cost, p in (("euclidean", 2.0), ("l1", 2.0), ("lp", 1.5), ("lp", 0.5), ("sqeuclidean", 2.0)):
        x, y = leaves(X, X.flip(0))
        sinkhorn_divergence(x, y, reg=0.1, cost=cost, p=p).backward()
        assert x.grad is not None
        assert y.grad is not None
        assert bool(torch.isfinite(x.grad).all())
        assert bool(torch.isfinite(y.grad).all())


def test_divergences() -> None:
    X, Y, a, b = normal(4, 2), normal(3, 2, seed=1), weights(4), weights(3, seed=1)

    def call(X: Tensor, Y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn_divergence(X, Y, a / a.sum(), b / b.sum(), reg=0.4, **TIGHT)

    assert gradcheck(call, leaves(X, Y, a, b), eps=1e-5, atol=1e-6, check_forward_ad=True)
    x, w = leaves(X, a)
    grad_x, grad_w = torch.autograd.grad(sinkhorn_divergence(x, X, w, a, reg=0.4, **TIGHT), (x, w))
    assert float(grad_x.abs().max()) < 1e-9
    assert float((grad_w - grad_w.mean()).abs().max()) < 1e-9

    def soft(X: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sinkhorn_divergence(X, Y, a, 2 * b, reg=0.4, unbalanced=0.8, **TIGHT)

    assert gradcheck(soft, leaves(X, a, b), eps=1e-5, atol=1e-6, check_forward_ad=True)


def test_divergence_with_a_learned_regularisation() -> None:
    reg = torch.tensor(0.4, dtype=F64, requires_grad=True)
    X, Y = normal(4, 2), normal(3, 2, seed=1)
    assert gradcheck(lambda reg: sinkhorn_divergence(X, Y, reg=reg, **TIGHT), (reg,), eps=1e-5, atol=1e-6)
    assert gradcheck(
        lambda reg: sinkhorn_divergence(X, Y, 2 * weights(4), weights(3), reg=reg, unbalanced=1.0, **TIGHT),
        (reg,),
        eps=1e-5,
        atol=1e-6,
    )


def test_doubly_stochastic() -> None:
    def call(A: Tensor) -> Tensor:
        return doubly_stochastic((A + A.T) / 2, reg=0.5, **TIGHT).plan

    assert gradcheck(call, leaves(normal(4, 4)), eps=1e-5, atol=1e-6, check_forward_ad=True)


# --- what has no derivative, or an odd one ---


def test_forbidden_pairs_and_zero_weights_have_derivative_zero() -> None:
    C, a, b = problem(5, 4)
    C[0, 1], C[3, 2] = math.inf, math.inf
    a[2], b[3] = 0.0, 0.0
    a, b = a / a.sum(), b / b.sum()
    C_, a_, b_ = leaves(C, a, b)
    result = solve(C_, a_, b_, reg=0.1, **TIGHT)
    f, g = result.potentials
    loss = result.value + result.plan.square().sum() + f[a > 0].square().sum() + g[b > 0].sum() + result.value_linear
    gradients = torch.autograd.grad(loss, (C_, a_, b_))
    for grad in gradients:
        assert bool(torch.isfinite(grad).all())
    assert gradients[0][0, 1] == gradients[0][3, 2] == 0
    assert not gradients[0][2].any()
    assert not gradients[0][:, 3].any()
    kept_a, kept_b = a > 0, b > 0
    part = leaves(C[kept_a][:, kept_b], a[kept_a], b[kept_b])
    alone = solve(*part, reg=0.1, **TIGHT)
    f, g = alone.potentials
    loss = alone.value + alone.plan.square().sum() + f.square().sum() + g.sum() + alone.value_linear
    expected = torch.autograd.grad(loss, part)
    torch.testing.assert_close(gradients[0][kept_a][:, kept_b], expected[0], rtol=1e-8, atol=1e-11)
    both, wanted = torch.cat([gradients[1][kept_a], gradients[2][kept_b]]), torch.cat(expected[1:])
    sign = torch.cat([torch.ones(4, dtype=F64), -torch.ones(3, dtype=F64)])
    gauge = (sign * (both - wanted)).mean()  # equal masses: (s, -s) changes nothing
    torch.testing.assert_close(both - gauge * sign, wanted, rtol=1e-8, atol=1e-11)


def test_derivatives_of_parts_that_nothing_connects() -> None:
    """Two blocks: the system has two null vectors, the plan's derivative exists."""
    inf = math.inf
    C = torch.tensor(
        [[0.1, 0.4, inf, inf], [0.3, 0.2, inf, inf], [inf, inf, 0.5, 0.1], [inf, inf, 0.2, 0.7]], dtype=F64
    )

    def plan(block: Tensor) -> Tensor:
        full = torch.full((4, 4), inf, dtype=F64)
        full = torch.where(torch.isfinite(C), torch.block_diag(block[:2], block[2:]), full)
        return solve(full, reg=0.2, **TIGHT).plan

    blocks = torch.cat([C[:2, :2], C[2:, 2:]])
    assert gradcheck(plan, leaves(blocks), eps=1e-5, atol=1e-6, check_forward_ad=True)


def test_small_regularisation_has_finite_derivatives() -> None:
    """An assignment that does not change: the derivative of the plan vanishes, that of the value is the plan."""
    C = uniform(30, 30)
    (C_,) = leaves(C)
    result = solve(C_, reg=1e-6)
    (grad,) = torch.autograd.grad(result.value + (result.plan * normal(30, 30)).sum(), C_)
    assert bool(torch.isfinite(grad).all())
    torch.testing.assert_close(grad, result.plan.detach(), rtol=0, atol=1e-4)


def test_no_derivatives_when_not_asked_for() -> None:
    C, a, b = problem()
    result = solve(*leaves(C, a, b), reg=0.3, grad="none")
    outputs = (result.value, result.plan, *result.potentials, result.value_linear)
    assert not any(t.requires_grad for t in outputs)
    with torch.no_grad():
        result = solve(*leaves(C, a, b), reg=0.3)
    assert not result.value.requires_grad
    result = solve(*leaves(C, a, b), reg=0.3)
    assert all(t.requires_grad for t in (result.value, result.plan, *result.potentials, result.value_linear))
    result = solve_sample(*leaves(normal(3, 2), normal(4, 2)), reg=0.3, grad="none")
    assert not result.value.requires_grad


def test_exact_values_have_derivatives() -> None:
    """reg = 0: the value's derivative is the plan of the last regularisation; the rounded plan has none."""
    p = measures.clouds(20, 15)
    (C,) = leaves(p.C)
    result = solve(C, p.a, p.b, reg=0)
    (grad,) = torch.autograd.grad(result.value, C)
    assert measures.marginal_error(grad, p.a, p.b) < 1e-8
    assert error(grad, result.plan) < 1e-2
    assert not result.plan.requires_grad


def test_single_precision() -> None:
    C, a, b = problem(20, 15)
    wide, narrow = leaves(C, a, b), leaves(C.to(F32), a.to(F32), b.to(F32))
    G = normal(20, 15)
    for tensors in (wide, narrow):
        result = solve(*tensors, reg=0.05)
        (result.value + (result.plan * G.to(result.plan.dtype)).sum()).backward()
    for exact, rough in zip(wide, narrow, strict=True):
        assert exact.grad is not None
        assert rough.grad is not None
        assert rough.grad.dtype is F32
        assert error(rough.grad.double() - rough.grad.mean(), exact.grad - exact.grad.mean()) < 1e-4


def test_apply_has_derivatives() -> None:
    """With respect to V through the plan that is never formed, and to the problem where it is."""
    C, a, b = problem(6, 5)
    V = normal(5, 2)
    result = solve(C, a, b, reg=0.2, **TIGHT)
    assert gradcheck(result.apply, leaves(V))
    assert gradcheck(lambda V: result.apply(V, transpose=True), leaves(normal(6, 2)))
    assert gradcheck(result.barycentric_map, leaves(V))
    assert gradcheck(
        lambda C, V: solve(C, a, b, reg=0.2, **TIGHT).barycentric_map(V), leaves(C, V), eps=1e-5, atol=1e-6
    )


def test_starts_do_not_matter() -> None:
    C, a, b = leaves(*problem(8, 6))
    G = normal(8, 6)
    first = solve(C, a, b, reg=0.1, **TIGHT)
    again = solve(C, a, b, reg=0.1, x0=first, **TIGHT)
    grads = [torch.autograd.grad((result.plan * G).sum(), (C, a, b)) for result in (first, again)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_gradient_descent_matches_clouds() -> None:
    """The textbook use: moving points by the gradient of a divergence brings one cloud onto another."""
    Y = normal(30, 2, seed=1)
    x = (0.3 * normal(30, 2) + 2).requires_grad_()
    first = float(sinkhorn_divergence(x.detach(), Y, reg=0.05))
    for _ in range(25):
        (grad,) = torch.autograd.grad(sinkhorn_divergence(x, Y, reg=0.05, tol=1e-6), x)
        x = (x - 0.5 * 30 * grad).detach().requires_grad_()
    assert float(sinkhorn_divergence(x.detach(), Y, reg=0.05)) < 1e-3 * first


# --- torch.func, compile ---


def test_vmap_is_the_loop() -> None:
    C = torch.stack([uniform(6, 5, seed=seed) for seed in range(3)])
    a, b = torch.stack([weights(6, seed=seed) for seed in range(3)]), weights(5)
    expected = torch.stack([solve(C[k], a[k], b, reg=0.1).plan for k in range(3)])
    actual = torch.vmap(lambda C, a: solve(C, a, b, reg=0.1).plan)(C, a)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
    last = torch.vmap(lambda C: solve(C, a[0], b, reg=0.1).value, in_dims=2)(C.permute(1, 2, 0))
    torch.testing.assert_close(last[1], solve(C[1], a[0], b, reg=0.1).value, rtol=1e-12, atol=0)
    shared = torch.vmap(lambda a: solve(C[0], a, b, reg=0.1).potentials[0])(a)
    torch.testing.assert_close(shared[2], solve(C[0], a[2], b, reg=0.1).potentials[0], rtol=1e-12, atol=1e-15)


def test_vmap_over_regularisations() -> None:
    C, a, b = problem(6, 5)
    regs = torch.tensor([0.05, 0.2, 1.0], dtype=F64)
    values = torch.vmap(lambda reg: solve(C, a, b, reg=reg).value)(regs)
    expected = torch.stack([solve(C, a, b, reg=float(reg)).value for reg in regs])
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)


def test_vmap_over_points() -> None:
    X, Y = torch.stack([normal(6, 2, seed=seed) for seed in range(3)]), normal(5, 2, seed=9)
    values = torch.vmap(lambda x: solve_sample(x, Y, reg=0.3).value)(X)
    expected = torch.stack([solve_sample(x, Y, reg=0.3).value for x in X])
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)


def test_functional_derivatives() -> None:
    C, a, b = problem(5, 4)

    def value(C: Tensor) -> Tensor:
        out: Tensor = solve(C, a, b, reg=0.2, **TIGHT).value
        return out

    P = solve(C, a, b, reg=0.2, **TIGHT).plan
    torch.testing.assert_close(func.grad(value)(C), P, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(func.jacfwd(value)(C), P, rtol=1e-9, atol=1e-13)
    reverse = func.jacrev(lambda C: solve(C, a, b, reg=0.2, **TIGHT).plan)(C)
    forward = func.jacfwd(lambda C: solve(C, a, b, reg=0.2, **TIGHT).plan)(C)
    hessian = func.hessian(value)(C)
    torch.testing.assert_close(forward, reverse, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(hessian, reverse, rtol=1e-8, atol=1e-11)
    flat = hessian.reshape(20, 20)
    torch.testing.assert_close(flat, flat.T, rtol=1e-8, atol=1e-11)
    assert float(torch.linalg.eigvalsh((flat + flat.T) / 2).max()) < 1e-10  # the value is concave in C
    rows = torch.stack([C, C + 0.1 * normal(5, 4)])
    torch.testing.assert_close(torch.vmap(func.grad(value))(rows)[0], P, rtol=1e-9, atol=1e-13)
    _, tangent = func.jvp(value, (C,), (rows[1] - C,))
    torch.testing.assert_close(tangent, (P * (rows[1] - C)).sum(), rtol=1e-9, atol=1e-13)


def test_result_of_a_traced_solve_says_so() -> None:
    results: list[Any] = []

    def traced(C: Tensor) -> Tensor:
        results.append(solve(C, reg=0.1))
        out: Tensor = results[0].value
        return out

    torch.vmap(traced)(uniform(3, 6, 5))
    assert results[0].status is TransportStatus.UNCHECKED
    assert not results[0].converged
    assert math.isnan(results[0].marginal_error)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    """One graph, with gradients, also after the size changes."""
    torch._dynamo.reset()

    def step(C: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        result = solve(C, a, b, reg=0.1)
        return result.value, result.plan, *result.potentials

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for n, m in ((6, 5), (8, 7)):
        args = (uniform(n, m), weights(n), weights(m))
        eager = op_checks.with_gradients(step, args)
        graph = op_checks.with_gradients(compiled, args)
        torch.testing.assert_close(graph, eager, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_points(backend: str) -> None:
    torch._dynamo.reset()
    Y = normal(5, 2, seed=1)

    def step(X: Tensor) -> Tensor:
        return sinkhorn_divergence(X, Y, reg=0.3)

    eager = op_checks.with_gradients(step, [normal(6, 2)])
    graph = op_checks.with_gradients(torch.compile(step, fullgraph=True, backend=backend), [normal(6, 2)])
    torch.testing.assert_close(graph, eager, rtol=1e-8, atol=1e-11)


# --- the operators, through the harness of all operators ---

POTENTIALS = torch.ops.kantor.transport_potentials.default
PLAN_SOLVE = torch.ops.kantor.plan_solve.default
VALUE = torch.ops.kantor.transport_value.default
NUMBERS = [1e-13, 500.0, 0.0, 1e9, 1.0, 0.0, 20.0, 0.0, 0.0]
HARD = (math.inf, math.inf)


def equal_masses(C: Tensor, a: Tensor, b: Tensor, *rest: Any) -> Arguments:
    return C, a / a.sum(), b / b.sum(), *rest


def sinkhorn_potentials(C: Tensor, a: Tensor, b: Tensor, eps: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Plain Sinkhorn, in the gauge a.f = b.g."""
    g = torch.zeros_like(b)
    for _ in range(400):
        f = eps * (a.log() - torch.logsumexp((g - C) / eps, 1))
        g = eps * (b.log() - torch.logsumexp((f[:, None] - C) / eps, 0))
    shift = (b @ g - a @ f) / (a.sum() + b.sum())
    return f + shift, g - shift


def potentials_sample(size: int, rand: Rand) -> Arguments:
    a, b = rand(size).abs() + 0.5, rand(size + 2).abs() + 0.5
    eps = torch.tensor(0.5, dtype=F64)
    return *equal_masses(rand(size, size + 2).abs(), a, b, eps), None, *HARD, False, "newton", NUMBERS


def value_sample(size: int, rand: Rand) -> Arguments:
    C, a, b, eps, *_ = potentials_sample(size, rand)
    f, g = sinkhorn_potentials(C, a, b, eps)
    return C, a, b, eps, f, g, *HARD, False


def plan_solve_sample(size: int, rand: Rand) -> Arguments:
    P = rand(size, size + 1).square() + 0.01
    return P, P.sum(1) + 0.1, P.sum(0) + 0.2, rand(size), rand(size + 1), False


def dominant(P: Tensor, R: Tensor, K: Tensor, *rest: Any) -> Arguments:
    """Diagonals that are at least the sums of P, whatever they were."""
    return P, P.sum(-1) + R.abs(), P.sum(-2) + K.abs(), *rest


def plan_solve_oracle(P: Tensor, R: Tensor, K: Tensor, u: Tensor, v: Tensor, _: bool) -> tuple[Tensor, Tensor]:
    system = torch.cat([torch.cat([torch.diag(R), P], 1), torch.cat([P.mT, torch.diag(K)], 1)])
    both = torch.linalg.solve(system, torch.cat([u, v]))
    return both[: len(u)], both[len(u) :]


CASES = [
    OpCase(
        "transport_potentials",
        call=POTENTIALS,
        sample=potentials_sample,
        oracle=sinkhorn_potentials,
        differentiable=(0, 1, 2),
        outputs=2,
        differentiable_outputs=2,
        free=(0,),
        constrain=equal_masses,
        condition=lambda *args: 1e4,
        factor=64.0,
        sizes=(1, 2, 9, 33),
        small_size=3,
        large_size=203,
    ),
    OpCase(
        "plan_solve",
        call=PLAN_SOLVE,
        sample=plan_solve_sample,
        oracle=plan_solve_oracle,
        differentiable=(0, 1, 2, 3, 4),
        outputs=2,
        differentiable_outputs=2,
        free=(3, 4),
        constrain=dominant,
        condition=lambda *args: 1e4,
        factor=64.0,
        op=PLAN_SOLVE,
        sizes=(1, 2, 9, 33),
        small_size=3,
        large_size=203,
    ),
]


@pytest.mark.parametrize(("check", "case", "device"), op_checks.parameters(CASES))
def test_operator(check: Callable[..., None], case: OpCase, device: str) -> None:
    op_checks.run(check, case, device)


def test_the_operator_of_the_potentials() -> None:
    """torch's own checks. Its outputs tell the time it took, so that two calls are never the same in all of them."""
    for wanted in (False, True):
        args = potentials_sample(4, lambda *shape: normal(*shape))
        args = *(t.requires_grad_(wanted) for t in args[:4]), *args[4:]
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(POTENTIALS, args, test_utils=checks)


def test_the_operator_of_the_value() -> None:
    """Its derivatives hold at the optimum only: torch's checks of schema and registration, and its value."""
    args = value_sample(4, lambda *shape: normal(*shape))
    value = VALUE(*args)
    C, _, _, eps, f, g, *_ = args
    P = measures.plan(C, f, g, float(eps))
    assert float(value) == pytest.approx(float((P * C).sum()) + float(eps) * measures.entropy(P), rel=1e-8)
    torch.library.opcheck(VALUE, args, test_utils=("test_schema", "test_faketensor"))
    assert _value.transport_value is not None
    assert _native.plan_solve is not None


def test_singular_systems() -> None:
    """Hard marginals: (1, -1) is a null vector; the solution is orthogonal to it, as is what is solved for."""
    P = normal(6, 5).square()
    R, K, u, v = P.sum(1), P.sum(0), normal(6, seed=1), normal(5, seed=2)
    xi, zeta = PLAN_SOLVE(P, R, K, u, v, True)
    system = torch.cat([torch.cat([torch.diag(R), P], 1), torch.cat([P.T, torch.diag(K)], 1)])
    expected = torch.linalg.pinv(system) @ torch.cat([u, v])
    torch.testing.assert_close(torch.cat([xi, zeta]), expected, rtol=1e-9, atol=1e-11)
    assert float(xi.sum()) == pytest.approx(float(zeta.sum()), abs=1e-11)
