"""Curvature models against the Hessians and Jacobians that autograd forms, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kantor.linalg import LinearOperator, LowRank
from kantor.optim import curvature
from kantor.optim.curvature import low_rank_form

F64 = torch.float64
N, FEATURES, CLASSES = 40, 6, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def by_autograd(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Hessian on flat vectors."""
    return torch.autograd.functional.hessian(fun, x).reshape(x.numel(), x.numel())


def jacobian(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(fun, x).reshape(-1, x.numel())


def same(H: LinearOperator, expected: Tensor, tolerance: float = 1e-10) -> None:
    """The operator equals a matrix: by its dense form, by one product, and by a batch of them."""
    n = expected.shape[0]
    scale = float(expected.abs().max()) + 1
    assert H.shape == (n, n)
    v, V = draw(n, seed=7).to(expected), draw(2, 3, n, seed=8).to(expected)
    torch.testing.assert_close(H.dense(), expected, rtol=0, atol=tolerance * scale)
    torch.testing.assert_close(H.matvec(v), expected @ v, rtol=0, atol=tolerance * scale * n)
    torch.testing.assert_close(H.matvec(V), V @ expected, rtol=0, atol=tolerance * scale * n)


A, LABELS = draw(N, FEATURES, seed=1), torch.arange(N) % CLASSES
SIGNS = 1.0 - 2.0 * (torch.arange(N, dtype=F64) % 2)
B = draw(N, seed=2)


def logistic_loss(x: Tensor, l2: float = 0.0) -> Tensor:
    return torch.log1p(torch.exp(-SIGNS * (A @ x))).mean() + l2 * x.square().sum() / 2


def softmax_loss(W: Tensor, l2: float = 0.0) -> Tensor:
    return torch.nn.functional.cross_entropy(A @ W, LABELS) + l2 * W.square().sum() / 2


def smooth_maximum(x: Tensor, mu: float) -> Tensor:
    return mu * torch.logsumexp((A @ x - B) / mu, 0)


def network(x: Tensor) -> Tensor:
    """A small network of 3 inputs, 4 hidden units and CLASSES outputs, its weights in one vector; outputs (N, "
    "CLASSES)."""
    first, second = x[:12].view(3, 4), x[12:].view(4, CLASSES)
    return torch.tanh(A[:, :3] @ first) @ second


WEIGHTS = 12 + 4 * CLASSES


def residual(x: Tensor) -> Tensor:
    """Nonlinear, more equations than unknowns."""
    return torch.cat([torch.sin(x) + x.roll(1).square(), x.prod().reshape(1) - 0.3])


# --- the Hessian ---


@pytest.mark.parametrize("mode", ["auto", "double_backward", "jvp"])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4)])
def test_hessian(mode: Any, shape: tuple[int, ...]) -> None:
    def fun(x: Tensor) -> Tensor:
        return (x.sin() * x.flatten().roll(1).view(x.shape)).sum() + (x**4).sum() + x.sum() ** 3

    x = draw(*shape)
    same(curvature.hessian(fun, mode=mode)(x), by_autograd(fun, x))


@pytest.mark.parametrize("mode", ["auto", "double_backward", "jvp"])
def test_hessian_of_a_linear_function_and_of_one_that_leaves_out_an_unknown(mode: Any) -> None:
    x = draw(3)
    same(curvature.hessian(lambda x: 2 * x.sum(), mode=mode)(x), torch.zeros(3, 3, dtype=F64))
    expected = torch.zeros(3, 3, dtype=F64)
    expected[0, 0] = 6 * x[0]
    same(curvature.hessian(lambda x: x[0] ** 3, mode=mode)(x), expected)


