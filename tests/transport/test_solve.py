"""Entropic transport of a cost matrix: identities of the optimum, closed forms, and other people's answers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import measures
from kantor.transport import TransportResult, TransportStatus, sinkhorn, solve
from measures import F32, F64, METHODS, SUITE, Problem, ends_with, error, exact_cost, marginal_error, uniform, weights

EVERY = pytest.mark.parametrize("name", list(SUITE))
METHOD = pytest.mark.parametrize("method", METHODS)


def solved(problem: Problem, reg: float, **options: Any) -> TransportResult:
    result: TransportResult = solve(problem.C, problem.a, problem.b, reg=reg, **options)
    assert result.converged
    return result


# --- what an optimum is ---


@pytest.mark.parametrize("reg", [3e-1, 3e-2, 1e-3, 1e-4])
@EVERY
def test_optimality(name: str, reg: float) -> None:
    """A plan of the form exp((f + g - C) / reg) with the right marginals is the optimum; primal and dual agree."""
    p = SUITE[name]()
    result = solved(p, reg, tol=1e-12)
    f, g = result.potentials
    P = result.plan
    assert torch.equal(P, measures.plan(p.C, f, g, reg))
    assert marginal_error(P, p.a, p.b) < 1e-11
    assert result.marginal_error == pytest.approx(marginal_error(P, p.a, p.b), rel=1e-3, abs=1e-11)
    linear = float((P * p.C).sum())
    primal, dual = linear + reg * measures.entropy(P), float(p.a @ f + p.b @ g)
    assert float(result.value_linear) == pytest.approx(linear, rel=1e-11)
    assert float(result.value) == pytest.approx(primal, rel=1e-10)
    assert dual == pytest.approx(primal + reg * (float(P.sum()) - 1), rel=1e-10)
    assert float(p.a @ f) == pytest.approx(float(p.b @ g), rel=1e-12, abs=1e-14)  # the gauge
    assert result.statistics["negative_curvature"] == 0


@METHOD
@EVERY
def test_methods_agree(name: str, method: str) -> None:
    """With a larger density than the published one, which is unsafe for images (below)."""
    p = SUITE[name]()
    reg = 5e-2 if name == "mixture" else 2e-2
    result = solved(p, reg, method=method, tol=1e-11, density=0.5)
    assert result.method == method
    assert error(result.plan, measures.sinkhorn(p.C, p.a, p.b, reg)) < 1e-9
    kinds = set(result.history["kind"])
    assert kinds <= {"newton", "sinkhorn"}
    assert "newton" not in kinds or method != "sinkhorn"
    assert result.n_newton == sum(result.history["kind"] == "newton")


def test_published_density_is_unsafe_and_says_so() -> None:
    """Two entries a row are not enough for a plan that has many more: SNS then ends with a status, not an answer."""
    p = measures.images(power=1)
    with pytest.warns(RuntimeWarning, match="solve: (stalled|max_iter)"):
        result = solve(p.C, p.a, p.b, reg=1e-3, method="sns", tol=1e-10, max_iter=100)
    assert not result.converged
    assert result.marginal_error > 1e-6
    assert solved(p, 1e-3, tol=1e-10).marginal_error < 1e-10


@pytest.mark.parametrize("reg", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("scale", [1, 2])
@EVERY
@pytest.mark.slow
def test_the_suite_is_solved(name: str, scale: int, reg: float, size: str) -> None:
    """Marginals to 1e-9 in at most 200 Newton steps, without one event of negative curvature."""
    scale *= 3 if size == "full" else 1
    p = {
        "random": lambda: measures.random_cost(90 * scale),
        "image, squared": lambda: measures.images(8 + 4 * scale),
        "image, l1": lambda: measures.images(8 + 4 * scale, power=1),
        "clouds": lambda: measures.clouds(110 * scale, 90 * scale),
        "mixture": lambda: measures.mixture(120 * scale, 80 * scale),
    }[name]()
    result = solved(p, reg)
    assert result.marginal_error <= 1e-9
    assert marginal_error(result.plan, p.a, p.b) <= 1.1e-9
    assert result.n_newton <= 200
    assert result.statistics["negative_curvature"] == 0


@pytest.mark.slow
def test_published_random_problem(size: str) -> None:
    """Random costs, eta = 1200: SNS needs at most a hundred Newton steps to 1e-13, Sinkhorn's iteration thousands."""
    n = 500 if size == "full" else 200
    C = uniform(n, n, seed=3)
    sns = solve(C, reg=1 / 1200, method="sns", tol=1e-13)
    assert sns.converged
    assert sns.n_newton <= 100
    newton = solve(C, reg=1 / 1200, method="newton", tol=1e-13)
    assert newton.converged
    assert error(newton.plan, sns.plan) < 1e-9
    limit = 20_000 if size == "full" else 3_000
    plain = ends_with("max_iter", lambda: sinkhorn(C, reg=1 / 1200, relaxation=1.0, tol=1e-11, max_iter=limit))
    assert plain.marginal_error > 1e-11
    assert plain.n_sweeps >= limit


