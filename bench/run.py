"""Run benchmarks: Kantor and its peers in one go, interleaved, with the machine's roofline beside them.

    python bench/run.py cg --sizes 64 128 256 --dtypes float64 float32 --threads 1 2 --peers all --repeats 3 -o results/
    python bench/run.py matrices            # the symmetric positive definite matrices that pyamg ships
    python bench/run.py curvature           # what testing the curvature costs an iteration
    python bench/run.py overhead            # one call through the extension module, and `import kantor`
    python bench/run.py report results/cg.jsonl

Writes <case>.jsonl (one record a measurement, as it comes in), <case>.txt (the tables) and <case>.png into the output
folder. Every (peer, problem, dtype, threads) is a process of its own; repetitions go round the peers, and medians are
reported. A copy kernel is timed before and after each group: where the two disagree by more than 15 %, or the load
average is high, the machine was not quiet, which is said beside the numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch loads its OpenMP

from kantor.bench import machine
from kantor.bench.harness import Spec, Worker, WorkerError
from kantor.bench.linalg.peers import PEERS
from kantor.bench.linalg.problems import pyamg_matrices
from kantor.bench.runner import QUIET_LOAD, QUIET_SPREAD

import overhead
import roofline
from linalg import cg_report, curvature

CG_MODULE = "linalg.bench_cg"
DEFAULT_RTOL = {"float64": 1e-8, "float32": 1e-5}  # float32 cannot hold a true residual of 1e-8
PREPARE_TIMEOUT = 600.0


class Recorder:
    """The results file: every record is on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.records: list[dict[str, Any]] = []
        path.write_text("")

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record and append it to the file."""
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


@dataclass(frozen=True)
class Plan:
    """What a run measures and within which limits (seconds)."""

    module: ModuleType
    goals: list[str]
    repeats: int
    timeout: float
    deadline: float
    reuse: bool

    def left(self) -> float:
        """Seconds before the run must end."""
        return self.deadline - time.monotonic()


def say(text: str) -> None:
    """Progress and warnings go to standard error, results to standard output."""
    print(text, file=sys.stderr, flush=True)


def check_load() -> None:
    """Warn when other processes keep the processors busy."""
    if machine.load() > QUIET_LOAD:
        say(f"warning: load average {os.getloadavg()[0]:.2f} on {machine.cpus()} processors; timings will be noisy")


@functools.cache
def memory_copy(threads: int, device: str) -> float:
    """Copy bandwidth beyond the caches, GB/s; measured once a run."""
    size = roofline.DEVICE_BYTES if device == "cuda" else machine.working_sets(threads)["DRAM"]
    return roofline.copy_bandwidth(threads, size, device).plain


class Calibration:
    """Times the same copy before and after a group, as yardstick and as a check that the machine is quiet."""

    def __init__(self, spec: Spec, state_bytes: int) -> None:
        self._threads, self._device = spec.threads, spec.device
        self._bytes = roofline.DEVICE_BYTES if spec.device == "cuda" else state_bytes
        self._copies = [self._time()]

    def _time(self) -> roofline.CopyBandwidth:
        return roofline.copy_bandwidth(self._threads, self._bytes, self._device)

    def finish(self) -> dict[str, Any]:
        """The second timing; the yardstick is the faster of the two, since noise only ever slows."""
        self._copies.append(self._time())
        plain = [copy.plain for copy in self._copies]
        streamed = [copy.non_temporal for copy in self._copies if copy.non_temporal is not None]
        spread = max(plain) / min(plain) - 1
        if spread > QUIET_SPREAD:
            say(f"warning: two timings of one copy differ by {100 * spread:.0f} %: the machine is not quiet")
        return {
            "copy_gbs": max(plain),
            "copy_nt_gbs": max(streamed) if streamed else None,
            "copy_bytes": self._bytes,
            "copy_spread": spread,
            "quiet": spread <= QUIET_SPREAD,
            "copy_source": self._copies[0].source,
            "copy_dram_gbs": memory_copy(self._threads, self._device),
        }


def run_group(specs: list[Spec], plan: Plan, recorder: Recorder, pool: dict[str, Worker]) -> None:
    """Measure all peers of one (problem, dtype, threads, device), repetition by repetition."""
    first = specs[0]
    label = f"{first.problem} {first.dtype} {first.threads}t {first.device}"
    calibration = Calibration(first, plan.module.state_bytes(first)) if plan.module.state_bytes(first) else None
    keep = plan.reuse or machine.fits([plan.module.memory_estimate(spec) for spec in specs])
    failed: set[str] = set()
    done: set[tuple[str, str]] = set()
    facts: dict[str, dict[str, Any]] = {}
    for repetition, spec in itertools.product(range(plan.repeats), specs):
        if spec.peer in failed:
            continue
        if plan.left() < 1:
            say(f"{label}: out of time, leaving out what is left")
            break
        identity = {"kind": "measurement", **asdict(spec), "repetition": repetition}
        try:
            worker = pool.get(spec.peer) or start(pool, spec)
            if spec.peer not in facts:
                facts[spec.peer] = worker.prepare(spec, min(PREPARE_TIMEOUT, plan.left()))
            for goal in plan.module.goals(spec, plan.goals):
                if goal == "solve" and (spec.peer, goal) in done and plan.module.slow(spec):
                    continue  # one solve to the tolerance is enough where it takes long
                result = worker.measure(goal, min(plan.timeout, plan.left()))
                done.add((spec.peer, goal))
                recorder.add(identity | {"goal": goal} | facts[spec.peer] | result)
                say(f"{label} #{repetition + 1} {spec.peer:18s} {goal:10s} {describe(result)}")
        except WorkerError as error:
            failed.add(spec.peer)
            recorder.add({**identity, "kind": "failure", "reason": str(error)})
            say(f"{label} {spec.peer}: failed: {error}")
            discard(pool, spec.peer)
        if not keep:
            discard(pool, spec.peer)
            facts.pop(spec.peer, None)
    if not plan.reuse:
        for peer in list(pool):
            discard(pool, peer)
    if calibration is not None and done:
        group = {key: getattr(first, key) for key in ("case", "problem", "dtype", "threads", "device")}
        recorder.add({"kind": "yardstick", **group} | calibration.finish())


def start(pool: dict[str, Worker], spec: Spec) -> Worker:
    """A new worker for the spec's peer."""
    pool[spec.peer] = Worker(spec.threads, CG_MODULE, pinned=spec.device == "cpu")
    return pool[spec.peer]


