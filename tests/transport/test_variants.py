"""Unbalanced transport, doubly stochastic matrices and Sinkhorn divergences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import measures
from kantor.transport import doubly_stochastic, sinkhorn_divergence, solve, solve_sample, unbalanced
from measures import F32, F64, METHODS, SUITE, Problem, ends_with, error, normal, uniform, weights

STRENGTHS: dict[str, Any] = {
    "weak": 0.05,
    "strong": 5.0,
    "different": (0.3, 2.0),
    "rows hard": (None, 0.4),
    "columns hard": (0.4, None),
}


def pair(rho: Any) -> tuple[float, float]:
    both = rho if isinstance(rho, tuple) else (rho, rho)
    return tuple(math.inf if r is None else r for r in both)  # type: ignore[return-value]


def objective(P: Tensor, p: Problem, reg: float, rho: Any, kind: str) -> float:
    """What unbalanced transport minimises."""
    value = float(torch.where(P > 0, P * p.C, 0.0).sum())
    if kind == "kl":
        value += reg * measures.divergence(P, p.a[:, None] * p.b)
    else:
        value += reg * (measures.entropy(P) - float(P.sum()))
    for strength, marginal, wanted in zip(pair(rho), (P.sum(1), P.sum(0)), (p.a, p.b), strict=True):
        if math.isfinite(strength):
            value += strength * measures.divergence(marginal, wanted)
    return value


def scaling(p: Problem, reg: float, rho: Any, kind: str, sweeps: int = 20_000) -> Tensor:
    """Chizat's iteration, in plain torch: the plan."""
    base = reg * (p.a.log()[:, None] + p.b.log()) if kind == "kl" else torch.zeros(1, dtype=F64)
    g = torch.zeros_like(p.b)
    C = p.C - base
    slopes = [1.0 if math.isinf(r) else r / (r + reg) for r in pair(rho)]
    f = torch.zeros_like(p.a)
    for _ in range(sweeps):
        f_new = slopes[0] * reg * (p.a.log() - torch.logsumexp((g - C) / reg, 1))
        moved = float((f_new - f).abs().max())
        f = f_new
        g = slopes[1] * reg * (p.b.log() - torch.logsumexp((f[:, None] - C) / reg, 0))
        if moved < 1e-14:
            break
    return measures.plan(C, f, g, reg)


def with_masses(p: Problem, rho: Any) -> Problem:
    """Masses that differ."""
    return Problem(p.C, 2.5 * p.a, 1.2 * p.b)


# --- unbalanced ---


@pytest.mark.parametrize("kind", ["entropy", "kl"])
@pytest.mark.parametrize("strength", list(STRENGTHS))
@pytest.mark.parametrize("name", list(SUITE))
def test_unbalanced(name: str, strength: str, kind: str) -> None:
    """Against plain scaling iterations; the value is the objective of the plan; the error is told truly."""
    rho = STRENGTHS[strength]
    p = with_masses(SUITE[name](), rho)
    result = unbalanced(p.C, p.a, p.b, reg=0.03, rho=rho, reg_type=kind, tol=1e-12)
    assert result.converged
    expected = scaling(p, 0.03, rho, kind)
    assert error(result.plan, expected) < 1e-8
    assert float(result.value) == pytest.approx(objective(expected, p, 0.03, rho, kind), rel=1e-9)
    assert float(result.value_linear) == pytest.approx(float((expected * p.C).sum()), rel=1e-8)
    assert result.statistics["negative_curvature"] == 0
    for hard, marginal, wanted in zip(pair(rho), (expected.sum(1), expected.sum(0)), (p.a, p.b), strict=True):
        assert (float((marginal - wanted).abs().sum()) < 1e-9) == math.isinf(hard)


@pytest.mark.parametrize("kind", ["entropy", "kl"])
@pytest.mark.parametrize("strength", list(STRENGTHS))
def test_methods(strength: str, kind: str) -> None:
    """Sinkhorn's iteration finds what Newton's method finds; SNS is for hard marginals."""
    rho = STRENGTHS[strength]
    p = with_masses(measures.clouds(), rho)
    options: dict[str, Any] = {"reg": 0.02, "unbalanced": rho, "reg_type": kind, "tol": 1e-12}
    newton = solve(p.C, p.a, p.b, method="newton", **options)
    sweeps = solve(p.C, p.a, p.b, method="sinkhorn", **options)
    assert error(newton.plan, sweeps.plan) < 1e-9
    assert float(newton.value) == pytest.approx(float(sweeps.value), rel=1e-10)


