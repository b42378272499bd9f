"""The sliced distance, against loops over directions, closed forms of Gaussians and POT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance
from torch import Tensor

from kantor.transport import sliced
from kantor.transport.one_dimensional import wasserstein_1d
from kantor.transport.sliced import sliced_wasserstein

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def directions(count: int, d: int, seed: int = 9) -> Tensor:
    return torch.nn.functional.normalize(draw(count, d, seed=seed), dim=-1)


def weights(n: int, seed: int = 0) -> Tensor:
    return draw(n, seed=seed + 100).softmax(-1)


# --- values ---


def test_mean_of_scipy_distances() -> None:
    X, Y, a, b, lines = draw(30, 3, seed=1), draw(40, 3, seed=2), weights(30), weights(40, seed=1), directions(17, 3)
    for u, v in ((None, None), (a, b)):
        each = [wasserstein_distance(X @ t, Y @ t, u, v) for t in lines]
        expected = sum(each) / len(each)
        assert float(sliced_wasserstein(X, Y, u, v, p=1, directions=lines)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_pot(p: float) -> None:
    ot = pytest.importorskip("ot")
    X, Y, a, b, lines = draw(30, 4, seed=1), draw(40, 4, seed=2), weights(30), weights(40, seed=1), directions(25, 4)
    for u, v in ((None, None), (a, b)):
        host = (None if u is None else u.numpy(), None if v is None else v.numpy())
        expected = ot.sliced_wasserstein_distance(X.numpy(), Y.numpy(), *host, projections=lines.T.numpy(), p=p)
        assert float(sliced_wasserstein(X, Y, u, v, p=p, directions=lines)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("d", [2, 3, 10])
def test_translation(d: int) -> None:
    """SW_2 of a translation by v is |v| / sqrt(d); for a given set of lines the root mean square of <v, t>."""
    X, v = draw(50, d, seed=1), draw(d, seed=2)
    lines = directions(64, d)
    expected = float((lines @ v).square().mean().sqrt())
    assert float(sliced_wasserstein(X, X + v, directions=lines)) == pytest.approx(expected, rel=1e-12)
    many = float(sliced_wasserstein(X, X + v, projections=20_000))
    assert many == pytest.approx(float(v.norm()) / math.sqrt(d), rel=0.03)


def test_scaled_sphere() -> None:
    """Against its multiple by s, a sample is |s - 1| times its root mean square projection away."""
    X = draw(500, 3, seed=1)
    lines = directions(200, 3)
    expected = 2 * float((X @ lines.T).square().mean().sqrt())
    assert float(sliced_wasserstein(X, 3 * X, directions=lines)) == pytest.approx(expected, rel=1e-12)


def test_error_falls_with_the_number_of_projections() -> None:
    X, Y = draw(40, 2, seed=1), draw(40, 2, seed=2) + 1
    angles = torch.arange(2000, dtype=F64) * (math.pi / 2000)  # the mean over the circle by the trapezoidal rule
    exact = float(sliced_wasserstein(X, Y, directions=torch.stack([angles.cos(), angles.sin()], -1)))
    errors = []
    for count in (16, 1600):
        tries = [
            float(sliced_wasserstein(X, Y, projections=count, generator=torch.Generator().manual_seed(seed)))
            for seed in range(20)
        ]
        errors.append(math.sqrt(sum((t - exact) ** 2 for t in tries) / len(tries)))
    assert errors[1] < 0.2 * errors[0]


def test_one_dimension_is_exact() -> None:
    X, Y, a, b = draw(20, seed=1), draw(30, seed=2), weights(20), weights(30, seed=1)
    for p in (1, 2):
        expected = wasserstein_1d(X, Y, a, b, p=p)
        assert torch.equal(sliced_wasserstein(X, Y[:, None], a, b, p=p, projections=3), expected)
        assert torch.equal(sliced_wasserstein(X, Y, a, b, p=p, directions=torch.tensor([[-2.0]], dtype=F64)), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    X, Y = draw(30, 3, seed=1).requires_grad_(), draw(40, 3, seed=2).requires_grad_()
    a, b = (weights(30).requires_grad_(), weights(40, seed=1)) if weighted else (None, None)
    inputs = [t for t in (X, Y, a) if t is not None]
    whole = sliced_wasserstein(X, Y, a, b)
    gradients = torch.autograd.grad(whole, inputs)
    monkeypatch.setattr(sliced, "_BLOCK_ENTRIES", 700)  # ten lines at a time
    parts = sliced_wasserstein(X, Y, a, b)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    for got, expected in zip(torch.autograd.grad(parts, inputs), gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_float32() -> None:
    X, Y = draw(200, 5, seed=1), draw(150, 5, seed=2)
    got = sliced_wasserstein(X.float(), Y.float())
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(sliced_wasserstein(X, Y)), rel=1e-5)


# --- repeatability ---


def test_generator() -> None:
    X, Y = draw(20, 4, seed=1), draw(20, 4, seed=2)
    assert torch.equal(sliced_wasserstein(X, Y), sliced_wasserstein(X, Y))
    state = torch.get_rng_state()
    sliced_wasserstein(X, Y)
    assert torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(5)
    first, second = (sliced_wasserstein(X, Y, generator=generator) for _ in range(2))
    assert float(first) != float(second)
    assert torch.equal(first, sliced_wasserstein(X, Y, generator=torch.Generator().manual_seed(5)))


def test_lengths_of_directions_do_not_matter() -> None:
    X, Y, lines = draw(20, 4, seed=1), draw(20, 4, seed=2), directions(9, 4)
    scaled = lines * torch.arange(1, 10, dtype=F64)[:, None]
    torch.testing.assert_close(
        sliced_wasserstein(X, Y, directions=scaled), sliced_wasserstein(X, Y, directions=lines), rtol=1e-13, atol=0
    )


# --- derivatives ---


@pytest.mark.parametrize("p", [1, 2, 3])
def test_derivatives(p: float) -> None:
    inputs = [t.requires_grad_() for t in (draw(5, 2, seed=1), draw(4, 2, seed=2), draw(5, seed=3), draw(4, seed=4))]
    inputs.append(draw(6, 2, seed=5).requires_grad_())

    def function(X: Tensor, Y: Tensor, s: Tensor, t: Tensor, lines: Tensor) -> Tensor:
        return sliced_wasserstein(X, Y, s.softmax(-1), t.softmax(-1), p=p, directions=lines)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_of_equal_samples_is_zero() -> None:
    X = draw(20, 3, seed=1).requires_grad_()
    for p in (1, 2, 3):
        distance = sliced_wasserstein(X, X.detach().clone(), p=p)
        assert float(distance.detach()) == 0
        assert bool((torch.autograd.grad(distance, X)[0] == 0).all())


def test_gradient_descent_moves_a_sample_onto_another() -> None:
    X, Y = draw(40, 2, seed=1).requires_grad_(), draw(40, 2, seed=2) * 0.3 + 2
    start = float(sliced_wasserstein(X.detach(), Y))
    for _ in range(60):
        (grad,) = torch.autograd.grad(0.5 * sliced_wasserstein(X, Y) ** 2, X)
        X = (X - 40 * grad).detach().requires_grad_()
    assert float(sliced_wasserstein(X, Y)) < 0.02 * start


# --- invariants ---


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([1, 2, 3.5]), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_invariants(n: int, m: int, d: int, p: float, seed: int) -> None:
    X, Y, shift = draw(n, d, seed=seed), draw(m, d, seed=seed + 1), draw(d, seed=seed + 2)
    options: dict[str, Any] = {"p": p, "projections": 20}
    distance = float(sliced_wasserstein(X, Y, **options))
    assert distance == pytest.approx(float(sliced_wasserstein(Y, X, **options)), rel=1e-12)
    assert distance == pytest.approx(float(sliced_wasserstein(X + shift, Y + shift, **options)), rel=1e-9, abs=1e-12)
    assert 3 * distance == pytest.approx(float(sliced_wasserstein(-3 * X, -3 * Y, **options)), rel=1e-9)
    assert distance == pytest.approx(float(sliced_wasserstein(X.repeat(2, 1), Y, **options)), rel=1e-9)
    longest = float(torch.cdist(X, Y).max())
    assert distance <= longest * (1 + 1e-12)


# --- messages ---


def test_messages() -> None:
    X, Y = draw(4, 2, seed=1), draw(3, 2, seed=2)

    def raises(error: type[Exception], match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(error, match="^sliced_wasserstein: " + match):
            sliced_wasserstein(*arguments, **options)

    raises(TypeError, r"X: expected a torch\.Tensor, got ndarray", X.numpy(), Y)
    raises(TypeError, r"Y: expected dtype float32 or float64, got int64", X, Y.long())
    raises(TypeError, r"X is float64, Y is float32", X, Y.float())
    raises(TypeError, r"X is float64, directions is float32", X, Y, directions=torch.ones(1, 2))
    raises(TypeError, r"a: expected a torch\.Tensor, got list", X, Y, [0.25] * 4)
    raises(ValueError, r"X: expected points of shape \(n, d\) with n, d >= 1, got \(0, 2\)", X[:0], Y)
    raises(ValueError, r"Y: expected points of shape \(n, d\) .*, got \(1, 3, 2\)", X, Y[None])
    raises(ValueError, r"X and Y: expected points of one dimension, got 2 and 1", X, Y[:, :1])
    raises(ValueError, r"X: expected finite values, got nan at \(0, 0\)", X * math.nan, Y)
    raises(ValueError, r"a: expected shape \(4,\), got \(3,\)", X, Y, weights(3))
    raises(ValueError, r"b: expected shape \(3,\), got \(1, 3\)", X, Y, None, weights(3)[None])
    raises(ValueError, r"a and b: expected equal masses, got 2 and 1", X, Y, 2 * weights(4))
    raises(ValueError, r"a: expected weights >= 0, got -0\.", X, Y, -weights(4), weights(3))
    for p in (0.5, math.inf, math.nan, "2"):
        raises(ValueError, r"p: expected a finite number >= 1, got", X, Y, p=p)
    for count in (0, -1, 2.5, True):
        raises(ValueError, r"projections: expected an integer >= 1, got", X, Y, projections=count)
    raises(ValueError, r"directions: expected shape \(L, 2\) with L >= 1, got \(5, 3\)", X, Y, directions=draw(5, 3))
    raises(ValueError, r"directions: expected shape \(L, 2\) .*got \(0, 2\)", X, Y, directions=draw(0, 2))
    lines = draw(5, 2)
    lines[3] = 0
    raises(ValueError, r"directions: expected nonzero vectors, got zeros in row 3", X, Y, directions=lines)