def discard(pool: dict[str, Worker], peer: str) -> None:
    """Stop a worker and forget it."""
    worker = pool.pop(peer, None)
    if worker is not None:
        worker.stop()


def describe(result: dict[str, Any]) -> str:
    """One measurement in a few words."""
    if "ms_per_iteration" in result:
        return f"{result['ms_per_iteration']:9.4f} ms/iteration, residual {result['residual']:.2e}"
    return f"{result['seconds']:9.4f} s, {result['iterations']} iterations, residual {result['residual']:.2e}"


def specs_of(options: argparse.Namespace, problems: list[str], module: ModuleType) -> Iterator[list[Spec]]:
    """The groups of a run, smallest problem first; peers that cannot run are named once, with the reason."""
    told: set[str] = set()
    for problem in problems:
        for dtype in options.dtypes:
            for threads in options.threads:
                group = []
                for peer in options.peers:
                    iterations = options.iterations or module.default_iterations(problem, options.device)
                    rtol = options.rtol or DEFAULT_RTOL[dtype]
                    spec = Spec(options.case, problem, peer, dtype, threads, options.device, iterations, rtol)
                    reason = module.obstacle(spec)
                    if not reason:
                        group.append(spec)
                    elif f"{peer}: {reason}" not in told:
                        told.add(f"{peer}: {reason}")
                        say(f"without {peer}: {reason}")
                if group:
                    yield group


def run_cg(options: argparse.Namespace, problems: list[str]) -> int:
    """The cases "cg" and "matrices"."""
    if options.device == "cuda" and not roofline.device_is_there("cuda"):
        say(f"{options.case}: torch sees no CUDA device")
        return 1
    module = importlib.import_module(CG_MODULE)
    recorder = Recorder(options.output / f"{options.case}.jsonl")
    recorder.add(machine.environment())
    check_load()
    deadline = time.monotonic() + options.time_limit
    plan = Plan(module, options.goals, options.repeats, options.timeout, deadline, options.device == "cuda")
    pool: dict[str, Worker] = {}
    groups = list(specs_of(options, problems, module))
    if plan.reuse:  # all at once, so that they load their libraries side by side
        for spec in {spec.peer: spec for specs in groups for spec in specs}.values():
            start(pool, spec)
    try:
        for specs in groups:
            goals = plan.goals
            if options.case == "cg" and module.unknowns(specs[0].problem) > options.solve_limit**3:
                goals = [goal for goal in goals if goal != "solve"]
            specs = [spec for spec in specs if module.goals(spec, goals)]
            if specs and plan.left() > 1:
                run_group(specs, replace(plan, goals=goals), recorder, pool)
    except KeyboardInterrupt:
        say("interrupted; reporting what was measured")
    finally:
        for peer in list(pool):
            discard(pool, peer)
    return report(recorder.path)