@pytest.mark.parametrize("reg", [1e-3, 1e-5])
@pytest.mark.parametrize("strength", list(STRENGTHS))
@pytest.mark.parametrize("name", list(SUITE))
def test_small_regularisation(name: str, strength: str, reg: float) -> None:
    """Where scaling takes too long: the conditions of optimality, from the plan alone."""
    rho = STRENGTHS[strength]
    p = with_masses(SUITE[name](), rho)
    result = unbalanced(p.C, p.a, p.b, reg=reg, rho=rho, tol=1e-10)
    assert result.converged
    P = result.plan
    # P_ij = a_i b_j exp((u_i + v_j - C_ij) / reg) with u = -rho log(P1 / a), v alike: the potentials are set by P.
    u, v = result.potentials[0] - reg * p.a.log(), result.potentials[1] - reg * p.b.log()
    for strength_, own, marginal, wanted in zip(pair(rho), (u, v), (P.sum(1), P.sum(0)), (p.a, p.b), strict=True):
        best = wanted if math.isinf(strength_) else wanted * torch.exp(-own / strength_)
        assert float((marginal - best).abs().sum()) < 1e-9 * float(wanted.sum())


@pytest.mark.parametrize("kind", ["entropy", "kl"])
def test_nothing_is_better(kind: str) -> None:
    """Numerical minimisation over log P from a disturbed start, and random disturbances: all are worse."""
    from scipy.optimize import minimize

    C, a, b = uniform(4, 3), 2 * weights(4), weights(3)
    p = Problem(C, a, b)
    result = unbalanced(C, a, b, reg=0.1, rho=(0.5, 0.8), reg_type=kind, tol=1e-13)
    best = float(result.value)
    assert best == pytest.approx(objective(result.plan, p, 0.1, (0.5, 0.8), kind), rel=1e-11)

    def loss(log_P: np.ndarray[Any, Any]) -> float:
        return objective(torch.from_numpy(log_P).reshape(4, 3).exp(), p, 0.1, (0.5, 0.8), kind)

    found = minimize(loss, np.zeros(12), method="BFGS", options={"gtol": 1e-9})
    assert found.fun == pytest.approx(best, rel=1e-8)
    assert error(torch.from_numpy(found.x).reshape(4, 3).exp(), result.plan) < 1e-3
    for seed in range(20):
        other = result.plan * torch.exp(1e-3 * normal(4, 3, seed=seed))
        assert objective(other, p, 0.1, (0.5, 0.8), kind) > best


def test_one_by_one() -> None:
    """min_p p C + reg KL(p | a b) + rho KL(p | a) + rho KL(p | b): p^(reg + 2 rho) = (ab)^(reg + rho) exp(-C)."""
    for a, b, C, reg, rho in ((2.0, 0.5, 0.7, 0.1, 0.3), (1.0, 3.0, -0.4, 1.0, 2.0)):
        expected = ((a * b) ** (reg + rho) * math.exp(-C)) ** (1 / (reg + 2 * rho))
        tensors = [torch.tensor([x], dtype=F64) for x in (a, b)]
        result = unbalanced(torch.tensor([[C]], dtype=F64), *tensors, reg=reg, rho=rho, tol=1e-13)
        assert result.plan.item() == pytest.approx(expected, rel=1e-11)


def test_strengths_between_nothing_and_hard() -> None:
    p = measures.clouds()
    hard = solve(p.C, p.a, p.b, reg=0.02, reg_type="kl", tol=1e-12)
    masses = []
    for rho in (1e-3, 1e-2, 1e-1, 1.0, 1e2, 1e5):
        result = unbalanced(p.C, p.a, p.b, reg=0.02, rho=rho, tol=1e-11)
        masses.append(float(result.plan.sum()))
    assert masses == sorted(masses)
    assert error(result.plan, hard.plan) < 1e-4
    assert float(result.value) == pytest.approx(float(hard.value), rel=1e-4)


def test_against_pot() -> None:
    ot = pytest.importorskip("ot")
    p = with_masses(measures.clouds(), 1.0)
    for rho in (0.1, 1.0):
        expected = ot.unbalanced.sinkhorn_unbalanced(
            p.a.numpy(), p.b.numpy(), p.C.numpy(), 5e-2, rho, reg_type="kl", numItermax=20_000, stopThr=1e-13
        )
        result = unbalanced(p.C, p.a, p.b, reg=5e-2, rho=rho, tol=1e-12)
        assert error(result.plan, torch.from_numpy(expected)) < 1e-6


def test_unbalanced_points_and_batches() -> None:
    X, Y, a, b = normal(40, 2), normal(30, 2, seed=1), 2 * weights(40), weights(30)
    C = measures.squared(X, Y)
    expected = unbalanced(C, a, b, reg=0.1, rho=(1.0, None), tol=1e-12)
    result = solve_sample(X, Y, a, b, reg=0.1, unbalanced=(1.0, None), reg_type="kl", tol=1e-12)
    assert error(result.plan, expected.plan) < 1e-9
    assert float(result.value) == pytest.approx(float(expected.value), rel=1e-10)
    batch = unbalanced(torch.stack([C, C + 1]), a, b, reg=0.1, rho=(1.0, None), tol=1e-12)
    assert torch.equal(batch.plan[0], expected.plan)
    assert float(batch.value[0]) == float(expected.value)


