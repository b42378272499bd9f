"""The ten problems of kantor.datasets: Kantor's minimisers, SciPy's and torch's L-BFGS in one run.

    python bench/optim/bench_minimize.py --seeds 0 1 2 --repeats 3 -o results/minimize.jsonl
    python bench/optim/bench_minimize.py --autograd          # derivatives by torch instead of by hand

Every method gets the same callables (value, gradient, Hessian-vector product), tolerance 1e-6 on the Euclidean norm of
the gradient and a budget of 20 000 products or 40 000 gradients, kept by an exception from inside a callable. SciPy and
torch run by themselves, not through Kantor. SciPy's Newton-CG and torch's L-BFGS do not test that norm: they are
stopped from outside, with the gradient that they asked for last. CPU seconds are medians over interleaved repetitions.

Means are shifted geometric (shift 10), given twice: over the problems that the method and trust-krylov both solved, and
over all problems, where an unsolved one counts with what was spent on it. Work counts gradients, a product as two.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kantor.bench.cases.minimize import TOL, Counted, OverBudget, kantor, lbfgs, scipy
from kantor.datasets import MinimizationProblem, minimization_problems
from kantor.datasets.minimization import extended_rosenbrock

BASE = "trust-krylov"


METHODS = {
    BASE: scipy("trust-krylov"),
    "trust-ncg": scipy("trust-ncg"),
    "newton-cg": scipy("Newton-CG"),
    "lbfgs": lbfgs,
    "arncg": kantor(),
    "arncg guarantee": kantor(preset="guarantee"),
    "arncg paper": kantor(preset="paper"),
}
# Wanted against trust-krylov: products, points.
WANTED = {"arncg": (1.1, math.inf), "arncg guarantee": (1.8, 0.85), "arncg paper": (2.4, 0.85)}


def measure(name: str, problem: MinimizationProblem, autograd: bool) -> dict[str, Any]:
    """One run."""
    counted = Counted(problem, autograd)
    started = time.process_time()
    try:
        x = METHODS[name](counted)
        solved = bool(np.linalg.norm(problem.grad_numpy(x)) <= TOL * (1 + 1e-6))  # two ways to sum, one gradient
    except OverBudget:
        solved = False
    seconds = time.process_time() - started
    counts = {"hvps": counted.hvps, "points": counted.points, "work": counted.grads + 2 * counted.hvps}
    return {"method": name, "problem": problem.name, "solved": solved, **counts, "seconds": seconds}


def shifted_mean(values: list[float], shift: float = 10.0) -> float:
    return math.exp(statistics.fmean(math.log(v + shift) for v in values)) - shift


def summary(records: list[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Ratios of a method's means to the base's: over what both solved, and over all."""
    by = {(r["method"], r["seed"], r["problem"]): r for r in records}
    everything = [(r, by[BASE, r["seed"], r["problem"]]) for r in records if r["method"] == name]
    both = [(a, b) for a, b in everything if a["solved"] and b["solved"]]
    out = {}
    for label, pairs in (("both", both), ("all", everything)):
        out[label] = {
            key: shifted_mean([a[key] for a, _ in pairs]) / shifted_mean([b[key] for _, b in pairs])
            for key in ("hvps", "points", "work")
        }
        out[label]["seconds"] = math.exp(statistics.fmean(math.log(a["seconds"] / b["seconds"]) for a, b in pairs))
    return out


def table(records: list[dict[str, Any]]) -> str:
    """Ratios to trust-krylov and what is wanted of them."""
    lines = [
        f"{'':<16} {'':>7}  {'over what both solved':^31}  {'over all, as spent':^31}",
        f"{'method':<16} {'solved':>7}" + f"  {'products':>8} {'points':>6} {'work':>6} {'CPU s':>6} " * 2 + " wanted",
    ]
    for name in METHODS:
        mine = [r for r in records if r["method"] == name]
        line = f"{name:<16} {sum(r['solved'] for r in mine):>4}/{len(mine):<2}"
        for ratios in summary(records, name).values():
            line += "  {hvps:>8.2f} {points:>6.2f} {work:>6.2f} {seconds:>6.2f} ".format(**ratios)
        products, points = WANTED.get(name, (math.inf, math.inf))
        goals = [f"products <= {products}"] if products < math.inf else []
        goals += [f"points <= {points}"] if points < math.inf else []
        lines.append(f"{line} {', '.join(goals)}".rstrip())
    base = [r for r in records if r["method"] == BASE]
    products, points = (shifted_mean([r[key] for r in base]) for key in ("hvps", "points"))
    lines.append(f"{BASE} over all: {products:.1f} products, {points:.1f} points")
    for name in METHODS:
        unsolved = [f"{r['problem']} ({r['seed']})" for r in records if r["method"] == name and not r["solved"]]
        if unsolved:
            lines.append(f"not solved by {name}: {', '.join(unsolved)}")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the records, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--autograd", action="store_true", help="derivatives by torch")
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
                    runs[name].append(measure(name, problem, arguments.autograd))
            for measured in runs.values():
                seconds = statistics.median(r["seconds"] for r in measured)
                records.append(measured[0] | {"seed": seed, "seconds": seconds})
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(r) + "\n" for r in records))
    print(table(records), flush=True)
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
