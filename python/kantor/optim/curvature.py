"""Curvature models: what stands in for the Hessian in a Newton method, as linear operators.

Every function here returns a *curvature*, a function of x that gives the operator at x: ``logistic(A, l2=0.1)(x)``.
Pass it as ``curvature=`` to :func:`kantor.optim.minimize_gns`, or apply, factor and compare the operators themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_same, check_tensor
from kantor._errors import NumericalBreakdown
from kantor.linalg import Dense, Diagonal, LinearOperator, LowRank

Curvature = Callable[[Tensor], LinearOperator]


class Products(LinearOperator):
    """A symmetric operator given by the product of its matrix with rows ``(k, n)``."""

    def __init__(self, rows: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self._rows = rows
        self.shape = (like.numel(), like.numel())
        self.dtype, self.device = like.dtype, like.device

    @property
    def is_native(self) -> bool:
        """False: Python code applies it."""
        return False

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """Itself."""
        return self

    def _apply(self, x: Tensor) -> Tensor:
        return self._rows(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def asymmetry(self) -> tuple[float, str]:
        """Return a probe ``|u'Av - v'Au|`` relative to its terms."""
        return self._asymmetry_by_probe()


def zero() -> Curvature:
    """No curvature: Newton's method becomes a normalised gradient method.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> curvature.zero()(torch.ones(2)).diagonal()
    tensor([0., 0.])
    """
    return lambda x: Diagonal(torch.zeros_like(_point(x, "zero").reshape(-1)))


def hessian(fun: Callable[[Tensor], Tensor], *, mode: Literal["auto", "double_backward", "jvp"] = "auto") -> Curvature:
    """Return the exact Hessian of a scalar function, by Hessian-vector products.

    Parameters
    ----------
    fun : callable
        ``fun(x)``: a scalar, in torch operations that can be differentiated twice.
    mode : {"auto", "double_backward", "jvp"}
        Reverse mode through the graph of the gradient, which is kept, or forward mode through the gradient, which is
        formed anew. ``"auto"`` times both at the first operator and keeps the faster for all later ones.

    Returns
    -------
    callable
        x, of any shape, to an operator ``(n, n)`` on flat vectors. A matvec with k rows costs k products, in one sweep.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.hessian(lambda x: (x**3).sum(), mode="double_backward")
    >>> H(torch.tensor([1.0, 2.0])).matvec(torch.ones(2))
    tensor([ 6., 12.])
    """
    if mode not in ("auto", "double_backward", "jvp"):
        raise ValueError(f"hessian: mode: expected 'auto', 'double_backward' or 'jvp', got {mode!r}")
    chosen: str = mode

    def at(x: Tensor) -> LinearOperator:
        nonlocal chosen
        x = _point(x, "hessian")
        makers = {"double_backward": _by_double_backward, "jvp": _by_jvp}
        if chosen == "auto":
            probe = torch.ones(1, x.numel(), dtype=x.dtype, device=x.device)
            seconds: dict[str, float] = {}
            for name, maker in makers.items():
                try:
                    rows = maker(fun, x)
                    rows(probe)
                    seconds[name] = min(_timed(rows, probe) for _ in range(3))
                except (RuntimeError, NotImplementedError):  # no forward-mode rule, say
                    continue
            chosen = min(seconds, key=seconds.__getitem__) if seconds else "double_backward"
        return Products(makers[chosen](fun, x), x)

    return at


def _timed(rows: Callable[[Tensor], Tensor], probe: Tensor) -> float:
    started = time.perf_counter()
    rows(probe)
    if probe.is_cuda:
        torch.cuda.synchronize(probe.device)
    return time.perf_counter() - started


def _by_double_backward(fun: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        (graph,) = torch.autograd.grad(fun(leaf), leaf, create_graph=True)
        graph = graph.reshape(-1)

    def rows(V: Tensor) -> Tensor:
        if not graph.requires_grad:
            return torch.zeros_like(V)
        if len(V) == 1:
            (product,) = torch.autograd.grad(graph, leaf, V[0], retain_graph=True)
            return product.reshape(1, -1)
        (products,) = torch.autograd.grad(graph, leaf, V, retain_graph=True, is_grads_batched=True)
        return products.reshape(V.shape)

    return rows


def _by_jvp(fun: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    gradient = torch.func.grad(fun)
    x = x.detach()

    def product(v: Tensor) -> Tensor:
        tangent: Tensor = torch.func.jvp(gradient, (x,), (v.view(x.shape),))[1]
        return tangent.reshape(-1)

    def rows(V: Tensor) -> Tensor:
        result: Tensor = product(V[0]).unsqueeze(0) if len(V) == 1 else torch.func.vmap(product)(V)
        return result.detach()

    return rows


# --- models and losses ---


def gauss_newton(
    model: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor] | None = None,
) -> Curvature:
    """Return the (generalised) Gauss-Newton matrix ``J' L J`` of ``loss(model(x))``.

    Parameters
    ----------
    model : callable
        x to residuals or outputs, of any shape; J is its Jacobian.
    loss : callable, optional
        Outputs to a scalar; L is its Hessian. Default: ``|u|^2 / 2``, L the identity.

    Returns
    -------
    callable
        x to an operator. Positive semidefinite for a convex loss. A matvec is one forward-mode and one reverse-mode
        sweep through the model.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.gauss_newton(lambda x: x**2)  # J = diag(2 x)
    >>> H(torch.tensor([1.0, 2.0])).matvec(torch.ones(2))
    tensor([ 4., 16.])
    """

    def at(x: Tensor) -> LinearOperator:
        x = _point(x, "gauss_newton")
        outputs, pull_back = torch.func.vjp(model, x)[:2]
        outer = None if loss is None else torch.func.grad(loss)

        def product(v: Tensor) -> Tensor:
            moved = torch.func.jvp(model, (x,), (v.view(x.shape),))[1]
            if outer is not None:
                moved = torch.func.jvp(outer, (outputs,), (moved,))[1]
            back: Tensor = pull_back(moved)[0]
            return back.reshape(-1)

        def rows(V: Tensor) -> Tensor:
            result: Tensor = product(V[0]).unsqueeze(0) if len(V) == 1 else torch.func.vmap(product)(V)
            return result.detach()

        return Products(rows, x)

    return at


def fisher(
    model: Callable[[Tensor], Tensor], likelihood: Literal["categorical", "gaussian"] = "categorical"
) -> Curvature:
    """Return the Fisher information matrix of a model, averaged over its samples.

    Parameters
    ----------
    model : callable
        x to logits ``(N, C)`` (categorical), or to means ``(N, ...)`` of unit variance (gaussian).
    likelihood : {"categorical", "gaussian"}
        The distribution of the labels given the outputs.

    Returns
    -------
    callable
        x to an operator: the Gauss-Newton matrix of the mean negative log-likelihood, which does not depend on labels.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.fisher(lambda x: x.view(1, 2))  # one sample, logits x
    >>> H(torch.zeros(2)).dense()
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    if likelihood == "categorical":
        return gauss_newton(model, lambda z: torch.logsumexp(z, -1).mean())
    if likelihood == "gaussian":
        return gauss_newton(model, lambda z: 0.5 * z.square().sum() / z.shape[0])
    raise ValueError(f"fisher: likelihood: expected 'categorical' or 'gaussian', got {likelihood!r}")


