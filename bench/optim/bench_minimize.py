"""The ten problems of kantor.datasets: Kantor's minimisers and SciPy's in one run.

    python bench/optim/bench_minimize.py --seeds 0 1 2 --repeats 3 -o results/minimize.jsonl

Every method gets the same NumPy callables (value, gradient, product), tolerance 1e-6 on the Euclidean norm of the
gradient and 20 000 products, kept by an exception from inside the callable. SciPy runs by itself, not through Kantor.
CPU seconds are medians over interleaved repetitions. Means are shifted geometric (shift 10) over the problems that the
method and trust-krylov both solved.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kantor.datasets import MinimizationProblem, minimization_problems
from kantor.datasets.minimization import extended_rosenbrock
from kantor.optim import minimize
from scipy.optimize import minimize as scipy_minimize

TOL, BUDGET = 1e-6, 20_000
BASE = "trust-krylov"


class OverBudget(Exception):
    """No products are left."""


class Counted:
    """A problem's callables with their counts."""

    def __init__(self, problem: MinimizationProblem) -> None:
        self.problem = problem
        self.hvps = self.points = 0
        self._last: Any = None

    def hvp(self, x: Any, v: Any) -> Any:
        self.hvps += 1
        if self.hvps > BUDGET:
            raise OverBudget
        if self._last is None or not np.array_equal(self._last, x):
            self._last = x.copy()
            self.points += 1
        return self.problem.hvp_numpy(x, v)


def kantor(**options: Any) -> Callable[[Counted], Any]:
    def run(c: Counted) -> Any:
        p = c.problem
        return minimize(p.fun_numpy, p.x0.numpy(), grad=p.grad_numpy, hvp=c.hvp, tol=TOL, **options).x

    return run


def scipy(method: str) -> Callable[[Counted], Any]:
    def run(c: Counted) -> Any:
        p = c.problem
        stop = {"gtol": TOL} if method.startswith("trust") else {"xtol": 1e-10}
        options = {"maxiter": 20_000, **stop}
        return scipy_minimize(
            p.fun_numpy, p.x0.numpy(), jac=p.grad_numpy, hessp=c.hvp, method=method, options=options
        ).x

    return run


METHODS = {
    BASE: scipy("trust-krylov"),
    "trust-ncg": scipy("trust-ncg"),
    "newton-cg": scipy("Newton-CG"),
    "arncg": kantor(),
    "arncg guarantee": kantor(preset="guarantee"),
    "arncg paper": kantor(preset="paper"),
}
# Wanted against trust-krylov: products, points.
WANTED = {"arncg": (1.1, math.inf), "arncg guarantee": (1.8, 0.85), "arncg paper": (2.4, 0.85)}


def measure(name: str, problem: MinimizationProblem) -> dict[str, Any]:
    counted = Counted(problem)
    started = time.process_time()
    try:
        x = METHODS[name](counted)
        solved = bool(np.linalg.norm(problem.grad_numpy(x)) <= TOL)
    except OverBudget:
        solved = False
    seconds = time.process_time() - started
    facts = {"solved": solved, "hvps": counted.hvps, "points": counted.points, "seconds": seconds}
    return {"method": name, "problem": problem.name, **facts}


def shifted_mean(values: list[float], shift: float = 10.0) -> float:
    return math.exp(statistics.fmean(math.log(v + shift) for v in values)) - shift


def summary(records: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Means of a method and its ratios to the base, over what both solved."""
    by = {(r["method"], r["seed"], r["problem"]): r for r in records}
    mine = [r for r in records if r["method"] == name]
    pairs = [(r, by[BASE, r["seed"], r["problem"]]) for r in mine]
    both = [(a, b) for a, b in pairs if a["solved"] and b["solved"]]
    out: dict[str, float] = {"solved": sum(r["solved"] for r in mine), "of": len(mine)}
    for key in ("hvps", "points"):
        a, b = (shifted_mean([pair[k][key] for pair in both]) for k in (0, 1))
        out[key], out[f"{key}_ratio"] = a, a / b
    out["seconds_ratio"] = math.exp(statistics.fmean(math.log(a["seconds"] / b["seconds"]) for a, b in both))
    return out


def main() -> None:
    """Measure, write the records, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--large", type=int, default=1_000_000, help="size of the large problem; 0: none")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    records = []
    for seed in arguments.seeds:
        for problem in minimization_problems(seed):
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
            for _ in range(arguments.repeats):
                for name in METHODS:
                    runs[name].append(measure(name, problem))
            for measured in runs.values():
                seconds = statistics.median(r["seconds"] for r in measured)
                records.append(measured[0] | {"seed": seed, "seconds": seconds})
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(r) + "\n" for r in records))
    print(
        f"{'method':<16} {'solved':>8} {'products':>9} {'ratio':>6} {'points':>7} {'ratio':>6} {'CPU ratio':>9}  wanted"
    )
    for name in METHODS:
        s = summary(records, name)
        products, points = WANTED.get(name, (math.inf, math.inf))
        goals = [f"products <= {products}"] if products < math.inf else []
        goals += [f"points <= {points}"] if points < math.inf else []
        print(
            f"{name:<16} {s['solved']:>4}/{s['of']:<3} {s['hvps']:>9.1f} {s['hvps_ratio']:>6.2f} {s['points']:>7.1f} "
            f"{s['points_ratio']:>6.2f} {s['seconds_ratio']:>9.2f}  {', '.join(goals)}"
        )
    if arguments.large:
        large(arguments.large)


def large(n: int) -> None:
    """Extended Rosenbrock of n unknowns: seconds, memory-bound."""
    torch.set_num_threads(2)
    p = extended_rosenbrock(n)
    for name, run in (("arncg", kantor()), (BASE, scipy("trust-krylov"))):
        run(Counted(p))  # memory that the process touches for the first time is slow
        counted = Counted(p)
        started = time.perf_counter()
        x = run(counted)
        seconds = time.perf_counter() - started
        G = float(np.linalg.norm(p.grad_numpy(x)))
        print(f"extended Rosenbrock, n = {n:,}: {name} {seconds:.2f} s, {counted.hvps} products, |g| {G:.1e}")


if __name__ == "__main__":
    main()