# --- invariances ---


@pytest.mark.parametrize("reg", [5e-2, 1e-3])
@EVERY
def test_invariances(name: str, reg: float) -> None:
    p = SUITE[name]()
    P = solved(p, reg, tol=1e-13).plan
    tolerance = 1e-9 if reg < 1e-2 else 1e-11  # 1e-13 of the marginals, times the condition of the problem

    scaled = solved(Problem(8 * p.C, p.a, p.b), 8 * reg, tol=1e-13)
    assert error(scaled.plan, P) < tolerance
    mass = solved(Problem(p.C, 4 * p.a, 4 * p.b), reg, tol=1e-13)
    assert error(mass.plan, 4 * P) < tolerance
    u, v = 0.1 * uniform(len(p.a), seed=5), 0.1 * uniform(len(p.b), seed=6)
    shifted = solved(Problem(p.C + u[:, None] + v, p.a, p.b), reg, tol=1e-13)
    assert error(shifted.plan, P) < tolerance
    transposed = solved(Problem(p.C.T, p.b, p.a), reg, tol=1e-13)
    assert error(transposed.plan, P.T) < tolerance
    rows, columns = torch.randperm(len(p.a)), torch.randperm(len(p.b))
    permuted = solved(Problem(p.C[rows][:, columns], p.a[rows], p.b[columns]), reg, tol=1e-13)
    assert error(permuted.plan, P[rows][:, columns]) < tolerance
    negative = solved(Problem(p.C - 0.75, p.a, p.b), reg, tol=1e-13)
    assert error(negative.plan, P) < tolerance


def test_a_power_of_two_changes_no_bit() -> None:
    p = measures.clouds()
    first, second = solved(p, 2**-8), solved(Problem(4 * p.C, p.a, p.b), 2**-6)
    assert torch.equal(4 * first.potentials[0], second.potentials[0])
    assert torch.equal(first.plan, second.plan)


# --- closed forms ---


@METHOD
def test_one_by_one(method: str) -> None:
    result = solve(torch.tensor([[3.0]], dtype=F64), reg=0.5, method=method)
    assert result.plan.item() == pytest.approx(1, abs=1e-15)
    assert float(result.value) == pytest.approx(3)
    assert [float(t) for t in result.potentials] == pytest.approx([1.5, 1.5])


@METHOD
@pytest.mark.parametrize("shape", [(1, 7), (7, 1)])
def test_one_row_or_column(shape: tuple[int, int], method: str) -> None:
    C, w = uniform(*shape), weights(7)
    a, b = (torch.ones(1, dtype=F64), w) if shape[0] == 1 else (w, torch.ones(1, dtype=F64))
    result = solve(C, a, b, reg=0.01, method=method)
    torch.testing.assert_close(result.plan, a[:, None] * b, rtol=1e-12, atol=0)
    assert float(result.value_linear) == pytest.approx(float((w * C.flatten()).sum()), rel=1e-12)


