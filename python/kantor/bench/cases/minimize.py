"""Smooth functions to minimise, convex or not, with the same gradient and Hessian-vector products for everyone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kantor.bench.case import OWN, Peer, Problem, Run
from kantor.datasets import MinimizationProblem, minimization_problems
from kantor.optim import minimize

TITLE = "Smooth functions, float64, to |gradient| <= 1e-6; work: gradients, a Hessian-vector product as two"
SIZES = {"tiny": ("Powell",), "small": ("Rosenbrock", "factorisation", "logistic"), "full": ()}  # full: all
TOL, BUDGET = 1e-6, 20_000


class OverBudget(Exception):
    """No products are left."""


class Counted:
    """A problem's callables with their counts, by hand or by automatic differentiation."""

    def __init__(self, problem: MinimizationProblem, autograd: bool = False) -> None:
        self.problem, self.autograd = problem, autograd
        self.hvps = self.points = self.grads = 0
        self.x = self.g = np.empty(0)  # where the gradient was asked for last, and that gradient
        self._last = np.empty(0)
        self._graphs: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}

    def fun(self, x: Any) -> float:
        """Value."""
        return self.problem.fun(torch.from_numpy(x)).item() if self.autograd else self.problem.fun_numpy(x)

    def grad(self, x: Any) -> Any:
        """Gradient."""
        self.grads += 1
        if self.grads > 2 * BUDGET:
            raise OverBudget
        self.g = self._graph(x)[1].detach().numpy() if self.autograd else self.problem.grad_numpy(x)
        self.x = x.copy()
        return self.g

    def hvp(self, x: Any, v: Any) -> Any:
        """Product of the Hessian with v."""
        self.hvps += 1
        if self.hvps > BUDGET:
            raise OverBudget
        if not np.array_equal(self._last, x):
            self._last = x.copy()
            self.points += 1
        if not self.autograd:
            return self.problem.hvp_numpy(x, v)
        leaf, g = self._graph(x)
        return torch.autograd.grad(g, leaf, torch.from_numpy(v), retain_graph=True)[0].numpy()

    def _graph(self, x: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient with its graph, which serves all products at x; the last two are kept, for rejected steps."""
        key = x.tobytes()
        if key not in self._graphs:
            leaf = torch.from_numpy(x.copy()).requires_grad_()
            (g,) = torch.autograd.grad(self.problem.fun(leaf), leaf, create_graph=True)
            self._graphs = dict([*list(self._graphs.items())[-1:], (key, (leaf, g))])
        return self._graphs[key]

    def norm(self, x: Any) -> float:
        """Of the gradient at x, for nothing if it was the last one asked for."""
        return float(np.linalg.norm(self.g if np.array_equal(self.x, x) else self.grad(x)))


def kantor(**options: Any) -> Callable[[Counted], Any]:
    """Through NumPy callables, or with torch's own derivatives."""

    def run(c: Counted) -> Any:
        if not c.autograd:
            return minimize(c.fun, c.problem.x0.numpy(), grad=c.grad, hvp=c.hvp, tol=TOL, **options).x
        result = minimize(c.problem.fun, c.problem.x0, tol=TOL, max_hvp=BUDGET, **options)
        c.grads, c.hvps, c.points = result.n_grad, result.n_hvp, result.n_points
        return result.x.numpy()

    return run


def scipy(method: str) -> Callable[[Counted], Any]:
    """Stopped from outside where the method does not test the Euclidean norm of the gradient."""

    def run(c: Counted) -> Any:
        from scipy import optimize

        def stop(intermediate_result: Any) -> None:
            if c.norm(intermediate_result.x) <= TOL:
                raise StopIteration

        trust = method.startswith("trust")
        test = {"gtol": TOL} if trust else {"xtol": 1e-300}
        if method == "L-BFGS-B":
            test = {"gtol": 0.0, "ftol": 0.0, "maxfun": 2 * BUDGET}
        hessp = None if method == "L-BFGS-B" else c.hvp
        call: Any = optimize.minimize  # its annotations tell apart more than its users do
        return call(
            c.fun, c.problem.x0.numpy(), jac=c.grad, hessp=hessp, method=method, callback=None if trust else stop,
            options={"maxiter": 20_000, **test},
        ).x  # fmt: skip

    return run


def lbfgs(c: Counted) -> Any:
    """torch's with strong Wolfe search, a step at a time: each begins with the value and gradient that are known."""
    x = c.problem.x0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=1, max_eval=30, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    value = 0.0

    def closure() -> torch.Tensor:
        nonlocal value
        at = x.detach().numpy()
        if not np.array_equal(c.x, at):
            value = c.fun(at)
            c.grad(at)
        x.grad = torch.from_numpy(c.g.copy())
        return torch.tensor(value, dtype=x.dtype)

    while True:
        before = x.detach().clone()
        optimizer.step(closure)
        if c.norm(x.detach().numpy()) <= TOL or torch.equal(before, x.detach()):
            return x.detach().numpy()


# --- the case ---


def _peer(name: str, library: str, configuration: str, call: Callable[[Counted], Any], *needs: str) -> Peer:
    def prepare(task: MinimizationProblem) -> Run:
        def run() -> Counted:
            counted = Counted(task)
            try:
                counted.x = call(counted)
            except OverBudget:
                counted.x = np.full(task.x0.shape, np.nan)
            return counted

        return run

    return Peer(name, library, configuration, prepare, needs)


PEERS = {
    peer.name: peer
    for peer in (
        _peer("kantor", OWN, "minimize(fun, x0, grad=, hvp=)", kantor()),
        *(
            _peer(method, "SciPy", f"scipy.optimize.minimize(method='{method}')", scipy(method), "scipy")
            for method in ("trust-krylov", "trust-ncg", "Newton-CG", "L-BFGS-B")
        ),
        _peer("LBFGS", "torch", "torch.optim.LBFGS(line_search_fn='strong_wolfe')", lbfgs),
    )
}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """Some of the ten problems of `kantor.datasets`, or all; none on a GPU, for which they are too small."""
    if device == "cuda":
        return ()
    names = SIZES[size] or tuple(problem.name for problem in minimization_problems(0))
    # Two ways to sum, one gradient: a millionth of rounding.
    return tuple(Problem(name, "|gradient|", TOL * (1 + 1e-6), ("seconds", "work")) for name in names)


def make(problem: str, device: str) -> MinimizationProblem:
    """The function of that name."""
    return next(each for each in minimization_problems(0) if each.name == problem)


def judge(task: MinimizationProblem, answer: Counted) -> dict[str, Any]:
    """Norm of the gradient where the method ended, and what it asked for."""
    work = answer.grads + 2 * answer.hvps
    return {"accuracy": float(np.linalg.norm(task.grad_numpy(answer.x))), "work": work, "products": answer.hvps}
