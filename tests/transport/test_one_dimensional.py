"""Transport on the line, against linear programming, assignment, scipy and quantile functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog
from scipy.special import ndtri
from scipy.stats import wasserstein_distance
from torch import Tensor

from kantor.transport.one_dimensional import plan_1d, wasserstein_1d

F64 = torch.float64
INF = math.inf


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed + 100).softmax(-1)


def by_linear_programming(x: Tensor, y: Tensor, a: Tensor, b: Tensor, p: float) -> float:
    n, m = len(x), len(y)
    cost = (x[:, None] - y).abs().pow(p)
    rows, columns = np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))
    found = linprog(
        cost.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a.numpy(), b.numpy()])
    )
    return float(found.fun ** (1 / p))


# --- values ---


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 6), (7, 5), (6, 6), (4, 12)])
def test_linear_programming(n: int, m: int, p: float) -> None:
    x, y, a, b = draw(n, seed=1), draw(m, seed=2), weights(n), weights(m, seed=1)
    uniform_x, uniform_y = torch.full((n,), 1 / n, dtype=F64), torch.full((m,), 1 / m, dtype=F64)
    cases: list[tuple[Any, Any]] = [(None, None), (a, None), (None, b), (a, b)]
    for u, v in cases:
        expected = by_linear_programming(x, y, uniform_x if u is None else u, uniform_y if v is None else v, p)
        assert float(wasserstein_1d(x, y, u, v, p=p)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [1, 2, 5])
def test_assignment(p: float) -> None:
    x, y = draw(60, seed=1), draw(60, seed=2)
    cost = (x[:, None] - y).abs().pow(p).numpy()
    rows, columns = linear_sum_assignment(cost)
    expected = cost[rows, columns].mean() ** (1 / p)
    assert float(wasserstein_1d(x, y, p=p)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scipy(dtype: torch.dtype) -> None:
    x, y, a, b = draw(700, seed=1).to(dtype), draw(450, seed=2).to(dtype), weights(700), weights(450, seed=1)
    expected = wasserstein_distance(x, y, a, b)
    got = wasserstein_1d(x, y, a.to(dtype), b.to(dtype))
    assert got.dtype == dtype
    assert float(got) == pytest.approx(expected, rel=20 * torch.finfo(dtype).eps)


def test_pot() -> None:
    ot = pytest.importorskip("ot")
    x, y, a, b = draw(50, seed=1), draw(80, seed=2), weights(50), weights(80, seed=1)
    for p in (1, 2, 3):
        expected = ot.wasserstein_1d(x.numpy(), y.numpy(), a.numpy(), b.numpy(), p=p) ** (1 / p)
        assert float(wasserstein_1d(x, y, a, b, p=p)) == pytest.approx(float(expected), rel=1e-12)


def test_quantiles_of_gaussians() -> None:
    """W_2 of normal distributions is the distance of (mean, deviation), seen through a fine grid of quantiles."""
    t = torch.from_numpy(ndtri((np.arange(200_000) + 0.5) / 200_000))
    assert float(wasserstein_1d(1 + 2 * t, -0.5 + 0.5 * t, p=2)) == pytest.approx(math.hypot(1.5, 1.5), rel=1e-5)


def test_longest_move() -> None:
    x, y = draw(9, seed=1), draw(9, seed=2)
    assert float(wasserstein_1d(x, y, p=INF)) == float((x.sort().values - y.sort().values).abs().max())
    three, six = torch.tensor([0.0, 1.0, 2.0], dtype=F64), torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0, 2.1], dtype=F64)
    third, sixth = torch.full((3,), 1 / 3, dtype=F64), torch.full((6,), 1 / 6, dtype=F64)
    # Sums of 1/3 and of 1/6 differ by rounding; the cuts must be taken for one.
    for dtype in (torch.float32, F64):
        moves = wasserstein_1d(three.to(dtype), six.to(dtype), third.to(dtype), sixth.to(dtype), p=INF)
        assert float(moves) == pytest.approx(0.1, rel=1e-6)
    assert float(wasserstein_1d(three, six, p=INF)) == pytest.approx(0.1)
    assert float(wasserstein_1d(three, six, p=200)) == pytest.approx(0.1, rel=1e-2)


def test_uniform_weights_are_exact() -> None:
    """Shares of 1 / (n m) of the mass count, below the rounding unit of float32."""
    x, y = torch.zeros(4001), torch.zeros(4000)
    x[-1] = y[-1] = 1
    for p in (1, 2, INF):
        expected = (1 / 4000 - 1 / 4001) ** (1 / p)
        assert float(wasserstein_1d(x, y, p=p)) == pytest.approx(expected, rel=1e-5)


def test_large_exponents_do_not_overflow() -> None:
    x, y = torch.tensor([0.0, 1e30]), torch.tensor([1e30, 3e30])
    assert float(wasserstein_1d(x, y, p=2)) == pytest.approx(1e30 * math.sqrt(2.5), rel=1e-6)
    assert float(wasserstein_1d(x, y, p=300)) == pytest.approx(2e30, rel=1e-2)
    tiny = torch.tensor([0.0]), torch.tensor([1e-30])
    assert float(wasserstein_1d(*tiny, p=4)) == pytest.approx(1e-30, rel=1e-6)


def test_large_problem() -> None:
    n = 1_000_000
    x = torch.rand(n, generator=torch.Generator().manual_seed(0))
    assert float(wasserstein_1d(x, x.flip(0) + 0.25, p=2)) == pytest.approx(0.25, rel=1e-6)


# --- weights ---


def test_zero_weights_are_left_out() -> None:
    x, y, a, b = draw(8, seed=1), draw(6, seed=2), weights(5), weights(6, seed=1)
    holes = torch.zeros(8, dtype=F64)
    holes[[0, 2, 3, 5, 6]] = a
    far = x.clone()
    far[[1, 4, 7]] = torch.tensor([1e300, -1e300, 5.0], dtype=F64)
    for p in (1, 2, 7, INF):
        expected = wasserstein_1d(x[[0, 2, 3, 5, 6]], y, a, b, p=p)
        assert float(wasserstein_1d(far, y, holes, b, p=p)) == pytest.approx(float(expected), rel=1e-12)
        u = holes.clone().requires_grad_()
        positions = far.clone().requires_grad_()
        grads = torch.autograd.grad(wasserstein_1d(positions, y, u, b, p=p), [positions, u], allow_unused=True)
        assert bool((grads[0][[1, 4, 7]] == 0).all())
        assert bool(torch.isfinite(grads[0]).all())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=8))
@example([0, 0, 0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 2])
@settings(deadline=None, max_examples=60)
def test_duplicates_and_coinciding_cuts(left: list[int], right: list[int]) -> None:
    """Points and weights of few values, where almost all cuts coincide, against repetition of the points."""
    x, y = torch.tensor(left, dtype=F64), torch.tensor(right, dtype=F64)
    a, b = torch.tensor([1.0 + v % 2 for v in left]).double(), torch.tensor([1.0 + v // 2 for v in right]).double()
    many_x, many_y = x.repeat_interleave(a.long() * int(b.sum())), y.repeat_interleave(b.long() * int(a.sum()))
    for p in (1, 2, INF):
        expected = wasserstein_1d(many_x, many_y, p=p)
        got = wasserstein_1d(x, y, a / a.sum(), b / b.sum(), p=p)
        assert float(got) == pytest.approx(float(expected), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_mass(p: float) -> None:
    x, y, a, b = draw(5, seed=1), draw(7, seed=2), weights(5), weights(7, seed=1)
    assert float(wasserstein_1d(x, y, 8 * a, 8 * b, p=p)) == pytest.approx(
        8 ** (1 / p) * float(wasserstein_1d(x, y, a, b, p=p)), rel=1e-13
    )


def test_masses_equal_up_to_rounding_pass() -> None:
    x, y, a, b = draw(900, seed=1).float(), draw(700, seed=2).float(), weights(900).float(), weights(700).float()
    assert math.isfinite(float(wasserstein_1d(x, y, a, b * (1 + 3e-7))))


# --- the plan ---


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (5, 3), (4, 4), (6, 9)])
@pytest.mark.parametrize("weighted", [False, True])
def test_plan(n: int, m: int, weighted: bool) -> None:
    x, y = draw(n, seed=1), draw(m, seed=2)
    a, b = (weights(n), weights(m, seed=1)) if weighted else (None, None)
    rows, columns, mass = plan_1d(x, y, a, b)
    assert rows.shape == columns.shape == mass.shape == (n + m - 1,)
    P = torch.zeros(n, m, dtype=F64).index_put((rows, columns), mass, accumulate=True)
    full_a = torch.full((n,), 1 / n, dtype=F64) if a is None else a
    full_b = torch.full((m,), 1 / m, dtype=F64) if b is None else b
    assert bool((mass >= 0).all())
    torch.testing.assert_close(P.sum(1), full_a, rtol=0, atol=1e-15)
    torch.testing.assert_close(P.sum(0), full_b, rtol=0, atol=1e-15)
    for p in (1, 2):
        cost = float((P * (x[:, None] - y).abs().pow(p)).sum() ** (1 / p))
        assert cost == pytest.approx(float(wasserstein_1d(x, y, a, b, p=p)), rel=1e-13)
    assert bool((torch.diff(x[rows]) >= 0).all())
    assert bool((torch.diff(y[columns]) >= 0).all())


def test_plan_wants_one_problem() -> None:
    with pytest.raises(ValueError, match=r"^plan_1d: x: expected the points of one problem, .*got \(2, 3\)"):
        plan_1d(draw(2, 3), draw(3))


# --- batches and transforms ---


def test_batch_is_a_loop() -> None:
    x, y = draw(3, 1, 6, seed=1), draw(4, 5, seed=2)
    a, b = weights(6), weights(3, 4, 5, seed=1)
    batch = wasserstein_1d(x, y, a, b, p=2)
    assert batch.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert float(batch[i, j]) == pytest.approx(float(wasserstein_1d(x[i, 0], y[j], a, b[i, j], p=2)), rel=1e-14)
    assert wasserstein_1d(draw(0, 6), draw(0, 5)).shape == (0,)
    torch.testing.assert_close(torch.func.vmap(wasserstein_1d)(x[:, 0], y[:3]), wasserstein_1d(x[:, 0], y[:3]))
    torch.testing.assert_close(
        torch.func.vmap(lambda x, b: wasserstein_1d(x, y[0], a, b, p=2))(x[:, 0], b[:, 0]), batch[:, 0]
    )


def test_layout_does_not_matter() -> None:
    x, y = draw(6, 9, seed=1), draw(9, seed=2)
    assert torch.equal(wasserstein_1d(x.T, y.expand(9, 9)), wasserstein_1d(x.T.contiguous(), y))


def test_same_bits_for_any_number_of_threads() -> None:
    x, y, a = draw(40_000, seed=1), draw(40_000, seed=2), weights(40_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(plan_1d(x, y, a)[2])
    torch.set_num_threads(before)
    assert torch.equal(*results)


# --- derivatives ---


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_derivatives(p: float) -> None:
    inputs = [t.requires_grad_() for t in (draw(2, 5, seed=1), draw(4, seed=2), draw(2, 5, seed=3), draw(4, seed=4))]

    def function(x: Tensor, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return wasserstein_1d(x, y, s.softmax(-1), t.softmax(-1), p=p)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (6, 4)])
def test_derivatives_with_uniform_weights(n: int, m: int) -> None:
    inputs = [draw(n, seed=1).requires_grad_(), draw(m, seed=2).requires_grad_()]
    for p in (1, 2, INF):
        assert torch.autograd.gradcheck(lambda x, y, p=p: wasserstein_1d(x, y, p=p), inputs)


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_of_weights_are_potentials(p: float) -> None:
    x, y = draw(6, seed=1), draw(6, seed=2)
    for a, b in (
        (weights(6), weights(6, seed=1)),
        (torch.full((6,), 1 / 6).double(), torch.full((6,), 1 / 6).double()),
    ):
        a, b = a.requires_grad_(), b.requires_grad_()
        power = wasserstein_1d(x, y, a, b, p=p) ** p
        f, g = torch.autograd.grad(power, [a, b])
        slack = (x[:, None] - y).abs().pow(p) - f[:, None] - g
        assert float(slack.min()) > -1e-13  # feasible for the dual, also where all cuts coincide
        halves = (float((w * potential).sum().detach()) for w, potential in ((a, f), (b, g)))
        assert list(halves) == pytest.approx([float(power.detach()) / 2] * 2, rel=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2, 4, INF])
def test_gradient_at_distance_zero_is_zero(p: float) -> None:
    x = draw(6, seed=1).requires_grad_()
    for a in (None, weights(6)):
        distance = wasserstein_1d(x, x.detach().flip(0), a, None if a is None else a.flip(0), p=p)
        assert float(distance.detach()) == 0
        (grad,) = torch.autograd.grad(distance, x)
        assert bool((grad == 0).all())


# --- invariants ---

numbers = st.floats(-100, 100, allow_subnormal=False)
samples = st.lists(numbers, min_size=1, max_size=12).map(lambda v: torch.tensor(v, dtype=F64))


@given(samples, samples, samples, numbers, st.sampled_from([1, 2, 3.5, INF]))
@settings(deadline=None, max_examples=80)
def test_invariants(x: Tensor, y: Tensor, z: Tensor, c: float, p: float) -> None:
    distance = float(wasserstein_1d(x, y, p=p))
    tolerance = {"rel": 1e-9, "abs": 1e-9}
    assert distance == pytest.approx(float(wasserstein_1d(y, x, p=p)), **tolerance)
    assert distance == pytest.approx(float(wasserstein_1d(x + c, y + c, p=p)), **tolerance)
    assert abs(c) * distance == pytest.approx(float(wasserstein_1d(c * x, c * y, p=p)), rel=1e-9, abs=1e-7)
    assert float(wasserstein_1d(x, x + c, p=p)) == pytest.approx(abs(c), **tolerance)
    assert float(wasserstein_1d(x, x.flip(0), p=p)) == 0
    assert distance <= float(wasserstein_1d(x, z, p=p)) + float(wasserstein_1d(z, y, p=p)) + 1e-9
    assert distance >= float((x.mean() - y.mean()).abs()) - 1e-9
    assert distance <= float(wasserstein_1d(x, y, p=INF)) + 1e-9


# --- messages ---


def test_messages() -> None:
    x, y, a, b = draw(4, seed=1), draw(3, seed=2), weights(4), weights(3)

    def raises(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match="^wasserstein_1d: " + match):
            wasserstein_1d(*arguments, **options)

    raises(TypeError, r"x: expected a torch\.Tensor, got list", [1.0], y)
    raises(TypeError, r"b: expected a torch\.Tensor, got ndarray", x, y, a, b.numpy())
    raises(TypeError, r"y: expected dtype float32 or float64, got int64; call \.to\(torch\.float64\)", x, y.long())
    raises(TypeError, r"x is float64, y is float32; convert one", x, y.float())
    raises(TypeError, r"x is float64, a is float32; convert one", x, y, a.float(), b)
    raises(ValueError, r"x is cpu, y on meta|x is on cpu, y on meta; move one", x, y.to("meta"))
    raises(ValueError, r"x: expected shape \(\.\.\., n\) with at least one point, got \(0,\)", x[:0], y)
    raises(ValueError, r"y: expected shape \(\.\.\., m\) with at least one point, got \(\)", x, y[0])
    raises(
        ValueError,
        r"x and y: expected leading dimensions that broadcast, got \(2,\) and \(3,\)",
        draw(2, 4),
        draw(3, 4),
    )
    raises(ValueError, r"a: expected one weight for each of the 4 points, .*got \(3,\)", x, y, b, b)
    raises(ValueError, r"a and the points: expected leading dimensions that broadcast", draw(3, 4), y, weights(2, 4))
    raises(ValueError, r"x: expected finite values, got nan at 1", x.index_fill(0, torch.tensor(1), math.nan), y)
    raises(ValueError, r"y: expected finite values, got inf at 2", x, y.index_fill(0, torch.tensor(2), INF))
    raises(ValueError, r"a: expected weights >= 0, got -1\.0 at 0", x, y, a.index_fill(0, torch.tensor(0), -1.0), b)
    raises(ValueError, r"b: expected finite values, got nan at 0", x, y, a, b.index_fill(0, torch.tensor(0), math.nan))
    raises(ValueError, r"a: expected weights with a positive sum, got zeros", x, y, 0 * a, b)
    raises(ValueError, r"a and b: expected equal masses, got 0\.999 and 1 .*; normalise them", x, y, 0.999 * a)
    raises(ValueError, r"a and b: expected equal masses, got 2 and 1 ", x, y, 2 * a, b)
    for p in (0.5, math.nan, "2", None, -INF):
        raises(ValueError, r"p: expected a number >= 1, got ", x, y, p=p)