@METHOD
@pytest.mark.parametrize("reg", [0.05, 0.3, 2.0])
def test_two_by_two(reg: float, method: str) -> None:
    """P_11 = x solves x (1 - a - b + x) = k (a - x)(b - x), k = exp(-(C_11 + C_22 - C_12 - C_21) / reg)."""
    C = torch.tensor([[0.1, 0.9], [0.7, 0.4]], dtype=F64)
    a, b = 0.3, 0.6
    k = math.exp(-(0.1 + 0.4 - 0.9 - 0.7) / reg)
    p, q, r = 1 - k, 1 - a - b + k * (a + b), -k * a * b
    x = -2 * r / (q + math.sqrt(q * q - 4 * p * r))
    result = solve(
        C, torch.tensor([a, 1 - a], dtype=F64), torch.tensor([b, 1 - b], dtype=F64), reg=reg, method=method, tol=1e-13
    )
    expected = torch.tensor([[x, a - x], [b - x, 1 - a - b + x]], dtype=F64)
    torch.testing.assert_close(result.plan, expected, rtol=1e-9, atol=1e-13)


def test_product_costs_give_product_plans() -> None:
    """C = u + v: the plan is a b' whatever reg is."""
    u, v, a, b = uniform(30), uniform(20, seed=1), weights(30), weights(20, seed=1)
    for reg in (1e-6, 1e-2, 1.0, 1e3):
        result = solved(Problem(u[:, None] + v, a, b), reg, tol=max(1e-15 / reg, 1e-12))
        assert error(result.plan, a[:, None] * b) < 1e-9


def test_large_regularisation_gives_the_product() -> None:
    p = measures.clouds()
    result = solved(p, 1e6)
    assert error(result.plan, p.a[:, None] * p.b) < 1e-5
    assert result.n_newton == 0


@pytest.mark.parametrize("power", [1.5, 2.0, 3.0])
def test_line_against_the_monotone_coupling(power: float) -> None:
    """Convex costs on a line: as reg -> 0 the value is the integral of |F^-1 - G^-1|^p over the quantiles."""
    x, y = uniform(60).sort().values, 0.5 * uniform(45, seed=1).sort().values + 0.7
    a, b = weights(60), weights(45, seed=1)
    ends = torch.cat([a.cumsum(0), b.cumsum(0)]).sort().values
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    middle = (starts + ends) / 2
    at = [points[torch.searchsorted(w.cumsum(0), middle).clamp(max=len(w) - 1)] for points, w in ((x, a), (y, b))]
    expected = float(((ends - starts) * (at[0] - at[1]).abs() ** power).sum())
    C = (x[:, None] - y).abs() ** power
    for reg in (1e-3, 1e-5, 1e-6):
        linear = float(solved(Problem(C, a, b), reg * float(C.max())).value_linear)
        assert expected * (1 - 1e-9) <= linear <= expected + reg * float(C.max()) * math.log(45)
    exact = solve(C, a, b, reg=0)
    assert float(exact.value_linear) == pytest.approx(expected, abs=1e-5 * float(C.max()) * math.log(45))


def test_gaussians() -> None:
    """Entropic transport of Gaussians (Janati, Muzellec, Peyre, Cuturi 2020), on a grid so fine that sums are exact."""
    x = torch.linspace(-10, 12, 441, dtype=F64)

    def gaussian(mean: float, deviation: float) -> Tensor:
        w = torch.exp(-((x - mean) ** 2) / (2 * deviation**2))
        return w / w.sum()

    C = (x[:, None] - x) ** 2
    for reg in (0.2, 1.0, 5.0):
        s, m, deviations = reg / 2, 1.3, (0.8, 1.1)  # 2 sigma^2 = reg
        A, B = deviations[0] ** 2, deviations[1] ** 2
        D = math.sqrt(4 * A * B + s**2)
        expected = m**2 + A + B - D + s * (1 - math.log(2 * s)) + s * math.log(D + s)
        a, b = gaussian(0.0, deviations[0]), gaussian(m, deviations[1])
        result = solve(C, a, b, reg=reg, reg_type="kl", tol=1e-12)
        assert float(result.value) == pytest.approx(expected, rel=1e-9)
        covariance = (D - s) / 2
        middle = (x.abs() < 3).nonzero().flatten()
        mapped = result.barycentric_map(x)[middle]
        torch.testing.assert_close(mapped, m + covariance / A * x[middle], rtol=0, atol=1e-6)