def report(path: Path) -> int:
    """Tables and picture of a results file; 1 if it holds no measurement."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    tables = cg_report.tables_of(records)
    for table in tables:
        table.print()
        print()
    path.with_suffix(".txt").write_text("\n\n".join(table.text() for table in tables) + "\n")
    with contextlib.suppress(ImportError):
        cg_report.picture(records, path.with_suffix(".png"))
    return 0 if any(record["kind"] == "measurement" for record in records) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cases = parser.add_subparsers(dest="case", required=True, metavar="CASE")

    def solver_case(name: str, text: str, default_repeats: int) -> argparse.ArgumentParser:
        case = cases.add_parser(name, help=text, description=text)
        case.add_argument("--dtypes", nargs="+", choices=sorted(DEFAULT_RTOL), default=["float64"])
        case.add_argument("--threads", nargs="+", type=int, default=[min(2, machine.cpus())])
        case.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        case.add_argument("--peers", nargs="+", default=["all"], help=f"all, or some of: {', '.join(PEERS)}")
        case.add_argument("--repeats", type=int, default=default_repeats)
        case.add_argument("--rtol", type=float, help="of the goal solve (default 1e-8, float32 1e-5)")
        case.add_argument("--iterations", type=int, help="of the goal iterations (default: about a second's worth)")
        case.add_argument("--timeout", type=float, default=600.0, help="seconds for one measurement")
        case.add_argument("--time-limit", type=float, default=1e9, help="seconds for the whole run")
        return case

    cg = solver_case("cg", "3-D Poisson, matrix-free and CSR", 3)
    cg.add_argument("--sizes", nargs="+", type=int, default=[64, 128, 256])
    cg.add_argument("--goals", nargs="+", choices=["iterations", "solve"], default=["iterations", "solve"])
    cg.add_argument("--solve-limit", type=int, default=128, help="largest side that is solved to the tolerance")
    matrices = solver_case("matrices", "the symmetric positive definite matrices that pyamg ships", 5)
    matrices.add_argument("--matrices", nargs="+", help="names (default: all that are positive definite)")
    tested = cases.add_parser("curvature", help="what testing the curvature costs an iteration")
    tested.add_argument("--sizes", nargs="+", type=int, default=[32, 64, 128])
    cases.add_parser("overhead", help="cost of one call and of the import")
    again = cases.add_parser("report", help="tables and picture of a results file once more")
    again.add_argument("results", type=Path)
    for case in (cg, matrices, tested, cases.choices["overhead"]):
        case.add_argument("-o", "--output", type=Path, default=Path("results"), help="folder (default: results)")
    options = parser.parse_args(arguments)
    if "peers" in options:
        options.peers = list(PEERS) if options.peers == ["all"] else options.peers
        unknown = [name for name in options.peers if name not in PEERS]
        if unknown:
            parser.error(f"unknown peers {unknown}; known: {', '.join(PEERS)}")
    if options.case == "matrices":
        options.goals = ["solve"]
    if "iterations" in options and options.iterations is not None and options.iterations < 4:
        parser.error("--iterations must be at least 4, since a quarter of them is timed as well")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = parse(arguments)
    if options.case == "report":
        return report(options.results)
    if options.case == "cg":
        return run_cg(options, [f"poisson3d-{side}" for side in sorted(options.sizes)])
    if options.case == "matrices":
        return run_cg(options, options.matrices or pyamg_matrices())
    check_load()
    recorder = Recorder(options.output / f"{options.case}.jsonl")
    recorder.add(machine.environment())
    curvature_case = options.case == "curvature"
    try:
        result = curvature.run(options.sizes, recorder.add) if curvature_case else overhead.run(recorder.add)
    except RuntimeError as error:
        say(f"{options.case}: {error}")
        return 1
    result.print()
    recorder.path.with_suffix(".txt").write_text(result.text() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
