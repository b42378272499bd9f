"""Entropic transport to an L1 marginal error of 1e-9, Kantor beside POT, regot, OTT-JAX and a loop in torch.

    python bench/transport/bench_solve.py --sizes 500 1000 --regs 1e-2 1e-3 --threads 1 -o results/transport.jsonl
    python bench/transport/bench_solve.py --table results/transport.jsonl

Each peer has a process of its own, killed at the time limit. Its stopping threshold is first loosened or tightened to
the loosest at which the plan it returns has the error asked for (both marginals, formed here in float64); then all
peers take turns, and medians count. Forming the dense plan is part of everyone's time, compiling (XLA) of nobody's.
With one thread the time is the processor's, with more it is the clock's. Failed: the tolerance is not reached within
the limit, whatever the threshold. A peer that slows down as the regularisation falls is not tried below one at which
it failed. POT's network simplex is there for comparison: its time, and by how much the entropic cost exceeds its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from kantor.bench import machine, tables
from kantor.bench.cases.transport import ROUNDS, TOL, make_problem, next_threshold
from kantor.bench.harness import Measure, Spec, Worker, WorkerError
from kantor.bench.transport import peers

PROBLEMS = ("random", "images-l1", "images-l2", "colours", "digits", "mixture-1d", "clouds")
FAMILIES = ("regot", "pot", "ott", "torch", "exact")
PACKAGES = ("POT", "regot", "ott-jax", "jax", "torch", "numpy", "scipy")
PREPARE_SECONDS = 180.0  # importing libraries and making a problem


# --- in a worker ---


def prepare(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Build problem and solver, and return what measures one solve to a threshold."""
    torch.set_num_threads(spec.threads)
    peers.set_blas_threads(spec.threads)
    name, n, reg, seed = spec.problem.split("/")
    problem = make_problem(name, int(n), float(reg), int(seed))
    solve = peers.PEERS[spec.peer].prepare(problem)
    C, a, b = (t.numpy() for t in (problem.C, problem.a, problem.b))

    def measure(goal: str) -> dict[str, Any]:
        threshold, limit = map(float, goal.split("/"))
        # With one thread the limit is the processor's time, which a busy machine does not shorten: the signal ends the
        # process, whatever native code it is in.
        timer = limit if spec.threads == 1 else 0.0
        signal.setitimer(signal.ITIMER_PROF, timer)
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = solve(threshold)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        plan = np.asarray(outcome.plan, dtype=np.float64)
        error = float(np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum())
        cost = float(np.vdot(plan, C))
        finite = math.isfinite(error) and math.isfinite(cost)
        return {
            "cpu": cpu,
            "wall": wall,
            "steps": outcome.steps,
            "passes": outcome.passes,
            "error": error if finite else None,  # JSON has no infinity
            "cost": cost if finite else None,
        }

    return measure, {"n": C.shape[0], "m": C.shape[1], "entropy_bound": peers.entropy_bound(problem)}


# --- in the runner ---