def test_gradient_of_a_convex_function() -> None:
    """Brenier: points moved by the gradient of a convex function stay matched to where they came from."""
    grid = torch.linspace(-1, 1, 9, dtype=F64)
    X = torch.cartesian_prod(grid, grid)
    S = torch.tensor([[1.5, 0.4], [0.4, 0.8]], dtype=F64)
    Y = X @ S + 0.3 * X**3
    C = measures.squared(X, Y)
    n, expected = len(X), float((X - Y).square().sum(1).mean())
    result = solve(C, reg=1e-3 * float(C.max()))
    assert expected * (1 - 1e-9) <= float(result.value_linear) <= expected + result.reg * math.log(n)
    exact = solve(C, reg=0)
    assert torch.equal(exact.plan.argmax(1), torch.arange(n))
    assert float(exact.value_linear) == pytest.approx(expected, rel=1e-5)
    assert exact.duality_gap <= 1e-5 * float(C.max()) * math.log(n)


# --- against other solvers ---


@EVERY
def test_against_plain_sinkhorn(name: str) -> None:
    p = SUITE[name]()
    for reg in (1.0, 0.1, 0.02):
        assert error(solved(p, reg, tol=1e-12).plan, measures.sinkhorn(p.C, p.a, p.b, reg)) < 1e-9


@EVERY
def test_against_pot(name: str) -> None:
    ot = pytest.importorskip("ot")
    p = SUITE[name]()
    for reg in (1e-1, 1e-2):
        expected = ot.sinkhorn(
            p.a.numpy(), p.b.numpy(), p.C.numpy(), reg, method="sinkhorn_log", numItermax=20_000, stopThr=1e-12
        )
        result = solved(p, reg, tol=1e-12)
        assert float((result.plan - torch.from_numpy(expected)).abs().max()) < 1e-8
        kl = solve(p.C, p.a, p.b, reg=reg, reg_type="kl", tol=1e-12)
        reference = ot.solve(p.C.numpy(), p.a.numpy(), p.b.numpy(), reg=reg, reg_type="KL", max_iter=20_000, tol=1e-12)
        assert float(kl.value) == pytest.approx(float(reference.value), rel=1e-7)
        assert float(kl.value_linear) == pytest.approx(float(reference.value_linear), rel=1e-7)


@EVERY
def test_against_regot(name: str) -> None:
    regot = pytest.importorskip("regot")
    p = SUITE[name]()
    found = regot.sinkhorn_ssns(p.C.numpy(), p.a.numpy(), p.b.numpy(), 1e-3, tol=1e-11, max_iter=1000)
    expected = torch.tensor(np.asarray(found.plan))
    if marginal_error(expected, p.a, p.b) > 1e-9:
        pytest.skip("regot has not converged")
    assert float((solved(p, 1e-3, tol=1e-12).plan - expected).abs().max()) < 1e-8


@EVERY
def test_towards_the_exact_cost(name: str) -> None:
    """EMD <= <P, C> <= EMD + reg min(H(a), H(b)), and <P, C> grows with reg."""
    p = SUITE[name]()
    expected = exact_cost(p.C, p.a, p.b)
    bound = min(-measures.entropy(p.a), -measures.entropy(p.b))
    assert bound <= math.log(min(p.C.shape)) + 1e-12
    costs = []
    for reg in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        linear = float(solved(p, reg).value_linear)
        assert expected - 1e-8 <= linear <= expected + reg * bound + 1e-8
        costs.append(linear)
    assert all(low <= high + 1e-9 for low, high in pairwise(costs))