def test_hessian_chooses_its_mode_once() -> None:
    calls = 0

    def fun(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (x**4).sum()

    at = curvature.hessian(fun)
    first, calls = at(draw(3)), 0
    assert first.shape == (3, 3)
    same(at(draw(3, seed=5)), by_autograd(lambda x: (x**4).sum(), draw(3, seed=5)))
    assert calls <= 1 + 3 + 2  # a graph, or a sweep for each product: no further timing


class _Cubed(torch.autograd.Function):
    """x^3 without a forward-mode rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def test_hessian_falls_back_to_reverse_mode_where_there_is_no_forward_rule() -> None:
    x = draw(4)
    H = curvature.hessian(lambda x: _Cubed.apply(x).sum())(x)
    torch.testing.assert_close(H.matvec(x), 6 * x * x)


def test_exceptions_of_the_function_leave_as_they_are() -> None:
    class Budget(Exception):
        pass

    def fun(x: Tensor) -> Tensor:
        raise Budget

    for at in (curvature.hessian(fun), curvature.gauss_newton(fun), curvature.power_residual(fun, 4)):
        with pytest.raises(Budget):
            at(draw(3))


# --- generalised linear models ---


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_logistic(l2: float) -> None:
    x = draw(FEATURES)
    same(curvature.logistic(A, l2=l2)(x), by_autograd(lambda x: logistic_loss(x, l2), x))
    same(curvature.logistic(A, l2=l2, exact=False)(x), A.T @ A / (4 * N) + l2 * torch.eye(FEATURES, dtype=F64))


def test_logistic_bound_is_one_operator_for_all_points_and_above_the_exact_one() -> None:
    bound = curvature.logistic(A, exact=False)
    x = draw(FEATURES)
    assert bound(x) is bound(x + 1)
    assert torch.linalg.eigvalsh(bound(x).dense() - curvature.logistic(A)(x).dense()).min() >= -1e-12


def test_logistic_far_out_is_finite() -> None:
    assert torch.isfinite(curvature.logistic(A)(1e6 * draw(FEATURES)).dense()).all()


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_softmax(l2: float) -> None:
    W = draw(FEATURES, CLASSES)
    expected = by_autograd(lambda W: softmax_loss(W, l2), W)
    same(curvature.softmax(A, CLASSES, l2=l2)(W), expected)
    same(curvature.softmax(A, CLASSES, l2=l2)(W.flatten()), expected)


def test_softmax_without_the_rank_one_parts_is_above_the_exact_one() -> None:
    W = draw(FEATURES, CLASSES)
    above = curvature.softmax(A, CLASSES, exact=False)(W).dense()
    P = torch.softmax(A @ W, -1)
    blocks = torch.stack([A.T @ (P[:, [k]] * A) / N for k in range(CLASSES)])
    expected = torch.zeros(FEATURES, CLASSES, FEATURES, CLASSES, dtype=F64)
    for k in range(CLASSES):
        expected[:, k, :, k] = blocks[k]
    torch.testing.assert_close(above, expected.view(above.shape))
    assert torch.linalg.eigvalsh(above - curvature.softmax(A, CLASSES)(W).dense()).min() >= -1e-12


@pytest.mark.parametrize("mu", [0.05, 1.0, 20.0])
def test_logsumexp(mu: float) -> None:
    x = draw(FEATURES)
    same(curvature.logsumexp(A, B, mu)(x), by_autograd(lambda x: smooth_maximum(x, mu), x))


@pytest.mark.parametrize("mu", [0.05, 1.0])
def test_gauss_newton_of_logsumexp_is_semidefinite_and_above_the_hessian(mu: float) -> None:
    x = draw(FEATURES)
    above = curvature.logsumexp(A, B, mu, exact=False)(x)
    pi = torch.softmax((A @ x - B) / mu, 0)
    same(above, A.T @ torch.diag(pi) @ A / mu)
    assert torch.linalg.eigvalsh(above.dense()).min() >= -1e-10
    assert torch.linalg.eigvalsh(above.dense() - by_autograd(lambda x: smooth_maximum(x, mu), x)).min() >= -1e-10


# --- models and losses ---


def test_gauss_newton_of_least_squares() -> None:
    x = draw(5)
    J = jacobian(residual, x)
    same(curvature.gauss_newton(residual)(x), J.T @ J)


def test_gauss_newton_takes_unknowns_and_residuals_of_any_shape() -> None:
    def model(X: Tensor) -> Tensor:
        return X @ X.T - torch.eye(2, dtype=F64)

    X = draw(2, 3)
    J = jacobian(model, X)
    same(curvature.gauss_newton(model)(X), J.T @ J)


def test_gauss_newton_of_a_loss_is_the_hessian_less_the_curvature_of_the_model() -> None:
    x = draw(WEIGHTS, seed=3)

    def loss(z: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z, LABELS)

    J, L = jacobian(network, x), by_autograd(loss, network(x))
    same(curvature.gauss_newton(network, loss)(x), J.T @ L @ J)
    linear = draw(N * CLASSES, WEIGHTS, seed=4) / 10
    same(  # no curvature in the model: nothing is missing
        curvature.gauss_newton(lambda x: (linear @ x).view(N, CLASSES), loss)(x),
        by_autograd(lambda x: loss((linear @ x).view(N, CLASSES)), x),
    )


def test_fisher_of_a_classifier_is_the_covariance_of_the_scores() -> None:
    x = draw(WEIGHTS, seed=3)
    P = torch.softmax(network(x), -1)
    scores = torch.autograd.functional.jacobian(lambda x: torch.log_softmax(network(x), -1), x)  # (N, CLASSES, WEIGHTS)
    expected = torch.einsum("nc,nci,ncj->ij", P, scores, scores) / N
    same(curvature.fisher(network)(x), expected)
    assert torch.linalg.eigvalsh(curvature.fisher(network)(x).dense()).min() >= -1e-12


def test_fisher_of_a_regression() -> None:
    x = draw(WEIGHTS, seed=3)
    J = jacobian(network, x)
    same(curvature.fisher(network, "gaussian")(x), J.T @ J / N)


@pytest.mark.parametrize("samples", [1, 3, 50])
def test_empirical_fisher(samples: int) -> None:
    G, x = draw(samples, 8), draw(8)
    for given in (G, lambda x: G):
        H = curvature.empirical_fisher(given)(x)
        same(H, G.T @ G / samples)
        assert isinstance(H, LowRank)


def test_zero() -> None:
    same(curvature.zero()(draw(2, 3)), torch.zeros(6, 6, dtype=F64))


# --- powers of residuals ---


@pytest.mark.parametrize("p", [2, 3, 4, 5.5])
def test_power_residual(p: float) -> None:
    x = draw(5)

    def fun(x: Tensor) -> Tensor:
        return residual(x).norm() ** p / p

    u, J, g = residual(x), jacobian(residual, x), torch.autograd.functional.jacobian(fun, x)
    rank_one = (p - 2) / u.norm() ** p * torch.outer(g, g)
    same(curvature.power_residual(residual, p, "fisher")(x), rank_one)
    same(curvature.power_residual(residual, p)(x), u.norm() ** (p - 2) * J.T @ J + rank_one)
    same(curvature.power_residual(residual, p, "exact")(x), by_autograd(fun, x))


@pytest.mark.parametrize("p", [2, 3, 4])
def test_power_of_linear_residuals_has_nothing_to_leave_out(p: float) -> None:
    x = draw(FEATURES)
    H = curvature.power_residual(lambda x: A @ x - B, p)(x)
    same(H, by_autograd(lambda x: (A @ x - B).norm() ** p / p, x))


@pytest.mark.parametrize("kind", ["inexact", "fisher"])
@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_power_residual_at_a_solution(p: float, kind: Any) -> None:
    H = curvature.power_residual(lambda x: A[:3] @ x, p, kind)(torch.zeros(FEATURES, dtype=F64))
    gauss_newton = p == 2 and kind == "inexact"
    same(H, A[:3].T @ A[:3] if gauss_newton else torch.zeros(FEATURES, FEATURES, dtype=F64))


# --- forms, dtypes ---

AT_A_POINT: dict[str, Callable[[], LinearOperator]] = {
    "logistic": lambda: curvature.logistic(A, l2=0.5)(draw(FEATURES)),
    "logsumexp": lambda: curvature.logsumexp(A, B)(draw(FEATURES)),
    "weighted Gauss-Newton": lambda: curvature.logsumexp(A, B, exact=False)(draw(FEATURES)),
    "power": lambda: curvature.power_residual(residual, 4)(draw(5)),
    "Fisher term": lambda: curvature.power_residual(residual, 4, "fisher")(draw(5)),
    "empirical Fisher": lambda: curvature.empirical_fisher(A)(draw(FEATURES)),
}


@pytest.mark.parametrize("name", AT_A_POINT)
def test_low_rank_form_is_the_operator(name: str) -> None:
    H = AT_A_POINT[name]()
    form = low_rank_form(H)
    assert form is not None
    low, shift = form
    torch.testing.assert_close(
        low.dense() + shift * torch.eye(H.shape[0], dtype=F64), H.dense(), rtol=1e-12, atol=1e-12
    )


def test_what_has_no_low_rank_form_says_so() -> None:
    assert low_rank_form(curvature.hessian(lambda x: (x**4).sum())(draw(3))) is None
    assert low_rank_form(curvature.softmax(A, CLASSES)(draw(FEATURES, CLASSES))) is None


@pytest.mark.parametrize("name", ["hessian", "gauss_newton", "fisher", "logistic", "softmax", "logsumexp", "power"])
def test_single_precision_stays_single(name: str) -> None:
    a, b, w = A.float(), B.float(), draw(FEATURES, CLASSES).float()
    x = w[:, 0].clone()
    H = {
        "hessian": lambda: curvature.hessian(lambda x: (x**4).sum())(x),
        "gauss_newton": lambda: curvature.gauss_newton(lambda x: (a @ x).sin())(x),
        "fisher": lambda: curvature.fisher(lambda w: a @ w)(w),
        "logistic": lambda: curvature.logistic(a, l2=0.5)(x),
        "softmax": lambda: curvature.softmax(a, CLASSES)(w),
        "logsumexp": lambda: curvature.logsumexp(a, b)(x),
        "power": lambda: curvature.power_residual(lambda x: a @ x - b, 3)(x),
    }[name]()
    assert H.dtype is torch.float32
    product = H.matvec(torch.ones(H.shape[0], dtype=torch.float32))
    assert product.dtype is torch.float32
    assert not product.requires_grad


@pytest.mark.parametrize("name", AT_A_POINT)
def test_scipy_sees_the_same_operator(name: str) -> None:
    H = AT_A_POINT[name]()
    v = draw(H.shape[0], seed=9)
    assert torch.from_numpy(H.to_scipy() @ v.numpy()).allclose(H.matvec(v))


# --- what does not fit ---

X = torch.zeros(FEATURES, dtype=F64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: curvature.logsumexp(A, B, 0.0), ValueError, "mu"),
        (lambda: curvature.logsumexp(A, B, -1.0), ValueError, "mu"),
        (lambda: curvature.logsumexp(A, B, math.nan), ValueError, "mu"),
        (lambda: curvature.logsumexp(A, B[:-1]), ValueError, r"b: expected shape \(40,\), got \(39,\)"),
        (lambda: curvature.logsumexp(A, B.float()), (TypeError, ValueError), "float32"),
        (lambda: curvature.power_residual(residual, 1.9), ValueError, "p: expected a number >= 2, got 1.9"),
        (lambda: curvature.power_residual(residual, math.nan), ValueError, "p"),
        (lambda: curvature.power_residual(residual, 3, "other"), ValueError, "kind"),  # type: ignore[arg-type]
        (lambda: curvature.hessian(residual, mode="other"), ValueError, "mode"),  # type: ignore[arg-type]
        (lambda: curvature.fisher(network, "other"), ValueError, "likelihood"),  # type: ignore[arg-type]
        (lambda: curvature.logistic(A, l2=-1.0), ValueError, "l2"),
        (lambda: curvature.logistic(A[0]), ValueError, r"A: expected shape \(samples, features\)"),
        (lambda: curvature.logistic(A[:0]), ValueError, "not empty"),
        (lambda: curvature.logistic(torch.full((2, 2), math.nan)), ValueError, "finite"),
        (lambda: curvature.logistic(A.half()), TypeError, "float16"),
        (lambda: curvature.logistic(A.numpy()), TypeError, "ndarray"),  # type: ignore[arg-type]
        (lambda: curvature.softmax(A, 1), ValueError, "classes"),
        (lambda: curvature.empirical_fisher(A)(X[:2]), ValueError, r"\(N, 2\)"),
        (lambda: curvature.empirical_fisher(A[0])(X), ValueError, "per_sample_grads"),
        (lambda: curvature.empirical_fisher(A[:0])(X), ValueError, "per_sample_grads"),
        (lambda: curvature.hessian(lambda x: x.sum())(X.half()), TypeError, "float16"),
        (lambda: curvature.hessian(lambda x: x.sum())([0.0]), TypeError, "list"),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_do_not_fit(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