def test_zero_weights_and_forbidden_pairs() -> None:
    """A row without allowed moves just keeps its mass: at the price of its penalty."""
    C, a, b = uniform(6, 5), weights(6), 2 * weights(5)
    C[2], a[4] = math.inf, 0.0
    with pytest.raises(ValueError, match="row 2 has mass but no allowed move"):
        unbalanced(C, a, b, reg=0.05, rho=(None, 1.0))
    C[2, 3] = 0.5
    C[1, :3] = math.inf
    result = unbalanced(C, a, b, reg=0.05, rho=1.0, tol=1e-12)
    kept = a > 0
    expected = scaling(Problem(C[kept], a[kept], b), 0.05, 1.0, "kl")
    assert error(result.plan[kept], expected) < 1e-9
    assert bool((result.plan[~kept] == 0).all())
    # Weights of zero cost nothing: KL(0 | 0) = 0.
    assert float(result.value) == pytest.approx(
        objective(expected, Problem(C[kept], a[kept], b), 0.05, 1.0, "kl"), rel=1e-9
    )


def test_barycentric_maps_and_warm_starts_of_unbalanced_problems() -> None:
    p = with_masses(measures.clouds(), 1.0)
    result = unbalanced(p.C, p.a, p.b, reg=0.01, rho=1.0)
    V = uniform(90, 2)
    torch.testing.assert_close(result.barycentric_map(V), (result.plan @ V) / result.plan.sum(1, keepdim=True))
    assert unbalanced(p.C, p.a, p.b, reg=0.01, rho=1.0, x0=result).n_iter == 0


# --- doubly stochastic ---


def affinity(n: int = 40) -> Tensor:
    X = normal(n, 3)
    return -measures.squared(X, X)


@pytest.mark.parametrize("reg", [10.0, 0.5, 0.02])
def test_doubly_stochastic(reg: float) -> None:
    A = affinity()
    result = doubly_stochastic(A, reg=reg, tol=1e-12)
    P = result.plan
    assert result.converged
    for sums in (P.sum(0), P.sum(1)):
        assert float((sums - 1).abs().sum()) < 40 * 1e-11
    assert float(P.min()) >= 0
    torch.testing.assert_close(P, P.T, rtol=1e-6, atol=1e-10)
    scale = torch.diag(P).sqrt() * torch.exp(-torch.diag(A) / (2 * reg))
    torch.testing.assert_close(P, scale[:, None] * torch.exp(A / reg) * scale, rtol=1e-6, atol=1e-10)
    assert float(result.value_linear) == pytest.approx(-float((P * A).sum()), rel=1e-9, abs=1e-9)


def test_doubly_stochastic_limits() -> None:
    A = affinity()
    torch.testing.assert_close(
        doubly_stochastic(A, reg=1e6).plan, torch.full((40, 40), 1 / 40, dtype=F64), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(doubly_stochastic(A, reg=1e-3).plan, torch.eye(40, dtype=F64), rtol=0, atol=1e-6)


def test_doubly_stochastic_without_self_loops() -> None:
    """-inf on the diagonal keeps it zero."""
    A = affinity(12).fill_diagonal_(-math.inf)
    P = doubly_stochastic(A, reg=0.5, tol=1e-12).plan
    assert bool((torch.diag(P) == 0).all())
    assert float((P.sum(1) - 1).abs().max()) < 1e-10
    torch.testing.assert_close(P, P.T, rtol=1e-8, atol=1e-12)


def test_doubly_stochastic_in_single_precision() -> None:
    A = affinity()
    P = doubly_stochastic(A.to(F32), reg=0.5).plan
    assert P.dtype is F32
    assert error(P.double(), doubly_stochastic(A, reg=0.5).plan) < 1e-4


def test_doubly_stochastic_without_a_matching() -> None:
    """A star: the leaves can only go to the centre."""
    A = torch.full((4, 4), -math.inf, dtype=F64)
    A[0], A[:, 0] = 0.0, 0.0
    ends_with("infeasible", lambda: doubly_stochastic(A, reg=0.5))


# --- Sinkhorn divergences ---


def samples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return normal(35, 2), 0.8 * normal(25, 2, seed=1) + 0.5, weights(35), weights(25)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "l1"])
@pytest.mark.parametrize("reg", [1e-3, 1.0, 10.0])
def test_divergence(reg: float, cost: str) -> None:
    """OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2, each by plain Sinkhorn; zero for equal, positive for other measures."""
    X, Y, a, b = samples()
    value = float(sinkhorn_divergence(X, Y, a, b, reg=reg, cost=cost))
    assert value > 0
    assert abs(float(sinkhorn_divergence(X, X, a, a, reg=reg, cost=cost))) < 1e-9
    permutation = torch.randperm(35)
    same = sinkhorn_divergence(X, X[permutation], a, a[permutation], reg=reg, cost=cost)
    assert abs(float(same)) < 1e-8
    assert float(sinkhorn_divergence(Y, X, b, a, reg=reg, cost=cost)) == pytest.approx(value, rel=1e-7)
    if reg < 1:
        return

    def transport(P: Tensor, Q: Tensor, u: Tensor, v: Tensor) -> float:
        C = (P[:, None] - Q[None]).abs()
        C = {"sqeuclidean": C.square().sum(-1), "euclidean": C.norm(dim=-1), "l1": C.sum(-1)}[cost]
        plan = measures.sinkhorn(C, u, v, reg)
        return float((plan * C).sum()) + reg * measures.divergence(plan, u[:, None] * v)

    expected = transport(X, Y, a, b) - (transport(X, X, a, a) + transport(Y, Y, b, b)) / 2
    assert value == pytest.approx(expected, rel=1e-7)