@EVERY
def test_exact(name: str) -> None:
    """reg = 0: a feasible plan, and a bound from below that the linear program confirms."""
    p = SUITE[name]()
    result = solve(p.C, p.a, p.b, reg=0)
    assert result.converged
    expected = exact_cost(p.C, p.a, p.b)
    P = result.plan
    assert marginal_error(P, p.a, p.b) < 1e-13
    assert float(P.min()) >= 0
    linear = float(result.value_linear)
    assert linear == pytest.approx(float((P * p.C).sum()), rel=1e-12)
    assert result.lower_bound - 1e-12 <= expected <= linear + 1e-12
    assert result.duality_gap == pytest.approx(linear - result.lower_bound, abs=1e-15)
    assert 0 <= result.duality_gap <= 1.1e-5 * math.log(min(p.C.shape))
    assert result.reg == pytest.approx(1e-5 * float(p.C.max() - p.C.min()))
    assert torch.equal(result.plan_sparse().to_dense(), P)
    assert float((result.apply(torch.ones_like(p.b)) - p.a).abs().sum()) < 1e-13


def test_exact_assignment() -> None:
    from scipy.optimize import linear_sum_assignment

    C = uniform(80, 80, seed=2)
    rows, columns = linear_sum_assignment(C.numpy())
    result = solve(C, reg=0)
    assert result.plan.argmax(1).tolist() == columns.tolist()
    assert float(result.value_linear) == pytest.approx(float(C[rows, columns].mean()), rel=1e-6)


def test_exact_constant() -> None:
    """Any plan is optimal, and the bound says so."""
    result = solve(torch.full((4, 5), 2.0, dtype=F64), reg=0)
    assert float(result.value_linear) == pytest.approx(2)
    assert result.duality_gap == pytest.approx(0, abs=1e-9)


# --- which entropy ---


@EVERY
def test_entropies(name: str) -> None:
    """The same plan; values that differ by the entropies of the weights."""
    p = SUITE[name]()
    first, second = (solve(p.C, p.a, p.b, reg=0.03, reg_type=kind, tol=1e-12) for kind in ("entropy", "kl"))
    assert error(second.plan, first.plan) < 1e-9
    P = first.plan
    assert float(first.value) == pytest.approx(float((P * p.C).sum()) + 0.03 * measures.entropy(P), rel=1e-9)
    relative = measures.divergence(P, p.a[:, None] * p.b)
    assert float(second.value) == pytest.approx(float((P * p.C).sum()) + 0.03 * relative, rel=1e-9)


def test_values_for_any_mass() -> None:
    p = measures.clouds()
    a, b = 3 * p.a, 3 * p.b
    for kind in ("entropy", "kl"):
        result = solve(p.C, a, b, reg=0.03, reg_type=kind, tol=1e-12)
        P = result.plan
        penalty = measures.entropy(P) if kind == "entropy" else measures.divergence(P, a[:, None] * b)
        assert float(result.value) == pytest.approx(float((P * p.C).sum()) + 0.03 * penalty, rel=1e-9)


# --- single precision, batches, sequences ---


@pytest.mark.parametrize("reg", [1e-1, 1e-3, 1e-5])
@EVERY
def test_single_precision(name: str, reg: float) -> None:
    """A float32 problem is solved as exactly as the float64 problem with the same numbers, masses made equal."""
    p = SUITE[name]()
    C, a, b = (t.to(F32) for t in (p.C, p.a, p.b))
    result = solve(C, a, b, reg=reg)
    assert result.converged
    assert result.plan.dtype is F32
    assert {t.dtype for t in (*result.potentials, result.value, result.value_linear)} == {F64}
    wide_b = b.double() * (a.double().sum() / b.double().sum())
    exact = solve(C.double(), a.double(), wide_b, reg=reg)
    assert torch.equal(exact.plan.to(F32), result.plan)
    assert float(result.value) == pytest.approx(float(exact.value), rel=1e-7)
    assert float(result.value_linear) == pytest.approx(float(solve(p.C, p.a, p.b, reg=reg).value_linear), rel=1e-4)