@dataclass
class Candidate:
    """A peer on one problem: its worker while it lives, and what has been found out."""

    peer: peers.Peer
    worker: Worker | None = None
    threshold: float = TOL
    status: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def ask(self, spec: Spec, limit: float, prepare_first: bool) -> dict[str, Any] | None:
        """One measurement; None, a reason in `status` and no worker when it failed."""
        try:
            if self.worker is None:
                self.worker = Worker(spec.threads, "transport.bench_solve")
                prepare_first = True
            if prepare_first:
                self.facts = self.worker.prepare(spec, PREPARE_SECONDS)
            # The limit is the solver's; forming marginals and compiling come on top.
            patience = (4 if spec.threads == 1 else 1) * limit + 15
            run = self.worker.measure(f"{self.threshold!r}/{limit!r}", patience)
        except WorkerError as error:
            ran_out = "no answer" in str(error) or f"exit status {-signal.SIGPROF}" in str(error)
            self.status = "time limit" if ran_out else str(error)[:120]
            self.stop()
            return None
        if run["cpu" if spec.threads == 1 else "wall"] > limit:
            self.status = "time limit"
            return None
        return run

    def stop(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


def calibrate(candidate: Candidate, spec: Spec, limit: float) -> None:
    """Find the loosest threshold that gives the accuracy; each kind of test is off by a nearly constant factor."""
    candidate.threshold, error = TOL, None
    for round_number in range(ROUNDS):
        run = candidate.ask(spec, limit, round_number == 0)
        if run is None:
            return
        candidate.last = run
        error = run["error"]
        if candidate.peer.exact or (error is not None and error <= TOL):
            candidate.status = "converged"
            if run["cpu" if spec.threads == 1 else "wall"] > min(5.0, limit / 4):
                candidate.runs.append(run)  # long enough to count, and too long to be repeated at leisure
            return
        if error is None or error > 1e4 * candidate.threshold:  # it stopped for another reason
            break
        candidate.threshold = next_threshold(candidate.threshold, error, first=round_number == 0)
    candidate.status = "not finite" if error is None else f"stuck at {error:.0e}"


def run_group(
    options: argparse.Namespace, workers: dict[str, Candidate], name: str, n: int, reg: float, failed: set[tuple]
) -> list[dict[str, Any]]:
    """All peers on one problem; returns a record each."""
    threads = options.threads_now
    alive = []
    together = machine.fits([(500 << 20) + 48 * n * n] * len(options.methods))
    for method in options.methods:
        candidate = Candidate(peers.PEERS[method], workers.pop(method).worker if method in workers else None)
        spec = _spec(options, candidate, name, n, reg)
        key = (threads, name, n, method)
        if key in failed:
            candidate.status = "failed at larger reg"
        else:
            calibrate(candidate, spec, options.limit)
        if candidate.status == "converged":
            alive.append(candidate)
        elif candidate.peer.slows:
            failed.add(key)
        if not together:
            _repeat([candidate] if candidate in alive else [], options, name, n, reg)
            candidate.stop()
        workers[method] = candidate
    if together:
        _repeat(alive, options, name, n, reg)
    return [_record(workers[method], threads, name, n, reg, options.seed) for method in options.methods]


def _repeat(alive: list[Candidate], options: argparse.Namespace, name: str, n: int, reg: float) -> None:
    """Take turns until everyone has its repetitions, slow ones fewer."""
    for turn in range(options.repeats):
        for candidate in alive:
            seconds = candidate.last["cpu" if options.threads_now == 1 else "wall"]
            wanted = options.repeats if seconds * options.repeats < options.limit / 2 else 1
            if len(candidate.runs) >= wanted or turn >= wanted or candidate.status != "converged":
                continue
            run = candidate.ask(_spec(options, candidate, name, n, reg), options.limit, False)
            if run is not None:
                candidate.runs.append(run)


def _spec(options: argparse.Namespace, candidate: Candidate, name: str, n: int, reg: float) -> Spec:
    problem = f"{name}/{n}/{reg!r}/{options.seed}"
    return Spec("transport", problem, candidate.peer.name, "float64", options.threads_now, "cpu", 0, TOL)


def _record(candidate: Candidate, threads: int, name: str, n: int, reg: float, seed: int) -> dict[str, Any]:
    converged = candidate.status == "converged" and bool(candidate.runs)
    last = candidate.runs[-1] if converged else candidate.last
    return {
        "kind": "solve",
        "problem": name,
        "size": n,
        "reg": reg,
        "seed": seed,
        "threads": threads,
        "peer": candidate.peer.name,
        "family": candidate.peer.family,
        "status": candidate.status,
        "cpu": statistics.median(run["cpu"] for run in candidate.runs) if converged else None,
        "wall": statistics.median(run["wall"] for run in candidate.runs) if converged else None,
        "repeats": len(candidate.runs),
        "threshold": candidate.threshold,
        "steps": last.get("steps"),
        "passes": last.get("passes"),
        "step": candidate.peer.step,
        "error": last.get("error"),
        "cost": last.get("cost"),
        "n": candidate.facts.get("n"),
        "m": candidate.facts.get("m"),
        "entropy_bound": candidate.facts.get("entropy_bound"),
    }


# --- tables ---


def seconds_of(record: dict[str, Any]) -> float:
    """The time that counts: the processor's for one thread, the clock's for more."""
    return float(record["cpu"] if record["threads"] == 1 else record["wall"])


def best_of(records: list[dict[str, Any]], family: str) -> dict[str, Any] | None:
    """The fastest converged configuration of a family."""
    converged = [record for record in records if record["family"] == family and record["cpu"] is not None]
    return min(converged, key=seconds_of, default=None)


def make_tables(records: list[dict[str, Any]]) -> list[tables.Table]:
    """One table for each number of threads and size, and one of geometric means."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["threads"], record["size"], record["problem"], record["reg"]].append(record)
    made: dict[tuple[int, int], tables.Table] = {}
    ratios: dict[tuple[int, float, str], list[float]] = defaultdict(list)
    failures: dict[tuple[int, float, str], int] = defaultdict(int)
    for (threads, size, problem, reg), group in groups.items():
        present = [family for family in FAMILIES if any(record["family"] == family for record in group)]
        kantor, exact = best_of(group, "kantor"), best_of(group, "exact")
        clock = "processor seconds" if threads == 1 else "seconds"
        table = made.setdefault(
            (threads, size),
            tables.Table(
                f"n = {size}, {threads} thread{'s' * (threads > 1)}, L1 error <= {TOL:g}: {clock}, [x Kantor], steps",
                ("problem", "reg", "Kantor, steps/passes", "error", *FAMILIES, "above exact"),
                notes=[],
            ),
        )
        mine = "-"
        if kantor is not None:
            mine = f"{_seconds(seconds_of(kantor))} {kantor['steps']}/{kantor['passes']}"
        elif any(record["family"] == "kantor" for record in group):
            mine = "FAILED " + next(record["status"] for record in group if record["family"] == "kantor")
        cells = []
        for family in FAMILIES:
            best = best_of(group, family)
            if best is None:
                cells.append("failed" if family in present else "-")
                failures[threads, reg, family] += family in present
                continue
            ratio = seconds_of(best) / seconds_of(kantor) if kantor is not None else None
            if ratio is not None:
                ratios[threads, reg, family].append(ratio)
            label = best["peer"].removeprefix(family + "-")
            steps = "" if family == "exact" else f" {label} {best['steps']}"
            cells.append(f"{_seconds(seconds_of(best))}{f' [{ratio:.2f}x]' if ratio is not None else ''}{steps}")
        above = "-"
        if exact is not None:
            entropic = kantor or next((best for f in FAMILIES[:-1] if (best := best_of(group, f)) is not None), None)
            if entropic is not None:
                above = f"{(entropic['cost'] - exact['cost']) / max(exact['cost'], 1e-300):.1e}"
        table.add(problem, f"{reg:.0e}", mine, f"{kantor['error']:.0e}" if kantor is not None else "-", *cells, above)
        _note_values(table, problem, reg, group)
    return [*made.values(), _means(ratios, failures)]


def _note_values(table: tables.Table, problem: str, reg: float, group: list[dict[str, Any]]) -> None:
    """Converged peers must have found the same cost: to 1e-8 of it, or what the marginals' error allows."""
    entropic = [record for record in group if record["family"] != "exact" and record["cpu"] is not None]
    if len(entropic) > 1:
        costs = [record["cost"] for record in entropic]
        spread = (max(costs) - min(costs)) / max(max(costs), 1e-300)
        if spread > 1e-8 and max(costs) - min(costs) > 10 * TOL:
            low, high = (choose(entropic, key=lambda record: record["cost"])["peer"] for choose in (min, max))
            table.notes.append(f"{problem}, reg {reg:.0e}: costs differ by {spread:.0e} of them ({low} to {high})")


def _means(
    ratios: dict[tuple[int, float, str], list[float]], failures: dict[tuple[int, float, str], int]
) -> tables.Table:
    table = tables.Table(
        "time / Kantor's: geometric mean, least, over the problems that the library's best configuration solves",
        ("threads", "reg", "library", "mean", "least", "problems", "failed"),
    )
    for key in sorted(ratios.keys() | failures.keys(), key=lambda key: (key[0], -key[1], FAMILIES.index(key[2]))):
        values = ratios.get(key, [])
        mean = f"{math.exp(statistics.fmean(map(math.log, values))):.2f}" if values else "-"
        threads, reg, family = key
        least = f"{min(values):.2f}" if values else "-"
        table.add(threads, f"{reg:.0e}", family, mean, least, len(values), failures.get(key, 0))
    return table


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main() -> int:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=(500, 1000, 2000))
    parser.add_argument("--regs", nargs="+", type=float, default=(1e-2, 1e-3, 1e-4, 1e-5))
    parser.add_argument("--methods", nargs="+", default=peers.DEFAULT, choices=tuple(peers.PEERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument(
        "--limit",
        type=float,
        default=60.0,
        help="seconds a solve may take: the processor's with one thread, else the clock's",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, help="print the tables of an earlier run")
    parser.add_argument("-o", "--output", type=Path, help="append one JSON record a line as they come")
    options = parser.parse_args()
    if options.table is not None:
        lines = [json.loads(line) for line in options.table.read_text().splitlines()]
        for table in make_tables([record for record in lines if record["kind"] == "solve"]):
            table.print()
        return 0

    def write(record: dict[str, Any]) -> None:
        if options.output is not None:
            with options.output.open("a") as file:
                file.write(json.dumps(record) + "\n")

    environment = machine.environment()
    environment["versions"] |= _versions()
    write(environment)
    records: list[dict[str, Any]] = []
    failed: set[tuple] = set()
    for threads in options.threads:
        options.threads_now = threads
        workers: dict[str, Candidate] = {}
        for n in options.sizes:
            for name in options.problems:
                for reg in sorted(options.regs, reverse=True):
                    for record in run_group(options, workers, name, n, reg, failed):
                        records.append(record)
                        write(record)
                        took = f"{record['cpu']:9.3f} s" if record["cpu"] is not None else f"{record['status']:>11.60}"
                        line = f"{threads} {n:5d} {name:10s} {reg:.0e} {record['peer']:20s} {took} {record['steps']}"
                        print(line, file=sys.stderr, flush=True)
        for candidate in workers.values():
            candidate.stop()
    for table in make_tables(records):
        table.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
