"""Gradient-normalised smoothness: published counts, what a low-rank solve saves, scikit-learn beside it.

    python bench/optim/bench_gns.py
    python bench/optim/bench_gns.py counts solves --unknowns 2000 --repeats 5 --threads 2

Prints a table a part, and one JSON line a row on standard error. Times are medians of interleaved repetitions in one
process; what is compared is their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kantor.bench.tables import Table
from kantor.linalg import Dense, Diagonal, LowRank, cg, multishift_cg
from kantor.optim import OptimizeResult, curvature, minimize_gns

F64 = torch.float64


def uniform(*shape: int, first: bool = False) -> Tensor:
    """The published draws in [-1, 1], of NumPy's legacy generator; `first` seeds it."""
    if first:
        np.random.seed(3124)  # noqa: NPY002
    return torch.from_numpy(np.random.rand(*shape) * 2 - 1)  # noqa: NPY002


def note(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps(record), file=sys.stderr, flush=True)


def seconds_of(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a slow minute hits all of them."""
    for function in functions.values():
        function()
    seen: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seen[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seen.items()}


# --- iterations and solves to a target ---


def log_sum_exp() -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]:
    """200 unknowns, minimum at 0: the function, rows and offsets of its exponents, its metric."""
    columns, b = uniform(200, 200, first=True), uniform(200)
    rows = columns.T - columns @ torch.softmax(-b, 0)
    return lambda x: torch.logsumexp(rows @ x - b, 0), rows, b, columns @ columns.T


def gradient_method(fun: Callable[[Tensor], Tensor], x: Tensor, metric: Tensor, best: float, target: float) -> int:
    """Iterations of gradient descent in a metric; the step doubles on success and halves on failure."""
    L, factor, gradient = 1.0, torch.linalg.cholesky(metric), torch.func.grad(fun)
    f = float(fun(x))
    for iteration in range(10_000):
        if f - best < target:
            return iteration
        g = gradient(x)
        d = torch.cholesky_solve(g.unsqueeze(-1), factor).squeeze(-1)
        while True:
            trial = x - d / L
            f_trial = float(fun(trial))
            if f_trial <= f - float(g @ d) / (2 * L):
                break
            L *= 2
        x, f, L = trial, f_trial, L / 2
    return -1


def rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock's function of two unknowns."""
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def chebyshev(x: Tensor) -> Tensor:
    """Residuals of the Chebyshev equations."""
    return torch.cat([(1 - x[:1]) / 2, x[1:] - 2 * x[:-1] ** 2 + 1])


def counts(arguments: argparse.Namespace) -> None:
    """The table of published counts."""
    table = Table(
        "Iterations and solves to the target",
        ("problem", "curvature", "iterations", "published", "solves", "published ", "f - f*", "seconds"),
    )

    def row(problem: str, method: str, published: tuple[int, int], result: OptimizeResult, best: float) -> None:
        found = (result.n_iter, result.n_solve)
        fits = result.converged and all(abs(a - b) <= 0.2 * b for a, b in zip(found, published, strict=True))
        gap, spent = f"{result.fun - best:.1e}", f"{result.seconds:.2f}"
        table.add(problem, method, found[0], published[0], found[1], published[1], gap, spent)
        note(part="counts", problem=problem, method=method, found=found, published=published, within_20_percent=fits)
        if not fits:
            table.notes.append(f"{problem}, {method}: NOT within 20 % of the published counts ({result.status})")

    fun, rows, b, metric = log_sum_exp()
    ones = torch.ones(200, dtype=F64)
    best = float(fun(torch.zeros(200, dtype=F64)))
    for method, at, published in (
        ("exact", curvature.logsumexp(rows, b), (18, 28)),
        ("weighted Gauss-Newton", curvature.logsumexp(rows, b, exact=False), (30, 54)),
    ):
        result = minimize_gns(fun, ones, curvature=at, metric=metric, f_star=best, tol_f=1e-8, tol=0.0)
        row("log-sum-exp, n = m = 200", method, published, result, best)
    zero = minimize_gns(fun, ones, curvature="zero", metric=metric, f_star=best, tol_f=1e-8, tol=0.0)
    table.add("", "zero", zero.n_iter, "-", zero.n_solve, "-", f"{zero.fun - best:.1e}", f"{zero.seconds:.2f}")
    steps = gradient_method(fun, ones, metric, best, 1e-8)
    table.add("", "gradient method, backtracking", steps, 74, "-", "-", "< 1e-8", "-")

    x0 = torch.tensor([-2.0, 2.0], dtype=F64)
    result = minimize_gns(rosenbrock, x0, f_star=0.0, tol_f=1e-12, tol=0.0)
    row("Rosenbrock", "exact", (52, 106), result, 0.0)

    for n, published in ((50, (23, 47)), (200, (26, 53))):
        x0 = (uniform(n, first=True) + 1) / 2
        result = minimize_gns(
            lambda x: chebyshev(x).square().sum() ** 2 / 4, x0, curvature=curvature.power_residual(chebyshev, 4),
            f_star=0.0, tol_f=1e-10, tol=0.0,
        )  # fmt: skip
        row(f"Chebyshev, n = {n}, p = 4", "inexact", published, result, 0.0)

    A, b = uniform(100, 200, first=True), uniform(100)
    metric = A.T @ A + 1e-8 * torch.eye(200, dtype=F64)
    for kind, published in (("exact", (30, 63)), ("fisher", (20, 40))):
        result = minimize_gns(
            lambda x: (A @ x - b).square().sum() ** 2 / 4, ones,
            curvature=curvature.power_residual(lambda x: A @ x - b, 4, kind),  # type: ignore[arg-type]
            metric=metric, f_star=0.0, tol_f=1e-10, tol=0.0,
        )  # fmt: skip
        row("linear residuals, 100 x 200, p = 4", kind, published, result, 0.0)
    table.print()


# --- one solve, by the form of the curvature ---


def solves(arguments: argparse.Namespace) -> None:
    """A trial with low-rank curvature against one with the same matrix, dense."""
    n, repeats = arguments.unknowns, arguments.repeats
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(n, dtype=F64, generator=generator)
    R = torch.randn(n, n, dtype=F64, generator=generator)
    B = R @ R.T / n + torch.eye(n, dtype=F64)
    L, eye = torch.linalg.cholesky(B), torch.eye(n, dtype=F64)
    table = Table(
        f"One trial (H + lam B) d = -g, n = {n}, milliseconds",
        ("curvature", "metric", "low rank", "per further trial", "dense Cholesky", "ratio"),
    )
    for rank in (1, 20, 200):
        F = torch.randn(rank, n, dtype=F64, generator=generator)
        H = F.T @ F
        for name, metric in (("identity", None), ("matrix", B)):

            def whiten(v: Tensor, metric: Tensor | None = metric) -> Tensor:
                return v if metric is None else torch.linalg.solve_triangular(L, v.mT, upper=False).mT

            def unwhiten(v: Tensor, metric: Tensor | None = metric) -> Tensor:
                return v if metric is None else torch.linalg.solve_triangular(L.mT, v.mT, upper=True).mT

            prepared = LowRank(whiten(F)).shifted_solver()

            def further(prepared: Any = prepared, w: Any = whiten, u: Any = unwhiten) -> Tensor:
                return u(prepared.solve(0.3, w(g[None])))  # type: ignore[no-any-return]

            def first(F: Tensor = F, w: Any = whiten, u: Any = unwhiten) -> Tensor:
                return u(LowRank(w(F)).shifted_solver().solve(0.3, w(g[None])))  # type: ignore[no-any-return]

            def dense(H: Tensor = H, metric: Tensor | None = metric) -> Tensor:
                shifted = H + 0.3 * (eye if metric is None else metric)
                return torch.cholesky_solve(g[:, None], torch.linalg.cholesky_ex(shifted)[0])

            error = float((first()[0] - dense()[:, 0]).norm() / dense().norm())
            assert error < 1e-9, error
            t = seconds_of({"first": first, "further": further, "dense": dense}, repeats)
            ratio = t["first"] / t["dense"]
            label = "Fisher term, rank 1" if rank == 1 else f"rank {rank}"
            table.add(
                label, name, f"{t['first'] * 1e3:.2f}", f"{t['further'] * 1e3:.2f}", f"{t['dense'] * 1e3:.1f}",
                f"{ratio:.4f}",
            )  # fmt: skip
            note(part="solves", n=n, rank=rank, metric=name, **t, ratio=ratio)
            if rank == 1 and ratio > 0.1:
                table.notes.append(f"Fisher term, {name}: NOT <= 0.1 of dense Cholesky")
    table.print()

    # The same inside a whole run: a fixed number of iterations on linear residuals to the fourth power.
    A, b = torch.randn(n // 2, n, dtype=F64, generator=generator), torch.randn(n // 2, dtype=F64, generator=generator)
    table = Table(
        f"Whole iterations, linear residuals {n // 2} x {n}, p = 4", ("curvature", "solver", "solves", "ms / solve")
    )

    def residual(x: Tensor) -> Tensor:
        return A @ x - b

    at = curvature.power_residual(residual, 4, "fisher")
    for solver in ("woodbury", "cholesky"):
        result = minimize_gns(
            lambda x: residual(x).square().sum() ** 2 / 4, torch.ones(n, dtype=F64), curvature=at, solver=solver,
            max_iter=4, tol=0.0,
        )  # fmt: skip
        table.add("Fisher term", solver, result.n_solve, f"{result.seconds / result.n_solve * 1e3:.1f}")
        note(part="run", n=n, solver=solver, n_solve=result.n_solve, seconds=result.seconds)
    table.print()


def shifts(arguments: argparse.Namespace) -> None:
    """Eight shifts at once against eight solves."""
    n = arguments.unknowns
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(n, n, dtype=F64, generator=generator)
    A, b = Dense(R @ R.T / n), torch.randn(n, dtype=F64, generator=generator)
    values = 0.01 * 2.0 ** torch.arange(8, dtype=F64)
    systems = [A + Diagonal(torch.full((n,), float(s), dtype=F64)) for s in values]
    t = seconds_of(
        {
            "together": lambda: multishift_cg(A, b, values, rtol=1e-6),
            "apart": lambda: [cg(system, b, rtol=1e-6) for system in systems],
        },
        arguments.repeats,
    )
    products = multishift_cg(A, b, values, rtol=1e-6).iterations, sum(cg(s, b, rtol=1e-6).iterations for s in systems)
    table = Table(f"Eight shifts of a dense matrix, n = {n}, rtol 1e-6", ("", "products", "milliseconds"))
    table.add("multi-shift CG", products[0], f"{t['together'] * 1e3:.1f}")
    table.add("eight times CG", products[1], f"{t['apart'] * 1e3:.1f}")
    table.print()
    note(part="shifts", n=n, products=products, **t)


# --- scikit-learn ---


def regression(arguments: argparse.Namespace) -> None:
    """Logistic and softmax regression on scikit-learn's data, against its fastest exact solver; one thread each.

    More threads of two libraries in one process get into each other's way.
    """
    from sklearn import datasets, linear_model
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)

    table = Table(
        "Regression with l2 = 1e-4, gradient norm 1e-8 from 0; one thread",
        ("data", "curvature", "iterations", "solves", "|g|", "f / theirs - 1", "ms", "scikit-learn ms", "ratio"),
    )
    l2 = 1e-4
    for name in ("breast_cancer", "digits"):
        X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        X = np.column_stack([(X - X.mean(0)) / np.maximum(X.std(0), 1e-12), np.ones(len(X))])
        A, labels = torch.from_numpy(X), torch.from_numpy(y).long()
        if name == "digits":
            x0 = torch.zeros(A.shape[1], 10, dtype=F64)
            models = {
                "exact": curvature.softmax(A, 10, l2=l2),
                "hessian": "hessian",
            }

            def fun(W: Tensor, A: Tensor = A, labels: Tensor = labels) -> Tensor:
                return torch.nn.functional.cross_entropy(A @ W, labels) + l2 * W.square().sum() / 2

        else:
            x0, signs = torch.zeros(A.shape[1], dtype=F64), 2.0 * labels - 1.0
            models = {
                "exact": curvature.logistic(A, l2=l2),
                "hessian": "hessian",
            }

            def fun(x: Tensor, A: Tensor = A, signs: Tensor = signs) -> Tensor:
                return torch.nn.functional.softplus(-signs * (A @ x)).mean() + l2 * x @ x / 2

        model = linear_model.LogisticRegression(
            C=1 / (len(y) * l2), solver="newton-cholesky", tol=1e-10, fit_intercept=False, max_iter=1000
        )
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")
            coefficients = torch.from_numpy(model.fit(X, y).coef_)
            theirs = float(fun(coefficients.T if name == "digits" else coefficients[0]))
            for method, at in models.items():
                result = minimize_gns(fun, x0, curvature=at, tol=1e-8, max_iter=60)
                t = seconds_of(
                    {
                        "ours": lambda at=at, fun=fun, x0=x0: minimize_gns(
                            fun, x0, curvature=at, tol=1e-8, max_iter=60
                        ),
                        "theirs": lambda model=model, X=X, y=y: model.fit(X, y),
                    },
                    arguments.repeats,
                )
                relative = result.fun / theirs - 1
                ours, scikit = t["ours"], t["theirs"]
                table.add(
                    name, method, result.n_iter, result.n_solve, f"{result.grad_norm:.1e}", f"{relative:.1e}",
                    f"{ours * 1e3:.0f}", f"{scikit * 1e3:.0f}", f"{ours / scikit:.2f}",
                )  # fmt: skip
                note(
                    part="regression", data=name, method=method, status=str(result.status), n_iter=result.n_iter,
                    n_solve=result.n_solve, grad_norm=result.grad_norm, relative=relative, ours=ours, theirs=scikit,
                )  # fmt: skip
                if not result.converged or abs(relative) > 1e-8:
                    table.notes.append(
                        f"{name}, {method}: {result.status}, objective {relative:.1e} from scikit-learn's"
                    )
    table.print()


PARTS = {"counts": counts, "solves": solves, "shifts": shifts, "regression": regression}


def main() -> None:
    """Run the parts that are asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--unknowns", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    for name in arguments.parts or PARTS:
        torch.set_num_threads(arguments.threads)
        PARTS[name](arguments)


if __name__ == "__main__":
    main()