@METHOD
def test_batches_are_loops(method: str) -> None:
    """The same bits as one after the other, whatever the number of steps each takes."""
    C = torch.stack([uniform(30, 20, seed=seed) ** (1 + seed) for seed in range(5)])
    a, b = (torch.stack([weights(n, seed=seed) for seed in range(5)]) for n in (30, 20))
    result = solve(C, a, b, reg=0.05, method=method)
    assert result.converged
    assert result.value.shape == (5,)
    assert result.value_linear.shape == (5,)
    assert len(result.per_problem_status) == len(result.per_problem_error) == 5
    for k in range(5):
        alone = solve(C[k], a[k], b[k], reg=0.05, method=method)
        assert torch.equal(result.plan[k], alone.plan)
        assert torch.equal(result.potentials[0][k], alone.potentials[0])
        assert float(result.value[k]) == float(alone.value)
        assert result.per_problem_error[k] == alone.marginal_error
        assert float(result.value_linear[k]) == pytest.approx(float(alone.value_linear), rel=1e-12)
    assert result.marginal_error == max(result.per_problem_error)
    shared = solve(C, a[0], b[0], reg=0.05, method=method)
    assert torch.equal(shared.plan[3], solve(C[3], a[0], b[0], reg=0.05, method=method).plan)


def test_one_problem_of_a_batch_fails_alone() -> None:
    C = torch.stack([uniform(6, 6, seed=seed) for seed in range(3)])
    C[1, :3, 2:] = math.inf  # three rows into two columns
    result = ends_with("infeasible", lambda: solve(C, reg=0.05))
    good, bad = TransportStatus.CONVERGED, TransportStatus.INFEASIBLE
    assert result.per_problem_status == [good, bad, good]
    assert torch.equal(result.plan[2], solve(C[2], reg=0.05).plan)


def test_sequences() -> None:
    shapes = ((5, 7), (12, 3), (4, 4))
    costs = [uniform(*shape, seed=k) for k, shape in enumerate(shapes)]
    a, b = [weights(n) for n, _ in shapes], [weights(m) for _, m in shapes]
    results = solve(costs, a, b, reg=0.02)
    assert [r.plan.shape for r in results] == [torch.Size(s) for s in shapes]
    for result, C, a_k, b_k in zip(results, costs, a, b, strict=True):
        assert torch.equal(result.plan, solve(C, a_k, b_k, reg=0.02).plan)
    again = solve(costs, a, b, reg=0.02, x0=results)
    assert all(result.n_iter == 0 for result in again)
    assert solve([], reg=0.1) == []


def test_layouts_change_no_bit() -> None:
    p = measures.clouds()
    expected = solved(p, 1e-3).plan
    wide = torch.zeros(220, 180, dtype=F64)
    wide[::2, ::2] = p.C
    for C in (p.C.T.contiguous().T, wide[::2, ::2], torch._neg_view(-p.C)):
        assert torch.equal(solve(C, p.a, p.b, reg=1e-3).plan, expected)
    before = p.C.clone()
    solve(p.C, p.a, p.b, reg=1e-3)
    assert torch.equal(p.C, before)
    flat = torch.tensor(0.5, dtype=F64).expand(7, 5)
    torch.testing.assert_close(solve(flat, reg=0.1).plan, torch.full((7, 5), 1 / 35, dtype=F64))


# --- what a result offers ---


