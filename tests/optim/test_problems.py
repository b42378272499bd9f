"""The ten problems of kantor.datasets: what is found, beside SciPy, with a budget kept by an exception."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from kantor.datasets import MinimizationProblem, minimization_problems
from kantor.optim import minimize

PROBLEMS = minimization_problems()
QUICK = [p for p in PROBLEMS if p.name != "perceptron"]


class OverBudget(Exception):
    pass


class Counted:
    def __init__(self, problem: MinimizationProblem, most: int = 20_000) -> None:
        self.problem, self.most, self.calls = problem, most, 0

    def hvp(self, x: Any, v: Any) -> Any:
        self.calls += 1
        if self.calls > self.most:
            raise OverBudget
        return self.problem.hvp_numpy(x, v)

    def run(self, **options: Any) -> Any:
        p = self.problem
        return minimize(p.fun_numpy, p.x0.numpy(), grad=p.grad_numpy, hvp=self.hvp, tol=1e-6, **options)


@pytest.mark.parametrize("problem", QUICK, ids=lambda p: p.name)
@pytest.mark.parametrize("preset", ["economy", "guarantee", "paper"])
def test_every_preset_solves_it(problem: MinimizationProblem, preset: str) -> None:
    result = Counted(problem).run(preset=preset).check()
    assert np.linalg.norm(problem.grad_numpy(result.x)) <= 1e-6
    assert (np.diff(result.history["fun"]) <= 1e-14 * (1 + np.abs(result.history["fun"][:-1]))).all()


@pytest.mark.parametrize("problem", QUICK, ids=lambda p: p.name)
def test_value_is_scipys_where_both_find_one_minimum(problem: MinimizationProblem) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = optimize.minimize(
            problem.fun_numpy, problem.x0.numpy(), jac=problem.grad_numpy, hessp=problem.hvp_numpy,
            method="trust-krylov", options={"gtol": 1e-8},
        )  # fmt: skip
    result = Counted(problem).run()
    if np.abs(np.abs(result.x) - np.abs(theirs.x)).max() < 1e-3:  # up to a sign that some problems leave open
        assert result.fun == pytest.approx(theirs.fun, rel=1e-8, abs=1e-8)
    else:  # another minimum, or one of many equal ones: no saddle either way
        H = torch.autograd.functional.hessian(problem.fun, torch.from_numpy(result.x))
        values = torch.linalg.eigvalsh(H)
        assert values[0] > -1e-6 * values[-1]


def test_few_products_and_points() -> None:
    """Counts are the same on every machine, up to rounding: the default spends fewer products than trust-krylov."""
    optimize = pytest.importorskip("scipy.optimize")
    ratios, points = [], []
    for problem in QUICK:
        mine, guarantee, theirs = Counted(problem), Counted(problem), Counted(problem)
        mine.run().check()
        n_points = guarantee.run(preset="guarantee").check().n_points
        seen: list[Any] = []

        def hvp(x: Any, v: Any, counted: Counted = theirs, seen: list[Any] = seen) -> Any:
            if not seen or not np.array_equal(seen[-1], x):
                seen.append(x.copy())
            return counted.hvp(x, v)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimize.minimize(
                problem.fun_numpy, problem.x0.numpy(), jac=problem.grad_numpy, hessp=hvp, method="trust-krylov",
                options={"gtol": 1e-6},
            )  # fmt: skip
        ratios.append(np.log((mine.calls + 10) / (theirs.calls + 10)))
        points.append(np.log((n_points + 10) / (len(seen) + 10)))
    assert np.exp(np.mean(ratios)) <= 1.1
    assert np.exp(np.mean(points)) <= 0.85


@pytest.mark.slow
def test_hard_problem_within_the_budget(size: str) -> None:
    for seed in range(3 if size == "full" else 1):
        problem = minimization_problems(seed)[6]
        assert problem.name == "perceptron"
        assert Counted(problem).run().converged


def test_budget_exception_comes_out() -> None:
    with pytest.raises(OverBudget):
        Counted(PROBLEMS[0], most=100).run()