def empirical_fisher(per_sample_grads: Tensor | Callable[[Tensor], Tensor]) -> Curvature:
    """Return ``(1/N) sum_i g_i g_i'`` as a low-rank operator.

    Parameters
    ----------
    per_sample_grads : Tensor or callable
        ``(N, n)``, or a function of x that gives them.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.empirical_fisher(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> H(torch.zeros(2)).dense()
    tensor([[1., 1.],
            [1., 2.]])
    """

    def at(x: Tensor) -> LinearOperator:
        x = _point(x, "empirical_fisher")
        G = per_sample_grads(x) if callable(per_sample_grads) else per_sample_grads
        check_tensor(G, "empirical_fisher", "per_sample_grads")
        if G.ndim != 2 or G.shape[0] == 0 or G.shape[1] != x.numel():
            raise ValueError(
                f"empirical_fisher: per_sample_grads: expected shape (N, {x.numel()}), N > 0, got {tuple(G.shape)}"
            )
        return LowRank(G.detach(), G.new_full((G.shape[0],), 1 / G.shape[0]))

    return at


# --- models that are linear in x ---


def logistic(A: Tensor, *, l2: float = 0.0, exact: bool = True) -> Curvature:
    """Return the curvature of ``mean log(1 + exp(-y_i a_i'x)) + l2 |x|^2 / 2``, labels y of +-1.

    Parameters
    ----------
    A : Tensor
        Samples in rows, ``(N, n)``. Labels do not matter.
    l2 : float
        Weight of the penalty, >= 0.
    exact : bool
        ``A' diag(s (1 - s)) A / N`` with the sigmoid s; otherwise its bound ``A'A / (4 N)``, the same for all x, which
        is factored once.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.logistic(torch.tensor([[2.0, 0.0]]), l2=1.0)
    >>> H(torch.zeros(2)).diagonal()
    tensor([2., 1.])
    """
    A = _samples(A, "logistic")
    _nonnegative(l2, "logistic", "l2")
    quarter = A.new_full((A.shape[0],), 0.25 / A.shape[0])
    bound = _penalised(LowRank(A, quarter), l2)

    def at(x: Tensor) -> LinearOperator:
        if not exact:
            return bound
        s = torch.sigmoid(A @ _point(x, "logistic"))
        return _penalised(LowRank(A, s * (1 - s) / A.shape[0]), l2)

    return at