def test_result() -> None:
    p = measures.clouds()
    result = solved(p, 1e-3)
    P = result.plan
    assert result.status is TransportStatus.CONVERGED
    assert result.check() is result
    assert result.method == "newton"
    assert result.reason.startswith("newton: sparse Newton steps")
    assert result.reg == 1e-3
    assert result.shape == (110, 90)
    history = result.history
    assert set(history) == {"marginal_error", "seconds", "reg", "kind"}
    assert {len(column) for column in history.values()} == {result.n_iter}
    assert history["marginal_error"][-1] == pytest.approx(result.marginal_error, rel=1e-6)
    assert (np.diff(history["seconds"]) >= 0).all()
    assert (np.diff(history["reg"]) <= 0).all()
    assert history["reg"][-1] == 1e-3
    assert result.n_sweeps > result.n_newton > 0
    text = repr(result)
    for word in ("transport by newton", "converged", "110 x 90", "marginal error", "sweeps", "chosen"):
        assert word in text
    assert solved(p, 1e-3, method="newton").reason == ""
    assert solved(p, 0.3).reason == "newton: at this reg its opening sweeps converged by themselves"

    V = uniform(90, 4)
    torch.testing.assert_close(result.apply(V), P @ V, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(result.apply(V[:, 0]), P @ V[:, 0], rtol=1e-12, atol=1e-16)
    U = uniform(110, 3)
    torch.testing.assert_close(result.apply(U, transpose=True), P.T @ U, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(result.barycentric_map(V), (P @ V) / P.sum(1, keepdim=True), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.barycentric_map(V[:, 0]), (P @ V[:, 0]) / P.sum(1), rtol=1e-12, atol=0)
    assert result.apply(V.to(F32)).dtype is F32


def test_sparse_plans() -> None:
    p = measures.clouds()
    result = solved(p, 1e-3)
    P = result.plan
    for threshold in (0.0, 1e-12, 1e-6, 1e-4, 1.0):
        sparse = result.plan_sparse(threshold)
        assert sparse.layout is torch.sparse_csr
        torch.testing.assert_close(sparse.to_dense(), torch.where(threshold < P, P, 0.0), rtol=1e-12, atol=1e-300)
    assert float((P - result.plan_sparse().to_dense()).sum()) <= 1e-6
    assert result.plan_sparse()._nnz() < P.numel() / 4


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    ax = solved(measures.clouds(), 1e-3).plot()
    assert len(ax.lines) >= 1
    pyplot.close("all")


@METHOD
def test_warm_starts(method: str) -> None:
    p = measures.clouds()
    first = solved(p, 0.02, method=method, density=0.5)
    again = solved(p, 0.02, method=method, x0=first, density=0.5)
    assert again.n_iter == 0
    assert torch.equal(solved(p, 0.02, method=method, x0=first.potentials, density=0.5).plan, again.plan)
    assert torch.equal(solved(p, 0.02, method=method, density=0.5, **first.state).plan, again.plan)
    near = solved(p, 0.019, method=method, x0=first, density=0.5)
    assert near.n_iter <= solved(p, 0.019, method=method, density=0.5).n_iter
    poor = (torch.zeros(110, dtype=F64), 100 * uniform(90, seed=9))
    far = solved(p, 0.02, method="newton", x0=poor)
    assert error(far.plan, again.plan) < 1e-6


def test_sinkhorn_options() -> None:
    """Over-relaxation saves sweeps; starting from a larger reg changes the way, not the answer."""
    p = measures.clouds()
    plain, measured = sinkhorn(p.C, p.a, p.b, reg=5e-3, relaxation=1.0), sinkhorn(p.C, p.a, p.b, reg=5e-3)
    fixed = sinkhorn(p.C, p.a, p.b, reg=5e-3, relaxation=1.5)
    scaled = sinkhorn(p.C, p.a, p.b, reg=5e-3, eps_scaling=True)
    assert measured.n_sweeps < plain.n_sweeps / 2
    expected = solved(p, 5e-3, tol=1e-12).plan
    for result in (plain, measured, fixed, scaled):
        assert result.converged
        assert result.method == "sinkhorn"
        assert result.n_newton == 0
        assert error(result.plan, expected) < 1e-5
    assert scaled.history["reg"][0] > scaled.history["reg"][-1] == 5e-3


def test_regularisation_as_a_number_of_any_kind() -> None:
    p = measures.clouds()
    expected = solved(p, 0.5).plan
    for reg in (np.float64(0.5), torch.tensor(0.5, dtype=F64), torch.tensor([0.5], dtype=F32)):
        assert torch.equal(solve(p.C, p.a, p.b, reg=reg).plan, expected)  # type: ignore[arg-type]
    assert torch.equal(solved(p, 1).plan, solved(p, 1.0).plan)