def test_divergence_of_a_translation() -> None:
    """Squared distances: a shift by t costs |t|^2, whatever reg is."""
    X, _, a, _ = samples()
    t = torch.tensor([0.7, -0.2], dtype=F64)
    for reg in (1e-2, 1.0, 50.0):
        assert float(sinkhorn_divergence(X, X + t, a, a, reg=reg)) == pytest.approx(float(t @ t), rel=1e-6)


def test_divergence_limits() -> None:
    """The Wasserstein cost as reg -> 0, and the squared distance of means (for |x - y|^2) as reg -> infinity."""
    X, Y, a, b = samples()
    exact = measures.exact_cost(measures.squared(X, Y), a, b)
    assert float(sinkhorn_divergence(X, Y, a, b, reg=1e-4)) == pytest.approx(exact, abs=1e-3)
    means = float((a @ X - b @ Y).square().sum())
    assert float(sinkhorn_divergence(X, Y, a, b, reg=1e5)) == pytest.approx(means, rel=1e-3)


def test_divergence_of_gaussians() -> None:
    """Closed form of entropic transport of Gaussians, thrice, on a fine grid."""
    x = torch.linspace(-10, 11, 301, dtype=F64)

    def gaussian(mean: float, deviation: float) -> Tensor:
        w = torch.exp(-((x - mean) ** 2) / (2 * deviation**2))
        return w / w.sum()

    def transport(A: float, B: float, reg: float) -> float:
        s = reg / 2
        D = math.sqrt(4 * A * B + s**2)
        return A + B - D + s * (1 - math.log(2 * s)) + s * math.log(D + s)

    for reg in (0.3, 2.0):
        expected = 0.5**2 + transport(1, 1.44, reg) - (transport(1, 1, reg) + transport(1.44, 1.44, reg)) / 2
        value = sinkhorn_divergence(x, x, gaussian(0, 1), gaussian(0.5, 1.2), reg=reg)
        assert float(value) == pytest.approx(expected, rel=1e-7)


def test_unbalanced_divergence() -> None:
    X, Y, a, b = samples()
    b = 1.7 * b

    def transport(P: Tensor, Q: Tensor, u: Tensor, v: Tensor) -> float:
        p = Problem(measures.squared(P, Q), u, v)
        return objective(scaling(p, 0.2, 1.0, "kl"), p, 0.2, 1.0, "kl")

    gap = float(a.sum() - b.sum())
    expected = transport(X, Y, a, b) - (transport(X, X, a, a) + transport(Y, Y, b, b)) / 2 + 0.1 * gap**2
    value = sinkhorn_divergence(X, Y, a, b, reg=0.2, unbalanced=1.0)
    assert float(value) == pytest.approx(expected, rel=1e-7)
    assert float(value) > 0
    assert abs(float(sinkhorn_divergence(X, X, a, a, reg=0.2, unbalanced=1.0))) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_divergence_takes_options(method: str) -> None:
    X, Y, a, b = samples()
    expected = float(sinkhorn_divergence(X, Y, a, b, reg=1.0))
    value = sinkhorn_divergence(X, Y, a, b, reg=1.0, method=method, tol=1e-11, density=0.9)
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_divergence_against_geomloss() -> None:
    geomloss = pytest.importorskip("geomloss")
    X, Y, a, b = samples()
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.99, backend="tensorized", debias=True)
    # Its cost is |x - y|^2 / 2 and its regularisation blur^2.
    value = sinkhorn_divergence(X, Y, a, b, reg=0.5)
    assert float(value) / 2 == pytest.approx(float(loss(a, X, b, Y)), rel=1e-3)
