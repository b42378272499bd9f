"""Smooth functions to minimise, from textbooks and from practice, each in torch and by hand in NumPy.

The torch version is for automatic differentiation; value, gradient and Hessian-vector product in NumPy are what
somebody without it would write, for fair comparisons with libraries that take such callables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class MinimizationProblem:
    """A function with a starting point.

    Attributes
    ----------
    name : str
        A word or two.
    x0 : Tensor
        Starting point ``(n,)``, float64.
    fun : callable
        The function in torch operations.
    fun_numpy, grad_numpy, hvp_numpy : callable
        Value, gradient and Hessian-vector product ``hvp(x, v)`` on NumPy arrays.
    """

    name: str
    x0: Tensor
    fun: Callable[[Tensor], Tensor]
    fun_numpy: Callable[[Array], float]
    grad_numpy: Callable[[Array], Array]
    hvp_numpy: Callable[[Array, Array], Array]


def _check(name: str, n: int, group: int) -> None:
    if not (isinstance(n, int) and n >= group and n % group == 0):
        raise ValueError(f"{name}: n: expected a positive multiple of {group}, got {n!r}")


# --- textbook ---


def rosenbrock(n: int = 100) -> MinimizationProblem:
    """Chained Rosenbrock from (-1.2, 1, -1.2, 1, ...): a long curved valley."""
    if not (isinstance(n, int) and n >= 2):
        raise ValueError(f"rosenbrock: n: expected an integer >= 2, got {n!r}")

    def fun(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    def value(x: Array) -> float:
        r, s = x[1:] - x[:-1] ** 2, 1 - x[:-1]
        return float(100 * r @ r + s @ s)

    def grad(x: Array) -> Array:
        r, g = 200 * (x[1:] - x[:-1] ** 2), np.zeros_like(x)
        g[1:] = r
        g[:-1] -= 2 * x[:-1] * r + 2 * (1 - x[:-1])
        return g

    def hvp(x: Array, v: Array) -> Array:
        head, h = x[:-1], np.zeros_like(x)
        dr = 200 * (v[1:] - 2 * head * v[:-1])
        h[1:] = dr
        h[:-1] += 2 * v[:-1] - 2 * head * dr - 400 * (x[1:] - head**2) * v[:-1]
        return h

    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat((n + 1) // 2)[:n]
    return MinimizationProblem("Rosenbrock", x0, fun, value, grad, hvp)


def extended_rosenbrock(n: int = 100) -> MinimizationProblem:
    """n / 2 independent Rosenbrock functions of two unknowns, from (-1.2, 1); n even."""
    _check("extended_rosenbrock", n, 2)

    def fun(x: Tensor) -> Tensor:
        a, b = x[::2], x[1::2]
        return (100 * (b - a**2) ** 2 + (1 - a) ** 2).sum()

    def value(x: Array) -> float:
        a, b = x[::2], x[1::2]
        r, s = b - a**2, 1 - a
        return float(100 * r @ r + s @ s)

    def grad(x: Array) -> Array:
        a, g = x[::2], np.empty_like(x)
        r = 200 * (x[1::2] - a**2)
        g[::2], g[1::2] = -2 * a * r - 2 * (1 - a), r
        return g

    def hvp(x: Array, v: Array) -> Array:
        a, h = x[::2], np.empty_like(x)
        dr = 200 * (v[1::2] - 2 * a * v[::2])
        h[::2], h[1::2] = (2 - 400 * (x[1::2] - a**2)) * v[::2] - 2 * a * dr, dr
        return h

    x0 = torch.tensor([-1.2, 1.0], dtype=torch.float64).repeat(n // 2)
    return MinimizationProblem("extended Rosenbrock", x0, fun, value, grad, hvp)


def powell(n: int = 100) -> MinimizationProblem:
    """Extended Powell: the Hessian is singular at the minimum; n divisible by four."""
    _check("powell", n, 4)

    def fun(x: Tensor) -> Tensor:
        a, b, c, d = x.view(-1, 4).T
        total: Tensor = ((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4).sum()
        return total

    def value(x: Array) -> float:
        a, b, c, d = x.reshape(-1, 4).T
        return float(((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4).sum())

    def grad(x: Array) -> Array:
        a, b, c, d = x.reshape(-1, 4).T
        s, t, u, w = 2 * (a + 10 * b), 10 * (c - d), 4 * (b - 2 * c) ** 3, 40 * (a - d) ** 3
        return np.stack([s + w, 10 * s + u, t - 2 * u, -t - w], axis=1).ravel()

    def hvp(x: Array, v: Array) -> Array:
        a, b, c, d = x.reshape(-1, 4).T
        p, q, r, z = v.reshape(-1, 4).T
        s, t = 2 * (p + 10 * q), 10 * (r - z)
        u, w = 12 * (b - 2 * c) ** 2 * (q - 2 * r), 120 * (a - d) ** 2 * (p - z)
        return np.stack([s + w, 10 * s + u, t - 2 * u, -t - w], axis=1).ravel()

    x0 = torch.tensor([3.0, -1.0, 0.0, 1.0], dtype=torch.float64).repeat(n // 4)
    return MinimizationProblem("Powell", x0, fun, value, grad, hvp)


def woods(n: int = 100) -> MinimizationProblem:
    """Extended Woods from (-3, -1, -3, -1, ...): a saddle on the way; n divisible by four."""
    _check("woods", n, 4)

    def fun(x: Tensor) -> Tensor:
        a, b, c, d = x.view(-1, 4).T
        valleys = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
        total: Tensor = (valleys + 10 * (b + d - 2) ** 2 + 0.1 * (b - d) ** 2).sum()
        return total

    def value(x: Array) -> float:
        a, b, c, d = x.reshape(-1, 4).T
        valleys = 100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
        return float((valleys + 10 * (b + d - 2) ** 2 + 0.1 * (b - d) ** 2).sum())

    def grad(x: Array) -> Array:
        a, b, c, d = x.reshape(-1, 4).T
        r, s, t, u = 200 * (b - a**2), 180 * (d - c**2), 20 * (b + d - 2), 0.2 * (b - d)
        return np.stack([-2 * a * r - 2 * (1 - a), r + t + u, -2 * c * s - 2 * (1 - c), s + t - u], axis=1).ravel()

    def hvp(x: Array, v: Array) -> Array:
        a, b, c, d = x.reshape(-1, 4).T
        p, q, y, z = v.reshape(-1, 4).T
        dr, ds, dt, du = 200 * (q - 2 * a * p), 180 * (z - 2 * c * y), 20 * (q + z), 0.2 * (q - z)
        first = (2 - 400 * (b - a**2)) * p - 2 * a * dr
        third = (2 - 360 * (d - c**2)) * y - 2 * c * ds
        return np.stack([first, dr + dt + du, third, ds + dt - du], axis=1).ravel()

    x0 = torch.tensor([-3.0, -1.0], dtype=torch.float64).repeat(n // 2)
    return MinimizationProblem("Woods", x0, fun, value, grad, hvp)


def trigonometric(n: int = 50) -> MinimizationProblem:
    """Trigonometric: n residuals, each with all unknowns, from 1/n."""
    steps = np.arange(1.0, n + 1)

    def fun(x: Tensor) -> Tensor:
        i = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
        return (n - torch.cos(x).sum() + i * (1 - torch.cos(x)) - torch.sin(x)).square().sum()

    def residual(x: Array, c: Array, s: Array) -> Array:
        r: Array = n - c.sum() + steps * (1 - c) - s
        return r

    def value(x: Array) -> float:
        r = residual(x, np.cos(x), np.sin(x))
        return float(r @ r)

    def grad(x: Array) -> Array:
        c, s = np.cos(x), np.sin(x)
        r = residual(x, c, s)
        g: Array = 2 * (s * r.sum() + (steps * s - c) * r)
        return g

    def hvp(x: Array, v: Array) -> Array:
        c, s = np.cos(x), np.sin(x)
        r = residual(x, c, s)
        own = steps * s - c
        dr = s @ v + own * v
        h: Array = 2 * (s * dr.sum() + own * dr + (c * r.sum() + (steps * c + s) * r) * v)
        return h

    x0 = torch.full((n,), 1.0 / n, dtype=torch.float64)
    return MinimizationProblem("trigonometric", x0, fun, value, grad, hvp)


# --- practice ---


def phase_retrieval(n: int = 50, m: int = 300, seed: int = 0) -> MinimizationProblem:
    """A signal from the squares of m random projections, from near zero, which is a maximum."""
    random = np.random.default_rng([seed, 1])
    A, x_true = random.standard_normal((m, n)), random.standard_normal(n)
    y = (A @ x_true) ** 2
    At, yt = torch.from_numpy(A), torch.from_numpy(y)

    def fun(x: Tensor) -> Tensor:
        return ((At @ x) ** 2 - yt).square().mean() / 4

    def value(x: Array) -> float:
        r = (A @ x) ** 2 - y
        return float(r @ r) / (4 * m)

    def grad(x: Array) -> Array:
        u = A @ x
        return A.T @ ((u**2 - y) * u) / m

    def hvp(x: Array, v: Array) -> Array:
        u = A @ x
        return A.T @ ((3 * u**2 - y) * (A @ v)) / m

    x0 = torch.from_numpy(0.1 * random.standard_normal(n))
    return MinimizationProblem("phase retrieval", x0, fun, value, grad, hvp)


def factorization(rows: int = 30, columns: int = 30, rank: int = 3, seed: int = 0) -> MinimizationProblem:
    """``|UV - M|_F^2 / 2`` for a matrix of that rank, from next to the saddle at zero."""
    random = np.random.default_rng([seed, 2])
    M = random.standard_normal((rows, rank)) @ random.standard_normal((rank, columns))
    Mt, cut = torch.from_numpy(M), rows * rank

    def fun(x: Tensor) -> Tensor:
        return 0.5 * (x[:cut].view(rows, rank) @ x[cut:].view(rank, columns) - Mt).square().sum()

    def parts(x: Array) -> tuple[Array, Array]:
        return x[:cut].reshape(rows, rank), x[cut:].reshape(rank, columns)

    def value(x: Array) -> float:
        U, V = parts(x)
        R = U @ V - M
        return 0.5 * float(np.vdot(R, R))

    def grad(x: Array) -> Array:
        U, V = parts(x)
        R = U @ V - M
        return np.concatenate([(R @ V.T).ravel(), (U.T @ R).ravel()])

    def hvp(x: Array, v: Array) -> Array:
        (U, V), (dU, dV) = parts(x), parts(v)
        R, dR = U @ V - M, dU @ V + U @ dV
        return np.concatenate([(dR @ V.T + R @ dV.T).ravel(), (dU.T @ R + U.T @ dR).ravel()])

    x0 = torch.from_numpy(1e-3 * random.standard_normal(cut + rank * columns))
    return MinimizationProblem("factorisation", x0, fun, value, grad, hvp)


def perceptron(inputs: int = 10, hidden: int = 20, samples: int = 200, seed: int = 0) -> MinimizationProblem:
    """Least squares with a network of one hidden tanh layer, plus ``1e-4 |z|^2``."""
    random = np.random.default_rng([seed, 3])
    X = random.standard_normal((samples, inputs))
    y = np.tanh(X @ random.standard_normal(inputs) / math.sqrt(inputs)) + 0.1 * random.standard_normal(samples)
    Xt, yt, cut = torch.from_numpy(X), torch.from_numpy(y), hidden * inputs

    def fun(z: Tensor) -> Tensor:
        W, b, w, c = z[:cut].view(hidden, inputs), z[cut : cut + hidden], z[cut + hidden : -1], z[-1]
        return (torch.tanh(Xt @ W.T + b) @ w + c - yt).square().mean() + 1e-4 * z.square().sum()

    def parts(z: Array) -> tuple[Array, Array, Array, float]:
        return z[:cut].reshape(hidden, inputs), z[cut : cut + hidden], z[cut + hidden : -1], z[-1]

    def value(z: Array) -> float:
        W, b, w, c = parts(z)
        r = np.tanh(X @ W.T + b) @ w + c - y
        return float(r @ r) / samples + 1e-4 * float(z @ z)

    def joined(W: Array, b: Array, w: Array, c: Any, z: Array) -> Array:
        return np.concatenate([W.ravel(), b, w, [c]]) * (2 / samples) + 2e-4 * z

    def grad(z: Array) -> Array:
        W, b, w, c = parts(z)
        T = np.tanh(X @ W.T + b)
        r = T @ w + c - y
        D = r[:, None] * (1 - T**2) * w
        return joined(D.T @ X, D.sum(0), T.T @ r, r.sum(), z)

    def hvp(z: Array, v: Array) -> Array:
        (W, b, w, c), (dW, db, dw, dc) = parts(z), parts(v)
        T = np.tanh(X @ W.T + b)
        S = 1 - T**2
        dT = S * (X @ dW.T + db)
        r, dr = T @ w + c - y, dT @ w + T @ dw + dc
        D = dr[:, None] * S * w + r[:, None] * (-2 * T * dT * w + S * dw)
        return joined(D.T @ X, D.sum(0), dT.T @ r + T.T @ dr, dr.sum(), v)

    x0 = torch.from_numpy(0.5 * random.standard_normal(cut + 2 * hidden + 1))
    return MinimizationProblem("perceptron", x0, fun, value, grad, hvp)


def student_t(n: int = 50, m: int = 300, seed: int = 0) -> MinimizationProblem:
    """Robust regression: ``sum log(1 + (Ax - b)^2)``, with outliers; not convex."""
    random = np.random.default_rng([seed, 4])
    A = random.standard_normal((m, n))
    b = A @ random.standard_normal(n) + random.standard_t(1.5, m)
    At, bt = torch.from_numpy(A), torch.from_numpy(b)

    def fun(x: Tensor) -> Tensor:
        return torch.log1p((At @ x - bt) ** 2).sum()

    def value(x: Array) -> float:
        return float(np.log1p((A @ x - b) ** 2).sum())

    def grad(x: Array) -> Array:
        r = A @ x - b
        return A.T @ (2 * r / (1 + r**2))

    def hvp(x: Array, v: Array) -> Array:
        s = (A @ x - b) ** 2
        return A.T @ (2 * (1 - s) / (1 + s) ** 2 * (A @ v))

    return MinimizationProblem("Student t", torch.zeros(n, dtype=torch.float64), fun, value, grad, hvp)


def nonconvex_logistic(n: int = 100, m: int = 500, seed: int = 0) -> MinimizationProblem:
    """Logistic regression with the nonconvex penalty ``.01 sum x^2 / (1 + x^2)``."""
    random = np.random.default_rng([seed, 5])
    A = random.standard_normal((m, n))
    y = np.sign(A @ random.standard_normal(n) + random.standard_normal(m))
    A = A * y[:, None]
    At = torch.from_numpy(A)

    def fun(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-(At @ x)).mean() + 0.01 * (x**2 / (1 + x**2)).sum()

    def value(x: Array) -> float:
        return float(np.logaddexp(0, -(A @ x)).mean() + 0.01 * (x**2 / (1 + x**2)).sum())

    def grad(x: Array) -> Array:
        s = 1 / (1 + np.exp(np.minimum(A @ x, 700)))
        return -(A.T @ s) / m + 0.02 * x / (1 + x**2) ** 2

    def hvp(x: Array, v: Array) -> Array:
        s = 1 / (1 + np.exp(np.minimum(A @ x, 700)))
        return A.T @ (s * (1 - s) * (A @ v)) / m + 0.02 * (1 - 3 * x**2) / (1 + x**2) ** 3 * v

    return MinimizationProblem("logistic", torch.zeros(n, dtype=torch.float64), fun, value, grad, hvp)


def coupled_humps(n: int = 50, seed: int = 0) -> MinimizationProblem:
    """``2 sum sin^2 2x + .05 |x|^2 + .05 sum (x_i+1 - x_i)^2``: very many saddles and local minima."""
    random = np.random.default_rng([seed, 6])

    def fun(x: Tensor) -> Tensor:
        return 2 * (torch.sin(2 * x) ** 2).sum() + 0.05 * (x @ x) + 0.05 * x.diff().square().sum()

    def value(x: Array) -> float:
        d = np.diff(x)
        return float(2 * (np.sin(2 * x) ** 2).sum() + 0.05 * (x @ x) + 0.05 * (d @ d))

    def grad(x: Array) -> Array:
        g, d = 4 * np.sin(4 * x) + 0.1 * x, 0.1 * np.diff(x)
        g[1:] += d
        g[:-1] -= d
        return g

    def hvp(x: Array, v: Array) -> Array:
        h, d = (16 * np.cos(4 * x) + 0.1) * v, 0.1 * np.diff(v)
        h[1:] += d
        h[:-1] -= d
        return h

    return MinimizationProblem("humps", torch.from_numpy(4 * random.standard_normal(n)), fun, value, grad, hvp)


def sine_maximum(offset: float = 1e-6) -> MinimizationProblem:
    """``cos x + cos y`` (scipy/scipy#20213), started `offset` from its maximum, where some Newton methods stay."""

    def fun(x: Tensor) -> Tensor:
        return torch.cos(x).sum()

    return MinimizationProblem(
        "maximum",
        torch.full((2,), offset, dtype=torch.float64),
        fun,
        lambda x: float(np.cos(x).sum()),
        lambda x: -np.sin(x),
        lambda x, v: -np.cos(x) * v,
    )


def minimization_problems(seed: int = 0) -> list[MinimizationProblem]:
    """Return the ten problems by which Kantor's minimisers are compared with others.

    Parameters
    ----------
    seed : int
        Of the random data and starting points.
    """
    return [
        rosenbrock(),
        powell(),
        woods(),
        trigonometric(),
        phase_retrieval(seed=seed),
        factorization(seed=seed),
        perceptron(seed=seed),
        student_t(seed=seed),
        nonconvex_logistic(seed=seed),
        coupled_humps(seed=seed),
    ]