def softmax(A: Tensor, classes: int, *, l2: float = 0.0, exact: bool = True) -> Curvature:
    """Return the curvature of softmax regression, ``mean (logsumexp(a_i'W) - (a_i'W)_y_i) + l2 |W|^2 / 2``.

    Parameters
    ----------
    A : Tensor
        Samples in rows, ``(N, features)``.
    classes : int
        Columns C of W; x is W, ``(features, C)``, or its flattened form.
    l2 : float
        Weight of the penalty, >= 0.
    exact : bool
        Otherwise the weighted Gauss-Newton matrix, which leaves out ``p p'``: diagonal blocks alone, larger in the
        Loewner order.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.softmax(torch.tensor([[2.0]]), classes=2)
    >>> H(torch.zeros(1, 2)).dense()
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """
    A = _samples(A, "softmax")
    _nonnegative(l2, "softmax", "l2")
    if not (isinstance(classes, int) and classes >= 2):
        raise ValueError(f"softmax: classes: expected an integer >= 2, got {classes!r}")

    def at(x: Tensor) -> LinearOperator:
        W = _point(x, "softmax").reshape(A.shape[1], classes)
        P = torch.softmax(A @ W, -1)

        def rows(V: Tensor) -> Tensor:
            Z = A @ V.reshape(-1, A.shape[1], classes)
            Q = P * Z
            if exact:
                Q = Q - P * Q.sum(-1, keepdim=True)
            return (A.mT @ Q).reshape(V.shape) / A.shape[0] + l2 * V

        return Products(rows, W)

    return at


def logsumexp(A: Tensor, b: Tensor, mu: float = 1.0, *, exact: bool = True) -> Curvature:
    """Return the curvature of ``mu log sum_i exp((a_i'x - b_i) / mu)``, a smooth maximum.

    Parameters
    ----------
    A, b : Tensor
        ``(m, n)`` and ``(m,)``.
    mu : float
        Smoothing, > 0.
    exact : bool
        With pi the softmax weights, ``(A' diag(pi) A - (A'pi)(A'pi)') / mu``; otherwise the weighted Gauss-Newton
        matrix ``A' diag(pi) A / mu``, larger in the Loewner order. Both are low-rank operators.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.logsumexp(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))  # log(2 cosh x)
    >>> H(torch.zeros(1)).dense()
    tensor([[1.]])
    """
    A = _samples(A, "logsumexp")
    check_tensor(b, "logsumexp", "b")
    check_same("logsumexp", [("A", A), ("b", b)])
    if b.shape != A.shape[:1]:
        raise ValueError(f"logsumexp: b: expected shape ({A.shape[0]},), got {tuple(b.shape)}")
    if not mu > 0:
        raise ValueError(f"logsumexp: mu: expected a number > 0, got {mu!r}")

    def at(x: Tensor) -> LinearOperator:
        pi = torch.softmax((A @ _point(x, "logsumexp") - b) / mu, 0)
        weighted = LowRank(A, pi / mu)
        if not exact:
            return weighted
        return weighted - LowRank((pi @ A).unsqueeze(0), pi.new_full((1,), 1 / mu))

    return at


def power_residual(
    residual_fn: Callable[[Tensor], Tensor], p: float, kind: Literal["exact", "inexact", "fisher"] = "inexact"
) -> Curvature:
    """Return the curvature of ``|u(x)|^p / p`` for residuals u with Jacobian J.

    Parameters
    ----------
    residual_fn : callable
        x ``(n,)`` to u ``(m,)``.
    p : float
        >= 2.
    kind : {"exact", "inexact", "fisher"}
        ``"inexact"``: ``|u|^(p-2) J'J + (p-2) |u|^(p-4) (J'u)(J'u)'``, without second derivatives of u; Gauss-Newton
        for p = 2. ``"fisher"``: the second, rank-one term alone. Both are low-rank operators; the first costs the
        Jacobian, m reverse sweeps at once. ``"exact"``: the Hessian.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import curvature
    >>> H = curvature.power_residual(lambda x: x, 4, "exact")  # of |x|^4 / 4
    >>> H(torch.tensor([1.0, 0.0])).dense()
    tensor([[3., 0.],
            [0., 1.]])
    """
    if not p >= 2:
        raise ValueError(f"power_residual: p: expected a number >= 2, got {p!r}")
    if kind not in ("exact", "inexact", "fisher"):
        raise ValueError(f"power_residual: kind: expected 'exact', 'inexact' or 'fisher', got {kind!r}")
    if kind == "exact":
        return hessian(lambda x: residual_fn(x).square().sum() ** (p / 2) / p)

    def at(x: Tensor) -> LinearOperator:
        x = _point(x, "power_residual")
        u, pull_back = torch.func.vjp(residual_fn, x)[:2]
        size = u.norm()
        along = pull_back(u)[0].reshape(1, -1)  # J'u
        second = size ** (p - 4) * (p - 2) if bool(size > 0) else torch.zeros_like(size)
        rank_one = LowRank(along, second.reshape(1))
        if kind == "fisher":
            return rank_one
        J = torch.func.jacrev(residual_fn)(x).reshape(u.numel(), -1)
        first = size ** (p - 2) if p > 2 else torch.ones_like(size)  # at u = 0: no curvature for p > 2, J'J for p = 2
        main = LowRank(J, first.expand(u.numel()).contiguous())
        return main if p == 2 else main + rank_one

    return at


# --- shared ---


def low_rank_form(A: LinearOperator) -> tuple[LowRank, float] | None:
    """Return an operator as one LowRank plus a multiple of the identity, where it is such a sum (for Woodbury)."""
    terms = [(1.0, A)] if isinstance(A, LowRank) else getattr(A, "terms", [])
    low = [(scale, term) for scale, term in terms if isinstance(term, LowRank)]
    shift = 0.0
    for scale, term in terms:
        if isinstance(term, Diagonal) and bool((term.values == term.values[0]).all()):
            shift += scale * float(term.values[0])
        elif not isinstance(term, LowRank):
            return None
    if not low:
        return None
    if len(low) == 1 and low[0][0] == 1.0:
        return low[0][1], shift
    factors, weights = [term.factors for _, term in low], [scale * term.weights for scale, term in low]
    return LowRank(torch.cat(factors), torch.cat(weights)), shift


def as_curvature_operator(value: Any, x: Tensor, function: str) -> LinearOperator:
    """Return what a user's curvature gave, an operator or a dense symmetric matrix, as an operator on ``(n,)``."""
    n = x.numel()
    if not isinstance(value, LinearOperator | Tensor):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor):
        if value.ndim > 2 and value.numel() == n * n:  # torch.func.hessian, of unknowns that are a matrix
            value = value.reshape(n, n)
        if value.layout is torch.strided and not bool(torch.isfinite(value).all()):
            raise NumericalBreakdown(f"{function}: curvature: NaN or infinite entries")
    operator = value if isinstance(value, LinearOperator) else Dense(value.detach())
    if operator.shape != (n, n):
        raise ValueError(f"{function}: curvature: expected shape {(n, n)}, got {operator.shape}")
    if operator.dtype != x.dtype or operator.device != x.device:
        raise ValueError(
            f"{function}: curvature: expected {x.dtype} on {x.device}, got {operator.dtype} on {operator.device}"
        )
    if isinstance(operator, Dense):
        relative, where = operator.asymmetry()
        if relative > 1e-6:
            raise ValueError(f"{function}: curvature: expected a symmetric matrix: {where}")
    return operator


def _penalised(A: LinearOperator, l2: float) -> LinearOperator:
    return A if l2 == 0 else A + Diagonal(torch.full((A.shape[0],), l2, dtype=A.dtype, device=A.device))


def _point(x: Any, function: str) -> Tensor:
    """A tensor, also where the unknowns are a NumPy array."""
    point = check_tensor(torch.from_numpy(x) if isinstance(x, np.ndarray) else x, function, "x")
    check_float(point, function, "x")
    return point.detach()


def _samples(A: Tensor, function: str) -> Tensor:
    check_tensor(A, function, "A")
    check_float(A, function, "A")
    if A.ndim != 2 or A.numel() == 0:
        raise ValueError(f"{function}: A: expected shape (samples, features), not empty, got {tuple(A.shape)}")
    check_finite(A, function, "A")
    return A.detach()


def _nonnegative(value: float, function: str, name: str) -> None:
    if not value >= 0:
        raise ValueError(f"{function}: {name}: expected a number >= 0, got {value!r}")


__all__ = [
    "empirical_fisher",
    "fisher",
    "gauss_newton",
    "hessian",
    "logistic",
    "logsumexp",
    "power_residual",
    "softmax",
    "zero",
]
